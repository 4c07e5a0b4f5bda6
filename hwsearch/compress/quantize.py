"""Ranges of activations from calibration data, and int8 weights. `formats` has the other precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.edges import output_node
from hwsearch.graph.nonfinite import check_finite
from hwsearch.graph.trace import Traced
from hwsearch.network.variants import INT8_BITS, int8_levels

LEVELS = int8_levels(INT8_BITS)
UNSIGNED_LEVELS = 255
METHODS = ("mse", "minmax")
BINS = 2048
_SAMPLE = 1 << 18
VANISHING = 1e-34
"""Magnitude below which a tensor counts as zero: scales of its values would be denormal, which runtimes take for zero."""

Key = tuple[str, int, str]
"""(unit, call, port): port is `in0`, `in1` or `out`."""


@dataclass(frozen=True)
class Range:
    """What calibration says of one tensor.

    limit: the largest magnitude that int8 should represent; top: the largest seen, which floats of few bits represent.
    Both are infinite where NaN or infinity was seen. unsigned: whether its int8 is uint8 with zero point 0, as nothing negative
    was seen.
    """

    limit: float
    top: float
    unsigned: bool = False

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.top))


Ranges = Mapping[Key, Range]


@dataclass(frozen=True)
class QuantizedWeight:
    """int8 values (shape of the weight) and one fp32 scale per output channel."""

    values: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int

    def dequantized(self) -> NDArray[np.float32]:
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        return (self.values.astype(np.float32) * self.scales.reshape(shape)).astype(np.float32)


def quantize_weight(weight: torch.Tensor, axis: int, levels: int = LEVELS) -> QuantizedWeight:
    """Round to nearest, symmetric, one scale per output channel from its largest magnitude.

    levels: the largest integer, 127 or that of fewer bits. A channel whose values lie on a grid of so many levels already keeps
    it: weights rounded before (GPTQ) stay as they are.
    """
    shape = [-1 if d == axis else 1 for d in range(weight.dim())]
    weight = weight.detach().float()
    rows = weight.movedim(axis, 0).flatten(1)
    top = rows.abs().amax(1)
    scales = torch.where(top > 0, _own_grid(rows, top, levels), torch.ones_like(top))
    values = (weight / scales.reshape(shape)).round().clamp(-levels, levels).to(torch.int8)
    return QuantizedWeight(values.numpy(), scales.numpy().astype(np.float32), axis)


def _own_grid(rows: torch.Tensor, top: torch.Tensor, levels: int) -> torch.Tensor:
    """Scales [rows]: the largest magnitude is `levels`, or an integer above half of that which makes all values integers."""
    code = torch.full_like(top, levels)
    largest = rows.gather(1, rows.abs().topk(min(8, rows.shape[1]), 1).indices)
    trials = torch.arange(levels, levels // 2, -1)
    scales = (top / trials[:, None]).clamp_min(1e-30)
    near = _whole(largest / scales[:, :, None])  # the largest values rule out nearly every grid
    left = torch.ones_like(top, dtype=torch.bool)
    for trial in near.any(1).nonzero().flatten().tolist():
        own = (near[trial] & left).nonzero().flatten()
        found = own[_whole(rows[own] / scales[trial, own, None])]
        code[found] = int(trials[trial])
        left[found] = False
    return top / code


def _whole(steps: torch.Tensor) -> torch.Tensor:
    """For each row whether it holds integers up to rounding errors."""
    return ((steps - steps.round()).abs() < 2e-3).all(-1)


class _Observer(torch.fx.Interpreter):
    """Hands every tensor that may be quantized to `see` once, with all the keys that it has."""

    def __init__(self, traced: Traced, see: Callable[[tuple[Key, ...], torch.Tensor], None]) -> None:
        super().__init__(traced.graph)
        nodes = {n.name: n for n in traced.graph.graph.nodes}
        self.see = see
        keys: dict[str, list[Key]] = {}
        for unit, calls in traced.sites.items():
            for index, site in enumerate(calls):
                node = nodes[site.node]
                for port, position in enumerate(site.activations):
                    keys.setdefault(node.args[position].name, []).append((unit, index, f"in{port}"))
                keys.setdefault(output_node(node).name, []).append((unit, index, "out"))
        self.keys = {name: tuple(own) for name, own in keys.items()}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.keys:
            self.see(self.keys[n.name], value)
        return value


class _Seen:
    """What calibration saw of one tensor: its largest magnitude, its least value and a random sample of all magnitudes."""

    def __init__(self) -> None:
        self.top = self.low = 0.0
        self.parts: list[torch.Tensor] = []

    def add(self, value: torch.Tensor, keep: int, generator: torch.Generator) -> None:
        """At most `keep` of the value's magnitudes join the sample; 0 keeps none."""
        low, high = (float(v) for v in torch.aminmax(value))
        if not (np.isfinite(low) and np.isfinite(high)):
            self.top = float("inf")
        self.top = max(self.top, -low, high)  # which NaN is never
        self.low = min(self.low, low)
        if not keep or not np.isfinite(self.top):
            return
        flat = value.reshape(-1)
        if flat.numel() > keep:
            flat = flat[torch.randint(flat.numel(), (keep,), generator=generator)]
        self.parts.append(flat.abs())


def activation_ranges(
    batches: Iterable[tuple[Traced, tuple[Any, ...], dict[str, Any]]],
    method: str = "mse",
    *,
    unsigned: bool = False,
) -> dict[Key, Range]:
    """The range of each tensor that may be quantized.

    batches: calibration batches, each with a trace for its shape; each runs once. method: of the limit, `minmax` (the largest
    seen) or `mse` (least mean squared error of rounding and clipping). unsigned: what was
    never negative is quantized to uint8, but for the second activation of a product, which stands where weights do.
    Tensors of more than 2^18 values are sampled at random. Raises InvalidInput where an output of the network is NaN or
    infinite; within the network both are legal.
    """
    if method not in METHODS:
        raise InvalidInput(f"unknown range method {method!r}; expected one of {', '.join(METHODS)}")
    batches = list(batches)
    keep = 0 if method == "minmax" else max(_SAMPLE // max(len(batches), 1), 1 << 10)
    generator = torch.Generator().manual_seed(0)
    seen: dict[tuple[Key, ...], _Seen] = {}

    def see(keys: tuple[Key, ...], value: torch.Tensor) -> None:
        own = seen.setdefault(keys, _Seen())
        if value.numel():
            own.add(value.detach().float(), keep, generator)

    with torch.no_grad():
        for number, (traced, args, kwargs) in enumerate(batches):
            inputs = flat_inputs(traced.graph, args, kwargs)
            outputs = _Observer(traced, see).run(*inputs, enable_io_processing=False)
            check_finite(outputs, traced.graph, inputs, f"batch {number} of the calibration data")
    found: dict[Key, Range] = {}
    for keys, own in seen.items():
        signed = (
            _range(own, method, unsigned=False) if any(k[2] == "in1" for k in keys) or not unsigned else None
        )
        free = _range(own, method, unsigned=own.low >= 0.0) if unsigned else signed
        for key in keys:
            which = signed if key[2] == "in1" else free
            assert which is not None
            found[key] = which
    return found


def _range(seen: _Seen, method: str, *, unsigned: bool) -> Range:
    if not np.isfinite(seen.top):
        return Range(float("inf"), float("inf"))
    if seen.top < VANISHING:
        return Range(1.0, 1.0)
    return Range(_limit(seen, method, UNSIGNED_LEVELS if unsigned else LEVELS), seen.top, unsigned)


def _limit(seen: _Seen, method: str, levels: int) -> float:
    if method == "minmax":
        return seen.top
    sample = torch.cat(seen.parts)
    counts = torch.histc(sample, BINS, 0.0, seen.top).double().numpy()
    limit = _mse_limit(counts, seen.top, levels)
    # The histogram rounds; the sample itself has the last word between clipping and not.
    error, unclipped = (
        float((on_grid(sample, x / levels, unsigned=levels == UNSIGNED_LEVELS) - sample).square().mean())
        for x in (limit, seen.top)
    )
    return limit if error <= unclipped else seen.top


def _mse_limit(counts: NDArray[np.float64], top: float, levels: int) -> float:
    centers = (np.arange(BINS) + 0.5) * top / BINS
    limits = top * np.geomspace(0.05, 1.0, 80)
    steps = limits[:, None] / levels
    rounded = np.minimum(np.round(centers / steps), levels) * steps
    errors = ((centers - rounded) ** 2 * counts).sum(axis=1)
    return float(limits[int(np.argmin(errors))])


def int8_scale(of: Range, port: str, bits: int = INT8_BITS) -> float:
    """The scale that an activation is quantized to int8 with, at a port of a unit (see `Key`).

    The second activation of a product stands where others have their weight, so it has as many bits (`bits`): its largest
    magnitude seen is then the largest integer, since nothing but the range keeps the numbers below that.
    """
    if port == "in1" and bits < INT8_BITS:
        return of.top / int8_levels(bits)
    return of.limit / (UNSIGNED_LEVELS if of.unsigned else LEVELS)


def on_grid(x: torch.Tensor, step: float, *, unsigned: bool = False) -> torch.Tensor:
    """What QuantizeLinear then DequantizeLinear return: int8 or uint8, zero point 0, of this scale in fp32."""
    scale = float(np.float32(step))
    low, high = (0, UNSIGNED_LEVELS) if unsigned else (-LEVELS - 1, LEVELS)
    return (x / scale).round().clamp(low, high) * scale

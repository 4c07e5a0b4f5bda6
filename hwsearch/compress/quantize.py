"""Ranges of activations from calibration data, and int8 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.errors import InvalidInput
from hwsearch.trace import Traced, flat_inputs, output_node

LEVELS = 127
METHODS = ("mse", "percentile", "minmax")
BINS = 2048
PERCENTILE = 99.99
_SAMPLE = 1 << 19

Key = tuple[str, int, str]
"""(unit, call, port): port is `in0`, `in1` or `out`."""


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


def quantize_weight(weight: torch.Tensor, axis: int) -> QuantizedWeight:
    """Round to nearest, symmetric, one scale per output channel from its largest magnitude."""
    dims = [d for d in range(weight.dim()) if d != axis]
    scales = weight.detach().float().abs().amax(dims, keepdim=True) / LEVELS
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (weight.detach().float() / scales).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return QuantizedWeight(values.numpy(), scales.flatten().numpy().astype(np.float32), axis)


class _Observer(torch.fx.Interpreter):
    """Hands every tensor that may be quantized to `see`."""

    def __init__(self, traced: Traced, see: Callable[[Key, torch.Tensor], None]) -> None:
        super().__init__(traced.graph)
        nodes = {n.name: n for n in traced.graph.graph.nodes}
        self.see = see
        self.keys: dict[str, list[Key]] = {}
        for unit, calls in traced.sites.items():
            for index, site in enumerate(calls):
                node = nodes[site.node]
                for port, position in enumerate(site.activations):
                    self.keys.setdefault(node.args[position].name, []).append((unit, index, f"in{port}"))  # type: ignore[union-attr]
                self.keys.setdefault(output_node(node).name, []).append((unit, index, "out"))

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        for key in self.keys.get(n.name, ()):
            self.see(key, value)
        return value


def activation_ranges(
    batches: Iterable[tuple[Traced, tuple[Any, ...], dict[str, Any]]], method: str = "mse"
) -> dict[Key, float]:
    """The largest magnitude to represent, for each tensor that may be quantized.

    batches: calibration batches, each with a trace for its shape. method: `minmax` (the largest seen),
    `percentile` (99.99 % of magnitudes) or `mse` (least mean squared error of rounding and clipping).
    Raises InvalidInput where an activation is NaN or infinite.
    """
    if method not in METHODS:
        raise InvalidInput(f"unknown range method {method!r}; expected one of {', '.join(METHODS)}")
    batches = list(batches)
    largest: dict[Key, float] = {}

    def see_largest(key: Key, value: torch.Tensor) -> None:
        top = float(value.detach().abs().max()) if value.numel() else 0.0
        if not np.isfinite(top):
            raise InvalidInput(
                f"the input or output of unit {key[0]} is NaN or infinite on calibration data; "
                "check the calibration batches"
            )
        largest[key] = max(largest.get(key, 0.0), top)

    _observe(batches, see_largest)
    if method == "minmax":
        return {key: top or 1.0 for key, top in largest.items()}
    counts: dict[Key, NDArray[np.float64]] = {}

    def see_histogram(key: Key, value: torch.Tensor) -> None:
        magnitudes = value.detach().abs().flatten().float()
        magnitudes = magnitudes[:: max(1, magnitudes.numel() // _SAMPLE)]
        histogram = torch.histc(magnitudes, BINS, 0.0, largest[key] or 1.0).double().numpy()
        counts[key] = counts.get(key, 0.0) + histogram

    _observe(batches, see_histogram)
    choose = _percentile_limit if method == "percentile" else _mse_limit
    return {key: choose(counts[key], largest[key]) if largest[key] else 1.0 for key in counts}


def _observe(
    batches: Sequence[tuple[Traced, tuple[Any, ...], dict[str, Any]]], see: Callable[[Key, torch.Tensor], None]
) -> None:
    with torch.no_grad():
        for traced, args, kwargs in batches:
            observer = _Observer(traced, see)
            observer.run(*flat_inputs(traced.graph, args, kwargs), enable_io_processing=False)


def _percentile_limit(counts: NDArray[np.float64], top: float) -> float:
    total = np.cumsum(counts)
    index = int(np.searchsorted(total, total[-1] * PERCENTILE / 100.0))
    return top * (min(index, BINS - 1) + 1) / BINS


def _mse_limit(counts: NDArray[np.float64], top: float) -> float:
    centers = (np.arange(BINS) + 0.5) * top / BINS
    limits = top * np.geomspace(0.05, 1.0, 80)
    steps = limits[:, None] / LEVELS
    rounded = np.minimum(np.round(centers / steps), LEVELS) * steps
    errors = ((centers - rounded) ** 2 * counts).sum(axis=1)
    return float(limits[int(np.argmin(errors))])


def fake_quantize(x: torch.Tensor, limit: float) -> torch.Tensor:
    """What QuantizeLinear then DequantizeLinear return: int8, zero point 0, scale limit / 127."""
    scale = float(np.float32(limit / LEVELS))
    return (x / scale).round().clamp(-LEVELS - 1, LEVELS) * scale


Ranges = Mapping[Key, float]

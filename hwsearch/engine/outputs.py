"""Does an engine compute what it was asked to? Runtimes have bugs; a fast wrong network must never be offered.

Every engine is compared with the same allocation simulated in torch, on the example and on calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from hwsearch.backends.base import Engine
from hwsearch.compress.simulate import Simulator
from hwsearch.graph.calls import as_call, flat_inputs
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant

ROUNDING = {"fp32": 1e-3, "tf32": 4e-3, "bf16": 4e-2, "fp16": 1e-2}
"""Relative error (root mean square) that computing in a float type may bring, in another order of operations."""
MULTIPLE = 2.0
"""How often what quantization itself changes an engine may be off the simulation.

Rounding apart the two do the same. A number next to a tie of a quantizer is rounded to the other side, by a whole step, and a
cascade of those makes an engine differ from the simulation as much as both do from the dense network, but not more.
"""


@dataclass(frozen=True)
class Deviation:
    """How far an engine's outputs are from the same allocation simulated, relatively (root mean square): the worst of the outputs.

    error: infinite for NaN where there ought to be none. allowed: what float rounding and `MULTIPLE` times the change by
    quantization itself come to, of that output.
    """

    error: float
    allowed: float

    @property
    def wrong(self) -> bool:
        """Whether it is too large to be rounding. NaN is wrong."""
        return not self.error <= self.allowed

    def __str__(self) -> str:
        return f"relative error {self.error:.3g}, at most {self.allowed:.2g} is rounding"


class Expected:
    """Outputs of one network in any allocation, on a few inputs of the deployed batch."""

    def __init__(self, lowering: Lowering, quantize_outputs: bool) -> None:
        self.lowering, self.quantize_outputs = lowering, quantize_outputs
        self._calls = [as_call(i) for i in (lowering.inputs, lowering.deployed(lowering.task.calibration[0]))]
        self._simulators: list[Simulator] = []

    def deviation(self, engine: Engine, variants: Mapping[str, Variant], base: str) -> Deviation:
        """Of the engine's outputs, each by itself over all inputs, from the simulated ones. base: what the rest computes in."""
        off: list[NDArray[np.float64]] = []
        for simulator, (args, kwargs) in zip(self._ready(), self._calls, strict=True):
            tensors = flat_inputs(self.lowering.traced.graph, args, kwargs)
            found = engine(*(t.detach().cpu().numpy() for t in tensors if isinstance(t, torch.Tensor)))
            simulated, dense = (_tensors(y) for y in (simulator(variants), simulator.dense))
            each = zip(found, simulated, dense, strict=True)
            off.append(np.array([_squares(*o) for o in each if o[1].is_floating_point()]).reshape(-1, 3))
        rounding = ROUNDING[coarsest_float({base, *(v.precision for v in variants.values())})]
        deviations = [_deviation(o, c, w, rounding) for o, c, w in np.sum(off, axis=0).tolist()]
        return max(deviations, key=lambda d: (d.wrong, d.error / d.allowed), default=Deviation(0.0, rounding))

    def _ready(self) -> list[Simulator]:
        if not self._simulators:
            low = self.lowering
            self._simulators = [
                low.simulator(low.traced, args, kwargs, quantize_outputs=self.quantize_outputs)
                for args, kwargs in self._calls
            ]
        return self._simulators

    def blame(
        self,
        variants: Mapping[str, Variant],
        plain: Variant,
        build: Callable[[Mapping[str, Variant]], Engine],
    ) -> dict[str, Deviation] | None:
        """Units whose variants make the outputs wrong, with what each brings; None where they are wrong with all plain.

        Starts from all units plain and puts each into its variant in turn; one that turns right into wrong stays plain.
        """
        kept: dict[str, Variant] = dict.fromkeys(variants, plain)
        guilty: dict[str, Deviation] = {}
        if self.deviation(build(kept), kept, plain.precision).wrong:
            return None
        for unit, variant in variants.items():
            if variant == plain:
                continue
            trial = {**kept, unit: variant}
            deviation = self.deviation(build(trial), trial, plain.precision)
            if deviation.wrong:
                guilty[unit] = deviation
            else:
                kept = trial
        return guilty


def reason(deviation: Deviation) -> str:
    """Why a variant with such a deviation is not offered."""
    return f"the engine returns wrong outputs with it ({deviation})"


def coarsest_float(precisions: Iterable[str]) -> str:
    """That of the float types among the precisions which rounds most."""
    return max((p for p in precisions if p in ROUNDING), key=lambda p: ROUNDING[p], default="fp32")


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def _squares(outputs: NDArray[Any], simulated: torch.Tensor, dense: torch.Tensor) -> tuple[float, float, float]:
    """Sums of squares: found from simulated (infinite where only one is a finite number), simulated from dense, simulated.

    Where the simulation gives NaN or infinity nothing but the same is right, and counts for nothing.
    """
    have, want, plain = (np.asarray(y, np.float64) for y in (outputs, simulated, dense))
    finite = np.isfinite(want)
    if have.shape != want.shape or not np.array_equal(have[~finite], want[~finite], equal_nan=True):
        return np.inf, 0.0, 0.0
    off = float(np.square(have[finite] - want[finite]).sum())
    known = finite & np.isfinite(plain)
    return (
        off if np.isfinite(off) else np.inf,
        float(np.square(want[known] - plain[known]).sum()),
        float(np.square(want[finite]).sum()),
    )


def _deviation(off: float, changed: float, whole: float, rounding: float) -> Deviation:
    """Of one output, by its sums of squares (see `_squares`)."""
    whole = whole or 1.0  # an output that is zero throughout
    return Deviation(float(np.sqrt(off / whole)), rounding + MULTIPLE * float(np.sqrt(changed / whole)))

"""Does an engine compute what it was asked to? Runtimes have bugs; a fast wrong network must never be offered.

Every engine is compared with the same allocation simulated in torch, on the example and on calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hwsearch.backends.base import Engine
from hwsearch.calling import as_call, flat_inputs
from hwsearch.compress.apply import Simulator
from hwsearch.lower import Lowering
from hwsearch.variants import Variant

WRONG = 0.3
"""Relative error (root mean square) from the simulation above which an engine's outputs count as wrong.

Rounding apart, engine and simulation do the same; cascades of roundings in deep int8 networks stay below 0.1 (tests).
"""


class Expected:
    """Outputs of one network in any allocation, on a few inputs of the deployed batch."""

    def __init__(self, lowering: Lowering, quantize_outputs: bool) -> None:
        self.lowering, self.quantize_outputs = lowering, quantize_outputs
        self._calls = [as_call(i) for i in (lowering.inputs, lowering.deployed(lowering.task.calibration[0]))]
        self._simulators: list[Simulator] = []

    def error(self, engine: Engine, variants: Mapping[str, Variant]) -> float:
        """Relative root mean square error of the engine's outputs from the simulated ones (infinite for NaN)."""
        off = total = 0.0
        for simulator, (args, kwargs) in zip(self._ready(), self._calls, strict=True):
            tensors = flat_inputs(self.lowering.traced.graph, args, kwargs)
            found = engine(*(t.detach().cpu().numpy() for t in tensors if isinstance(t, torch.Tensor)))
            wanted = [t for t in pytree.tree_leaves(simulator(variants)) if isinstance(t, torch.Tensor)]
            for have, want in zip(found, wanted, strict=True):
                if want.is_floating_point():
                    reference = want.double().numpy()
                    off += float(np.square(have.astype(np.float64) - reference).sum())
                    total += float(np.square(reference).sum())
        if not np.isfinite(off):
            return float("inf")
        return float(np.sqrt(off / total)) if total else float(off > 0)

    def _ready(self) -> list[Simulator]:
        if not self._simulators:
            low = self.lowering
            self._simulators = [
                Simulator(
                    low.traced, args, kwargs, low.weights, low.ranges, quantize_outputs=self.quantize_outputs
                )
                for args, kwargs in self._calls
            ]
        return self._simulators

    def blame(
        self,
        variants: Mapping[str, Variant],
        plain: Variant,
        build: Callable[[Mapping[str, Variant]], Engine],
    ) -> dict[str, float]:
        """Units whose variants make the outputs wrong, with the error each brings.

        Starts from all units plain and puts each into its variant in turn; one that turns right into wrong stays plain.
        """
        kept: dict[str, Variant] = dict.fromkeys(variants, plain)
        guilty: dict[str, float] = {}
        for unit, variant in variants.items():
            if variant == plain:
                continue
            trial = {**kept, unit: variant}
            error = self.error(build(trial), trial)
            if error > WRONG:
                guilty[unit] = error
            else:
                kept = trial
        return guilty


def reason(error: float) -> str:
    """Why a variant with such an error is not offered."""
    return f"the engine returns wrong outputs with it (relative error {error:.3g})"

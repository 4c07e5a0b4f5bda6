"""A task whose score is a known falling function of what a network loses, and a simulated device for it."""

from __future__ import annotations

import math
from typing import Any

import tiny
import torch

import hwsearch as hs
from hwsearch.loss.divergence import divergence
from hwsearch.testing import LatencyLaw, SimulatedBackend

DENSE = 0.9
"""Score of the dense network."""


def law_of(steep: float, seed: int, lowered: float = 0.0) -> Any:
    """A score that falls with the divergence from the dense network, on inputs of this seed."""
    x = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    model = tiny.task("cnn").model
    with torch.no_grad():
        dense = model(x)

    def score(predict: hs.task.Predict) -> float:
        total, samples = divergence(predict(x), dense, "kl")
        return DENSE * math.exp(-steep * total / samples) - (lowered if predict is not model else 0.0)

    return score


def task(steep: float, count: int, **changes: Any) -> hs.Task:
    """The task; count: samples that its scores are said to be of."""
    old = tiny.task("cnn")
    fields: dict[str, Any] = {"evaluate": law_of(steep, 1), "validate": law_of(steep, 2), "scored": count, "validated": count}
    return hs.Task(model=old.model, example_inputs=old.example_inputs, calibration=old.calibration, **{**fields, **changes})


def backend() -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network), noise=0.003)

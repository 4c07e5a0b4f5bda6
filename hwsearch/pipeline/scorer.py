"""How samples of a search are scored: on other data than the final score is taken on, with a standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hwsearch.deployment.evaluate import predictor, score
from hwsearch.deployment.session import Measured, Session
from hwsearch.device import fingerprint as devices
from hwsearch.graph.calls import evaluating
from hwsearch.loss.divergence import closeness
from hwsearch.pipeline.goal import Floor, Goal

VALIDATE, AGREEMENT = "validate", "agreement"
DUST = 1e-9
"""By which a score may be below the floor: the dense network's, through an engine that rounds otherwise, holds 100%."""


@dataclass(frozen=True)
class Scorer:
    """Scores engines on the data that a search may use.

    Attributes:
        by: `validate`, the task's own, or `agreement` with the dense network on calibration data kept apart.
        dense: What the dense network scores by it.
        floor: The least score by it.
        says: What that tells of the final score.
    """

    session: Session
    by: str
    dense: float
    floor: float
    says: str

    @property
    def allowed(self) -> float:
        """By how much the floor lets the score fall."""
        return self.dense - self.floor

    def made_of(self) -> dict[str, Any]:
        """What a score and a cost depend on beside the network that is measured."""
        setup, network = self.session.setup, self.session.setup.network
        return {
            "network": network.fingerprint, "weights": network.weights_digest, "calibration": setup.lowering.calibration_digest,
            "backend": [setup.backend.name, setup.backend.versions()], "device": devices.fingerprint_for(setup.backend).id,
            "options": setup.described, "scored by": [self.by, self.dense, setup.lowering.task.validated],
        }  # fmt: skip

    def judged(self, goal: Goal, dense: float, score: float) -> dict[str, Any]:
        """For reports: how a final score stands to the floor, and what the search went by. dense: the dense network's score."""
        floor, count = goal.floor.of(dense), self.session.setup.lowering.task.scored
        error, held = binomial(score, count), score >= floor - DUST * max(1.0, abs(floor))
        return {
            "text": goal.floor.text, "least": floor, "held": held, "error": error, "scored": count,
            "standard_errors": (score - floor) / error if error else None, "minimized": goal.minimize,
            "search": {"by": self.by, "says": self.says, "dense": self.dense, "least": self.floor},
        }  # fmt: skip

    def __call__(self, measured: Measured) -> tuple[float, float | None]:
        """(score, its standard error; None where that is not known)."""
        lowering = self.session.setup.lowering
        predict = predictor(measured.setup.lowering, measured.engine)
        if self.by == VALIDATE:
            own = score(lowering.task, predict, "a sample's engine", VALIDATE)
            return own, binomial(own, lowering.task.validated)
        values: list[float] = []
        classes = True
        for traced, args, kwargs in lowering.comparable:
            with torch.no_grad():
                dense = traced.graph(*args, **kwargs)
            found, counted = closeness(predict(*args, **kwargs), dense, lowering.task.divergence, lowering.batch_axes)
            values += found.tolist()
            classes = classes and counted
        mean = float(np.mean(values))
        error = binomial(mean, len(values)) if classes else float(np.std(values)) / math.sqrt(len(values))
        return mean, error


def scorer_for(session: Session, floor: Floor) -> Scorer:
    """By the task's `validate`, where it has one. Raises InvalidInput where the dense network does not hold the floor."""
    task = session.setup.lowering.task
    least = floor.of(session.dense_score)
    if task.validate is not None:
        with evaluating(task.model) as model:
            dense = score(task, model, "the dense model", VALIDATE)
        own = floor.of(dense) if floor.kind else dense - (session.dense_score - least)
        return Scorer(session, VALIDATE, dense, own, "by the task's `validate`, on other data than the final score")
    scale = 1.0 if 0.0 <= session.dense_score <= 1.0 else abs(session.dense_score)
    says = (
        "by agreement with the dense network on calibration data kept apart, as the task has no `validate`: an accuracy on such "
        "data keeps at least as much, other scores may not"
    )
    return Scorer(session, AGREEMENT, 1.0, 1.0 - (session.dense_score - least) / scale, says)


def binomial(share: float, count: int | None) -> float | None:
    """Standard error of a share of so many samples, half of one in doubt; None where it is no share, or they are not counted."""
    if not count or not 0.0 <= share <= 1.0:
        return None
    p = (share * count + 0.5) / (count + 1)
    return math.sqrt(p * (1.0 - p) / count)

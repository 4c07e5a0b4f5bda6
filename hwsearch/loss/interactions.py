"""What a sum of losses misses, learnt from stitched networks: how fast the loss of all grows with it, and which count more.

Of one unit or channel group changed alone the loss is l. The predicted loss of an allocation is

    factor * (sum over units and groups of coefficient * l) ** exponent

Coefficients are those of SPDY (Frantar and Alistarh, 2022), shrunk to 1, and fitted where SPDY tries them at random. The sum is
linear in what each unit and group chooses, and the rest only grows with it: the search stays exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

METHOD = 1
"""Of learning, counted up whenever it computes something else."""
LEAST = 12
"""Fewer stitched networks teach nothing."""
FACTOR = 1.5
"""A predicted loss within this factor of the simulated one counts as right."""
FOLDS = 5
SPREADS = (0.0, 0.3, 1.0)
"""Standard deviations of the logarithms of coefficients, between which cross-validation chooses; 0: all are 1."""
NOISE, FACTORS, EXPONENTS = 0.2, 1.0, 0.5
"""Standard deviations: of a simulated loss about its prediction and of the factor, as logarithms, and of the exponent about 1."""
_STEPS, _LONGEST = 12, 0.5


@dataclass(frozen=True)
class Correction:
    """How the losses of units and groups become that of an allocation; without arguments their sum.

    Attributes:
        units, groups: Coefficient of each unit's and each channel group's loss; 1 where there is none.
        factor, exponent: Predicted loss = factor * total ** exponent.
    """

    units: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, float] = field(default_factory=dict)
    factor: float = 1.0
    exponent: float = 1.0

    def of_unit(self, unit: str, loss: float) -> float:
        """What a unit's loss adds to the total."""
        return self.units.get(unit, 1.0) * loss

    def of_group(self, group: str, loss: float) -> float:
        """What a channel group's loss adds to the total."""
        return self.groups.get(group, 1.0) * loss

    def loss(self, total: float) -> float:
        """The predicted loss of a total; a bound on one may be below 0 by rounding."""
        return self.factor * float(total**self.exponent if total > 0 or self.exponent == 1.0 else 0.0)

    def total(self, loss: float) -> float:
        """The largest total whose predicted loss is at most this, but for rounding."""
        found = float((loss / self.factor) ** (1.0 / self.exponent))
        while found > 0 and self.loss(found) > loss:
            found = math.nextafter(found, 0.0)
        return found

    @property
    def plain(self) -> bool:
        """Whether it is the sum."""
        return self == Correction()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Agreement:
    """How well predicted losses agree with simulated ones.

    Attributes:
        tau: Their rank correlation (Kendall); None where it is not defined.
        within: Share of predictions within a factor of 1.5.
        ratio: Median of predicted / simulated.
        networks: How many there are.
    """

    tau: float | None
    within: float
    ratio: float
    networks: int

    @staticmethod
    def of(predicted: Sequence[float] | Vector, simulated: Sequence[float] | Vector) -> Agreement | None:
        """None for fewer than three networks whose losses are above 0."""
        from scipy.stats import kendalltau

        p, s = np.asarray(predicted, float), np.asarray(simulated, float)
        tau = float(kendalltau(p, s).statistic) if len(p) > 2 else math.nan
        above = (p > 0) & (s > 0)
        if above.sum() < 3:
            return None
        ratio = p[above] / s[above]
        within = np.maximum(ratio, 1.0 / ratio) <= FACTOR
        return Agreement(tau if math.isfinite(tau) else None, float(within.mean()), float(np.median(ratio)), int(above.sum()))

    def __str__(self) -> str:
        tau = "not known" if self.tau is None else f"{self.tau:.2f}"
        return f"rank correlation {tau}, {self.within:.0%} within a factor of {FACTOR:g}, median ratio {self.ratio:.2f}"


@dataclass(frozen=True)
class Fitted:
    """A law fitted to stitched networks: `logs` of the coefficients by column, and the rest as in `Correction`."""

    logs: Vector
    factor: float = 1.0
    exponent: float = 1.0

    def predict(self, losses: Vector) -> Vector:
        """Loss of each row of losses (one a network, a column a unit or group)."""
        totals = losses @ np.exp(self.logs)
        predicted: Vector = self.factor * totals**self.exponent
        return predicted


def learn(losses: Vector, simulated: Vector) -> tuple[Fitted, Vector]:
    """(the law, what each network is predicted to lose by a law learnt from others).

    Cross-validation chooses the spread; the sum stays where nothing is better than it by more than a standard error. The
    predictions are of networks that neither their law nor the choice of its spread has seen.

    Args:
        losses: [networks, units and groups], of what each network changes, each changed alone; 0 where it is not changed.
        simulated: [networks] losses; all above 0, as the sum of each row is.
    """
    unseen = np.empty(len(simulated))
    for seen, held in _folds(len(simulated)):
        unseen[held] = _chosen(losses[seen], simulated[seen]).predict(losses[held])
    return _chosen(losses, simulated), unseen


def _chosen(losses: Vector, simulated: Vector) -> Fitted:
    """The law of the spread with the least error where it was not fitted, or the sum."""
    settings: tuple[float | None, ...] = (None, *SPREADS)
    errors = np.empty((len(settings), len(simulated)))
    for seen, held in _folds(len(simulated)):
        for row, setting in zip(errors, settings, strict=True):
            predicted = fitted(losses[seen], simulated[seen], setting).predict(losses[held])
            row[held] = np.log(predicted / simulated[held]) ** 2
    best = int(errors.mean(1).argmin())
    gain = errors[0] - errors[best]
    clear = gain.mean() > gain.std() / math.sqrt(len(gain))
    return fitted(losses, simulated, settings[best if clear else 0])


def _folds(count: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(those to fit on, those to predict) of each fold."""
    numbers = np.arange(count)
    for fold in range(FOLDS):
        yield numbers[numbers % FOLDS != fold], numbers[numbers % FOLDS == fold]


def fitted(losses: Vector, simulated: Vector, spread: float | None) -> Fitted:
    """The law that is likeliest: Gauss-Newton on logarithms of losses, with normal priors about the sum; None: the sum itself.

    The normal equations are those of the networks, of which there are fewer than coefficients.
    """
    count = losses.shape[1]
    if spread is None:
        return Fitted(np.zeros(count))
    wanted = np.log(simulated)
    prior = np.concatenate([np.zeros(count), [0.0, 1.0]])
    variance = np.square([*[spread] * count, FACTORS, EXPONENTS])
    own = prior.copy()
    for _ in range(_STEPS):
        parts = losses * np.exp(own[:count])
        totals = parts.sum(1)
        level = np.log(totals)
        slopes = np.column_stack([own[-1] * parts / totals[:, None], np.ones(len(wanted)), level])
        misses = wanted - own[-2] - own[-1] * level
        spanned = slopes * variance
        weights = np.linalg.solve(spanned @ slopes.T + NOISE**2 * np.eye(len(wanted)), misses + slopes @ (own - prior))
        step = prior + spanned.T @ weights - own
        own += np.clip(step, -_LONGEST, _LONGEST)
        own[-1] = max(own[-1], 0.1)
        if np.abs(step).max() < 1e-4:
            break
    return Fitted(own[:count], float(np.exp(own[-2])), float(own[-1]))

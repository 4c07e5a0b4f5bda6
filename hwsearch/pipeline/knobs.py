"""Which numbers of a scheme to measure next: from one to three knobs, each of which turns the score and a cost down.

A place x has a number from 0 (as much is kept as may be) to 1 (as little) for each knob: in proportion to its number, or to the
logarithm where the range is a wide one, as costs are compared by their ratio. Stage one finds the level set of the floor
along one line: the score falls along it, and a guarded bracket makes the samples be enough whatever the curve. Stage two looks for
the least cost within the floor, by the expected improvement times the probability that the floor holds, each by a Gaussian process.
What is known without a measurement (the score of the scheme on little data, its bytes) is the prior mean of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from scipy.interpolate import PchipInterpolator, RegularGridInterpolator
from scipy.special import ndtr

from hwsearch.pipeline.bracket import Range, Tried, bracket, next_bound
from hwsearch.pipeline.surrogate import Floats, Surrogate

MOST_KNOBS = 3
TOLERANCE = 0.01
"""Of a knob's range: a bracket so narrow is not searched any further."""
WIDE_RANGE = 10.0
"""The most of a knob over its least from where on it is searched by its logarithm."""
FACTOR = 1.02
"""A bracket of such a knob whose ends are no further apart is not searched any further."""
WIDE = 0.1
"""The same of stage one, where stage two follows."""
SHARE = 0.5
"""Of the samples, those that stage one may take where stage two follows."""
FINE = {1: 401, 2: 61, 3: 21}
"""Number of knobs -> places along each that are looked at."""
GRID, HALVINGS = {1: 5, 2: 5, 3: 3}, 6
"""Number of knobs -> places of each that a prior is computed at; along one knob so many halvings look for the floor as well."""
LEAST_MARGIN = -3.0
"""Scores further below the floor than so many times what may be lost are all the same, and failures are too."""
LEAST_GAIN = 0.002
"""Expected saving, of the logarithm of the cost, below which no further sample is worth it."""
COMPUTED = 0.005
"""Standard deviation, at most, of the logarithm of a cost that is computed at a few places and interpolated."""
RIDGE = 0.05
"""How firmly the scale of the prior is believed: as a sample that lost the square root of this, of what may be lost."""
_SAME = 1e-6


class Knob(Protocol):
    """A number that is free, with its range; the more, the more is kept of the network."""

    @property
    def name(self) -> str:
        """By which it is given."""
    @property
    def low(self) -> float:
        """The least that it may be."""
    @property
    def high(self) -> float:
        """The most that it may be."""
    @property
    def whole(self) -> bool:
        """Whether it is a whole number."""


def by_ratio(knob: Knob) -> bool:
    """Whether a knob is searched by its logarithm."""
    return not knob.whole and 0.0 < WIDE_RANGE * knob.low <= knob.high


def value_of(knob: Knob, x: float) -> float:
    """The number at a place from 0 to 1: a whole one, or one of six digits."""
    x = min(max(x, 0.0), 1.0)
    value = knob.high * (knob.low / knob.high) ** x if by_ratio(knob) else knob.high - x * (knob.high - knob.low)
    return round(value) if knob.whole else min(max(float(f"{value:.6g}"), knob.low), knob.high)


def place_of(knob: Knob, value: float) -> float:
    """Inverse of `value_of`."""
    if by_ratio(knob):
        return math.log(knob.high / value) / math.log(knob.high / knob.low)
    return (knob.high - value) / (knob.high - knob.low)


@dataclass(frozen=True)
class Point:
    """One sample, as the search sees it.

    Attributes:
        x: Where.
        margin: How far above the floor it scored, less its standard error: 1 is the dense score, 0 the floor; minus infinity for a
            failure.
        noise: Standard error in the same unit.
        cost: Logarithm of its cost over the dense network's; None for a failure.
    """

    x: tuple[float, ...]
    margin: float
    noise: float
    cost: float | None

    @property
    def holds(self) -> bool:
        """The floor."""
        return self.margin >= 0.0


@dataclass(frozen=True)
class Prior:
    """What is known without a measurement, at places [n, knobs].

    Attributes:
        margin: As that of a point: what is likely.
        cost: Logarithm of the cost over the dense network's.
    """

    margin: Callable[[Floats], Floats]
    cost: Callable[[Floats], Floats]

    @staticmethod
    def through(knobs: Sequence[Knob], places: Sequence[Sequence[float]], margins: Floats, costs: Floats) -> Prior:
        """Interpolated: along one knob through some places, else through a grid of them; margins are made to fall.

        Args:
            knobs: In whose numbers costs are interpolated, as these are mostly in proportion to them; margins are in places.
            places: Of each knob, rising.
            margins: Of the grid, an axis for each knob.
            costs: The same, over the dense network's; no logarithms.
        """
        margins = np.maximum(margins, LEAST_MARGIN)
        for axis in range(margins.ndim):
            margins = np.minimum.accumulate(margins, axis)
        removed = [_removed(k, np.asarray(own)) for k, own in zip(knobs, places, strict=True)]
        level, of_cost = _interpolated(places, margins), _interpolated(removed, costs)

        def cost(x: Floats) -> Floats:
            gone = np.stack([_removed(k, own) for k, own in zip(knobs, x.T, strict=True)], 1)
            return np.asarray(np.log(np.maximum(of_cost(gone), 1e-9)))

        return Prior(level, cost)

    @staticmethod
    def of(knobs: Sequence[Knob], evaluate: Callable[[Sequence[float]], tuple[float, float]]) -> Prior:
        """Computed at a few places: eleven of one knob, a grid of more. evaluate: (margin, share of the dense cost) at a place."""
        places = [
            sorted({place_of(k, value_of(k, float(x))) for x in np.linspace(0.0, 1.0, GRID[len(knobs)])}) for k in knobs
        ]
        if len(knobs) == 1:
            places = [_halved(places[0], lambda x: evaluate([x])[0], knobs[0])]
        found = np.array([evaluate(x) for x in product(*places)]).reshape(*map(len, places), 2)
        return Prior.through(knobs, places, found[..., 0], found[..., 1])

    @staticmethod
    def none(knobs: Sequence[Knob]) -> Prior:
        """Half-way all of what may be lost is lost, and the cost falls in proportion to what is kept of each."""

        def cost(x: Floats) -> Floats:
            kept = [1.0 - _removed(k, own) for k, own in zip(knobs, x.T, strict=True)]
            return np.asarray(np.log(np.maximum(kept, 1e-3)).sum(0))

        return Prior(lambda x: 1.0 - 2.0 * x.max(1), cost)


def _removed(knob: Knob, x: Floats) -> Floats:
    """What is gone of a knob's largest number at some places [n], where it is searched by its logarithm; else the places."""
    return -np.expm1(x * math.log(knob.low / knob.high)) if by_ratio(knob) else x


def _interpolated(places: Sequence[Floats] | Sequence[Sequence[float]], values: Floats) -> Callable[[Floats], Floats]:
    """Through places of each knob, rising, at places [n, knobs]."""
    if values.ndim == 1:
        along = PchipInterpolator(places[0], values)
        return lambda x: np.asarray(along(x[:, 0]))
    grid = RegularGridInterpolator(places, values)
    return lambda x: np.asarray(grid(x))


def _halved(places: Sequence[float], margin: Callable[[float], float], knob: Knob) -> list[float]:
    """Places of one knob, with those at which halving looks for the floor by what is likely."""
    found = list(places)
    below = [x for x in found if margin(x) < 0.0]
    hi = min(below, default=1.0)
    lo = max((x for x in found if x < hi), default=0.0)
    for _ in range(HALVINGS if below else 0):
        middle = place_of(knob, value_of(knob, (lo + hi) / 2.0))
        if not lo < middle < hi:
            break
        found.append(middle)
        lo, hi = (middle, hi) if margin(middle) >= 0.0 else (lo, middle)
    return sorted(found)


class KnobSearch:
    """Asks for places, by the points that are known; it holds no state beside what it is made with.

    Args:
        knobs: One to three.
        prior: What is known without a measurement.
        free: Whether the network at 0 is the dense one, which holds the floor without a sample.
        measured_cost: Whether the cost is measured (a time), and need not fall with each knob; else it is computed, and does.
        seed: Of the fits.
    """

    def __init__(self, knobs: Sequence[Knob], prior: Prior, *, free: bool, measured_cost: bool, seed: int = 0) -> None:
        self.knobs, self.prior, self.free, self.measured_cost, self.seed = tuple(knobs), prior, free, measured_cost, seed
        self.steps = [1.0 / (k.high - k.low) if k.whole else 0.0 for k in knobs]
        axes = [np.linspace(0.0, 1.0, round(1 / s) + 1 if s else FINE[len(knobs)]) for s in self.steps]
        self.places = np.array(list(product(*axes)))
        self.line = self._line()
        beyond = self.steps[0] if len(knobs) == 1 else 0.0  # the last whole number is tried, as nothing is beyond it
        self.range = Range(0.0, 1.0 + beyond, free)

    @property
    def tolerance(self) -> float:
        """Of the bracket: of one knob a hundredth, a factor where it is searched by its logarithm, or a step of whole numbers."""
        if len(self.knobs) == 1 and by_ratio(self.knobs[0]):
            return math.log(FACTOR) / math.log(self.knobs[0].high / self.knobs[0].low)
        if len(self.knobs) == 1:
            return max(TOLERANCE, self.steps[0] * (1.0 + _SAME))
        return WIDE

    def next(self, points: Sequence[Point], left: int) -> tuple[float, ...] | None:
        """The place to measure next; None where nothing more is worth a sample.

        Args:
            points: All samples so far.
            left: How many there may still be.
        """
        if left < 1 or (not self.free and any(not p.holds and not any(p.x) for p in points)):
            return None  # what keeps the most does not hold: nothing does
        spent = len(points) if len(self.knobs) > 1 else 0
        own = left if len(self.knobs) == 1 else math.ceil(SHARE * (left + spent)) - spent
        along = next_bound(
            self.on_line(points), self.range, 0.0, own, self.tolerance, lambda lo, hi: self.guess(points, lo, hi)
        )
        if along is not None:
            x = self._rounded(np.clip(along * self.line, 0.0, 1.0))
            if not any(self._same(x, p.x) for p in points):
                return x
        return self._better(points) if len(self.knobs) > 1 or self.measured_cost else None

    def on_line(self, points: Sequence[Point]) -> list[Tried]:
        """What the points say of the line, as the score falls with each knob: how far up it holds, or from where on it does not."""
        found, on = [], self.line > 0
        for p in points:
            shares = np.array(p.x)[on] / self.line[on]
            beside = np.array(p.x)[~on]
            t = float(min(shares.min() if p.holds else shares.max(), 1.0))
            if p.holds or not beside.any():
                drop = math.inf if p.margin == -math.inf else 1.0 - p.margin
                found.append(Tried(t, t, drop, p.margin))
        return found

    def guess(self, points: Sequence[Point], lo: float, hi: float) -> float:
        """Where between two ends of the line the floor is likely to be; a little below, so that the next sample may close it."""
        t = np.linspace(lo, hi, FINE[1])
        mean, _ = self.margin(points, np.minimum(t[:, None] * self.line, 1.0))
        below = np.flatnonzero(mean < 0.0)
        return hi if not len(below) else float(t[below[0]]) - self.tolerance / 2.0

    def margin(self, points: Sequence[Point], x: Floats) -> tuple[Floats, Floats]:
        """(mean, standard deviation) of the margin at some places."""
        known = [*points, *([Point((0.0,) * len(self.knobs), 1.0, 0.0, 0.0)] if self.free else [])]
        at = np.array([p.x for p in known]).reshape(-1, len(self.knobs))
        y = np.array([max(p.margin, LEAST_MARGIN) for p in known])
        lost, likely = 1.0 - y, 1.0 - self.prior.margin(at)
        scale = (float(lost @ likely) + RIDGE) / (float(likely @ likely) + RIDGE)
        scale = max(scale, 0.0)
        prior = np.maximum(1.0 - scale * (1.0 - self.prior.margin(x)), LEAST_MARGIN)
        if not known:
            return prior, np.ones(len(x))
        residual = y - np.maximum(1.0 - scale * likely, LEAST_MARGIN)
        mean, deviation = Surrogate(at, residual, np.array([p.noise for p in known]) ** 2, self.seed)(x)
        return prior + mean, deviation

    def _cost(self, points: Sequence[Point], x: Floats) -> tuple[Floats, Floats]:
        """(mean, standard deviation) of the logarithm of the cost."""
        known = [p for p in points if p.cost is not None]
        prior = self.prior.cost(x)
        if not known:
            return prior, np.full(len(x), 0.1)
        at = np.array([p.x for p in known])
        residual = np.array([p.cost for p in known], np.float64) - self.prior.cost(at)
        offset = float(residual.mean()) if self.measured_cost else 0.0
        mean, deviation = Surrogate(at, residual - offset, np.zeros(len(known)), self.seed)(x)
        return prior + offset + mean, deviation if self.measured_cost else np.minimum(deviation, COMPUTED)

    def _better(self, points: Sequence[Point]) -> tuple[float, ...] | None:
        """Where the expected improvement times the probability of holding is greatest; None where it is too small."""
        held = [p for p in points if p.holds and p.cost is not None]
        best = min([0.0, *(p.cost for p in held if p.cost is not None)])
        x = self.places
        able = np.ones(len(x), bool)
        for p in points:
            at = np.array(p.x)
            able &= np.abs(x - at).max(1) > _SAME
            if not p.holds:
                able &= ~(x >= at - _SAME).all(1)
            elif not self.measured_cost:
                able &= ~(x <= at + _SAME).all(1)
        if len(self.knobs) == 1:
            able &= x[:, 0] <= bracket(self.on_line(points), self.range)[0]
        x = x[able]
        if not len(x):
            return None
        mean, deviation = self.margin(points, x)
        probability = ndtr(mean / np.maximum(deviation, 1e-9))
        for p in held:
            probability[(x <= np.array(p.x) + _SAME).all(1)] = 1.0
        cost, sigma = self._cost(points, x)
        z = (best - cost) / np.maximum(sigma, 1e-9)
        gain = (best - cost) * ndtr(z) + sigma * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
        worth = gain * probability
        most = int(worth.argmax())
        return tuple(map(float, x[most])) if worth[most] > LEAST_GAIN else None

    def _line(self) -> Floats:
        """From 0 through the place of least cost that is likely to hold, to where the first knob is at its end."""
        if len(self.knobs) == 1:
            return np.ones(1)
        likely = self.prior.margin(self.places)
        cost = np.where(likely >= 0.0, self.prior.cost(self.places), np.inf)
        best = self.places[int(cost.argmin())]
        return best / best.max() if best.max() > 0 else np.ones(len(self.knobs))

    def _rounded(self, x: Floats) -> tuple[float, ...]:
        """A place at which every knob can be."""
        return tuple(place_of(k, value_of(k, float(own))) for k, own in zip(self.knobs, x, strict=True))

    @staticmethod
    def _same(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(abs(a - b) <= _SAME for a, b in zip(one, other, strict=True))

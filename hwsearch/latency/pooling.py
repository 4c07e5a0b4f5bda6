"""What a unit at some widths is likely to take, from what it takes at others: the prior of cells that were seldom or never built.

Times over widths are a staircase, and not monotone, so that no formula in channels or FLOPs predicts them. But the stairs of
the input's channels and those of the output's nearly multiply, and those of two precisions are alike:

    log t[u, p, w_in, w_out] = a[u, p] + s_in[u, p, w_in] + s_out[u, p, w_out] + e,   e ~ N(0, tau^2)

A stair s is 0 at the whole width, falls on the average with a power of the share of channels that is left, and strays from that
as a random walk with steps of its own at every width. It has a part that precisions share and one of each. With these
priors (a Gaussian process: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, ch. 2) the cells that builds have
measured predict the others. How far off that is, tau, the power and how far stairs stray are
those that make cells most likely, each predicted without itself (the same, section 5.4.2).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwsearch.latency.student_t import NORMAL, log_density

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """How stairs are. fall: by what power of the channels left a time falls on the average; stray: standard deviation of a stair's
    steps, where the channels left are divided by e; tau: of what a product of stairs misses."""

    fall: float
    stray: float
    tau: float


TRIED = {"fall": (0.5, 0.7, 0.9, 1.1), "stray": (0.03, 0.05, 0.1, 0.2, 0.4), "tau": (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.27, 0.4)}
USUAL = Law(0.8, 0.1, 0.08)
"""What is likely before any cell, to within a factor of two."""
FALLS = 0.25
"""Standard deviation, over works and axes, of the power by which a time falls."""
OWN = 0.3
"""Standard deviations of what is one precision's own in a stair, relative to those of what all share."""
LEVEL, PRECISION = 10.0, 1.0
"""Prior standard deviations, in log time: of a unit's time at whole widths, and of that of one precision to another."""
MOST_WORKS = 64
"""Works that tell how stairs are, at most, evenly spread: of more the time would grow, and what they tell no more."""
STACKED = 1_000_000
"""Covariances that are computed at a time: works of one size are computed together."""
UNSURE = 0.6
"""Relative standard error above which a predicted time is no better than none."""


@dataclass(frozen=True)
class Cell:
    """One work at some widths. work: what it is at whole widths; variant: what it became; shares: of each axis the share of its
    channels that is left, 1 where it is whole."""

    work: Hashable
    variant: Hashable
    shares: tuple[float, ...]

    @property
    def whole(self) -> bool:
        return all(share == 1 for share in self.shares)


@dataclass(frozen=True)
class Pooled:
    """Time of each cell and its relative standard error, infinite where the others say nothing of it. tau: as above."""

    time: Floats
    error: Floats
    tau: float


def pooled(cells: Sequence[Cell], time: Floats, error: Floats) -> Pooled:
    """Each cell from the others of its work, never from its own time.

    time [cells]: measured, in any unit; NaN or at most 0 where a cell was not. error [cells]: relative standard errors.
    """
    measured = np.isfinite(time) & (time > 0) & np.isfinite(error)
    works: dict[Hashable, list[int]] = {}
    for i, cell in enumerate(cells):
        works.setdefault(cell.work, []).append(i)
    every = [np.array(own) for own in works.values() if len(own) > 1 and measured[own].any()]
    told = [own[measured[own]] for own in every]
    log, variance = np.log(np.where(measured, time, 1.0)), np.log1p(np.square(np.where(measured, error, 0.0)))
    places = Places.of(cells)
    mean, spread = np.full(len(cells), np.nan), np.full(len(cells), np.inf)

    some = np.unique(np.linspace(0, len(told) - 1, min(len(told), MOST_WORKS)).round().astype(int)).tolist()
    few = [(own, Stairs.among(places[own])) for (own,) in _stacked([told[i] for i in some])]

    def likelihood(law: Law) -> float:
        """How likely the cells that were measured are, each without itself."""
        for own, stairs in few:
            mean[own], spread[own] = stairs.left_out(law, log[own], variance[own])
        known = measured & (spread < UNSURE**2)
        total = spread[known] + variance[known] + law.tau**2
        # a cell that went wrong does not widen all others
        likely = float(np.sum(log_density(log[known] - mean[known], NORMAL * total)))
        return likely - 0.5 * sum(float(np.log2(getattr(law, n) / getattr(USUAL, n))) ** 2 for n in TRIED)

    law, best = USUAL, likelihood(USUAL)
    for name, values in TRIED.items():
        for other in (replace(law, **{name: value}) for value in values):
            if (found := likelihood(other)) > best:
                law, best = other, found
    for own, seen in _stacked(every, told):
        stairs = Stairs.among(places[seen])
        between = Stairs.between(places[own], places[seen])
        mean[own], spread[own] = stairs.predicted(law, log[seen], variance[seen], places[own], between)
        mean[seen], spread[seen] = stairs.left_out(law, log[seen], variance[seen])
    spread = np.sqrt(spread + law.tau**2)
    known = np.isfinite(mean) & (spread < UNSURE)
    return Pooled(np.where(known, np.exp(np.where(known, mean, 0.0)), np.nan), np.where(known, spread, np.inf), law.tau)


def _stacked(*lists: Sequence[NDArray[np.intp]]) -> Iterator[tuple[NDArray[np.intp], ...]]:
    """Works of equally many cells together: of each list [works, cells], of at most `STACKED` covariances.

    lists: each with the places of cells of each work.
    """
    alike: dict[tuple[int, ...], list[tuple[NDArray[np.intp], ...]]] = {}
    for own in zip(*lists, strict=True):
        alike.setdefault(tuple(map(len, own)), []).append(own)
    for counts, found in alike.items():
        step = max(STACKED // max(counts) ** 2, 1)
        for i in range(0, len(found), step):
            yield tuple(np.stack(part) for part in zip(*found[i : i + step], strict=True))


@dataclass(frozen=True)
class Places:
    """Some cells. x [..., cells, axes]: minus the logarithms of the shares that are left, 0 of an axis that a cell does not have.
    variant [..., cells]: its number."""

    x: Floats
    variant: NDArray[np.intp]

    @staticmethod
    def of(cells: Sequence[Cell]) -> Places:
        axes = max((len(c.shares) for c in cells), default=0)
        numbers = {v: i for i, v in enumerate(dict.fromkeys(c.variant for c in cells))}
        shares = np.array([(*c.shares, *[1.0] * (axes - len(c.shares))) for c in cells], np.float64).reshape(len(cells), axes)
        return Places(-np.log(shares), np.array([numbers[c.variant] for c in cells], np.intp))

    def __getitem__(self, own: NDArray[np.intp]) -> Places:
        """Of these cells, [...]."""
        return Places(self.x[own], self.variant[own])


@dataclass(frozen=True)
class Stairs:
    """Covariances of the log times of some cells [..., cells] of one work, or each of several, and others [..., others] of it.

    x [..., cells]: minus the logarithms of the shares that are left, over all axes. level [..., cells, others]: of what does not
    depend on widths; alike: factor of what does; slope: of log channels; steps: of a random walk over them, and of what is one
    width's own.
    """

    x: Floats
    level: Floats
    alike: Floats
    slope: Floats
    steps: Floats

    @staticmethod
    def between(cells: Places, others: Places) -> Stairs:
        alike = (cells.variant[..., :, None] == others.variant[..., None, :]).astype(np.float64)
        slope, steps = np.zeros(alike.shape), np.zeros(alike.shape)
        for a, b in zip(np.moveaxis(cells.x, -1, 0), np.moveaxis(others.x, -1, 0), strict=True):
            a, b = a[..., :, None], b[..., None, :]
            slope += a * b
            steps += np.minimum(a, b) + (a == b) * np.minimum(a, 1.0)
        return Stairs(
            cells.x.sum(axis=-1), level=LEVEL**2 + PRECISION**2 * alike, alike=1.0 + OWN**2 * alike, slope=FALLS**2 * slope,
            steps=steps,
        )  # fmt: skip

    @staticmethod
    def among(cells: Places) -> Stairs:
        return Stairs.between(cells, cells)

    def kernel(self, law: Law) -> Floats:
        """[..., cells, others], but for tau."""
        return self.level + self.alike * (self.slope + law.stray**2 * self.steps)

    def _inverse(self, law: Law, noise: Floats) -> Floats:
        """Of the kernel with noise [..., cells] on its diagonal."""
        return np.asarray(np.linalg.inv(self.kernel(law) + noise[..., None] * np.eye(noise.shape[-1])))

    def left_out(self, law: Law, y: Floats, variance: Floats) -> tuple[Floats, Floats]:
        """Mean and variance of the log time y [..., cells] of each cell, but for tau, from the others (Rasmussen and Williams,
        2006, 5.12).

        variance: of the measurement of y.
        """
        noise = variance + law.tau**2
        inverse = self._inverse(law, noise)
        left = np.diagonal(inverse, axis1=-2, axis2=-1)
        return y - (inverse @ (y + law.fall * self.x)[..., None])[..., 0] / left, np.maximum(1.0 / left - noise, 0.0)

    def predicted(self, law: Law, y: Floats, variance: Floats, other: Places, between: Stairs) -> tuple[Floats, Floats]:
        """Mean and variance of the log times of others, but for tau. between: of those [..., others, cells]."""
        inverse, kernel = self._inverse(law, variance + law.tau**2), between.kernel(law)
        strays = FALLS**2 * other.x**2 + law.stray**2 * (other.x + np.minimum(other.x, 1.0))
        own = LEVEL**2 + PRECISION**2 + (1.0 + OWN**2) * strays.sum(axis=-1)
        weights = kernel @ inverse
        mean = (weights @ (y + law.fall * self.x)[..., None])[..., 0] - law.fall * between.x
        return mean, np.maximum(own - (weights * kernel).sum(axis=-1), 0.0)

"""What a unit at some widths is likely to take, from what it takes at others: the prior of cells that were seldom built.

Times over widths are a staircase, and not monotone, so that no formula in channels or FLOPs predicts them. But the stairs of
the input's channels and those of the output's nearly multiply: with one level for each width of each channel group,

    log t[u, w_in, w_out, p] = a[u, p] + b[u, p, w_in] + c[u, p, w_out] + e,   e ~ N(0, tau^2)

fitted on the cells that builds have measured, predicts one cell from its row and its column. How far off that is, tau, is
estimated from cells predicted without themselves (an empirical Bayes prior: Gelman et al., Bayesian Data Analysis, ch. 5).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwsearch.latency.student_t import NORMAL, log_density

Floats = NDArray[np.float64]

TAUS = (0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.27, 0.4)
TYPICAL = 0.08
"""What tau is likely to be, to within a factor of two, before any cell."""
LEVEL = 1.0
"""Prior standard deviation of a level, in log time."""
UNSURE = 0.6
"""Relative standard error above which a predicted time is no better than none."""


@dataclass(frozen=True)
class Cell:
    """One work at some widths. family: what it is at whole widths, and its variant; levels: its width on each axis, None
    where it is whole."""

    family: Hashable
    levels: tuple[Hashable, ...]


@dataclass(frozen=True)
class Pooled:
    """Time of each cell and its relative standard error, infinite where the others say nothing of it. tau: as above."""

    time: Floats
    error: Floats
    tau: float


def pooled(cells: Sequence[Cell], time: Floats, error: Floats) -> Pooled:
    """Each cell from the others of its family, never from its own time.

    time [cells]: measured, in any unit; NaN or at most 0 where a cell was not. error [cells]: relative standard errors.
    """
    measured = np.isfinite(time) & (time > 0) & np.isfinite(error) & (error < UNSURE)
    families: dict[Hashable, list[int]] = {}
    for i, cell in enumerate(cells):
        families.setdefault(cell.family, []).append(i)
    shared = {
        family: np.array(own) for family, own in families.items() if len(own) > 1 and measured[own].any()
    }
    log = np.log(np.where(measured, time, 1.0))
    variance = np.where(measured, np.square(np.where(measured, error, 0.0)), np.inf)
    designs = {family: _levels([cells[i] for i in own]) for family, own in shared.items()}
    best: tuple[float, float, Floats, Floats] | None = None
    for tau in TAUS:
        mean, spread = np.full(len(cells), np.nan), np.full(len(cells), np.inf)
        for family, own in shared.items():
            mean[own], spread[own] = _without(designs[family], log[own], variance[own] + tau**2)
        known = measured & (spread < (UNSURE / 2) ** 2)
        total = spread[known] + variance[known] + tau**2
        # a cell that went wrong does not widen all others
        likelihood = float(np.sum(log_density(log[known] - mean[known], NORMAL * total)))
        likelihood -= 0.5 * float(np.log(tau / TYPICAL) / np.log(2.0)) ** 2
        if best is None or likelihood > best[0]:
            best = likelihood, tau, mean, np.sqrt(spread + tau**2)
    assert best is not None
    _, tau, mean, spread = best
    known = np.isfinite(mean) & (spread < UNSURE)
    return Pooled(
        np.where(known, np.exp(np.where(known, mean, 0.0)), np.nan), np.where(known, spread, np.inf), tau
    )


def _levels(cells: Sequence[Cell]) -> Floats:
    """[cells, parameters]: one for the family, and one for each level of each axis that is not whole."""
    columns: Mapping[tuple[int, Hashable], int] = {
        key: 1 + n
        for n, key in enumerate(
            dict.fromkeys((axis, w) for c in cells for axis, w in enumerate(c.levels) if w is not None)
        )
    }
    x = np.zeros((len(cells), 1 + len(columns)))
    x[:, 0] = 1.0
    for row, cell in enumerate(cells):
        for axis, width in enumerate(cell.levels):
            if width is not None:
                x[row, columns[axis, width]] = 1.0
    return x


def _without(x: Floats, y: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """Mean and variance of each row's x . parameters, fitted on the other rows (infinite variance: a row that says nothing)."""
    weight = 1.0 / variance
    prior = np.full(x.shape[1], LEVEL**-2.0)
    prior[0] = 1e-6
    inverse = np.linalg.inv((x.T * weight) @ x + np.diag(prior))
    spread = np.einsum("ij,jk,ik->i", x, inverse, x)
    mean = x @ (inverse @ (x.T @ (weight * y)))
    left = np.maximum(1.0 - weight * spread, 1e-9)
    # leaving a row out, by the matrix inversion lemma
    return (mean - weight * spread * y) / left, spread / left

"""Cells predicted from others of their work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.latency import pooling
from hwsearch.latency.pooling import (
    FALLS,
    LEVEL,
    OWN,
    PRECISION,
    TRIED,
    UNSURE,
    Cell,
    Law,
    Places,
    Stairs,
    pooled,
)

SHARES = (1.0, 0.75, 0.5, 0.25)
VARIANTS = {"fp32": 0, "int8": 1}


def staircase(rng: np.random.Generator, off: float, families: int = 12) -> tuple[list[Cell], np.ndarray]:
    """Times that are a product of two staircases, neither monotone, each cell off by a factor of its own."""
    cells, times = [], []
    for family in range(families):
        rows, columns = np.exp(rng.normal(-0.5, 0.4, (2, len(SHARES))))
        for i, a in enumerate(SHARES):
            for j, b in enumerate(SHARES):
                cells.append(Cell(family, "int8", (a, b)))
                times.append(1e5 * (1 + family) * rows[i] * columns[j] * np.exp(off * rng.standard_normal()))
    return cells, np.array(times)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_product_of_staircases_is_foretold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells, times = staircase(rng, 0.0)
    seen = rng.random(len(cells)) < 0.7
    found = pooled(cells, np.where(seen, times, np.nan), np.where(seen, 0.01, np.nan))
    known = np.isfinite(found.time)
    assert known.mean() > 0.7
    assert np.median(np.abs(found.time[known] / times[known] - 1)) < 0.05
    assert np.all(found.error[known] < UNSURE)
    assert found.tau <= TRIED["tau"][1]


@pytest.mark.parametrize("off", [0.05, 0.18])
def test_its_error_is_as_large_as_it_says(off: float) -> None:
    inside = []
    for seed in range(10):
        cells, times = staircase(np.random.default_rng(seed), off)
        found = pooled(cells, times, np.full(len(cells), 0.01))
        inside.append(np.mean(np.abs(np.log(found.time / times)) < found.error))
        assert off / 2 < found.tau < 2 * off
    assert 0.6 < np.mean(inside) < 0.8


def test_no_cell_is_foretold_from_itself() -> None:
    cells, times = staircase(np.random.default_rng(0), 0.02, families=2)
    error = np.full(len(cells), 0.02)
    before = pooled(cells, times, error)
    wrong = times.copy()
    wrong[5] *= 1.2
    after = pooled(cells, wrong, error)
    assert after.time[5] == pytest.approx(before.time[5], rel=0.02)
    assert after.time[4] != before.time[4]


def test_what_stands_alone_is_not_foretold() -> None:
    cells = [Cell("a", "int8", (1.0,)), Cell("b", "int8", (1.0,)), Cell("b", "fp32", (1.0,))]
    found = pooled(cells, np.array([1e4, 1e4, np.nan]), np.array([0.02, 0.02, np.nan]))
    assert np.isnan(found.time).all(), "a variant says nothing of another at the same widths"
    assert np.isinf(found.error).all()


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_covariances_are_those_of_the_written_law(seed: int) -> None:
    """A cell from the others by a Gaussian whose covariance is written out cell by cell."""
    rng = np.random.default_rng(seed)
    cells = [Cell("a", v, (a, b)) for v in ("fp32", "int8") for a in SHARES for b in SHARES[::2]]
    seen = np.sort(rng.permutation(len(cells))[:7])
    y, variance, law = rng.normal(9.0, 0.3, len(cells)), rng.uniform(0.0, 1e-3, len(cells)), Law(0.9, 0.1, 0.05)

    def covariance(i: int, j: int) -> float:
        a, b = cells[i], cells[j]
        own = float(a.variant == b.variant)
        x, z = -np.log(a.shares), -np.log(b.shares)
        slopes = FALLS**2 * np.sum(x * z)
        steps = law.stray**2 * sum(min(p, q) + (p == q) * min(p, 1.0) for p, q in zip(x, z, strict=True))
        return LEVEL**2 + own * PRECISION**2 + (1.0 + own * OWN**2) * (slopes + steps)

    full = np.array([[covariance(i, j) for j in range(len(cells))] for i in range(len(cells))])
    mean = law.fall * np.array([np.log(c.shares).sum() for c in cells])
    every = Places.of(cells)
    places = every[seen]
    stairs = Stairs.among(places)

    def by_hand(i: int, told: np.ndarray) -> tuple[float, float]:
        k = full[np.ix_(told, told)] + np.diag(variance[told] + law.tau**2)
        weights = np.linalg.solve(k, full[told, i])
        return mean[i] + weights @ (y - mean)[told], full[i, i] - weights @ full[told, i]

    found, spread = stairs.predicted(law, y[seen], variance[seen], every, Stairs.between(every, places))
    for i in range(len(cells)):
        want, its = by_hand(i, seen)
        assert found[i] == pytest.approx(want, abs=1e-5)
        assert spread[i] == pytest.approx(its, abs=1e-5)
    found, spread = stairs.left_out(law, y[seen], variance[seen])
    for place, i in enumerate(seen):
        want, its = by_hand(i, seen[seen != i])
        assert found[place] == pytest.approx(want, abs=1e-5)
        assert spread[place] == pytest.approx(its, abs=1e-5)


def test_few_cells_tell_a_whole_grid() -> None:
    """A diagonal of widths and two corners, in one precision or the other, tell stairs that fall with channels."""
    errors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cells, times = [], []
        for work in range(8):
            falls, steps = rng.normal(0.85, 0.15, 2), np.exp(0.05 * rng.standard_normal((2, len(SHARES))))
            for variant, factor in (("fp32", 1.0), ("int8", 0.4)):
                for i, a in enumerate(SHARES):
                    for j, b in enumerate(SHARES):
                        cells.append(Cell(work, variant, (a, b)))
                        times.append(1e5 * factor * a ** falls[0] * b ** falls[1] * steps[0, i] * steps[1, j])
        told = {(1.0, 1.0), (0.25, 0.25)}
        middle = {"fp32": (0.75, 0.5), "int8": (0.5, 0.75)}
        seen = np.array([c.shares in told or c.shares == middle[str(c.variant)] for c in cells])
        found = pooled(cells, np.where(seen, times, np.nan), np.where(seen, 0.02, np.nan))
        assert np.isfinite(found.time).all()
        errors += np.log(found.time / times)[~seen].tolist()
    assert np.median(np.abs(errors)) < 0.08


def test_works_are_computed_together_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works of one and of two axes, of different numbers of cells, some of them not measured; and few at a time."""
    rng = np.random.default_rng(0)
    cells = [Cell(w, v, (a,) * (1 + w % 2)) for w in range(9) for v in VARIANTS for a in SHARES[: 2 + w % 3]]
    time = np.where(rng.random(len(cells)) < 0.8, rng.uniform(1.0, 2.0, len(cells)), np.nan)
    error = np.full(len(cells), 0.02)
    together = pooled(cells, time, error)
    monkeypatch.setattr(pooling, "STACKED", 1)
    alone = pooled(cells, time, error)
    assert np.isfinite(together.time).sum() > len(cells) / 2
    np.testing.assert_allclose(together.time, alone.time, rtol=1e-9)
    np.testing.assert_allclose(together.error, alone.error, rtol=1e-9)

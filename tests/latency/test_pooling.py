"""Cells predicted from others of their family."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.latency.pooling import TAUS, UNSURE, Cell, pooled

WIDTHS = (None, 48, 32, 16)


def staircase(rng: np.random.Generator, off: float, families: int = 12) -> tuple[list[Cell], np.ndarray]:
    """Times that are a product of two staircases, neither monotone, each cell off by a factor of its own."""
    cells, times = [], []
    for family in range(families):
        rows, columns = np.exp(rng.normal(-0.5, 0.4, (2, len(WIDTHS))))
        for i, a in enumerate(WIDTHS):
            for j, b in enumerate(WIDTHS):
                cells.append(Cell(family, (a, b)))
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
    assert found.tau <= TAUS[1]


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
    cells = [Cell("a", (None,)), Cell("b", (None,)), Cell("b", (16,))]
    found = pooled(cells, np.array([1e4, 1e4, np.nan]), np.array([0.02, 0.02, np.nan]))
    assert np.isnan(found.time).all()
    assert np.isinf(found.error).all()

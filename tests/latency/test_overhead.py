"""What no node accounts for, from builds of very different nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.latency.overhead import EXPECTED, MOST, dispatch_ns


def builds(
    dispatch: float, *, count: int = 30, noise: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(times, counted): nodes of 100 to 500 us, counted on a machine of a slightly other speed."""
    rng = np.random.default_rng(seed)
    counted = rng.uniform(1e5, 5e5, count)
    return (dispatch + 1.03 * counted) * np.exp(noise * rng.standard_normal(count)), counted


@pytest.mark.parametrize("dispatch", [0.0, 2e4, 8e4])
def test_it_is_told_from_the_nodes(dispatch: float) -> None:
    assert dispatch_ns(*builds(dispatch)) == pytest.approx(dispatch, abs=100.0)
    assert dispatch_ns(*builds(dispatch, noise=0.03)) == pytest.approx(dispatch, abs=1.5e4)


def test_builds_that_were_counted_at_another_speed_do_not_decide() -> None:
    """A fifth of them, as on a machine that was disturbed while their nodes were counted."""
    times, counted = builds(5e4, noise=0.01)
    counted[::5] *= 1.4
    assert dispatch_ns(times, counted) == pytest.approx(5e4, rel=0.2)


def test_few_noisy_builds_say_little() -> None:
    """Shrunk towards what is expected before anything is measured."""
    found = [dispatch_ns(*builds(0.0, count=4, noise=0.3, seed=s)) for s in range(20)]
    assert max(found) < 3 * EXPECTED * 1e5


def test_builds_that_count_the_same_tell_nothing() -> None:
    assert dispatch_ns(np.array([5e5, 5.1e5, 5.2e5]), np.full(3, 4e5)) == 0.0


@given(st.lists(st.tuples(st.floats(1e3, 1e9), st.floats(1e3, 1e9)), min_size=1, max_size=12))
def test_it_is_never_below_zero_nor_nearly_all(pairs: list[tuple[float, float]]) -> None:
    times, counted = np.array(pairs).T
    assert 0.0 <= dispatch_ns(times, counted) <= MOST * times.min() * (1 + 1e-9)

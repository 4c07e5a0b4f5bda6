"""What no node accounts for, from builds of very different nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.latency.overhead import EXPECTED, MOST, Beside, beside, worked_ns


def builds(
    dispatch: float, *, count: int = 30, noise: float = 0.0, seed: int = 0, counter: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(times, counted, nodes): 20 to 70 nodes of 100 to 500 us in all, counted on a machine of a slightly other speed."""
    rng = np.random.default_rng(seed)
    counted = rng.uniform(1e5, 5e5, count)
    times = (dispatch + 1.03 * counted) * np.exp(noise * rng.standard_normal(count))
    nodes = rng.integers(20, 70, count).astype(np.float64)
    return times, counted + counter * nodes, nodes


def dispatch_ns(*given: np.ndarray) -> float:
    return beside(*given).dispatch_ns


@pytest.mark.parametrize("dispatch", [0.0, 2e4, 8e4])
def test_it_is_told_from_the_nodes(dispatch: float) -> None:
    assert dispatch_ns(*builds(dispatch)) == pytest.approx(dispatch, abs=100.0)
    assert dispatch_ns(*builds(dispatch, noise=0.03)) == pytest.approx(dispatch, abs=1.5e4)


def test_builds_that_were_counted_at_another_speed_do_not_decide() -> None:
    """A fifth of them, as on a machine that was disturbed while their nodes were counted."""
    times, counted, nodes = builds(5e4, noise=0.01)
    counted[::5] *= 1.4
    assert dispatch_ns(times, counted, nodes) == pytest.approx(5e4, rel=0.2)


def test_few_noisy_builds_say_little() -> None:
    """Shrunk towards what is expected before anything is measured."""
    found = [dispatch_ns(*builds(0.0, count=4, noise=0.3, seed=s)) for s in range(20)]
    assert max(found) < 3 * EXPECTED * 1e5


def test_builds_that_count_the_same_tell_nothing() -> None:
    assert beside(np.array([5e5, 5.1e5, 5.2e5]), np.full(3, 4e5), np.full(3, 20.0)) == Beside()


@pytest.mark.parametrize("dispatch", [0.0, 2e4])
def test_what_counting_takes_is_told_from_builds_of_more_and_fewer_nodes(dispatch: float) -> None:
    """2 us a node, as in ONNX Runtime: in a small network of many nodes nearly as much as its inference."""
    found = beside(*builds(dispatch, counter=2e3))
    assert found.counter_ns == pytest.approx(2e3, rel=0.05)
    assert found.dispatch_ns == pytest.approx(dispatch, abs=2e3)
    assert beside(*builds(dispatch, counter=2e3, noise=0.03)).counter_ns == pytest.approx(2e3, rel=0.4)
    assert beside(*builds(dispatch)).counter_ns < 50.0


def test_a_node_keeps_a_part_of_what_was_counted() -> None:
    assert worked_ns(np.array([5e4, 1e3]), 2e3).tolist() == [4.8e4, 50.0]


@given(st.lists(st.tuples(st.floats(1e3, 1e9), st.floats(1e3, 1e9), st.integers(1, 200)), min_size=1, max_size=12))
def test_it_is_never_below_zero_nor_nearly_all(rows: list[tuple[float, float, int]]) -> None:
    times, counted, nodes = np.array(rows, np.float64).T
    found = beside(times, counted, nodes)
    assert 0.0 <= found.dispatch_ns <= MOST * times.min() * (1 + 1e-9)
    assert found.counter_ns >= 0.0
    assert np.all(found.counter_ns * nodes <= MOST * counted * (1 + 1e-9))

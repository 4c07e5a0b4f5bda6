"""The bracket of a floor: whatever the curve, no more samples than there are, and as near as bisection would come."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.pipeline.bracket import TOLERANCE, Range, Tried, bracket, next_bound

LOW, HIGH = -11.5, 0.0
Curve = Callable[[float], float]


def searched(
    drop: Curve, allowed: float, samples: int = 10, *, free: bool = True, error: float = 0.0, steps: Sequence[float] = ()
) -> tuple[list[Tried], int]:
    """(all answers, samples measured): `drop` of the score at the logarithm of a loss; steps: the only losses that there are."""
    within, tried, known = Range(LOW, HIGH, free), list[Tried](), set[float]()
    while (x := next_bound(tried, within, allowed, samples - len(known))) is not None:
        assert LOW <= x <= HIGH
        place = bisect.bisect_right(steps, x)
        reached = x if not steps else steps[place - 1] if place else LOW
        known.add(reached)  # an answer that was measured is not measured again
        tried.append(Tried(x, reached, drop(reached), allowed - drop(reached) - error))
        assert len(tried) <= 200, "it comes to an end"
    return tried, len(known)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Scores that never rise as losses grow: flat parts, slopes and cliffs, in any order."""
    knots = sorted(draw(st.lists(st.floats(LOW, HIGH), min_size=1, max_size=8)))
    falls = [draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.9])) for _ in knots]
    smooth = draw(st.booleans())

    def drop(x: float) -> float:
        if not smooth:
            return sum(fall for knot, fall in zip(knots, falls, strict=True) if x >= knot)
        return sum(fall * min(1.0, max(0.0, math.exp(x - knot))) for knot, fall in zip(knots, falls, strict=True))

    return drop


STEPS = st.lists(st.floats(LOW, HIGH), max_size=40).map(sorted)


@given(curves(), st.sampled_from([1e-5, 0.002, 0.01, 0.2]), st.booleans(), STEPS, st.sampled_from([0.0, 0.001]))
def test_ten_samples_are_enough_for_any_curve(
    drop: Curve, allowed: float, free: bool, steps: list[float], error: float
) -> None:
    tried, used = searched(drop, allowed, free=free, steps=steps, error=error)
    assert used <= 10
    lo, hi = bracket(tried, Range(LOW, HIGH, free))
    holding = [t for t in tried if t.holds]
    if not holding and not free:
        assert tried[-1].bound == LOW, "the least loss that there is does not hold"
        assert len(tried) <= 2
        return
    finished = hi - lo <= TOLERANCE + 1e-9 or any(t.bound == HIGH for t in holding)
    assert finished
    bounds = [LOW + (HIGH - LOW) * i / 1000 for i in range(1001)]
    where = (lambda x: steps[bisect.bisect_right(steps, x) - 1] if x >= steps[0] else LOW) if steps else (lambda x: x)
    fine = [x for x in bounds if drop(where(x)) + error <= allowed]
    assert max(fine, default=LOW) <= lo + TOLERANCE + 1e-9, "nothing that holds is further away than the tolerance"
    assert all(drop(where(t.bound)) + error <= allowed for t in holding)


@given(curves(), st.integers(1, 9), st.booleans())
def test_with_fewer_samples_it_comes_as_near_as_bisection(drop: Curve, samples: int, free: bool) -> None:
    tried, used = searched(drop, 0.01, samples, free=free)
    assert used <= samples
    if not free and not any(t.holds for t in tried):
        return
    lo, hi = bracket(tried, Range(LOW, HIGH, free))
    spent = samples if free else samples - 1
    if not any(t.holds and t.bound == HIGH for t in tried):
        assert hi - lo <= max(TOLERANCE, (HIGH - LOW) / 2**spent) + 1e-9


@pytest.mark.parametrize("free", [True, False])
def test_where_everything_holds_two_samples_say_so(free: bool) -> None:
    tried, used = searched(lambda x: 0.0, 0.01, free=free)
    assert used <= 2
    assert tried[-1].bound == HIGH


def test_where_nothing_holds_two_samples_say_so() -> None:
    tried, used = searched(lambda x: 0.5, 0.01, free=False)
    assert used == len(tried) == 2
    assert not any(t.holds for t in tried)


def test_a_score_that_falls_in_proportion_takes_few_samples() -> None:
    """Fewer than bisection, which takes eight, wherever the floor is."""
    for allowed in (1e-4, 0.003, 0.02, 0.3):
        _, used = searched(lambda x: 2.5 * math.exp(x), allowed)
        assert used < math.ceil(math.log2((HIGH - LOW) / TOLERANCE)), allowed


def test_a_failure_is_a_sample_that_does_not_hold() -> None:
    tried = [Tried(-3.0, -3.1, math.inf, -math.inf)]
    assert bracket(tried, Range(LOW, HIGH)) == (LOW, -3.1)
    x = next_bound(tried, Range(LOW, HIGH), 0.01, 9)
    assert x is not None
    assert LOW < x < -3.1


def test_scores_that_contradict_one_another_end_as_well() -> None:
    """Noise: the larger bound holds, the smaller one does not; what holds as measured is believed."""
    tried = [Tried(-4.0, -4.0, 0.02, -0.01), Tried(-3.0, -3.0, 0.005, 0.005), Tried(-2.9, -3.1, 0.02, -0.01)]
    assert bracket(tried, Range(LOW, HIGH)) == (-3.0, -3.0)
    assert next_bound(tried, Range(LOW, HIGH), 0.01, 9) is None

"""The search over the numbers of a scheme: whatever the curve, at most ten samples, and as near the floor as the tolerance."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hwsearch.errors import BackendUnavailable
from hwsearch.pipeline import surrogate
from hwsearch.pipeline.knobs import (
    FACTOR,
    LEAST_MARGIN,
    TOLERANCE,
    KnobSearch,
    Point,
    Prior,
    place_of,
    value_of,
)
from hwsearch.schemes import Free

DENSITY, BITS = Free("density"), Free("bits", 2, 8, whole=True)
Law = Callable[[Sequence[float]], float]


def cost_of(x: Sequence[float]) -> float:
    """In proportion to what is kept of each."""
    return sum(math.log(max(1.0 - 0.95 * own, 1e-3)) for own in x)


def searched(search: KnobSearch, margin: Law, samples: int = 10, noise: float = 0.0) -> list[Point]:
    """All samples, of a scheme whose margin is known at every place; NaN where it fails."""
    points: list[Point] = []
    while (x := search.next(points, samples - len(points))) is not None:
        assert all(0.0 <= own <= 1.0 for own in x)
        assert x not in [p.x for p in points], "nothing is measured twice"
        found = margin(x)
        points.append(Point(x, -math.inf, 0.0, None) if math.isnan(found) else Point(x, found - noise, noise, cost_of(x)))
        assert len(points) <= samples
    return points


def one(prior: Prior | None = None, *, free: bool = True, measured: bool = False) -> KnobSearch:
    return KnobSearch([DENSITY], prior or Prior.none([DENSITY]), free=free, measured_cost=measured)


def curve(seed: int) -> Law:
    """A score that falls: slopes and cliffs, in margins (1 is dense, 0 the floor)."""
    rng = np.random.default_rng(seed)
    knots = np.sort(rng.uniform(0, 1, rng.integers(1, 6)))
    falls = rng.choice([0.1, 0.5, 1.0, 3.0, 40.0], len(knots))
    steep = rng.choice([1.0, 3.0, 30.0, 1e6], len(knots))
    return lambda x: 1.0 - float(sum(f * min(1.0, max(0.0, (x[0] - k) * s)) for k, f, s in zip(knots, falls, steep, strict=True)))


def highest(margin: Law, free: bool = True) -> float | None:
    """The furthest place that holds, by halving, as it falls; None where not even 0 does."""
    if margin([1.0]) >= 0.0:
        return 1.0
    lo, hi = 0.0, 1.0
    for _ in range(20):
        middle = (lo + hi) / 2.0
        lo, hi = (middle, hi) if margin([middle]) >= 0.0 else (lo, middle)
    return lo if lo > 0.0 or free or margin([0.0]) >= 0.0 else None


def within(points: Sequence[Point], margin: Law, free: bool = True) -> None:
    """The samples are few, what holds does, and nothing that holds is further away than the tolerance."""
    assert len(points) <= 10
    best, found = highest(margin, free), max((p.x[0] for p in points if p.holds), default=0.0 if free else None)
    assert (best is None) == (found is None)
    if best is not None and found is not None:
        assert best - found <= TOLERANCE + 1e-9


def test_ten_samples_are_enough_for_a_thousand_curves_whatever_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard alone makes it so: guesses are thrown."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(KnobSearch, "guess", lambda self, points, lo, hi: float(rng.uniform(lo, hi)))
    for seed in range(1000):
        free = bool(seed % 2)
        within(searched(one(free=free), curve(seed)), curve(seed), free)


def test_ten_samples_are_enough_with_the_process_itself() -> None:
    for seed in range(9):
        noise = 0.2 if seed % 3 == 0 else 0.0
        own = curve(5000 + seed)
        found = searched(one(), own, noise=noise)
        within(found, lambda x, own=own, noise=noise: own(x) - noise)


def test_with_fewer_samples_it_comes_as_near_as_halving() -> None:
    for seed, samples in itertools.product(range(4), (3, 6)):
        own = curve(seed)
        found = searched(one(), own, samples)
        best, reached = highest(own), max((p.x[0] for p in found if p.holds), default=0.0)
        assert best is not None
        assert best - reached <= 0.5**samples + TOLERANCE


def test_where_all_or_nothing_holds_two_samples_say_so() -> None:
    assert [p.x for p in searched(one(), lambda x: 1.0)][-1] == (1.0,)
    assert len(searched(one(), lambda x: 1.0)) <= 2
    nothing = searched(one(free=False), lambda x: -2.0)
    assert nothing[-1].x == (0.0,)
    assert len(nothing) <= 2


def test_a_right_prior_takes_two_samples_and_a_wrong_one_no_more_than_ten() -> None:
    def law(x: Sequence[float]) -> float:
        return 1.0 - math.exp(12.0 * (x[0] - 0.61))

    places = [*np.linspace(0.0, 0.5, 6), *np.linspace(0.55, 0.7, 16), 0.8, 0.9, 1.0]
    costs = np.array([1.0 - x for x in places])
    right = Prior.through([DENSITY], [places], np.array([law([x]) for x in places]), costs)
    found = searched(one(right), law)
    within(found, law)
    assert len(found) == 2
    assert len(searched(one(), law)) > 2
    wrong = Prior.through([DENSITY], [places], np.array([1.0 - 30.0 * x for x in places]), costs)
    within(searched(one(wrong), law), law)


def test_whole_numbers_are_found_exactly_and_stay_whole() -> None:
    for least in range(2, 9):
        search = KnobSearch([BITS], Prior.none([BITS]), free=False, measured_cost=False)
        found = searched(search, lambda x, least=least: 0.5 if value_of(BITS, x[0]) >= least else -2.0)
        assert all(place_of(BITS, value_of(BITS, p.x[0])) == p.x[0] for p in found)
        assert min(value_of(BITS, p.x[0]) for p in found if p.holds) == least
        assert len(found) <= 6
        assert isinstance(value_of(BITS, found[0].x[0]), int)


def test_failures_count_and_are_not_gone_beyond() -> None:
    found = searched(one(), lambda x: math.nan if x[0] > 0.3 else 0.5)
    assert any(p.cost is None for p in found)
    within(found, lambda x: -1.0 if x[0] > 0.3 else 0.5)


def two(x: Sequence[float]) -> float:
    """Falls with both, faster together."""
    return 1.0 - math.exp(7.0 * (x[0] - 0.75)) - math.exp(9.0 * (x[1] - 0.7)) - 0.5 * x[0] * x[1]


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_two_knobs_end_no_worse_than_a_grid_of_a_hundred(scale: float) -> None:
    """Also where the prior foretells that a score falls otherwise: by a factor, and with another shape."""
    steps = np.linspace(0.0, 1.0, 5)
    foretold = np.array([[1.0 - scale * (1.0 - two([a, b])) ** 1.2 for b in steps] for a in steps])
    costs = np.array([[math.exp(cost_of([a, b])) for b in steps] for a in steps])
    knobs = [DENSITY, Free("width", 0.0, 1.0)]
    search = KnobSearch(knobs, Prior.through(knobs, [steps, steps], foretold, costs), free=True, measured_cost=False)
    found = searched(search, two)
    best = min(cost_of(p.x) for p in found if p.holds)
    fine = np.linspace(0.0, 1.0, 10)
    grid = min(cost_of([a, b]) for a in fine for b in fine if two([a, b]) >= 0.0)
    assert best <= grid + 0.03
    assert len(found) <= 10


def test_a_measured_cost_that_does_not_fall_with_the_knob_is_searched_within_the_floor() -> None:
    """Between 0.2 and 0.4 it takes least; the floor is at 0.8."""
    points: list[Point] = []
    search = one(measured=True)
    while (x := search.next(points, 10 - len(points))) is not None:
        points.append(Point(x, 1.0 - 1.25 * x[0], 0.0, -0.5 if 0.2 < x[0] < 0.4 else -0.1 - 0.05 * x[0]))
    assert len(points) <= 10
    assert min(p.cost for p in points if p.holds and p.cost is not None) == -0.5


def test_three_knobs_hold_the_floor_in_ten_samples() -> None:
    knobs = [DENSITY, Free("width"), BITS]
    search = KnobSearch(knobs, Prior.none(knobs), free=True, measured_cost=False)
    found = searched(search, lambda x: 1.0 - 2.0 * x[0] ** 2 - 1.5 * x[1] ** 2 - x[2] ** 2)
    best = min(cost_of(p.x) for p in found if p.holds)
    assert best < cost_of([0.25, 0.25, 0.25])
    assert len(found) <= 10


def test_known_samples_are_gone_on_with() -> None:
    """As a killed search, or another floor: the same next place, and nothing that is known."""
    own = curve(3)
    all_points = searched(one(), own)
    assert one().next(all_points[:2], 8) == all_points[2].x
    assert one().next(all_points, 10) is None


def test_numbers_are_rounded_where_they_can_be() -> None:
    assert value_of(DENSITY, 1.0 / 3.0) == 0.666667
    assert value_of(BITS, 0.5) == 5
    assert place_of(BITS, 5) == 0.5
    assert value_of(Free("a", 0.1, 0.3), 1.5) == 0.1


WIDE = Free("density", 0.002, 1.0)


def test_a_wide_range_is_searched_by_its_logarithm() -> None:
    assert value_of(WIDE, 0.5) == pytest.approx(math.sqrt(0.002), rel=1e-5)
    for x in np.linspace(0.0, 1.0, 23):
        assert place_of(WIDE, value_of(WIDE, float(x))) == pytest.approx(x, abs=1e-5)
    assert (value_of(WIDE, 0.0), value_of(WIDE, 1.0)) == (1.0, 0.002)
    assert value_of(Free("a", 0.2, 1.0), 0.5) == pytest.approx(0.6), "a narrow range is not"
    assert value_of(Free("bits", 1, 16, whole=True), 1.0 / 3.0) == 11, "whole numbers are not"


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_answer_in_a_wide_range_is_right_to_a_factor(seed: int, free: bool) -> None:
    """In ten samples, however small the least number that holds is: to a hundredth of the range it could be several times that."""
    rng = np.random.default_rng(seed)
    least, steep = math.exp(rng.uniform(math.log(0.003), 0.0)), rng.uniform(0.2, 8.0)
    search = KnobSearch([WIDE], Prior.none([WIDE]), free=free, measured_cost=False)
    found = searched(search, lambda x: 1.0 - (least / value_of(WIDE, x[0])) ** steep)
    answer = min((value_of(WIDE, p.x[0]) for p in found if p.holds), default=1.0)
    assert least * (1 - 1e-5) <= answer <= least * FACTOR * (1 + 1e-5)


def test_costs_of_a_prior_are_interpolated_in_the_numbers() -> None:
    """In proportion to a density they are found exactly from five places, however wide its range."""
    places = [[0.0, 0.25, 0.5, 0.75, 1.0]]
    numbers = np.array([value_of(WIDE, x) for x in places[0]])
    prior = Prior.through([WIDE], places, np.linspace(1.0, -1.0, 5), 0.01 + 0.99 * numbers)
    x = np.linspace(0.0, 1.0, 17)[:, None]
    assert np.exp(prior.cost(x)) == pytest.approx([0.01 + 0.99 * value_of(WIDE, float(own)) for own in x[:, 0]], rel=1e-4)
    assert np.exp(Prior.none([WIDE]).cost(x)) == pytest.approx([value_of(WIDE, float(own)) for own in x[:, 0]], rel=1e-4)


def test_a_prior_is_made_to_fall_and_ends_at_the_least() -> None:
    prior = Prior.through([DENSITY], [[0.0, 0.5, 1.0]], np.array([1.0, 1.2, -50.0]), np.array([1.0, 0.5, 0.0]))
    x = np.array([[0.0], [0.5], [1.0]])
    assert prior.margin(x).tolist() == pytest.approx([1.0, 1.0, LEAST_MARGIN])
    assert np.exp(prior.cost(x)).tolist() == pytest.approx([1.0, 0.5, 1e-9])


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skopt", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'hwsearch\[bayes\]'"):
        surrogate.require()

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from problems import network, problems
from tied import consistent_choices, tied_problems

from hwsearch.allocate.lagrangian import hull, lower_bound
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Problem, brute_force
from hwsearch.errors import Infeasible


@settings(max_examples=30, deadline=None)
@given(problems() | tied_problems())
def test_the_bound_is_below_the_optimum(problem: Problem) -> None:
    best = brute_force(problem)
    bound = lower_bound(problem)
    assert best is None or bound <= best.loss + 1e-12 * (1 + abs(best.loss))
    assert not math.isnan(bound)


def test_the_bound_is_tight_on_networks() -> None:
    """Rounding loses no more than one unit's worth where one budget binds."""
    problem = network(40, 10)
    bounded = replace(problem, budgets={"latency": minimise(problem, "latency").costs["latency"] * 13 // 10})
    best = solve(bounded)
    assert 0.9 * best.loss <= lower_bound(bounded) <= best.loss


def test_the_bound_of_what_cannot_be_met() -> None:
    problem = network(10, 2)
    assert lower_bound(replace(problem, budgets={"latency": 1})) == math.inf
    assert lower_bound(problem) == 0.0


@settings(max_examples=30, deadline=None)
@given(problems(budgets=False) | tied_problems(budgets=False))
def test_hull_corners_are_those_of_brute_force(problem: Problem) -> None:
    points = {(problem.cost("latency", a), problem.total_loss(a)) for a in consistent_choices(problem)}
    corners = hull(problem, "latency")
    found = [(s.costs["latency"], s.loss) for s in corners]
    assert set(found) <= points
    for cost, loss in found:
        assert loss <= min(other for c, other in points if c <= cost) + 1e-9
    assert found == sorted(found)
    assert [loss for _, loss in found] == sorted((loss for _, loss in found), reverse=True)
    span = found[0][1] - found[-1][1]
    for (c0, l0), (c1, l1) in pairwise(found):
        for cost, loss in points:  # nothing lies below a chord
            assert loss + (l0 - l1) / (c1 - c0) * (cost - c0) >= l0 - 1e-8 * max(span, 1e-12)
    assert found[0][0] == min(c for c, _ in points)
    assert found[-1][1] == pytest.approx(min(loss for _, loss in points), rel=1e-9, abs=0)


def test_hull_within_other_budgets_and_up_to_a_number() -> None:
    problem = network(15, 4)
    size = problem.cost("size", (0,) * 15) // 2
    bounded = replace(problem, budgets={"size": size})
    corners = hull(bounded, "latency", most=5)
    assert len(corners) == 5
    assert all(s.costs["size"] <= size for s in corners)
    for s in corners:
        within = replace(problem, budgets={"latency": s.costs["latency"], "size": size})
        assert solve(within).loss == pytest.approx(s.loss, rel=1e-9)
    with pytest.raises(Infeasible):
        hull(replace(problem, budgets={"size": 1}), "latency")

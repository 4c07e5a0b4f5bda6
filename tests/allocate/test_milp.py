from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import brute_force
from problems import all_choices, network, problems
from scipy.optimize import OptimizeResult
from tied import channels, tied_problems

from hwsearch.allocate import program
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.polytope import Ints, Vector
from hwsearch.allocate.problem import Cost, Problem, Tie
from hwsearch.allocate.program import Program
from hwsearch.errors import HwsearchError, Infeasible


def least(problem: Problem, column: str, budgets: dict[str, int]) -> int | None:
    within = replace(problem, budgets=budgets)
    return min((problem.cost(column, a) for a in all_choices(problem) if within.feasible(a)), default=None)


@settings(max_examples=80, deadline=None)
@given(problems() | tied_problems())
def test_equals_brute_force(problem: Problem) -> None:
    """The same loss, never over budget, the same least cost among equal losses; infeasible names the true least."""
    best = brute_force(problem)
    if best is None:
        with pytest.raises(Infeasible) as caught:
            solve(problem)
        for column in problem.budgets:
            others = {c: limit for c, limit in problem.budgets.items() if c != column}
            beside = least(problem, column, others)
            assert caught.value.least[column] == (least(problem, column, {}) if beside is None else beside)
        return
    found = solve(problem)
    assert problem.feasible(found.choice)
    assert found.loss == pytest.approx(best.loss, rel=1e-9, abs=0)
    assert found.loss != best.loss or found.costs["latency"] == best.costs["latency"]
    assert found.costs == {c: problem.cost(c, found.choice) for c in problem.costs}
    assert found.status == "optimal"
    assert found.bound <= found.loss
    assert found.gap <= 1e-2 if found.loss < 1e-8 else found.gap <= 1e-6


@settings(max_examples=40, deadline=None)
@given(problems() | tied_problems())
def test_minimise_is_exact(problem: Problem) -> None:
    for budgets in ({}, {c: b for c, b in problem.budgets.items() if c != "latency"}):
        expected = least(problem, "latency", budgets)
        if expected is None:
            with pytest.raises(Infeasible):
                minimise(problem, "latency", budgets=budgets)
        else:
            found = minimise(problem, "latency", budgets=budgets)
            assert (found.costs["latency"], found.bound, found.gap) == (expected, expected, 0.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([10**5, 10**7, 10**9]), st.booleans())
def test_budgets_met_to_the_last_unit(seed: int, largest: int, subset_sum: bool) -> None:
    """Where loss is the time saved, optima lie at the budget; one unit less must give another answer."""
    rng = np.random.default_rng(seed)
    times = rng.integers(0, largest, (6, 3))
    saved = (times.max(1, keepdims=True) - times) / largest
    loss = saved if subset_sum else saved * rng.uniform(1, 1.001, (6, 3))
    free = Problem(tuple("abcdef"), (tuple("xyz"),) * 6, tuple(loss), {"latency": Cost(0, tuple(times))})
    limit = free.cost("latency", rng.integers(0, 3, 6).tolist())
    for _ in range(3):
        problem = replace(free, budgets={"latency": limit})
        best = brute_force(problem)
        if best is None:
            with pytest.raises(Infeasible) as caught:
                solve(problem)
            assert caught.value.least == {"latency": times.min(1).sum()}
            return
        found = solve(problem)
        assert found.costs["latency"] <= limit
        assert found.loss == pytest.approx(best.loss, rel=1e-9)
        limit = found.costs["latency"] - 1


def test_an_answer_over_budget_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should HiGHS let one through, as if its rows had a unit to spare, the next best is returned instead."""
    problem = network(12, 4)
    lenient = {"latency": minimise(problem, "latency").costs["latency"] * 13 // 10}
    tight = {"latency": solve(replace(problem, budgets=lenient)).costs["latency"] - 1}
    expected = solve(replace(problem, budgets=tight))
    digits, highs, cut = Program._digits, Program._highs, []

    def counting(self: Program, goal: Vector, allowed: Vector, cuts: list[Ints]) -> OptimizeResult | None:
        cut.append(len(cuts))
        return highs(self, goal, allowed, cuts)

    monkeypatch.setattr(Program, "_highs", counting)
    monkeypatch.setattr(Program, "_digits", lambda self, c, room: digits(self, c, room + 1))
    found = solve(replace(problem, budgets=tight))
    assert max(cut) > 0
    assert found.loss == expected.loss
    assert found.costs["latency"] <= tight["latency"]


def test_infeasible_says_what_can_be_met() -> None:
    problem = network(8, 2)
    fastest = minimise(problem, "latency").costs["latency"]
    smallest = minimise(problem, "size").costs["size"]
    with pytest.raises(Infeasible) as caught:
        solve(replace(problem, budgets={"latency": fastest - 1, "size": 10**9}))
    assert caught.value.least["latency"] == fastest
    assert "latency=" in str(caught.value)
    assert "the least latency within size=1GB is" in str(caught.value)
    with pytest.raises(Infeasible, match="even without the other budgets") as caught:
        solve(replace(problem, budgets={"latency": fastest - 1, "size": smallest - 1}))
    assert caught.value.least == {"latency": fastest, "size": smallest}


def test_what_no_tie_allows() -> None:
    ties = (Tie(0, 1, np.array([0, 0])), Tie(2, 1, np.array([1, 1])))
    costs = {"latency": Cost(0, (np.array([1, 2]),) * 3)}
    problem = Problem(tuple("abc"), (tuple("xy"),) * 3, (np.array([0.0, 1.0]),) * 3, costs, ties=ties)
    assert brute_force(problem) is None
    for budgets in ({}, {"latency": 100}):
        with pytest.raises(Infeasible, match="no allocation agrees with every tie"):
            solve(replace(problem, budgets=budgets))
    with pytest.raises(Infeasible, match="no allocation agrees with every tie"):
        minimise(problem, "latency")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [{"latency": 0.7}, {"latency": 0.3}, {"latency": 0.4, "size": 0.2}])
def test_widths_are_solved_to_proof(
    seed: int, share: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups and units agree, every budget holds, and leaving columns out of the core changes nothing."""
    free = channels(5, 3, 4, seed)
    dense = (0,) * len(free.sizes)
    assert free.consistent(dense)
    problem = replace(free, budgets={c: int(free.cost(c, dense) * f) for c, f in share.items()})
    found = solve(problem)
    assert problem.feasible(found.choice)
    assert (found.status, found.gap) == ("optimal", 0.0)
    monkeypatch.setattr(program, "CORE", 10**6)
    assert solve(problem).loss == pytest.approx(found.loss, rel=1e-9, abs=0)


def test_ties_go_to_the_faster() -> None:
    loss = (np.array([0.0, 0.0, 1.0]), np.array([0.5, 0.5]))
    cost = Cost(0, (np.array([9, 4, 1]), np.array([2, 5])), {(0, 1): np.array([[0, 0], [3, -2], [0, 0]])})
    problem = Problem(("a", "b"), (tuple("xyz"), tuple("xy")), loss, {"latency": cost}, {"latency": 100})
    assert solve(problem).choice == (1, 1)
    assert solve(replace(problem, budgets={}), prefer="latency").choice == (1, 1)


def test_without_budgets_nothing_is_lost() -> None:
    found = solve(network(20, 5))
    assert (found.loss, found.gap, found.status) == (0.0, 0.0, "optimal")


def test_small_losses_beside_large_ones() -> None:
    """A difference of 1e-9 decides although another choice would lose 10."""
    loss = (np.array([3e-9, 2e-9, 10.0]), np.array([0.0, 1.5e-9]))
    cost = Cost(0, (np.array([1, 3, 0]), np.array([3, 1])))
    problem = Problem(("a", "b"), (tuple("xyz"), tuple("xy")), loss, {"latency": cost}, {"latency": 4})
    found = solve(problem)
    assert found.choice == (0, 0)
    assert found.gap < 1e-3


def test_no_time_left() -> None:
    problem = network(60, 30)
    limit = minimise(problem, "latency").costs["latency"] * 12 // 10
    bounded = replace(problem, budgets={"latency": limit})
    with pytest.raises(HwsearchError, match="no allocation was found in the time allowed"):
        solve(bounded, time_limit_s=0)
    warm = solve(bounded).choice
    found = solve(bounded, time_limit_s=0, warm=warm)
    assert (found.choice, found.status) == (warm, "time_limit")
    assert found.bound <= found.loss
    assert 0 < found.gap <= 1
    with pytest.raises(HwsearchError):
        solve(bounded, time_limit_s=0, warm=(0,) * 60)  # over budget, so no answer


def test_a_warm_start_does_not_change_the_answer() -> None:
    problem = network(30, 10)
    bounded = replace(problem, budgets={"latency": minimise(problem, "latency").costs["latency"] * 13 // 10})
    cold = solve(bounded)
    for warm in (cold.choice, minimise(problem, "latency").choice, (0,) * 30):
        assert solve(bounded, warm=warm).loss == cold.loss


@pytest.mark.parametrize("scale_ns", [1e3, 1e6])
def test_a_network_of_150_units(scale_ns: float) -> None:
    problem = network(150, 100, scale_ns=scale_ns)
    dense = problem.cost("latency", (0,) * 150)
    size = problem.cost("size", (0,) * 150)
    for budgets in ({"latency": int(dense * 0.4)}, {"latency": int(dense * 0.4), "size": int(size * 0.3)}):
        wall, cpu = time.perf_counter(), time.process_time()
        found = solve(replace(problem, budgets=budgets), time_limit_s=300)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"150 units, {len(problem.costs['latency'].pairwise)} pairs, {len(budgets)} budgets: "
              f"{wall:.2f} s ({cpu:.2f} s of CPU), loss {found.loss:.4g}, gap {found.gap:.1g}")  # fmt: skip
        assert all(found.costs[c] <= limit for c, limit in budgets.items())
        assert found.gap <= 1e-6

"""Any column as the objective, the loss as a bound, and answers that differ: against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import all_choices, problems
from tied import tied_problems

from hwsearch.allocate.milp import solve
from hwsearch.allocate.problem import Apart, Problem
from hwsearch.errors import Infeasible, InvalidInput
from hwsearch.loss.interactions import Correction

MEMORY = "memory"


def with_peak(problem: Problem) -> Problem:
    """The largest of the costs as a further column, where two are known."""
    return replace(problem, peaks={MEMORY: tuple(problem.costs.values())})


@settings(max_examples=80, deadline=None)
@given(problems() | tied_problems(), st.data())
def test_any_column_is_minimised_within_bounds_on_all(problem: Problem, data: st.DataObject) -> None:
    """The least cost exactly, then the least loss; no bound is passed, not even by a rounding, and the loss is one of them.

    The predicted loss is that of a total, with which it grows in a straight line or not.
    """
    factor, exponent = data.draw(st.sampled_from([(1.0, 1.0), (2.0, 1.7), (0.3, 0.6)]))
    problem = replace(with_peak(problem), correction=Correction(factor=factor, exponent=exponent))
    some = [data.draw(st.integers(0, n - 1)) for n in problem.sizes]
    limits = {**problem.budgets, "loss": problem.value("loss", some) * data.draw(st.sampled_from([1.0, 0.7, 1.3]))}
    bounded = replace(problem, budgets={c: limits[c] for c in data.draw(st.sets(st.sampled_from(sorted(limits))))})
    minimize = data.draw(st.sampled_from(["loss", *problem.columns]))
    allowed = [a for a in all_choices(problem) if bounded.feasible(a)]
    if not allowed:
        with pytest.raises(Infeasible):
            solve(bounded, minimize=minimize)
        return
    found = solve(bounded, minimize=minimize)
    assert bounded.feasible(found.choice)
    assert found.status == "optimal"
    value, loss = min((bounded.value(minimize, a), bounded.value("loss", a)) for a in allowed)
    assert found.value(minimize) == (value if minimize != "loss" else pytest.approx(value, rel=2e-9, abs=0))
    assert found.loss == pytest.approx(loss, rel=2e-9, abs=0)
    assert minimize == "loss" or (found.bound, found.gap) == (value, 0.0)


@settings(max_examples=50, deadline=None)
@given(problems() | tied_problems(), st.data())
def test_the_next_answers_are_the_best_that_differ(problem: Problem, data: st.DataObject) -> None:
    units = data.draw(st.integers(1, len(problem.sizes)))
    least = data.draw(st.integers(1, units))
    minimize = data.draw(st.sampled_from(["loss", "latency"]))
    known = [tuple(data.draw(st.integers(-1, n - 1)) for n in problem.sizes[:units])]
    for _ in range(3):
        bounded = replace(problem, apart=tuple(Apart(k, least) for k in known))
        allowed = [
            a
            for a in all_choices(problem)
            if problem.feasible(a) and all(sum(x != y for x, y in zip(a, k, strict=False)) >= least for k in known)
        ]
        if not allowed:
            with pytest.raises(Infeasible):
                solve(bounded, minimize=minimize)
            return
        found = solve(bounded, minimize=minimize)
        assert found.choice in allowed
        best = min((problem.value(minimize, a), problem.total_loss(a)) for a in allowed)
        assert (found.value(minimize), found.loss) == pytest.approx(best, rel=1e-9, abs=0)
        known.append(found.choice[:units])


@settings(max_examples=60, deadline=None)
@given(problems() | tied_problems(), st.data())
def test_conflicting_bounds_are_named_with_the_least_of_each(problem: Problem, data: st.DataObject) -> None:
    """Each budget is one that some choice meets; where no choice meets all, the pair is named and what either leaves."""
    problem = with_peak(problem)
    consistent = [a for a in all_choices(problem) if problem.consistent(a)]
    budgets = {c: problem.value(c, data.draw(st.sampled_from(consistent))) for c in ("latency", "loss", MEMORY)}
    bounded = replace(problem, budgets=budgets)
    if any(map(bounded.feasible, consistent)):
        assert bounded.feasible(solve(bounded).choice)
        return
    with pytest.raises(Infeasible, match="though each can be met alone") as caught:
        solve(bounded)
    said = str(caught.value)
    pairs = 0
    for a, b in (("latency", "loss"), ("latency", MEMORY), ("loss", MEMORY)):
        pair = replace(problem, budgets={c: budgets[c] for c in (a, b)})
        conflict = not any(map(pair.feasible, consistent))
        pairs += conflict
        assert conflict == any(part.startswith(f"{a}=") and f" and {b}=" in part for part in said.split(": ", 1)[1].split("; "))
    assert ("no two of them conflict" in said) == (pairs == 0)
    for column in budgets:
        beside = replace(problem, budgets={c: limit for c, limit in budgets.items() if c != column})
        left = [problem.value(column, a) for a in consistent if beside.feasible(a)]
        alone = min(problem.value(column, a) for a in consistent)
        assert caught.value.least[column] == pytest.approx(min(left, default=alone), rel=1e-9, abs=0)


def test_a_choice_cannot_differ_in_more_variables_than_there_are() -> None:
    problem = Problem(("a", "b"), (("x", "y"),) * 2, (np.array([0.0, 1.0]),) * 2, {})
    with pytest.raises(InvalidInput, match="cannot differ in 3"):
        replace(problem, apart=(Apart((0, 0), 3),))

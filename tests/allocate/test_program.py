from __future__ import annotations

import math
import time

from hypothesis import given, settings
from problems import all_choices, problems
from tied import tied_problems

from hwsearch.allocate.problem import Problem
from hwsearch.allocate.program import Program


@settings(max_examples=50, deadline=None)
@given(problems() | tied_problems())
def test_no_answer_is_below_the_bounds_of_the_columns_it_holds(problem: Problem) -> None:
    """So that a core may leave out the columns whose bound is above an answer."""
    program = Program(problem, math.inf, problem.costs)
    loss = program.relaxed(program.loss())
    latency = program.relaxed(program.cost("latency"))
    for a in filter(problem.feasible, all_choices(problem)):
        columns = program.polytope.columns(a)
        assert loss.open(problem.total_loss(a))[columns].all()
        assert latency.open(problem.cost("latency", a))[columns].all()
        assert loss.bound <= problem.total_loss(a) + loss.round_off
        assert latency.bound <= problem.cost("latency", a) + latency.round_off


@settings(max_examples=30, deadline=None)
@given(tied_problems())
def test_struck_choices_are_not_chosen(problem: Problem) -> None:
    program = Program(problem, time.monotonic() + 60)
    first = program.minimise(program.loss(), problem.total_loss)
    if first is None:
        return
    column = program.polytope.columns(first.choice)[0]
    program.strike(program.upper * (range(len(program.upper)) != column) > 0)
    second = program.minimise(program.loss(), problem.total_loss)
    others = [problem.total_loss(a) for a in all_choices(problem)
              if problem.feasible(a) and a[0] != first.choice[0]]  # fmt: skip
    assert (second is None) == (not others)
    if second is not None:
        assert abs(second.value - min(others)) <= 1e-9 * abs(second.value)

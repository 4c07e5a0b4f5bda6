from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from oracles import brute_force
from problems import all_choices, problems
from tied import tied_problems

from hwsearch.allocate.polytope import Polytope
from hwsearch.allocate.problem import Cost, Problem, Tie, relative_gap
from hwsearch.errors import InvalidInput

TWO = Problem(
    ("a", "b"),
    (("x", "y"), ("x", "y", "z")),
    (np.array([0.0, 1.0]), np.array([0.0, 0.5, 2.0])),
    {
        "latency": Cost(
            7, (np.array([10, 3]), np.array([9, 6, 1])), {(0, 1): np.array([[0, 4, 4], [5, -2, 0]])}
        )
    },
    {"latency": 16},
)


def test_cost_loss_and_variants_of_a_choice() -> None:
    assert TWO.cost("latency", (1, 1)) == 7 + 3 + 6 - 2
    assert TWO.total_loss((1, 2)) == 3.0
    assert TWO.variants((1, 2)) == {"a": "y", "b": "z"}
    assert TWO.feasible((1, 1))
    assert not TWO.feasible((0, 0))


def test_a_tie_must_hold_besides_the_budgets() -> None:
    tied = replace(TWO, ties=(Tie(1, 0, np.array([1, 0, 0])),))
    assert [a for a in all_choices(tied) if tied.consistent(a)] == [(0, 1), (0, 2), (1, 0)]
    assert not tied.feasible((1, 1))  # within budget
    assert not tied.feasible((0, 1))  # agrees
    assert not any(map(tied.feasible, all_choices(tied)))
    found = brute_force(replace(tied, budgets={"latency": 25}))
    assert found is not None
    assert found.choice == (1, 0)


def test_brute_force_by_hand() -> None:
    found = brute_force(TWO)
    assert found is not None
    assert (found.choice, found.loss, found.costs) == ((1, 1), 1.5, {"latency": 14})
    assert brute_force(replace(TWO, budgets={"latency": 10})) is None


def test_total_loss_does_not_depend_on_order() -> None:
    values = [1e-9, 10.0, 0.1, 0.2, 3e-7]
    totals = {
        Problem(tuple("abcde"), (("x",),) * 5, tuple(np.array([v]) for v in order), {}).total_loss((0,) * 5)
        for order in (values, values[::-1], sorted(values))
    }
    assert len(totals) == 1


def test_gap_is_finite() -> None:
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(1e-9, 0.0) == 1.0
    assert relative_gap(2.0, 1.5) == 0.25
    assert relative_gap(1.0, 1.0 + 1e-16) == 0.0


def _cost(**changes: Any) -> dict[str, Cost]:
    return {"latency": replace(TWO.costs["latency"], **changes)}


def _tie(i: int, j: int, of: list[Any]) -> dict[str, Any]:
    return {"ties": (Tie(i, j, np.array(of)),)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: {"loss": (np.array([0.0, 1.0]),)}, "loss: expected one array for each variable"),
        (lambda: {"loss": (np.array([0.0, np.nan]), TWO.loss[1])}, "loss of variable 0: expected finite"),
        (lambda: {"loss": (np.array([0.0, np.inf]), TWO.loss[1])}, "expected finite"),
        (lambda: {"variables": ("a",)}, "1 variables but choices for 2"),
        (lambda: {"choices": (("x", "y"), ())}, "each with a choice"),
        (lambda: {"variables": (), "choices": (), "loss": ()}, "each with a choice"),
        (lambda: {"budgets": {"size": 3}}, r"budgets on \['size'\]"),
        (
            lambda: {"costs": _cost(unary=(np.array([1, 2]),))},
            "latency: expected one array for each variable",
        ),
        (lambda: {"costs": _cost(unary=(np.array([1.0, 2.0]), np.array([1.0, 2, 3])))}, "signedinteger"),
        (lambda: {"costs": _cost(pairwise={(1, 0): np.zeros((3, 2), int)})}, "not i < j"),
        (lambda: {"costs": _cost(pairwise={(0, 2): np.zeros((2, 2), int)})}, "not i < j"),
        (
            lambda: {"costs": _cost(pairwise={(0, 1): np.zeros((3, 2), int)})},
            r"expected integers of shape \(2, 3\)",
        ),
        (lambda: {"costs": _cost(pairwise={(0, 1): np.zeros((2, 3))})}, "expected integers"),
        (lambda: {"costs": _cost(fixed=2**53)}, "use a coarser unit"),
        (lambda: _tie(0, 2, [0, 0]), "a tie of 0 to 2 is not between two of 2 variables"),
        (lambda: _tie(-1, 0, [0, 0]), "not between two"),
        (lambda: _tie(1, 1, [0, 1, 2]), "not between two"),
        (lambda: _tie(0, 1, [0, 0, 0]), r"tie of 0 to 1: expected 2 integers.*got int64 \(3,\)"),
        (lambda: _tie(0, 1, [[0, 0]]), "expected 2 integers"),
        (lambda: _tie(0, 1, [0.0, 1.0]), "expected 2 integers.*got float64"),
        (lambda: _tie(0, 1, [0, -1]), r"choices \[1\] of 0 require \[-1\], but 1 has choices 0 to 2"),
        (lambda: _tie(0, 1, [3, 0]), r"choices \[0\] of 0 require \[3\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: Callable[[], dict[str, Any]], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        replace(TWO, **change())


@settings(max_examples=80, deadline=None)
@given(problems(budgets=False) | tied_problems(budgets=False))
def test_the_polytope_costs_what_the_problem_costs(problem: Problem) -> None:
    """At the point of every choice: marginals hold, ties just if they do, and the linear function is the cost."""
    polytope = Polytope(problem, problem.costs)
    starts = polytope.starts[len(problem.sizes) :]
    for choice in list(all_choices(problem))[::7]:
        x = np.zeros(polytope.count, np.int64)
        x[polytope.columns(choice)] = 1
        for p, start in zip(polytope.pairs, starts, strict=False):
            x[start + p.class_i[choice[p.i]] * len(p.first_j) + p.class_j[choice[p.j]]] = 1
        assert np.array_equal(polytope.matrix @ x, polytope.right) == problem.consistent(choice)
        assert polytope.decode(x) == choice
        for column, cost in problem.costs.items():
            linear = polytope.linear(cost.unary, cost)
            assert linear.constant + int(linear.coefficients @ x) == problem.cost(column, choice)
            assert linear.coefficients.min() >= 0
            assert problem.cost(column, choice) <= polytope.largest(linear)


def test_choices_that_a_matrix_cannot_tell_apart_share_a_class() -> None:
    matrix = np.array([[0, 4], [9, 1]])[np.ix_([0, 0, 1, 1], [0, 1, 0])]
    matrix = matrix + np.array([[0], [5], [0], [7]])  # a unary part does not count
    problem = Problem(
        ("a", "b"), (tuple("wxyz"), tuple("xyz")), (np.zeros(4), np.zeros(3)),
        {"latency": Cost(0, (np.zeros(4, int), np.zeros(3, int)), {(0, 1): matrix})},
    )  # fmt: skip
    (pair,) = Polytope(problem, ["latency"]).pairs
    assert pair.class_i.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert pair.class_j.tolist() in ([0, 1, 0], [1, 0, 1])
    additive = {(0, 1): np.arange(4)[:, None] + np.arange(3)}
    assert Polytope(replace(problem, costs={"latency": replace(problem.costs["latency"], pairwise=additive)}),
                    ["latency"]).pairs == []  # fmt: skip

"""A problem as a mixed-integer program, solved by HiGHS through scipy and checked in integers.

HiGHS works in floats: a row may be violated by 1e-6, an integer column may be off by 1e-6, an objective is optimal
within 1e-6. On costs in ns or bytes that lets answers through that are over budget. So
- a budget row of large integers is split into digits with integer carries, exactly as in long addition: every row
  then has coefficients below 2**15, is given half a unit to spare, and is missed by a whole one if missed;
- the objective is scaled to 1e6, and again once the choices that no optimum can hold were struck out;
- an answer is recomputed in integers; one over budget is cut off and the rest solved again, so none is returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, vstack

from hwsearch.allocate.polytope import Ints, Linear, Polytope, Vector
from hwsearch.allocate.problem import Choice, Problem
from hwsearch.errors import HwsearchError

TOP = 15
"""Bits of the largest coefficients of a budget row; larger ones are split into digits."""

DIGIT = 12
"""Bits of a lower digit."""

_SPAN = 1e6
"""Largest coefficient of a scaled objective: HiGHS's absolute gap of 1e-6 is then 1e-12 of the largest loss."""

_ROUND_OFF = 1e-12
_INFEASIBLE, _OTHER = 2, 4  # of scipy.optimize.milp


class OutOfTime(HwsearchError):
    """Time ran out before any allocation was found."""


@dataclass(frozen=True)
class Found:
    """A choice, the objective's value there, and a value that nothing allowed is below."""

    choice: Choice
    value: float
    bound: float
    proven: bool


class Program:
    """The polytope of a problem with its budgets as rows over columns and carries.

    columns: costs that objectives will use besides the budgeted ones. deadline: on `time.monotonic`.
    nodes: of branch and bound, at most.
    """

    def __init__(
        self, problem: Problem, deadline: float, columns: Iterable[str] = (), nodes: int = 2**31 - 1
    ) -> None:
        self.problem, self.deadline, self.nodes = problem, deadline, nodes
        self.polytope = Polytope(problem, {*problem.budgets, *columns})
        self.upper = np.ones(self.polytope.count)
        self.carries = 0
        self.rows: list[tuple[Vector, dict[int, float], float]] = []
        self.possible = all(self._bound(column, limit) for column, limit in problem.budgets.items())

    def loss(self) -> Linear:
        """The problem's loss as an objective."""
        return self.polytope.linear(self.problem.loss)

    def cost(self, column: str) -> Linear:
        """One of its costs as an objective."""
        cost = self.problem.costs[column]
        return self.polytope.linear(cost.unary, cost)

    def allowed(self, objective: Linear, value: float) -> NDArray[np.bool_]:
        """For each column, whether a point of at most this value may hold it."""
        margin = _ROUND_OFF * (abs(value) + abs(objective.constant))
        struck = objective.coefficients > value - objective.constant + margin
        return (self.upper > 0) & ~struck

    def at_most(self, objective: Linear, value: float) -> None:
        """Bound an objective, within 1e-11 of its room."""
        self.upper[~self.allowed(objective, value)] = 0
        room = value - objective.constant
        if room > 0:
            scale = _SPAN / room
            self.rows.append(
                (np.where(self.upper > 0, objective.coefficients, 0) * scale, {}, _SPAN * (1 + 1e-11))
            )

    def minimise(
        self,
        objective: Linear,
        value: Callable[[Choice], float],
        best: Choice | None = None,
        accept: Callable[[Choice], bool] | None = None,
    ) -> Found | None:
        """The least of a shifted objective, or None where nothing is allowed.

        value: the objective, exactly. best: a feasible choice. accept: exact feasibility, by default of the budgets.
        Raises OutOfTime if the deadline came before a first choice.
        """
        accept = accept or self.problem.feasible
        cuts: list[Ints] = []
        bound, allowed = objective.constant, self.upper > 0
        while self.possible:
            if best is not None:
                allowed = self.allowed(objective, value(best))
            span = _span(objective, allowed)
            scale = _SPAN / span if span else 1.0
            result = self._highs(objective.coefficients * scale, allowed, cuts)
            if result is None or result.x is None:
                if result is not None and result.status == _INFEASIBLE and best is None:
                    return None
                if best is None:
                    raise OutOfTime(
                        "no allocation was found in the time allowed; allow more, or loosen a budget"
                    )
                return Found(best, value(best), bound, value(best) <= bound)
            if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
                bound = max(bound, objective.constant + result.mip_dual_bound / scale)
            choice = self.polytope.decode(result.x)
            if not accept(choice):
                cuts.append(self.polytope.columns(choice))
                continue
            if best is None or value(choice) < value(best):
                best = choice
            done = result.status == 0
            narrower = _span(objective, self.allowed(objective, value(best)))
            if not (done and 0 < narrower < 1e-3 * span):
                return _found(best, value(best), bound, done)
        return None

    def _bound(self, column: str, limit: int) -> bool:
        """Add a budget's rows; False where it cannot be met."""
        cost = self.cost(column)
        room = int(limit - cost.constant)
        if room < 0:
            return False
        if self.polytope.largest(cost) > limit:
            self.upper[cost.coefficients > room] = 0
            coefficients = np.where(cost.coefficients > room, 0, cost.coefficients)
            divisor = int(np.gcd.reduce(coefficients)) or 1
            self._digits(coefficients // divisor, room // divisor)
        return True

    def _digits(self, coefficients: Ints, room: int) -> None:
        """coefficients @ x <= room, digit by digit: a carry is at least what a digit has over its bound."""
        base = 1 << DIGIT
        carry: dict[int, float] = {}
        while coefficients.max() >= 1 << TOP:
            self.rows.append((coefficients % base, {**carry, self.carries: -float(base)}, room % base + 0.5))
            carry = {self.carries: 1.0}
            self.carries += 1
            coefficients, room = coefficients // base, room // base
        self.rows.append((coefficients, carry, room + 0.5))

    def _highs(
        self, objective: Vector, allowed: NDArray[np.bool_], cuts: list[Ints]
    ) -> OptimizeResult | None:
        """One run of HiGHS on columns and carries; None if no time is left."""
        p, extra = self.polytope, self.carries
        left = self.deadline - time.monotonic()
        if left <= 0:
            return None
        dense = np.zeros((len(self.rows) + len(cuts), p.count + extra))
        right = np.array([r for _, _, r in self.rows] + [len(c) - 0.5 for c in cuts])
        for row, (coefficients, carries, _) in zip(dense, self.rows, strict=False):
            row[: p.count] = coefficients
            row[[p.count + k for k in carries]] = list(carries.values())
        for row, columns in zip(dense[len(self.rows) :], cuts, strict=True):
            row[columns] = 1
        equal = csr_array(
            (p.matrix.data, p.matrix.indices, p.matrix.indptr), shape=(len(p.right), p.count + extra)
        )
        matrix = vstack([equal, csr_array(dense)], format="csr")
        lower = np.concatenate([p.right, np.full(len(right), -np.inf)])
        integral = np.zeros(p.count + extra, np.int8)
        integral[: p.units] = integral[p.count :] = 1
        for presolve in (True, False):  # presolve may stop at "infeasible or unbounded", which says neither
            result = milp(
                np.concatenate([objective, np.zeros(extra)]),
                integrality=integral,
                bounds=Bounds(
                    0, np.concatenate([allowed.astype(float), np.full(extra, float(len(p.widths)))])
                ),
                constraints=LinearConstraint(matrix, lower, np.concatenate([p.right, right])),
                options={
                    "mip_rel_gap": 0.0,
                    "time_limit": left,
                    "presolve": presolve,
                    "node_limit": self.nodes,
                },
            )
            if result.status != _OTHER:
                break
        return result


def _span(objective: Linear, allowed: NDArray[np.bool_]) -> float:
    return float(objective.coefficients[allowed].max(initial=0))


def _found(choice: Choice, value: float, bound: float, proven: bool) -> Found:
    if value - bound <= _ROUND_OFF * abs(value):
        bound = value
    return Found(choice, value, bound, proven)

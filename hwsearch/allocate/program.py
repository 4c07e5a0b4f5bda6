"""A problem as a mixed-integer program, solved by HiGHS through scipy and checked in integers.

HiGHS works in floats: a row may be violated by 1e-6, an integer column may be off by 1e-6, an objective is optimal
within 1e-6. On costs in ns or bytes that lets answers through that are over budget. So
- a budget row of large integers is split into digits with integer carries, exactly as in long addition: every row
  then has coefficients below 2**15, is given half a unit to spare, and is missed by a whole one if missed;
- the objective is scaled to 1e6, and again once the choices that no optimum can hold were struck out;
- an answer is recomputed in integers; one over budget is cut off and the rest solved again, so none is returned.

With ties a network has thousands of columns, of which an optimum could hold few. The linear relaxation gives a bound
and, for each column, how far above it any answer that holds the column must be. So the program is solved on a core
of the cheapest columns, which grows until the answer is below whatever was left out (Balas and Zemel, 1980).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array, vstack

from hwsearch.allocate.budget import LOSS
from hwsearch.allocate.polytope import Ints, Linear, Polytope, Vector
from hwsearch.allocate.problem import Apart, Choice, Cost, Problem
from hwsearch.errors import HwsearchError
from hwsearch.progress import stdout_kept

TOP = 15
"""Bits of the largest coefficients of a budget row; larger ones are split into digits."""

DIGIT = 12
"""Bits of a lower digit."""

_SPAN = 1e6
"""Largest coefficient of a scaled objective: HiGHS's absolute gap of 1e-6 is then 1e-12 of the largest loss."""

CORE = 8
"""Columns in the first core, for each variable; every further core has twice as many."""

LOWERED = (0.01, 0.05, 0.2)
"""Shares of the room of all budgets by which they are lowered to find a first choice."""

_ROUND_OFF = 1e-12
_INFEASIBLE, _OTHER = 2, 4  # of scipy.optimize.milp


class OutOfTime(HwsearchError):
    """Time ran out before any allocation was found."""


@dataclass(frozen=True)
class Incumbent:
    """A choice, the objective's value there, and a value that nothing allowed is below."""

    choice: Choice
    value: float
    bound: float
    proven: bool
    relaxed: Relaxed


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation: no answer is below `bound`, none that holds a column below `bound + above[column]`.

    bound: infinite where nothing is allowed. round_off: of both. choice: the nearest to its solution.
    """

    bound: float
    above: Vector
    round_off: float
    choice: Choice | None = None

    def open(self, value: float) -> NDArray[np.bool_]:
        """For each column, whether an answer of at most this value may hold it."""
        mask: NDArray[np.bool_] = self.above <= value - self.bound + self.round_off
        return mask


class Program:
    """The polytope of a problem with its budgets as rows over columns and carries.

    columns: costs that objectives will use besides the budgeted ones. deadline: on `time.monotonic`.
    nodes: of branch and bound, at most.
    """

    def __init__(
        self, problem: Problem, deadline: float, columns: Iterable[str] = (), nodes: int = 2**31 - 1
    ) -> None:
        self.problem, self.deadline, self.nodes = problem, deadline, nodes
        self.polytope = Polytope(problem, {*problem.budgets, *columns} - {LOSS})
        self.upper = np.ones(self.polytope.count)
        self.carries = 0
        self.rows: list[tuple[Vector, dict[int, float], float]] = []
        self.limits: list[tuple[Vector, float]] = []
        self.possible = all(
            self._bound(part, int(limit))
            for column, limit in problem.budgets.items()
            if column != LOSS
            for part in problem.parts(column)
        )
        for other in problem.apart:
            self._differ(other)
        if LOSS in problem.budgets:
            self.at_most(self.loss(), problem.correction.total(problem.budgets[LOSS]))

    def loss(self) -> Linear:
        """The problem's loss as an objective."""
        return self.polytope.linear(self.problem.loss)

    def cost(self, column: str) -> Linear:
        """One of its costs, which is not a peak, as an objective."""
        return self._linear(self.problem.costs[column])

    def _linear(self, cost: Cost) -> Linear:
        return self.polytope.linear(cost.unary, cost)

    def allowed(self, objective: Linear, value: float) -> NDArray[np.bool_]:
        """For each column, whether a point of at most this value may hold it."""
        margin = _ROUND_OFF * (abs(value) + abs(objective.constant))
        struck = objective.coefficients > value - objective.constant + margin
        return (self.upper > 0) & ~struck

    def at_most(self, objective: Linear, value: float) -> None:
        """Bound an objective, within 1e-11 of its room and 1e-12 of the whole."""
        self.strike(self.allowed(objective, value))
        room = value - objective.constant + _ROUND_OFF * (abs(value) + abs(objective.constant))
        if room > 0:
            coefficients, scale = np.where(self.upper > 0, objective.coefficients, 0), _SPAN / room
            self.limits.append((coefficients, room * (1 + 1e-11)))
            self.rows.append((coefficients * scale, {}, _SPAN * (1 + 1e-11)))

    def _differ(self, other: Apart) -> None:
        """Allow of the choices of a known answer only so many that enough variables choose otherwise."""
        same = np.zeros(self.polytope.count, np.int64)
        same[[s + a for s, a in zip(self.polytope.starts, other.known, strict=False) if a >= 0]] = 1
        room = len(other.known) - other.least
        self.limits.append((same, room))
        self.rows.append((same, {}, room + 0.5))

    def strike(self, kept: NDArray[np.bool_]) -> None:
        """Allow only choices whose column is kept."""
        p, n = self.polytope, len(self.polytope.sizes)
        self.upper[: p.units][~kept[: p.units]] = 0
        self.possible &= bool(np.maximum.reduceat(self.upper[: p.units], p.starts[:n]).all())

    def relaxed(self, objective: Linear) -> Relaxed:
        """The bounds that the linear program over the local polytope gives for a shifted objective."""
        constant, span = objective.constant, _span(objective, self.upper > 0) or 1.0
        above = np.where(self.upper > 0, objective.coefficients, np.inf)
        unknown = Relaxed(constant, above, _ROUND_OFF * (abs(constant) + span))
        left = self.deadline - time.monotonic()
        if not self.possible:
            return replace(unknown, bound=math.inf)
        if left <= 0:
            return unknown
        dual = self._dual(objective.coefficients / span, left)
        if dual is None:
            return replace(unknown, bound=math.inf) if self._dual(None, left) else unknown
        if dual.bound < -dual.round_off:
            return unknown
        bound = constant + span * max(0.0, dual.bound)
        return Relaxed(bound, span * dual.above, unknown.round_off + span * dual.round_off, dual.choice)

    def _dual(self, goal: Vector | None, left: float, lowered: float = 0.0) -> Relaxed | None:
        """The Lagrangian dual of budgets, ties and marginals, or None if the linear program has no solution.

        It is taken at the linear program's multipliers (Geoffrion, 1974): with any multipliers the least value by
        blocks is a bound, so tolerances of the linear program do not touch it. Without a goal, the least by which
        budgets must be exceeded: None where that is not above 0, and else a proof that nothing is allowed. lowered: by
        this share of their room; what comes out says nothing of the budgets themselves then.
        """
        p, elastic = self.polytope, goal is None
        scales = [max(float(c.max()), 1.0) for c, _ in self.limits]
        costs = np.array([c / s for (c, _), s in zip(self.limits, scales, strict=True)]).reshape(-1, p.count)
        rooms = (1.0 - lowered) * np.array([room / s for (_, room), s in zip(self.limits, scales, strict=True)])
        coefficients = np.zeros(p.count) if goal is None else goal
        rows: Any = np.hstack([costs, np.full((len(rooms), 1), -float(elastic))])
        matrix: Any = p.wider(1)  # sparse, which scipy's stubs do not know of
        bounds: Any = np.stack([np.zeros(p.count + 1), np.append(self.upper, np.inf if elastic else 0)], 1)
        options: Any = {"time_limit": left}
        objective = np.append(coefficients, float(elastic))
        result = linprog(objective, rows, rooms, matrix, p.right, bounds, "highs", options=options)
        if result.status != 0 or result.x is None:
            return None
        n = len(p.sizes)
        prices = np.maximum(-result.ineqlin.marginals, 0)
        reduced = coefficients - p.matrix[n:].T @ result.eqlin.marginals[n:] + prices @ costs
        reduced[self.upper == 0] = np.inf
        least = np.minimum.reduceat(reduced, p.starts[:-1])
        dual = float(least.sum() - prices @ rooms)
        round_off = _ROUND_OFF * float(np.abs(least).sum() + np.abs(prices * rooms).sum())
        if not np.isfinite(dual) or (elastic and dual <= round_off):
            return None
        return Relaxed(dual, reduced - np.repeat(least, p.widths), round_off, p.rounded(result.x))

    def minimise(
        self,
        objective: Linear,
        value: Callable[[Choice], float],
        best: Choice | None = None,
        accept: Callable[[Choice], bool] | None = None,
    ) -> Incumbent | None:
        """The least of a shifted objective, or None where nothing is allowed.

        value: the objective, exactly. best: a feasible choice. accept: exact feasibility, by default the problem's.
        Raises OutOfTime if the deadline came before a first choice.
        """
        if not self.possible:
            return None
        accept = accept or self.problem.feasible
        relaxed = self.relaxed(objective)
        if math.isinf(relaxed.bound):
            return None
        rounded = relaxed.choice if best is not None else self._rounded(objective, relaxed, accept)
        if rounded and accept(rounded) and (best is None or value(rounded) < value(best)):
            best = rounded
        above = np.sort(relaxed.above[: self.polytope.units])
        size = CORE * len(self.polytope.sizes)
        while True:
            most = math.inf if best is None else value(best)
            last = size >= len(above) or relaxed.bound + float(above[size]) >= most
            reach = most if last else relaxed.bound + float(above[size])
            core = (self.upper > 0) & relaxed.open(reach)
            found = self._search(objective, value, best, accept, core, relaxed)
            if found is not None and (last or not found.proven or found.value <= reach):
                return replace(found, bound=min(found.bound, max(reach, relaxed.bound)))
            if found is None and last:
                return None
            best = best if found is None else found.choice
            size *= 2

    def _rounded(self, objective: Linear, relaxed: Relaxed, accept: Callable[[Choice], bool]) -> Choice | None:
        """A first choice that is allowed, near to the solution of the linear program; None where none is found.

        Rounded, that is often a little over a budget, so that budgets are lowered until what is rounded is not.
        """
        if relaxed.choice is not None and accept(relaxed.choice):
            return relaxed.choice
        span = _span(objective, self.upper > 0) or 1.0
        for part in LOWERED:
            left = self.deadline - time.monotonic()
            found = self._dual(objective.coefficients / span, left, part) if left > 0 else None
            if found is None:
                return None
            if found.choice is not None and accept(found.choice):
                return found.choice
        return None

    def _search(
        self,
        objective: Linear,
        value: Callable[[Choice], float],
        best: Choice | None,
        accept: Callable[[Choice], bool],
        core: NDArray[np.bool_],
        relaxed: Relaxed,
    ) -> Incumbent | None:
        """`minimise` on a core of the columns; what it proves is of the core."""
        cuts: list[Ints] = []
        bound, allowed = relaxed.bound, core
        while True:
            if best is not None:
                allowed = core & self.allowed(objective, value(best))
            span = _span(objective, allowed)
            scale = _SPAN / span if span else 1.0
            result = self._highs(objective.coefficients * scale, allowed, cuts)
            if result is None or result.x is None:
                infeasible = result is not None and result.status == _INFEASIBLE
                if best is None and infeasible:
                    return None
                if best is None:
                    raise OutOfTime(
                        "no allocation was found in the time allowed; allow more, or loosen a budget"
                    )
                outside = infeasible and not core[self.polytope.columns(best)].all()
                return _incumbent(best, value(best), value(best) if outside else bound, False, relaxed)
            if result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
                bound = max(bound, objective.constant + result.mip_dual_bound / scale)
            choice = self.polytope.decode(result.x)
            if not accept(choice):
                cuts.append(self.polytope.columns(choice))
                continue
            if best is None or value(choice) < value(best):
                best = choice
            done = result.status == 0
            narrower = _span(objective, core & self.allowed(objective, value(best)))
            if not (done and 0 < narrower < 1e-3 * span):
                return _incumbent(best, value(best), bound, done, relaxed)

    def _bound(self, bounded: Cost, limit: int) -> bool:
        """Add the rows of a cost's bound; False where it cannot be met."""
        cost = self._linear(bounded)
        room = int(limit - cost.constant)
        if room < 0:
            return False
        if self.polytope.largest(cost) > limit:
            self.upper[cost.coefficients > room] = 0
            coefficients = np.where(cost.coefficients > room, 0, cost.coefficients)
            divisor = int(np.gcd.reduce(coefficients)) or 1
            self.limits.append((coefficients, room))
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
        matrix = vstack([p.wider(extra), csr_array(dense)], format="csr")
        lower = np.concatenate([p.right, np.full(len(right), -np.inf)])
        integral = np.zeros(p.count + extra, np.int8)
        integral[: p.units] = integral[p.count :] = 1
        for presolve in (True, False):  # presolve may stop at "infeasible or unbounded", which says neither
            with stdout_kept():  # HiGHS now and then prints a line of its own debugging
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


def _incumbent(choice: Choice, value: float, bound: float, done: bool, relaxed: Relaxed) -> Incumbent:
    if value - bound <= _ROUND_OFF * abs(value):
        bound = value
    return Incumbent(choice, value, bound, done or value <= bound, relaxed)

"""Lower bounds and the convex hull of the front, both from prices on costs instead of bounds on them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import linprog

from hwsearch.allocate.milp import TIME_LIMIT_S, as_solution, minimise, solve
from hwsearch.allocate.polytope import Linear, Polytope
from hwsearch.allocate.problem import Problem, Solution
from hwsearch.allocate.program import Program


def lower_bound(problem: Problem) -> float:
    """No allocation within the budgets has less loss than this; infinite where the relaxation is infeasible.

    The Lagrangian dual of the budgets and of the marginals of the pairs, at the multipliers that the linear program
    over the local polytope gives (Geoffrion, 1974): with those any least value by blocks is a bound, however far the
    multipliers are from optimal, so tolerances of the linear program do not touch it.
    """
    polytope = Polytope(problem, problem.budgets)
    loss = polytope.linear(problem.loss)
    rows, rooms = [], []
    for column, limit in problem.budgets.items():
        cost = polytope.linear(problem.costs[column].unary, problem.costs[column])
        if cost.constant > limit:
            return math.inf
        scale = float(max(cost.coefficients.max(), 1))
        rows.append(cost.coefficients / scale)
        rooms.append((limit - cost.constant) / scale)
    span = float(loss.coefficients.max())
    if not rows or span == 0:
        return loss.constant
    costs, room, n = np.array(rows), np.array(rooms), len(polytope.sizes)
    matrix: Any = polytope.matrix  # sparse, which scipy's stubs do not know of
    result = linprog(loss.coefficients / span, costs, room, matrix, polytope.right, (0, 1), "highs")
    if result.status == 2:
        return math.inf
    if result.status != 0:
        return loss.constant
    prices = np.maximum(-result.ineqlin.marginals, 0)
    marginals = polytope.matrix[n:].T @ result.eqlin.marginals[n:]
    reduced = loss.coefficients / span - marginals + prices @ costs
    least = np.minimum.reduceat(reduced, polytope.starts[:-1]).sum() - prices @ room
    return loss.constant + max(0.0, span * float(least))


def hull(
    problem: Problem, column: str, *, most: int = 64, time_limit_s: float = TIME_LIMIT_S
) -> list[Solution]:
    """Corners of the lower convex hull of (cost, loss), by rising cost; budgets on other columns hold throughout.

    Between two corners the one that lies furthest below their chord is a corner too: the least of
    loss + price * cost, price being the chord's slope (Aneja and Nair, 1979). The segments that could hide most come
    first, until there are `most` corners or time is up. Each corner has the least loss of all choices of no more cost.
    """
    deadline = time.monotonic() + time_limit_s
    free = replace(problem, budgets={c: limit for c, limit in problem.budgets.items() if c != column})
    least = minimise(free, column, time_limit_s=time_limit_s).costs[column]
    first = solve(
        replace(free, budgets={**free.budgets, column: least}), prefer=column, time_limit_s=time_limit_s
    )
    last = solve(free, prefer=column, time_limit_s=time_limit_s)
    corners = (
        [first, last] if first.loss > last.loss and first.costs[column] < last.costs[column] else [first]
    )
    program = Program(free, deadline, [column])
    done: set[tuple[int, int]] = set()
    while len(corners) < most and time.monotonic() < deadline:
        open_ = [(a, b) for a, b in pairwise(corners) if (a.costs[column], b.costs[column]) not in done]
        if not open_:
            break
        a, b = max(open_, key=lambda s: (s[0].loss - s[1].loss) * (s[1].costs[column] - s[0].costs[column]))
        found = _below(program, column, a, b)
        if found is None:
            done.add((a.costs[column], b.costs[column]))
        else:
            corners = sorted([*corners, found], key=lambda s: s.costs[column])
    return corners


def _below(program: Program, column: str, a: Solution, b: Solution) -> Solution | None:
    """The choice furthest below the chord from a to b, or None if there is none."""
    problem = program.problem
    price = (a.loss - b.loss) / (b.costs[column] - a.costs[column])
    loss, cost = program.loss(), program.cost(column)
    priced = Linear(loss.constant + price * cost.constant, loss.coefficients + price * cost.coefficients)

    def value(choice: Sequence[int]) -> float:
        return problem.total_loss(choice) + price * problem.cost(column, choice)

    found = program.minimise(program.polytope.shifted(priced), value, a.choice)
    if found is None or found.value >= value(a.choice) - 1e-9 * (a.loss - b.loss):
        return None
    own = problem.total_loss(found.choice)
    bound = own if found.proven else found.bound - price * problem.cost(column, found.choice)
    return as_solution(problem, replace(found, value=own, bound=bound))

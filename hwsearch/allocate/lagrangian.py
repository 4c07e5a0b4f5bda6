"""Lower bounds and the convex hull of the front, both from prices on costs instead of bounds on them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from hwsearch.allocate.milp import TIME_LIMIT_S, as_solution, minimise, solve
from hwsearch.allocate.polytope import Linear
from hwsearch.allocate.problem import Problem, Solution
from hwsearch.allocate.program import Program
from hwsearch.errors import InvalidInput


def lower_bound(problem: Problem) -> float:
    """No allocation within the budgets has less loss than this; infinite where none exists for certain.

    From the linear program over the local polytope, in milliseconds.
    """
    program = Program(problem, math.inf)
    return program.relaxed(program.loss()).bound


def hull(
    problem: Problem, column: str, *, most: int = 64, time_limit_s: float = TIME_LIMIT_S
) -> list[Solution]:
    """Corners of the lower convex hull of (cost, loss), by rising cost; budgets on other columns hold throughout.

    Between two corners the one that lies furthest below their chord is a corner too: the least of
    loss + price * cost, price being the chord's slope (Aneja and Nair, 1979). The segments that could hide most come
    first, until there are `most` corners or time is up. Each corner has the least loss of all choices of no more cost.
    """
    if column in problem.peaks:
        raise InvalidInput(f"{column} is a peak, which has no price; sweep it instead")
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

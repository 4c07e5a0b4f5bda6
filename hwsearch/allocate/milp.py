"""Exact allocation: the least loss or the least cost within all budgets, and what to say when there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hwsearch.allocate.budget import LOSS, attainable, quantity
from hwsearch.allocate.problem import LARGEST, Choice, Problem, Solution, relative_gap
from hwsearch.allocate.program import Incumbent, OutOfTime, Program
from hwsearch.errors import Infeasible

TIME_LIMIT_S = 60.0
TIE_NODES = 1000


def solve(
    problem: Problem,
    *,
    minimize: str = LOSS,
    time_limit_s: float = TIME_LIMIT_S,
    warm: Sequence[int] | None = None,
    prefer: str | None = None,
) -> Solution:
    """The choice of least loss within all budgets; among equal losses, the one of least cost `prefer`.

    With another column to `minimize`, the choice of least cost there; among equal costs, the one of least loss.
    Budgets hold exactly, in integers; the loss is the least within 1e-9 of it, HiGHS being in floats.
    warm: a choice that may be good; it bounds the search, and is the answer if time runs out before a better one.
    prefer: by default the first budgeted column; a peak breaks no ties. Ties cost a second program, so they are looked
    for only where two choices of a variable, or of two variables, differ by the same loss.
    Raises Infeasible (naming the least of each budgeted cost), HwsearchError if time ran out without an answer.
    """
    found = _best(problem, minimize, time_limit_s, warm, prefer)
    if found is None:
        raise infeasible(problem, time_limit_s)
    return found


def _best(
    problem: Problem, minimize: str, time_limit_s: float, warm: Sequence[int] | None = None, prefer: str | None = None
) -> Solution | None:
    """As `solve`; None where nothing meets the budgets."""
    if minimize != LOSS:
        least = _least(problem, minimize, time_limit_s)
        if least is None:
            return None
        within = replace(problem, budgets={**problem.budgets, minimize: least.costs[minimize]})
        found = solve(within, time_limit_s=time_limit_s, warm=least.choice)
        status = least.status if found.status == "optimal" else found.status
        return replace(found, status=status, gap=least.gap, bound=least.bound)
    start = time.monotonic()
    program = Program(problem, start + time_limit_s)
    best = tuple(map(int, warm)) if warm is not None and problem.feasible(warm) else None
    incumbent = program.minimise(program.loss(), problem.total_loss, best)
    if incumbent is None:
        return None
    prefer = prefer or next((c for c in problem.budgets if c != LOSS), None)
    if (
        prefer is not None
        and prefer in problem.costs
        and incumbent.proven
        and _may_tie(problem, incumbent.relaxed.open(incumbent.value))
    ):
        incumbent = _cheapest(problem, incumbent, prefer, start + time_limit_s)
    predicted = problem.correction.loss
    return as_solution(problem, replace(incumbent, value=predicted(incumbent.value), bound=predicted(incumbent.bound)))


def minimise(
    problem: Problem,
    column: str,
    *,
    budgets: Mapping[str, float] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> Solution:
    """The choice of least cost in one column within `budgets`, by default the problem's own on the other columns.

    `gap` and `bound` are of that cost. Raises Infeasible and HwsearchError as `solve` does.
    """
    if budgets is None:
        budgets = {c: limit for c, limit in problem.budgets.items() if c != column}
    bounded = replace(problem, budgets=dict(budgets))
    least = _least(bounded, column, time_limit_s)
    if least is None:
        raise infeasible(bounded, time_limit_s)
    return least


def infeasible(problem: Problem, time_limit_s: float = TIME_LIMIT_S) -> Infeasible:
    """The error that names, for each budget, the least that can be met beside the others or, failing that, alone.

    Where each can be met alone, it names these and the pairs that conflict.
    """
    budgets = problem.budgets
    if not budgets:
        return _untied()

    def least_within(column: str, others: Mapping[str, float]) -> Solution | None:
        return _least(replace(problem, budgets=others), column, time_limit_s)

    alone, beside = {}, {}
    for column in budgets:
        found = least_within(column, {})
        if found is None:
            return _untied()
        others = {c: limit for c, limit in budgets.items() if c != column}
        alone[column], beside[column] = found, least_within(column, others) if others else found
    parts, least = [], {}
    for column, found in beside.items():
        others = {c: limit for c, limit in budgets.items() if c != column}
        where = " even without the other budgets" if found is None else f" within {_text(others)}" if others else ""
        least[column] = (found or alone[column]).value(column)
        parts.append(_told(column, where, found or alone[column]))
    how = ""
    if len(budgets) > 1 and all(found.value(c) <= budgets[c] for c, found in alone.items()):
        how = f", though each can be met alone ({', '.join(_told(c, '', found) for c, found in alone.items())})"
        if len(budgets) > 2:
            pairs = [
                f"{_text({a: most, b: other}, ' and ')} conflict ({_told(a, f' within {_text({b: other})}', found)})"
                for (a, most), (b, other) in combinations(budgets.items(), 2)
                if (found := least_within(a, {b: other})) is not None and found.value(a) > most
            ]
            together = [part for part, found in zip(parts, beside.values(), strict=True) if found is not None]
            parts = [*(pairs or ["no two of them conflict, but all of them together"]), *together]
        else:
            parts[0] = f"{_text(budgets, ' and ')} conflict: {parts[0]}"
    return Infeasible(f"no allocation meets {_text(budgets)}{how}: {'; '.join(parts)}; loosen a budget", least)


def _told(column: str, where: str, solution: Solution) -> str:
    known = "" if solution.status == "optimal" else "at most "
    return f"the least {column}{where} is {known}{attainable(column, solution.value(column))}"


def _untied() -> Infeasible:
    return Infeasible("no allocation agrees with every tie, even without budgets; offer more choices", {})


def _text(budgets: Mapping[str, float], between: str = ", ") -> str:
    return between.join(f"{column}={quantity(column, limit)}" for column, limit in budgets.items())


def _least(problem: Problem, column: str, time_limit_s: float) -> Solution | None:
    """Least cost (or loss) in one column within the problem's budgets, or None where nothing meets them.

    Exact: an answer stands once nothing is left with this column bounded to one unit less.
    """
    if column == LOSS:
        return _best(problem, LOSS, time_limit_s)
    if column in problem.peaks:
        return _least_peak(problem, column, time_limit_s)
    deadline = time.monotonic() + time_limit_s
    best: Incumbent | None = None
    budgets = dict(problem.budgets)
    while True:
        program = Program(replace(problem, budgets=budgets), deadline, [column])
        if best is not None:
            program.strike(best.relaxed.open(budgets[column]))
        try:
            found = program.minimise(program.cost(column), lambda choice: problem.cost(column, choice))
        except OutOfTime:
            if best is None:
                raise
            return as_solution(problem, replace(best, proven=False))
        if found is None:
            return (
                None if best is None else as_solution(problem, replace(best, bound=best.value, proven=True))
            )
        best = found
        budgets[column] = problem.cost(column, best.choice) - 1


def _least_peak(problem: Problem, column: str, time_limit_s: float) -> Solution | None:
    """Least value of a peak within the problem's budgets, or None where nothing meets them.

    No peak is below the least of any of its parts: the largest of these is tried first as a limit, then, should nothing
    meet it, what lies between it and the best choice known is halved until they agree. Exact, as integers are.
    """
    deadline = time.monotonic() + time_limit_s
    parts = problem.parts(column)
    names = [f"{column}, part {k}" for k in range(len(parts))]
    flat = replace(problem, costs={**problem.costs, **dict(zip(names, parts, strict=True))})
    best: Choice | None = None
    low, high, part = -LARGEST, 0, 0
    seen: set[int] = set()
    while part not in seen:
        seen.add(part)
        least = _least(flat, names[part], deadline - time.monotonic())
        if least is None:
            return None
        low = max(low, math.ceil(least.bound))
        values = [p.of(least.choice) for p in parts]
        if best is None or max(values) < high:
            best, high = least.choice, max(values)
        part = int(np.argmax(values))
    assert best is not None
    limit = low
    while low < high:
        budgets = {**problem.budgets, column: limit}
        bounded = replace(flat, budgets=budgets)
        name = names[int(np.argmax([p.of(best) for p in parts]))]
        program = Program(bounded, deadline, [name])
        try:
            found = program.minimise(program.cost(name), lambda c, n=name: flat.cost(n, c))  # type: ignore[misc]
        except OutOfTime:
            return problem.solution(best, "time_limit", float(low), relative_gap(high, low))
        if found is None:
            low = limit + 1
        else:
            best, high = found.choice, problem.cost(column, found.choice)
        limit = (low + high) // 2
    return problem.solution(best, "optimal", float(low), 0.0)


def _cheapest(problem: Problem, incumbent: Incumbent, prefer: str, deadline: float) -> Incumbent:
    """Of the choices with the same loss (within 8 ulp) one of least cost, or the best that TIE_NODES find."""
    program = Program(problem, deadline, [prefer], nodes=TIE_NODES)
    program.strike(incumbent.relaxed.open(incumbent.value))
    program.at_most(program.loss(), incumbent.value)
    most = incumbent.value + 8 * math.ulp(incumbent.value)
    cheaper = program.minimise(
        program.cost(prefer),
        lambda choice: problem.cost(prefer, choice),
        incumbent.choice,
        lambda choice: problem.feasible(choice) and problem.total_loss(choice) <= most,
    )
    return (
        replace(incumbent, choice=cheaper.choice, value=problem.total_loss(cheaper.choice)) if cheaper else incumbent
    )


def _may_tie(problem: Problem, allowed: NDArray[np.bool_]) -> bool:
    """Whether two allowed choices of one variable, or pairs of choices of two, differ by the same loss.

    Choices of one variable that require different choices of others are not expected to have the same loss in total.
    """
    seen = np.empty(0)
    start = 0
    for i, loss in enumerate(problem.loss):
        kept = np.flatnonzero(allowed[start : start + len(loss)])
        start += len(loss)
        if i in problem.implied:
            continue
        a, b = (kept[k] for k in np.triu_indices(len(kept), 1))
        difference = np.abs(loss[a] - loss[b])
        free = np.all([t.of[a] == t.of[b] for t in problem.ties if t.i == i], axis=0)
        if (free & (difference == 0)).any():
            return True
        difference = np.unique(difference[difference > 0])
        if np.isin(difference, seen).any():
            return True
        seen = np.concatenate([seen, difference])
    return False


def as_solution(problem: Problem, incumbent: Incumbent) -> Solution:
    """What a program found, with exact costs."""
    status = "optimal" if incumbent.proven else "time_limit"
    bound = min(incumbent.bound, incumbent.value)
    return problem.solution(incumbent.choice, status, float(bound), relative_gap(incumbent.value, bound))

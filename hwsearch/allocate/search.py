"""Table + sensitivities + budgets -> Allocation or Front. No torch, no runtime: this runs on a laptop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.answer import as_allocation, dense_allocation
from hwsearch.allocate.budget import COLUMNS, COMPUTED, LOSS, Budget, parse_budgets
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.allocate.front import SWEPT, Front, as_front, sweep, sweep_grid
from hwsearch.allocate.milp import TIME_LIMIT_S, solve
from hwsearch.allocate.problem import Apart, Problem, Solution
from hwsearch.allocate.refusal import DOUBT, explained
from hwsearch.allocate.space import Offer, Space, make_space
from hwsearch.errors import Infeasible, InvalidInput
from hwsearch.latency.model import LatencyModel
from hwsearch.table.table import LatencyTable

if TYPE_CHECKING:
    from hwsearch.loss.table import SensitivityTable

KAPPA = 1.0
"""How many standard errors of the prediction a latency budget keeps in reserve."""
RESERVES = (1.0, 0.5, 0.25, 0.125)
"""The parts of that reserve that are tried in turn: after few builds no allocation may be within a budget by all of it."""


LEAST_S = 20.0
"""Of the solver's time limit, what each program of a search gets at least."""


def as_limits(bound: Costs) -> dict[str, int]:
    """Bounds as the solver takes them: whole numbers by column."""
    return {column: int(most) for column, most in bound.known().items()}


def search(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[str | Budget],
    *,
    minimize: str = LOSS,
    kappa: float = KAPPA,
    model: LatencyModel | None = None,
    tighten: Mapping[str, int] | None = None,
    doubtful: bool = False,
    **offer: Unpack[Offer],
) -> Allocation:
    """Find the allocation of least loss whose predicted costs meet every budget, solved exactly.

    Latency counts as T + kappa * sigma under a budget. Where the dense fp32 network meets every budget, it is the answer. Budgets
    on what is computed alone (size, memory, MACs) are met by any width that has a loss, be it measured or not: of an answer that
    holds what was not measured no latency is predicted.

    Args:
        table: latency table of the network.
        sensitivity: losses of the same network.
        budgets: upper bounds, for instance `latency=4ms`, `size=25%` and `loss=0.01`.
        minimize: what is to be least: `loss`, or a cost that a budget may bound (`latency`, `size`, ...); of allocations of equal
            cost the one of least loss.
        kappa: how many standard errors of the prediction a budget on latency or energy keeps in reserve.
        model: latency model to predict with; None fits one on the table.
        tighten: cost -> integer limit (ns, bytes, nJ, MACs) that replaces the budget's own, as the closed loop does.
        doubtful: where nothing is predicted to meet a budget on a measured cost, but the least is within what its prediction may
            be off, return that, for a measurement to decide.
        **offer: what may be chosen. `axes`: `width`, `precision` or both; also `residual` and `storage`. `keep`: patterns of names
            (`classifier*`) of units whose channels all stay; `head=dense.fp32`: and that become only that. `forbid`: what units
            may not become (`features.*:int8`). `only`: what alone they may become (`features.*:fp32,bf16`).

    Returns:
        One variant for each unit and one width for each channel group, with predicted costs.

    Raises:
        Infeasible: no allocation meets the budgets; it names the least that can be met, or the least so far and how to know
            more where the table or the sensitivities do not hold all that is offered.
        InvalidInput: a budget, an axis or a pattern is malformed, or nothing is left for a unit to become.
        IncompatibleTables: table and sensitivities are of two networks.
    """
    parsed = parse_budgets(budgets)
    space = _space(table, sensitivity, parsed, minimize, model, offer)
    wanted = _wanted(parsed, space)
    if _dense_is_best(space, wanted, minimize) and not tighten:
        return dense_allocation(space, parsed, wanted)
    limits = {**wanted, **(tighten or {})}
    try:
        solution = _solve_with_reserve(space, limits, kappa, minimize)
    except Infeasible as error:
        nearest = _within_doubt(space, limits)
        if nearest is None or not doubtful:
            raise explained(error, space, parsed, wanted, limits, doubtful=nearest is not None) from None
        solution = nearest
    return as_allocation(space, solution, parsed, wanted, minimize)


def search_diverse(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[str | Budget],
    count: int = 3,
    *,
    differ: int | None = None,
    minimize: str = LOSS,
    kappa: float = KAPPA,
    model: LatencyModel | None = None,
    **offer: Unpack[Offer],
) -> list[Allocation]:
    """Find the best allocation and the next best ones, each solved exactly, that differ from all before in many units.

    A unit differs where its variant or one of its widths does.

    Args:
        table: as for `search`.
        sensitivity: as for `search`.
        budgets: as for `search`; every answer meets them.
        count: how many answers are wanted.
        differ: in how many units at least any two answers differ; by default a tenth of all, at least one.
        minimize: as for `search`.
        kappa: as for `search`.
        model: as for `search`.
        **offer: as for `search`.

    Returns:
        The answer of `search`, then the others, the best first; fewer where no more meet the budgets.

    Raises:
        Infeasible: no allocation meets the budgets, as for `search`.
        InvalidInput: a budget, an axis or a pattern is malformed, or there are fewer units than are to differ.
        IncompatibleTables: table and sensitivities are of two networks.
    """
    units = table.network.units
    least = max(1, len(units) // 10) if differ is None else differ
    if not 1 <= least <= len(units) or count < 1:
        raise InvalidInput(
            f"{count} answers that differ in {least} units were asked for; expected at least one, and 1 to {len(units)} units"
        )
    parsed = parse_budgets(budgets)
    space = _space(table, sensitivity, parsed, minimize, model, offer)
    wanted = _wanted(parsed, space)
    found = [search(table, sensitivity, parsed, minimize=minimize, kappa=kappa, model=space.model, **offer)]
    while len(found) < count:
        apart = tuple(Apart(space.choices_of(a.variants, a.widths), least) for a in found)
        narrowed = replace(space, problem=replace(space.problem, apart=apart))
        try:
            solution = _solve_with_reserve(narrowed, wanted, kappa, minimize)
        except Infeasible:
            break
        found.append(as_allocation(space, solution, parsed, wanted, minimize))
    return found


def _space(
    table: LatencyTable, sensitivity: SensitivityTable, budgets: Sequence[Budget], minimize: str,
    model: LatencyModel | None, offer: Offer,
) -> Space:  # fmt: skip
    """All that may be chosen where these columns are bounded and minimised. Raises InvalidInput."""
    if minimize not in COLUMNS:
        raise InvalidInput(f"{minimize!r} cannot be minimised; expected one of {', '.join(COLUMNS)}")
    columns = {b.column for b in budgets} | ({minimize} - {LOSS})
    timed = not columns <= set(COMPUTED)
    return make_space(table, sensitivity, model, columns=columns, timed=timed, **offer)


def _wanted(budgets: Sequence[Budget], space: Space) -> dict[str, float]:
    """The budgets in whole ns, bytes, nJ and MACs, and that on the loss."""
    return {**as_limits(bounds(budgets, space.dense)), **{b.column: b.value for b in budgets if b.column == LOSS}}


def _dense_is_best(space: Space, wanted: Mapping[str, float], minimize: str) -> bool:
    """Whether the dense fp32 network, which loses nothing, is allowed and meets every budget."""
    costs = [(column, limit) for column, limit in wanted.items() if column != LOSS]
    return minimize == LOSS and space.allows_dense and all(math.floor(space.dense[c]) <= limit for c, limit in costs)


class _Shared:
    """The solver's time limit, shared by all programs of one search: each gets half of what is left, and `LEAST_S` at least."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + TIME_LIMIT_S

    def solve(self, problem: Problem, minimize: str) -> Solution:
        """As `milp.solve`."""
        return solve(problem, minimize=minimize, time_limit_s=max((self.deadline - time.monotonic()) / 2, LEAST_S))


def _solve_with_reserve(space: Space, limits: Mapping[str, float], kappa: float, minimize: str) -> Solution:
    """Shrink the limits on latency, its tails and energy until T + kappa * sigma of the answer is within them too.

    Where only the reserve makes it infeasible, half of it is kept, or a quarter or an eighth, else the answer that is nearest to
    having one is returned: whether it meets the budget is for the measurement to say.
    """
    shared = _Shared()
    best = shared.solve(space.with_budgets(limits), minimize)
    ratios = {c: r for c, r in {"latency": 1.0, "energy": 1.0, **space.tails}.items() if c in limits}
    if not ratios or kappa == 0:
        return best
    for part in RESERVES:
        with suppress(Infeasible):
            return _with_reserve(space, limits, ratios, part * kappa, minimize, best, shared)
    return shared.solve(space.with_budgets(limits), "energy" if set(ratios) == {"energy"} else "latency")


def _with_reserve(
    space: Space, limits: Mapping[str, float], ratios: Mapping[str, float], kappa: float, minimize: str, best: Solution,
    shared: _Shared,
) -> Solution:  # fmt: skip
    """The same with the whole reserve. ratios: of the costs that have one. best: without. Raises Infeasible."""
    shrunk = {c: limits[c] for c in ratios}
    for _ in range(8):
        found = {
            c: space.predict_energy(best.choice) if c == "energy" else space.predict(best.choice) for c in ratios
        }
        most = {c: p.time_ns + kappa * p.sigma_ns for c, p in found.items() if p is not None}
        over = {c: r * most[c] - limits[c] for c, r in ratios.items() if r * most[c] > limits[c]}
        if not over:
            return best
        for c, excess in over.items():
            reserve = ratios[c] * (most[c] - found[c].time_ns)  # type: ignore[union-attr]
            shrunk[c] = min(shrunk[c] - max(1, round(excess / 2)), round(limits[c] - reserve))
        best = shared.solve(space.with_budgets({**limits, **shrunk}), minimize)
    return best


def _within_doubt(space: Space, limits: Mapping[str, float]) -> Solution | None:
    """The least loss at the least latency (or energy), where that is over its limits by no more than it may be off."""
    measured = [c for c in limits if c not in COMPUTED]
    if not measured:
        return None
    column = "energy" if measured == ["energy"] else "latency"
    hard = {c: limit for c, limit in limits.items() if c in COMPUTED}
    try:
        nearest = solve(space.with_budgets(hard), minimize=column)
    except Infeasible:
        return None
    for c in measured:
        found = space.predict_energy(nearest.choice) if c == "energy" else space.predict(nearest.choice)
        if found is None or space.tails.get(c, 1.0) * (found.time_ns - DOUBT * found.sigma_ns) > limits[c]:
            return None
    return nearest


def front(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    over: str | Sequence[str] = "latency",
    points: int | None = None,
    budgets: Sequence[str | Budget] = (),
    *,
    model: LatencyModel | None = None,
    **offer: Unpack[Offer],
) -> Front:
    """Sweep one budget, or two: the allocations that no other beats in both loss and cost, or in loss and both costs.

    Args:
        table: latency table of the network.
        sensitivity: losses of the same network.
        over: the cost that is swept: `latency`, `size` or `memory`; or two of them, whose budgets form a grid.
        points: how many budgets are tried, of each cost; by default 20 of one, and 8 of each of two.
        budgets: upper bounds on other costs, or on the loss, which hold throughout.
        model: as for `search`.
        **offer: as for `search`.

    Returns:
        A point for each budget (or pair of budgets), with predicted latency in ns, size and memory in bytes, and loss.

    Raises:
        InvalidInput: a budget, an axis or a pattern is malformed.
        IncompatibleTables: table and sensitivities are of two networks.
    """
    swept = (over,) if isinstance(over, str) else tuple(over)
    if not 1 <= len(swept) <= 2 or not set(swept) <= set(SWEPT):
        raise InvalidInput(f"a front is over one or two of {', '.join(SWEPT)}; got {', '.join(swept) or 'none'}")
    parsed = parse_budgets(budgets) if budgets else ()
    columns = {*swept, *(b.column for b in parsed)}
    space = make_space(table, sensitivity, model, columns=columns, **offer)
    problem = space.with_budgets(_wanted(parsed, space))
    found: Sequence[tuple[int | tuple[int, int], Solution | None]]
    if len(swept) == 1:
        found = sweep(problem, swept[0], 20 if points is None else points)
    else:
        found = sweep_grid(problem, (swept[0], swept[1]), 8 if points is None else points)
    solutions = [s for _, s in found if s is not None]
    predicted = {s.choice: space.predict(s.choice) for s in solutions}
    header = table.header
    return as_front(
        found,
        tuple(u.name for u in table.network.units),
        tuple(table.network.channels),
        {
            s.choice: (tuple(map(str, space.variants(s.choice).values())), tuple(space.widths(s.choice).values()))
            for s in solutions
        },
        swept,
        {choice: p.sigma_ns for choice, p in predicted.items() if p is not None},
        {s.choice: space.memory(s.choice) for s in solutions},
        {
            "network": table.network.name,
            "backend": header.backend,
            "device": header.device.get("chip"),
            "options": header.options,
            "dense": space.dense.known(),
        },
    )

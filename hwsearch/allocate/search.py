"""Table + sensitivities + budgets -> Allocation or Front. No torch, no runtime: this runs on a laptop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.answer import as_allocation, dense_allocation
from hwsearch.allocate.budget import COMPUTED, Budget, parse_budgets
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.allocate.front import Front, as_front, sweep
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Solution
from hwsearch.allocate.refusal import DOUBT, explained
from hwsearch.allocate.space import Space, make_space
from hwsearch.errors import Infeasible
from hwsearch.latency.model import LatencyModel
from hwsearch.network.choices import AXES
from hwsearch.table.table import LatencyTable

if TYPE_CHECKING:
    from hwsearch.loss.table import SensitivityTable

KAPPA = 1.0
"""How many standard errors of the prediction a latency budget keeps in reserve."""


def as_limits(bound: Costs) -> dict[str, int]:
    """Bounds as the solver takes them: whole numbers by column."""
    return {column: int(most) for column, most in bound.known().items()}


def search(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[str | Budget],
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    kappa: float = KAPPA,
    model: LatencyModel | None = None,
    tighten: Mapping[str, int] | None = None,
    doubtful: bool = False,
) -> Allocation:
    """Find the allocation of least loss whose predicted costs meet every budget, solved exactly.

    Latency counts as T + kappa * sigma. Where the dense fp32 network meets every budget, it is the answer. Budgets on what is
    computed alone (size, memory, MACs) are met by any width that has a loss, be it measured or not: of an answer that holds what
    was not measured no latency is predicted.

    Args:
        table: latency table of the network.
        sensitivity: losses of the same network.
        budgets: upper bounds, for instance `latency=4ms` and `size=25%`.
        axes: what may be chosen: `width`, `precision` or both; also `residual` and `storage`.
        keep: patterns of names (`classifier*`) of units whose channels all stay.
        kappa: how many standard errors of the prediction a latency budget keeps in reserve.
        model: latency model to predict with; None fits one on the table.
        tighten: cost -> integer limit (ns, bytes, nJ, MACs) that replaces the budget's own, as the closed loop does.
        doubtful: where nothing is predicted to meet a budget on a measured cost, but the least is within what its prediction may
            be off, return that, for a measurement to decide.

    Returns:
        One variant for each unit and one width for each channel group, with predicted costs.

    Raises:
        Infeasible: no allocation meets the budgets; it names the least that can be met, or the least so far and how to know
            more where the table or the sensitivities do not hold all that is offered.
        InvalidInput: a budget, an axis or a pattern is malformed.
        IncompatibleTables: table and sensitivities are of two networks.
    """
    parsed = parse_budgets(budgets)
    timed = any(b.column not in COMPUTED for b in parsed)
    space = make_space(table, sensitivity, model, axes=axes, keep=keep, budgets=parsed, timed=timed)
    wanted = as_limits(bounds(parsed, space.dense))
    dense_meets = all(math.floor(space.dense[column]) <= limit for column, limit in wanted.items())
    if dense_meets and not tighten:
        return dense_allocation(space, parsed, wanted)
    limits = {**wanted, **(tighten or {})}
    try:
        solution = _solve_with_reserve(space, limits, kappa)
    except Infeasible as error:
        nearest = _within_doubt(space, limits)
        if nearest is None or not doubtful:
            raise explained(error, space, parsed, wanted, limits, doubtful=nearest is not None) from None
        solution = nearest
    return as_allocation(space, solution, parsed, wanted)


def _solve_with_reserve(space: Space, limits: Mapping[str, int], kappa: float) -> Solution:
    """Shrink the limits on latency, its tails and energy until T + kappa * sigma of the answer is within them too.

    Where only the reserve makes it infeasible, the answer that is nearest to having one is returned: whether it
    meets the budget is for the measurement to say.
    """
    best = solve(space.with_budgets(limits))
    ratios = {c: r for c, r in {"latency": 1.0, "energy": 1.0, **space.tails}.items() if c in limits}
    if not ratios or kappa == 0:
        return best
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
        try:
            best = solve(space.with_budgets({**limits, **shrunk}))
        except Infeasible:
            return _fastest(space, limits, "energy" if set(ratios) == {"energy"} else "latency")
    return best


def _fastest(space: Space, limits: Mapping[str, int], column: str) -> Solution:
    """The least loss at the least latency (or energy) that the other budgets allow."""
    least = minimise(space.with_budgets(limits), column).costs[column]
    return solve(space.with_budgets({**limits, column: least}))


def _within_doubt(space: Space, limits: Mapping[str, int]) -> Solution | None:
    """The least loss at the least latency (or energy), where that is over its limits by no more than it may be off."""
    measured = [c for c in limits if c not in COMPUTED]
    if not measured:
        return None
    column = "energy" if measured == ["energy"] else "latency"
    hard = {c: limit for c, limit in limits.items() if c in COMPUTED}
    try:
        nearest = _fastest(space, hard, column)
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
    over: str = "latency",
    points: int = 20,
    budgets: Sequence[str | Budget] = (),
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    model: LatencyModel | None = None,
) -> Front:
    """Sweep one budget: the allocations that no other beats in both loss and cost.

    Args:
        table: latency table of the network.
        sensitivity: losses of the same network.
        over: the cost that is swept: `latency`, `size` or `memory`.
        points: how many budgets are tried.
        budgets: upper bounds on other costs, which hold throughout.
        axes: as for `search`.
        keep: as for `search`.
        model: as for `search`.

    Returns:
        A point for each budget, with predicted latency in ns, size and memory in bytes, and loss.

    Raises:
        InvalidInput: a budget, an axis or a pattern is malformed.
        IncompatibleTables: table and sensitivities are of two networks.
    """
    parsed = parse_budgets(budgets) if budgets else ()
    space = make_space(table, sensitivity, model, axes=axes, keep=keep, budgets=parsed, over=over)
    fixed = as_limits(bounds(parsed, space.dense))
    found = sweep(space.with_budgets(fixed), over, points)
    predicted = {s.choice: space.predict(s.choice) for _, s in found if s is not None}
    sigma = {choice: p.sigma_ns for choice, p in predicted.items() if p is not None}
    memory = {s.choice: space.memory(s.choice) for _, s in found if s is not None}
    header = table.header
    chosen = {
        s.choice: (tuple(map(str, space.variants(s.choice).values())), tuple(space.widths(s.choice).values()))
        for _, s in found
        if s is not None
    }
    return as_front(
        found,
        tuple(u.name for u in table.network.units),
        tuple(table.network.channels),
        chosen,
        over,
        sigma,
        memory,
        {
            "network": table.network.name,
            "backend": header.backend,
            "device": header.device.get("chip"),
            "options": header.options,
            "dense": space.dense.known(),
        },
    )

"""What an answer of "infeasible" says beside the least: in shares, of what it is made, and what is not known of it.

It is a proof only of what was offered: where a profile ended early, or widths have no loss, the least is "so far".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwsearch.allocate.budget import COMPUTED, Budget, quantity
from hwsearch.allocate.costs import Costs
from hwsearch.allocate.milp import minimise
from hwsearch.allocate.space import Space
from hwsearch.errors import Infeasible
from hwsearch.latency.staircase import measured_widths, unbuilt
from hwsearch.network.choices import RESIDUAL, candidate_widths
from hwsearch.network.choices import STORAGE as STORED
from hwsearch.network.variants import STORAGE, weight_bytes
from hwsearch.table.header import Header
from hwsearch.table.table import LatencyTable

DOUBT = 2.0
"""Standard errors by which the least latency or energy may be over a budget that a measurement may still find met."""
NOTABLE = 0.05
"""Of the whole: smaller parts are not named."""
NAMED = 3
_KINDS = {
    "embedding": "embeddings",
    "recurrent": "weights of LSTM and GRU",
    "constant": "constants",
    "linear": "linear layers",
    "matmul": "matrix products",
}
_FIXED, _GRAPH = "norms, buffers and other tensors of no layer", "the graph"


def explained(
    error: Infeasible,
    space: Space,
    budgets: Sequence[Budget],
    wanted: Mapping[str, float],
    limits: Mapping[str, float],
    *,
    doubtful: bool,
) -> Infeasible:
    """The same error, with all that a user needs to go on.

    Args:
        wanted, limits: The budgets in whole ns, bytes, nJ and MACs; those that were searched with.
        doubtful: The least is over the limits by less than its prediction may be off.
    """
    least = error.least
    measured = any(column not in COMPUTED for column in least)
    sentences = [
        f"{error}{_in_shares(least, budgets, space.dense, wanted, limits)}",
        *_above_dense(least, space),
        *_sizes(least, space, limits),
        *(_so_far(space) if measured else []),
        *_unscored(space, least),
    ]
    if doubtful:
        sentences.append(
            "The least is so near to the budget that a prediction cannot tell: `hwsearch run` measures whether it is met"
        )
    return Infeasible(". ".join(sentences), least)


def _in_shares(
    least: Mapping[str, float],
    budgets: Sequence[Budget],
    dense: Costs,
    wanted: Mapping[str, float],
    limits: Mapping[str, float],
) -> str:
    """The least of each relative budget as that would be written.

    A limit in `limits` that is not the one of the table's dense network comes from another measurement of it: the share is
    of that one, and a hundredth more, as the next time it will be yet another.
    """
    shares = []
    for b in budgets:
        own = least.get(b.column, 0)
        if b.kind == "absolute" or own <= 0 or own <= limits[b.column]:
            continue
        whole = dense[b.column]
        if 0 < wanted[b.column] != limits[b.column]:
            own, whole = own * 1.01, whole * limits[b.column] / wanted[b.column]
        shares.append(str(b.nearest(own, whole)))
    return f" (the least as shares: {', '.join(shares)})" if shares else ""


def _above_dense(least: Mapping[str, float], space: Space) -> list[str]:
    """What nothing offered is better at than the dense network, be the other budgets as they may."""
    dense, free = space.dense.known(), space.with_budgets({})
    above = [c for c, own in least.items() if own >= dense.get(c, float("inf")) and minimise(free, c).costs[c] >= dense[c]]
    words = {"latency": "is faster", "size": "is smaller"}
    return [f"Nothing offered here {words.get(c, f'takes less {c}')} than the dense network" for c in above]


def _sizes(least: Mapping[str, float], space: Space, limits: Mapping[str, float]) -> list[str]:
    """What the least size is made of, where size is bounded."""
    if "size" not in least:
        return []
    others = {c: limit for c, limit in limits.items() if c != "size"}
    for budgets in (others, {}):
        try:
            smallest = minimise(space.with_budgets(budgets), "size")
        except Infeasible:
            continue
        return [f"The least size is made of {made_of(space, smallest.choice)}"]
    return []


def _so_far(space: Space) -> list[str]:
    """What the table does not hold of what the device and the network offer, and how to go on with it."""
    table = space.table
    if not table.header.cut_short:
        return []
    unknown = ["too few networks were built to know it well"]
    if left := unbuilt(table):
        unknown.append(f"{len(left)} of {len(table.network.groups)} channel groups have widths that none of them holds")
    return [
        f"This is the least known so far, as the profile ended at its time limit: {', '.join(unknown)}; "
        f"`{going_on(table)}` with a longer --time-limit goes on with the table"
    ]


def _unscored(space: Space, least: Mapping[str, float]) -> list[str]:
    """Widths that a budget on what is computed could use, had they a loss."""
    if not any(column in COMPUTED for column in least) or not space.sensitivity.width_loss:
        return []
    table, scores = space.table, space.sensitivity
    if set(least) <= set(COMPUTED):
        offered = {g: candidate_widths(n) for g, n in table.network.channels.items()}
    else:
        offered = measured_widths(table)
    missing = sum(
        w not in scores.width_loss.get(g, (table.network.channels[g],)) and f"width{w}" not in scores.refused.get(g, {})
        for g, steps in offered.items()
        for w in steps
    )
    if not missing:
        return []
    return [
        f"This is the least known so far, as the sensitivities lack {missing} of {sum(map(len, offered.values()))} widths: "
        f"`hwsearch sensitivity {table.header.task or 'TASK'} -o SENS` without --table scores all of them"
    ]


def going_on(table: LatencyTable) -> str:
    """The command that goes on with a table."""
    header = table.header
    words = ["hwsearch profile", header.task or "TASK", "-o TABLE", f"--backend {header.backend}"]
    section = header.section
    words += [f"--{name} {section[name]}" for name in ("threads", "base", "batch", "load") if section[name]]
    return " ".join([*words, *_axes(header, table)])


def _axes(header: Header, table: LatencyTable) -> list[str]:
    more = [RESIDUAL] * bool(header.section["residual"])
    more += [STORED] * any(str(STORAGE) in b.variants for b in table.builds)
    return [f"--axes {','.join(('width', 'precision', *more))}"] if more else []


# ---------------------------------------------------------------- what a size is made of


def parts(space: Space, choice: Sequence[int]) -> dict[str, int]:
    """Kind of what is stored -> its bytes under a choice; they sum to its size."""
    network = space.table.network
    widths = space.widths(choice)
    sizes: dict[str, int] = {}
    for unit, variant in space.variants(choice).items():
        own = network.unit_at(unit, widths)
        kind = "transposed convolutions" if "transpose" in own.op else _KINDS.get(own.op, "convolutions")
        sizes[kind] = sizes.get(kind, 0) + weight_bytes(own, variant)
    sizes[_FIXED] = network.narrow(widths).fixed_bytes
    graph = space.problem.cost("size", choice) - sum(sizes.values())
    sizes[_FIXED] += min(graph, 0)  # what the exporter made smaller
    sizes[_GRAPH] = max(graph, 0)
    return sizes


def made_of(space: Space, choice: Sequence[int]) -> str:
    """What keeps the size of a choice from falling, the largest first; for the choice of least size."""
    sizes = parts(space, choice)
    whole = sum(sizes.values())
    told = []
    for kind, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        if size < NOTABLE * whole:
            continue
        told.append(f"{kind} {size / whole:.0%} ({quantity('size', size)})")
        if kind == _FIXED:
            named = (
                f"{path} {quantity('size', n)}: {why}" for path, n, why in space.table.network.fixed[:NAMED]
            )
            told[-1] += f" [{'; '.join(named)}]"
    return ", ".join(told) + _floating(space, choice, whole)


def _floating(space: Space, choice: Sequence[int], whole: int) -> str:
    """The units that stay floating in a choice of least size, and why."""
    network, refused = space.table.network, space.table.header.unsupported
    widths = space.widths(choice)
    smaller = {u.name: any(not c.variant.plain for c in own) for u, own in zip(network.units, space.cells, strict=True)}
    reasons: dict[str, list[str]] = {}
    bytes_of: dict[str, int] = {}
    for unit, variant in space.variants(choice).items():
        if not variant.plain or not network[unit].weight_shape:
            continue
        why = refused.get(unit, {}).get(str(STORAGE)) or (
            "in int8 it takes no less, with what that adds to the graph"
            if smaller[unit]
            else f"{', '.join(repr(r.text) for r in space.rules if r.names(unit))} leaves it no smaller form"
            if any(r.names(unit) for r in space.rules)
            else f"the table has no {STORAGE}: profile and score again with --axes width,precision,storage"
            if not any(c.variant == STORAGE for own in space.cells for c in own)
            else "no smaller form of it was measured, or its loss is not known"
        )
        reasons.setdefault(why, []).append(unit)
        bytes_of[why] = bytes_of.get(why, 0) + weight_bytes(network.unit_at(unit, widths), variant)
    told = [
        f"; {size / whole:.0%} stays floating ({', '.join(units[:NAMED])}{', ...' if len(units) > NAMED else ''}): {why}"
        for why, units in reasons.items()
        if (size := bytes_of[why]) >= NOTABLE * whole
    ]
    return "".join(told)

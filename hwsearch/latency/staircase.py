"""What each channel group costs at each of its widths: the staircase, which is real and not monotone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwsearch.latency.model import fit
from hwsearch.network.choices import candidate_widths
from hwsearch.network.variants import Variant, everywhere, settled
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable


@dataclass(frozen=True)
class Step:
    """One width of one channel group.

    times_ns: by variant, the time of all units that the group runs through (their other channels whole), on the scale of the table,
    as the model tells it. kept: whether it is on the grid that searches choose from. built: whether a build of the table holds it.
    """

    group: str
    width: int
    times_ns: dict[str, float]
    kept: bool
    built: bool


def group_times(table: LatencyTable) -> dict[str, dict[int, list[float]]]:
    """For each group its time at each candidate width, one for each precision; only widths at which it is known in all of them."""
    times = _times(table)
    most = max((len(own) for own in times.values()), default=0)
    found: dict[str, dict[int, list[float]]] = {}
    for (group, width), own in times.items():
        if len(own) == most:
            found.setdefault(group, {})[width] = [own[p] for p in sorted(own)]
    return found


def staircase(table: LatencyTable) -> list[Step]:
    """Every candidate width, group by group, the whole width first; nothing where the table holds no widths."""
    grid, built = table.grid(), measured_widths(table)
    return [
        Step(group, width, own, width in grid[group], width in built[group]) for (group, width), own in _times(table).items()
    ]


def unbuilt(table: LatencyTable) -> dict[str, list[int]]:
    """The candidate widths that no build of a profile over widths holds, of each group that has some."""
    if table.header.mode != Mode.CONTEXT or not table.header.grid:
        return {}
    built = _built(table)
    left = {g: [w for w in candidate_widths(n) if w not in built[g]] for g, n in table.network.channels.items()}
    return {g: widths for g, widths in left.items() if widths}


def measured_widths(table: LatencyTable) -> dict[str, list[int]]:
    """Every width of each group that is on the grid or in a whole network built under the table's base, the whole one first."""
    built = _built(table)
    return {g: sorted({n, *table.grid()[g], *built[g]}, reverse=True) for g, n in table.network.channels.items()}


def _built(table: LatencyTable) -> dict[str, set[int]]:
    """Widths of each group in the whole networks that were built under the table's base."""
    base = table.header.options["base"]
    built = [table.candidate(b).widths for b in table.builds if b.base == base and not b.partial]
    return {g: {own[g] for own in built} for g in table.network.channels}


def _times(table: LatencyTable) -> dict[tuple[str, int], dict[str, float]]:
    """(group, width) -> precision -> time, in ns, in the base precision and in the lowest: those that are known at every width."""
    network, base = table.network, str(table.header.options["base"])
    if table.header.mode != Mode.CONTEXT or not table.header.grid:
        return {}
    tried = {g: candidate_widths(n) for g, n in network.channels.items()}
    model = fit(table, stairs=tried)
    variants = {Variant.parse(v) for own in table.offered().values() for v in own}
    lowest = max(variants, key=lambda v: (v.quantized, str(v)))
    times: dict[tuple[str, int], dict[str, float]] = {(g, w): {} for g, steps in tried.items() for w in steps}
    for variant in dict.fromkeys((Variant(base), lowest)):
        # units that cannot become it, whole or narrower, are in the base precision
        chosen = everywhere(network, variant, base, table.header.unsupported)
        for group, steps in tried.items():
            units = [u.name for u in network.units if group in u.groups]
            for width in steps:
                own = settled(network, {u: chosen[u] for u in units}, {group: width}, base)
                if all(model.knows(u, v, {group: width}) for u, v in own.items()):
                    time_ns = sum(model.unit_ns(u, v, {group: width}) for u, v in own.items())
                    times[group, width][str(variant).removeprefix("dense.")] = time_ns
    return {at: own for at, own in times.items() if own}


def as_json(table: LatencyTable) -> list[dict[str, Any]]:
    """The steps for programs."""
    return [
        {"group": s.group, "width": s.width, "times_ns": s.times_ns, "kept": s.kept, "built": s.built} for s in staircase(table)
    ]

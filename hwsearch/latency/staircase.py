"""What each channel group costs at each width that a profile tried: the staircase, which is real and not monotone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwsearch.network.choices import candidate_widths
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable


@dataclass(frozen=True)
class Step:
    """One width of one channel group.

    times_ns: by precision (or variant, where it is not dense), the time of all units that the group runs through (their
    other channels whole), on the scale of the table. kept: whether it is on the grid that searches choose from.
    """

    group: str
    width: int
    times_ns: dict[str, float]
    kept: bool


def group_ns(table: LatencyTable, build: Build, group: str) -> float:
    """Time of the units that a group runs through in one build, with conversions on their way in."""
    touched = {u.name for u in table.network.units if group in u.groups}
    counted = sum(n.time_ns for n in build.nodes)
    own = sum(n.time_ns for n in build.nodes if touched & set(n.units))
    return own / counted * table.time_ns(build) if counted else table.time_ns(build)


def group_times(table: LatencyTable) -> dict[str, dict[int, list[float]]]:
    """For each group its time at each width, one for each precision; only widths that were probed in all of them."""
    times = _times(table)
    most = max((len(own) for own in times.values()), default=0)
    found: dict[str, dict[int, list[float]]] = {}
    for (group, width), own in times.items():
        if len(own) == most:
            found.setdefault(group, {})[width] = [own[p] for p in sorted(own)]
    return found


def staircase(table: LatencyTable) -> list[Step]:
    """Every width that was probed, group by group, the whole width first."""
    grid = table.grid()
    order = {g: i for i, g in enumerate(table.network.channels)}
    return [
        Step(group, width, own, width in grid[group])
        for (group, width), own in sorted(
            _times(table).items(), key=lambda item: (order[item[0][0]], -item[0][1])
        )
    ]


def unprobed(table: LatencyTable) -> dict[str, list[int]]:
    """The widths that a profile would try and had no time for, of each group that lacks some; what other tables told is known."""
    probed = group_times(table)
    if table.header.mode != Mode.CONTEXT or not (probed or table.header.design):
        return {}
    found = {}
    for group, whole in table.network.channels.items():
        if table.header.prior and group not in probed:
            continue
        left = [w for w in candidate_widths(whole)[1:] if w not in probed.get(group, ())]
        if left:
            found[group] = left
    return found


def measured_widths(table: LatencyTable) -> dict[str, list[int]]:
    """Every width of each group that whole networks were built at under the table's base, the whole one first."""
    base = table.header.options["base"]
    built = [table.candidate(b).widths for b in table.builds if b.base == base and not b.partial]
    return {
        g: sorted({n, *table.grid()[g], *(own[g] for own in built)}, reverse=True)
        for g, n in table.network.channels.items()
    }


def _times(table: LatencyTable) -> dict[tuple[str, int], dict[str, float]]:
    """(group, width) -> precision -> time, in ns."""
    unpruned = ((), tuple(table.network.channels.values()))
    whole_networks = [
        b for b in reversed(table.builds) if b.role in (Role.REFERENCE, Role.UNIFORM) and b.widths in unpruned
    ]
    anchors = {b.variants: b for b in whole_networks}
    alike = {b.leading: b for b in whole_networks}
    times: dict[tuple[str, int], dict[str, float]] = {}
    for build in table.builds:
        precision = build.leading
        # a unit that cannot become the variant at the width probed is in the base precision there
        anchor = anchors.get(build.variants) or alike.get(precision)
        if build.role != Role.PROBE or anchor is None:
            continue
        widths = table.candidate(build).widths
        for group, whole in table.network.channels.items():
            if widths[group] < whole:
                times.setdefault((group, whole), {})[precision] = group_ns(table, anchor, group)
                times.setdefault((group, widths[group]), {})[precision] = group_ns(table, build, group)
    return times


def as_json(table: LatencyTable) -> list[dict[str, Any]]:
    """The steps for programs."""
    return [
        {"group": s.group, "width": s.width, "times_ns": s.times_ns, "kept": s.kept} for s in staircase(table)
    ]

"""Tables of one network that several machines of one kind measured, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable

DISAGREE, OTHER_KIND = 0.05, 0.2
"""Shares by which a machine is apart from the first: above the first it is named, above the second it is none of the same kind."""


@dataclass(frozen=True)
class Apart:
    """How far a machine of a table is apart from its first one.

    slower: the relative difference of their reference's time. shape: the median relative difference of what both built, each
    against the machine's own reference; builds: of how many allocations that is; None and 0 for none. most, what: the largest, and
    of what.
    """

    machine: str
    slower: float
    shape: float | None
    builds: int
    most: float
    what: str

    def against(self, first: str) -> str:
        """What to tell of it; empty where the two agree."""
        found = []
        if abs(self.slower) > DISAGREE:
            more = "longer" if self.slower > 0 else "less"
            found.append(f"its reference takes {abs(self.slower):.1%} {more}: predicted times are {first}'s")
        if self.shape is not None and self.shape > DISAGREE:
            found.append(
                f"{self.builds} allocations that both built differ by {self.shape:.1%} (median, against each one's reference; by "
                f"{self.most:+.1%} at most, {self.what})"
            )
        return f"machine {self.machine} disagrees with {first}: {'; '.join(found)}" if found else ""


def merged(tables: Sequence[tuple[str, LatencyTable]]) -> LatencyTable:
    """One table with the builds of all: times are on the scale of the first one's first machine.

    tables: each with the name of its machine, or an empty one where its builds tell it.
    Raises IncompatibleTables where they are of different networks, devices, backends or options, or where a machine is too far
    apart to be of one kind with the first; InvalidInput where two have a machine of one name, or one was interrupted too early.
    """
    named = [_named(name, table) for name, table in tables]
    first, *others = named
    _require_names(named)
    h = first.header
    for table in others:
        table.require(
            device=h.device, network=h.network, backend=h.backend, options=h.options, versions=h.versions
        )
    for table in named:
        if table.header.mode != Mode.CONTEXT:
            raise IncompatibleTables(
                f"a table of mode {table.header.mode} cannot be merged, only those of whole networks; profile with --mode context"
            )
        table.find(Role.DENSE)
    every = LatencyTable(_header(named), tuple(b for t in named for b in t.builds)).rescaled()
    for machine in apart(every):
        if max(abs(machine.slower), machine.shape or 0.0) > OTHER_KIND:
            raise IncompatibleTables(
                f"{machine.against(every.machines[0])}. That is more than machines of one kind do; keep their tables apart, or "
                "profile the one that was busy again"
            )
    return every


def apart(table: LatencyTable) -> list[Apart]:
    """Of each machine beyond the first how far it is apart from that."""
    first, *others = table.machines
    own = _ratios(table.of_machine(first))
    times = {name: _reference_ns(table.of_machine(name)) for name in table.machines}
    found = []
    for name in others:
        theirs = _ratios(table.of_machine(name))
        both = {key: theirs[key][0] / ratio - 1.0 for key, (ratio, _) in own.items() if key in theirs}
        worst = max(both, key=lambda key: abs(both[key]), default=None)
        found.append(
            Apart(
                name, times[name] / times[first] - 1.0, float(np.median(np.abs([*both.values()]))) if both else None, len(both),
                both[worst] if worst is not None else 0.0, own[worst][1] if worst is not None else "",
            )
        )  # fmt: skip
    return found


def machine_of_file(word: str) -> tuple[str, Path]:
    """(name or an empty one, path) of `NAME=FILE` or `FILE`."""
    name, separator, path = word.partition("=")
    return (name, Path(path)) if separator and not Path(word).exists() else ("", Path(word))


def _named(name: str, table: LatencyTable) -> LatencyTable:
    """The table with a machine told by each of its builds."""
    if name and len(table.machines) > 1:
        raise InvalidInput(f"a table of several machines ({', '.join(table.machines)}) cannot be named {name}; give its file alone")
    builds = [b if b.machine and not name else replace(b, machine=name or table.machines[0]) for b in table.builds]
    return LatencyTable(table.header, tuple(builds))


def _require_names(tables: Sequence[LatencyTable]) -> None:
    names = [name for table in tables for name in table.machines]
    if "" in names:
        raise InvalidInput("a table does not tell which machine it is of; name it: NAME=FILE")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InvalidInput(
            f"two tables are of the machine {twice[0]}; name them (one=a.parquet two=b.parquet) where these are two machines, and "
            "go on with one file where it is one"
        )


def _header(tables: Sequence[LatencyTable]) -> Any:
    """That of the first, with the widths, refusals and priors of all."""
    headers = [t.header for t in tables]
    grid: dict[str, list[int]] = {}
    unsupported: dict[str, dict[str, str]] = {}
    spent: dict[str, float] = {}
    for own in headers:
        for group, steps in own.grid.items():
            grid[group] = sorted({*grid.get(group, ()), *steps}, reverse=True)
        for unit, reasons in own.unsupported.items():
            unsupported[unit] = {**reasons, **unsupported.get(unit, {})}
        for what, seconds in own.spent.items():
            spent[what] = round(spent.get(what, 0.0) + seconds, 3)
    design: Mapping[str, Any] = next((own.design for own in headers if own.design.get("enough")), headers[0].design)
    prior = {(e.table, e.feature): e for own in headers for e in own.prior}
    return replace(
        headers[0], grid=grid, unsupported=unsupported, spent=spent, design=dict(design), prior=tuple(prior.values()),
        ended=any(own.ended for own in headers),
    )  # fmt: skip


def _ratios(builds: Sequence[Build]) -> dict[Any, tuple[float, str]]:
    """Of each whole network built by a machine (median of its ratios to the machine's reference, what it is)."""
    found: dict[Any, list[Build]] = {}
    for build in builds:
        if not build.partial and build.role != Role.DEPLOYED:
            found.setdefault(build.key, []).append(build)
    return {key: (float(np.median([b.ratio for b in own])), f"{own[0].role} in {own[0].leading}") for key, own in found.items()}


def _reference_ns(builds: Sequence[Build]) -> float:
    return float(np.median(np.concatenate([b.reference_ns for b in builds if b.role != Role.DEPLOYED])))

"""Build, time and read back one whole network after another, and keep each in the table and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from hwsearch.backends.base import Engine
from hwsearch.device.energy import Meter
from hwsearch.device.spent import QUIET as WAITING
from hwsearch.device.spent import SAVING, TIMING, WARMING
from hwsearch.device.timing import QUIET, Protocol, paired, too_wide
from hwsearch.engine.record import record, refusals, wrong_variants
from hwsearch.engine.reference import Reference
from hwsearch.engine.setup import Setup
from hwsearch.network.choices import Candidate
from hwsearch.network.variants import Variant, legal
from hwsearch.progress import Progress
from hwsearch.table.build import Build, Role
from hwsearch.table.table import LatencyTable, usable

SHORT = Protocol(width=0.015, limit_s=1.0)
"""Builds of a design over widths are many: what one lacks in rounds the others give."""

RECENT = 12
"""Builds which say how fast the quiet machine is."""


@dataclass
class Recorder:
    """Measures allocations beside one reference engine. table: what is known so far, replaced as it grows.

    out: where the table is saved after every build; None keeps it in memory. protocol: of every build, where one is given.
    longest_s: what one that is not `short` is timed for at most, where none is. given: the command's reference, if it has one.
    """

    setup: Setup
    table: LatencyTable
    out: Path | None
    protocol: Protocol | None
    progress: Progress
    seed: int = 0
    longest_s: float = Protocol().limit_s
    given: Reference | None = None

    def __post_init__(self) -> None:
        self._before = self.table.header.spent

    @cached_property
    def reference(self) -> Engine:
        """What everything is timed against: the whole network in the base precision."""
        return (self.given or Reference(self.setup)).engine

    @cached_property
    def _meter(self) -> Meter | None:
        return self.setup.meter

    def offered(self) -> dict[str, tuple[Variant, ...]]:
        """For each unit the legal variants which nothing measured so far speaks against."""
        variants = self.setup.variants()
        refused = self.table.header.unsupported
        return {
            u.name: tuple(v for v in legal(u, variants) if str(v) not in refused.get(u.name, {}))
            for u in self.setup.network.units
        }

    def candidates(self) -> list[Candidate]:
        """What was built under the table's base so far."""
        return [self.table.candidate(b) for b in self.table.builds if b.base == self.setup.options.base]

    def known_cells(self) -> set[tuple[str, str]]:
        """(signature, variant) that a fit will know."""
        built = [self.table.candidate(b) for b in usable(self.table) if not b.kept_out]
        return {cell for c in built for cell in c.cells(self.setup.network)} | self.table.known()

    def count(self, *roles: str) -> int:
        """Builds of these roles."""
        return sum(b.role in roles for b in self.table.builds)

    def measure(
        self, role: Role, candidate: Candidate, base: str | None = None, *, short: bool = False
    ) -> Build:
        """Build, time and read back one allocation, unless the table has it; it is on disk on return."""
        base = base or self.setup.options.base
        variants = tuple(str(candidate.variants[u.name]) for u in self.setup.network.units)
        widths = tuple(candidate.widths[g] for g in self.setup.network.channels)
        for old in self.table.builds:
            if old.key == (base, variants, widths) and old.role == role and role not in (Role.DESIGN, Role.HELDOUT, Role.TEST):
                return old
        reference = self.reference
        begun = self.setup.clock()
        setup = self.setup.narrow({g: range(w) for g, w in candidate.widths.items()})
        engine, model = setup.build(candidate.variants, base)
        build_s = (self.setup.clock() - begun) / 1e9
        protocol = self.protocol or (SHORT if short else Protocol(limit_s=self.longest_s))
        begun = self.setup.clock()
        with setup.spent.on(TIMING):
            timing = paired(
                reference.run,
                {role: engine.run},
                protocol,
                clock=self.setup.clock,
                seed=self.seed,
                meter=self._meter,
                quiet_ns=self._quiet_ns(),
                sample=setup.sample,
            )[role]
        took_s, warming_s = (self.setup.clock() - begun) / 1e9, float(timing.warmup_ns.sum()) / 1e9
        setup.spent.move(TIMING, WARMING, warming_s)
        if not self._meter:  # a counter of energy is waited for as well
            setup.spent.move(TIMING, WAITING, took_s - warming_s - protocol.limit_s)
        usual = [b.width for b in self.table.builds]
        build = replace(
            record(setup, role, candidate.variants, base, timing, engine, model, build_s),
            widths=widths, unstable=too_wide(timing.width, usual, protocol.width),
        )  # fmt: skip
        self._note_unsupported(build)
        if build.wrong:
            self._note_wrong(setup, candidate.variants, base)
        self.keep(self.table.with_build(build).rescaled())
        notes = "".join(f", {what}" for what, true in (("unstable", build.unstable), ("disturbed", timing.disturbed)) if true)
        self.progress.step(f"{role}: {build.ratio:.3f} of the reference{notes}")
        return build

    def keep(self, table: LatencyTable) -> None:
        """Go on with this table; it is on disk on return."""
        self.table = table.with_header(spent=_added(self._before, self.setup.spent.seconds))
        if self.out is not None:
            with self.setup.spent.on(SAVING):
                self.table.save(self.out)

    def _quiet_ns(self) -> float | None:
        """Time of the reference on the quiet machine, by the last builds; a machine drifts for minutes."""
        own = [b for b in self.table.builds if self.table.machine(b) == self.setup.machine] or self.table.builds
        last = [b.quiet_ns for b in own[-RECENT:]]
        return float(np.quantile(last, QUIET)) if len(last) >= RECENT // 4 else None

    def _note_unsupported(self, build: Build) -> None:
        if build.role == Role.DENSE:
            return
        self.table = self.table.with_header(unsupported=refusals(self.table, build))

    def _note_wrong(self, setup: Setup, allocation: Mapping[str, Variant], base: str) -> None:
        """Find the units whose variants make the engine return wrong outputs, and offer those no more."""
        found = wrong_variants(setup, allocation, base)
        refused = {unit: dict(reasons) for unit, reasons in self.table.header.unsupported.items()}
        for name, why in found.items():
            refused.setdefault(name, {})[str(allocation[name])] = why
        self.table = self.table.with_header(unsupported=refused)


def _added(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Seconds by what was done, of an earlier profile and this one."""
    return {what: round(before.get(what, 0.0) + now.get(what, 0.0), 3) for what in {**now, **before}}

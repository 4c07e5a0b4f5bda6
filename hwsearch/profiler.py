"""Build whole networks by design, time them, and keep what their nodes took: the latency table."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch import device as devices
from hwsearch.acquisition import Proposal, propose
from hwsearch.backends.base import Engine
from hwsearch.background import background
from hwsearch.builds import Build
from hwsearch.design import (
    AXES,
    Candidate,
    all_cells,
    apart,
    candidate_widths,
    check_axes,
    cover,
    halving,
    random_candidate,
    whole,
    worth,
)
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.header import LAYERED, SANDWICHED, Header
from hwsearch.isolated import METADATA_BYTES, Layers
from hwsearch.latency import fit
from hwsearch.measure import QUIET, Protocol, paired
from hwsearch.prior import evidence, of_sections, signatures, told_grid
from hwsearch.progress import Progress
from hwsearch.regime import Regime, graph_bytes, record, refusals, wrong_variants
from hwsearch.staircase import group_times
from hwsearch.table import LatencyTable, usable
from hwsearch.variants import Variant, legal, settled, uniform

MODES = ("context", *reversed(LAYERED))
SHORT = Protocol(width=0.015, limit_s=1.0)
"""Builds of a design over widths are many: what one lacks in rounds the others give."""

MOST_BUILDS = 400
PROBE_SHARE = 0.4
"""Of the time limit, what finding the widths worth knowing may take."""

FIRST = 4
"""Builds of a design that cover, before the first is chosen for what it tells; one more than a unit has variants, if more."""
BATCH = 4
"""Builds chosen at a time."""
RECENT = 12
"""Builds which say how fast the quiet machine is."""
LATE = "the time limit"
DESIGN_SHARE = 0.9
"""Of the time limit, after which no build of the design begins; the rest is for held-out ones."""
HELDOUT_EVERY, LEAST_HELDOUT = 5, 4
"""Every so many builds one is kept from the fit, to report its error on; and at least so many of them."""
GOAL, GAIN, HELD_GOAL, DOUBT = 0.01, 0.01, 0.015, 0.03
"""A design ends where the standard error of likely allocations is below the first, where another build lowers it by less than
the second, or where it is near the first and three of four held-out builds are predicted to within the third; but not while
one in four of those is further off than the fourth."""


def profile(
    at: Regime,
    out: str | Path | None,
    *,
    time_limit_s: float = 600.0,
    mode: str = "context",
    axes: Sequence[str] = AXES,
    seed: int = 0,
    builds: int | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    extend: bool = True,
    prior: Sequence[LatencyTable] = (),
) -> LatencyTable:
    """Measure a table, or go on with the one at `out`: every finished build is on disk before the next begins.

    A file of other regimes or input shapes of the same model gets a section more, which begins with what those tell.
    mode: `context` (whole networks), `sandwiched` (units between their neighbours, for networks too large to build whole) or
    `alone` (each unit by itself, the naive baseline); the last two keep every width whole.
    extend: False leaves a table alone that an earlier profile ended, be it by its time limit.
    axes: what allocations may differ in; without `width` every channel stays. prior: other tables of this device, backend
    and regime; what they tell of the same layers is taken into the table (once, at its beginning), and fewer builds do.
    Raises DeviceBusy while another profile runs here; IncompatibleTables where `out` is of something else.
    """
    if mode not in MODES:
        before = (
            "; what was `isolated` is `alone` now, and `sandwiched` does better" if mode == "isolated" else ""
        )
        raise InvalidInput(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}{before}")
    if prior and mode in LAYERED:
        raise InvalidInput(f"other tables tell of layers in context; mode {mode} takes no prior")
    if time_limit_s <= 0:
        raise InvalidInput(f"the time limit must be positive, got {time_limit_s} s")
    axes = check_axes(axes)
    fingerprint = devices.fingerprint_for(at.backend).to_json()
    with devices.lock(fingerprint["id"]), background(at.load), at.locked():
        run = _Run(at, out, fingerprint, mode, seed, protocol, progress or Progress.silent(), command)
        run.take(prior)
        if mode in LAYERED:
            return run.layers(time_limit_s)
        if not extend and run.ended("width" in axes):
            return run.table
        return run.context(time_limit_s, builds, "width" in axes)


class _Run:
    def __init__(
        self, at: Regime, out: str | Path | None, device: dict[str, Any], mode: str, seed: int, protocol: Protocol | None,
        progress: Progress, command: str | None,
    ) -> None:  # fmt: skip
        self.at, self.progress, self.seed = at, progress, seed
        self.protocol, self.short = protocol or Protocol(), protocol or SHORT
        self.out = Path(out) if out is not None else None
        options = at.described
        header = Header(
            network=at.network,
            device=device,
            backend=at.backend.name,
            versions=dict(at.backend.versions()),
            options=options,
            mode=mode,
            command=command if command is not None else " ".join(_without_folder(word) for word in sys.argv),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            task=_without_folder(at.lowering.task.spec),
        )
        self.table = LatencyTable(header)
        if self.out is not None and self.out.exists():
            self._join(LatencyTable.sections(self.out))
        self.names = [u.name for u in at.network.units]
        self.reference: Engine | None = None
        self.meter = at.meter

    def _join(self, sections: Sequence[LatencyTable]) -> None:
        """Go on with the section of this regime, or begin one with what the others tell."""
        header = self.table.header
        sections[0].require_beside(header)
        for old in sections:
            if old.header.section != header.section:
                continue
            old.require(network=header.network)
            if old.header.mode != header.mode:
                raise IncompatibleTables(
                    f"{self.out} was made in mode {old.header.mode}, not {header.mode}; give another file"
                )
            self.table = old
            return
        told = (
            of_sections(sections, self.table, signatures(header.network)) if header.mode == "context" else ()
        )
        self.table = self.table.with_header(prior=tuple(told))

    def take(self, prior: Sequence[LatencyTable]) -> None:
        """What other tables tell of this network's layers joins the table; each table's networks once."""
        if not prior:
            return
        wanted = signatures(self.at.network)
        found = {(e.table, e.feature): e for e in self.table.header.prior}
        for other in prior:
            found |= {(e.table, e.feature): e for e in evidence(other, self.table, wanted)}
        self.table = self.table.with_header(prior=tuple(found.values()))

    def ended(self, widths: bool) -> bool:
        """Whether an earlier profile over these axes came to its end."""
        return self.table.header.ended and (
            bool(self.table.header.grid) or not widths or not self.at.network.groups
        )

    # ---- whole networks

    def context(self, time_limit_s: float, builds: int | None, widths: bool) -> LatencyTable:
        self.start, self.limit_s, self.said = self.at.clock(), time_limit_s, set[float]()
        title = f"profile {self.at.network.name} on {self.at.backend.name}"
        self.progress.start(3 + (builds or self._most()), title, limit_s=time_limit_s)
        try:
            self._anchors()
            if widths:
                self._find_grid()
            self._design(builds)
            self._store(self.table.with_header(ended=True))
        finally:
            self.progress.stop()
        return self.table

    def _late(self, share: float = 1.0) -> bool:
        if self.at.clock() - self.start <= share * self.limit_s * 1e9:
            return False
        if share not in self.said:
            self.said.add(share)
            self.progress.say(f"{share:.0%} of the time limit of {self.limit_s:.0f} s is used")
        return True

    def _design(self, count: int | None) -> None:
        """Builds until more of them would tell little more, every fifth held out; `count` of them where one is given.

        A first batch covers variants and classes of boundaries; the next are those that most lower the standard error of what
        a search is likely to pick. What stopped it is kept in the header.
        """
        begun, network, grid = self.at.clock(), self.at.network, self.table.grid()
        steps = sum(map(len, grid.values()))
        built = sum(b.role in ("design", "heldout") for b in self.table.builds)
        before = self.table.header.design
        if not count and (before.get("builds"), before.get("steps")) == (built, steps) and before["enough"]:
            return
        queue: list[Candidate] = []
        proposal: Proposal | None = None
        most = count or self._most()
        first = round(max(FIRST, 1 + max(map(len, self.offered().values()))) * (1.0 - self._told()))
        while True:
            offered, done = self.offered(), self._done()
            designed = sum(b.role == "design" for b in self.table.builds)
            heldout = self._held_outs()
            # what a resumed profile draws depends on what is on disk, not on when it was killed
            rng = np.random.default_rng([self.seed, designed])
            if all(len(v) == 1 for v in (*offered.values(), *grid.values())):
                stopped = "there is nothing to choose between"
                break
            if designed + (heldout if count else 0) >= most:
                stopped = f"{most} builds were asked for" if count else f"{most} builds are enough"
                break
            if self._late(DESIGN_SHARE):
                stopped = LATE
                break
            if (designed + heldout) % HELDOUT_EVERY == HELDOUT_EVERY - 1:
                kept = self._held_out(rng)
                if kept is not None:
                    self.measure("heldout", kept)
                    continue
            if designed < first:
                candidate = cover(network, offered, grid, done, rng, known=self.table.known())
            else:
                if not queue:
                    proposal = propose(self.table, offered, grid, rng, BATCH)
                    queue = list(proposal.candidates)
                    if count is None and (why := self._told_enough(proposal)):
                        self._hold_out()
                        if not self._doubted():
                            stopped = why
                            break
                candidate = queue.pop(0)
                if any(str(v) not in map(str, offered[u]) for u, v in candidate.variants.items()):
                    continue  # refused since it was proposed
            self.measure("design", candidate, protocol=self.short)
        if not count and not stopped.startswith("there"):
            self._hold_out()
        self._store(
            self.table.with_header(
                design={
                    "stopped": stopped,
                    "enough": stopped != LATE,
                    "builds": sum(b.role in ("design", "heldout") for b in self.table.builds),
                    "steps": steps,
                    "seconds": round(before.get("seconds", 0.0) + (self.at.clock() - begun) / 1e9, 1),
                    "error": round(proposal.error, 5) if proposal else None,
                    "gain": round(proposal.gain, 5) if proposal else None,
                }
            )
        )

    def _told_enough(self, proposal: Proposal) -> str:
        """Why no further build is worth its time; empty where one is."""
        self.progress.expect(BATCH if proposal.error > GOAL else 0)
        if proposal.error <= GOAL:
            return f"likely allocations are known to {proposal.error:.1%}"
        if proposal.gain < GAIN:
            return f"another build would lower the error of likely allocations, {proposal.error:.1%}, by {proposal.gain:.1%} of it"
        held = self._held_out_error()
        if held is not None and held <= HELD_GOAL and proposal.error <= 2 * GOAL:
            return f"held-out builds are predicted to {held:.1%}"
        return ""

    def _hold_out(self) -> None:
        """As many held-out builds as it takes to tell anything by them, while there is time."""
        for _ in range(4 * LEAST_HELDOUT):
            if self._held_outs() >= LEAST_HELDOUT or self._late():
                return
            rng = np.random.default_rng([self.seed, len(self.table.builds)])
            if (kept := self._held_out(rng)) is None:
                return
            self.measure("heldout", kept)

    def _held_outs(self) -> int:
        return sum(b.role == "heldout" for b in self.table.builds)

    def _doubted(self) -> bool:
        """Whether held-out builds contradict what the model believes of its own errors: then more builds are to tell."""
        held = self._held_out_error()
        return held is not None and held > DOUBT

    def _held_out_error(self) -> float | None:
        """The 75th percentile of the errors on held-out builds, from four of them on."""
        model = fit(self.table)
        errors = []
        for build in usable(self.table):
            if build.role == "heldout" and not self.table.disturbed(build) and model.foretells(build):
                time = model.predict_build(build).time_ns
                errors.append(abs(time / self.table.time_ns(build) - 1.0))
        return float(np.percentile(errors, 75)) if len(errors) >= LEAST_HELDOUT else None

    def _held_out(self, rng: np.random.Generator) -> Candidate | None:
        """A new allocation of cells that were all built; None where none is found."""
        done, built = self._done(), self._built()
        for _ in range(50):
            drawn = random_candidate(self.at.network, self.offered(), self.table.grid(), rng)
            candidate = self._known(drawn, built)
            if candidate not in done and built.issuperset(candidate.cells(self.at.network)):
                return candidate
        return None

    def _known(self, candidate: Candidate, built: set[tuple[str, str]]) -> Candidate:
        """The candidate with another variant where that of a unit was not built at these widths."""
        offered = self.offered()
        variants = {
            unit: next((v for v in (variant, *offered[unit]) if (signature, str(v)) in built), variant)
            for (unit, variant), (signature, _) in zip(
                candidate.variants.items(), candidate.cells(self.at.network), strict=True
            )
        }
        return Candidate(variants, candidate.widths)

    def _find_grid(self) -> None:
        """Probe widths of every group, and keep those that are faster than every wider one kept.

        Every group is probed at its narrowest width first, then half-way, and so on: where the time runs out, all have a
        few steps. A longer profile goes on with the widths that are missing.
        """
        network, base = self.at.network, self.at.options.base
        tried = {g: candidate_widths(n) for g, n in network.channels.items()}
        base_names = tuple(str(v) for v in uniform(network, base).values())
        uniforms = [uniform(network, base), self._lowest()]
        uniforms = uniforms if uniforms[0] != uniforms[1] else uniforms[:1]
        self.progress.expect(
            len(uniforms) * sum(max(len(tried[g]) for g in c) - 1 for c in apart(network)) + 20
        )
        told = {} if self.table.header.grid else told_grid(self.table, tried, uniforms)
        classes = [[g for g in c if g not in told] for c in apart(network)]
        # what was refused since an earlier profile changes the second uniform allocation, but not what its probes showed
        done = {(b.widths, b.variants == base_names) for b in self.table.builds if b.role == "probe"}
        missing = False
        orders = {g: halving(len(steps) - 1) for g, steps in tried.items()}
        for turn in range(max(map(len, orders.values()), default=0)):
            for groups in classes:
                widths = {g: tried[g][orders[g][turn]] for g in groups if turn < len(orders[g])}
                probe = {**network.channels, **widths}
                for number, variants in enumerate(uniforms if widths else ()):
                    if (tuple(probe.values()), number == 0) in done:
                        continue
                    if self._late(PROBE_SHARE):
                        break
                    missing = True
                    self.measure("uniform" if number else "reference", Candidate(variants, network.channels))
                    probed = Candidate(settled(network, variants, probe, base), probe)
                    self.measure("probe", probed, protocol=self.short)
        if self.table.header.grid and not missing:
            return
        times = group_times(self.table)
        grid = {
            g: told.get(g) or (worth(times[g]) if g in times else [n]) for g, n in network.channels.items()
        }
        self._store(self.table.with_header(grid=grid))

    def _lowest(self) -> dict[str, Variant]:
        everything = {
            u.name: legal(u, self.at.backend.variants(self.at.options.base)) for u in self.at.network.units
        }
        refused = self.table.header.unsupported
        return {
            u: max((x for x in v if str(x) not in refused.get(u, {})), key=lambda x: x.quantized)
            for u, v in everything.items()
        }

    def _anchors(self) -> None:
        base, network = self.at.options.base, self.at.network
        plain = uniform(network, base)
        self.measure("reference", Candidate(plain, network.channels))
        self.measure("dense", Candidate(uniform(network, "fp32"), network.channels), base="fp32")
        everything = {u.name: legal(u, self.at.backend.variants(base)) for u in network.units}
        lowest = {u: max(v, key=lambda x: x.quantized) for u, v in everything.items()}
        if any(v.quantized for v in lowest.values()):
            self.measure("uniform", Candidate(lowest, network.channels))
        self._store(
            self.table.with_header(
                graph_bytes=graph_bytes(self.at, base) + METADATA_BYTES,
                dense_file_bytes=self.table.find("dense").file_bytes,
            )
        )

    def offered(self) -> dict[str, tuple[Variant, ...]]:
        variants = self.at.backend.variants(self.at.options.base)
        refused = self.table.header.unsupported
        return {
            u.name: tuple(v for v in legal(u, variants) if str(v) not in refused.get(u.name, {}))
            for u in self.at.network.units
        }

    def measure(
        self, role: str, candidate: Candidate, base: str | None = None, protocol: Protocol | None = None
    ) -> Build:
        """Build, time and read back one allocation, unless the table has it; it is on disk on return."""
        base = base or self.at.options.base
        variants = tuple(str(candidate.variants[name]) for name in self.names)
        widths = tuple(candidate.widths[g] for g in self.at.network.channels)
        for old in self.table.builds:
            if old.key == (base, variants, widths) and old.role == role and role not in ("design", "heldout"):
                return old
        reference = self._reference()
        begun = self.at.clock()
        at = self.at.narrow({g: range(w) for g, w in candidate.widths.items()})
        engine, model = at.build(candidate.variants, base)
        build_s = (self.at.clock() - begun) / 1e9
        timing = paired(
            reference.run,
            {role: engine.run},
            protocol or self.protocol,
            clock=self.at.clock,
            seed=self.seed,
            meter=self.meter,
            quiet_ns=self._quiet_ns(),
            sample=at.sample,
        )[role]
        build = replace(
            record(at, role, candidate.variants, base, timing, engine, model, build_s), widths=widths
        )
        self._note_unsupported(build)
        if build.wrong:
            self._note_wrong(at, candidate.variants, base)
        self._store(self.table.with_build(build).rescaled())
        self.progress.step(
            f"{role}: {build.ratio:.3f} of the reference{' (unstable)' if build.unstable else ''}"
        )
        return build

    def _quiet_ns(self) -> float | None:
        """Time of the reference on the quiet machine, by the last builds; machines have moods that last."""
        last = [b.quiet_ns for b in self.table.builds[-RECENT:]]
        return float(np.quantile(last, QUIET)) if len(last) >= RECENT // 4 else None

    def _reference(self) -> Engine:
        if self.reference is None:
            self.reference, _ = self.at.build(uniform(self.at.network, self.at.options.base))
        return self.reference

    def _note_unsupported(self, build: Build) -> None:
        if build.role == "dense":
            return
        self.table = self.table.with_header(unsupported=refusals(self.table, build))

    def _note_wrong(self, at: Regime, allocation: Mapping[str, Variant], base: str) -> None:
        """Find the units whose variants make the engine return wrong outputs, and offer those no more."""
        found = wrong_variants(at, allocation, base)
        refused = {unit: dict(reasons) for unit, reasons in self.table.header.unsupported.items()}
        for name, why in found.items():
            refused.setdefault(name, {})[str(allocation[name])] = why
        self.table = self.table.with_header(unsupported=refused)

    def _store(self, table: LatencyTable) -> None:
        self.table = table
        if self.out is not None:
            table.save(self.out)

    def _built(self) -> set[tuple[str, str]]:
        """Cells that a fit will know."""
        built = {
            cell
            for b in usable(self.table)
            if b.role != "heldout"
            for cell in self.table.candidate(b).cells(self.at.network)
        }
        return built | self.table.known()

    def _told(self) -> float:
        """Share of the cells at whole widths that other tables of the device tell."""
        cells = all_cells(self.at.network, self.offered(), whole(self.at.network))
        return len(cells & self.table.known()) / len(cells)

    def _most(self) -> int:
        """Builds of a design: with those before it a third of the (unit, widths, variant), if those are many.

        Fewer where other tables of the device tell the same layers: boundaries and the whole are then left to learn.
        """
        network, grid, offered = self.at.network, self.table.grid(), self.offered()
        cells = sum(len(offered[u.name]) * math.prod(len(grid[g]) for g in u.groups) for u in network.units)
        others = sum(b.role not in ("design", "heldout") for b in self.table.builds)
        least = 24 if any(len(steps) > 1 for steps in grid.values()) else 6
        most = int(np.clip(cells // 3 - others, least, MOST_BUILDS))
        return max(4, round(most * (1.0 - 0.4 * self._told())))

    def _done(self) -> list[Candidate]:
        """What was built under the table's base so far."""
        return [self.table.candidate(b) for b in self.table.builds if b.base == self.at.options.base]

    # ---- layer by layer

    def layers(self, time_limit_s: float) -> LatencyTable:
        """See `hwsearch.isolated`: of the two modes only `alone` builds the whole network."""
        if self.table.header.mode == SANDWICHED:
            self._layers().sandwiched(time_limit_s)
            return self.table
        title = f"profile {self.at.network.name} layer by layer on {self.at.backend.name}"
        self.progress.start(3, title)
        try:
            self._anchors()
            self._layers().alone(time_limit_s, self._reference())
        finally:
            self.progress.stop()
        return self.table

    def _layers(self) -> Layers:
        return Layers(self.at, self.table, self._store, self.protocol, self.progress, self.seed)


def _without_folder(word: str) -> str:
    """Absolute paths say where somebody's files are: their names will do."""
    return Path(word).name if Path(word).is_absolute() else word

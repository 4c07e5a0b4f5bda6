"""Build whole networks by design, time them, and keep what their nodes took: the latency table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch import device as devices
from hwsearch.backends.base import Engine
from hwsearch.background import background
from hwsearch.design import (
    AXES,
    Candidate,
    all_cells,
    apart,
    candidate_widths,
    check_axes,
    cover,
    default_builds,
    halving,
    random_candidate,
    whole,
    worth,
)
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.isolated import METADATA_BYTES, Layers
from hwsearch.measure import Protocol, paired
from hwsearch.prior import evidence, signatures
from hwsearch.progress import Progress
from hwsearch.regime import Regime, record, refusals, wrong_variants
from hwsearch.staircase import group_times
from hwsearch.table import LAYERED, SANDWICHED, Build, Header, LatencyTable, usable
from hwsearch.variants import Variant, legal, network_bytes, uniform

MODES = ("context", *reversed(LAYERED))
SHORT = Protocol(width=0.02, limit_s=0.5, min_rounds=3)
"""Builds of a design over widths are many: what one lacks in rounds the others give."""

MOST_BUILDS = 400
PROBE_SHARE = 0.4
"""Of the time limit, what finding the widths worth knowing may take."""

HELDOUT_SHARE = 5
"""Every fifth build of the design is kept from the fit, to report its error on."""


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
    fingerprint = devices.fingerprint().to_json()
    with devices.lock(fingerprint["id"]), background(at.load):
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
            old = LatencyTable.load(self.out)
            old.require(
                device=device, network=at.network, backend=at.backend.name, options=options,
                versions=header.versions,
            )  # fmt: skip
            if old.header.mode != mode:
                raise IncompatibleTables(
                    f"{out} was made in mode {old.header.mode}, not {mode}; give another file"
                )
            self.table = old
        self.names = [u.name for u in at.network.units]
        self.reference: Engine | None = None

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
        self.progress.start(3 + (builds or self._enough()), title, limit_s=time_limit_s)
        try:
            self._anchors()
            if widths:
                self._find_grid()
            if widths and any(len(steps) > 1 for steps in self.table.grid().values()):
                self._design_widths(builds)
            else:
                self._design(builds or self._enough())
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

    def _design(self, count: int) -> None:
        """Builds over the variants at whole widths, every fifth held out."""
        grid = whole(self.at.network)
        rng = np.random.default_rng(self.seed)
        while (number := sum(b.role in ("design", "heldout") for b in self.table.builds)) < count:
            offered = self.offered()
            if all(len(v) == 1 for v in offered.values()):
                break  # nothing to choose between: the anchors say it all
            done = self._done()
            candidate = cover(self.at.network, offered, grid, done, rng, known=self.table.known())
            # not fresh: the network is so small that all were built; measure one again
            heldout = candidate not in done and number % HELDOUT_SHARE == HELDOUT_SHARE - 1
            if self._late():
                break
            self.measure("heldout" if heldout else "design", candidate)

    def _design_widths(self, count: int | None) -> None:
        """Builds until every cell (a unit at some widths in some variant) was built, then held-out ones."""
        rng = np.random.default_rng(self.seed)
        network, grid = self.at.network, self.table.grid()
        while sum(b.role == "design" for b in self.table.builds) < (count or MOST_BUILDS):
            offered = self.offered()
            done = self._done()
            built = self._built()
            missing = all_cells(network, offered, grid) - built
            enough = sum(b.role == "design" for b in self.table.builds) >= self._enough()
            if (not missing and enough) or all(len(v) == 1 for v in (*offered.values(), *grid.values())):
                break
            if self._late(0.9):
                break
            candidate = cover(network, offered, grid, done, rng, known=self.table.known())
            gained = len(missing & set(candidate.cells(network)))
            self.progress.expect(-(-len(missing) // max(gained, 1)) + 4)
            self.measure("design", candidate, protocol=self.short)
        wanted = min(max(4, (count or self._enough()) // HELDOUT_SHARE), 8)
        for _ in range(200):
            if sum(b.role == "heldout" for b in self.table.builds) >= wanted or self._late():
                break
            done, built = self._done(), self._built()
            candidate = self._known(random_candidate(network, self.offered(), grid, rng), built)
            if candidate not in done and built.issuperset(candidate.cells(network)):
                self.measure("heldout", candidate)

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
        classes = apart(network)
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
                    self.measure("probe", Candidate(variants, probe), protocol=self.short)
        if self.table.header.grid and not missing:
            return
        times = group_times(self.table)
        grid = {g: worth(times[g]) if g in times else [n] for g, n in network.channels.items()}
        self._store(self.table.with_header(grid=grid))

    def _lowest(self) -> dict[str, Variant]:
        everything = {
            u.name: legal(u, self.at.backend.precisions(self.at.options.base)) for u in self.at.network.units
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
        everything = {u.name: legal(u, self.at.backend.precisions(base)) for u in network.units}
        lowest = {u: max(v, key=lambda x: x.quantized) for u, v in everything.items()}
        largest = self.table.find("reference").file_bytes - network_bytes(network, plain)
        if any(v.quantized for v in lowest.values()):
            build = self.measure("uniform", Candidate(lowest, network.channels))
            largest = max(largest, build.file_bytes - network_bytes(network, lowest))
        self._store(
            self.table.with_header(
                graph_bytes=max(largest, 0) + METADATA_BYTES,
                dense_file_bytes=self.table.find("dense").file_bytes,
            )
        )

    def offered(self) -> dict[str, tuple[Variant, ...]]:
        precisions = self.at.backend.precisions(self.at.options.base)
        refused = self.table.header.unsupported
        return {
            u.name: tuple(v for v in legal(u, precisions) if str(v) not in refused.get(u.name, {}))
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
            reference.run, {role: engine.run}, protocol or self.protocol, clock=self.at.clock, seed=self.seed
        )[role]
        build = replace(
            record(at, role, candidate.variants, base, timing, engine, model, build_s), widths=widths
        )
        self._note_unsupported(build)
        if build.wrong:
            self._note_wrong(at, candidate.variants, base)
        self._store(self.table.with_build(build))
        self._rescale()
        self.progress.step(
            f"{role}: {build.ratio:.3f} of the reference{' (unstable)' if build.unstable else ''}"
        )
        return build

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

    def _rescale(self) -> None:
        """The session's reference time is the median of all its samples."""
        samples = np.concatenate([b.reference_ns for b in self.table.builds])
        self._store(self.table.with_header(reference_ns=float(np.median(samples))))

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

    def _enough(self) -> int:
        """Builds of a design, fewer where other tables tell some of its cells."""
        network = self.at.network
        variants = {u.name: legal(u, self.at.backend.precisions(self.at.options.base)) for u in network.units}
        cells = all_cells(network, variants, whole(network))
        return default_builds(network, len(cells & self.table.known()) / len(cells))

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

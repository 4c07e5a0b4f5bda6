"""Measure a latency table: whole networks built by design, or a network layer by layer, each build on disk when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.device import fingerprint as devices
from hwsearch.device.load import background
from hwsearch.device.lock import lock, lock_path
from hwsearch.device.spent import QUIET, in_words
from hwsearch.device.timelimit import TimeLimit
from hwsearch.device.timing import Protocol
from hwsearch.engine.record import graph_bytes
from hwsearch.engine.reference import Reference
from hwsearch.engine.setup import Setup
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.network.choices import AXES, Candidate, check_axes
from hwsearch.network.variants import STORAGE, legal, uniform
from hwsearch.profiler.layerwise import METADATA_BYTES, Layers
from hwsearch.profiler.recorder import SHORT, Recorder
from hwsearch.profiler.sequential import build_by_design, most_builds
from hwsearch.profiler.transfer import evidence, of_sections, signatures
from hwsearch.profiler.widths import keep_worth, learn_widths, measure_variants
from hwsearch.progress import Progress
from hwsearch.table.build import Role
from hwsearch.table.header import LAYERED, Header, Mode
from hwsearch.table.table import LatencyTable

MODES = tuple(Mode)
DESIGNED = 50
"""Builds that a design is likely to take, before its first proposal tells more."""
BUILDS = 60
"""Of the time limit, one over so many is what a build is timed for at most, but no less than those of the design."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        time_limit_s: Seconds after which no further build begins.
        builds: Builds of the design; None for what the network's size asks for.
        protocol: How a build is timed; None for the usual one.
        extend: False leaves a table alone that an earlier profile ended, be it by its time limit.
        reserve: Seconds of the time limit that are kept for what comes after the profile, by the table as it is so far.
    """

    time_limit_s: float = 600.0
    builds: int | None = None
    protocol: Protocol | None = None
    extend: bool = True
    reserve: Callable[[LatencyTable], float] | None = None


def profile(
    setup: Setup,
    out: str | Path | None,
    effort: Effort | None = None,
    *,
    mode: str = Mode.CONTEXT,
    axes: Sequence[str] = AXES,
    seed: int = 0,
    prior: Sequence[LatencyTable] = (),
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure a table, or go on with the one at `out`: every finished build is on disk before the next begins.

    A file of other setups or input shapes of the same model gets a section more, which begins with what those tell.

    Args:
        mode: `context` (whole networks), `sandwiched` (units between their neighbours, for networks too large to build whole) or
            `alone` (each unit by itself, the naive baseline); the last two keep every width whole.
        axes: What allocations may differ in; without `width` every channel stays.
        prior: Other tables of this device, backend and setup; what they tell of the same layers is taken into the table (once,
            at its beginning), and fewer builds do.
        reference: The command's, where later stages time against it too.

    Raises:
        DeviceBusy: Another command measures on this device, or writes `out`, and does not end.
        IncompatibleTables: `out` is of something else.
    """
    effort = effort or Effort()
    if mode not in MODES:
        before = (
            "; what was `isolated` is `alone` now, and `sandwiched` does better" if mode == "isolated" else ""
        )
        raise InvalidInput(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}{before}")
    if prior and mode in LAYERED:
        raise InvalidInput(f"other tables tell of layers in context; mode {mode} takes no prior")
    if effort.time_limit_s <= 0:
        raise InvalidInput(f"the time limit must be positive, got {effort.time_limit_s} s")
    axes = check_axes(axes)
    fingerprint = devices.fingerprint_for(setup.backend).to_json()
    progress = progress or Progress.silent()
    path = Path(out) if out is not None else None
    with ExitStack() as held:
        with setup.spent.on(QUIET):
            held.enter_context(lock(fingerprint["id"], say=progress.say))
            if path is not None:
                held.enter_context(lock_path(path, say=progress.say))
        held.enter_context(background(setup.load))
        held.enter_context(setup.locked())
        table = _with_prior(_of_these_weights(_opened(setup, path, fingerprint, mode), setup, progress), prior)
        table = _storage_refused(setup, table)
        recorder = Recorder(setup, table, path, effort.protocol, progress, seed, given=reference)
        if mode == Mode.SANDWICHED:
            _layers(recorder).sandwiched(effort.time_limit_s)
        elif mode in LAYERED:
            _alone(recorder, effort.time_limit_s)
        elif effort.extend or not _ended(table, "width" in axes, setup.storage and setup.stores):
            _context(recorder, effort, "width" in axes)
        progress.record(f"the profile's time: {in_words(setup.spent.seconds)}")
        return recorder.table


def _context(recorder: Recorder, effort: Effort, widths: bool) -> None:
    """Whole networks: the anchors, the narrowest widths, and what the design asks for."""
    setup, progress = recorder.setup, recorder.progress
    reserve = effort.reserve or (lambda table: 0.0)
    limit = TimeLimit(effort.time_limit_s, setup.clock, progress.say, reserve=lambda: reserve(recorder.table))
    recorder.longest_s = float(np.clip(limit.left_s / BUILDS, SHORT.limit_s, Protocol().limit_s))
    title = f"profile {setup.network.name} on {setup.backend.name}"
    narrower = widths and bool(setup.network.groups)
    progress.start(3 + (effort.builds or DESIGNED), title, until=lambda: limit.left_s)
    try:
        _anchors(recorder)
        if narrower:
            learn_widths(recorder)
        else:
            measure_variants(recorder, setup.network.channels)
        progress.expect(effort.builds or min(DESIGNED, most_builds(recorder)))
        build_by_design(recorder, limit, effort.builds)
        if narrower:
            keep_worth(recorder)
        recorder.keep(recorder.table.with_header(ended=True))
    finally:
        progress.stop()


def _alone(recorder: Recorder, time_limit_s: float) -> None:
    """The anchors, and every layer by itself beside the whole network."""
    setup, progress = recorder.setup, recorder.progress
    progress.start(3, f"profile {setup.network.name} layer by layer on {setup.backend.name}")
    try:
        _anchors(recorder)
        _layers(recorder).alone(time_limit_s, recorder.reference)
    finally:
        progress.stop()


def _layers(recorder: Recorder) -> Layers:
    protocol = recorder.protocol or Protocol()
    return Layers(recorder.setup, recorder.table, recorder.keep, protocol, recorder.progress, recorder.seed)


def _anchors(recorder: Recorder) -> None:
    """The whole network in the base precision, in fp32, as low as every unit goes and stored in int8; sizes of its file."""
    setup = recorder.setup
    base, network = setup.options.base, setup.network
    recorder.measure(Role.REFERENCE, Candidate(uniform(network, base), network.channels))
    recorder.measure(Role.DENSE, Candidate(uniform(network, "fp32"), network.channels), base="fp32")
    everything = {u.name: legal(u, setup.variants(base)) for u in network.units}
    lowest = {u: max(v, key=lambda x: x.quantized) for u, v in everything.items()}
    if any(v.quantized for v in lowest.values()):
        recorder.measure(Role.UNIFORM, Candidate(lowest, network.channels))
    if setup.storage and setup.stores:  # however early the time limit ends the profile, the least size is known
        small = {u: STORAGE if STORAGE in v else v[0] for u, v in everything.items()}
        recorder.measure(Role.UNIFORM, Candidate(small, network.channels))
    table = recorder.table
    always, own = graph_bytes(setup, base)
    dense = table.find(Role.DENSE).file_bytes
    recorder.keep(
        table.with_header(graph_bytes=always + METADATA_BYTES, unit_bytes=own, dense_file_bytes=dense)
    )


def without_times(setup: Setup) -> LatencyTable:
    """A table of sizes alone, without a build: for budgets that nothing measured bounds."""
    base = setup.options.base
    always, own = graph_bytes(setup, base)
    dense = setup.onnx(uniform(setup.network, "fp32")).ByteSize()
    header = _header(setup, devices.fingerprint_for(setup.backend).to_json(), Mode.CONTEXT)
    table = LatencyTable(
        replace(header, graph_bytes=always + METADATA_BYTES, unit_bytes=own, dense_file_bytes=int(dense))
    )
    return _storage_refused(setup, table)


def _header(setup: Setup, device: dict[str, Any], mode: str) -> Header:
    return Header(
        network=setup.network,
        device=device,
        backend=setup.backend.name,
        versions=dict(setup.backend.versions()),
        options=setup.described,
        mode=Mode(mode),
        command=" ".join(_without_folder(word) for word in sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=_without_folder(setup.lowering.task.spec),
    )


def _opened(setup: Setup, out: Path | None, device: dict[str, Any], mode: str) -> LatencyTable:
    """The table to go on with: this setup's section of the file, or a new one with what the other sections tell."""
    header = _header(setup, device, mode)
    table = LatencyTable(header)
    if out is None or not out.exists():
        return table
    sections = LatencyTable.sections(out)
    sections[0].require_beside(header)
    for old in sections:
        if old.header.section != header.section:
            continue
        old.require(network=header.network)
        if old.header.mode != mode:
            raise IncompatibleTables(
                f"{out} was made in mode {old.header.mode}, not {mode}; give another file"
            )
        return old
    told = of_sections(sections, table, signatures(setup.network)) if mode == Mode.CONTEXT else ()
    return table.with_header(prior=tuple(told))


def _of_these_weights(table: LatencyTable, setup: Setup, progress: Progress | None) -> LatencyTable:
    """The table of a network of this structure with the network as it is now: its weights, and which units stay in float.

    What was measured stays, variants that returned wrong outputs as well.
    """
    old, new = table.network, setup.network
    if old.weights_digest != new.weights_digest and progress is not None:
        progress.say("the network has other weights than when it was profiled: its times are used, as they depend on none")
    return table.with_header(network=new)


def _with_prior(table: LatencyTable, prior: Sequence[LatencyTable]) -> LatencyTable:
    """What other tables tell of this network's layers joins the table; each table's networks once."""
    if not prior:
        return table
    wanted = signatures(table.network)
    found = {(e.table, e.feature): e for e in table.header.prior}
    for other in prior:
        found |= {(e.table, e.feature): e for e in evidence(other, table, wanted)}
    return table.with_header(prior=tuple(found.values()))


def _storage_refused(setup: Setup, table: LatencyTable) -> LatencyTable:
    """The table with the reason why weights are not stored in int8 alone, where that was asked for and cannot be had."""
    if not setup.storage:
        return table
    why = ""
    if not setup.stores:
        why = (
            f"{setup.backend.name} has no weights that are stored in int8 and computed with in {setup.options.base}"
        )
    elif table.header.mode in LAYERED:
        why = "tables made layer by layer time layers alone; profile with --mode context"
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit in table.network.units if why else ():
        if unit.weight_shape and (unit.stored or not setup.stores):
            refused.setdefault(unit.name, {})[str(STORAGE)] = why
    return table.with_header(unsupported=refused)


def _ended(table: LatencyTable, widths: bool, storage: bool) -> bool:
    """Whether an earlier profile over these axes came to its end."""
    stored = not storage or any(str(STORAGE) in b.variants for b in table.builds)
    return (
        table.header.ended and stored and (bool(table.header.grid) or not widths or not table.network.groups)
    )


def _without_folder(word: str) -> str:
    """Absolute paths say where somebody's files are: their names will do."""
    return Path(word).name if Path(word).is_absolute() else word

"""Whether a latency table still holds: a handful of its builds, built and timed again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch import backends
from hwsearch.backends.base import Backend, Engine
from hwsearch.device import fingerprint as devices
from hwsearch.device.load import background
from hwsearch.device.lock import lock
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.reference import reference_engine
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import InvalidInput
from hwsearch.latency.model import fit
from hwsearch.loading import load
from hwsearch.network.choices import RESIDUAL
from hwsearch.profiler.reshape import example_shapes, reshaped
from hwsearch.progress import Progress
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable, usable

if TYPE_CHECKING:
    from hwsearch.task import Task

BUILDS = 5
AGAIN = Protocol(width=0.01, limit_s=3.0)
NOISE = 0.015
"""Relative difference between two builds of one allocation that says nothing (the noise floor seen here is 0.5-2.3 %)."""
MEDIAN = 0.03
"""Relative change of the builds' times, against the reference, from which on the table no longer holds."""
SIGMAS = 4.0


@dataclass(frozen=True)
class Again:
    """One build then and now: ratios to the reference engine on the quiet machine, by what the table tells of slowdowns, and the
    standard error of their relative difference."""

    role: str
    then: float
    now: float
    error: float

    @property
    def change(self) -> float:
        return self.now / self.then - 1.0


@dataclass(frozen=True)
class Check:
    """Builds measured again, the slowest allocation first.

    holds: the median change is below 3 % (or two standard errors, where they are larger) and no build's is beyond four of its
    own. reference_then_ns, reference_now_ns:
    the reference engine itself, which a busy or throttled machine slows down with everything else.
    """

    builds: tuple[Again, ...]
    reference_then_ns: float
    reference_now_ns: float

    @property
    def median(self) -> float:
        """The median change of the builds' ratios to the reference."""
        return float(np.median([b.change for b in self.builds]))

    @property
    def worst(self) -> float:
        """The change furthest from zero."""
        return max((b.change for b in self.builds), key=abs)

    @property
    def holds(self) -> bool:
        least = max(MEDIAN, 2.0 * float(np.median([b.error for b in self.builds])))
        return abs(self.median) <= least and all(abs(b.change) <= SIGMAS * b.error for b in self.builds)

    def to_json(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in ("holds", "median", "worst", "reference_then_ns", "reference_now_ns")
        }
        return {**own, "builds": [{**asdict(b), "change": b.change} for b in self.builds]}

    def __str__(self) -> str:
        drift = self.reference_now_ns / self.reference_then_ns - 1.0
        said = (
            f"{len(self.builds)} builds measured again: median change {self.median:+.1%}, worst {self.worst:+.1%} against the "
            f"reference engine, which itself takes {drift:+.1%}"
        )
        return said + (
            "; the table holds"
            if self.holds
            else "; the table no longer holds: profile again into another file"
        )


def recheck(
    table: LatencyTable,
    task: Task | None = None,
    *,
    backend: str | Backend | None = None,
    builds: int = BUILDS,
    lock_clocks: bool = False,
    progress: Progress | None = None,
) -> Check:
    """Build and time a handful of a table's allocations again, spread from its fastest to its slowest.

    Args:
        table: the table to check; made in context.
        task: the one that was profiled; None takes the table's own where that is of the zoo (a table is a file from anywhere:
            no other code that it names is run).
        backend: None for that of the table.
        builds: how many builds to measure again.
        lock_clocks: hold the GPU's clock at that of the table meanwhile.
        progress: where progress is shown; None shows none.

    Returns:
        The builds then and now, as ratios to the reference engine, and whether the table holds.

    Raises:
        IncompatibleTables: another device, network, backend or runtime version.
        InvalidInput: the table was made layer by layer, or there is no task or build to check.
        DeviceBusy: another command measures on this device and does not end.
        BackendUnavailable: the runtime is not installed.
    """
    if table.header.mode != Mode.CONTEXT:
        raise InvalidInput("the table was made layer by layer; only one made in context can be checked")
    if task is None:
        if not table.header.task.startswith("zoo:"):
            raise InvalidInput(
                f"the table was made for task {table.header.task or '(not recorded)'}; name it with --task to check the table"
            )
        task = load(table.header.task)
    options, shapes = table.header.options, table.network.input_shapes
    if len(shapes) == len(example_shapes(task)) and [s[1:] for s in shapes] != [s[1:] for s in example_shapes(task)]:
        with suppress(InvalidInput):  # a task of another network, which is refused below
            task = reshaped(task, shapes)  # as `profile --shape` made it
    chosen = backend or table.header.backend
    runtime = backends.get(chosen)
    setup = set_up(
        task, runtime, threads=int(options["threads"]), base=str(options["base"]), batch=int(options["batch"]),
        axes=[RESIDUAL] if options.get(RESIDUAL) else (), load=int(options.get("load", 0)),
        clocks=int(options.get("clocks", 0)) or devices.clocks_to_lock(runtime) if lock_clocks else 0,
        int8=table.header.int8,
    )  # fmt: skip
    fingerprint = devices.fingerprint_for(runtime).to_json()
    table.require(
        device=fingerprint, network=setup.network, backend=setup.backend.name, options=setup.described,
        versions=dict(setup.backend.versions()),
    )  # fmt: skip
    with lock(fingerprint["id"], say=progress.say if progress else None), background(setup.load), setup.locked():
        return measure_again(table, setup, spread_builds(table, builds), progress)


def spread_builds(table: LatencyTable, count: int) -> list[Build]:
    """Some of a table's builds, from the slowest to the fastest at even steps, no allocation twice."""
    first: dict[Any, Build] = {}
    for build in usable(table):
        if build.role not in (Role.REFERENCE, Role.DEPLOYED):  # a deployed one kept other slots, with other weights
            first.setdefault(build.key, build)
    ranked = sorted(first.values(), key=lambda b: -b.ratio)
    if not ranked or count < 1:
        raise InvalidInput("the table has no build that could be measured again; profile first")
    places = np.unique(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int))
    return [ranked[i] for i in places]


def measure_again(
    table: LatencyTable,
    setup: Setup,
    builds: Sequence[Build],
    progress: Progress | None = None,
    reference: Engine | None = None,
) -> Check:
    """The builds of a setup's own table compiled and timed anew, all interleaved with the reference engine."""
    progress = progress or Progress.silent()
    progress.start(len(builds) + 1, "check the table")
    try:
        reference = reference or reference_engine(setup)
        engines: dict[str, Engine] = {}
        for number, build in enumerate(builds):
            candidate = table.candidate(build)
            own = setup.narrow({g: range(w) for g, w in candidate.widths.items()})
            engines[str(number)] = own.build(candidate.variants)[0]
            progress.step(f"built {number + 1} of {len(builds)}")
        runs = {n: e.run for n, e in engines.items()}
        timings = paired(reference.run, runs, AGAIN, clock=setup.clock, quiet_ns=table.quiet_on(setup.machine))
        progress.step("timed")
    finally:
        progress.stop()
    again, model = [], fit(table)
    for number, build in enumerate(builds):
        now, nodes = timings[str(number)], table.nodes(build)
        widths = np.hypot(build.width, now.width) / 3.92
        before = model.on_quiet_machine(build.ratio, nodes, table.slowdown(build))
        after = model.on_quiet_machine(now.ratio, nodes, now.quiet_ns / table.quiet_on(setup.machine) - 1.0)
        converted = [p.sigma_ns / p.time_ns for p in (before, after)]
        scale = table.header.reference_ns
        again.append(
            Again(
                build.role,
                before.time_ns / scale,
                after.time_ns / scale,
                float(np.linalg.norm([NOISE, widths, *converted])),
            )
        )
    return Check(tuple(again), table.header.reference_ns, timings["0"].reference_median_ns)

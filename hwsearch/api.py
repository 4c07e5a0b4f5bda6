"""What Python and the command line have in common: one function for each command that goes from a Task to a result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import COMPUTED, Budget, parse_budgets
from hwsearch.allocate.front import Front
from hwsearch.allocate.search import front
from hwsearch.backends.base import Backend
from hwsearch.deployment.allowance import LOOP, PREPARING, PROFILE, Allowance, prepared, shared_out
from hwsearch.deployment.closed_loop import closed_loop
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import as_deployed, bank_of, of_allocation
from hwsearch.deployment.report import Report, measured_points
from hwsearch.deployment.session import Session
from hwsearch.deployment.verify import measure_allocation
from hwsearch.device.fingerprint import clocks_to_lock, fingerprint_for
from hwsearch.device.lock import lock, lock_path
from hwsearch.device.timelimit import TimeLimit
from hwsearch.engine.setup import Setup, clock_of, set_up
from hwsearch.errors import BudgetMissed, IncompatibleTables, InvalidInput
from hwsearch.files import make_folder, remove_unfinished, write_bytes
from hwsearch.latency.staircase import measured_widths
from hwsearch.loss.sensitivity import holds_now, sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.choices import AXES, RESIDUAL, STORAGE, candidate_widths, check_axes
from hwsearch.network.variants import STORAGE as IN_INT8
from hwsearch.plot import plot_front
from hwsearch.profiler.profile import Effort, without_times
from hwsearch.profiler.profile import profile as measure_table
from hwsearch.profiler.reshape import example_shapes, reshaped
from hwsearch.profiler.transfer import comparable
from hwsearch.progress import Progress
from hwsearch.table.header import Mode
from hwsearch.table.section import Shapes
from hwsearch.table.table import LatencyTable
from hwsearch.task import Task


def profile(
    task: Task,
    *,
    out: str | Path | None = None,
    backend: str | Backend = "openvino",
    threads: int = 1,
    base: str | None = None,
    batch: int | None = None,
    time_limit_s: float = 600.0,
    mode: str = "context",
    axes: Sequence[str] = AXES,
    seed: int = 0,
    builds: int | None = None,
    load: int = 0,
    shape: Shapes | None = None,
    prior: Sequence[LatencyTable | str | Path] = (),
    lock_clocks: bool = False,
    energy: bool = False,
    trace: str | Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of a task on this device, or go on with the one at `out`.

    A file at `out` of the same model under other options, or at another input shape, gets a section more.

    Args:
        task: What is measured.
        out: File of the table; None keeps it in memory.
        backend: Name of a backend, or a backend.
        threads: Inference threads.
        base: Precision of what is not quantized; None for the backend's preferred one.
        batch: Batch size; None for that of the example inputs.
        time_limit_s: Seconds after which no further build begins.
        mode: `context` (whole networks), `sandwiched` (units between their neighbours, for networks too large to build whole)
            or `alone` (each unit by itself, the naive baseline); the last two keep every width whole.
        axes: What allocations may differ in: `width`, `precision`; beside `width` also `residual`, the width of a transformer's
            residual stream; beside `precision` also `storage`, weights in int8 computed with in the base precision.
        seed: Of the design of builds.
        builds: Builds of the design; None for what the network's size asks for.
        load: Busy workers beside the measured network, one thread each: a table of a shared machine is another one.
        shape: Of the inputs, the batch first, where not that of the example inputs: for timing; sensitivities, deployed files
            and reports want a task of that shape.
        prior: Other tables of this device and setup, or their files, whose layers need not be learnt again.
        lock_clocks: Hold the GPU's clock while measuring (needs root; undone afterwards): the table is of that clock.
        energy: Also read a GPU's counter of energy, for which each engine runs 6 s more; a CPU's is read where there is one.
        trace: JSON file for the seconds of this call by what was done, also where it ends in an error.
        progress: Shows how far it is; None shows nothing.

    Returns:
        The table: times of whole networks in ns, with what the latency model needs of them.

    Raises:
        DeviceBusy, BackendUnavailable, UntraceableModel: Another profile runs; a runtime builds nothing; a model is not traced.
        IncompatibleTables: `out` or `prior` is of something else.
        InvalidInput: An option is out of range.
    """
    axes, runtime = check_axes(axes), backends.get(backend)
    if shape is not None and shape != ():
        task = reshaped(task, shape)
        own = example_shapes(task)[0][0]
        if batch not in (None, own):
            raise InvalidInput(f"the shape is of batch {own}, not {batch}; give only one of the two")
        batch = own
    setup = set_up(
        task, runtime, threads=threads, base=base, batch=batch, axes=axes, load=load,
        clocks=clocks_to_lock(runtime) if lock_clocks else 0, energy=energy,
    )  # fmt: skip
    known, effort = _tables(prior, setup), Effort(time_limit_s, builds)
    with _traced(setup, trace):
        return measure_table(setup, out, effort, mode=mode, axes=axes, seed=seed, prior=known, progress=progress)


@contextmanager
def _traced(setup: Setup, trace: str | Path | None) -> Iterator[None]:
    """Where the block ends, be it by an error, the seconds of it by what was done are left in a file, if one is named."""
    try:
        yield
    finally:
        if trace is not None:
            seconds = setup.spent.seconds
            told = {"kind": "trace", "total_s": sum(seconds.values()), "seconds": seconds}
            write_bytes(trace, json.dumps(told, indent=1).encode())


def _tables(prior: Sequence[LatencyTable | str | Path], setup: Setup) -> list[LatencyTable]:
    """Other tables, or those of their files that are of a setup's options."""
    return [t for p in prior for t in ([p] if isinstance(p, LatencyTable) else _comparable(p, setup))]


def _comparable(path: str | Path, setup: Setup) -> list[LatencyTable]:
    """The tables in a file that are of a setup's options; where none is, the nearest, for `evidence` to say why not.

    Of several their own measurements alone: what one took from another would count twice.
    """
    tables, wanted = LatencyTable.sections(path), comparable(setup.described)
    fitting = [t for t in tables if comparable(t.header.options) == wanted]
    if not fitting:
        return [max(tables, key=lambda t: t.header.section.agrees(wanted))]
    return fitting if len(fitting) == 1 else [t.with_header(prior=()) for t in fitting]


def sensitivity(
    task: Task,
    *,
    out: str | Path | None = None,
    backend: str | Backend = "openvino",
    base: str | None = None,
    batch: int | None = None,
    axes: Sequence[str] = AXES,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Loss of every (unit, variant) of a backend, and of every (channel group, width), on the task's calibration data.

    Args:
        task: What is scored.
        out: File of the table; it is used again if it is there, and all that made it is the same.
        backend: Name of a backend, or a backend.
        base: Precision of what is not quantized; None for the backend's preferred one.
        batch: Batch size; None for the table's, or that of the example inputs.
        axes: Without `width` the groups are left out.
        table: Its variants and widths are scored; None for all that a profile would try.
        weights: Folder to keep refitted weights in, for `deploy` and `verify`.
        seed: Of the samples that weights are refitted on.
        progress: Shows how far it is; None shows nothing.

    Returns:
        Mean loss a sample of each choice, with everything else dense fp32 and whole.

    Raises:
        UntraceableModel: The model cannot be traced.
        IncompatibleTables: `out` or `table` is of another network or kind of int8.
        InvalidInput: An option is out of range.
    """
    all_axes = set(check_axes(axes))
    if table is not None:
        batch = table.header.options.get("batch") if batch is None else batch
        if table.header.options.get("residual"):
            all_axes.add(RESIDUAL)
        if any(str(IN_INT8) in variants for variants in table.offered().values()):
            all_axes.add(STORAGE)
    setup = set_up(
        task, backends.get(backend), base=base, batch=batch, axes=all_axes,
        int8=table.header.int8 if table is not None else None,
    )  # fmt: skip
    grid: Mapping[str, Sequence[int]] = {}
    if "width" in axes and table is not None:
        table.require(network=setup.network)
        grid = table.grid()
    elif "width" in axes:
        grid = {g: candidate_widths(n) for g, n in setup.network.channels.items()}
    return sensitivity_for(setup, out, seed=seed, grid=grid, weights=weights, progress=progress)


def verify(
    task: Task,
    allocation: Allocation,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    lock_clocks: bool = False,
) -> Report:
    """Measure an allocation on this device and report predicted beside measured.

    Latencies are ratios to engines timed in the same session, on the scale of the table's session where one is
    given. The budget holds only as measured.

    Args:
        task: What the allocation is of.
        allocation: An answer of `search`.
        backend: Name of a backend, or a backend; None for the allocation's.
        threads: Inference threads; None for the allocation's.
        out: File for the report.
        table: The latency table that was searched.
        weights: Folder of refitted weights, as for `deploy`.
        lock_clocks: As for `profile`, at the clock of the allocation's table.

    Returns:
        The report; `state` says whether every budget holds.

    Raises:
        IncompatibleTables: The table is of another device, or the allocation of another network.
        InvalidInput: Energy is bounded where nothing counts it.
    """
    setup = of_allocation(task, allocation, backend, threads, lock_clocks)
    if table is not None:
        device = fingerprint_for(setup.backend).to_json()
        table.require(device=device, network=setup.network, backend=setup.backend.name)
    deployed = as_deployed(setup, allocation, bank_of(setup, allocation, weights))
    report, _ = measure_allocation(Session(setup, table), allocation, deployed, table=table)
    if out is not None:
        report.save(out)
    return report


def run(
    task: Task, budgets: Sequence[str | Budget], out: str | Path, *,
    backend: str | Backend = "openvino", threads: int = 1, base: str | None = None, batch: int | None = None, seed: int = 0,
    time_limit_s: float = 600.0, mode: str = "context", axes: Sequence[str] = AXES, keep: Sequence[str] = (),
    builds: int | None = None, load: int = 0, prior: Sequence[LatencyTable | str | Path] = (), lock_clocks: bool = False,
    energy: bool = False, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Find and deploy the allocation of least loss that meets the budgets as measured on this device.

    Leaves table.parquet, sens.parquet, alloc.json, model.onnx, report.json and front.png in `out`, and refitted weights in
    `weights`; another run there uses the table and the sensitivities again, and of these and the weights makes anew what was made
    of something else (other calibration data, divergence, seed, weights of the model), and says so. Where only size, memory or
    MACs are bounded, there is neither table nor front. What is printed while it runs is added to run.log.

    Args:
        task: What is deployed.
        budgets: Such as `latency=4ms` or `size=25%`, at most one for each cost.
        out: Folder for the results.
        backend: As for `profile`.
        threads: As for `profile`.
        base: As for `profile`.
        batch: As for `profile`.
        seed: Of the design of builds and the samples that weights are refitted on.
        time_limit_s: Seconds of the whole run. The profile takes what refitting, sensitivities and the closed loop leave;
            sensitivities are of fewer samples where time is short, and there are fewer rounds. What an answer needs is done in any
            case: builds of the narrowest widths, losses on one batch of samples, one round.
        mode: `context`, or `sandwiched`, which keeps every width whole; see `profile`.
        axes: What may be chosen, `width`, `precision` or both, `residual` beside `width`, and `storage` beside `precision`,
            which a budget on size brings with it.
        keep: Patterns of names of units whose channels all stay.
        builds: As for `profile`.
        load: As for `profile`, while verifying as well.
        prior: As for `profile`.
        lock_clocks: As for `profile`, while verifying as well.
        energy: As for `profile`; a budget on energy brings it with it.
        progress: As for `profile`.

    Returns:
        The report of the deployed allocation.

    Raises:
        Infeasible: No allocation is predicted to meet the budgets; it names the least that can.
        BudgetMissed: None met them as measured, in five rounds or those that there was time for; the nearest is left in `out`.
        IncompatibleTables: `out` holds files of something else.
        InvalidInput: A budget or an option is malformed.
    """
    parsed, axes = parse_budgets(budgets), check_axes(axes)
    _require_searchable(mode, time_limit_s)
    runtime, folder, progress = backends.get(backend), Path(out), progress or Progress.silent()
    with _alone_in(folder, runtime, progress):
        limit = TimeLimit(time_limit_s, clock_of(runtime))  # it does not run while another command is waited for
        stores = "precision" in axes and any(b.column == "size" for b in parsed)
        setup = set_up(
            task, runtime, threads=threads, base=base, batch=batch, load=load,
            axes={*axes, STORAGE} if stores else axes, energy=energy or any(b.column == "energy" for b in parsed),
            clocks=clocks_to_lock(runtime) if lock_clocks else 0,
        )  # fmt: skip
        effort = Effort(time_limit_s, builds, extend=False)
        return _run(
            setup, parsed, folder, effort, limit, mode=mode, axes=axes, seed=seed, keep=keep, prior=_tables(prior, setup),
            progress=progress,
        )  # fmt: skip


def _require_searchable(mode: str, time_limit_s: float) -> None:
    if mode == Mode.ALONE:
        raise InvalidInput("a table of mode alone is a baseline, not to be searched on; run in mode context or sandwiched")
    if time_limit_s <= 0:
        raise InvalidInput(f"the time limit must be positive, got {time_limit_s} s")


@contextmanager
def _alone_in(folder: Path, runtime: Backend, progress: Progress) -> Iterator[None]:
    """A folder and a device that no other command uses meanwhile, and a log of the run in the folder."""
    make_folder(folder)
    with (
        lock_path(folder, say=progress.say),
        lock(fingerprint_for(runtime).id, say=progress.say),
        progress.logged(folder / "run.log"),
    ):
        remove_unfinished(folder)
        progress.plan({PREPARING: math.inf})
        progress.enter(PREPARING)
        progress.start(None, "making the network ready")
        yield


def _run(
    setup: Setup, budgets: Sequence[Budget], folder: Path, effort: Effort, limit: TimeLimit, *,
    mode: str, axes: Sequence[str], seed: int, keep: Sequence[str], prior: Sequence[LatencyTable], progress: Progress,
) -> Report:  # fmt: skip
    """A run whose options are known to be right, stage by stage."""
    _require_sensitivities(folder, setup)  # before an hour of profiling
    table_path, path, weights = folder / "table.parquet", folder / "sens.parquet", folder / "weights"
    timed = any(b.column not in COMPUTED for b in budgets)
    allowance = prepared(
        Allowance(limit, setup, axes), weights, scored=holds_now(setup, path, seed), progress=progress
    )
    if timed:
        stages = allowance.plan(None)
        progress.plan(stages)
        progress.enter(PROFILE)
        progress.say(shared_out(limit, stages))
        effort = replace(effort, time_limit_s=max(limit.left_s, 1e-3), reserve=allowance.reserve)
        table = measure_table(
            setup, table_path, effort, mode=mode, axes=axes, seed=seed, prior=prior, progress=progress
        )
    else:
        table = without_times(setup)
    progress.plan(allowance.plan(table))
    sensitivities = sensitivity_for(
        setup, path, seed=seed, grid=widths_to_score(table, budgets) if "width" in axes else {}, weights=weights,
        bank=allowance.bank, limit=allowance.scoring_limit(table), progress=progress,
    )  # fmt: skip
    progress.enter(LOOP)
    session = Session(setup, table if table.builds else None, limit)
    session.dense_score = allowance.dense_score
    report, _, table = closed_loop(
        session, table, sensitivities, budgets, folder, axes=axes, keep=keep, weights=weights, progress=progress
    )  # fmt: skip
    if timed:
        table.save(table_path)
        _leave_front(front(table, sensitivities, axes=axes, keep=keep), report, folder)
    progress.record(str(report))
    if report.state == State.MISSED:
        raise _missed(report, budgets, folder, late=limit.late())
    return report


def widths_to_score(table: LatencyTable, budgets: Sequence[Budget]) -> Mapping[str, Sequence[int]]:
    """The widths of each channel group that may be chosen under some budgets.

    Those worth their time where only what is measured is bounded; else all that were measured, or, with nothing measured, all.
    """
    if not table.builds:
        return {g: candidate_widths(n) for g, n in table.network.channels.items()}
    return measured_widths(table) if any(b.column in COMPUTED for b in budgets) else table.grid()


def _leave_front(sweep: Front, report: Report, folder: Path) -> None:
    sweep = sweep.with_measured(measured_points(report))
    sweep.save(folder / "front.parquet")
    plot_front(sweep, folder / "front.png")


def _missed(report: Report, budgets: Sequence[Budget], folder: Path, *, late: bool) -> BudgetMissed:
    rounds = f"{report.rounds} round{'' if report.rounds == 1 else 's'}{', all that there was time for' if late else ''}"
    return BudgetMissed(
        f"no allocation met {', '.join(map(str, budgets))} as measured in {rounds}; the nearest measured "
        f"{report.latency_ms['measured']:.4g} ms, {report.size_bytes['deployed']:,.0f} bytes and is in {folder}. "
        f"{'The same command goes on from there; or ask' if late else 'Ask'} for a little more, or profile again on a quieter "
        "machine.",
        nearest=report,
    )


def _require_sensitivities(folder: Path, setup: Setup) -> None:
    path = folder / "sens.parquet"
    if not path.exists():
        return
    try:
        SensitivityTable.load(path).require(setup.network, setup.lowering.int8, weights=False)
    except IncompatibleTables as error:
        raise IncompatibleTables(
            f"{folder} holds the sensitivities of another network, batch or input shape, of one with or without the axis "
            f"residual, or of int8 weights of other bits; run into another folder ({error})"
        ) from error

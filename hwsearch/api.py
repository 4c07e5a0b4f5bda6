"""What Python and the command line have in common: one function for each command that goes from a Task to a result."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import COMPUTED, LOSS, Budget, parse_budgets
from hwsearch.allocate.front import Front
from hwsearch.allocate.search import front
from hwsearch.backends.base import Backend
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import kept_of, of_allocation, parse_variants, with_weights
from hwsearch.deployment.report import Report, measured_points
from hwsearch.deployment.session import Session
from hwsearch.deployment.verify import measure_allocation
from hwsearch.device.fingerprint import clocks_to_lock, fingerprint_for
from hwsearch.device.lock import lock, lock_path
from hwsearch.device.timelimit import TimeLimit
from hwsearch.engine.reference import Reference
from hwsearch.engine.setup import Setup, clock_of, set_up
from hwsearch.errors import BudgetMissed, HwsearchError, IncompatibleTables, InvalidInput
from hwsearch.files import make_folder, remove_unfinished, write_bytes
from hwsearch.latency.staircase import measured_widths
from hwsearch.loading import attribute
from hwsearch.loss.cluster import connected
from hwsearch.loss.sensitivity import holds_now, sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.choices import AXES, RESIDUAL, STORAGE, candidate_widths, check_axes
from hwsearch.network.variants import STORAGE as IN_INT8
from hwsearch.pipeline import surrogate
from hwsearch.pipeline.allowance import LOOP, PREPARING, PROFILE, RECOVERY, Allowance, prepared, shared_out
from hwsearch.pipeline.closed_loop import closed_loop
from hwsearch.pipeline.floor import Held, hold_floor
from hwsearch.pipeline.goal import SAMPLES, Goal
from hwsearch.pipeline.recovering import recovered_answer
from hwsearch.pipeline.runtimes import dense_ratios, run_each
from hwsearch.pipeline.tuning import OBJECTIVES, Tuned, tune
from hwsearch.plot import plot_front
from hwsearch.profiler.machines import profile_on_machines
from hwsearch.profiler.profile import Effort, without_times
from hwsearch.profiler.profile import profile as measure_table
from hwsearch.profiler.reshape import example_shapes, reshaped
from hwsearch.profiler.transfer import comparable
from hwsearch.progress import Progress, spoken
from hwsearch.recovery.gradients import DENSE
from hwsearch.recovery.processes import launched
from hwsearch.recovery.recovery import BATCHNORM, SCALES, SCHEMES, Options, Recovered, Recovery
from hwsearch.schemes import Allocate, Compose, Scheme
from hwsearch.table.header import Mode
from hwsearch.table.section import Shapes
from hwsearch.table.table import LatencyTable
from hwsearch.task import Task

UNTRAINED_S = 600.0
"""What a run takes where no time limit is given, beside its recovery."""
MOST_RECOVERY = 0.9
"""Of a run's time limit, the share that recovery may take."""


def profile(
    task: Task, *, out: str | Path | None = None, backend: str | Backend = "openvino", threads: int = 1, base: str | None = None,
    batch: int | None = None, time_limit_s: float = 600.0, mode: str = "context", axes: Sequence[str] = AXES, seed: int = 0,
    builds: int | None = None, load: int = 0, shape: Shapes | None = None, prior: Sequence[LatencyTable | str | Path] = (),
    lock_clocks: bool = False, energy: bool = False, trace: str | Path | None = None, ray: str | None = None,
    progress: Progress | None = None,
) -> LatencyTable:  # fmt: skip
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
        ray: Address of a Ray cluster, `auto` or `HOST:PORT`: its machines of one kind all profile at once, each with a seed of its
            own, and fill one table, of a task that was loaded by its name. None for this machine alone.
        progress: Shows how far it is; None shows nothing.

    Returns:
        The table: times of whole networks in ns, with what the latency model needs of them.

    Raises:
        DeviceBusy, BackendUnavailable, UntraceableModel: Another profile runs; a runtime builds nothing; a model is not traced.
        IncompatibleTables: `out` or `prior` is of something else.
        InvalidInput: An option is out of range.
    """
    axes, runtime = check_axes(axes), backends.get(backend)
    if ray is not None:
        each = partial(
            profile, backend=backend, threads=threads, base=base, batch=batch, time_limit_s=time_limit_s, axes=axes, builds=builds,
            load=load, shape=shape, lock_clocks=lock_clocks, energy=energy,
        )  # fmt: skip
        return profile_on_machines(ray, task, out, each, mode=mode, trace=trace, seed=seed, prior=prior, progress=progress)
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
    ray: str | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Loss of every (unit, variant) of a backend, and of every (channel group, width), on the task's calibration data.

    What their sum misses is learnt from whole networks put together of them; see `SensitivityTable.correction`.

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
        ray: Address of a Ray cluster whose workers refit and score: `auto` for the one that this machine is in, `local` for one of
            this machine's cores, or `HOST:PORT`; None for this process. The task must have been loaded by its name.
        progress: Shows how far it is; None shows nothing.

    Returns:
        Mean loss a sample of each choice, with everything else dense fp32 and whole.

    Raises:
        UntraceableModel: The model cannot be traced.
        IncompatibleTables: `out` or `table` is of another network or kind of int8; workers find another task by its name.
        InvalidInput: An option is out of range.
        HwsearchError: Ray is not installed, or nothing answers at the address.
    """
    all_axes = set(check_axes(axes))
    if table is not None:
        batch = table.header.options.get("batch") if batch is None else batch
        if table.header.options.get("residual"):
            all_axes.add(RESIDUAL)
        if any(str(IN_INT8) in variants for variants in table.offered().values()):
            all_axes.add(STORAGE)
    with connected(ray, task) as cluster:
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
        return sensitivity_for(setup, out, seed=seed, grid=grid, weights=weights, cluster=cluster, progress=progress)


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
        weights: Folder of refitted weights, or file of trained ones, as for `deploy`.
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
    deployed = with_weights(setup, allocation, weights)
    report, _ = measure_allocation(Session(setup, table), allocation, deployed, table=table)
    if out is not None:
        report.save(out)
    return report


def recover(
    task: Task,
    allocation: Allocation,
    out: str | Path | None = None,
    *,
    epochs: int | None = None,
    time_limit_s: float | None = None,
    method: str = "ste",
    gradients: str = DENSE,
    scales: str = SCALES[0],
    batchnorm: str = BATCHNORM[0],
    rate: float | None = None,
    seed: int = 0,
    weights: str | Path | None = None,
    backend: str | Backend | None = None,
    scored: bool = True,
    progress: Progress | None = None,
) -> Recovered:
    """Train what a search chose: the network of an allocation, as it is deployed, from its refitted weights on.

    What is made small is the divergence from the dense network's outputs, with the task's `loss` on its `train` added where it has
    them. The best weights on held-out calibration data are kept: never worse there than the refitted ones. A training that was
    killed goes on where it was a minute before, with the same result, when the same is called again. It trains on a GPU where there
    is one, and in processes that `accelerate launch` started shares every minibatch among them.

    Args:
        task: What the allocation is of.
        allocation: An answer of `search`.
        out: File for the weights, which `deploy` and `verify` take; None keeps them in memory, and no checkpoints.
        epochs: Of `Task.train`, or passes over the calibration data; None for 2, or 30 of these, or what the time limit allows.
        time_limit_s: Seconds of the whole recovery; None for no limit.
        method: How weights are led to what is allowed: `ste`, `mask`, `lc`, `srste`, `shrink` or `halfspace`.
        gradients: What the backward products of layers read: `dense`, or pruned by a rule, for hardware that skips zeros (here
            it costs time): `2:4`, `2:4:rescaled`, `2:4:mvue`, `2:4:random`, `stochastic:0.9`, `bdwp:2:8`.
        scales: Of int8 weights: `fixed`, or `learned` with the weights (LSQ).
        batchnorm: `folded` into layers, or `unfolded`: in training mode after them, and folded again into what is deployed.
        rate: The largest learning rate; None tries a few and takes that which ends at the least held-out loss.
        seed: Of every random choice.
        weights: Folder of refitted weights to start from, as for `deploy`.
        backend: As for `verify`: whose arithmetic is trained for.
        scored: Whether `Task.evaluate` is called on the dense, the refitted and the recovered network, simulated in torch.
        progress: Shows how far it is; None shows nothing.

    Returns:
        The weights, and how it went.

    Raises:
        IncompatibleTables: The allocation is of another network.
        InvalidInput: `train` or `loss` does not give what it should; an option is out of range.
        HwsearchError: The loss diverges, or memory is too short; what was reached until then is kept.
    """
    options = Options(epochs, time_limit_s, method, rate, seed, scored, gradients, scales, batchnorm)
    progress = progress or Progress.silent()
    progress.start(None, "making the network ready")
    setup = of_allocation(task, allocation, backend)
    start = with_weights(setup, allocation, weights)
    return Recovery(
        setup.lowering, start.lowering, kept_of(allocation, setup.network), parse_variants(allocation), options,
        quantize_outputs=setup.backend.quantize_outputs, out=out, progress=progress,
    ).run()  # fmt: skip


def run(
    task: Task, budgets: Sequence[str | Budget], out: str | Path, *,
    backend: str | Backend | Sequence[str | Backend] = "openvino", threads: int = 1, base: str | None = None,
    batch: int | None = None, seed: int = 0, time_limit_s: float | None = None, mode: str = "context",
    axes: Sequence[str] = AXES, keep: Sequence[str] = (), builds: int | None = None, load: int = 0,
    prior: Sequence[LatencyTable | str | Path] = (), lock_clocks: bool = False, energy: bool = False,
    recover_s: float = 0.0, gradients: str = DENSE, scales: str = SCALES[0], batchnorm: str = BATCHNORM[0],
    floor: str | float | None = None, minimize: str | None = None, samples: int = SAMPLES, ray: str | None = None,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Find and deploy the allocation of least loss that meets the budgets, or of least cost above a floor, as measured here.

    Leaves table.parquet, sens.parquet, alloc.json, model.onnx, report.json, front.png, run.log and refitted weights in `out`.
    Another run there uses what still holds, and says what does not. Without budgets on times there is neither table nor front.

    Args:
        task: What is deployed.
        budgets: Such as `latency=4ms` or `size=25%`, at most one for each cost; with a floor there need be none.
        out: Folder for the results.
        backend: As for `profile`; of several (`openvino,onnxruntime`, a sequence, or `all`) the one that meets the budgets at the
            least measured loss. Each runs in its own folder, in an equal part of the time; shares are of the fastest dense one.
        threads: As for `profile`.
        base: As for `profile`.
        batch: As for `profile`.
        seed: Of the design of builds and the samples that weights are refitted on.
        time_limit_s: Seconds of the whole run; None for 600 beside those of the recovery. The profile takes what is left to it.
            What an answer needs is done in any case: builds of the narrowest widths, losses on one batch, one round.
        mode: `context`, or `sandwiched`, which keeps every width whole; see `profile`.
        axes: `width`, `precision` or both; `residual` beside `width`; `storage` beside `precision`, which a budget on size adds.
        keep: Patterns of names of units whose channels all stay.
        builds: As for `profile`.
        load: As for `profile`, while verifying as well.
        prior: As for `profile`.
        lock_clocks: As for `profile`, while verifying as well.
        energy: As for `profile`; a budget on energy brings it with it.
        recover_s: Seconds of the time limit to train the answer in, as `recover` does; it is measured again. 0: it is not trained.
        gradients: Of that training, as for `recover`.
        scales: Of that training, as for `recover`.
        batchnorm: Of that training, as for `recover`.
        floor: Least score of the answer: `99%` of the dense score, `-0.5pt` or `0.93`; the cheapest network that holds it is found.
        minimize: With a floor, the cost that is least: `latency` (also None), `size`, `energy` or `macs`.
        samples: With a floor, how many networks are measured at most in this call; those of earlier calls in `out` are used again.
        ray: As for `sensitivity`; nothing is connected while this machine is measured.
        progress: As for `profile`.

    Returns:
        The report of the deployed allocation.

    Raises:
        Infeasible: No allocation is predicted to meet the budgets, or to hold the floor within them; it names the least that can.
        BudgetMissed: None met budgets and floor as measured, in the rounds that there was time for; the nearest is left in `out`.
        IncompatibleTables: `out` holds files of something else.
        InvalidInput: A budget or an option is malformed.
    """
    goal, axes = Goal.of(floor, minimize, samples), check_axes(axes)
    parsed = parse_budgets(budgets) if budgets or goal is None else ()
    time_limit_s = UNTRAINED_S + recover_s if time_limit_s is None else time_limit_s
    _require_searchable(parsed, mode, time_limit_s, recover_s)
    _recovery(recover_s, gradients, scales, batchnorm)
    runtimes, folder, progress = backends.several(backend), Path(out), progress or Progress.silent()
    own: dict[str, Any] = {"threads": threads, "base": base, "load": load}
    options: dict[str, Any] = {
        "batch": batch, "seed": seed, "mode": mode, "axes": axes, "keep": keep, "builds": builds, "prior": prior,
        "lock_clocks": lock_clocks, "energy": energy, "gradients": gradients, "scales": scales, "batchnorm": batchnorm,
        "ray": ray, "progress": progress, **own,
    }  # fmt: skip
    if len(runtimes) > 1:
        _require_one(goal, runtimes)
        return _run_several(partial(run, task, **options), task, runtimes, parsed, folder, (time_limit_s, recover_s), own, progress)
    return _run_alone(task, runtimes[0], parsed, goal, folder, (time_limit_s, recover_s), **options)


def bayes(
    task: Task, scheme: Scheme | str, out: str | Path, *,
    floor: str | float, minimize: str = "size", samples: int = SAMPLES, recover: str | None = None,
    backend: str | Backend = "openvino", threads: int = 1, batch: int | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> Tuned:  # fmt: skip
    """Find the free numbers of a scheme: the network of least cost whose measured score holds a floor, in at most ten samples.

    Stage one finds where the score falls below the floor, stage two the least cost within it; the dense network is known without a
    sample, and is the answer where nothing cheaper holds. Samples are scored by the task's `validate`, or by agreement with the
    dense network; `evaluate` scores the answer alone. With `recover` each sample is trained before it is measured.

    Leaves model.onnx, report.json, bayes.png, run.log and a folder for each sample in `out`. Another call there uses the samples
    again, with another floor as well, where the network, the data, the device and the weights that the scheme makes are the same.

    Args:
        task: What is compressed.
        scheme: With one to three free parameters; or where it is, as `file.py:NAME`: a scheme, or a function that returns one.
        out: Folder for the results.
        floor: Least score of the answer: `99%` of the dense score, `-0.5pt` or `0.93`.
        minimize: The cost that is least: `size` (of the packed weights, computed), `latency` (measured) or `macs`.
        samples: How many networks are measured at most for this floor and cost, in all calls, with those that fail.
        recover: How each sample is trained: `lc:steps=12`, `mask:epochs=2`, `mask:5m,lr=1e-3`, or epochs (`2`) or a duration
            (`5m`) alone; None trains nothing. Answers of `Allocate` are trained as by `recover`, and may have its methods.
        backend: Name of a backend, or a backend.
        threads: Inference threads.
        batch: Batch size; None for that of the example inputs.
        seed: Of the fits, and of the training.
        progress: Shows how far it is; None shows nothing.

    Returns:
        The report: the numbers, the final score, the costs, and every sample.

    Raises:
        BudgetMissed: The final score does not hold the floor; the answer is left in `out`.
        BackendUnavailable: scikit-optimize is not installed (`pip install 'hwsearch[bayes]'`), or the runtime is not.
        InvalidInput: The scheme or an option is not what it must be, the scheme cannot be trained, or the dense network does not
            hold the floor.
    """
    surrogate.require()
    scheme = _scheme(scheme)
    training = None if recover is None else _training(recover, scheme)
    goal = Goal.of(floor, minimize, samples)
    assert goal is not None
    if goal.minimize not in OBJECTIVES:
        raise InvalidInput(f"{minimize!r} cannot be minimised over a scheme; expected one of {', '.join(OBJECTIVES)}")
    runtime, folder, progress = backends.get(backend), Path(out), progress or Progress.silent()
    with _alone_in(folder, progress), lock(fingerprint_for(runtime).id, say=progress.say):
        progress.plan({})
        setup = set_up(task, runtime, threads=threads, base="fp32", batch=batch)
        return tune(Session(setup), scheme, goal, folder, training=training, seed=seed, progress=progress)


def _training(recover: str, scheme: Scheme) -> Options:
    """How samples of a scheme are trained."""
    allocates = _allocates(scheme)
    options = Options.parse(recover, Options.method if allocates else SCHEMES[0])
    if not allocates and options.method not in SCHEMES:
        raise InvalidInput(
            f"--recover {recover}: {options.method} trains allocations, and a scheme is trained by {' or '.join(SCHEMES)}"
        )
    return options


def _scheme(scheme: Scheme | str) -> Scheme:
    """A scheme as it is given, or the one that is named."""
    if isinstance(scheme, str):
        found = attribute(scheme, "scheme")
        if callable(found) and not isinstance(found, Scheme):
            try:
                found = found()
            except InvalidInput:
                raise
            except Exception as error:
                raise InvalidInput(f"{scheme} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Scheme):
            what = "not there" if found is None else type(found).__name__
            raise InvalidInput(
                f"{scheme} is {what}; expected a hwsearch scheme, e.g. scheme = hs.schemes.Prune(), or a function without "
                "arguments that returns one"
            )
        scheme = found
    if isinstance(scheme, Compose) and len(scheme.schemes) > 1 and _allocates(scheme):
        raise InvalidInput(
            "the scheme is Allocate and other steps: what is deployed of Allocate is its allocation, with weights refitted, in "
            "which other steps leave nothing; search over Allocate alone, or over the other steps"
        )
    return scheme


def _allocates(scheme: Scheme) -> bool:
    return isinstance(scheme, Allocate) or (isinstance(scheme, Compose) and any(map(_allocates, scheme.schemes)))


def _run_alone(
    task: Task, runtime: Backend, budgets: Sequence[Budget], goal: Goal | None, folder: Path, limits: tuple[float, float], *,
    axes: Sequence[str], builds: int | None, prior: Sequence[LatencyTable | str | Path], lock_clocks: bool, energy: bool,
    ray: str | None, progress: Progress, mode: str, seed: int, keep: Sequence[str], gradients: str, scales: str, batchnorm: str,
    **options: Any,
) -> Report:  # fmt: skip
    """A run on one runtime. limits: seconds of all of it, and of recovery of that; options: of the setup."""
    columns = _columns(budgets, goal)
    with _alone_in(folder, progress), lock(fingerprint_for(runtime).id, say=progress.say):
        limit = TimeLimit(limits[0] - limits[1], clock_of(runtime))  # it does not run while another command is waited for
        setup = set_up(
            task, runtime, axes=_with_storage(axes, columns), energy=energy or "energy" in columns,
            clocks=clocks_to_lock(runtime) if lock_clocks else 0, **options,
        )  # fmt: skip
        return _run(
            setup, budgets, folder, Effort(limits[0], builds, extend=False), limit, goal=goal, mode=mode, axes=axes, seed=seed,
            keep=keep, prior=_tables(prior, setup), recovery=_recovery(limits[1], gradients, scales, batchnorm, seed),
            ray=ray, progress=progress,
        )  # fmt: skip


def _columns(budgets: Sequence[Budget], goal: Goal | None) -> set[str]:
    """The costs that are bounded or minimised."""
    return {b.column for b in budgets} | ({goal.minimize} if goal else set())


def _require_one(goal: Goal | None, runtimes: Sequence[Backend]) -> None:
    if goal is not None:
        names = ", ".join(r.name for r in runtimes)
        raise InvalidInput(f"a floor is searched for on one runtime, and {names} were given; run each into a folder of its own")


def _with_storage(axes: Sequence[str], columns: Collection[str]) -> Sequence[str]:
    """The axes, with `storage` beside `precision` where size is bounded or minimised."""
    stores = "precision" in axes and "size" in columns
    return [*axes, STORAGE] if stores else axes


def _require_searchable(budgets: Sequence[Budget], mode: str, time_limit_s: float, recover_s: float) -> None:
    if any(b.column == LOSS for b in budgets):
        raise InvalidInput("run bounds costs and measures them; a budget on loss is for `hwsearch search --minimize COST`")
    if mode == Mode.ALONE:
        raise InvalidInput("a table of mode alone is a baseline, not to be searched on; run in mode context or sandwiched")
    if time_limit_s <= 0:
        raise InvalidInput(f"the time limit must be positive, got {time_limit_s} s")
    if not 0.0 <= recover_s <= MOST_RECOVERY * time_limit_s:
        raise InvalidInput(
            f"{spoken(recover_s)} of recovery are of the run's time limit, {spoken(time_limit_s)}, of which at most "
            f"{MOST_RECOVERY:.0%} may be; raise the limit, or train afterwards with `hwsearch recover`"
        )


def _recovery(limit_s: float, gradients: str, scales: str, batchnorm: str, seed: int = 0) -> Options | None:
    """How the answer of a run is trained; None where it is not. Raises InvalidInput."""
    if limit_s:
        if launched().count > 1:
            raise InvalidInput("a run measures, which several processes would disturb; run in one, then launch `hwsearch recover`")
        return Options(time_limit_s=limit_s, seed=seed, scored=False, gradients=gradients, scales=scales, batchnorm=batchnorm)
    if (gradients, scales, batchnorm) != (DENSE, SCALES[0], BATCHNORM[0]):
        raise InvalidInput(
            f"gradients {gradients}, scales {scales} and batchnorm {batchnorm} are of a training, and the answer is not trained; "
            "give --recover (recover_s) with them"
        )
    return None


def _run_several(
    one: Callable[..., Report], task: Task, runtimes: Sequence[Backend], budgets: Sequence[Budget], folder: Path,
    limits: tuple[float, float], options: Mapping[str, Any], progress: Progress,
) -> Report:  # fmt: skip
    """Each runtime in turn, in an equal part of the time; see `run_each`.

    limits: Seconds of all of it, and of recovery of that.
    """
    with _alone_in(folder, progress):
        limit = TimeLimit(limits[0], clock_of(runtimes[0]))
        setup = set_up(task, runtimes[0], **options)
        ratios = dense_ratios([replace(setup, backend=r) for r in runtimes], progress.say)
        named = {r.name: r for r in runtimes}

        def run_one(name: str, of_runtime: Sequence[Budget], into: Path, limit_s: float) -> Report:
            recover_s = min(limits[1] / len(runtimes), MOST_RECOVERY * limit_s)
            return one(of_runtime, into, backend=named[name], time_limit_s=limit_s, recover_s=recover_s)

        return run_each(run_one, ratios, budgets, folder, lambda: limit.left_s, progress)


@contextmanager
def _alone_in(folder: Path, progress: Progress) -> Iterator[None]:
    """A folder that no other command uses meanwhile, and a log of the run in it."""
    make_folder(folder)
    with lock_path(folder, say=progress.say), progress.logged(folder / "run.log"):
        remove_unfinished(folder)
        progress.plan({PREPARING: math.inf})
        progress.enter(PREPARING)
        progress.start(None, "making the network ready")
        yield


def _run(
    setup: Setup, budgets: Sequence[Budget], folder: Path, effort: Effort, limit: TimeLimit, *,
    goal: Goal | None, mode: str, axes: Sequence[str], seed: int, keep: Sequence[str], prior: Sequence[LatencyTable],
    recovery: Options | None, ray: str | None, progress: Progress,
) -> Report:  # fmt: skip
    """A run whose options are known to be right, stage by stage."""
    _require_sensitivities(folder, setup)  # before an hour of profiling
    table_path, path, weights = folder / "table.parquet", folder / "sens.parquet", folder / "weights"
    columns = _columns(budgets, goal)
    timed = not columns <= set(COMPUTED)
    reference = Reference(setup)
    with connected(ray, setup.lowering.task) as cluster:
        recovery_s = (recovery.time_limit_s or 0.0) if recovery else 0.0
        allowance = prepared(
            Allowance(limit, setup, axes, reference, recovery_s=recovery_s, samples=goal.samples if goal else 0), weights,
            scored=holds_now(setup, path, seed), progress=progress, cluster=cluster,
        )  # fmt: skip
    if goal is not None:
        goal.floor.of(allowance.dense_score)
    if timed:
        stages, again_s = allowance.plan(None)
        progress.plan(stages, again_s)
        progress.enter(PROFILE)
        progress.say(shared_out(limit, stages, again_s))

        def reserve(table: LatencyTable) -> float:
            progress.revise(*allowance.after_profile(table))
            return allowance.reserve(table)

        effort = replace(effort, time_limit_s=max(limit.left_s, 1e-3), reserve=reserve)
        table = measure_table(
            setup, table_path, effort, mode=mode, axes=axes, seed=seed, prior=prior, reference=reference, progress=progress
        )
    else:
        table = without_times(setup)
    progress.plan(*allowance.plan(table))
    with connected(ray, setup.lowering.task) as cluster:
        sensitivities = sensitivity_for(
            setup, path, seed=seed, grid=widths_to_score(table, columns) if "width" in axes else {}, weights=weights,
            bank=allowance.bank, limit=allowance.scoring_limit(table), cluster=cluster, progress=progress,
        )  # fmt: skip
    progress.enter(LOOP)
    session = Session(setup, table if table.builds else None, limit, progress, reference)
    session.dense_score = allowance.dense_score
    held: Held | None = None
    refits = weights if allowance.bank is None else allowance.bank
    if goal is None:
        report, allocation, table = closed_loop(
            session, table, sensitivities, budgets, folder, axes=axes, keep=keep, weights=refits, progress=progress
        )
    else:
        report, allocation, table, held = hold_floor(
            session, table, sensitivities, budgets, goal, folder, axes=axes, keep=keep, weights=refits, progress=progress
        )
    if timed:
        table.save(table_path)
        _leave_front(front(table, sensitivities, axes=axes, keep=keep), report, folder)
    if recovery is not None and report.state != State.MISSED:
        progress.enter(RECOVERY)
        report = _recovered(session, allocation, report, folder, recovery, table, budgets, weights, progress)
    report = replace(held.judged(report) if held is not None else report, interactions=sensitivities.trust())
    report.save(folder / "report.json")
    progress.record(str(report))
    if report.state == State.MISSED:
        raise held.missed(report, folder) if held is not None else _missed(report, budgets, folder, late=limit.late())
    return report


def _recovered(
    session: Session, allocation: Allocation, report: Report, folder: Path, options: Options, table: LatencyTable,
    budgets: Sequence[Budget], weights: Path, progress: Progress,
) -> Report:  # fmt: skip
    """The report of the trained answer; of the refitted one where training cannot go on, which is said."""
    try:
        return recovered_answer(
            session, allocation, report, folder, options, table=table if table.builds else None, budgets=budgets, weights=weights,
            progress=progress,
        )  # fmt: skip
    except HwsearchError as error:
        progress.say(f"the answer stays as refitted, as it could not be trained: {error}")
        warnings.warn(f"the answer stays as refitted, as it could not be trained: {error}", stacklevel=2)
        return report


def widths_to_score(table: LatencyTable, columns: Collection[str]) -> Mapping[str, Sequence[int]]:
    """The widths of each channel group that may be chosen where some costs are bounded or minimised.

    Those worth their time where only what is measured is; else all that were measured, or, with nothing measured, all.
    """
    if not table.builds:
        return {g: candidate_widths(n) for g, n in table.network.channels.items()}
    return measured_widths(table) if any(c in COMPUTED for c in columns) else table.grid()


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

"""The command line: every command is one step of the Python API.

`--help` has to answer at once, so that torch, pandas and the runtimes are imported inside the commands.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from hwsearch import show
from hwsearch.errors import BudgetMissed, HwsearchError, InvalidInput
from hwsearch.section_options import choosing

if TYPE_CHECKING:
    from hwsearch.report import Report

INTERRUPTED = 130
MISSED = 3


class _Group(TyperGroup):
    """Turns every error into one line on standard error and an exit code; `--debug` adds the traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # it may stand anywhere, before the command or after it
        words = [word for word in words if word != "--debug"] or ["--help"]
        try:
            with warnings.catch_warnings():
                if (
                    not debug and not sys.warnoptions
                ):  # of our dependencies to theirs: nothing a user could act on
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                code = super().main(words, "hwsearch", complete_var, False, windows_expand_args, **extra) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = _explain(error)
            _say(message if debug or not _unforeseen(error) else f"{message}; run again with --debug")
        if code == INTERRUPTED:
            _say("interrupted: what was finished is on disk, the same command goes on from there")
        if standalone_mode:
            sys.exit(code)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """(line for standard error, exit code)."""
    if isinstance(error, HwsearchError):
        return f"error: {error}", error.exit_code
    if isinstance(error, typer.TyperException):  # usage: an unknown option, a missing argument
        path = getattr(getattr(error, "ctx", None), "command_path", "hwsearch")
        return f"error: {error.format_message().rstrip('. ')} (see `{path} --help`)", error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.strerror}: {error.filename}", 1
    return f"error: unexpected {type(error).__name__}: {error}", 1


def _unforeseen(error: Exception) -> bool:
    return not isinstance(error, HwsearchError | typer.TyperException)


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds, layer by layer, the width and the precision that meet a latency or size budget at the least loss of "
    "accuracy, on measured times of compiled code.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 infeasible or budget missed.",
)
table_app = typer.Typer(rich_markup_mode=None, help="Look into a latency table.")
app.add_typer(table_app, name="table")


def main() -> None:
    """Entry point of the console script `hwsearch`."""
    app()


# ---------------------------------------------------------------- arguments

TaskSpec = Annotated[
    str, typer.Argument(metavar="TASK", help="`zoo:NAME`, `file.py:function` or `package.module:function`.")
]
AllocationFile = Annotated[Path, typer.Argument(metavar="ALLOCATION", help="Made by `hwsearch search`.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="File to write.")
]
Backend = Annotated[str, typer.Option(metavar="NAME", help="Runtime; `hwsearch devices` lists them.")]
MaybeBackend = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="Runtime; by default the allocation's.")
]
EngineBackend = Annotated[
    str,
    typer.Option("--backend", metavar="NAME", help="`tensorrt-rtx`, or `tensorrt` for the GPU of this machine."),
]
Threads = Annotated[int, typer.Option(min=1, help="Inference threads.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PRECISION", help="Precision of all that is not int8; by default the runtime's best."
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size; by default that of the example inputs.")]
Axes = Annotated[
    str,
    typer.Option(
        metavar="AXIS[,AXIS]",
        help="What units may differ in: `width,precision`, or one of them; `width,residual,...` also narrows the residual "
        "stream of transformers.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN",
        help="Layers whose channels all stay, for instance 'classifier*'; may be given several times.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="DIR", file_okay=False, help="Folder of refitted weights, made and used again."
    ),
]
Load = Annotated[
    int, typer.Option(min=0, metavar="N", help="Busy workers beside the network while it is measured.")
]
LockClocks = Annotated[
    bool,
    typer.Option(
        "--lock-clocks",
        help="Hold the GPU's clock meanwhile; needs root, and is undone. Others on the GPU feel it.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
TimeLimit = Annotated[str, typer.Option(metavar="DURATION", help="For profiling: 90s, 10m, 1h30m.")]
AnyTable = Annotated[Path, typer.Argument(metavar="FILE", help="Made by `hwsearch profile`.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Picture to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TableFile = Annotated[Path, typer.Option("--table", metavar="FILE", help="Made by `hwsearch profile`.")]
SensitivityFile = Annotated[
    Path, typer.Option("--sensitivity", metavar="FILE", help="Made by `hwsearch sensitivity`.")
]
_BUDGET = typer.Option(
    "--budget",
    metavar="COST=BOUND",
    help="`latency=4ms`, `latency=40%` (of dense fp32), `latency=2.5x` (speed-up), `latency_p99=6ms`, `size=800KB`, "
    "`size=25%`, `macs=50%`, `memory=50%`, `energy=40%` (where it is measured); "
    "may be given several times.",
)
Budgets = Annotated[list[str], _BUDGET]
MaybeBudgets = Annotated[list[str] | None, _BUDGET]

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


def seconds(duration: str) -> float:
    """Seconds of `90s`, `10m`, `1h`, `1h30m` or `90`. Raises InvalidInput."""
    match = _DURATION.fullmatch(duration.strip().lower().replace(" ", ""))
    total = (
        sum(float(n) * unit for n, unit in zip(match.groups("0"), (3600, 60, 1), strict=True))
        if match
        else 0.0
    )
    if total <= 0:
        raise InvalidInput(f"{duration!r} is no duration; expected for instance 90s, 10m, 1h or 1h30m")
    return total


def _usable(backend: str, lock_clocks: bool = False) -> None:
    """Raises BackendUnavailable, or what forbids to lock clocks, before torch and a model take their time to load."""
    from hwsearch import backends, device

    runtime = backends.get(backend)
    runtime.versions(), runtime.bases()
    if lock_clocks:
        device.clocks_to_lock(runtime)


def _axes(text: str) -> list[str]:
    return [axis.strip() for axis in text.split(",") if axis.strip()]


def _version(asked: bool) -> None:
    if asked:
        import hwsearch as hs

        print(f"hwsearch {hs.__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the line.")
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------- commands


@app.command()
def devices(as_json: AsJson = False) -> None:
    """Show this machine, its GPUs and its runtimes."""
    from hwsearch import backends, device, energy, nvidia

    here, found, counter = device.fingerprint(), backends.status(), energy.find()
    gpus, no_gpu = nvidia.told()
    if as_json:
        show.as_json(
            {
                "device": here.to_json(),
                "gpus": [gpu.to_json() for gpu in gpus],
                "no_gpu": no_gpu,
                "backends": [entry.to_json() for entry in found],
                "energy": counter.to_json(),
            }
        )
        return
    measured = f"measured by {counter.source}" if counter.meter else f"not measured: {counter.reason}"
    print(f"{here}\nid {here.id}\nenergy {measured}\n")
    for gpu in gpus:
        print(f"{gpu}\nid {gpu.id}, {gpu.uuid or 'UUID not told'}\n")
    if no_gpu:
        print(f"no GPU: {no_gpu}\n")
    rows = [
        (b.name, ", ".join(b.versions.values()), ", ".join(b.bases), "yes" if b.available else b.reason)
        for b in found
    ]
    show.columns(("backend", "version", "base precisions", "available"), rows)


@app.command()
def doctor(
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Runtime to examine; by default every one that is installed."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="JSON to attach to a bug report; without paths and user names.",
        ),
    ] = None,
    lock_clocks: Annotated[
        bool,
        typer.Option("--lock-clocks", help="Also try whether a GPU's clocks can be locked, for a moment."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Examine what works on this machine. Driver, runtimes, permissions, small engines, the backend contract.

    Exit 1 where something that should work does not.
    """
    from hwsearch.doctor import examine
    from hwsearch.errors import BackendUnavailable
    from hwsearch.progress import Progress

    with Progress() as progress:
        found = examine(backend, lock_clocks=lock_clocks, progress=progress)
    if report is not None:
        found.save(report)
    if as_json:
        show.as_json(found.to_json())
    if backend is not None and not found.backends[0].available:
        raise BackendUnavailable(found.backends[0].reason)
    if not as_json:
        print(found)
    if not found.healthy:
        raise typer.Exit(1)


@app.command()
def profile(
    task: TaskSpec,
    output: Output,
    backend: Backend = "openvino",
    threads: Threads = 1,
    base: Base = None,
    batch: Batch = None,
    time_limit: TimeLimit = "10m",
    mode: Annotated[
        Literal["context", "sandwiched", "alone"],
        typer.Option(
            help="Time units inside whole networks; or between their neighbours only, for networks too large to build whole; or "
            "each alone (a naive baseline). The last two keep every width whole and know no boundaries between precisions."
        ),
    ] = "context",
    axes: Axes = "width,precision",
    load: Load = 0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="[NAME=]SHAPE",
            help="Input shape, batch first, for instance 1x3x160x160; once for each input. By default that of the example.",
        ),
    ] = None,
    prior: Annotated[
        list[Path] | None,
        typer.Option(
            "--prior",
            metavar="FILE",
            help="Table of another network on this device, whose layers need not be learnt again.",
        ),
    ] = None,
    lock_clocks: LockClocks = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a latency table. An interrupted one goes on where it stopped.

    Other options or another shape of the same model become another section of the file.
    """
    limit = seconds(time_limit)
    _usable(backend, lock_clocks)
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress() as progress:
        table = hs.profile(
            hs.load(task), out=output, backend=backend, threads=threads, base=base, batch=batch, time_limit_s=limit,
            mode=mode, axes=_axes(axes), load=load, seed=seed, progress=progress,
            shape=shape or None, prior=prior or (), lock_clocks=lock_clocks,
        )  # fmt: skip
    show.table(table, as_json)


@table_app.command("show")
@choosing
def table_show(
    file: AnyTable,
    section: dict[str, Any],
    as_json: AsJson = False,
) -> None:
    """Show what a latency table holds. Also where it is from, and how well it predicts; of several, which there are."""
    import hwsearch as hs

    tables = hs.LatencyTable.sections(file, **section)
    if len(tables) == 1:
        show.table(tables[0], as_json)
    else:
        show.sections(tables, as_json)


@table_app.command("staircase")
@choosing
def table_staircase(
    file: AnyTable,
    section: dict[str, Any],
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show what each channel group costs at each width. Kept are those faster than every wider one kept."""
    import hwsearch as hs

    table = hs.LatencyTable.load(file, **section)
    if plot is not None:
        hs.plot_staircase(table, plot)
    show.staircase(table, as_json)


@table_app.command("diagnose")
@choosing
def table_diagnose(
    file: AnyTable,
    section: dict[str, Any],
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show what the latency model gets wrong. Each build predicted without itself, and what the errors go with."""
    import hwsearch as hs
    from hwsearch.diagnosis import diagnose
    from hwsearch.latency import fit

    model = fit(hs.LatencyTable.load(file, **section))
    if plot is not None:
        hs.plot_diagnosis(model, plot)
    show.diagnosis(diagnose(model), as_json)


@table_app.command("check")
@choosing
def table_check(
    file: AnyTable,
    section: dict[str, Any],
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="The task that was profiled; a table of the zoo finds its own."),
    ] = None,
    builds: Annotated[int, typer.Option(min=1, help="How many builds to measure again.")] = 5,
    lock_clocks: LockClocks = False,
    as_json: AsJson = False,
) -> None:
    """Measure a handful of a table's builds again. Whether it still holds on this device; exit 1 if not."""
    import hwsearch as hs
    from hwsearch.api import table_of_task
    from hwsearch.progress import Progress

    own = None if task is None else hs.load(task)
    table = hs.LatencyTable.load(file, **section) if own is None else table_of_task(file, own, **section)
    with Progress() as progress:
        found = hs.check(table, own, builds=builds, lock_clocks=lock_clocks, progress=progress)
    show.check(found, as_json)
    if not found.holds:
        raise typer.Exit(1)


@app.command()
@choosing
def sensitivity(
    task: TaskSpec,
    output: Output,
    section: dict[str, Any],
    backend: Backend = "openvino",
    base: Base = None,
    batch: Batch = None,
    axes: Axes = "width,precision",
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Latency table, to score just the widths that it found."),
    ] = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score what each variant of each unit and each width of each channel group loses. On calibration data."""
    if section and table is None:
        raise InvalidInput(f"--{next(iter(section))} chooses a table of a file; give it with --table")
    _usable(backend)
    import hwsearch as hs
    from hwsearch.api import table_of_task
    from hwsearch.progress import Progress

    own = hs.load(task)
    found = None if table is None else table_of_task(table, own, batch=batch, base=base, **section)
    with Progress() as progress:
        scores = hs.sensitivity(
            own, out=output, backend=backend, base=base, batch=batch, axes=_axes(axes), weights=weights, seed=seed,
            table=found, progress=progress,
        )  # fmt: skip
    show.sensitivity(scores, as_json)


@app.command()
@choosing
def search(
    table: TableFile, sensitivity: SensitivityFile, budget: Budgets, output: Output, section: dict[str, Any],
    axes: Axes = "width,precision", keep: Keep = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find the best allocation under budgets. The one of least predicted loss, solved exactly."""
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    allocation = hs.search(
        hs.LatencyTable.load(table, network=scores.network.fingerprint, **section),
        scores,
        budget,
        axes=_axes(axes),
        keep=keep or (),
    )
    allocation.save(output)
    show.allocation(allocation, as_json)


@app.command()
@choosing
def front(
    table: TableFile,
    sensitivity: SensitivityFile,
    output: Output,
    section: dict[str, Any],
    over: Annotated[
        Literal["latency", "size", "memory"], typer.Option(help="The cost that is swept.")
    ] = "latency",
    points: Annotated[int, typer.Option(min=2, help="Budgets to sweep.")] = 20,
    budget: MaybeBudgets = None,
    axes: Axes = "width,precision",
    keep: Keep = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Sweep a budget. The allocations that no other beats in both loss and cost."""
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    found = hs.front(
        hs.LatencyTable.load(table, network=scores.network.fingerprint, **section), scores, over=over, points=points,
        budgets=budget or (), axes=_axes(axes), keep=keep or (),
    )  # fmt: skip
    found.save(output)
    if plot is not None:
        hs.plot_front(found, plot)
    show.front(found, as_json)


@app.command()
def deploy(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Output,
    backend: MaybeBackend = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Write the ONNX file of an allocation."""
    import hwsearch as hs
    from hwsearch.allocation import Allocation

    chosen = Allocation.load(allocation)
    _usable(backend or chosen.backend)
    deployed = hs.deploy(hs.load(task), chosen, output, backend=backend, weights=weights)
    if as_json:
        show.as_json({"path": str(deployed.path), "size_bytes": deployed.size_bytes})
    else:
        print(f"{deployed.path}: {show.size(deployed.size_bytes)}")


@app.command()
def build(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Output,
    target: Annotated[
        str | None, typer.Option(metavar="SM", help="GPU architecture, for instance sm86; `tensorrt-rtx` needs one.")
    ] = None,
    backend: EngineBackend = "tensorrt-rtx",
    base: Annotated[
        str | None,
        typer.Option(metavar="PRECISION", help="Instead of the allocation's own: fp16, bf16, fp32 or tf32."),
    ] = None,
    weights: Weights = None,
    as_json: AsJson = False,
) -> None:
    """Write the serialised engine of an allocation for a GPU. With `tensorrt-rtx` no GPU is needed here."""
    import hwsearch as hs
    from hwsearch.allocation import Allocation

    chosen = Allocation.load(allocation)
    made = hs.build(hs.load(task), chosen, output, target=target, backend=backend, base=base, weights=weights)
    show.engine_file(made, as_json)


@app.command()
def check(
    task: TaskSpec,
    target: Annotated[
        str, typer.Option(metavar="SM[,SM]", help="GPU architectures, for instance sm75,sm80,sm86,sm89,sm120.")
    ],
    base: Annotated[
        str, typer.Option(metavar="PRECISION", help="Precision of all that is not quantized: fp16, bf16, fp32, tf32.")
    ] = "fp16",
    backend: EngineBackend = "tensorrt-rtx",
    batch: Batch = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also list the fused layers of every engine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell which variants are legal on which GPU. NVIDIA's builder is asked, on any machine; nothing is timed."""
    names = [name.strip() for name in target.split(",") if name.strip()]
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress() as progress:
        found = hs.check_targets(hs.load(task), names, base=base, backend=backend, batch=batch, progress=progress)
    show.verdicts(found, as_json, layers=layers)


@app.command()
def verify(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Output,
    backend: MaybeBackend = None,
    threads: Annotated[int | None, typer.Option(min=1, help="By default the allocation's.")] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency table that the allocation was searched on.")
    ] = None,
    weights: Weights = None,
    lock_clocks: LockClocks = False,
    as_json: AsJson = False,
) -> None:
    """Measure an allocation. Latency, score and size, beside what was predicted; exit 3 if a budget is missed."""
    import hwsearch as hs
    from hwsearch.allocation import Allocation

    chosen = Allocation.load(allocation)
    _usable(backend or chosen.backend, lock_clocks)
    known = None
    if table is not None:
        known = hs.LatencyTable.load(table, network=chosen.network, like=chosen.options)
    report = hs.verify(
        hs.load(task),
        chosen,
        backend=backend,
        threads=threads,
        table=known,
        weights=weights,
        lock_clocks=lock_clocks,
    )
    report.save(output)
    _finish(report, as_json)


@app.command()
def run(
    task: TaskSpec,
    budget: Budgets,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for everything.")
    ],
    backend: Backend = "openvino",
    threads: Threads = 1,
    base: Base = None,
    batch: Batch = None,
    axes: Axes = "width,precision",
    keep: Keep = None,
    load: Load = 0,
    seed: Seed = 0,
    time_limit: TimeLimit = "10m",
    as_json: AsJson = False,
) -> None:
    """Do all of it, until the budget holds. Profile, score, search, deploy, verify; uses what DIR already has."""
    limit = seconds(time_limit)
    _usable(backend)
    import hwsearch as hs
    from hwsearch.progress import Progress

    try:
        with Progress() as progress:
            report = hs.run(
                hs.load(task), budget, out, backend=backend, threads=threads, base=base, batch=batch, seed=seed,
                axes=_axes(axes), keep=keep or (), load=load, time_limit_s=limit, progress=progress,
            )  # fmt: skip
    except BudgetMissed as error:
        if error.nearest is not None:
            show.report(cast("Report", error.nearest), as_json, out)
        raise
    _finish(report, as_json, out)


def _finish(report: Report, as_json: bool, folder: Path | None = None) -> None:
    show.report(report, as_json, folder)
    if not report.met:
        _say("missed: the network does not meet its budget as measured")
        raise typer.Exit(MISSED)

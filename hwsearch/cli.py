"""The command line: every command is one step of the Python API.

`--help` has to answer at once, so that torch, pandas and the runtimes are imported inside the commands.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

from hwsearch.errors import BudgetMissed, HwsearchError, InvalidInput

if TYPE_CHECKING:
    from hwsearch.allocate.front import Front
    from hwsearch.allocation import Allocation
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
        return f"error: {error.format_message().rstrip('. ')}; see `{path} --help`", error.exit_code
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
    help="Finds, layer by layer, the precision that meets a latency or size budget at the least loss of accuracy, "
    "on measured times of compiled code.",
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
Threads = Annotated[int, typer.Option(min=1, help="Inference threads.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PRECISION", help="Precision of all that is not int8; by default the runtime's best."
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size; by default that of the example inputs.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
TimeLimit = Annotated[str, typer.Option(metavar="DURATION", help="For profiling: 90s, 10m, 1h30m.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
TableFile = Annotated[Path, typer.Option("--table", metavar="FILE", help="Made by `hwsearch profile`.")]
SensitivityFile = Annotated[
    Path, typer.Option("--sensitivity", metavar="FILE", help="Made by `hwsearch sensitivity`.")
]
_BUDGET = typer.Option(
    "--budget",
    metavar="COST=BOUND",
    help="`latency=4ms`, `latency=40%` (of dense fp32), `latency=2.5x` (speed-up), `size=800KB`, `size=25%`; "
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
    """Show this machine and its runtimes."""
    from hwsearch import backends, device

    here, found = device.fingerprint(), backends.status()
    if as_json:
        _print_json({"device": here.to_json(), "backends": [entry.to_json() for entry in found]})
        return
    print(f"{here}\nid {here.id}\n")
    rows = [
        (b.name, ", ".join(b.versions.values()), ", ".join(b.bases), "yes" if b.available else b.reason)
        for b in found
    ]
    _print_table(("backend", "version", "base precisions", "available"), rows)


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
        Literal["context", "isolated"],
        typer.Option(help="Time units inside whole networks, or each by itself (the baseline)."),
    ] = "context",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a latency table. An interrupted one goes on where it stopped."""
    limit = seconds(time_limit)
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress() as progress:
        table = hs.profile(
            hs.load(task), out=output, backend=backend, threads=threads, base=base, batch=batch, time_limit_s=limit,
            mode=mode, seed=seed, progress=progress,
        )  # fmt: skip
    _print_json(table.to_json()) if as_json else print(table.summary())


@table_app.command("show")
def table_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `hwsearch profile`.")],
    as_json: AsJson = False,
) -> None:
    """Show what a latency table holds. Also where it is from, and how well it predicts."""
    import hwsearch as hs

    table = hs.LatencyTable.load(file)
    _print_json(table.to_json()) if as_json else print(table.summary())


@app.command()
def sensitivity(
    task: TaskSpec,
    output: Output,
    backend: Backend = "openvino",
    base: Base = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score what each variant of each unit loses. On calibration data."""
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress() as progress:
        scores = hs.sensitivity(
            hs.load(task), out=output, backend=backend, base=base, seed=seed, progress=progress
        )
    if as_json:
        _print_json(
            {
                "network": scores.network.name,
                "divergence": scores.divergence,
                "samples": scores.samples,
                "rank_correlation": scores.rank_correlation,
                "loss": scores.loss,
            }
        )
        return
    worst = sorted(scores.loss.items(), key=lambda item: -max(item[1].values()))
    variants = list(dict.fromkeys(variant for row in scores.loss.values() for variant in row))
    rows = [(unit, *(f"{row[v]:.2e}" if v in row else "-" for v in variants)) for unit, row in worst[:10]]
    _print_table(("most sensitive units", *variants), rows)
    tau = "not known" if scores.rank_correlation is None else f"{scores.rank_correlation:.2f}"
    print(
        f"{len(worst)} units, {scores.divergence} divergence on {scores.samples} samples; rank correlation of "
        f"predicted and simulated loss of whole allocations: {tau}"
    )


@app.command()
def search(
    table: TableFile, sensitivity: SensitivityFile, budget: Budgets, output: Output, as_json: AsJson = False
) -> None:
    """Find the best allocation under budgets. The one of least predicted loss, solved exactly."""
    import hwsearch as hs

    allocation = hs.search(hs.LatencyTable.load(table), hs.SensitivityTable.load(sensitivity), budget)
    allocation.save(output)
    _show_allocation(allocation, as_json)


@app.command()
def front(
    table: TableFile,
    sensitivity: SensitivityFile,
    output: Output,
    over: Annotated[Literal["latency", "size"], typer.Option(help="The cost that is swept.")] = "latency",
    points: Annotated[int, typer.Option(min=2, help="Budgets to sweep.")] = 20,
    budget: MaybeBudgets = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Picture to write.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sweep a budget. The allocations that no other beats in both loss and cost."""
    import hwsearch as hs

    found = hs.front(
        hs.LatencyTable.load(table), hs.SensitivityTable.load(sensitivity), over=over, points=points,
        budgets=budget or (),
    )  # fmt: skip
    found.save(output)
    if plot is not None:
        hs.plot_front(found, plot)
    _show_front(found, as_json)


@app.command()
def deploy(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Output,
    backend: MaybeBackend = None,
    as_json: AsJson = False,
) -> None:
    """Write the ONNX file of an allocation."""
    import hwsearch as hs
    from hwsearch.allocation import Allocation

    chosen = Allocation.load(allocation)
    deployed = hs.deploy(hs.load(task), chosen, output, backend=backend)
    if as_json:
        _print_json({"path": str(deployed.path), "size_bytes": deployed.size_bytes})
    else:
        print(f"{deployed.path}: {_bytes(deployed.size_bytes)}")


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
    as_json: AsJson = False,
) -> None:
    """Measure an allocation. Latency, score and size, beside what was predicted; exit 3 if a budget is missed."""
    import hwsearch as hs
    from hwsearch.allocation import Allocation

    chosen = Allocation.load(allocation)
    known = None if table is None else hs.LatencyTable.load(table)
    report = hs.verify(hs.load(task), chosen, backend=backend, threads=threads, table=known)
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
    seed: Seed = 0,
    time_limit: TimeLimit = "10m",
    as_json: AsJson = False,
) -> None:
    """Do all of it, until the budget holds. Profile, score, search, deploy, verify; uses what DIR already has."""
    limit = seconds(time_limit)
    import hwsearch as hs
    from hwsearch.progress import Progress

    try:
        with Progress() as progress:
            report = hs.run(
                hs.load(task), budget, out, backend=backend, threads=threads, base=base, batch=batch, seed=seed,
                time_limit_s=limit, progress=progress,
            )  # fmt: skip
    except BudgetMissed as error:
        if error.nearest is not None:
            _show_report(cast("Report", error.nearest), as_json, out)
        raise
    _finish(report, as_json, out)


# ---------------------------------------------------------------- output


def _artifacts(folder: Path) -> dict[str, Path]:
    files = {
        "latency table": "table.parquet",
        "sensitivities": "sens.parquet",
        "allocation": "alloc.json",
        "network": "model.onnx",
        "report": "report.json",
        "plot": "front.png",
    }
    return {what: folder / name for what, name in files.items() if (folder / name).is_file()}


def _show_allocation(allocation: Allocation, as_json: bool) -> None:
    if as_json:
        _print_json(allocation.to_json())
        return
    predicted, dense = allocation.predicted, allocation.dense
    latency, sigma = predicted["latency_ns"] / 1e6, predicted["sigma_ns"] / 1e6
    rows = [
        ("latency", f"{latency:.4g} ± {sigma:.2g} ms", f"{dense['latency_ns'] / 1e6:.4g} ms"),
        ("size", _bytes(predicted["size_bytes"]), _bytes(dense["size_bytes"])),
        ("loss", f"{predicted['loss']:.3g}", "0"),
        ("variants", ", ".join(f"{count} {variant}" for variant, count in allocation.counts().items()), ""),
        ("budgets", ", ".join(str(budget["text"]) for budget in allocation.budgets), ""),
        ("solver", f"{allocation.solver['status']}, gap {allocation.solver['gap']:.2g}", ""),
    ]
    _print_table(("", "predicted", "dense"), rows)


def _show_front(front: Front, as_json: bool) -> None:
    if as_json:
        fields = (
            "label",
            "budget",
            "latency_ns",
            "sigma_ns",
            "size_bytes",
            "loss",
            "dominated",
            "infeasible",
            "gap",
        )
        points = [{field: _finite(getattr(point, field)) for field in fields} for point in front.points]
        _print_json({"over": front.over, "points": points})
        return
    rows = []
    for point in front.points:
        latency, sigma = f"{point.latency_ns / 1e6:.4g}", f" ± {point.sigma_ns / 1e6:.2g}"
        costs = (
            latency + sigma * (point.sigma_ns > 0) + " ms",
            _bytes(point.size_bytes),
            f"{point.loss:.3g}",
        )
        if point.infeasible:
            costs = ("-", "-", "-")
        budget = f"{point.budget / 1e6:.4g} ms" if front.over == "latency" else _bytes(point.budget)
        note = "infeasible" if point.infeasible else "dominated" if point.dominated else ""
        rows.append((point.label if point.measured else budget, *costs, note))
    _print_table((f"{front.over} budget", "latency", "size", "loss", ""), rows)


def _finite(value: Any) -> Any:
    return None if value != value else value


def _finish(report: Report, as_json: bool, folder: Path | None = None) -> None:
    _show_report(report, as_json, folder)
    if not report.met:
        _say("missed: the network does not meet its budget as measured")
        raise typer.Exit(MISSED)


def _show_report(report: Report, as_json: bool, folder: Path | None = None) -> None:
    if as_json:
        _print_json(report.to_json())
        return
    print(report)
    files = {} if folder is None else _artifacts(folder)
    if files:
        print("\n" + "\n".join(f"{what}: {path}" for what, path in files.items()))


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)

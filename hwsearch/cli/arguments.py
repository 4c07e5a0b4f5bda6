"""The arguments and options that several commands take, and how their words are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hwsearch.errors import InvalidInput

TaskSpec = Annotated[
    str, typer.Argument(metavar="TASK", help="`zoo:NAME`, `file.py:function` or `package.module:function`.")
]
AllocationFile = Annotated[Path, typer.Argument(metavar="ALLOCATION", help="Made by `hwsearch search`.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="File to write.")
]
MaybeOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", dir_okay=False,
        help="File to write; may be left out with --json: the result is on standard output alone then.",
    ),
]
Backend = Annotated[str, typer.Option(metavar="NAME", help="`hwsearch devices` lists them.")]
Backends = Annotated[
    str,
    typer.Option(
        "--backend", metavar="NAME[,NAME]",
        help="`hwsearch devices` lists them. Of several, or of `all` that can be used here, the one that meets the budgets at the "
        "least loss; shares of times are of the fastest dense network.",
    ),
]
MaybeBackend = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="By default the allocation's.")
]
EngineBackend = Annotated[
    str,
    typer.Option(
        "--backend", metavar="NAME", help="`tensorrt-rtx`, or `tensorrt` for the GPU of this machine."
    ),
]
MADE = "What the table is of"
"""Panel of the options under which a table is made."""
Threads = Annotated[int, typer.Option(min=1, help="Inference threads.", rich_help_panel=MADE)]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PRECISION",
        help="Base precision: of all that is not quantized; by default the backend's best.",
        rich_help_panel=MADE,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Batch size; by default that of the example inputs.", rich_help_panel=MADE),
]
Axes = Annotated[
    str,
    typer.Option(
        metavar="AXIS[,AXIS]",
        help="What units may differ in: `width,precision`, or one of them; `width,residual,...` also narrows the residual "
        "stream of transformers, `precision,storage,...` also stores weights in int8 that are computed with in floating point "
        "(`run` does with a budget on size).",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN[=VARIANT]",
        help="Units whose channels all stay, for instance 'classifier*'; head=dense.fp32: and that become only that; may be given "
        "several times.",
    ),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option(
        "--forbid",
        metavar="PATTERN:VARIANT[,VARIANT]",
        help="What units may not become, for instance 'features.*:int8' or '*:2:4.*'; may be given several times.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="PATTERN:VARIANT[,VARIANT]",
        help="What alone units may become, for instance 'features.*:fp32'; may be given several times.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="DIR", file_okay=False, help="Folder of refitted weights, made and used again."
    ),
]
AnyWeights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="DIR|FILE",
        help="Folder of refitted weights, made and used again; or file of trained weights, made by `hwsearch recover`.",
    ),
]
Load = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Busy workers beside the network while it is measured.", rich_help_panel=MADE
    ),
]
LockClocks = Annotated[
    bool,
    typer.Option(
        "--lock-clocks",
        help="Hold the GPU's clock meanwhile; needs root, and is undone. Others on the GPU feel it.",
        rich_help_panel=MADE,
    ),
]
Prior = Annotated[
    list[Path] | None,
    typer.Option(
        "--prior",
        metavar="FILE",
        help="Table of another network on this device, whose units need not be learnt again; may be given several times.",
    ),
]
Energy = Annotated[
    bool,
    typer.Option(
        "--energy", help="Also read a GPU's counter of energy, 6 s for each build; a CPU's is always read."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Refit and score on the workers of a Ray cluster: `auto` (the one that this machine is in), `local` (this machine's "
        "cores) or HOST:PORT. The same results as without.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
TimeLimit = Annotated[str, typer.Option(metavar="DURATION", help="For profiling: 90s, 10m, 1h30m.")]
AnyTable = Annotated[Path, typer.Argument(metavar="FILE", help="Made by `hwsearch profile`.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Picture to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; errors and warnings are still shown.")]
TableFile = Annotated[Path, typer.Option("--table", metavar="FILE", help="Made by `hwsearch profile`.")]
SensitivityFile = Annotated[
    Path, typer.Option("--sensitivity", metavar="FILE", help="Made by `hwsearch sensitivity`.")
]
_BUDGET = typer.Option(
    "--budget",
    metavar="COST=BOUND",
    help="`latency=4ms`, `latency=40%` (of dense fp32), `latency=2.5x` (speed-up), `latency_p99=6ms`, `size=800KB`, "
    "`size=25%`, `macs=50%`, `memory=50%`, `energy=40%` (where it is measured), `loss=0.01` (predicted divergence per sample); "
    "may be given several times.",
)
Budgets = Annotated[list[str], _BUDGET]
MaybeBudgets = Annotated[list[str] | None, _BUDGET]
Floor = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Least score: 99% (of the dense one), -0.5pt or 0.93; the cheapest network that holds it (and budgets) is found.",
    ),
]
Minimize = Annotated[
    Literal["latency", "size", "energy", "macs"] | None,
    typer.Option(help="With --floor: the cost that is to be least; by default latency."),
]
Samples = Annotated[int, typer.Option(min=1, metavar="N", help="With --floor: networks that are measured at most.")]
Gradients = Annotated[
    str,
    typer.Option(
        metavar="RULE",
        help="What backward products of a training read: dense, or pruned by 2:4, 2:4:rescaled, 2:4:mvue, 2:4:random, "
        "stochastic:0.9 or bdwp:2:8. No time is saved here; what hardware would save is estimated.",
    ),
]
BatchNorm = Annotated[
    Literal["folded", "unfolded"],
    typer.Option(
        "--batchnorm",
        help="In a training: folded into layers as it is deployed, or in training mode after them, and folded again at the end.",
    ),
]
Scales = Annotated[
    Literal["fixed", "learned"],
    typer.Option(help="Of int8 weights in a training: those of the refitted ones, or learned with them."),
]

def seconds(duration: str) -> float:
    """Seconds of `90s`, `10m`, `1h`, `1h30m` or `90`. Raises InvalidInput."""
    from hwsearch.progress import seconds_of

    try:
        return seconds_of(duration)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def require_output(output: Path | None, as_json: bool) -> None:
    """Raises InvalidInput where the result would go nowhere that programs can read it from."""
    if output is None and not as_json:
        raise InvalidInput("missing option --output (-o): the file for the result; it may be left out with --json, which prints it")


def require_backend(backend: str, lock_clocks: bool = False) -> None:
    """Raises BackendUnavailable, or what forbids to lock clocks, before torch and a model take their time to load."""
    from hwsearch import backends
    from hwsearch.device import fingerprint as device

    for runtime in backends.several(backend):
        runtime.versions(), runtime.bases()
        if lock_clocks:
            device.clocks_to_lock(runtime)


def axes_of(text: str) -> list[str]:
    """The axes of `width,precision`."""
    return [axis.strip() for axis in text.split(",") if axis.strip()]

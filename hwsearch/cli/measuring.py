"""The two tables of a task: what its layers cost on a device, and what each change of them loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    MADE,
    AsJson,
    Axes,
    Backend,
    Base,
    Batch,
    Energy,
    Load,
    LockClocks,
    MaybeOutput,
    Prior,
    Quiet,
    Ray,
    Seed,
    TaskSpec,
    Threads,
    TimeLimit,
    Weights,
    axes_of,
    require_backend,
    require_output,
    seconds,
)
from hwsearch.cli.sections import choosing
from hwsearch.errors import InvalidInput


def profile(
    task: TaskSpec,
    output: MaybeOutput = None,
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
            rich_help_panel=MADE,
        ),
    ] = None,
    prior: Prior = None,
    lock_clocks: LockClocks = False,
    energy: Energy = False,
    seed: Seed = 0,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Leave in a JSON file where the time went: seconds by what was done."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Profile on all machines of a Ray cluster that are of one kind at the same time, into one table: `auto` (the "
            "cluster that this machine is in) or HOST:PORT.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a latency table. An interrupted one goes on where it stopped.

    Other options or another shape of the same model become another section of the file.
    """
    limit = seconds(time_limit)
    require_output(output, as_json)
    require_backend(backend, lock_clocks)
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress(quiet=quiet) as progress:
        table = hs.profile(
            hs.load(task), out=output, backend=backend, threads=threads, base=base, batch=batch, time_limit_s=limit,
            mode=mode, axes=axes_of(axes), load=load, seed=seed, progress=progress,
            shape=shape or None, prior=prior or (), lock_clocks=lock_clocks, energy=energy, trace=trace, ray=ray,
        )  # fmt: skip
    show.table(table, as_json)


@choosing
def sensitivity(
    task: TaskSpec,
    section: dict[str, Any],
    output: MaybeOutput = None,
    backend: Backend = "openvino",
    base: Base = None,
    batch: Batch = None,
    axes: Axes = "width,precision",
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Latency table, to measure just the widths that it found."),
    ] = None,
    weights: Weights = None,
    seed: Seed = 0,
    ray: Ray = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure sensitivities: the loss of each variant of each unit and each width of each channel group. On calibration data.

    Learns from whole networks what the sum of these losses misses, and says how well it predicts them.
    """
    require_output(output, as_json)
    if section and table is None:
        raise InvalidInput(f"--{next(iter(section))} chooses a table of a file; give it with --table")
    require_backend(backend)
    import hwsearch as hs
    from hwsearch.cli.sections import table_of_task
    from hwsearch.progress import Progress

    own = hs.load(task)
    found = None if table is None else table_of_task(table, own, batch=batch, base=base, **section)
    with Progress(quiet=quiet) as progress:
        scores = hs.sensitivity(
            own, out=output, backend=backend, base=base, batch=batch, axes=axes_of(axes), weights=weights, seed=seed,
            table=found, ray=ray, progress=progress,
        )  # fmt: skip
    show.sensitivity(scores, as_json)

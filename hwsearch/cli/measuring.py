"""The two tables of a task: what its layers cost on a device, and what each change of them loses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    AsJson,
    Axes,
    Backend,
    Base,
    Batch,
    Load,
    LockClocks,
    Output,
    Seed,
    TaskSpec,
    Threads,
    TimeLimit,
    Weights,
    axes_of,
    require_backend,
    seconds,
)
from hwsearch.cli.sections import choosing
from hwsearch.errors import InvalidInput


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
    energy: Annotated[
        bool,
        typer.Option(
            "--energy", help="Also read a GPU's counter of energy, 6 s for each build; a CPU's is always read."
        ),
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a latency table. An interrupted one goes on where it stopped.

    Other options or another shape of the same model become another section of the file.
    """
    limit = seconds(time_limit)
    require_backend(backend, lock_clocks)
    import hwsearch as hs
    from hwsearch.progress import Progress

    with Progress() as progress:
        table = hs.profile(
            hs.load(task), out=output, backend=backend, threads=threads, base=base, batch=batch, time_limit_s=limit,
            mode=mode, axes=axes_of(axes), load=load, seed=seed, progress=progress,
            shape=shape or None, prior=prior or (), lock_clocks=lock_clocks, energy=energy,
        )  # fmt: skip
    show.table(table, as_json)


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
    require_backend(backend)
    import hwsearch as hs
    from hwsearch.cli.sections import table_of_task
    from hwsearch.progress import Progress

    own = hs.load(task)
    found = None if table is None else table_of_task(table, own, batch=batch, base=base, **section)
    with Progress() as progress:
        scores = hs.sensitivity(
            own, out=output, backend=backend, base=base, batch=batch, axes=axes_of(axes), weights=weights, seed=seed,
            table=found, progress=progress,
        )  # fmt: skip
    show.sensitivity(scores, as_json)

"""`hwsearch table ...`: looking into a latency table, and making one of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import AnyTable, AsJson, LockClocks, Plot, Quiet
from hwsearch.cli.ending import Command, say
from hwsearch.cli.sections import choosing
from hwsearch.errors import InvalidInput

app = typer.Typer(
    rich_markup_mode=None, help="Look into a latency table, or merge several.", epilog="Example: hwsearch table show table.parquet"
)


@app.command("show", cls=Command, epilog="Example: hwsearch table show table.parquet --threads 1")
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


@app.command("staircase", cls=Command, epilog="Example: hwsearch table staircase table.parquet --plot stairs.png")
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


@app.command("diagnose", cls=Command, epilog="Example: hwsearch table diagnose table.parquet --plot errors.png")
@choosing
def table_diagnose(
    file: AnyTable,
    section: dict[str, Any],
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Show what the latency model gets wrong. Each build predicted without itself, and what the errors go with."""
    import hwsearch as hs
    from hwsearch.latency.diagnosis import diagnose
    from hwsearch.latency.model import fit

    model = fit(hs.LatencyTable.load(file, **section))
    if plot is not None:
        hs.plot_diagnosis(model, plot)
    show.diagnosis(diagnose(model), as_json)


@app.command("recheck", cls=Command, epilog="Example: hwsearch table recheck table.parquet --task task.py:make_task")
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a handful of a table's builds again. Whether it still holds on this device; exit 1 if not."""
    import hwsearch as hs
    from hwsearch.cli.sections import table_of_task
    from hwsearch.progress import Progress

    own = None if task is None else hs.load(task)
    table = hs.LatencyTable.load(file, **section) if own is None else table_of_task(file, own, **section)
    with Progress(quiet=quiet) as progress:
        found = hs.recheck(table, own, builds=builds, lock_clocks=lock_clocks, progress=progress)
    show.check(found, as_json)
    if not found.holds:
        raise typer.Exit(1)


@app.command("merge", cls=Command, epilog="Example: hwsearch table merge a.parquet b.parquet -o all.parquet")
@choosing
def table_merge(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE...", help="Tables of one network, each of another machine. NAME: the machine's, where not its own."
        ),
    ],
    section: dict[str, Any],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="File to write.")],
    as_json: AsJson = False,
) -> None:
    """Make one table of those that machines of one kind measured. Machines that disagree are named, or refused."""
    import hwsearch as hs
    from hwsearch.table.merging import apart, machine_of_file, merged

    if len(files) < 2:
        raise InvalidInput("merging needs two tables or more")
    named = [machine_of_file(word) for word in files]
    tables = [(name, hs.LatencyTable.load(path, **section)) for name, path in named]
    tables = [(name or ("" if t.machines[0] else path.stem), t) for (name, path), (_, t) in zip(named, tables, strict=True)]
    table = merged(tables)
    if output.exists():
        raise InvalidInput(f"{output} exists and is not overwritten; give another file")
    table.save(output)
    for machine in apart(table):
        if told := machine.against(table.machines[0]):
            say(f"warning: {told}")
    show.table(table, as_json)

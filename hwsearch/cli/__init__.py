"""The command line: every command is one step of the Python API.

`--help` has to answer at once, so that torch, pandas and the runtimes are imported inside the commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hwsearch.cli import deploying, machine, measuring, searching, starting, tables, targets
from hwsearch.cli.ending import Group

app = typer.Typer(
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds, layer by layer, the width and the precision that meet a latency or size budget at the least loss of "
    "accuracy, on measured times of compiled code.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 infeasible or budget missed.",
)
for command in (
    starting.init, machine.devices, machine.doctor, measuring.profile, measuring.sensitivity, searching.search, searching.front,
    deploying.deploy, targets.build, targets.check, deploying.verify, deploying.run,
):  # fmt: skip
    app.command()(command)
app.add_typer(tables.app, name="table")


def main() -> None:
    """Entry point of the console script `hwsearch`."""
    app()


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

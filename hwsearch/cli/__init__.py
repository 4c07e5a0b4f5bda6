"""The command line: every command is one step of the Python API.

`--help` has to answer at once, so that torch, pandas and the runtimes are imported inside the commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hwsearch.cli import deploying, machine, measuring, searching, starting, tables, targets
from hwsearch.cli.ending import Command, Group

app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,  # rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Finds, layer by layer, the width and the precision that meet a latency or size budget at the least loss of "
    "accuracy, on measured times of compiled code.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 infeasible or budget missed.",
)
_TASK, _BUDGET = "task.py:make_task", "--budget latency=50%"
for command, example in (
    (starting.init, "hwsearch init"),
    (machine.devices, "hwsearch devices"),
    (machine.doctor, "hwsearch doctor --backend openvino --report doctor.json"),
    (measuring.profile, f"hwsearch profile {_TASK} -o table.parquet --time-limit 5m"),
    (measuring.sensitivity, f"hwsearch sensitivity {_TASK} -o sens.parquet --table table.parquet --weights weights"),
    (searching.search, f"hwsearch search --table table.parquet --sensitivity sens.parquet {_BUDGET} -o alloc.json"),
    (searching.front, "hwsearch front --table table.parquet --sensitivity sens.parquet -o front.parquet --plot front.png"),
    (searching.bayes, f"hwsearch bayes {_TASK} --scheme my_scheme.py:scheme --floor 98% --minimize size --out out"),
    (deploying.recover, f"hwsearch recover {_TASK} alloc.json -o trained.safetensors --epochs 2"),
    (deploying.deploy, f"hwsearch deploy {_TASK} alloc.json -o model.onnx --weights weights"),
    (targets.build, f"hwsearch build {_TASK} alloc.json --target sm86 -o engine.plan"),
    (targets.check, f"hwsearch check {_TASK} --target sm75,sm80,sm86,sm89,sm120"),
    (deploying.verify, f"hwsearch verify {_TASK} alloc.json -o report.json --table table.parquet --weights weights"),
    (deploying.run, f"hwsearch run {_TASK} {_BUDGET} --out out --time-limit 5m"),
):
    app.command(cls=Command, epilog=f"Example: {example}")(command)
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

"""The options by which every command that reads a latency table chooses one of several in the file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hwsearch.table.table import LatencyTable
    from hwsearch.task import Task

PANEL = "Which table of a file with several"

OPTIONS: dict[str, Any] = {
    name: Annotated[kind, typer.Option(*words, help=f"{help_[0].upper()}{help_[1:]}.", rich_help_panel=PANEL, **more)]
    for name, kind, words, help_, more in (
        ("threads", int | None, (), "so many inference threads", {"min": 1}),
        ("batch", int | None, (), "this batch size", {"min": 1}),
        ("base", str | None, (), "this base precision", {"metavar": "PRECISION"}),
        ("shape", list[str] | None, ("--shape",), "this input shape, for instance 1x3x160x160", {"metavar": "SHAPE"}),
        ("load", int | None, (), "made beside so many busy workers", {"min": 0, "metavar": "N"}),
        ("residual", bool | None, ("--residual/--no-residual",), "with the residual stream as an axis", {}),
        ("cpus", str | None, (), "made on these CPUs, for instance 0,1; '' for all", {"metavar": "LIST"}),
        ("clocks", int | None, (), "made at a GPU clock locked to this; 0 for unlocked", {"min": 0, "metavar": "MHZ"}),
        ("mps", float | None, (), "made under this share of MPS; 0 for none", {"min": 0.0, "max": 100.0, "metavar": "PERCENT"}),
        ("int8_bits", int | None, ("--int8-bits",), "int8 weights of so many bits", {"min": 7, "max": 8, "metavar": "BITS"}),
        ("unsigned", bool | None, ("--unsigned/--signed",), "unsigned int8 activations, or signed ones", {}),
    )
}


def table_of_task(
    path: str | Path, task: Task, *, batch: int | None = None, **wanted: Any
) -> LatencyTable:
    """The table in a file that is of a task's own input shapes, where it has several; wanted: as `LatencyTable.load`."""
    from hwsearch.profiler.reshape import example_shapes
    from hwsearch.table.section import only
    from hwsearch.table.table import LatencyTable

    tables = LatencyTable.sections(path, batch=batch, **wanted)
    sizes = [shape if batch is None else (batch, *shape[1:]) for shape in example_shapes(task)]
    fitting = [t for t in tables if list(t.network.input_shapes) == sizes] or tables
    return fitting[only([t.header.section for t in fitting], path)]


def choosing(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these options added: its argument `section` becomes a dictionary of those that were given.

    What the command has by that name already is its own.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    own = {name: p for name, p in parameters.items() if name != "section"}
    added = {name: kind for name, kind in OPTIONS.items() if name not in own}

    @wraps(command)
    def wrapped(**given: Any) -> None:
        section = {name: given.pop(name) for name in added}
        command(section={k: v for k, v in section.items() if v not in (None, [])}, **given)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in added.items()
    ]
    del wrapped.__wrapped__
    shown: Any = wrapped
    shown.__signature__ = inspect.Signature(
        [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()), *extra]
    )
    shown.__annotations__ = {**{name: p.annotation for name, p in own.items()}, **added, "return": None}
    return wrapped

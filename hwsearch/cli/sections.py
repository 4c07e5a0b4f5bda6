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

_WHICH = "Of a file with several tables, the one"

OPTIONS: dict[str, Any] = {
    "threads": Annotated[int | None, typer.Option(min=1, help=f"{_WHICH} of so many inference threads.")],
    "batch": Annotated[int | None, typer.Option(min=1, help=f"{_WHICH} of this batch size.")],
    "base": Annotated[
        str | None, typer.Option(metavar="PRECISION", help=f"{_WHICH} of this base precision.")
    ],
    "shape": Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="SHAPE", help=f"{_WHICH} of this input shape, for instance 1x3x160x160."
        ),
    ],
    "load": Annotated[
        int | None, typer.Option(min=0, metavar="N", help=f"{_WHICH} made beside so many busy workers.")
    ],
    "residual": Annotated[
        bool | None,
        typer.Option("--residual/--no-residual", help=f"{_WHICH} with the residual stream as an axis."),
    ],
    "cpus": Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"{_WHICH} made on these CPUs, for instance 0,1; '' for all."),
    ],
    "clocks": Annotated[
        int | None,
        typer.Option(
            min=0, metavar="MHZ", help=f"{_WHICH} made at a GPU clock locked to this; 0 for unlocked."
        ),
    ],
    "mps": Annotated[
        float | None,
        typer.Option(
            min=0.0, max=100.0, metavar="PERCENT", help=f"{_WHICH} made under this share of MPS; 0 for none."
        ),
    ],
    "int8_bits": Annotated[
        int | None,
        typer.Option(
            "--int8-bits", min=7, max=8, metavar="BITS", help=f"{_WHICH} of int8 weights of so many bits."
        ),
    ],
    "unsigned": Annotated[
        bool | None,
        typer.Option(
            "--unsigned/--signed", help=f"{_WHICH} of unsigned int8 activations, or of signed ones."
        ),
    ],
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

"""A task file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hwsearch.errors import InvalidInput
from hwsearch.files import make_folder, unwritable

NAME = "task.py"


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", file_okay=False, help="Folder for task.py; made if it is not there.")
    ] = Path(),
) -> None:
    """Write a task file to start from. It has a comment for each field, and runs as it is: `hwsearch run task.py:make_task ...`."""
    path = folder / NAME
    if path.exists() or path.is_symlink():
        raise InvalidInput(f"{path} exists and is not overwritten; give another folder, or move the file away")
    make_folder(folder)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        raise InvalidInput(f"{path} exists and is not overwritten; give another folder") from None
    except OSError as error:
        raise unwritable(path, error) from error
    print(f"{path}: edit it, or run it as it is:\nhwsearch run {path}:make_task --budget latency=50% --out {folder / 'out'}")


def template() -> str:
    """The text of the task file."""
    return Path(__file__).with_name("task_template.py").read_text(encoding="utf-8")

"""Invoking commands, and what stands in the place of what they call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from typer.testing import CliRunner, Result

from hwsearch.cli import app

Install = Callable[..., None]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


class Table:
    asked: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def load(path: Path, **wanted: Any) -> str:
        Table.asked = wanted
        return f"table {path}"


class Scores(str):
    """Sensitivities, or an allocation, of some network."""

    backend = "openvino"
    network = SimpleNamespace(fingerprint="f00")
    options: dict[str, Any] = {"threads": 1}  # noqa: RUF012

    @staticmethod
    def load(path: Path) -> Scores:
        return Scores(f"scores {path}")


class Report:
    def __init__(self, met: bool, unexplained: list[str] | None = None) -> None:
        self.met, self.unexplained = met, unexplained or []
        self.state = "met" if met else "missed"
        self.saved: Path | None = None

    def to_json(self) -> dict[str, bool]:
        return {"met": self.met}

    def __str__(self) -> str:
        return f"the report, met: {self.met}"

    def save(self, path: Path) -> None:
        self.saved = path


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail

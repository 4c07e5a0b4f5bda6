"""Every public name has a docstring of one format (Google's), with all of its parameters."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hwsearch as hs
from hwsearch import errors, schemes, testing
from hwsearch.backends import base

ROOT = Path(__file__).parents[2]

def names_of(module: ModuleType) -> list[str]:
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    return [n for n in getattr(module, "__all__", own) if not n.startswith("_")]


def public() -> Iterator[Any]:
    """Functions, classes, and the public methods and properties of these."""
    for module in (hs, errors, base, schemes, testing):
        for name in names_of(module):
            value = getattr(module, name)
            yield pytest.param(value, id=f"{module.__name__}.{name}")
            if not inspect.isclass(value):
                continue
            for inner, method in vars(value).items():
                if not inner.startswith("_") or inner == "__call__":
                    held = method.__func__ if isinstance(method, staticmethod | classmethod) else method
                    held = getattr(held, "func", held)  # a cached_property
                    if inspect.isfunction(held) or isinstance(held, property):
                        yield pytest.param(held, id=f"{module.__name__}.{name}.{inner}")


def file_of(value: Any) -> str:
    found = value.fget if isinstance(value, property) else value
    return str(Path(inspect.getfile(found)).resolve().relative_to(ROOT))


def sections(text: str) -> dict[str, str]:
    """Title -> text of the sections of a docstring."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Source):\n", inspect.cleandoc(text), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(section: str) -> list[str]:
    """The names that a section describes, in order."""
    return [name.lstrip("*") for name in re.findall(r"^    (\*{0,2}\w+): \S", section, flags=re.M)]


def raised(function: Callable[..., Any]) -> set[str]:
    """Errors of hwsearch that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [n.exc.func.id for n in ast.walk(tree)
             if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and isinstance(n.exc.func, ast.Name)]  # fmt: skip
    return {name for name in calls if hasattr(errors, name)}


def parameters(value: Any) -> list[str]:
    if inspect.isclass(value):
        if issubclass(value, Exception) and "__init__" not in vars(value):
            return []
        if getattr(value, "_is_protocol", False) or value.__init__ is object.__init__:
            return []
    return [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("value", list(public()))
def test_a_public_docstring_tells_all(value: Any) -> None:
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc, "it has no docstring"
    summary = inspect.cleandoc(doc).partition("\n")[0]
    assert summary.endswith("."), f"the first line is no sentence: {summary}"
    found = sections(doc)
    assert not re.search(r"^(Raises|Returns|Args)\b(?!:$)", inspect.cleandoc(doc), flags=re.M), "a section in prose"
    if isinstance(value, property) or (getattr(value, "__name__", "").startswith("test_")):
        return  # a check of the contract takes the fixture alone
    wanted = parameters(value)
    assert described(found.get("Args", "")) == wanted
    if inspect.isclass(value):
        return
    returned = inspect.signature(value).return_annotation
    assert ("Returns" in found) == (returned not in ("None", None)) or _cached(value)
    assert raised(value) <= set(described(found.get("Raises", ""))), "errors that it raises itself"


def _cached(function: Callable[..., Any]) -> bool:
    """Whether it is the function of a cached_property, which reads as an attribute."""
    owner = inspect.getmodule(function)
    for part in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, part)
    return not inspect.isfunction(inspect.getattr_static(owner, function.__name__)) and not isinstance(
        inspect.getattr_static(owner, function.__name__), staticmethod | classmethod
    )


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for name in hs.__all__:
        assert re.search(rf"^\.\. auto(class|function):: {name}$", text, flags=re.M), f"{name} is not in docs/reference.md"

"""A task by name: from a file, a package or the zoo; and any other value of a file or package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwsearch.errors import InvalidInput
from hwsearch.task import Task


def load(spec: str) -> Task:
    """Load a task by name. The function that is named is called without arguments.

    Args:
        spec: `file.py:function`, `package.module:function` or `zoo:NAME`.

    Returns:
        The task that the function returned, with `spec` as its own.

    Raises:
        InvalidInput: the name is malformed, the file or function is absent or fails, or it returns no valid Task.
    """
    source, _, name = spec.rpartition(":")
    if source == "zoo" and name:
        from hwsearch import zoo

        return replace(zoo.load(name), spec=spec)
    function = attribute(spec)
    if not callable(function):
        raise InvalidInput(
            f"{source} has no function {name!r}; expected a function that returns a hwsearch.Task"
        )
    try:
        task = function()
    except InvalidInput:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidInput(f"{spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise InvalidInput(f"{spec} returned {type(task).__name__}; expected a hwsearch.Task")
    _check(task, spec)
    return replace(task, spec=spec)


def attribute(spec: str, what: str = "task") -> Any:
    """What a file or package has under a name; None where it has nothing of that name. what: is named in errors."""
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        wanted = "file.py:NAME or package.module:NAME"
        if what == "task":
            wanted = "file.py:function, package.module:function or zoo:NAME"
        raise InvalidInput(f"{what} {spec!r} is not understood; expected {wanted}")
    return getattr(_module(source, spec, what), name, None)


def _module(source: str, spec: str, what: str) -> Any:
    try:
        if not source.endswith(".py"):
            sys.path.insert(0, "")
            try:
                return importlib.import_module(source)
            finally:
                sys.path.remove("")
        path = Path(source).resolve()
        if not path.is_file():
            raise InvalidInput(f"{what} file {source} does not exist")
        return _execute(path)
    except InvalidInput:
        raise
    except ModuleNotFoundError as error:
        if error.name and not source.endswith(".py") and f"{source}.".startswith(f"{error.name}."):
            raise InvalidInput(f"there is no module {source!r} for {what} {spec!r}") from error
        raise InvalidInput(f"{what} {spec!r} imports {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise InvalidInput(f"{what} {spec!r} cannot be imported: {type(error).__name__}: {error}") from error


def _execute(path: Path) -> Any:
    """The module of a file, whose folder stays on the path: its functions may import siblings when they are called."""
    name = path.stem
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"hwsearch_task_{name}"  # a file named like a library must not replace it
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InvalidInput(f"{path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(found)
    folder, before = str(path.parent), sys.modules.get(name)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def _check(task: Task, spec: str) -> None:
    import torch

    if not isinstance(task.model, torch.nn.Module):
        raise InvalidInput(f"{spec}: model is {type(task.model).__name__}; expected a torch.nn.Module")
    if not callable(task.evaluate):
        raise InvalidInput(f"{spec}: evaluate is not callable; expected evaluate(predict) -> float")
    for name in ("train", "loss"):
        if getattr(task, name) is not None and not callable(getattr(task, name)):
            raise InvalidInput(f"{spec}: {name} is not callable; expected train(epoch) -> batches and loss(outputs, target)")
    if task.validate is not None and not callable(task.validate):
        raise InvalidInput(f"{spec}: validate is not callable; expected validate(predict) -> float")
    if not isinstance(task.example_inputs, torch.Tensor | tuple | list | Mapping):
        kind = type(task.example_inputs).__name__
        raise InvalidInput(f"{spec}: example_inputs is {kind}; expected a tensor, tuple or dict")
    if task.divergence not in ("auto", "kl", "mse"):
        raise InvalidInput(f"{spec}: divergence is {task.divergence!r}; expected auto, kl or mse")
    if not isinstance(task.name, str):
        raise InvalidInput(f"{spec}: name is {type(task.name).__name__}; expected a string")
    if isinstance(task.calibration, torch.Tensor | str) or not isinstance(task.calibration, Sequence):
        raise InvalidInput(
            f"{spec}: calibration is {type(task.calibration).__name__}; expected a list of batches"
        )

"""What TensorRT says: its reasons, which its calls do not return."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import Any

from hwsearch.errors import BackendUnavailable

_KEPT = ("Layers:", "(Sparsity)")
"""What is kept of the verbose messages; there are tens of thousands of others."""
_ERRORS = ("[INTERNAL_ERROR]", "[ERROR]")


@cache
def log_of(trt: Any) -> Any:
    """The one logger of a TensorRT module: an `ILogger` that keeps `lines`, `[ERROR] ...`, which whoever listens may empty.

    TensorRT keeps the first logger that it is given for the life of the process, and uses it for some messages of all others.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity != trt.ILogger.VERBOSE or msg.startswith(_KEPT):
                self.lines.append(f"[{severity.name}] {msg.strip()}")

    return Log()


def started(trt: Any, kind: Any, log: Any) -> Any:
    """A `Runtime` or `Builder` of a module, on a logger whose lines begin anew. Raises BackendUnavailable with its reason.

    Without a driver, or with one too old, bindings raise TypeError; those of 11.4 log the error and hand out an object around
    nothing, whose use and whose destructor end the process. That object is never freed.
    """
    log.lines = []
    made, said = None, ""
    try:
        made = kind(log)
    except (TypeError, RuntimeError) as error:
        said = str(error)
    if made is not None and not reasons(log.lines):
        return made
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    said = reasons(log.lines) or said or "it gave no reason"
    raise BackendUnavailable(
        f"{trt.__name__} does not start here: {said}; it needs an NVIDIA GPU and its driver"
    )


def reasons(lines: Iterable[str]) -> str:
    """The errors among the lines, each once, in TensorRT's own words."""
    said = [line.partition("] ")[2] for line in lines if line.startswith(_ERRORS)]
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in said))

"""Which backends there are: every package may offer more under the entry-point group `hwsearch.backends`.

[project.entry-points."hwsearch.backends"]
mine = "my_package.my_module:MyBackend"     # called without arguments it gives a base.Backend
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from hwsearch.errors import BackendUnavailable, InvalidInput

if TYPE_CHECKING:
    from hwsearch.backends.base import Backend

GROUP = "hwsearch.backends"
_OWN = {
    "openvino": "hwsearch.backends.openvino:OpenVINOBackend",
    "onnxruntime": "hwsearch.backends.onnxruntime:ONNXRuntimeBackend",
    "tensorrt": "hwsearch.backends.tensorrt:TensorRTBackend",
    "tensorrt-rtx": "hwsearch.backends.tensorrt:rtx",
    "torch": "hwsearch.backends.torch:TorchBackend",
}
_EXTRAS = {
    "openvino": "cpu", "onnxruntime": "cpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx", "torch": "cuda",
}  # fmt: skip


def names() -> tuple[str, ...]:
    """Names of all that are registered, whether or not their runtimes are installed."""
    return tuple(sorted(_registered()))


def get(name: str | Backend) -> Backend:
    """The backend of a name; a backend is returned as it is. Its runtime may still be absent: `Backend.versions` tells.

    Raises InvalidInput on an unknown name, BackendUnavailable where its module cannot be imported.
    """
    if not isinstance(name, str):
        return name
    registered = _registered()
    if name not in registered:
        raise InvalidInput(f"unknown backend {name!r}; known: {', '.join(sorted(registered))}")
    try:
        backend: Backend = registered[name].load()()
    except Exception as error:
        raise BackendUnavailable(
            f"backend {name} cannot be loaded ({_reason(error)}); {_remedy(name)}"
        ) from error
    return backend


def several(names: str | Backend | Sequence[str | Backend]) -> tuple[Backend, ...]:
    """The backends of `openvino,onnxruntime`, of a sequence, or of `all`: every one whose runtime can be used here.

    Raises InvalidInput on an unknown or repeated name, or on none; BackendUnavailable where a module cannot be imported, or where
    `all` is none.
    """
    if names == "all":
        found = [s.name for s in status() if s.available]
        if not found:
            raise BackendUnavailable("no runtime can be used here; `hwsearch devices` says why")
        return tuple(map(get, found))
    given = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
    backends = tuple(map(get, given)) if isinstance(given, Sequence) else (get(given),)
    called = [b.name for b in backends]
    if not backends or len(set(called)) < len(called):
        raise InvalidInput(f"expected different backends, got {', '.join(called) or 'none'}")
    return backends


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used here. `reason` says why not, and what to do."""

    name: str
    available: bool
    versions: dict[str, str] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return {**asdict(self), "bases": list(self.bases)}


def status() -> list[Status]:
    """What can be used here: one entry for each registered backend, dead ones with the reason."""
    return [_status(name) for name in names()]


def _status(name: str) -> Status:
    try:
        backend = get(name)
        return Status(name, True, dict(backend.versions()), tuple(backend.bases()))
    except BackendUnavailable as error:
        return Status(name, False, reason=str(error))
    except Exception as error:  # a runtime may fail in any way; the others are still to be listed
        return Status(name, False, reason=f"{name} does not answer ({_reason(error)}); {_remedy(name)}")


def _registered() -> dict[str, EntryPoint]:
    """hwsearch's own are known without an installation that records them: a checkout on PYTHONPATH has none."""
    own = {name: EntryPoint(name, value, GROUP) for name, value in _OWN.items()}
    return own | {entry.name: entry for entry in entry_points(group=GROUP)}


def _remedy(name: str) -> str:
    if name in _EXTRAS:
        return f"install it with: pip install 'hwsearch[{_EXTRAS[name]}]'"
    return "install or repair the package that offers it"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

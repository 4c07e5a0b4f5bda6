"""Engines in processes of their own, their memory on huge pages.

How long an inference takes depends on where its engine's memory lies. One compiled in a process that has compiled a dozen others
is a few percent slower than the first, and among processes those are slower whose memory is put together from small pages that
others left (`scripts/bench/processes.py`). So engines that are timed are each the only one of a new process, as a deployed
network is, and glibc is asked to take their memory in huge pages, which are all alike; `ENVIRONMENT` does the same for others.
And a runtime that dies takes one engine with it, not the profile.

A parent and its children are one program: what goes between them is pickled, over a socket that nobody else holds.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from hwsearch.backends.base import Array, Backend, BuildOptions, Engine, NodeTime, TensorSpec
from hwsearch.device.stopwatch import times
from hwsearch.errors import BackendUnavailable, HwsearchError

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.top_pad=67108864:"
    "glibc.malloc.mmap_threshold=33554432"
}
"""One heap that grows in huge pages, for all but the largest tensors, which are mapped in huge pages by themselves.

glibc 2.35 or later, and /sys/kernel/mm/transparent_hugepage/enabled not `never`; elsewhere it does nothing.
"""

MOST_MOVED = 2**24
"""Bytes of inputs and outputs that go to another process and back at a time, where one call has no more."""

Compile = Callable[[bytes, BuildOptions], Engine]


def compiler(backend: Backend) -> Compile:
    """`backend.build`, once and in a new process where the backend has `own_process`; that process starts at once.

    Such a backend's class can be imported by its name and called without arguments.
    """
    if not getattr(backend, "own_process", False):
        return backend.build
    return _Process(type(backend), backend.name)


def wait(compile_: Compile) -> None:
    """Until the process of a compiler, where it has one, has loaded its runtime."""
    if isinstance(compile_, _Process):
        compile_.ask("ready")


def run_each(engine: Engine, calls: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """What an engine returns for each of many calls; one in a process of its own is asked for many at a time.

    Args:
        calls: The arrays of each call, as for `Engine.__call__`.

    Raises:
        InvalidInput: Another count of arrays, or other shapes.
    """
    if not isinstance(engine, ApartEngine) or not calls:
        return [engine(*arrays) for arrays in calls]
    moved = sum(a.nbytes for a in calls[0]) + sum(4 * math.prod(o.shape) for o in engine.outputs)
    most = max(1, MOST_MOVED // max(moved, 1))
    return [found for start in range(0, len(calls), most) for found in engine.each(calls[start : start + most])]


class ApartEngine:
    """An engine that lives in another process, which ends with this object."""

    def __init__(
        self, process: _Process, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], properties: Mapping[str, str]
    ) -> None:
        self._process, self.inputs, self.outputs, self.properties = process, inputs, outputs, properties
        self.run = ApartRun(process)

    @property
    def size_bytes(self) -> int:
        return int(self._process.ask("size_bytes"))

    def __call__(self, *arrays: Array) -> list[Array]:
        found: list[Array] = self._process.ask("call", *arrays)
        return found

    def each(self, calls: Sequence[Sequence[Array]]) -> list[list[Array]]:
        """What so many calls return, asked for at once."""
        found: list[list[Array]] = self._process.ask("each", calls)
        return found

    def prepare(self, *arrays: Array) -> None:
        self._process.ask("prepare", *arrays)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        found: list[NodeTime] = self._process.ask("nodes", runs)
        return found


class ApartRun:
    """An inference in another process, which keeps the time."""

    def __init__(self, process: _Process) -> None:
        self._process = process

    def __call__(self) -> None:
        self._process.ask("run")

    def times(self, count: int) -> list[int]:
        """As `stopwatch.times`."""
        found: list[int] = self._process.ask("times", count)
        return found


class _Process:
    """A child that compiles one network and then does with it what it is asked to."""

    def __init__(self, backend: type, name: str) -> None:
        self._name = name
        ours, theirs = Pipe()
        command = [
            sys.executable, "-P", "-c", "from hwsearch.backends.process import serve; serve()",
            str(theirs.fileno()), backend.__module__, backend.__qualname__,
        ]  # fmt: skip
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            try:
                child = subprocess.Popen(
                    command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
                    env={**ENVIRONMENT, **os.environ, "PYTHONPATH": path},
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise BackendUnavailable(
                    f"no process can be started for {name} ({error}); see that memory and processes are left (ulimit -u), and that "
                    f"{sys.executable or 'sys.executable, which is empty,'} is the Python interpreter"
                ) from error
        self._connection, self._child = ours, child
        self._end = weakref.finalize(self, _end, ours, child)

    def __call__(self, onnx: bytes, options: BuildOptions) -> ApartEngine:
        return ApartEngine(self, *self.ask("build", onnx, options))

    def ask(self, what: str, *args: Any) -> Any:
        """What the child answers. Raises its error, and BackendUnavailable where it ended."""
        try:
            self._connection.send((what, args))
            good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise BackendUnavailable(
                f"the process in which {self._name} runs a network ended ({self._how()}); what it wrote is above. "
                "Try again; if it ends each time, leave out the layers or precisions that it ends with, or use another backend"
            ) from error
        except BaseException:
            self._end()  # an answer may be on its way that would be taken for the next one
            raise
        if not good:
            raise answer
        return answer

    def _how(self) -> str:
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=5.0)
        code = self._child.returncode
        if code is None:
            return "it does not answer"
        if code >= 0:
            return f"exit code {code}"
        return (
            f"{signal.Signals(-code).name}{', perhaps for want of memory' if code == -signal.SIGKILL else ''}"
        )


def _end(connection: Connection, child: subprocess.Popen[bytes]) -> None:
    connection.close()
    child.kill()
    child.wait()


_PROBE = """
data = bytearray(b"1") * {size}
with open("/proc/self/smaps_rollup") as told:
    print(next(int(line.split()[1]) * 1024 for line in told if line.startswith("AnonHugePages")))
"""


def huge_pages() -> float | None:
    """The share of 64 MiB that the kernel puts in huge pages for a process with `ENVIRONMENT`; None where it does not tell."""
    size = 64 * 2**20
    try:
        told = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE.format(size=size)], env={**ENVIRONMENT, **os.environ},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60.0,
        )  # fmt: skip
        return min(1.0, int(told.stdout) / size)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def serve() -> None:
    """The child: `serve()` on the file descriptor, module and class of a backend which its arguments name."""
    handle, module, name = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle; this process ends with its socket
    os.dup2(2, 1)  # standard output is the parent's
    connection = Connection(int(handle))
    backend: Backend = getattr(import_module(module), name)()
    with contextlib.suppress(Exception):  # loads the runtime; the build tells what is wrong with it
        backend.versions()
    child = _Served(backend)
    while True:
        try:
            what, args = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = True, getattr(child, what)(*args)
        except HwsearchError as error:
            answer = False, error
        except Exception as error:
            answer = False, BackendUnavailable(f"{backend.name} failed: {type(error).__name__}: {error}")
        connection.send(answer)


class _Served:
    """What a child can be asked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def ready(self) -> None:
        """That it answers says it."""

    def build(self, onnx: bytes, options: BuildOptions) -> tuple[list[TensorSpec], list[TensorSpec], dict[str, str]]:
        self._engine = self._backend.build(onnx, options)
        return list(self._engine.inputs), list(self._engine.outputs), dict(getattr(self._engine, "properties", {}))

    def size_bytes(self) -> int:
        return self._engine.size_bytes

    def call(self, *arrays: Array) -> list[Array]:
        return self._engine(*arrays)

    def each(self, calls: Sequence[Sequence[Array]]) -> list[list[Array]]:
        return [self._engine(*arrays) for arrays in calls]

    def prepare(self, *arrays: Array) -> None:
        self._engine.prepare(*arrays)

    def nodes(self, runs: int) -> list[NodeTime]:
        return self._engine.nodes(runs)

    def run(self) -> None:
        self._engine.run()

    def times(self, count: int) -> list[int]:
        return times(self._engine.run, count)

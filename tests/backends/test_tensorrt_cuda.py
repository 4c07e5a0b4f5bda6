"""How the GPU is reached: the driver by an imitation of its library, torch.cuda by an imitation that runs on host memory."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hwsearch import backends
from hwsearch.backends import cuda
from hwsearch.backends.cuda import Cuda, NotCaptured, driver
from hwsearch.backends.tensorrt import TensorRTBackend
from hwsearch.errors import BackendUnavailable

# ---- the driver


def library(code: int = 0, count: int = 1, version: int = 12040) -> Callable[[str], Any]:
    """A libcuda that returns that error code, and knows so many GPUs."""

    def store(value: int) -> Callable[[Any], int]:
        def call(pointer: Any) -> int:
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = value
            return 0

        return call

    made = SimpleNamespace(
        cuInit=lambda flags: code, cuDeviceGetCount=store(count), cuDriverGetVersion=store(version)
    )
    return lambda name: made


def test_versions_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_KERNEL_MODULE", tmp_path / "version")
    assert driver(library()) == ("", "12.4"), "Windows and WSL have no such file"
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.3.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (a@b)\n",
    ):
        (tmp_path / "version").write_text(text)
        assert driver(library()) == ("550.54.15", "12.4")


@pytest.mark.parametrize(
    ("code", "count", "message"),
    [(100, 1, "sees no GPU"), (0, 0, "sees no GPU"), (803, 1, r"does not start \(CUDA error 803\)")],
)
def test_a_driver_without_a_gpu(code: int, count: int, message: str) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        driver(library(code, count))


def test_no_driver() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(BackendUnavailable, match=r"there is no NVIDIA driver .*--gpus all"):
        driver(load)


# ---- what a machine without TensorRT or a GPU is told


def test_all_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("hwsearch.backends.tensorrt.driver", lambda: driver(library(100)))
    for ask in (TensorRTBackend().versions, TensorRTBackend().bases):
        with pytest.raises(
            BackendUnavailable, match=r"tensorrt cannot be imported .*hwsearch\[tensorrt\].*sees no GPU"
        ):
            ask()


def test_a_driver_is_missing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.backends.tensorrt.driver", lambda: driver(library(100)))
    with pytest.raises(BackendUnavailable) as told:
        TensorRTBackend(SimpleNamespace(__name__="tensorrt", __version__="10.9")).versions()
    assert "pip install" not in str(told.value)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows CUDA")
def test_a_torch_for_cpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver", lambda: ("550", "12.4"))
    with pytest.raises(BackendUnavailable, match="is a build for CPUs"):
        Cuda()


_COMMAND = """
import json, sys
from importlib.metadata import EntryPoint
from hwsearch import backends, cli
sys.modules["tensorrt"] = None
value = "hwsearch.backends.tensorrt:TensorRTBackend"
backends.entry_points = lambda group: [EntryPoint("tensorrt", value, group)]
try:
    cli.app(["profile", "zoo:fashion_resnet", "--backend", "tensorrt", "-o", "never.parquet"])
except SystemExit as end:
    print(json.dumps([end.code, "torch" in sys.modules, "onnx" in sys.modules]))
"""


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver")
def test_profiling_without_a_gpu_is_one_message_at_once(tmp_path: Path) -> None:
    """Neither the task nor torch is loaded for it: that is what takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [1, False, False]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: tensorrt cannot run here: the package tensorrt cannot be imported")
    assert "there is no NVIDIA driver" in line
    assert not list(tmp_path.iterdir())


def test_it_is_registered_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'tensorrt = "hwsearch.backends.tensorrt:TensorRTBackend"' in pyproject
    entry = EntryPoint("tensorrt", "hwsearch.backends.tensorrt:TensorRTBackend", backends.GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group: [entry])
    assert isinstance(backends.get("tensorrt"), TensorRTBackend)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    status = {s.name: s for s in backends.status()}["tensorrt"]
    assert not status.available
    assert "tensorrt cannot run here" in status.reason


def test_tensorrt_for_rtx_is_a_backend_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, under its own name, by its own package; without a driver it says so in the line of the others."""
    found = {e.name: e for e in backends.entry_points(group=backends.GROUP)}
    assert {"tensorrt", "tensorrt-rtx"} <= set(found)
    backend = backends.get("tensorrt-rtx")
    assert backend.name == "tensorrt-rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        BackendUnavailable, match=r"package tensorrt_rtx cannot be .*'hwsearch\[tensorrt-rtx\]'"
    ):
        backend.versions()


# ---- torch.cuda


class FakeStream:
    cuda_stream = 77

    def __init__(self, device: Any) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


class FakeGraph:
    """As torch 2.11's: where ending a capture fails, the allocator is not told that it is over, and no later one begins."""

    def __init__(self, world: FakeTorch) -> None:
        self.world, self.replayed_on = world, []  # type: ignore[var-annotated]

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        if self.world.allocating:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.world.capturing = {"stream": self.world.current, "capture_error_mode": capture_error_mode}
        self.world.allocating.append(pool)

    def capture_end(self) -> None:
        if self.world.fails:
            raise RuntimeError(self.world.fails)
        self.world.allocating.clear()

    def replay(self) -> None:
        self.replayed_on.append(self.world.current)


class FakeEvent:
    """Milliseconds: the n-th event is at n squared."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded_on: Any = None

    def record(self, stream: Any) -> None:
        FakeEvent.count += 1
        self.at, self.recorded_on = float(FakeEvent.count**2), stream

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


class FakeTorch:
    """torch on host memory, with as much of torch.cuda as `Cuda` uses; `current` is the stream that work is put on."""

    def __init__(self) -> None:
        self.current: FakeStream | None = None
        self.copies: list[FakeStream | None] = []
        self.capturing: dict[str, Any] = {}
        self.fails: str | None = None
        self.allocating: list[Any] = []
        self.released: list[Any] = []
        self.slept: list[tuple[FakeStream | None, int]] = []
        self.channels_last = torch.channels_last
        self.version = SimpleNamespace(cuda="12.4")
        self.float32, self.int64, self.bool = torch.float32, torch.int64, torch.bool
        self.device = lambda kind, index: SimpleNamespace(type=kind, index=index)
        self._C = SimpleNamespace(
            _cuda_endAllocateToPool=lambda device, pool: self.allocating.remove(pool),
            _cuda_releasePool=lambda device, pool: self.released.append(pool),
        )
        self.from_numpy = torch.from_numpy
        properties = SimpleNamespace(name="NVIDIA A10", major=8, minor=6)
        self.cuda = SimpleNamespace(
            current_device=lambda: 0, Stream=FakeStream, stream=self._on, CUDAGraph=lambda: FakeGraph(self),
            graph_pool_handle=object, get_device_properties=lambda device: properties, Event=FakeEvent,
            _sleep=lambda cycles: self.slept.append((self.current, cycles)),
        )  # fmt: skip

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        if self.fails:
            raise torch.OutOfMemoryError(self.fails)
        self.copies.append(self.current)
        return torch.zeros(shape, dtype=dtype)

    @contextlib.contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    made = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setattr(cuda, "driver", lambda: ("550.54.15", "12.4"))
    return made


def test_the_gpu_is_described(world: FakeTorch) -> None:
    assert Cuda().gpu == cuda.Gpu("NVIDIA A10", (8, 6), "550.54.15", "12.4")
    assert Cuda().gpu.sm == "sm86"
    assert Cuda().stream == 77


def test_copies_go_through_the_side_stream(world: FakeTorch) -> None:
    made = Cuda()
    buffer = made.buffer((2, 3), "float32")
    assert world.copies == [made._stream], "memory of one stream may be given away while another uses it"
    assert buffer.address == buffer._tensor.data_ptr()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer.write(values)
    assert made._stream.waited == 1, "write returns when the array is there"
    assert np.array_equal(buffer.read(), values)
    buffer.clear()
    assert not buffer.read().any()
    made.synchronize()
    assert made._stream.waited == 2


def test_graphs_are_captured_and_launched_on_the_side_stream(world: FakeTorch) -> None:
    made, launched = Cuda(), []
    graph = made.capture(lambda: launched.append(True))
    assert launched == [True]
    assert world.capturing == {"stream": made._stream, "capture_error_mode": "thread_local"}
    graph.launch()
    assert graph._graph.replayed_on == [made._stream]  # type: ignore[attr-defined]


def test_a_graph_has_what_its_launch_returned(world: FakeTorch) -> None:
    assert Cuda().capture(lambda: ["outputs"]).result == ["outputs"]


def test_torch_s_own_work_is_put_on_the_side_stream(world: FakeTorch) -> None:
    made = Cuda()
    with made.work("it fails"):
        assert world.current is made._stream
    assert world.current is None
    with (
        pytest.raises(BackendUnavailable, match=r"^it fails: CUDA error: misaligned address$"),
        made.work("it fails"),
    ):
        raise RuntimeError("CUDA error: misaligned address\nmore")


def test_images_may_lie_channels_last(world: FakeTorch) -> None:
    buffer = Cuda().buffer((1, 3, 4, 5), "float32", channels_last=True)
    assert buffer.tensor.is_contiguous(memory_format=torch.channels_last)
    values = np.arange(60, dtype=np.float32).reshape(1, 3, 4, 5)
    buffer.write(values)
    assert np.array_equal(buffer.read(), values)
    assert np.array_equal(Cuda().holding(buffer.tensor).read(), values)


def test_marks_and_holding_are_on_the_side_stream(world: FakeTorch) -> None:
    made = Cuda()
    FakeEvent.count = 0
    one, two, three = (made.mark() for _ in range(3))
    assert (one.until(two), two.until(three)) == (3e6, 5e6)
    assert one._event.recorded_on is made._stream  # type: ignore[attr-defined]
    made.hold(500.0)
    assert world.slept == [(made._stream, 1000)], "two cycles a nanosecond"


def test_what_cannot_be_captured_is_told(world: FakeTorch) -> None:
    world.fails = "CUDA error: operation not permitted when stream is capturing\nmore"
    with pytest.raises(NotCaptured, match=r"^CUDA error: operation not permitted when stream is capturing$"):
        Cuda().capture(lambda: None)

    def refused() -> None:
        raise BackendUnavailable("TensorRT does not run the engine")

    with pytest.raises(NotCaptured, match="TensorRT does not run the engine"):
        Cuda().capture(refused)


def test_a_capture_that_failed_spoils_nothing(world: FakeTorch) -> None:
    """Neither the next capture nor the current stream; and the reason is the call's own, not that of ending the capture."""
    made = Cuda()
    world.fails = "CUDA error: operation failed due to a previous error during capture"

    def refused() -> None:
        raise BackendUnavailable(
            "the GPU does not run the network: operation not permitted when stream is capturing"
        )

    with pytest.raises(NotCaptured, match="operation not permitted"):
        made.capture(refused)
    assert world.current is None
    assert len(world.released) == 1
    with pytest.raises(NotCaptured, match="a previous error during capture"):
        made.capture(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        made.capture(_interrupted)
    world.fails = None
    assert made.capture(lambda: "outputs").result == "outputs"
    assert world.current is None


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_errors_of_cuda_are_ours(world: FakeTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fails = "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(
        BackendUnavailable, match="no device memory for inputs and outputs: CUDA out of memory"
    ):
        Cuda().buffer((1,), "float32")

    def fail(self: FakeStream) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(FakeStream, "synchronize", fail)
    with pytest.raises(BackendUnavailable, match="the GPU failed: CUDA error: an illegal memory access"):
        Cuda().synchronize()


def test_the_imitation_is_called_as_the_real_torch_is() -> None:
    """Names and parameters that `cuda.py` uses exist in the torch that is installed, if only as stubs of a CPU build."""
    assert {"stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    for name in (
        "current_device",
        "get_device_properties",
        "Stream",
        "stream",
        "CUDAGraph",
        "graph",
        "Event",
        "_sleep",
    ):
        assert callable(getattr(torch.cuda, name))
    assert callable(torch.cuda.CUDAGraph.replay)
    assert callable(torch.cuda.Stream.synchronize)
    assert callable(torch.cuda.Event.record)
    assert callable(torch.cuda.Event.elapsed_time)
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert all(
        hasattr(torch, name) for name in ("float32", "float16", "int8", "uint8", "int32", "int64", "bool")
    )

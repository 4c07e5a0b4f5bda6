"""CUDA as far as running an engine needs it: buffers, one side stream, graphs of what was launched on it, and times on it.

Backends `tensorrt` and `torch` run on it. torch's tensors are the device memory whose addresses TensorRT is given, so that
no second CUDA binding has to be installed. Another object with these methods may stand in for `Cuda`, as the tests' does.
Sources: CUDA driver API (cuInit, cuDeviceGetCount, cuDriverGetVersion); torch.cuda ("CUDA Graphs", `Event`, `_sleep`).
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

    from hwsearch.backends.base import Array

_NO_DEVICE = 100
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """The GPU that engines run on. driver: of the kernel module, empty where the system does not tell. cuda: that it knows."""

    name: str
    capability: tuple[int, int]
    driver: str
    cuda: str

    @property
    def sm(self) -> str:
        """`sm86` for compute capability 8.6."""
        return "sm{}{}".format(*self.capability)


_CYCLES_A_NS = 2.0
"""GPUs run at 2 GHz at most, or little above: so many cycles take a nanosecond at least."""


_HELD = 1.5
"""How much longer than launching takes the stream is held meanwhile."""


class NotCaptured(Exception):
    """What was launched cannot become a CUDA graph; the message says why."""


def driver(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[str, str]:
    """(version of the driver, version of CUDA that it knows), without torch and in milliseconds.

    load: opens a shared library. Raises BackendUnavailable where there is no driver, or no GPU that this process may use.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        lib = load(library)
    except OSError as error:
        raise BackendUnavailable(
            f"there is no NVIDIA driver ({library} cannot be loaded): install it, or start the container with --gpus all"
        ) from error
    code, count, version = lib.cuInit(0), ctypes.c_int(0), ctypes.c_int(0)
    if code == 0:
        code = lib.cuDeviceGetCount(ctypes.byref(count))
    if code == _NO_DEVICE or (code == 0 and count.value == 0):
        raise BackendUnavailable(
            "the NVIDIA driver sees no GPU: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or start the container with --gpus all"
        )
    if code == 0:
        code = lib.cuDriverGetVersion(ctypes.byref(version))
    if code != 0:
        raise BackendUnavailable(
            f"the NVIDIA driver does not start (CUDA error {code}): look at `nvidia-smi`; a driver that was updated needs a reboot"
        )
    try:
        found = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _KERNEL_MODULE.read_text())
    except OSError:  # Windows, WSL
        found = None
    return found[1] if found else "", f"{version.value // 1000}.{version.value % 1000 // 10}"


class Cuda:
    """The first GPU that this process may use. Raises BackendUnavailable where torch cannot reach it."""

    def __init__(self) -> None:
        own, known = driver()
        try:
            import torch
        except ImportError as error:
            raise BackendUnavailable(f"torch cannot be imported ({error})") from error
        if torch.version.cuda is None:
            raise BackendUnavailable(
                f"torch {torch.__version__} is a build for CPUs; engines run on memory of a torch with CUDA: see pytorch.org"
            )
        self._torch: Any = torch
        with _cuda_errors("torch cannot start CUDA"):
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._stream = self._torch.cuda.Stream(self._device)
            properties = self._torch.cuda.get_device_properties(self._device)
        self.gpu = Gpu(properties.name, (properties.major, properties.minor), own, known)

    @property
    def stream(self) -> int:
        """Handle (`cudaStream_t`) of the side stream; the default one would make TensorRT synchronise more often."""
        return int(self._stream.cuda_stream)

    @property
    def device(self) -> torch.device:
        """Where torch puts tensors."""
        found: torch.device = self._device
        return found

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        """What torch does inside goes on the side stream; `what` says so where CUDA fails. Raises BackendUnavailable then."""
        with _cuda_errors(what), self._torch.cuda.stream(self._stream):
            yield

    def buffer(self, shape: Sequence[int], dtype: str, *, channels_last: bool = False) -> Buffer:
        """Zeroed device memory for an array of that shape and numpy dtype. Raises BackendUnavailable where memory ends.

        channels_last: an image's channels stand next to one another in memory, whatever its shape says.
        """
        with self.work("no device memory for inputs and outputs"):
            tensor = self._torch.zeros(tuple(shape), dtype=getattr(self._torch, dtype), device=self._device)
            if channels_last:
                tensor = tensor.contiguous(memory_format=self._torch.channels_last)
        return Buffer(self, tensor)

    def holding(self, tensor: torch.Tensor) -> Buffer:
        """A tensor on the device as a buffer."""
        return Buffer(self, tensor)

    def synchronize(self) -> None:
        """Wait for all that was launched on the side stream. Raises BackendUnavailable with CUDA's own reason if it failed."""
        with _cuda_errors("the GPU failed"):
            self._stream.synchronize()

    def capture(self, launch: Callable[[], Any]) -> Graph:
        """What `launch` puts on the side stream, as a graph, without running it. Raises NotCaptured with the call's own reason.

        A capture that fails spoils nothing: the stream that was current is so again, and torch's allocator knows that the
        capture is over. torch 2.11's own `torch.cuda.graph` does neither where ending the capture fails (pytorch#180395), and
        every later capture of the process then fails as well.
        """
        torch = self._torch
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        self.synchronize()
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            except RuntimeError as error:
                raise NotCaptured(_line(error)) from error
            try:
                result = launch()
            except (RuntimeError, BackendUnavailable) as error:
                self._abandon(graph, pool)
                raise NotCaptured(_line(error)) from error
            except BaseException:
                self._abandon(graph, pool)
                raise
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._forget(pool)
                raise NotCaptured(_line(error)) from error
        return Graph(self, graph, result)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Ends a capture whose launches failed."""
        try:
            graph.capture_end()
        except RuntimeError:  # the launch's own error is the reason
            self._forget(pool)

    def _forget(self, pool: Any) -> None:
        """Tells torch's allocator that a capture is over, which `capture_end` did not come to."""
        index = self._device.index
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            # a torch that told the allocator itself knows no such pool any more
            with suppress(RuntimeError):
                getattr(self._torch._C, name)(index, pool)

    def mark(self) -> Mark:
        """The moment at which the side stream comes to where it is now."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return Mark(event)

    def hold(self, ns: float) -> None:
        """Keep the side stream busy for that long at least, so that what is launched meanwhile then runs without gaps."""
        with self.work("the GPU failed"):
            self._torch.cuda._sleep(int(ns * _CYCLES_A_NS))


class Mark:
    """A moment on the side stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def until(self, other: Mark) -> float:
        """Nanoseconds between two moments that have passed."""
        with _cuda_errors("the GPU tells no times"):
            return float(self._event.elapsed_time(other._event)) * 1e6


class Buffer:
    """Device memory of one input or output; `tensor` is torch's name for it."""

    def __init__(self, cuda: Cuda, tensor: torch.Tensor) -> None:
        self._cuda, self._tensor = cuda, tensor

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    @property
    def address(self) -> int:
        return self._tensor.data_ptr()

    def write(self, array: Array) -> None:
        """Copy a host array of the buffer's shape and dtype to the device; it is there when this returns."""
        torch = self._cuda._torch
        with _cuda_errors("the copy to the GPU failed"), torch.cuda.stream(self._cuda._stream):
            self._tensor.copy_(torch.from_numpy(array))
        self._cuda.synchronize()

    def read(self) -> Array:
        """A host copy, once all that was launched has run."""
        with _cuda_errors("the copy from the GPU failed"), self._cuda._torch.cuda.stream(self._cuda._stream):
            found: Array = self._tensor.cpu().numpy()
        return found

    def clear(self) -> None:
        """Zeros."""
        with _cuda_errors("the GPU failed"), self._cuda._torch.cuda.stream(self._cuda._stream):
            self._tensor.zero_()


class Graph:
    """Launches that were captured, to be put on the side stream at once.

    result: what `capture` was returned: tensors that each launch fills anew.
    """

    def __init__(self, cuda: Cuda, graph: torch.cuda.CUDAGraph, result: Any = None) -> None:
        self._cuda, self._graph, self.result = cuda, graph, result

    def launch(self, count: int = 1) -> None:
        """Put `count` of them on the side stream, one behind the other."""
        replay = self._graph.replay
        with _cuda_errors("the CUDA graph cannot be launched"), self._cuda._torch.cuda.stream(self._cuda._stream):
            for _ in range(count):
                replay()


class GraphRun:
    """Inferences by one graph. A call is one: launched, and waited for."""

    def __init__(self, cuda: Cuda, graph: Graph) -> None:
        self._cuda, self._graph = cuda, graph

    def __call__(self) -> None:
        self._graph.launch()
        self._cuda.synchronize()

    def replays(self, count: int) -> int:
        """Mean nanoseconds of an inference, of `count` that follow each other on the GPU without gaps, by events around them.

        The stream is held until all of them wait on it, so that what launching costs this process is in no time.
        """
        begun = time.perf_counter_ns()
        self._graph.launch()
        launching = time.perf_counter_ns() - begun
        self._cuda.synchronize()
        self._cuda.hold(_HELD * launching * count)
        first = self._cuda.mark()
        self._graph.launch(count)
        last = self._cuda.mark()
        self._cuda.synchronize()
        return round(first.until(last) / count)


@contextmanager
def _cuda_errors(what: str) -> Iterator[None]:
    """torch's errors of CUDA, out of memory among them, as ours."""
    try:
        yield
    except RuntimeError as error:
        raise BackendUnavailable(f"{what}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

#!/usr/bin/env python3
"""Builds model.onnx with TensorRT, checks its outputs against those expected, and times it.

    python run_tensorrt.py [--duration SECONDS] [--save-engine FILE]

Needs an NVIDIA GPU and the packages tensorrt (10 or later) and numpy; nothing of hwsearch. example.npz beside it holds inputs, and
the outputs that PyTorch computes for them with the same rounding. What it prints is in the words of NVIDIA's `trtexec`: GPU compute
time is that of inferences on the GPU, by events around each of them, launched as a CUDA graph. Exit code 0: passed, 1: failed.
Sources: TensorRT's Python API; the CUDA runtime API (cudaMalloc, cudaMemcpy, cudaStreamBeginCapture, cudaGraphLaunch, cudaEvent*).
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: dict[str, Any] = {"base": "fp32", "sparse": False, "target": "", "tolerance": {}}
"""base: precision of what is not quantized. sparse: whether weights are 2:4. tolerance: output -> relative error (root mean
square) that float rounding and quantization explain."""

WARM_UP_S = 0.2
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll")


class Failed(Exception):
    """What went wrong, in words for the user."""


class Cudart:
    """As much of the CUDA runtime as running an engine needs, by its C library."""

    def __init__(self) -> None:
        self._library = _cudart()
        self.stream = int(self._made("cudaStreamCreate").value or 0)

    def _made(self, name: str, *more: Any) -> ctypes.c_void_p:
        """What a call writes behind its first argument."""
        found = ctypes.c_void_p()
        self.call(name, ctypes.byref(found), *more)
        return found

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            raise Failed(f"{name}: {self._library.cudaGetErrorString(code).decode()}")

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(self, np.empty(shape, dtype))

    def synchronize(self) -> None:
        self.call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def capture(self, launch: Callable[[], None]) -> Graph:
        """What `launch` puts on the stream, as a graph."""
        stream, graph = ctypes.c_void_p(self.stream), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", stream, ctypes.c_int(1))  # of this thread only
        try:
            launch()
        finally:
            self.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        return Graph(self, self._made("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0)))

    def mark(self) -> Mark:
        return Mark(self, self._made("cudaEventCreate"))


class Buffer:
    """Device memory of one input or output."""

    def __init__(self, cuda: Cudart, like: Any) -> None:
        self._cuda, self._like = cuda, like
        self._memory = cuda._made("cudaMalloc", ctypes.c_size_t(max(like.nbytes, 1)))

    @property
    def address(self) -> int:
        return int(self._memory.value or 0)

    def write(self, array: Any) -> None:
        self._copy(self._memory, np.ascontiguousarray(array).ctypes.data_as(ctypes.c_void_p), 1)

    def read(self) -> Any:
        array = np.empty_like(self._like)
        self._copy(array.ctypes.data_as(ctypes.c_void_p), self._memory, 2)
        return array

    def _copy(self, to: Any, source: Any, kind: int) -> None:
        self._cuda.call("cudaMemcpy", to, source, ctypes.c_size_t(self._like.nbytes), ctypes.c_int(kind))


class Graph:
    """Work that was captured."""

    def __init__(self, cuda: Cudart, graph: ctypes.c_void_p) -> None:
        self._cuda, self._graph = cuda, graph

    def launch(self) -> None:
        self._cuda.call("cudaGraphLaunch", self._graph, ctypes.c_void_p(self._cuda.stream))


class Mark:
    """A moment on the stream."""

    def __init__(self, cuda: Cudart, event: ctypes.c_void_p) -> None:
        self._cuda, self._event = cuda, event
        cuda.call("cudaEventRecord", event, ctypes.c_void_p(cuda.stream))

    def until(self, other: Mark) -> float:
        """Nanoseconds between two moments that have passed."""
        ms = ctypes.c_float()
        self._cuda.call("cudaEventElapsedTime", ctypes.byref(ms), self._event, other._event)
        return ms.value * 1e6


def _cudart() -> Any:
    """The runtime's library: of the system, or of the packages that tensorrt brings."""
    packaged = [
        p for folder in sys.path for p in glob.glob(f"{folder}/nvidia/**/libcudart.so.1*", recursive=True)
    ]
    for name in (*_LIBRARIES, *packaged):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Failed(
        "the CUDA runtime (libcudart) is not found: pip install nvidia-cuda-runtime-cu12, or set LD_LIBRARY_PATH"
    )


# ---------------------------------------------------------------- building and running


def build(trt: Any, onnx: bytes, log: Any) -> bytes:
    """A serialised engine for the GPU of this machine."""
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(
        1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    )
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        raise Failed(
            "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors)) or "it is not parsed"
        )
    config, flags = builder.create_builder_config(), trt.BuilderFlag
    if hasattr(flags, "TF32"):
        (config.set_flag if SETTINGS["base"] == "tf32" else config.clear_flag)(flags.TF32)
    if SETTINGS["sparse"] and hasattr(flags, "SPARSE_WEIGHTS"):
        config.set_flag(flags.SPARSE_WEIGHTS)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failed("TensorRT does not build the network; its log is above")
    return bytes(plan)


class Loaded:
    """An engine on buffers of fixed addresses."""

    def __init__(self, trt: Any, cuda: Any, plan: bytes, log: Any) -> None:
        self._cuda = cuda
        runtime = trt.Runtime(log)
        self._kept = runtime  # an engine needs it as long as it lives
        self._engine = runtime.deserialize_cuda_engine(plan)
        self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise Failed("TensorRT cannot load the engine on this GPU; its log is above")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self.buffers: dict[str, Any] = {}
        for name in names:
            kind = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool"}.get(
                str(self._engine.get_tensor_dtype(name).name),
                str(self._engine.get_tensor_dtype(name).name).lower(),
            )
            self.buffers[name] = cuda.buffer(tuple(int(n) for n in self._engine.get_tensor_shape(name)), kind)
            self._context.set_tensor_address(name, self.buffers[name].address)

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Failed("TensorRT does not run the engine; its log is above")

    def __call__(self, given: dict[str, Any]) -> dict[str, Any]:
        for name in self.inputs:
            self.buffers[name].write(given[name])
        self.enqueue()
        self._cuda.synchronize()
        return {name: buffer.read() for name, buffer in self.buffers.items() if name not in self.inputs}


def check(loaded: Loaded, example: dict[str, Any]) -> None:
    """Raises Failed where an output is further from the expected one than rounding explains; NaN is."""
    got = loaded({name: example[f"input:{name}"] for name in loaded.inputs})
    for name, value in got.items():
        want, allowed = example[f"output:{name}"].astype(np.float64), float(SETTINGS["tolerance"][name])
        size = float(np.sqrt(np.mean(want**2))) or 1.0
        error = float(np.sqrt(np.mean((value.astype(np.float64) - want) ** 2))) / size
        said = f"output {name}: relative error {error:.2e}, at most {allowed:.1e} is rounding"
        if not error <= allowed:
            raise Failed(said)
        print(f"[I] {said}")


def timed(loaded: Loaded, cuda: Any, duration_s: float) -> list[float]:
    """Milliseconds of inferences on the GPU, one after another, each launched as a CUDA graph."""
    graph = cuda.capture(loaded.enqueue)
    ends = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < ends:
        graph.launch()
        cuda.synchronize()
    found: list[float] = []
    ends = time.perf_counter() + duration_s
    while time.perf_counter() < ends or len(found) < 10:
        begun = cuda.mark()
        graph.launch()
        ended = cuda.mark()
        cuda.synchronize()
        found.append(begun.until(ended) / 1e6)
    return found


def report(times_ms: list[float]) -> str:
    """As trtexec's line."""
    values = np.array(times_ms)
    tails = ", ".join(f"percentile({q}%) = {np.percentile(values, q):.6g} ms" for q in (90, 95, 99))
    return (
        f"[I] GPU Compute Time: min = {values.min():.6g} ms, max = {values.max():.6g} ms, mean = {values.mean():.6g} ms, "
        f"median = {np.median(values):.6g} ms, {tails}"
    )


def main(argv: list[str] | None = None, trt: Any = None, cuda: Any = None, folder: Path | None = None) -> int:
    """trt, cuda: in place of the package tensorrt and of the CUDA runtime. folder: of the files, that of this script."""
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--duration", type=float, default=3.0, metavar="SECONDS", help="how long to time (3)")
    words.add_argument("--save-engine", type=Path, metavar="FILE", help="keep the serialised engine")
    args = words.parse_args(argv)
    folder = folder or Path(__file__).resolve().parent
    try:
        trt = trt or importlib.import_module("tensorrt")
        log = trt.Logger(trt.Logger.WARNING)
        plan = build(trt, (folder / "model.onnx").read_bytes(), log)
        print(f"[I] Engine built: {len(plan):,} bytes")
        if args.save_engine:
            args.save_engine.write_bytes(plan)
        cuda = cuda or Cudart()
        loaded = Loaded(trt, cuda, plan, log)
        with np.load(folder / "example.npz", allow_pickle=False) as arrays:
            check(loaded, dict(arrays))
        print(report(timed(loaded, cuda, args.duration)))
    except (Failed, ImportError, OSError, KeyError) as error:
        print(f"[E] {error}\n&&&& FAILED hwsearch.run_tensorrt", file=sys.stderr)
        return 1
    print("&&&& PASSED hwsearch.run_tensorrt")
    return 0


if __name__ == "__main__":
    sys.exit(main())

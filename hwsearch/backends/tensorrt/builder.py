"""A strongly typed ONNX network -> a serialised engine, by `tensorrt` 10.x or 11.x on a GPU, or by `tensorrt_rtx` for one.

The module is passed in: one path for all of them, what only some have is asked for with `hasattr`. `tensorrt_rtx` needs no
GPU where a target is named. Source: the Python API of TensorRT 10 and 11, and tensorrt_rtx 1.7, which is the only one of
them that these calls were tried with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hwsearch.backends.tensorrt.log import log_of, reasons, started
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.progress import stdout_kept


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    onnx: serialised, strongly typed (`hwsearch.backends.typed`). base: its base precision. target: `sm86`, for `tensorrt_rtx`; None
    for the GPU of this machine. sparse: let 2:4 weights run on sparse tensor cores. workspace_bytes: what tactics may use.
    timing_cache: of an earlier build on the same GPU. tf32: let fp32 be computed in tf32 (base `tf32` does, too).
    """

    onnx: bytes
    base: str = "fp32"
    target: str | None = None
    sparse: bool = False
    workspace_bytes: int = 4 << 30
    timing_cache: bytes | None = None
    tf32: bool = False


@dataclass(frozen=True)
class Built:
    """A serialised engine, the builder's log without most of its verbose lines, and the timing cache to keep."""

    plan: bytes
    log: tuple[str, ...]
    timing_cache: bytes | None
    seconds: float


def targets(trt: Any) -> tuple[str, ...]:
    """What a TensorRT module can build for without such a GPU: `sm86`, ...; nothing but in `tensorrt_rtx`."""
    known = getattr(trt, "ComputeCapability", None)
    names = [n.lower() for n in dir(known) if n.startswith("SM")] if known is not None else []
    return tuple(sorted(names, key=lambda n: int(n[2:])))


def serialise(trt: Any, request: BuildRequest) -> Built:
    """Build an engine.

    Raises BackendUnavailable with TensorRT's own reasons where it does not parse or build the network, InvalidInput where
    the module does not build for the target.
    """
    log, began = log_of(trt), time.perf_counter()
    builder = started(trt, trt.Builder, log)
    lines: list[str] = log.lines
    network = _parsed(trt, builder, log, request.onnx)
    config, cache_in = _config(trt, builder, request)
    with stdout_kept():  # tensorrt_rtx 1.7 prints warnings there
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendUnavailable(
            f"{trt.__name__} does not build the network{_for(request)}: {reasons(lines) or 'it gave no reason'}"
        )
    cache_out = bytes(config.get_timing_cache().serialize()) if cache_in is not None else None
    return Built(bytes(plan), tuple(lines), cache_out, time.perf_counter() - began)


def _parsed(trt: Any, builder: Any, log: Any, onnx: bytes) -> Any:
    flags = trt.NetworkDefinitionCreationFlag
    strongly = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strongly)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        errors = [_described(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BackendUnavailable(
            f"{trt.__name__} does not take the ONNX network: {'; '.join(errors) or reasons(log.lines)}"
        )
    return network


def _described(error: Any) -> str:
    """A parser's error with the node that it is about, by what this version tells of it."""
    name = error.node_name() if hasattr(error, "node_name") else ""
    kind = error.node_operator() if hasattr(error, "node_operator") else ""
    where = f"node {name} ({kind}): " if name else ""
    return f"{where}{' '.join(str(error.desc()).split())}"


def _config(trt: Any, builder: Any, request: BuildRequest) -> tuple[Any, Any]:
    """(builder configuration, timing cache in it or None)."""
    config, flags = builder.create_builder_config(), trt.BuilderFlag
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(config, "max_aux_streams"):
        config.max_aux_streams = 0  # layers side by side could not be timed apart
    if hasattr(flags, "TF32"):  # on unless it is taken away
        (config.set_flag if request.tf32 or request.base == "tf32" else config.clear_flag)(flags.TF32)
    if request.sparse and hasattr(flags, "SPARSE_WEIGHTS"):
        config.set_flag(flags.SPARSE_WEIGHTS)
    if request.target is not None:
        _set_target(trt, config, request.target)
        return config, None  # a timing cache would make the builder look for a GPU
    if not hasattr(config, "create_timing_cache"):
        return config, None
    cache = config.create_timing_cache(request.timing_cache or b"")
    if not config.set_timing_cache(cache, False):  # of another GPU or version: begin a new one
        cache = config.create_timing_cache(b"")
        if not config.set_timing_cache(cache, False):
            return config, None
    return config, cache


def _set_target(trt: Any, config: Any, target: str) -> None:
    known = targets(trt)
    if not known or not hasattr(config, "num_compute_capabilities"):
        raise InvalidInput(
            f"{trt.__name__} builds for the GPU that it runs on only; leave the target out, or use tensorrt-rtx"
        )
    if target not in known:
        raise InvalidInput(f"{trt.__name__} does not build for {target!r}; it builds for {', '.join(known)}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0):
        raise BackendUnavailable(f"{trt.__name__} refused {target} as the target of a build")


def _for(request: BuildRequest) -> str:
    return f" for {request.target}" if request.target is not None else ""

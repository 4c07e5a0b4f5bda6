"""The TensorRT backend on an imitation of `tensorrt` and of a GPU: order of calls, failures, clean-up.

What NVIDIA's own library does is not shown here, see test_tensorrt_conformance.py and test_tensorrt_gpu.py.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_nvml import Nvml

from hwsearch.backends import cuda as cuda_module
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.tensorrt import TensorRTBackend
from hwsearch.backends.tensorrt.engine import TensorRTEngine
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.network.variants import Variant, uniform
from hwsearch.profiler.profile import Effort, profile
from hwsearch.table.table import LatencyTable
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import TOLERANCE, assert_close, expected, readback, small_network, wherever
from tests.backends.fake_tensorrt import FakeCuda, FakeTensorRT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No timing cache of another test."""
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """A GPU for NVML to tell of, which profiles ask."""
    simulated = Nvml()
    simulated.pids = (os.getpid(),)
    monkeypatch.setitem(sys.modules, "pynvml", simulated)
    return simulated


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(cuda: FakeCuda) -> Any:
    return FakeTensorRT(cuda)


def model(name: str = "two_inputs", precision: str = "fp32") -> bytes:
    setup = Setup(small_network(name), TensorRTBackend(), BuildOptions())
    return setup.onnx(uniform(setup.network, precision)).SerializeToString()


def built(
    trt: Any, cuda: FakeCuda, onnx: bytes | None = None, base: str = "fp32", **options: Any
) -> TensorRTEngine:
    return TensorRTBackend(trt, cuda, **options).build(onnx or model(), BuildOptions(1, base))


# ---- what it says of itself


def test_versions_tell_gpus_and_drivers_apart(trt: Any, cuda: FakeCuda) -> None:
    assert TensorRTBackend(trt, cuda).versions() == {
        "tensorrt": "10.9.0.34", "driver": "550.54.15", "cuda": "12.4", "gpu": "Simulated GPU (sm75)",
    }  # fmt: skip


def test_rows_of_tensorrt_for_rtx_do_not_name_tensorrt(cuda: FakeCuda) -> None:
    backend = TensorRTBackend(FakeTensorRT(cuda, name="tensorrt_rtx"), cuda)
    assert backend.name == "tensorrt-rtx"
    assert "tensorrt" not in backend.versions()


@pytest.mark.parametrize(
    ("capability", "bases"),
    [((7, 5), ["fp16", "fp32"]), ((8, 6), ["fp16", "bf16", "fp32"]), ((12, 0), ["fp16", "bf16", "fp32"])],
)
def test_bases_by_compute_capability(capability: tuple[int, int], bases: list[str]) -> None:
    cuda = FakeCuda(capability)
    backend = TensorRTBackend(FakeTensorRT(cuda), cuda)
    assert [base for base in backend.bases() if base != "tf32"] == bases
    assert backend.variants("fp16")[:2] == (Variant("fp16"), Variant("int8"))


def test_threads_are_not_an_option_of_a_gpu(trt: Any, cuda: FakeCuda) -> None:
    with pytest.raises(InvalidInput, match="leave --threads at 1, got 4"):
        TensorRTBackend(trt, cuda).build(model(), BuildOptions(4, "fp32"))


# ---- building


def test_the_timing_cache_is_shared_by_builds_and_kept_by_gpu_and_versions(
    trt: Any, cuda: FakeCuda, cache: Path
) -> None:
    backend = TensorRTBackend(trt, cuda)
    for _ in range(2):
        backend.build(model(), BuildOptions(1, "fp32"))
    assert [data for data, _ in trt.saw.caches] == [b"", b"timings"]
    assert not any(ignored for _, ignored in trt.saw.caches), "a cache of another device must be refused"
    path = backend.timing_cache()
    assert path.read_bytes() == b"timings"
    assert path.parent == cache / "tensorrt"
    assert path.name == "tensorrt-10.9.0.34-driver-550.54.15-cuda-12.4-gpu-Simulated-GPU-sm75.timing"
    other = TensorRTBackend(FakeTensorRT(cuda, version="10.9.1"), cuda)
    assert other.timing_cache() != path


def test_of_several_builds_the_fastest_stays_with_the_times_of_all(
    trt: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = itertools.cycle((5000, 3000, 4000))  # of the first, second and third build
    monkeypatch.setattr(cuda_module.GraphRun, "replays", lambda run, count: (run(), next(turns))[1])
    TensorRTBackend(trt, cuda).build(model(), BuildOptions(1, "fp32"))  # leaves a timing cache
    trt.saw.caches.clear()
    engine = built(trt, cuda, builds=3)
    assert engine.build_times_ns == (5000, 3000, 4000)
    assert [data for data, _ in trt.saw.caches] == [b"timings", b"", b""], "later builds choose tactics anew"
    assert cuda.graph_launches == 3 * 25 + 4, "each build runs 25 times, and once to check its graph"
    assert trt.live["ICudaEngine"] == 1, "the slower engines are kept"
    assert built(trt, cuda).build_times_ns == ()
    with pytest.raises(InvalidInput, match="builds=0"):
        TensorRTBackend(builds=0)


@pytest.mark.parametrize(
    ("capability", "base", "offered"),
    [
        ((7, 5), "fp16", "dense.fp16 dense.int8"),
        ((8, 6), "fp32", "dense.fp32 dense.int8 dense.int4 2:4.int8"),
        ((8, 6), "bf16", "dense.bf16 dense.int8 dense.int4 2:4.bf16 2:4.int8"),
        ((9, 0), "fp16", "dense.fp16 dense.int8 dense.fp8 dense.int4 2:4.fp16 2:4.int8 2:4.fp8"),
        ((12, 0), "fp16", "dense.fp16 dense.int8 dense.fp8 dense.int4 dense.nvfp4 2:4.fp16 2:4.int8 2:4.fp8"),
    ],
)
def test_what_a_gpu_is_offered(capability: tuple[int, int], base: str, offered: str) -> None:
    cuda = FakeCuda(capability)
    assert list(map(str, TensorRTBackend(FakeTensorRT(cuda), cuda).variants(base))) == offered.split()
    if capability == (9, 0):
        return  # see below
    rtx = TensorRTBackend(FakeTensorRT(cuda, name="tensorrt_rtx"), cuda)
    dense = [v for v in offered.split() if v.startswith("dense")]
    assert list(map(str, rtx.variants(base))) == dense, "TensorRT for RTX has no sparse kernels"


def test_sparse_kernels_are_asked_for_where_the_gpu_has_them(trt: Any, cuda: FakeCuda) -> None:
    built(trt, cuda)
    assert "SPARSE_WEIGHTS" not in trt.saw.flags
    cuda = FakeCuda((8, 6))
    trt = FakeTensorRT(cuda)
    built(trt, cuda)
    assert "SPARSE_WEIGHTS" in trt.saw.flags


@pytest.mark.parametrize("version", ["10.9.0.34", "11.4.0.106"])
@pytest.mark.parametrize("network", ["residual", "attention", "two_inputs"])
@pytest.mark.parametrize("base", ["fp16", "fp32"])
def test_every_variant_computes_and_reads_as_it_was_asked(network: str, base: str, version: str) -> None:
    """All but nvfp4, whose quantizer only TensorRT has, and base bf16, which no runtime here computes."""
    cuda = FakeCuda((9, 0))
    setup = Setup(
        small_network(network),
        TensorRTBackend(FakeTensorRT(cuda, version=version), cuda),
        BuildOptions(1, base),
    )
    variants = setup.backend.variants(base)
    assert {v.precision for v in variants} >= {"int8", "fp8", "int4"}
    for variant in variants:
        asked = wherever(setup.lowering, base, variant)
        engine, model = setup.build(asked)
        tolerance = max(TOLERANCE[p] for p in (base, variant.precision))
        assert_close(
            engine(*setup.lowering.arrays()), expected(setup.lowering, asked, setup.backend), tolerance, str(variant)
        )
        _, executed = readback(engine, setup, model)
        assert executed == tuple(v.executed for v in asked.values()), str(variant)


def test_eligible_is_not_picked(nvml: Nvml, tmp_path: Path) -> None:
    cuda = FakeCuda((8, 6))
    trt = FakeTensorRT(cuda)
    trt.picks = lambda unit: unit != "conv2"
    setup = Setup(small_network("residual"), TensorRTBackend(trt, cuda), BuildOptions(1, "fp16"))
    protocol = Protocol(width=10.0, limit_s=0.2, block_ns=1000, warmup_ns=1000)
    table = profile(setup, tmp_path / "table.parquet", Effort(builds=2, protocol=protocol), axes=["precision"])
    why = "eligible, but tensorrt did not pick a sparse kernel"
    assert table.header.unsupported == {"conv2": {"2:4.fp16": why, "2:4.int8": why}}
    assert "2:4.fp16" in table.offered()["conv1"]
    assert "2:4.fp16" not in table.offered()["conv2"]


# ---- running


def test_one_inference_is_prepared_captured_and_checked_before_it_is_timed(trt: Any, cuda: FakeCuda) -> None:
    engine = built(trt, cuda)
    calls = trt.calls[trt.calls.index("Runtime") :]
    assert calls == [
        "Runtime", "deserialize_cuda_engine", "create_execution_context", *["set_tensor_address"] * 4,
        "execute_async_v3", "execute_async_v3",  # a plain one, then the captured one
    ]  # fmt: skip
    assert engine._context.nvtx_verbosity is trt.ProfilingVerbosity.NONE
    launched, synchronised = cuda.graph_launches, cuda.synchronised
    engine.run()
    assert (cuda.graph_launches, cuda.synchronised) == (launched + 1, synchronised + 1)
    assert len(trt.calls) == trt.calls.index("Runtime") + len(calls), "a graph needs no call of TensorRT"


def test_size_is_the_plan_and_tensors_keep_the_order_of_the_graph(trt: Any, cuda: FakeCuda) -> None:
    engine = built(trt, cuda)
    assert engine.size_bytes > len(model()) / 2
    assert [s.shape for s in engine.inputs] == [(64, 64), (64, 96)]
    assert [s.shape for s in engine.outputs] == [(64, 16), (64,)]


def test_run_computes_on_what_was_prepared(trt: Any, cuda: FakeCuda) -> None:
    engine = built(trt, cuda)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s.shape).astype(s.dtype) for s in engine.inputs]
    expected = engine(*arrays)
    engine(*(0 * a for a in arrays))
    engine.prepare(*arrays)
    engine.run()
    for buffer, value in zip((engine._buffers[s.name] for s in engine.outputs), expected, strict=True):
        assert np.array_equal(buffer.read(), value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("capture", "operation not permitted"), ("empty graph", "the graph does not compute the outputs")],
)
def test_there_is_no_engine_without_a_graph(trt: Any, cuda: FakeCuda, fault: str, said: str) -> None:
    cuda.faults.add(fault)
    with pytest.raises(BackendUnavailable, match=f"cannot be captured as a CUDA graph: {said}"):
        built(trt, cuda)


def test_tensorrt_for_rtx_is_asked_whether_it_can_be_captured() -> None:
    cuda = FakeCuda((8, 6))
    trt = FakeTensorRT(cuda, name="tensorrt_rtx")
    built(trt, cuda)
    trt.faults["is_stream_capturable"] = False
    with pytest.raises(BackendUnavailable, match="cannot be captured as a CUDA graph: TensorRT says so"):
        built(trt, cuda)


@pytest.mark.parametrize("capability", [(8, 7), (9, 0), (10, 0)])
def test_tensorrt_for_rtx_offers_nothing_where_it_has_no_kernels(capability: tuple[int, int]) -> None:
    """An engine built for such a GPU would be refused when it is loaded there."""
    cuda = FakeCuda(capability)
    backend = TensorRTBackend(FakeTensorRT(cuda, name="tensorrt_rtx"), cuda)
    number = "{}.{}".format(*capability)
    for ask in (backend.bases, lambda: backend.build(model(), BuildOptions(1, "fp16"))):
        with pytest.raises(
            BackendUnavailable, match=rf"no compute capability {number}, only 7\.5, 8\.0, 8\.6, 8\.9"
        ):
            ask()
    assert TensorRTBackend(FakeTensorRT(cuda), cuda).bases()[0] == "fp16", "TensorRT itself has them"


def test_engines_are_timed_in_turn(trt: Any, cuda: FakeCuda) -> None:
    one, two = built(trt, cuda), built(trt, cuda)
    timing = paired(one.run, {"two": two.run}, Protocol(width=10.0, limit_s=0.2, block_ns=1000))["two"]
    assert 0.2 < timing.ratio < 5.0


def test_a_table_is_profiled_as_on_a_cpu(trt: Any, cuda: FakeCuda, nvml: Nvml, tmp_path: Path) -> None:
    """Through the profiler, the measuring and the attribution of every other backend; only the GPU is an imitation."""
    setup = Setup(small_network("residual"), TensorRTBackend(trt, cuda), BuildOptions(1, "fp32"))
    protocol = Protocol(width=10.0, limit_s=0.2, block_ns=1000, warmup_ns=1000)
    table = profile(setup, tmp_path / "table.parquet", Effort(builds=2, protocol=protocol), axes=["precision"])
    loaded = LatencyTable.load(tmp_path / "table.parquet")
    assert loaded.header.backend == "tensorrt"
    assert loaded.header.versions["gpu"] == "Simulated GPU (sm75)"
    assert len(table.builds) == 5
    for build in loaded.builds:
        asked = [Variant.parse(v).precision for v in build.variants]
        assert build.executed == tuple(asked), f"{build.role}: asked {asked}, read {build.executed}"
        assert {row.kind for row in build.nodes} >= {"unit", "rest"}
        assert ("edge" in {row.kind for row in build.nodes}) == ("int8" in asked)
        assert not build.wrong
    trt.live += type(trt.live)()
    assert trt.live["ICudaEngine"] == 0, "engines of a profile are kept"


# ---- layer times


def test_layers_are_timed_in_a_context_of_their_own(trt: Any, cuda: FakeCuda) -> None:
    engine = built(trt, cuda)
    start = len(trt.calls)
    nodes = engine.nodes(2)
    each = ["execute_async_v3", "report_to_profiler"]
    assert trt.calls[start:] == [
        "create_execution_context", *["set_tensor_address"] * 4, "profiler", *each * 5, "create_engine_inspector",
        "get_engine_information",
    ]  # fmt: skip
    assert engine._context.profiler is None, "the timed context has a profiler"
    assert trt.live["IExecutionContext"] == 1
    assert {n.op for n in nodes} >= {"kgen"}
    assert all(n.sources for n in nodes)


def test_warm_up_does_not_count(trt: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = built(trt, cuda)
    taken = iter([1e9, 1e9, 1e9, 40.0, 60.0])  # ns of each inference

    def _report(self: Any) -> None:
        self._profiler.report_layer_time("conv1|0|Conv", next(taken) / 1e6)
        self.unreported = 0

    monkeypatch.setattr(trt.IExecutionContext, "_report", _report)
    (node,) = engine.nodes(2)
    assert node.time_ns == pytest.approx(50.0)


# ---- failures


FAILURES = {
    "Runtime": (None, "tensorrt does not start here"),
    "deserialize_cuda_engine": (None, "cannot load the plan"),
    "create_execution_context": (None, "no execution context"),
    "set_tensor_address": (False, "does not take the address"),
    "execute_async_v3": (False, "does not run the engine"),
    "build_serialized_network": (None, "does not build the network"),
    "parse": (False, "does not take the ONNX network"),
    "Builder": (
        TypeError("pybind11::init(): factory function returned nullptr"),
        "tensorrt does not start here",
    ),
}


@pytest.mark.parametrize("call", FAILURES)
def test_what_fails_is_told_and_leaves_nothing_behind(trt: Any, cuda: FakeCuda, call: str) -> None:
    outcome, message = FAILURES[call]
    trt.faults[call] = outcome
    with pytest.raises(BackendUnavailable, match=message):
        built(trt, cuda)
    if isinstance(outcome, Exception):
        outcome.__traceback__ = None  # its frames hold what they made
    nothing_lives(trt, cuda)


@pytest.mark.parametrize("call", ["Runtime", "deserialize_cuda_engine", "create_execution_context"])
@pytest.mark.parametrize(
    "error", [TypeError("pybind11::init(): factory function returned nullptr"), RuntimeError("CUDA error")]
)
def test_exceptions_of_the_bindings_are_told(trt: Any, cuda: FakeCuda, call: str, error: Exception) -> None:
    trt.faults[call] = error
    with pytest.raises(BackendUnavailable, match=r"factory function returned nullptr|CUDA error"):
        built(trt, cuda)
    trt.faults.clear()
    error.__traceback__ = None
    nothing_lives(trt, cuda)


def test_a_runtime_around_nothing_is_not_used(
    trt: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT 11.4 returns without a driver: the error is logged only, and the first call ends the process."""
    message = "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)"
    monkeypatch.setattr(
        trt.Runtime, "__init__", lambda self, log: log.log(trt.ILogger.Severity.ERROR, message)
    )
    monkeypatch.delattr(trt.Runtime, "deserialize_cuda_engine")
    with pytest.raises(BackendUnavailable, match="CUDA initialization failure with error: 35"):
        built(trt, cuda)


@pytest.mark.parametrize(
    ("call", "outcome", "message"),
    [
        ("create_execution_context", None, "no execution context"),
        ("execute_async_v3", False, "does not run"),
        ("report_to_profiler", False, "no layer times"),
        ("create_engine_inspector", None, "no engine inspector"),
        ("get_engine_information", "", "not of a known form"),
        ("get_engine_information", '{"Layers": 3}', "not of a known form"),
    ],
)
def test_failures_of_the_profiling_pass(
    trt: Any, cuda: FakeCuda, call: str, outcome: object, message: str
) -> None:
    engine = built(trt, cuda)
    trt.faults[call] = outcome
    with pytest.raises(BackendUnavailable, match=message):
        engine.nodes(2)
    assert trt.live["IExecutionContext"] == 1, "the context of the profiling pass is kept"
    trt.faults.clear()
    engine.run()
    assert engine.nodes(2)


def test_a_failing_launch_is_told_while_it_is_timed(trt: Any, cuda: FakeCuda) -> None:
    engine = built(trt, cuda)
    trt.faults["execute_async_v3"] = False
    with pytest.raises(BackendUnavailable, match="does not run the engine"):
        engine.nodes(1)


def test_reasons_are_tensorrts_own(trt: Any, cuda: FakeCuda) -> None:
    with pytest.raises(BackendUnavailable, match="magic tag does not match"):
        TensorRTEngine(trt, cuda, b"no plan", ["x"], ["y"])


def test_a_network_that_the_parser_refuses(trt: Any, cuda: FakeCuda) -> None:
    trt.network_errors.append("Assertion failed: zero point must be zero")
    with pytest.raises(BackendUnavailable, match="zero point must be zero"):
        built(trt, cuda)
    nothing_lives(trt, cuda)


def test_an_engine_of_other_tensors_is_refused(trt: Any, cuda: FakeCuda) -> None:
    plan = b"fake plan\0" + model()
    with pytest.raises(BackendUnavailable, match=r"has the inputs .*, the ONNX graph has x, y"):
        TensorRTEngine(trt, cuda, plan, ["x", "y"], ["z"])
    nothing_lives(trt, cuda)


def test_dropped_engines_free_contexts_graphs_and_memory_at_once(trt: Any, cuda: FakeCuda) -> None:
    gc.collect()
    gc.disable()  # as while engines are timed: nothing may wait for the collector of cycles
    try:
        for _ in range(3):
            engine = built(trt, cuda)
            engine.run()
            engine.nodes(1)
            del engine
            nothing_lives(trt, cuda)
    finally:
        gc.enable()


def nothing_lives(trt: Any, cuda: FakeCuda) -> None:
    trt.live += type(trt.live)()
    cuda.live += type(cuda.live)()
    assert not trt.live, f"TensorRT's objects still live: {dict(trt.live)}"
    assert not cuda.live, f"of the GPU there still live: {dict(cuda.live)}"


# ---- the contract, on both shapes of the inspector's record


class TestOnTensorRT10(BackendContract):
    @pytest.fixture
    def backend(self, trt: Any, cuda: FakeCuda) -> TensorRTBackend:
        return TensorRTBackend(trt, cuda)


class TestOnTensorRT11(TestOnTensorRT10):
    @pytest.fixture
    def trt(self, cuda: FakeCuda) -> Any:
        return FakeTensorRT(cuda, version="11.4.0.106")

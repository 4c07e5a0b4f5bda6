"""Backend `torch` on an imitation of a GPU: order of calls, graphs, failures, clean-up, flags; and what it says without a GPU.

What CUDA itself does is not shown here, see test_torch_gpu.py.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from simulated_nvml import Nvml

import hwsearch.backends.torch as package
from hwsearch import backends
from hwsearch.backends import cuda as cuda_module
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.torch import TorchBackend
from hwsearch.backends.torch.arithmetic import arithmetic
from hwsearch.backends.torch.engine import TorchEngine
from hwsearch.backends.torch.program import OnnxProgram
from hwsearch.device import fingerprint as device
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.network.variants import Variant
from hwsearch.profiler.profile import Effort, profile
from hwsearch.table.table import LatencyTable
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import readback, small_network, wherever
from tests.backends.fake_cuda import FakeCuda, Products

SOURCES = sorted(Path(package.__file__).parent.glob("**/*.py"))


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


def model(name: str = "two_inputs", variant: str = "dense.fp32", base: str = "fp32") -> bytes:
    low = small_network(name)
    data: bytes = low.onnx(wherever(low, base, Variant.parse(variant))).SerializeToString()
    return data


def built(cuda: FakeCuda, onnx_bytes: bytes | None = None, base: str = "fp32") -> TorchEngine:
    return TorchBackend(cuda).build(onnx_bytes or model(), BuildOptions(1, base))  # type: ignore[arg-type]


class TestContract(BackendContract):
    """All of it, with the kernels of an H100 imitated."""

    @pytest.fixture
    def backend(self, products: Products) -> TorchBackend:
        return TorchBackend(FakeCuda((9, 0)))  # type: ignore[arg-type]


# ---- what it says of itself


def test_versions_tell_gpus_drivers_and_torches_apart(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert TorchBackend(cuda).versions() == {  # type: ignore[arg-type]
        "torch": torch.__version__, "cuda": "12.8", "cudnn": "91002", "driver": "550.54.15", "gpu": "Simulated GPU (sm90)",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "base", "offered"),
    [
        ((7, 0), "fp16", "dense.fp16"),
        ((7, 5), "fp16", "dense.fp16 dense.int8"),
        ((8, 6), "fp32", "dense.fp32 dense.int8 2:4.int8"),
        ((8, 6), "bf16", "dense.bf16 dense.int8 2:4.bf16 2:4.int8"),
        ((8, 9), "fp16", "dense.fp16 dense.int8 dense.fp8 2:4.fp16 2:4.int8"),
        ((12, 0), "tf32", "dense.tf32 dense.int8 dense.fp8 2:4.int8"),
    ],
)
def test_what_a_gpu_is_offered(
    capability: tuple[int, int], base: str, offered: str, products: Products
) -> None:  # fmt: skip
    backend = TorchBackend(FakeCuda(capability))  # type: ignore[arg-type]
    assert list(map(str, backend.variants(base))) == offered.split()
    assert base in backend.bases()
    assert ("bf16" in backend.bases()) == (capability >= (8, 0))


def test_without_cusparselt_no_2_4_is_offered(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert all(v.kept is None for v in TorchBackend(cuda).variants("fp16"))  # type: ignore[arg-type]


def test_it_is_a_backend_of_the_gpu(cuda: FakeCuda) -> None:
    backend = TorchBackend(cuda)  # type: ignore[arg-type]
    assert device.on_gpu(backend)
    assert backend.name == "torch"


def test_what_it_does_not_do_is_refused(cuda: FakeCuda) -> None:
    with pytest.raises(InvalidInput, match="leave --threads at 1, got 4"):
        TorchBackend(cuda).build(model(), BuildOptions(4, "fp32"))  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match="does not execute bf16 on this GPU; it offers fp16, fp32"):
        built(FakeCuda((7, 5)), base="bf16")
    with pytest.raises(BackendUnavailable, match="torch cannot be given this network, it is no ONNX"):
        built(cuda, b"no onnx")


# ---- what executed


@pytest.mark.parametrize("base", ["fp16", "fp32"])
@pytest.mark.parametrize("variant", ["dense.int8", "dense.fp8", "2:4.int8", "2:4.fp16"])
def test_executed_precisions_are_those_of_the_kernels(
    base: str, variant: str, products: Products
) -> None:  # fmt: skip
    """Linear layers execute as asked; the products of attention and convolutions do not, and say so."""
    asked = Variant.parse(variant)
    if asked.precision == "fp16" and base == "fp32":
        pytest.skip("2:4 in halves is offered under a base of halves")
    for name, linears in (("attention", {"qkv", "out", "up", "down"}), ("residual", set[str]())):
        at = Setup(small_network(name), TorchBackend(FakeCuda()), BuildOptions(1, base))  # type: ignore[arg-type]
        variants = wherever(at.lowering, base, asked)
        engine, onnx_model = at.build(variants)
        _, executed = readback(engine, at, onnx_model)
        for unit, precision in zip(at.network.units, executed, strict=True):
            wanted = asked.executed if unit.name in linears else base
            assert precision == wanted, (unit.name, precision)


def test_a_table_is_profiled_as_on_a_cpu(
    products: Products, nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path))
    at = Setup(small_network("attention"), TorchBackend(FakeCuda((8, 6))), BuildOptions(1, "fp16"))  # type: ignore[arg-type]
    protocol = Protocol(width=10.0, limit_s=0.2, block_ns=1000, warmup_ns=1000)
    profile(at, tmp_path / "table.parquet", Effort(builds=3, protocol=protocol), axes=["precision"])
    table = LatencyTable.load(tmp_path / "table.parquet")
    assert table.header.backend == "torch"
    assert table.header.versions["torch"] == torch.__version__
    assert "tensorrt" not in str(table.header.versions).lower()
    assert table.header.device["kind"] == "gpu"
    assert all(len(build.states) == 2 for build in table.builds)
    refused = table.header.unsupported
    assert refused["matmul"] == {"dense.int8": "executed in fp16"}, refused
    assert not any("dense.int8" in refused.get(unit, {}) for unit in ("qkv", "out", "up", "down"))
    own = [
        row for build in table.builds for row in build.nodes if row.units == ("qkv",) and row.kind == "unit"
    ]
    assert {row.op for row in own} == {"MatMul"}, "a linear layer is one call, its bias included"


# ---- running


def test_one_inference_is_prepared_captured_and_checked_before_it_is_timed(cuda: FakeCuda) -> None:
    engine = built(cuda)
    assert cuda.log == ["synchronize", "capture", "graph", "synchronize"]
    cuda.log.clear()
    engine.prepare(*small_network("two_inputs").arrays())
    engine.run()
    assert cuda.log == ["graph", "synchronize"]


def test_run_computes_on_what_was_prepared(cuda: FakeCuda) -> None:
    engine = built(cuda)
    arrays = small_network("two_inputs").arrays()
    before = engine(*arrays)
    engine.prepare(*(-a for a in arrays))
    engine.run()
    after = [engine._cuda.holding(value).read() for value in engine._results]
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(engine(*arrays)[0], before[0])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("capture", "operation not permitted when stream is capturing"),
        ("empty graph", "does not compute the outputs"),
    ],
)
def test_there_is_no_engine_without_a_graph(cuda: FakeCuda, fault: str, said: str) -> None:
    """Launched call by call it would be timed as something else than the engines beside it in a table."""
    cuda.faults.add(fault)
    with pytest.raises(BackendUnavailable, match=f"cannot capture this network as a CUDA graph: .*{said}"):
        built(cuda)


def test_blocks_are_launched_behind_a_held_stream_and_timed_by_two_events(cuda: FakeCuda) -> None:
    engine = built(cuda)
    cuda.log.clear()
    assert engine.run.replays(7) > 0
    assert cuda.log == ["graph", "synchronize", "hold", "mark", *["graph"] * 7, "mark", "synchronize"]


def test_an_output_that_is_a_constant_or_an_input_is_not_cleared(cuda: FakeCuda) -> None:
    x = onnx.helper.make_tensor_value_info("x", 1, (2, 2))
    stored = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "c")
    nodes = [onnx.helper.make_node("Identity", [a], [b], name=b) for a, b in (("c", "y"), ("x", "z"))]
    outputs = [onnx.helper.make_tensor_value_info(n, 1, (2, 2)) for n in ("y", "z")]
    graph = onnx.helper.make_graph(nodes, "g", [x], outputs, [stored])
    data = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    engine = built(cuda, data.SerializeToString())
    one, two = engine(np.full((2, 2), 3.0, np.float32))
    assert one.tolist() == [[1, 1], [1, 1]]
    assert two.tolist() == [[3, 3], [3, 3]]
    assert engine.nodes(1) == []


def test_engines_are_timed_in_turn(cuda: FakeCuda) -> None:
    one, two = built(cuda), built(cuda)
    timing = paired(one.run, {"two": two.run}, Protocol(limit_s=0.2, width=10.0))["two"]
    assert timing.ratio > 0


def test_images_lie_channels_last_where_tensor_cores_multiply(cuda: FakeCuda) -> None:
    for base, last in (("fp16", True), ("tf32", True), ("fp32", False)):
        engine = built(cuda, model("residual"), base)
        (buffer,) = engine._buffers
        assert buffer.tensor.is_contiguous(memory_format=torch.channels_last) == last
        weights = [t for t in engine._program.places if t is not None and t.dim() == 4]
        assert len(weights) == 3
        assert all(t.is_contiguous(memory_format=torch.channels_last) == last for t in weights)


def test_size_is_that_of_the_constants_as_they_are_stored(products: Products) -> None:
    variants = ("dense.fp16", "dense.int8", "2:4.int8", "2:4.fp16")
    sizes = [built(FakeCuda(), model("attention", v, "fp16"), "fp16").size_bytes for v in variants]
    weights = sum(u.weight_count for u in small_network("attention").network.units if u.weight_shape)
    for size, bits in zip(sizes, (16, 8, 5, 9), strict=True):
        stored = weights * bits / 8
        assert stored < size < stored + 0.1 * weights


# ---- times of calls


def test_calls_are_timed_behind_a_held_stream(cuda: FakeCuda) -> None:
    engine = built(cuda, model("attention"))
    cuda.log.clear()
    nodes = engine.nodes(2)
    marks, launching = cuda.log.count("mark"), sum(not s.views for s in engine._program.steps)
    assert len(nodes) == launching
    assert marks == 2 * (launching + 2), "one before each call, and two behind the last"
    assert cuda.held == 2
    first = cuda.log.index("hold")
    assert "mark" not in cuda.log[:first]
    assert "graph" not in cuda.log
    assert cuda.log[-1] == "synchronize"
    assert all(n.time_ns >= 0 for n in nodes)
    assert {"|" in n.sources[0] for n in nodes} == {True}


def test_long_networks_are_timed_in_stretches(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.backends.torch.engine._AT_ONCE", 5)
    engine = built(cuda, model("attention"))
    launching = sum(not s.views for s in engine._program.steps)
    assert len(engine.nodes(1)) == launching
    assert cuda.held == -(-launching // 5)


def test_what_marks_take_is_taken_off(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks 10 apart with nothing between them, 25 with a call between: a call takes 15."""
    times = iter(range(10**6))
    launching = sum(not s.views for s in built(cuda)._program.steps)

    class Mark:
        def __init__(self) -> None:
            place = next(times) % (launching + 2)
            self.at = 25.0 * min(place, launching) + 10.0 * (place > launching)

        def until(self, other: Mark) -> float:
            return other.at - self.at

    monkeypatch.setattr(cuda, "mark", Mark)
    assert [n.time_ns for n in built(cuda).nodes(3)] == [15.0] * launching


# ---- failures and clean-up


@pytest.mark.parametrize("fault", ["memory", "kernel"])
def test_what_fails_is_told_and_leaves_nothing_behind(cuda: FakeCuda, fault: str) -> None:
    cuda.faults.add(fault)
    with pytest.raises(BackendUnavailable, match=r"out of memory|illegal memory access"):
        built(cuda)
    gc.collect()
    assert not +cuda.live
    assert cuda.on_stream == 0


def test_an_operator_that_torch_lacks_is_named(cuda: FakeCuda) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"torch cannot run node .*trt\.TRT_FP4DynamicQuantize.* use another backend"
    ):
        built(cuda, model("attention", "dense.nvfp4"))


def test_dropped_engines_free_graphs_and_memory_at_once(cuda: FakeCuda) -> None:
    engine = built(cuda)
    engine(*small_network("two_inputs").arrays())
    engine.nodes(2)
    assert cuda.live["graph"] == 1
    assert cuda.live["buffer"] == 2
    gc.disable()
    try:
        del engine
        assert not +cuda.live, "no cycle keeps them"
    finally:
        gc.enable()


def flags() -> tuple[Any, ...]:
    backs = torch.backends
    told = [f.fp32_precision for f in (backs.cuda.matmul, backs.cudnn.conv, backs.cudnn.rnn)]
    return (*told, backs.cudnn.benchmark)


def legacy() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_flags_of_the_process_are_set_for_launches_only(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before, older = flags(), legacy()
    seen: set[tuple[Any, ...]] = set()
    real = OnnxProgram.__call__
    monkeypatch.setattr(OnnxProgram, "__call__", lambda self, *a: (seen.add(flags()), real(self, *a))[1])
    for base, wanted in (("tf32", "tf32"), ("fp32", "ieee"), ("fp16", "ieee")):
        seen.clear()
        engine = built(cuda, base=base)
        engine.run()
        engine.nodes(1)
        assert seen == {(wanted, wanted, wanted, True)}
        assert (flags(), legacy()) == (before, older)
    with pytest.raises(ZeroDivisionError), arithmetic("tf32"):
        raise ZeroDivisionError
    assert (flags(), legacy()) == (before, older)


def test_the_user_s_own_tf32_stays(cuda: FakeCuda) -> None:
    """Set the older way, as many programs do; reading it after must not raise torch's error on mixing both ways."""
    before = legacy()
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = False
        built(cuda, base="fp32").run()
        assert legacy() == (True, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- machines without a GPU


_COMMAND = """
import json, sys
from importlib.metadata import EntryPoint
from hwsearch import backends, cli
backends.entry_points = lambda group: [EntryPoint("torch", "hwsearch.backends.torch:TorchBackend", group)]
try:
    cli.app(sys.argv[1:])
except SystemExit as end:
    print(json.dumps([end.code, "torch" in sys.modules, "onnx" in sys.modules]))
"""


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize(
    "command", ["profile zoo:fashion_resnet --backend torch -o never.parquet", "doctor --backend torch"]
)
def test_without_a_gpu_it_is_one_message_at_once(command: str, tmp_path: Path) -> None:
    """Neither the task nor torch is loaded for it: that is what takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == [1, False, False]
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "there is no NVIDIA driver" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_torch_for_cpus_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    for where in ("hwsearch.backends.torch.driver", "hwsearch.backends.cuda.driver"):
        monkeypatch.setattr(where, lambda: ("550", "12.4"))
    with pytest.raises(
        BackendUnavailable, match=r"torch cannot run on a GPU here: torch .* is a build for CPUs"
    ):
        TorchBackend().versions()


def test_it_is_registered_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'torch = "hwsearch.backends.torch:TorchBackend"' in pyproject
    entry = EntryPoint("torch", "hwsearch.backends.torch:TorchBackend", backends.GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group: [entry])
    assert isinstance(backends.get("torch"), TorchBackend)
    monkeypatch.setattr("hwsearch.backends.torch.driver", _no_driver)
    status = {s.name: s for s in backends.status()}["torch"]
    assert not status.available
    assert status.reason.startswith("torch cannot run on a GPU here: there is no NVIDIA driver")


def _no_driver() -> tuple[str, str]:
    raise BackendUnavailable("there is no NVIDIA driver")


# ---- the torch that is installed


def test_every_name_of_torch_in_our_source_exists_in_the_torch_that_is_installed() -> None:
    """`torch.` and `F.` names, read off our source: those of CUDA are there in a build for CPUs as well, if only as stubs."""
    names = {name for path in (*SOURCES, Path(cuda_module.__file__)) for name in _names(path)}
    assert names >= {
        "torch._int_mm", "torch._scaled_mm", "torch._cslt_compress", "torch._cslt_sparse_mm", "torch.cuda.CUDAGraph",
        "torch.cuda.Event", "torch.cuda._sleep", "torch.cuda.graph_pool_handle", "torch.backends.cudnn.version", "F.conv2d",
        "torch.backends.cuda.matmul", "torch.backends.cudnn.rnn", "torch.backends.cusparselt.is_available",
    }  # fmt: skip
    for name in sorted(names):
        found: Any = torch if name.startswith("torch") else torch.nn.functional
        for part in name.split(".")[1:]:
            assert hasattr(found, part), name
            found = getattr(found, part)


def _names(path: Path) -> set[str]:
    text = path.read_text()
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node).removeprefix("self.").replace("_torch.", "torch.", 1)
            name = {"backends.": "torch.backends.", "cusparselt.": "torch.backends.cusparselt."}.get(
                name.split(".")[0] + ".", name.split(".")[0] + "."
            ) + name.partition(".")[2]
            if name.startswith(("torch.", "F.")) and name.replace(".", "").replace("_", "").isalnum():
                found.add(name)
    return found

"""Serialising: really, by tensorrt_rtx without a GPU, and what is asked of a TensorRT that has other things (imitated)."""

from __future__ import annotations

from enum import Enum
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.tensorrt.builder import BuildRequest, serialise, targets
from hwsearch.backends.tensorrt.buildlog import executed, fused_layers
from hwsearch.backends.tensorrt.legality import target, why_not
from hwsearch.backends.typed import strongly_typed
from hwsearch.errors import BackendUnavailable, InvalidInput

FIVE = ("sm75", "sm80", "sm86", "sm89", "sm120")
K, N, BLOCK = 128, 64, 64


@cache
def linear(kind: str, base: str) -> bytes:
    """One linear layer with quantized weights and activations as `assemble` writes them, strongly typed; by hand."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((K, N)) * 0.05).astype(np.float32)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: Any, form: int | None = None) -> str:
        array = np.asarray(values)
        if form is None:
            constants.append(numpy_helper.from_array(array, name))
        else:
            constants.append(helper.make_tensor(name, form, list(array.shape), array.flatten().tolist()))
        return name

    def node(op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"u|0|{name}", **attributes))
        return output

    opset, x = 18, "x"
    if kind in ("int8", "fp8"):
        opset, top = (18, 127) if kind == "int8" else (19, 448)
        form = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
        scale, zero = constant("xs", np.float32(4 / top)), constant("xz", 0, form)
        x = node("QuantizeLinear", [x, scale, zero], "xq", "QuantizeLinear.in0")
        x = node("DequantizeLinear", [x, scale, zero], "xd", "DequantizeLinear.in0")
        scales = np.abs(weight).max(0) / top
        steps = weight / scales
        constant("wq", np.round(steps) if kind == "int8" else steps, form)
        constant("ws", scales)
        node("DequantizeLinear", ["wq", "ws"], "w", "DequantizeLinear.weight", axis=1)
    elif kind == "int4":
        opset = 21
        constant("wq", np.clip(np.round(weight / 0.02), -7, 7).astype(np.int8), TensorProto.INT4)
        constant("ws", np.full((K // BLOCK, N), 0.02, np.float32))
        node("DequantizeLinear", ["wq", "ws"], "w", "DequantizeLinear.weight", axis=0, block_size=BLOCK)
    elif kind == "nvfp4":
        opset = 23
        constant("overall", np.float32(1e-3))
        dynamic = helper.make_node(
            "TRT_FP4DynamicQuantize", ["x", "overall"], ["xq", "xs"], name="u|0|QuantizeLinear.in0", domain="trt",
            axis=-1, block_size=16, scale_type=TensorProto.FLOAT8E4M3FN,
        )  # fmt: skip
        nodes.append(dynamic)
        node("DequantizeLinear", ["xs", "overall"], "xsd", "DequantizeLinear.scale0")
        x = node("DequantizeLinear", ["xq", "xsd"], "xd", "DequantizeLinear.in0", axis=-1, block_size=16)
        constant("wq", np.clip(np.round(weight / 0.03), -6, 6), TensorProto.FLOAT4E2M1)
        constant("ws", np.full((K // 16, N), 32.0), TensorProto.FLOAT8E4M3FN)
        node("DequantizeLinear", ["ws", "overall"], "wsd", "DequantizeLinear.scale")
        node("DequantizeLinear", ["wq", "wsd"], "w", "DequantizeLinear.weight", axis=0, block_size=16)
    else:
        constant("w", weight)
    constant("b", np.zeros(N, np.float32))
    node("Gemm", [x, "w", "b"], "y", "Gemm")
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16, N])],
        constants,
        value_info=[helper.make_tensor_value_info("xd", TensorProto.FLOAT, [16, K])] if kind == "nvfp4" else [],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 11
    data: bytes = strongly_typed(model, base).SerializeToString()
    return data


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("base", ["fp16", "bf16", "fp32", "tf32"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4", "nvfp4", "base"])
def test_what_is_built_is_what_is_documented(rtx: Any, kind: str, base: str) -> None:
    for sm in FIVE:
        precision = base if kind == "base" else kind
        reason = why_not(precision, target(sm), base=base, op="linear")
        request = BuildRequest(linear(kind, base), base, sm)
        if reason:
            with pytest.raises(
                BackendUnavailable,
                match=f"does not build the network for {sm}: .*(HW-specific|not supported)",
            ):
                serialise(rtx, request)
            continue
        built = serialise(rtx, request)
        assert len(built.plan) > 1000
        assert built.seconds > 0
        assert built.timing_cache is None
        assert executed(fused_layers(built.log)) == {"u": "fp32" if precision == "tf32" else precision}, sm


def test_targets_of_tensorrt_rtx(rtx: Any) -> None:
    assert set(FIVE) <= set(targets(rtx))
    for wrong in ("sm90", "sm99", ""):
        with pytest.raises(InvalidInput, match="it builds for sm75, sm80, sm86, sm89, sm120"):
            serialise(rtx, BuildRequest(linear("base", "fp16"), "fp16", wrong))


def test_a_network_that_does_not_parse(rtx: Any) -> None:
    with pytest.raises(BackendUnavailable, match=r"does not take the ONNX network: .*parse"):
        serialise(rtx, BuildRequest(b"nonsense", target="sm86"))
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="u|0|NoSuchOperator", domain="nowhere")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    )
    with pytest.raises(
        BackendUnavailable, match=r"node u\|0\|NoSuchOperator \(NoSuchOperator\): .*[Pp]lugin"
    ):
        serialise(rtx, BuildRequest(model.SerializeToString(), target="sm86"))


def test_standard_output_is_left_to_results(rtx: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """tensorrt_rtx prints a warning there where a Clip without an upper end is in fp16."""
    clip = helper.make_node("Clip", ["h", "least"], ["c"], name="~|0|Clip")
    into = helper.make_node("Cast", ["x"], ["h"], name="~|0|Cast", to=TensorProto.FLOAT16)
    out = helper.make_node("Cast", ["c"], ["y"], name="~|0|Cast.1", to=TensorProto.FLOAT)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in "xy"]
    least = numpy_helper.from_array(np.float16(1e-3), "least")
    graph = helper.make_graph([into, clip, out], "g", values[:1], values[1:], [least])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    serialise(rtx, BuildRequest(model.SerializeToString(), "fp16", "sm86"))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "precision-lose casting" in printed.err


def test_types_that_do_not_fit_are_refused_with_the_layer(rtx: Any) -> None:
    """What `typed` is for: the assembled network itself mixes nothing, a half-typed one is refused."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="u|0|Cast", to=TensorProto.FLOAT16),
        helper.make_node("Add", ["h", "x"], ["y"], name="u|0|Add"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 18)]
    )
    with pytest.raises(BackendUnavailable, match=r"u\|0\|Add"):
        serialise(rtx, BuildRequest(model.SerializeToString(), target="sm86"))


# ---------------------------------------------------------------- a TensorRT for GPUs, imitated


class Module(SimpleNamespace):
    __hash__ = object.__hash__  # modules can be hashed


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    VERBOSE = Severity.VERBOSE


def fake(*, plan: bytes | None = b"plan", starts: bool = True, parses: bool = True, takes: bool = True,
              flags: tuple[str, ...] = ("TF32", "SPARSE_WEIGHTS")) -> Any:  # fmt: skip
    """A module with the parts of TensorRT 10 that are called; `asked` holds what was set, in order."""
    asked: list[Any] = []

    class Config:
        max_aux_streams = -1
        profiling_verbosity: Any = None

        def set_memory_pool_limit(self, pool: str, size: int) -> None:
            asked.append((pool, size))

        def set_flag(self, flag: str) -> None:
            asked.append(("set", flag))

        def clear_flag(self, flag: str) -> None:
            asked.append(("clear", flag))

        def create_timing_cache(self, data: bytes) -> Any:
            return SimpleNamespace(data=data, serialize=lambda: data + b"+")

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            asked.append(("cache", cache.data))
            self.cache = cache
            return takes or not cache.data

        def get_timing_cache(self) -> Any:
            return self.cache

    config = Config()

    class Builder:
        def __init__(self, log: Any) -> None:
            self.logger = log
            if not starts:
                log.log(Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags: int) -> str:
            asked.append(("network", flags))
            return "network"

        def create_builder_config(self) -> Any:
            return config

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            self.logger.log(Severity.VERBOSE, "Tactic: 0x1 Time: 0.1")
            self.logger.log(Severity.VERBOSE, "Layers:\nnone")
            self.logger.log(Severity.INFO, "(Sparsity) Found 1 layer(s) eligible to use sparse tactics")
            if plan is None:
                self.logger.log(Severity.ERROR, "Could not find any implementation for node {u}")
                self.logger.log(Severity.ERROR, "Could not find any implementation for node {u}")
            return plan

    class Parser:
        num_errors = 2

        def __init__(self, network: Any, log: Any) -> None:
            assert network == "network"

        def parse(self, data: bytes) -> bool:
            return parses

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(
                desc=lambda: f"reason {index}\n", node_name=lambda: "u|0|Conv", node_operator=lambda: "Conv"
            )

    return Module(
        __name__="tensorrt", asked=asked, config=config, Builder=Builder, ILogger=ILogger, OnnxParser=Parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"), ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
    )  # fmt: skip


def test_what_is_asked_of_tensorrt() -> None:
    trt = fake()
    built = serialise(trt, BuildRequest(b"onnx", "fp16", sparse=True, workspace_bytes=7, timing_cache=b"old"))
    assert (built.plan, built.timing_cache) == (b"plan", b"old+")
    assert trt.config.max_aux_streams == 0
    assert trt.config.profiling_verbosity == "detailed"
    assert trt.asked == [
        ("network", 2), ("workspace", 7), ("clear", "TF32"), ("set", "SPARSE_WEIGHTS"), ("cache", b"old"),
    ]  # fmt: skip
    assert built.log == (
        "[VERBOSE] Layers:\nnone",
        "[INFO] (Sparsity) Found 1 layer(s) eligible to use sparse tactics",
    )


@pytest.mark.parametrize("request_", [BuildRequest(b"", "tf32"), BuildRequest(b"", "fp32", tf32=True)])
def test_tf32_is_on_only_where_it_is_asked_for(request_: BuildRequest) -> None:
    trt = fake()
    serialise(trt, request_)
    assert ("set", "TF32") in trt.asked
    trt = fake()
    serialise(trt, BuildRequest(b"", "fp32"))
    assert ("clear", "TF32") in trt.asked
    assert ("set", "SPARSE_WEIGHTS") not in trt.asked


def test_flags_that_a_version_lacks_are_left_out() -> None:
    trt = fake(flags=())
    serialise(trt, BuildRequest(b"", sparse=True, tf32=True))
    assert trt.asked[2:] == [("cache", b"")]


def test_a_timing_cache_of_another_gpu_is_begun_anew() -> None:
    trt = fake(takes=False)
    built = serialise(trt, BuildRequest(b"", timing_cache=b"other"))
    assert trt.asked[-2:] == [("cache", b"other"), ("cache", b"")]
    assert built.timing_cache == b"+"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plan": None},
            r"^tensorrt does not build the network: Could not find any implementation for node {u}$",
        ),
        ({"parses": False}, r"node u\|0\|Conv \(Conv\): reason 0; node u\|0\|Conv \(Conv\): reason 1$"),
        (
            {"starts": False},
            r"tensorrt does not start here: CUDA initialization failure .* needs an NVIDIA GPU and its driver",
        ),
    ],
)
def test_failures_come_with_tensorrts_own_reasons(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendUnavailable, match=message):
        serialise(fake(**options), BuildRequest(b""))


def test_errors_of_an_earlier_build_are_not_told_again() -> None:
    trt = fake(plan=None)
    for _ in range(2):
        with pytest.raises(BackendUnavailable) as error:
            serialise(trt, BuildRequest(b""))
        assert str(error.value).count("Could not find") == 1


def test_tensorrt_takes_no_target() -> None:
    assert targets(fake()) == ()
    with pytest.raises(InvalidInput, match="tensorrt builds for the GPU that it runs on only"):
        serialise(fake(), BuildRequest(b"", target="sm86"))

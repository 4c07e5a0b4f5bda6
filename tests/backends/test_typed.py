"""Strongly typed networks: every type that an operator reads is one that it takes, and they compute what the network did."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from lowering.test_lowering import error, lowering
from networks import NETWORKS
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.base import BuildOptions, NodeTime
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.backends.typed import TYPES, strongly_typed, unit_precisions
from hwsearch.engine.attribution import attribute
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import unit_of
from hwsearch.network.variants import Variant, uniform
from hwsearch.testing.contract import small_network

SMALL = ("residual", "attention", "two_inputs")
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
OTHERS = "unet mobilenet_v3 gpt_block shared_linear one_dimensional mlp_batchnorm dict_in_dict_out constant_inputs".split()


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Every tensor's type, after the checker and strict type inference have passed."""
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return found | {t.name: t.data_type for t in graph.initializer}


def variants(low: Lowering, *cycle: str) -> dict[str, Variant]:
    return {u.name: Variant(cycle[i % len(cycle)]) for i, u in enumerate(low.network.units)}


def computes(model: onnx.ModelProto) -> dict[str, set[int]]:
    """For each unit the float types that its own products read."""
    known: dict[str, set[int]] = {}
    found = types(model)
    for node in model.graph.node:
        unit, own = unit_of(node.name)
        if own and node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            known.setdefault(unit, set()).update(found[name] for name in node.input)
    return known


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_units_compute_in_their_own_precision_and_quantized_ones_in_the_base(name: str, base: str) -> None:
    low = small_network(name)
    asked = variants(low, "fp32", "int8", "fp16", "bf16")
    model = strongly_typed(low.onnx(asked, metadata={"key": "value"}), base)
    for unit, kinds in computes(model).items():
        precision = asked[unit].precision
        assert kinds == {TYPES[base if precision == "int8" else precision]}, unit
    assert {p.key: p.value for p in model.metadata_props}["key"] == "value"


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_network_becomes_valid_and_keeps_its_interface(name: str, base: str) -> None:
    low = lowering(*NETWORKS[name]())
    for asked in (uniform(low.network, base), variants(low, "int8", base, "fp32")):
        plain = low.onnx(asked)
        model = strongly_typed(plain, base)
        types(model)
        assert [v.SerializeToString() for v in model.graph.input] == [
            v.SerializeToString() for v in plain.graph.input
        ]
        assert [v.SerializeToString() for v in model.graph.output] == [
            v.SerializeToString() for v in plain.graph.output
        ]


@pytest.mark.parametrize("name", SMALL)
def test_a_uniform_half_network_has_casts_at_its_ends_only_and_half_weights(name: str) -> None:
    low = small_network(name)
    for base in HALF:
        model = strongly_typed(low.onnx(uniform(low.network, base)), base)
        casts = [n for n in model.graph.node if n.op_type == "Cast"]
        assert len(casts) == len(model.graph.input) + len(model.graph.output)
        stored = {t.data_type for t in model.graph.initializer}
        assert TensorProto.FLOAT not in stored


@pytest.mark.parametrize("name", SMALL)
def test_fp32_networks_stay_as_they_are(name: str) -> None:
    low = small_network(name)
    for asked in (uniform(low.network, "fp32"), uniform(low.network, "int8")):
        plain = low.onnx(asked)
        for base in ("fp32", "tf32"):
            model = strongly_typed(plain, base)
            assert [n.SerializeToString() for n in model.graph.node] == [
                n.SerializeToString() for n in plain.graph.node
            ]


TOLERANCE = {"fp16": 1e-3, "bf16": 1e-2}
"""Of the outputs' root mean square; measured: at most 3.2e-4 in fp16 and 3.7e-3 in bf16, LayerNorm and softmax in the base."""


@pytest.mark.parametrize("name", SMALL)
def test_it_computes_the_same_up_to_its_precision(name: str) -> None:
    """fp16 in ONNX Runtime, which computes operators without fp16 kernels in fp32; bf16 in OpenVINO."""
    low = small_network(name)
    arrays = low.arrays()
    runtimes: dict[str, Any] = {"fp16": ONNXRuntimeBackend(), "bf16": OpenVINOBackend()}
    dense = ONNXRuntimeBackend().build(
        low.onnx(uniform(low.network, "fp32")).SerializeToString(), BuildOptions()
    )
    want = dense(*arrays)
    for base, backend in runtimes.items():
        model = strongly_typed(low.onnx(uniform(low.network, base)), base)
        got = backend.build(model.SerializeToString(), BuildOptions())(*arrays)
        assert error(got, want) < TOLERANCE[base], base


@pytest.mark.parametrize("base", ["fp16", "fp32"])
@pytest.mark.parametrize("name", SMALL)
def test_int8_units_keep_their_grid(name: str, base: str) -> None:
    low = small_network(name)
    plain = low.onnx(variants(low, "int8", base))
    runtime = ONNXRuntimeBackend()
    want = runtime.build(plain.SerializeToString(), BuildOptions())(*low.arrays())
    model = strongly_typed(plain, base)
    got = runtime.build(model.SerializeToString(), BuildOptions())(*low.arrays())
    assert error(got, want) < 2e-2  # a value beside the border of two steps may fall to the other side


@pytest.mark.parametrize("name", SMALL)
def test_names_survive_and_new_casts_are_conversions_of_units(name: str) -> None:
    low = small_network(name)
    plain = low.onnx(variants(low, "fp16", "fp32", "int8"))
    model = strongly_typed(plain, "fp16")
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)
    kept = [n.name for n in plain.graph.node if "Cast.weight" not in n.name]
    assert [n for n in names if "|Cast." not in n] == [n for n in kept if "|Cast." not in n]
    inner = [
        n.name
        for n in model.graph.node
        if n.op_type == "Cast"
        and not {*n.input, *n.output} & {v.name for v in (*model.graph.input, *model.graph.output)}
    ]
    assert inner
    rows = attribute([NodeTime(n, "Cast", (n,), "fp16", 1.0) for n in inner], low.network, {})
    assert {row.kind for row in rows} == {"edge"}
    assert all(row.units for row in rows)


def test_the_precision_of_a_product_of_two_activations_is_in_the_metadata() -> None:
    low = small_network("attention")
    asked = {**uniform(low.network, "fp16"), "matmul": Variant("fp32"), "out": Variant("fp32")}
    found = unit_precisions(low.onnx(asked))
    assert {u: p for u, p in found.items() if p != "fp16"} == {"matmul": "fp32", "out": "fp32"}
    assert found["matmul_1"] == "fp16"


def graph(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: list[int], opset: int = 18
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


def run(model: onnx.ModelProto, x: Any) -> Any:
    return ONNXRuntimeBackend().build(model.SerializeToString(), BuildOptions())(x)[0]


def test_numbers_that_fp16_does_not_hold() -> None:
    """The mask of an attention and the least divisor of a normalisation: neither infinity nor zero in fp16."""
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["a"], name="~|0|Add"),
        helper.make_node("Softmax", ["a"], ["s"], name="~|0|Softmax"),
        helper.make_node("Add", ["s", "eps"], ["b"], name="~|0|Add.1"),
        helper.make_node("Sub", ["b", "s"], ["c"], name="~|0|Sub"),
        helper.make_node("Add", ["c", "s"], ["y"], name="~|0|Add.2"),
    ]
    lowest = np.finfo(np.float32).min
    model = graph(
        nodes, {"mask": np.array([0, lowest, lowest], np.float32), "eps": np.float32(1e-12)}, [1, 3]
    )
    typed = strongly_typed(model, "fp16")
    stored = {t.name: numpy_helper.to_array(t) for t in typed.graph.initializer}
    assert np.isfinite(stored["mask/fp16"]).all()
    assert stored["eps/fp16"] > 0
    assert np.allclose(run(typed, np.ones((1, 3), np.float32)), [[1, 0, 0]], atol=1e-6)


def test_squares_and_sums_stay_in_fp32_in_fp16() -> None:
    """300 squared is more than fp16 holds; the root of the sum of four such squares is not."""
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["p"], name="~|0|Pow"),
        helper.make_node("ReduceSum", ["p"], ["s"], name="~|0|ReduceSum", keepdims=1),
        helper.make_node("Sqrt", ["s"], ["y"], name="~|0|Sqrt"),
    ]
    x = np.full((1, 4), 300.0, np.float32)
    typed = strongly_typed(graph(nodes, {"two": np.float32(2)}, [1, 4]), "fp16")
    found = types(typed)
    assert {found[n.output[0]] for n in typed.graph.node if n.op_type in ("Pow", "ReduceSum")} == {
        TensorProto.FLOAT
    }
    assert np.allclose(run(typed, x), 600.0)


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_operators_that_make_numbers(base: str) -> None:
    """Whether or not an attribute says their type."""
    tensor = numpy_helper.from_array(np.float32([2]))
    nodes = [
        helper.make_node("Constant", [], ["a"], name="~|0|Constant", value=tensor),
        helper.make_node("Constant", [], ["b"], name="~|0|Constant.1", value_floats=[3.0]),
        helper.make_node("ConstantOfShape", ["shape"], ["c"], name="~|0|ConstantOfShape"),
        helper.make_node("ConstantOfShape", ["shape"], ["d"], name="~|0|ConstantOfShape.1", value=tensor),
        helper.make_node("Shape", ["x"], ["e"], name="~|0|Shape"),
        helper.make_node("Cast", ["e"], ["f"], name="~|0|Cast", to=TensorProto.FLOAT),
        helper.make_node("Sum", ["x", "a", "b", "c", "d", "f"], ["y"], name="~|0|Sum"),
    ]
    typed = strongly_typed(graph(nodes, {"shape": np.int64([1])}, [1]), base)
    types(typed)
    if base == "fp16":
        assert run(typed, np.float32([1])) == 1 + 2 + 3 + 0 + 2 + 1


def test_resizing_keeps_its_own_scales_in_fp32() -> None:
    nodes = [
        helper.make_node("Resize", ["x", "", "s"], ["y"], name="~|0|Resize", mode="nearest"),
    ]
    typed = strongly_typed(graph(nodes, {"s": np.float32([1, 1, 2, 2])}, [1, 1, 2, 2]), "fp16")
    found = types(typed)
    assert found["s"] == TensorProto.FLOAT
    resized = run(typed, np.ones((1, 1, 2, 2), np.float32))
    assert resized.shape == (1, 1, 4, 4)


def test_scales_below_the_normal_range_of_fp16_round_weights_anew() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([3e-7, 1e-5, 4e-3], np.float32)
    integers = rng.integers(-127, 128, (3, 16)).astype(np.int8)
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["w", "s", "z"], ["d"], name="u|0|DequantizeLinear.weight", axis=0
        ),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="u|0|Gemm", transB=1),
    ]
    model = graph(nodes, {"w": integers, "s": scales, "z": np.zeros(3, np.int8)}, [1, 16])
    stored = {t.name: numpy_helper.to_array(t) for t in strongly_typed(model, "fp16").graph.initializer}
    (w,) = (v for v in stored.values() if v.ndim == 2)
    (s,) = (v for v in stored.values() if v.dtype == np.float16)
    want = integers * scales[:, None].astype(np.float64)
    got = w * s[:, None].astype(np.float64)
    off = np.abs(got - want).max(1) / np.abs(want).max(1)
    assert off[0] < 0.1  # a weight of at most 4e-5: 5 bits of fp16's own subnormal numbers
    assert off[1] < 5e-3
    assert off[2] < 1e-3


def test_scales_of_tensors_are_scalars() -> None:
    """[1] is one channel to TensorRT, which then dequantizes before convolutions."""
    low = small_network("residual")
    model = low.onnx(uniform(low.network, "int8"))
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    read = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert read
    assert all(shapes[name] == [] for n in read for name in n.input[1:])


def test_control_flow_and_operators_that_changed_are_refused() -> None:
    result = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Identity", ["x"], ["t"])], "t", [], [result])
    node = helper.make_node("If", ["c"], ["y"], name="~|0|If", then_branch=then, else_branch=then)
    with pytest.raises(BackendUnavailable, match=r"~\|0\|If is If: control flow"):
        strongly_typed(graph([node], {"c": np.array(True)}, [1]), "fp16")
    norm = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], name="~|0|GN", num_groups=1)
    model = graph([norm], {"s": np.ones(1, np.float32), "b": np.zeros(1, np.float32)}, [1, 2, 4])
    assert strongly_typed(model, "fp16").opset_import[0].version == 19
    with pytest.raises(BackendUnavailable, match=r"GroupNormalization of opset 18, .* in opset 22"):
        strongly_typed(model, "bf16")

"""Every operator that backend `torch` runs, one by one, against ONNX Runtime (or ONNX's reference) on the same node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hwsearch.backends.torch import compiler  # noqa: F401  it fills the table
from hwsearch.backends.torch.calls import TABLE
from hwsearch.errors import BackendUnavailable
from tests.backends.torch_programs import Arrays, by_onnxruntime, error, program, run

RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """One node. constants: indices of inputs that are stored in the graph; the others are given at every inference."""

    op: str
    inputs: tuple[Any, ...]
    constants: tuple[int, ...]
    outputs: int
    opset: int
    attributes: dict[str, Any]
    reference: bool

    def model(self) -> tuple[onnx.ModelProto, Arrays]:
        names = [f"x{i}" if value is not None else "" for i, value in enumerate(self.inputs)]
        stored = [
            numpy_helper.from_array(self.inputs[i], names[i])
            for i in self.constants
            if self.inputs[i] is not None
        ]
        given = [i for i, v in enumerate(self.inputs) if v is not None and i not in self.constants]
        node = helper.make_node(
            self.op, names, [f"y{i}" for i in range(self.outputs)], name="node", **self.attributes
        )
        graph = helper.make_graph(
            [node], "one",
            [helper.make_tensor_value_info(names[i], helper.np_dtype_to_tensor_dtype(self.inputs[i].dtype), self.inputs[i].shape)
             for i in given],
            [onnx.ValueInfoProto(name=f"y{i}") for i in range(self.outputs)], stored,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model)
        return model, [self.inputs[i] for i in given]


CASES: list[Any] = []


def case(
    op: str, *inputs: Any, const: tuple[int, ...] = (), outputs: int = 1, opset: int = 18, reference: bool = False,
    **attributes: Any,
) -> None:  # fmt: skip
    arrays = tuple(None if v is None else np.asarray(v) for v in inputs)
    made = Case(op, arrays, const, outputs, opset, attributes, reference)
    told = "-".join(str(v) for v in attributes.values())[:40].replace(" ", "")
    CASES.append(pytest.param(made, id=f"{op}-{told}-{len(CASES)}" if told else f"{op}-{len(CASES)}"))


def f(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Any:
    return RNG.uniform(0.2, 0.9, shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


for name in ("Abs Atan Asinh Ceil Cos Cosh Erf Exp Floor HardSwish Neg Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus "
             "Softsign Tan Tanh Identity Elu LeakyRelu HardSigmoid Selu Celu Mish ThresholdedRelu").split():  # fmt: skip
    case(name, f(3, 5) * 3)
for name in ("Acos", "Asin", "Atanh", "Log", "Sqrt"):
    case(name, positive(3, 5))
case("Acosh", positive(3, 5) + 1)
case("IsNaN", np.array([1.0, np.nan], np.float32))
for found in ({}, {"detect_negative": 0}, {"detect_positive": 0}):
    case("IsInf", np.array([1.0, np.inf, -np.inf], np.float32), opset=10, **found)
case("Elu", f(4, 4), alpha=0.5)
case("LeakyRelu", f(4, 4), alpha=0.3)
case("HardSigmoid", f(4, 4) * 4, alpha=1 / 6, beta=0.5)
case("Celu", f(4, 4), alpha=2.0)
case("Gelu", f(4, 4), opset=20)
case("Gelu", f(4, 4), opset=20, approximate="tanh")
case("Dropout", f(3, 4))
case("PRelu", f(2, 3, 4), f(3, 1), const=(1,))
case("Clip", f(4, 4), np.float32(-0.5), np.float32(0.5), const=(1, 2))
case("Clip", f(4, 4), None, np.float32(0.5), const=(1, 2))
case("Clip", f(4, 4))
case("Clip", f(4, 4), min=-0.5, max=0.5, opset=6)
for name in ("Add", "Sub", "Mul", "Div"):
    case(name, f(2, 3, 4), f(3, 1))
    case(name, f(2, 3), f(3), const=(1,))
case("Div", ints(7, -7, 8), ints(2, 2, -3), const=(1,))
case("Mod", ints(7, -7, 8), ints(3, 3, -3), const=(1,))
case("Mod", f(5) * 4, positive(5), fmod=1)
for exponent in (2.0, 0.5, 3.0, -1.0):
    case("Pow", positive(2, 3), np.float32(exponent), const=(1,))
case("Pow", positive(2, 3), f(3))
case("Pow", positive(2), np.full((1, 1), 2, np.float32), const=(1,))
case("Pow", ints(2, 3), np.float32(2.0), const=(1,))
for name in ("Max", "Min", "Sum", "Mean"):
    case(name, f(2, 3), f(3), f(1, 3))
    case(name, f(2, 3))
for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    case(name, ints(1, 2, 3), ints(2, 2, 2))
for name in ("And", "Or", "Xor"):
    case(name, np.array([True, True, False]), np.array([True, False, False]))
case("Not", np.array([True, False]))
for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
    case(name, np.array([5, 6], np.int32), np.array([3, 12], np.int32))
case("BitwiseNot", np.array([5, -6], np.int32))
case("Where", np.array([[True], [False]]), f(2, 3), f(3))
case("Cast", f(4) * 5, to=TensorProto.INT64)
case("Cast", f(4), to=TensorProto.FLOAT16)
case("Cast", ints(0, 2), to=TensorProto.BOOL)
case("Cast", ints(0, 2), to=TensorProto.FLOAT)
case("CastLike", f(4) * 5, ints(1), const=(1,))
for name in ("Softmax", "LogSoftmax"):
    case(name, f(2, 3, 4))
    case(name, f(2, 3, 4), axis=1)
case("LpNormalization", f(2, 3), p=1, axis=0)
case("LpNormalization", f(2, 3))
for reverse in (0, 1):
    for exclusive in (0, 1):
        case("CumSum", f(3, 4), ints(1).reshape(()), const=(1,), reverse=reverse, exclusive=exclusive)
for name in ("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum "
             "ReduceLogSumExp").split():  # fmt: skip
    case(name, positive(2, 3, 4), ints(-1), const=(1,))
    case(name, positive(2, 3, 4), ints(0, 2), const=(1,), keepdims=0)
    case(name, positive(2, 3))
case("ReduceSum", f(2, 3), ints(), const=(1,), noop_with_empty_axes=1)
case("ReduceMean", f(2, 3), axes=[1], opset=13)
case("ReduceMax", ints(1, 5, 3))
for name in ("ArgMax", "ArgMin"):
    case(name, f(3, 4), axis=1)
    case(name, f(3, 4), axis=-1, keepdims=0)
    case(name, np.array([[1.0, 3.0, 3.0, 1.0]], np.float32), axis=1, select_last_index=1)
case("TopK", f(3, 5), ints(2), const=(1,), outputs=2)
case("TopK", f(3, 5), ints(2), const=(1,), outputs=2, axis=0, largest=0)

case("Shape", f(2, 3, 4))
case("Shape", f(2, 3, 4), start=1, end=-1)
case("Size", f(2, 3))
case("Reshape", f(2, 3, 4), ints(0, -1), const=(1,))
case("Flatten", f(2, 3, 4))
case("Flatten", f(2, 3, 4), axis=-1)
case("Flatten", f(2, 3, 4), axis=0)
case("Flatten", f(2, 3, 4), axis=3)
case("Transpose", f(2, 3, 4), perm=[2, 0, 1])
case("Transpose", f(2, 3))
case("Squeeze", f(1, 3, 1), ints(-1), const=(1,))
case("Squeeze", f(1, 3, 1))
case("Unsqueeze", f(3, 2), ints(0, -1), const=(1,))
case("Expand", f(3, 1), ints(2, 1, 4), const=(1,))
case("Tile", f(2, 3), ints(2, 1), const=(1,))
case("Concat", f(2, 3), f(2, 1), axis=-1)
case("Split", f(2, 6), outputs=3, axis=1, num_outputs=3)
case("Split", f(2, 5), outputs=3, axis=1, num_outputs=3)
case("Split", f(2, 6), ints(1, 5), const=(1,), outputs=2, axis=-1)
case("Slice", f(4, 5), ints(1), ints(3), const=(1, 2))
case("Slice", f(4, 5), ints(0, 1), ints(9, -1), ints(0, -1), ints(2, 1), const=(1, 2, 3, 4))
case("Slice", f(4, 5), ints(-1), ints(-(2**63)), ints(1), ints(-2), const=(1, 2, 3, 4))
case("Slice", f(4, 5), ints(3, 0), ints(0, 4), ints(0, 1), ints(-1, 2), const=(1, 2, 3, 4))
case("Gather", f(4, 5), ints(2, -1), const=(1,))
case("Gather", f(4, 5), ints(1).reshape(()), const=(1,), axis=1)
case("Gather", f(4, 5), ints(2, -1, 0).reshape(3, 1), axis=1)
case("Gather", f(4, 5), np.array([[2, 3]], np.int32), const=(0,))
case("GatherElements", f(3, 3), ints(0, -1, 1).reshape(1, 3))
case("GatherND", f(3, 4, 2), ints(0, 1, 2, 3).reshape(2, 2))
for how in ("none", "add", "mul", "max", "min"):
    case("ScatterElements", f(3, 3), ints(0, -1, 1).reshape(1, 3), f(1, 3), reduction=how)
for how in ("none", "add"):
    case("ScatterND", f(4, 3), ints(0, 2).reshape(2, 1), f(2, 3), reduction=how)
case("Pad", f(2, 3), ints(1, 0, 0, 2), np.float32(1.5), const=(1, 2))
case("Pad", f(2, 3), ints(-1, 1), None, ints(1), const=(1, 2, 3))
for how in ("reflect", "edge", "wrap"):
    case("Pad", f(1, 2, 4, 5), ints(0, 0, 2, 1, 0, 0, 3, 2), const=(1,), mode=how, opset=19)
case("ConstantOfShape", ints(2, 3), const=(0,), value=numpy_helper.from_array(np.array([7], np.int64)))
case("Range", ints(1).reshape(()), ints(9).reshape(()), ints(3).reshape(()), const=(0, 1, 2))
case("Trilu", f(4, 4))
case("Trilu", f(4, 4), ints(-1).reshape(()), const=(1,), upper=0)
case("OneHot", ints(0, -1, 7), ints(3).reshape(()), np.array([0.0, 2.0], np.float32), const=(1, 2))
case("OneHot", ints(0, 2), ints(3).reshape(()), ints(0, 1), const=(1, 2), axis=0)
for how in ("DCR", "CRD"):
    case("DepthToSpace", f(1, 8, 2, 3), blocksize=2, mode=how)
case("SpaceToDepth", f(1, 2, 4, 6), blocksize=2)
sized = (None, None)
for where in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"):
    for how in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        case("Resize", f(1, 2, 4, 5), *sized, ints(1, 2, 7, 3), const=(3,), nearest_mode=how,
             coordinate_transformation_mode=where)  # fmt: skip
    case("Resize", f(1, 2, 4, 5), None, np.array([1, 1, 2, 3], np.float32), const=(2,), nearest_mode="floor",
         coordinate_transformation_mode=where)  # fmt: skip
    if where != "asymmetric":
        case("Resize", f(1, 2, 4, 5), *sized, ints(1, 2, 7, 9), const=(3,), mode="linear",
             coordinate_transformation_mode=where)  # fmt: skip
        case("Resize", f(1, 2, 4, 5), *sized, ints(1, 2, 7, 9), const=(3,), mode="cubic",
             coordinate_transformation_mode=where)  # fmt: skip
case("Resize", f(1, 2, 4, 5), None, np.array([1, 1, 1.7, 0.6], np.float32), const=(2,), mode="linear")
case("Resize", f(1, 2, 4, 5), *sized, ints(1, 2, 4, 5), const=(3,))
case("Resize", f(1, 2, 4), *sized, ints(1, 2, 7), const=(3,), mode="linear")

case("MatMul", f(2, 3, 4), f(4, 5))
case("MatMul", f(2, 3, 4), f(4, 5), const=(1,))
case("MatMul", f(3, 4), f(2, 4, 5), const=(0,))
case("MatMul", f(4), f(4, 5), const=(1,))
case("MatMul", f(2, 1, 3, 4), f(5, 4, 2))
case("Gemm", f(3, 4), f(4, 5), f(5), const=(1, 2))
case("Gemm", f(3, 4), f(5, 4), f(1, 5), const=(1, 2), transB=1)
case("Gemm", f(3, 4), f(5, 4), f(3, 1), const=(1, 2), transB=1)
case("Gemm", f(4, 3), f(4, 5), f(5), transA=1, alpha=0.5, beta=2.0)
case("Gemm", f(3, 4), f(4, 5), const=(1,), alpha=0.5)
case("Einsum", f(2, 3, 4), f(2, 4, 5), equation="bij,bjk->bik")
for pads in ([1, 1, 1, 1], [0, 1, 2, 0]):
    case("Conv", f(1, 4, 7, 8), f(6, 2, 3, 3), f(6), const=(1, 2), group=2, pads=pads, strides=[2, 1])
case("Conv", f(1, 4, 7, 8), f(6, 4, 3, 3), const=(1,), dilations=[2, 2])
for how in ("SAME_UPPER", "SAME_LOWER", "VALID"):
    case("Conv", f(1, 4, 7, 8), f(6, 4, 3, 2), const=(1,), auto_pad=how, strides=[2, 2])
case("Conv", f(1, 4, 7), f(6, 4, 1), f(6), const=(1, 2))
case("Conv", f(1, 4, 5, 5, 5), f(6, 4, 3, 3, 3), f(6), const=(1, 2), pads=[1] * 6)
case("Conv", f(1, 4, 7, 8), f(6, 4, 3, 3))
for pads in ([1, 1, 1, 1], [0, 1, 2, 0]):
    case("ConvTranspose", f(1, 4, 5, 6), f(4, 3, 3, 3), f(6), const=(1, 2), group=2, pads=pads, strides=[2, 2],
         output_padding=[1, 0])  # fmt: skip
case("ConvTranspose", f(1, 4, 5), f(4, 3, 2), const=(1,), strides=[2])
for pads in ([1, 1, 1, 1], [0, 1, 2, 0], [0, 0, 0, 0]):
    case("MaxPool", f(1, 2, 7, 8), kernel_shape=[3, 3], pads=pads, strides=[2, 2])
    case("AveragePool", f(1, 2, 7, 8), kernel_shape=[3, 3], pads=pads, strides=[2, 2], count_include_pad=1)
case("MaxPool", f(1, 2, 8), kernel_shape=[3], strides=[2], ceil_mode=1)
case("MaxPool", f(1, 2, 9, 9), kernel_shape=[2, 2], dilations=[2, 2])
case("AveragePool", f(1, 2, 7, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
for name in ("GlobalAveragePool", "GlobalMaxPool"):
    case(name, f(2, 3, 4, 5))
case("BatchNormalization", f(2, 3, 4), f(3), f(3), f(3), positive(3), const=(1, 2, 3, 4))
case("InstanceNormalization", f(2, 3, 4, 5), f(3), f(3), const=(1, 2))
case("LayerNormalization", f(2, 3, 4), f(4), f(4), const=(1, 2), axis=-1)
case("LayerNormalization", f(2, 3, 4), f(3, 4), const=(1,), axis=1, epsilon=1e-3)
case("LayerNormalization", f(2, 3, 4), f(1), f(4), const=(1, 2))
case("GroupNormalization", f(2, 6, 4), f(3), f(3), const=(1, 2), num_groups=3, reference=True)
case("GroupNormalization", f(2, 6, 4), f(6), f(6), const=(1, 2), num_groups=3, opset=21, reference=True)
case("RMSNormalization", f(2, 3, 4), f(4), const=(1,), opset=23, reference=True)
case("RMSNormalization", f(2, 3, 4), f(1), const=(1,), opset=23, reference=True)
for how in ("bilinear", "nearest", "bicubic"):
    for corners in (0, 1):
        case("GridSample", f(1, 2, 4, 5), RNG.uniform(-1.2, 1.2, (1, 3, 3, 2)).astype(np.float32), mode=how,
             align_corners=corners)  # fmt: skip

for found, directions in (("forward", 1), ("bidirectional", 2)):
    for name, gates in (("GRU", 3), ("LSTM", 4)):
        more = {"linear_before_reset": 1} if name == "GRU" else {}
        weights = f(directions, gates * 5, 3), f(directions, gates * 5, 5), f(directions, 2 * gates * 5)
        count = 2 if name == "GRU" else 3
        case(
            name, f(4, 2, 3), *weights, const=(1, 2, 3), outputs=count, hidden_size=5, direction=found, **more
        )
        case(name, f(4, 2, 3), *weights[:2], None, None, f(directions, 2, 5), *([f(directions, 2, 5)] if name == "LSTM" else []),
             const=(1, 2), outputs=count, hidden_size=5, direction=found, **more)  # fmt: skip

i8 = RNG.integers(-127, 128, (4, 6)).astype(np.int8)
case("QuantizeLinear", f(4, 6) * 3, np.float32(0.02), np.int8(0), const=(1, 2))
case("QuantizeLinear", np.arange(-3, 3, 0.25, np.float32), np.float32(0.5), np.int8(0), const=(1, 2))
case("QuantizeLinear", f(4, 6) * 3, np.float32(0.02), np.uint8(128), const=(1, 2))
case("QuantizeLinear", f(4, 6) * 3, positive(6), np.zeros(6, np.int8), const=(1, 2), axis=1)
case("QuantizeLinear", f(4, 6) * 3, np.float32(0.02), const=(1,))
case("DequantizeLinear", i8, np.float32(0.02), np.int8(0), const=(1, 2))
case("DequantizeLinear", i8, positive(6), np.zeros(6, np.int8), const=(1, 2), axis=1)
case("DequantizeLinear", i8, np.float32(0.02), np.int8(3), const=(1, 2))
case("DequantizeLinear", i8, positive(4), np.arange(4).astype(np.int8), const=(0, 1, 2), axis=0)
case("DequantizeLinear", i8, positive(4, 2), const=(0, 1), axis=1, block_size=3, opset=21)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_onnx_says(case: Case) -> None:
    model, arrays = case.model()
    want = ReferenceEvaluator(model).run(None, dict(zip([v.name for v in model.graph.input], arrays, strict=True))) \
        if case.reference else by_onnxruntime(model, arrays)  # fmt: skip
    got = run(program(model), arrays)
    exact = all(not np.issubdtype(v.dtype, np.floating) for v in want)
    assert error(got, [np.asarray(v) for v in want]) <= (0 if exact else 2e-5)


def test_every_operator_of_the_table_is_tried() -> None:
    tried = {param.values[0].op for param in CASES}
    own = {name for name in TABLE if name.startswith("hwsearch.")}  # tried in test_torch_fusing.py
    assert set(TABLE) - own == tried


def test_an_unknown_operator_is_named_with_what_to_do() -> None:
    model, _ = Case("NonZero", (np.ones((2, 2), np.float32),), (), 1, 18, {}, False).model()
    with pytest.raises(
        BackendUnavailable, match=r"torch cannot run node node \(NonZero\): .* use another backend"
    ):
        program(model)


def test_shapes_that_depend_on_the_data_are_refused() -> None:
    model, _ = Case("Reshape", (np.ones((2, 2), np.float32), ints(4)), (), 1, 18, {}, False).model()
    with pytest.raises(BackendUnavailable, match=r"node \(Reshape\): its input 1 depends on the data"):
        program(model)


def test_what_torch_refuses_is_told_in_its_words() -> None:
    model, _ = Case(
        "Add", (np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)), (), 1, 18, {}, False
    ).model()
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 3
    with pytest.raises(
        BackendUnavailable, match=r"torch cannot run node node \(Add\): The size of tensor a \(2\) must match"
    ):
        program(model)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "why"),
    [
        ("MaxPool", (f(1, 1, 4, 4),), {"kernel_shape": [2, 2]}, "computes its first output only"),
        ("Resize", (f(1, 1, 4, 4), None, None, ints(1, 1, 8, 8)),
         {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, "no linear interpolation"),
        ("AveragePool", (f(1, 1, 4, 4),), {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "leaves out the uneven paddings"),
        ("LSTM", (f(4, 2, 3), f(1, 20, 3), f(1, 20, 5)), {"hidden_size": 5, "direction": "reverse"}, "runs backwards only"),
        ("GRU", (f(4, 2, 3), f(1, 15, 3), f(1, 15, 5)), {"hidden_size": 5}, "no GRU with linear_before_reset = 0"),
    ],
)  # fmt: skip
def test_what_torch_counts_in_another_way_is_refused(op: str, inputs: Any, attributes: Any, why: str) -> None:
    outputs = 2 if op == "MaxPool" else 1
    model, _ = Case(op, inputs, tuple(range(1, len(inputs))), outputs, 18, attributes, False).model()
    with pytest.raises(BackendUnavailable, match=why):
        program(model)


def test_one_hot_copies_no_number_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.where` of numbers would, at every inference; and a copy from the host cannot be captured in a CUDA graph."""
    depth = numpy_helper.from_array(np.array(4, np.int64), "depth")
    values = numpy_helper.from_array(np.array([0.5, 2.0], np.float32), "values")
    graph = helper.make_graph(
        [helper.make_node("OneHot", ["x", "depth", "values"], ["y"], name="y")], "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, (3,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 4))], [depth, values],
    )  # fmt: skip
    made = program(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    given: list[Any] = []
    real = torch.where
    monkeypatch.setattr(torch, "where", lambda *a: (given.extend(a), real(*a))[1])
    (y,) = run(made, [np.array([0, 3, -1], np.int64)])
    assert y.tolist() == [[2.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 2.0], [0.5, 0.5, 0.5, 2.0]]
    assert len(given) == 3
    assert all(isinstance(v, torch.Tensor) for v in given)

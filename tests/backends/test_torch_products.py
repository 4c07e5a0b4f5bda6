"""Which products become which kernels, and that those compute what Q/DQ says. int8 and fp8 are multiplied by torch on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from hwsearch.backends.torch.offering import Kernels
from hwsearch.backends.torch.products import RULES, is_2_4, kernels_for
from hwsearch.backends.torch.program import OnnxProgram
from tests.backends.fake_cuda import Products
from tests.backends.torch_programs import FLOATS, by_onnxruntime, error, program, run

ALL = Kernels(int8=True, fp8=True, sparse=True)
PRODUCT = ("MatMul", "Gemm", "Conv")


def pruned(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two of four of a matrix [out, in]: the first and the last stay."""
    return weight * np.tile([1, 0, 0, 1], weight.shape[1] // 4)


class Case:
    """x -> (Q/DQ) -> product with a weight [out, in] -> (bias) -> y, in ONNX."""

    def __init__(
        self, op: str, rows: int = 20, features: int = 64, out: int = 32, *, precision: str = "int8", sparse: bool = False,
        bias: bool = True, per_channel: bool = True, zero: int = 0, base: type = np.float32, turned: bool = False,
        by_input: bool = False, extra_reader: bool = False, **attributes: Any,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(rows + features + out)
        matrix = rng.standard_normal((out, features)).astype(np.float32)
        matrix = pruned(matrix).astype(np.float32) if sparse else matrix
        self.nodes, self.stored, self.base = [], [], helper.np_dtype_to_tensor_dtype(np.dtype(base))
        shape = {
            "MatMul": (2, rows // 2, features),
            "Gemm": (rows, features),
            "Conv": (1, features, 4, rows // 4),
        }[op]
        self.x = rng.standard_normal(shape).astype(base)
        weight, axis = {"MatMul": (matrix.T, 1), "Gemm": (matrix, 0), "Conv": (matrix[:, :, None, None], 0)}[
            op
        ]
        if op == "Gemm" and turned:
            weight, axis = matrix.T, 1
        axis = 1 - axis if by_input else axis
        read, kept = "x", "w"
        if precision in ("int8", "fp8"):
            top = 127 if precision == "int8" else 448
            self.qdq(np.array(np.abs(self.x.astype(np.float32)).max() / top, base), precision, zero)
            scales = np.maximum(np.abs(matrix).max(0 if by_input else 1), 1e-3) / top
            scales = scales if per_channel else scales.max(keepdims=True).reshape(())
            spread = (
                scales.reshape([-1 if d == axis else 1 for d in range(weight.ndim)])
                if per_channel
                else scales
            )
            self.coded("w/q", weight / spread, precision)
            self.store("w/scale", scales.astype(base))
            self.coded("w/zero", np.zeros(scales.shape), precision)
            name = "u|0|DequantizeLinear.weight"
            self.nodes.append(
                helper.make_node(
                    "DequantizeLinear", ["w/q", "w/scale", "w/zero"], ["w"], name=name, axis=axis
                )
            )
            read = "x/dq"
        else:
            self.store("w", weight.astype(base))
        added = rng.standard_normal(out).astype(base)
        inputs = [read, kept]
        if bias and op != "MatMul":
            self.store("b", added)
            inputs.append("b")
        if op == "Gemm" and not turned:
            attributes["transB"] = 1
        last = "y" if not (bias and op == "MatMul") else "product"
        self.nodes.append(helper.make_node(op, inputs, [last], name=f"u|0|{op}", **attributes))
        outputs = ["y"]
        if last == "product":
            self.store("b", added)
            self.nodes.append(helper.make_node("Add", ["product", "b"], ["y"], name="u|0|Add"))
            outputs += ["product"] if extra_reader else []
        graph = helper.make_graph(
            self.nodes, "case", [helper.make_tensor_value_info("x", self.base, self.x.shape)],
            [helper.make_tensor_value_info(name, self.base, None) for name in outputs], self.stored,
        )  # fmt: skip
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 19 if base is np.float32 else 21)], ir_version=10
        )
        self.model = onnx.shape_inference.infer_shapes(model)

    def store(self, name: str, values: Any) -> None:
        self.stored.append(
            numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name)
        )

    def coded(self, name: str, values: Any, precision: str) -> None:
        values = np.asarray(values, np.float32)
        if precision == "int8":
            self.store(name, np.clip(np.round(values), -127, 127).astype(np.int8))
            return
        raw = torch.from_numpy(np.array(values)).to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
        self.stored.append(
            helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, list(values.shape), raw, raw=True)
        )

    def qdq(self, scale: Any, precision: str, zero: int) -> None:
        self.store("x/scale", scale)
        self.coded("x/zero", np.full((), zero), precision)
        for op, source, to in (("QuantizeLinear", "x", "x/q"), ("DequantizeLinear", "x/q", "x/dq")):
            self.nodes.append(helper.make_node(op, [source, "x/scale", "x/zero"], [to], name=f"u|0|{op}.in0"))

    def program(self, there: Kernels = ALL, base: str = "fp32") -> OnnxProgram:
        return program(self.model, there, base)

    def checked(self, there: Kernels = ALL, tolerance: float = 1e-5) -> OnnxProgram:
        """Against ONNX Runtime, which computes halves in fp32 where its CPU kernels have none."""
        made = self.program(there)
        assert error(run(made, [self.x]), by_onnxruntime(self.model, [self.x])) <= tolerance
        return made


def executed(made: OnnxProgram) -> str:
    (found,) = [s.precision for s in made.steps if s.op in PRODUCT]
    return found


# ---- what is chosen


@pytest.mark.parametrize("op", PRODUCT)
@pytest.mark.parametrize(("precision", "sparse", "wanted"), [
    ("int8", False, "int8"), ("fp8", False, "fp8"), ("int8", True, "2:4.int8"), ("fp8", True, "fp8"), ("fp32", True, "fp32"),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_products(
    op: str, precision: str, sparse: bool, wanted: str, bias: bool, products: Products
) -> None:  # fmt: skip
    made = Case(op, precision=precision, sparse=sparse, bias=bias).checked()
    assert executed(made) == wanted
    steps = {s.op for s in made.steps}
    assert "DequantizeLinear" not in steps
    assert "Add" not in steps, "the bias is part of the product's call"
    (step,) = [s for s in made.steps if s.op in PRODUCT]
    assert f"u|0|{op}" in step.sources
    assert ("u|0|Add" in step.sources) == (bias and op == "MatMul")
    if wanted != "fp32":
        assert {"u|0|DequantizeLinear.in0", "u|0|DequantizeLinear.weight"} <= set(step.sources)
        assert sum(products.called.values()) == 2, "once as it was built, once as it ran"
    assert not made.declined


@pytest.mark.parametrize("op", PRODUCT)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_products_of_2_4_weights(op: str, sparse: bool, kind: str, products: Products) -> None:
    case = Case(op, precision="none", sparse=sparse, base=np.float16)
    model = case.model
    if kind == "bf16":
        from hwsearch.backends.typed import strongly_typed

        model = strongly_typed(Case(op, precision="none", sparse=sparse).model, "bf16")
    made = program(model, ALL, kind)
    assert executed(made) == (f"2:4.{kind}" if sparse else kind)
    x = case.x.astype(np.float32 if kind == "bf16" else np.float16)
    dense = program(model, FLOATS, kind)
    assert executed(dense) == kind
    assert error(run(made, [x]), run(dense, [x])) <= (4e-2 if kind == "bf16" else 4e-3)
    if sparse:
        assert made.size_bytes < 0.8 * dense.size_bytes, "compressed weights are smaller"


@pytest.mark.parametrize("rows", [2, 8, 16, 18, 34])
@pytest.mark.parametrize(("precision", "sparse"), [("int8", False), ("int8", True), ("fp8", False)])
def test_rows_that_a_kernel_does_not_take_are_made_up(
    rows: int, precision: str, sparse: bool, products: Products
) -> None:  # fmt: skip
    for op in ("Gemm", "MatMul"):
        made = Case(op, rows, precision=precision, sparse=sparse).checked()
        assert executed(made) == (f"2:4.{precision}" if sparse else precision)
        assert not made.declined


@pytest.mark.parametrize(("case", "wanted"), [
    (Case("Gemm", out=30), "fp32"),
    (Case("Gemm", features=60), "fp32"),
    (Case("Gemm", out=24, precision="fp8"), "fp32"),
    (Case("Gemm", features=72, precision="fp8"), "fp32"),
    (Case("Gemm", out=48, sparse=True), "int8"),
    (Case("Gemm", zero=3), "fp32"),
    (Case("Gemm", alpha=0.5), "fp32"),
    (Case("Gemm", turned=True), "int8"),
    (Case("Gemm", per_channel=False), "int8"),
    (Case("Gemm", features=32, by_input=True), "fp32"),
    (Case("MatMul", features=32, by_input=True), "fp32"),
    (Case("MatMul", extra_reader=True), "int8"),
    (Case("Conv", strides=[2, 2]), "fp32"),
    (Case("Conv", pads=[1, 1, 1, 1]), "fp32"),
])  # fmt: skip
def test_what_shapes_rule_out_is_computed_in_float_and_says_so(
    case: Case, wanted: str, products: Products
) -> None:  # fmt: skip
    made = case.checked()
    assert executed(made) == wanted
    assert not made.declined, "no kernel was asked for what it does not take"
    assert (wanted == "fp32") == ("DequantizeLinear" in {s.op for s in made.steps})


def test_convolutions_other_than_of_1x1_are_computed_in_float(products: Products) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (32, 64, 3, 3)).astype(np.int8)
    case = Case("Conv")
    for tensor in case.model.graph.initializer:
        if tensor.name == "w/q":
            tensor.CopyFrom(numpy_helper.from_array(weight, "w/q"))
    assert executed(case.checked()) == "fp32"
    assert not products.called


@pytest.mark.parametrize(("precision", "sparse", "there", "wanted"), [
    ("int8", False, FLOATS, "fp32"), ("fp8", False, Kernels(int8=True), "fp32"), ("int8", True, Kernels(int8=True), "int8"),
    ("int8", True, Kernels(sparse=True), "2:4.int8"), ("int8", False, Kernels(sparse=True), "fp32"),
])  # fmt: skip
def test_only_kernels_that_are_there_are_used(
    precision: str, sparse: bool, there: Kernels, wanted: str, products: Products
) -> None:  # fmt: skip
    assert executed(Case("MatMul", precision=precision, sparse=sparse).checked(there)) == wanted


def test_the_cpu_s_own_kernels_agree() -> None:
    """Without the imitation: `_int_mm` and `_scaled_mm` of this torch."""
    for precision in ("int8", "fp8"):
        assert (
            executed(Case("MatMul", precision=precision).checked(Kernels(int8=True, fp8=True))) == precision
        )


def test_codes_that_are_also_read_as_floats_are_dequantized_too(products: Products) -> None:
    case = Case("MatMul")
    case.model.graph.node.append(helper.make_node("Relu", ["x/dq"], ["z"], name="v|0|Relu"))
    case.model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, case.x.shape))
    made = case.checked()
    assert executed(made) == "int8"
    assert [s.op for s in made.steps if "Quantize" in s.op or "Dequantize" in s.op] == [
        "QuantizeLinear",
        "DequantizeLinear",
    ]


def test_large_accumulators_are_not_lost_in_halves(products: Products) -> None:
    """int32 sums are far beyond what fp16 holds; their products with the scales are not."""
    case = Case("Gemm", features=4096, base=np.float16)
    got = run(case.program(base="fp16"), [case.x])
    want = run(program(case.model, FLOATS, "fp16"), [case.x])
    assert np.isfinite(got[0]).all()
    assert error(got, want) <= 1e-2


@pytest.mark.parametrize("op", PRODUCT)
@pytest.mark.parametrize(
    ("precision", "sparse", "tried"),
    [
        ("int8", False, ["int8"]),
        ("int8", True, ["2:4.int8", "int8", "2:4.fp16"]),
        ("none", True, ["2:4.fp16"]),
    ],
)
def test_a_kernel_that_declines_is_told_and_replaced(
    op: str, precision: str, sparse: bool, tried: list[str], products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What this GPU's libraries refuse against torch's own rules must not end a profile."""

    def fail(*operands: Any, **options: Any) -> None:
        raise RuntimeError(
            "CUDA error: CUSPARSE_STATUS_NOT_SUPPORTED when calling `cusparseLtMatmul(...)`\nmore"
        )

    monkeypatch.setattr(torch, "_int_mm", fail)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fail)
    case = Case(op, precision=precision, sparse=sparse, base=np.float16)
    made = case.program(base="fp16")
    assert executed(made) == "fp16"
    ((node, reason),) = made.declined.items()
    assert node == f"u|0|{op}"
    said = "CUDA error: CUSPARSE_STATUS_NOT_SUPPORTED when calling `cusparseLtMatmul(...)`"
    assert reason == "; ".join(f"{kernel}: {said}" for kernel in tried)
    assert error(run(made, [case.x]), run(program(case.model, FLOATS, "fp16"), [case.x])) == 0
    assert made.size_bytes == program(case.model, FLOATS, "fp16").size_bytes, "nothing of it stays"


def test_a_full_gpu_is_not_a_kernel_that_declines(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*operands: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "_int_mm", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Case("Gemm").program()


# ---- rules


def test_rules_are_those_of_the_torch_that_is_installed() -> None:
    rules = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    for name, dtype in (("2:4.int8", torch.int8), ("2:4.fp16", torch.float16), ("2:4.bf16", torch.bfloat16)):
        rule, own = rules[dtype], RULES[name]
        assert (own.out, own.features, own.rows) == (
            rule.sparse_min_rows,
            rule.sparse_min_cols,
            rule.dense_min_rows,
        )
        assert own.features % rule.dense_min_cols == 0


def test_what_is_2_4() -> None:
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0]])
    assert is_2_4(weight)
    assert not is_2_4(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    assert not is_2_4(weight[:, :6])
    assert kernels_for(ALL, torch.int8, torch.ones(32, 32, dtype=torch.int8)) == ["int8"]
    assert kernels_for(ALL, torch.float32, torch.zeros(32, 32)) == []
    assert kernels_for(ALL, torch.int8, torch.zeros(32, 32)) == [], "activations and weights are of two types"

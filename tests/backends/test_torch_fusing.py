"""What backend `torch` computes by one kernel and ONNX writes as several nodes: the same numbers, and the nodes it stands for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.torch.compiler import compiled
from hwsearch.backends.torch.graph import read
from hwsearch.backends.torch.offering import Kernels
from hwsearch.backends.torch.program import OnnxProgram
from hwsearch.backends.typed import strongly_typed
from hwsearch.network.variants import uniform
from hwsearch.testing.contract import small_network
from tests.backends.fake_cuda import Products
from tests.backends.torch_programs import CPU, by_onnxruntime, error, program, run

CUDNN = Kernels(convolutions=True)
Nodes = list[tuple[str, list[str], str] | tuple[str, list[str], str, dict[str, Any]]]


def graph(
    nodes: Nodes, inputs: dict[str, tuple[int, ...]], constants: dict[str, Any], *outputs: str
) -> onnx.ModelProto:
    """Nodes (operator, inputs, output, attributes), named after their outputs."""
    made = [
        helper.make_node(op, names, [out], name=out, **(more[0] if more else {}))
        for op, names, out, *more in nodes
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs or ("y",)]
    stored = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in constants.items()]
    model = helper.make_model(
        helper.make_graph(made, "g", values, results, stored),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model)


def halves(model: onnx.ModelProto, there: Kernels = Kernels(), base: str = "fp16") -> OnnxProgram:  # noqa: B008
    return compiled(read(strongly_typed(model, base)), CPU, there, base)


def checked(model: onnx.ModelProto, made: OnnxProgram, tolerance: float, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
    ]
    assert error(run(made, arrays), by_onnxruntime(model, arrays)) <= tolerance


def operators(made: OnnxProgram) -> list[str]:
    return [s.op for s in made.steps if s.op != "Cast"]


# ---- GELU

GELU = {"root": math.sqrt(2.0), "reciprocal": math.sqrt(0.5), "one": 1.0, "half": 0.5}
INNER: dict[str, tuple[str, list[str]]] = {"div": ("Div", ["x", "root"]), "mul": ("Mul", ["reciprocal", "x"])}
OUTER: dict[str, Nodes] = {
    "half first": [("Mul", ["half", "c"], "d"), ("Mul", ["x", "d"], "y")],
    "half last": [("Mul", ["c", "x"], "d"), ("Mul", ["d", "half"], "y")],
    "half of x": [("Mul", ["x", "half"], "d"), ("Mul", ["d", "c"], "y")],
}


def gelu(inner: str, outer: str, **constants: float) -> onnx.ModelProto:
    op, names = INNER[inner]
    nodes: Nodes = [(op, names, "a"), ("Erf", ["a"], "b"), ("Add", ["b", "one"], "c"), *OUTER[outer]]
    return graph(nodes, {"x": (4, 6)}, GELU | constants)


@pytest.mark.parametrize(("inner", "outer"), list(itertools.product(INNER, OUTER)))
@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_gelu_in_any_order_is_one_call(inner: str, outer: str, base: str) -> None:
    model = gelu(inner, outer)
    made = halves(model, base=base)
    assert operators(made) == ["Gelu"]
    (step,) = [s for s in made.steps if s.op == "Gelu"]
    assert sorted(step.sources) == ["a", "b", "c", "d", "y"]
    checked(model, made, {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[base])


@pytest.mark.parametrize("constants", [{"one": 2.0}, {"half": 0.25}, {"root": 1.5}])
def test_what_only_looks_like_gelu_stays(constants: dict[str, float]) -> None:
    model = gelu("div", "half last", **constants)
    made = program(model)
    assert "Erf" in operators(made)
    checked(model, made, 1e-6)


def test_gelu_whose_parts_are_read_stays() -> None:
    nodes: Nodes = [
        ("Div", ["x", "root"], "a"),
        ("Erf", ["a"], "b"),
        ("Add", ["b", "one"], "c"),
        *OUTER["half last"],
    ]
    for part in "abcd":
        model = graph(nodes, {"x": (4, 6)}, GELU, "y", part)
        made = program(model)
        assert "Erf" in operators(made)
        checked(model, made, 1e-6)


# ---- attention


def attention(
    mask: str = "", scaled: str = "q", q: Any = (2, 3, 5, 8), k: Any = (2, 3, 7, 8)
) -> onnx.ModelProto:
    """Queries, keys and values of 5 and 7 positions; scaled: which of q and k is multiplied by 0.3."""
    nodes: Nodes = [("Mul", [n, "s"], f"{n}s") for n in scaled]  # type: ignore[misc]
    left, right = ("qs" if "q" in scaled else "q"), ("kts" if "k" in scaled else "kt")
    order = [*range(len(k) - 2), len(k) - 1, len(k) - 2]
    nodes = [("Transpose", ["k"], "kt", {"perm": order}), *[n for n in nodes if n[2] == "qs"]]
    nodes += [("Mul", ["kt", "s"], "kts")] if "k" in scaled else []
    nodes += [("MatMul", [left, right], "scores")]
    nodes += [("Add", ["scores", mask], "masked")] if mask else []
    nodes += [("Softmax", ["masked" if mask else "scores"], "p", {"axis": -1}), ("MatMul", ["p", "v"], "y")]
    rng = np.random.default_rng(1)
    constants: dict[str, Any] = {"s": 0.3}
    inputs = {"q": q, "k": k, "v": (*k[:-1], 4)}
    if mask == "m":
        constants["m"] = np.where(rng.random((5, 7)) < 0.3, -1e4, 0.0)
    elif mask:
        inputs[mask] = (q[0], 1, 5, 7)
    return graph(nodes, inputs, constants)


@pytest.mark.parametrize("mask", ["", "m", "given"])
@pytest.mark.parametrize("scaled", ["q", "k", "qk", ""])
def test_attention_in_halves_is_one_call(mask: str, scaled: str) -> None:
    model = attention(mask, scaled)
    made = halves(model)
    assert [o for o in operators(made) if o != "Transpose"] == ["Attention"]
    (step,) = [s for s in made.steps if s.op == "Attention"]
    assert {"scores", "p", "y"} <= set(step.sources)
    checked(model, made, 5e-3)
    assert "Softmax" in operators(program(model)), (
        "in fp32 torch's kernels are others than the products asked for"
    )
    checked(model, program(model), 1e-5)


@pytest.mark.parametrize(
    ("q", "k"), [((5, 8), (7, 8)), ((4, 5, 8), (4, 7, 8)), ((2, 1, 3, 5, 8), (2, 1, 3, 7, 8))]
)
def test_attention_of_any_rank(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    checked(attention(q=q, k=k), halves(attention(q=q, k=k)), 5e-3)


def test_keys_shared_by_the_heads_are_spread() -> None:
    model = attention(q=(2, 3, 5, 8), k=(2, 1, 7, 8))
    assert "Attention" in operators(halves(model))
    checked(model, halves(model), 5e-3)


def test_attention_whose_probabilities_are_read_stays() -> None:
    model = attention()
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    made = halves(model)
    assert "Softmax" in operators(made)
    checked(model, made, 5e-3)


def test_both_products_of_a_network_s_attention_are_named() -> None:
    low = small_network("attention")
    made = halves(low.onnx(uniform(low.network, "fp16")))
    (step,) = [s for s in made.steps if s.op == "Attention"]
    assert {name.split("|")[0] for name in step.sources} >= {"matmul", "matmul_1"}


# ---- convolutions and linear layers with what stands behind them


def convolution(behind: Nodes, pads: list[int] | None = None, *, bias: bool = True) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((6, 6, 3, 3)) / 8, "b": rng.standard_normal(6)}
    before: Nodes = [("Neg", ["z"], "n")] if any("n" in node[1] for node in behind) else []
    nodes: Nodes = [
        *before,
        ("Conv", ["x", "w", *(["b"] if bias else [])], "c", {"pads": pads or [1, 1, 1, 1]}),
        *behind,
    ]
    return graph(nodes, {"x": (2, 6, 5, 5), "z": (2, 6, 5, 5)}, constants)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("behind", "called"), [
    ([("Relu", ["c"], "y")], "conv relu"), ([("Add", ["n", "c"], "a"), ("Relu", ["a"], "y")], "conv add relu"),
])  # fmt: skip
def test_a_convolution_takes_what_stands_behind_it(
    behind: Nodes, called: str, bias: bool, products: Products
) -> None:
    model = convolution(behind, bias=bias)
    made = halves(model, CUDNN)
    assert [s.op for s in made.steps if s.op not in ("Cast", "Neg")] == ["Conv"]
    assert not made.declined
    (step,) = [s for s in made.steps if s.op == "Conv"]
    assert set(step.sources) == {"c", *(n[2] for n in behind)}
    before = products.called[called]
    checked(model, made, 1e-2)
    assert products.called[called] == before + 1
    assert operators(halves(model))[-len(behind) :] == [n[0] for n in behind], "without cuDNN each is a call"


@pytest.mark.parametrize("behind", [
    [("Sigmoid", ["c"], "y")], [("Add", ["z", "c"], "y")], [("Add", ["z", "c"], "a"), ("Sigmoid", ["a"], "y")],
    [("Relu", ["c"], "r"), ("Add", ["r", "c"], "y")], [("Relu", ["z"], "q"), ("Add", ["q", "c"], "y")],
])  # fmt: skip
def test_what_cudnn_has_no_call_for_stays(behind: Nodes, products: Products) -> None:
    model = convolution(behind)
    made = halves(model, CUDNN)
    checked(model, made, 1e-2)
    assert not products.called["conv relu"] + products.called["conv add relu"]


def test_uneven_paddings_broadcasts_and_fp32_stay(products: Products) -> None:
    checked(
        convolution([("Relu", ["c"], "y")], [0, 1, 2, 1]),
        halves(convolution([("Relu", ["c"], "y")], [0, 1, 2, 1]), CUDNN),
        1e-2,
    )
    broadcast = graph(
        [("Conv", ["x", "w"], "c"), ("Add", ["z", "c"], "a"), ("Relu", ["a"], "y")],
        {"x": (2, 6, 5, 5), "z": (2, 6, 1, 1)}, {"w": np.ones((6, 6, 3, 3)) / 54},
    )  # fmt: skip
    checked(broadcast, halves(broadcast, CUDNN), 1e-2)
    plain = convolution([("Relu", ["c"], "y")])
    checked(plain, program(plain, CUDNN), 1e-5)
    assert not products.called


def test_a_sum_of_two_convolutions_joins_the_later_one(products: Products) -> None:
    rng = np.random.default_rng(0)
    nodes: Nodes = [
        ("Conv", ["x", "w"], "a"), ("Conv", ["x", "v"], "b"), ("Add", ["a", "b"], "c"), ("Relu", ["c"], "y"),
    ]  # fmt: skip
    constants = {n: rng.standard_normal((6, 6, 1, 1)) / 4 for n in "vw"}
    model = graph(nodes, {"x": (2, 6, 5, 5)}, constants)
    made = halves(model, CUDNN)
    assert [(s.op, len(s.sources)) for s in made.steps if s.op != "Cast"] == [("Conv", 1), ("Conv", 3)]
    checked(model, made, 1e-2)


def test_a_convolution_that_cudnn_declines_is_told_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*operands: Any) -> None:
        raise RuntimeError("Unable to find an engine to execute this computation\nmore")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fail)
    model = convolution([("Relu", ["c"], "y")])
    made = halves(model, CUDNN)
    assert made.declined == {
        "c": "convolution with ReLU: Unable to find an engine to execute this computation"
    }
    assert operators(made) == ["Conv", "Relu"]
    checked(model, made, 1e-2)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_a_linear_layer_takes_its_relu(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    nodes: Nodes = [("MatMul", ["x", "w"], "p"), ("Add", ["p", "b"], "a"), ("Relu", ["a"], "y")]
    model = graph(nodes, {"x": shape}, {"w": rng.standard_normal((6, 5)), "b": rng.standard_normal(5)})
    made = program(model)
    (step,) = made.steps
    assert step.sources == ("p", "a", "y")
    checked(model, made, 1e-6)


def test_fp8_with_a_scale_for_each_column_is_one_call_of_bf16(products: Products) -> None:
    from tests.backends.test_torch_products import Case

    for op in ("Gemm", "MatMul", "Conv"):
        case = Case(op, 20, precision="fp8", base=np.float16)
        one = case.program(Kernels(fp8=True, fp8_rows=True), "fp16")
        other = case.program(Kernels(fp8=True), "fp16")
        assert error(run(one, [case.x]), run(other, [case.x])) <= 8e-3, "rounded to bf16 once"
        assert {s.precision for s in one.steps if s.op == op} == {"fp8"}

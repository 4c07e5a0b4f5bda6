"""Pads before convolutions become their padding; float layers between Q/DQ stay float in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exact import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.engine.attribution import attribute, executed_precisions
from hwsearch.engine.setup import set_up
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import tensor_names
from hwsearch.lowering.rewrites import fold_pads
from hwsearch.network.variants import Variant

SIDE, CHANNELS = 7, 3


def model(
    widths: Sequence[int],
    own: Sequence[int],
    *,
    quantized: str = "",
    convolutions: int = 1,
    mode: str = "constant",
    value: float | None = None,
    beside: str = "",
    channels: int = 0,
) -> onnx.ModelProto:
    """x -> Pad -> [Q/DQ of a type] -> so many Conv; beside: another operator that reads the padded tensor."""
    rng = np.random.default_rng(0)
    begins, ends = [0, channels, *widths[:2]], [0, 0, *widths[2:]]
    stored = {
        "pads": np.array([*begins, *ends], np.int64),
        "weight": rng.normal(size=(4, CHANNELS + channels, 3, 3)).astype(np.float32),
        "scale": np.float32(0.05),
        "zero": np.array({"": 0, "int8": 0, "uint8": 128}[quantized], quantized or "int8"),
    }
    inputs = ["x", "pads"]
    if value is not None:
        stored["value"] = np.float32(value)
        inputs.append("value")
    nodes = [helper.make_node("Pad", inputs, ["padded"], name="Pad", mode=mode)]
    source = "padded"
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["padded", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["grid"]),
        ]
        source = "grid"
    attributes: dict[str, Any] = {"pads": list(own)} if any(own) else {}
    outputs = [f"y{i}" for i in range(convolutions)]
    nodes += [helper.make_node("Conv", [source, "weight"], [y], **attributes) for y in outputs]
    if beside:
        nodes.append(helper.make_node(beside, ["padded"], ["z"]))
        outputs.append("z")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def folded(made: onnx.ModelProto) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(made)
    stored = {t.name: t for t in new.graph.initializer}
    nodes = fold_pads(list(new.graph.node), stored, [v.name for v in new.graph.output])
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del new.graph.node[:]
    new.graph.node.extend(kept)
    return new


def pads_left(made: onnx.ModelProto) -> int:
    return sum(n.op_type == "Pad" for n in made.graph.node)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.sampled_from(["", "int8", "uint8"]),
    st.integers(1, 2),
    st.sampled_from([None, 0.0]),
)
def test_the_same_numbers_without_the_pad(
    widths: tuple[int, ...], own: tuple[int, ...], quantized: str, convolutions: int, value: float | None
) -> None:
    made = model(widths, own, quantized=quantized, convolutions=convolutions, value=value)
    new = folded(made)
    assert (pads_left(made), pads_left(new)) == (1, 0)
    x = np.random.default_rng(1).normal(size=(2, CHANNELS, SIDE, SIDE)).astype(np.float32)
    for a, b in zip(ReferenceEvaluator(made).run(None, {"x": x}), ReferenceEvaluator(new).run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"mode": "reflect"},
        {"value": 1.0},
        {"beside": "Relu"},
        {"beside": "Identity"},
        {"channels": 1},
    ],
    ids=str,
)
def test_any_other_pad_stays(other: dict[str, Any]) -> None:
    made = model((1, 1, 1, 1), (0, 0, 0, 0), **other)
    assert folded(made) == made


def test_a_pad_that_is_cut_or_an_output_stays() -> None:
    made = model((-1, 0, 0, -1), (0, 0, 0, 0))
    assert folded(made) == made
    made = model((1, 0, 0, 1), (0, 0, 0, 0))
    made.graph.output.append(helper.make_tensor_value_info("padded", TensorProto.FLOAT, None))
    assert folded(made) == made


class Between(nn.Module):
    """A float layer (`b`, and the product of attention) between two that are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        flat = y.flatten(2)
        z: torch.Tensor = self.c(torch.relu(self.b(torch.nn.functional.max_pool2d(y, 2))))
        return z + (flat.transpose(1, 2) @ flat).mean()


def test_onnx_runtime_leaves_a_float_layer_between_quantized_ones_as_it_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 20, 20)
    low = Lowering(hs.Task(Between(), x, [x], lambda predict: 0.0, "between"), int8_bits=bits())
    variants = {u.name: Variant("int8" if u.name in "ac" else "fp32") for u in low.network.units}
    backend = ONNXRuntimeBackend()
    model = low.onnx(variants, quantize_outputs=True)
    assert [n.name for n in model.graph.node if n.op_type == "Max"] == ["b|0|Max.float", "matmul|0|Max.float"]
    engine = backend.build(model.SerializeToString(), BuildOptions(1, "fp32"))
    simulate = low.simulator(low.traced, (x,), {}, quantize_outputs=True)
    want, dense = (np.asarray(y.detach()) for y in (simulate(variants)[0], simulate.dense[0]))
    (have,) = engine(*low.arrays())
    quantization = float(np.linalg.norm(want - dense))
    assert float(np.linalg.norm(have - want)) < 0.05 * quantization
    executed = executed_precisions(attribute(engine.nodes(), low.network, tensor_names(model)), low.network)
    assert dict(zip((u.name for u in low.network.units), executed, strict=True))["b"] == "fp32"
    whole = low.onnx(dict.fromkeys(variants, Variant("int8")), quantize_outputs=True)
    assert not [n for n in whole.graph.node if n.op_type == "Max"]


class Placed(nn.Module):
    """What a convolution reads is multiplied with, or divided by, a factor of so many dimensions."""

    def __init__(self, dimensions: int, factor: tuple[int, ...], divided: bool, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv = kind(4, 8, kernel, padding=kernel // 2, groups=groups)
        self.register_buffer("factor", 1.0 + 8.0 * torch.rand(factor))
        self.divided = divided

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x / self.factor if self.divided else x * self.factor)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(
    "factor", [(3,), (3, 1), (3, 3), (1, 3), (4, 3, 3), (1, 1, 3, 3), (1, 4, 1, 3), (1, 4, 3, 3), (4, 1, 1), ()], ids=str
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_takes_no_place_for_a_tap_of_the_kernel(factor: tuple[int, ...], divided: bool, precision: str) -> None:
    """Of a factor before a convolution, where the image is as large as the kernel (MultiplyConvolutionFusion)."""
    torch.manual_seed(0)
    check_placed(Placed(2, factor, divided), torch.randn(2, 4, 3, 3), Variant(precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("dimensions", "factor"), [(1, (3,)), (1, (4, 3)), (3, (3,)), (3, (1, 3, 1)), (3, (4, 3, 3, 3))])
def test_nor_in_one_or_three_dimensions(dimensions: int, factor: tuple[int, ...], precision: str) -> None:
    torch.manual_seed(0)
    check_placed(Placed(dimensions, factor, False), torch.randn(1, 4, *[3] * dimensions), Variant(precision))


@pytest.mark.parametrize("groups", [2, 4])
def test_nor_of_grouped_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    check_placed(Placed(2, (3, 3), False, groups), torch.randn(1, 4, 3, 3), Variant("fp32"))


def check_placed(net: nn.Module, x: torch.Tensor, variant: Variant) -> None:
    """The engine computes what is simulated."""
    setup = set_up(hs.Task(net.eval(), x, [x], lambda predict: 0.0, "placed"), backends.get("openvino"))
    engine, _ = setup.build({"conv": variant}, "fp32")
    assert not setup.expected.deviation(engine, {"conv": variant}, "fp32").wrong


@pytest.mark.parametrize(("kernel", "factor"), [(3, (8, 8)), (3, (3, 8)), (1, (8, 8)), (3, (4, 1, 1))])
def test_other_factors_are_stored_as_they_are(kernel: int, factor: tuple[int, ...]) -> None:
    x, net = torch.randn(1, 4, *(factor[-2:] if factor[-1] > 1 else (8, 8))), Placed(2, factor, False, kernel=kernel).eval()
    setup = set_up(hs.Task(net, x, [x], lambda predict: 0.0, "placed"), backends.get("openvino"))
    made = setup.onnx({"conv": Variant("fp32")})
    assert not any("/spread/" in t.name for t in made.graph.initializer)


class Joined(nn.Module):
    """Convolutions of parts of the input, joined. parts: which part each reads, in the order in which they are joined."""

    def __init__(self, parts: Sequence[int], bias: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 5, 3, padding=1, bias=bool(bias)) for _ in parts)
        self.parts = tuple(parts)
        if bias == "zeros":
            for layer in self.layers:
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x.chunk(2, 1)
        return torch.cat([layer(given[i]) for layer, i in zip(self.layers, self.parts, strict=True)], 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "w8", "int8"])
@pytest.mark.parametrize("bias", ["", "zeros", "some"])
@pytest.mark.parametrize("parts", [(0, 1), (1, 0), (0, 0), (1, 1), (0, 1, 1)], ids=str)
def test_openvino_joins_what_the_parts_of_a_split_become_in_order(parts: tuple[int, ...], bias: str, precision: str) -> None:
    """Of such convolutions it makes a grouped one without looking which part goes to which."""
    torch.manual_seed(0)
    x, names = torch.randn(1, 8, 6, 6), [f"layers.{i}" for i in range(len(parts))]
    task = hs.Task(Joined(parts, bias).eval(), x, [x], lambda predict: 0.0, "joined")
    setup = set_up(task, backends.get("openvino"))
    variants = dict.fromkeys(names, Variant(precision))
    engine, made = setup.build(variants, "fp32")
    assert not setup.expected.deviation(engine, variants, "fp32").wrong
    added = sum(t.name.endswith("/next_to_nothing") for t in made.graph.initializer)
    right = parts == (0, 1) or bias == "some" or precision == "int8"  # with Q/DQ between them nothing is fused
    assert added == (0 if right else len(parts))

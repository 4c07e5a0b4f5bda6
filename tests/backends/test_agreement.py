"""One deployed file in two runtimes: they may differ only where a quantizer's input lies on a tie of its rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("openvino", reason="OpenVINO is not installed")

from exact import bits

from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend

BACKENDS = [ONNXRuntimeBackend, OpenVINOBackend]
TIE = 1e-3
"""How near to a half, in steps, a number may lie for float32 to round it to the other side."""


class Two(nn.Module):
    def __init__(self, dead: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1)
        with torch.no_grad():
            self.first.weight[3] *= (
                dead  # next to nothing beside its bias: what folding a BatchNorm may leave
            )
            self.first.bias.copy_(torch.linspace(0.1, 2.0, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]


def lowered(dead: float) -> Lowering:
    torch.manual_seed(0)
    data = [torch.randn(1, 8, 40, 40) for _ in range(4)]
    task = hs.Task(Two(dead).eval(), data[0], data, evaluate=lambda _: 0.0, name="two")
    return Lowering(task, int8_bits=bits())


def stored(model: onnx.ModelProto, name: str) -> Any:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).astype(
        np.float64
    )


def wanted(low: Lowering, model: onnx.ModelProto) -> tuple[Any, Any, str]:
    """What the second quantizer should read, in its steps and in float64; its scale; the tensor that is dequantized."""
    nodes = {n.name: n for n in model.graph.node}
    q = {u: nodes[f"{u}|0|QuantizeLinear.in0"] for u in ("first", "second")}
    conv = next(n for n in model.graph.node if n.op_type == "Conv" and n.name.startswith("first|"))
    weight = nodes["first|0|DequantizeLinear.weight"]
    scales = {u: stored(model, n.input[1]) for u, n in q.items()}
    x = low.arrays()[0].astype(np.float64)
    x = np.clip(np.round(x / scales["first"]), -128, 127)
    w, s, b = (stored(model, n) for n in (weight.input[0], weight.input[1], conv.input[2]))
    sums = F.conv2d(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    y = sums * (scales["first"] * s)[:, None, None] + b[:, None, None]
    return (
        np.maximum(y, 0) / scales["second"],
        scales["second"],
        nodes["second|0|DequantizeLinear.in0"].output[0],
    )


@pytest.mark.parametrize("dead", [1.0, 1e-12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_differ_only_at_ties(backend: Any, dead: float) -> None:
    low = lowered(dead)
    model = low.onnx(uniform(low.network, "int8"))
    exact, scale, tensor = wanted(low, model)
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, exact.shape))
    engine = backend().build(model.SerializeToString(), BuildOptions(1, "fp32"))
    got = engine(*low.arrays())[1] / scale
    assert np.abs(got - np.round(got)).max() < TIE
    off = np.round(got) != np.clip(np.round(exact), -128, 127)
    assert off.mean() < 0.01
    assert np.abs(np.abs(exact - np.floor(exact)) - 0.5)[off].max(initial=0) < TIE
    assert np.abs(got - exact)[off].max(initial=0) < 0.5 + TIE

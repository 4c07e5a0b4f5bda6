"""Biases survive quantization, those of channels without weights among them, and the simulation has what the file has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exact import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import leaves
from onnx.reference import ReferenceEvaluator
from torch import nn

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.compress.biases import MOST_STEPS, fitted, on_steps, steps
from hwsearch.compress.formats import StoredWeight
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3), (4, 8, 8)),
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 8, 8)),
}


@given(
    st.lists(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0]), min_size=3, max_size=3),
    st.lists(
        st.floats(-1e3, 1e3, width=32).filter(lambda b: b == 0 or abs(b) > 1e-28), min_size=3, max_size=3
    ),
    st.sampled_from([1e-4, 0.03, 7.0]),
)
@settings(max_examples=200, deadline=None)
def test_a_bias_is_kept_to_a_thousandth_of_its_output(
    scales: list[float], biases: list[float], activation: float
) -> None:
    """scales: 0 stands for a channel of zeros, which is stored with a scale of 1.

    Not of biases so small that their millionth is no normal number of fp32: it has no step as fine as that.
    """
    values = np.array([[127, -3], [5, 127], [1, -127]], np.int8) * (np.array(scales) > 0)[:, None].astype(
        np.int8
    )
    weight = StoredWeight("int8", values, np.array([s or 1.0 for s in scales], np.float32))
    bias = np.array(biases, np.float32)
    new = fitted(weight, bias, activation)
    assert new.scales is not None
    rounded = on_steps(bias, step := steps(new, activation))
    largest = np.abs(bias) + 127 * 127 * activation * np.array(scales)  # of the output
    assert (np.abs(rounded - bias) <= 1e-3 * largest).all()
    assert (np.abs(bias) <= 1.001 * MOST_STEPS * step)[step > 0].all()
    off = np.abs(new.dequantized() - weight.dequantized()).max(1) * 127 * activation
    assert (off <= 1e-3 * largest).all()


def lowering(layer: str, dead: float) -> Lowering:
    """A layer of which two channels have no weight, or next to none, between two others."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    own = make()
    with torch.no_grad():
        out = own.weight.transpose(0, 1) if layer == "transposed" else own.weight
        out[1] *= dead
        out[4] *= dead
        own.bias.copy_(torch.tensor([0.3, 0.105, -0.2, 0.0, -0.0123, 2.0]))
    x = [8 * torch.randn(1, *shape) for _ in range(3)]
    task = hs.Task(nn.Sequential(own, nn.Tanh()).eval(), x[0], x, lambda _: 0.0, layer)
    return Lowering(task, int8_bits=bits())


@pytest.mark.parametrize("dead", [0.0, 1e-12])
@pytest.mark.parametrize("layer", LAYERS)
def test_dead_channels_give_their_bias(layer: str, dead: float) -> None:
    low = lowering(layer, dead)
    variants = uniform(low.network, "int8")
    found: list[Any] = []
    for backend in (ONNXRuntimeBackend(), OpenVINOBackend()):
        model = low.onnx(variants, quantize_outputs=False)
        found.append(backend.build(model.SerializeToString(), BuildOptions())(*low.arrays())[0])
    model.opset_import[0].version = 19  # onnx.reference knows DequantizeLinear from there on
    names = [v.name for v in model.graph.input]
    found.append(ReferenceEvaluator(model).run(None, dict(zip(names, low.arrays(), strict=True)))[0])
    traced = low.traced
    simulate = low.simulator(traced, traced.args, traced.kwargs, quantize_outputs=False)
    found.append(leaves(simulate(variants))[0].numpy())
    for have in found:
        channels = have if layer == "linear" else np.moveaxis(have, 1, -1)
        np.testing.assert_allclose(channels[..., 1], np.tanh(0.105), atol=1e-4)
        np.testing.assert_allclose(channels[..., 4], np.tanh(-0.0123), atol=1e-4)
        assert float(np.square(have - found[-1]).mean()) <= 1e-4 * float(np.square(found[-1]).mean())


def test_the_simulation_rounds_biases_as_the_file_does() -> None:
    """A bias between two steps: what is simulated is what `onnx.reference` computes of the file, not the dense one."""
    x = torch.full((1, 4), 127.0)
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, 0, 0, 0], [0, 127.0, 0, 0]]))
        layer.bias.copy_(torch.tensor([0.4, 0.6]))  # a step is 1
    low = Lowering(hs.Task(layer.eval(), x, [x], lambda _: 0.0, "steps"), method="minmax")
    model = low.onnx(uniform(low.network, "int8"))
    model.opset_import[0].version = 19
    want = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0]
    have = leaves(low.simulator(low.traced, (x,), {}, quantize_outputs=False)(uniform(low.network, "int8")))[
        0
    ]
    np.testing.assert_allclose(have.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(want[0] % 1, 0, atol=2e-3)
    assert onnx.numpy_helper.to_array(_bias(model)).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def _bias(model: onnx.ModelProto) -> Any:
    return next(t for t in model.graph.initializer if t.name.endswith("/bias"))

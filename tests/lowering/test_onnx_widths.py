"""The exported network made narrower computes what the traced network made narrower computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from architectures import BLOCKS, convolutional, transformer
from exact import bits
from networks import NETWORKS, leaves
from torch import nn
from torch.nn import functional as F

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.compress.widths import Kept
from hwsearch.graph.calls import as_call
from hwsearch.lowering import lowering as lower
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import export
from hwsearch.lowering.onnx_widths import NotFollowed
from hwsearch.network.variants import uniform
from hwsearch.task import Task

BACKEND = ONNXRuntimeBackend()
QUICK = set(
    "residual inception densenet unet transposed_grouped squeeze_excite channel_shuffle convnext transformer_encoder "
    "vit gpt_block norms".split()
)


def made(model: nn.Module, inputs: Any) -> Lowering:
    return Lowering(Task(model, inputs, [inputs], lambda predict: 0.0, "test"), int8_bits=bits())


def random_kept(of: Lowering, seed: int) -> Kept:
    rng = np.random.default_rng(seed)
    return {
        g: sorted(rng.permutation(n)[: rng.integers(1, n + 1)].tolist())
        for g, n in of.network.channels.items()
    }


def check(of: Lowering, kept: Kept, precision: str = "fp32") -> onnx.ModelProto:
    """ONNX Runtime's outputs are torch's; every weight has the shape that the narrow network says."""
    narrow = of.narrow(kept)
    variants = uniform(narrow.network, precision)
    model = narrow.onnx(variants)
    onnx.checker.check_model(model, full_check=True)
    args, kwargs = as_call(narrow.inputs)
    if precision == "fp32":
        with torch.no_grad():
            want = leaves(narrow.traced.graph(*args, **kwargs))
    else:
        want = leaves(narrow.simulator(narrow.traced, args, kwargs, quantize_outputs=False)(variants))
    have = BACKEND.build(model.SerializeToString(), BuildOptions())(*narrow.arrays())
    assert len(have) == len(want)
    for a, b in zip(have, want, strict=True):
        assert a.shape == tuple(b.shape)
        scale = float(b.abs().max()) or 1.0
        assert np.abs(a - b.numpy()).max() / scale < (2e-4 if precision == "fp32" else 0.1)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NETWORKS]
)
def test_narrow_onnx_is_narrow_torch(name: str) -> None:
    of = made(*NETWORKS[name]())
    if not of.network.groups:
        pytest.skip("no channel may go")
    for seed in (0, 1):
        check(of, random_kept(of, seed))
    if name in QUICK:
        assert of.follow is not None, "exported anew for every width"


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_every_block_can_be_narrowed(part: int) -> None:
    kinds = sorted(BLOCKS)[part::4]
    model, x = convolutional(kinds, [8] * (len(kinds) + 1), ["pool", "flatten", "image", "two"][part], part)
    of = made(model, x)
    assert of.network.groups
    check(of, random_kept(of, part))


@pytest.mark.parametrize(
    ("heads", "kv", "kind", "mlp", "stem", "norm"),
    [(4, 4, "fused", "gelu", "image", "layer"), (4, 2, "bias rope", "swiglu", "tokens", "rms"),
     (3, 3, "norm table", "gelu", "masked", "layer")],
)  # fmt: skip
def test_transformers_can_be_narrowed(heads: int, kv: int, kind: str, mlp: str, stem: str, norm: str) -> None:
    of = made(*transformer(heads, kv, kind, 8, mlp, stem, norm, 0))
    assert of.network.groups
    for seed in (0, 1):
        check(of, random_kept(of, seed))


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_a_narrow_network_is_smaller_by_what_the_network_says(name: str) -> None:
    of = tiny.lowering(name)
    assert of.follow is not None
    whole = sum(len(t.raw_data) for t in of.onnx(uniform(of.network, "fp32")).graph.initializer)
    kept = {g: range(n // 2) for g, n in of.network.channels.items()}
    narrow = sum(len(t.raw_data) for t in check(of, kept).graph.initializer)
    saved = sum(
        4 * (a.weight_count - b.weight_count) + a.other_bytes - b.other_bytes
        for a, b in zip(of.network.units, of.narrow(kept).network.units, strict=True)
    )
    assert abs(whole - narrow - saved) <= 200  # constants of norms, and sizes
    check(of, kept, "int8")


def test_keeping_everything_changes_nothing() -> None:
    of = tiny.lowering("cnn")
    plain = uniform(of.network, "int8")
    whole = {g: range(n) for g, n in of.network.channels.items()}
    have, want = (m.onnx(plain) for m in (of.narrow(whole), of))
    assert have.graph.node == want.graph.node
    assert have.graph.initializer == want.graph.initializer


class Stepped(nn.Module):
    """Every other channel: a slice that is not followed through ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.relu(self.a(x)))
        return self.head(F.relu(self.c(y[:, ::2])))


class Twins(nn.Module):
    """Equal tensors on two channel groups: biases, small weights, buffers, or literals."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.c, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        scale = torch.randn(1, 8, 1, 1)
        self.register_buffer("first", scale.clone())
        self.register_buffer("second", scale.clone())
        with torch.no_grad():
            self.c.weight.copy_(self.b.weight if what == "weights" else self.c.weight)
            for layer in (self.a, self.b, self.c):
                assert layer.bias is not None
                layer.bias.fill_({"zeros": 0.0, "ones": 1.0}.get(what, 0.1 + layer.bias[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, literal = F.relu(self.a(x)), self.what == "literals"
        x = x * (torch.full((1, 8, 1, 1), 0.5) if literal else self.first)
        x = F.relu(self.b(x)) * (torch.full((1, 8, 1, 1), 0.5) if literal else self.second)
        return self.head(F.relu(self.c(x)))


@pytest.mark.parametrize("what", ["zeros", "ones", "weights", "buffers", "literals"])
def test_equal_tensors_do_not_make_every_width_export_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    exports = []
    monkeypatch.setattr(lower, "export", lambda traced: exports.append(traced) or export(traced))
    of = made(Twins(what), torch.randn(1, 3, 4, 4))
    for first, second in ((2, 5), (5, 2), (4, 4)):  # slots that differ, of as many as well
        kept = {g: range(i, 8, 1)[: (first, second)[i % 2]] for i, g in enumerate(of.network.channels)}
        check(of, kept)
    assert len(exports) == 1
    check(of, random_kept(of, 0), "int8")


def test_what_is_not_followed_is_exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    of = made(Stepped(), torch.randn(1, 3, 6, 6))
    assert of.network.groups
    check(of, random_kept(of, 0))

    def refuse(*args: Any) -> None:
        raise NotFollowed("an operator from the future")

    monkeypatch.setattr(lower, "OnnxWidths", refuse)
    of = made(*NETWORKS["residual"]())
    assert of.follow is None
    check(of, random_kept(of, 0))


def test_replaced_weights_are_the_ones_exported() -> None:
    of = tiny.lowering("cnn")
    kept = {"conv1": range(0, 20, 2)}
    narrow = of.narrow(kept).network["conv2"]
    weight = torch.randn(narrow.weight_shape)
    model = of.narrow(kept, {"conv2": (weight, torch.zeros(24))}).onnx(uniform(of.network, "fp32"))
    stored = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
    assert any(a.shape == weight.shape and np.array_equal(a, weight.numpy()) for a in stored)

"""A row of attention that may attend to nothing gives zeros, as in PyTorch, traced and in both runtimes, in fp32 and int8."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwsearch import backends
from hwsearch.backends.base import BuildOptions, qdq_form
from hwsearch.compress.simulate import Simulator
from hwsearch.graph.canonical import op_name
from hwsearch.graph.trace import trace
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform
from hwsearch.task import Task

Mask = Callable[[torch.Tensor], torch.Tensor]


def _allowed(valid: torch.Tensor) -> torch.Tensor:
    """[n, length] -> [n, 1, length, length]: a query that is padding attends to nothing."""
    return valid[:, None, :, None] & valid[:, None, None, :]


MASKS: dict[str, Mask] = {
    "boolean": _allowed,
    "of keys": lambda valid: valid[:, None, None, :],
    "float": lambda valid: torch.zeros(()).masked_fill(~_allowed(valid), float("-inf")),
    "float, finite": lambda valid: torch.zeros(()).masked_fill(
        ~_allowed(valid), torch.finfo(torch.float32).min
    ),
    "of queries": lambda valid: valid[:, None, :, None],
}


class Attention(nn.Module):
    """Token ids [n, length] int64, 0 where padded -> [n, length, 8], the attention's own outputs."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask, self.emb = mask, nn.Embedding(20, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 8, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n, length = ids.shape
        q, k, v = (t.reshape(n, length, 2, 8).transpose(1, 2) for t in self.qkv(self.emb(ids)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(ids != 0))
        y: torch.Tensor = self.out(attended.transpose(1, 2).reshape(n, length, 16))
        return y


def _ids(n: int, seed: int) -> torch.Tensor:
    """Sentences of different lengths; the last is empty."""
    ids = torch.randint(1, 20, (n, 6), generator=torch.Generator().manual_seed(seed))
    length = torch.arange(n - 1, -1, -1).clamp_max(6)
    return torch.where(torch.arange(6)[None] < length[:, None], ids, 0)


def _lowering(mask: str) -> Lowering:
    torch.manual_seed(0)
    return Lowering(
        Task(Attention(MASKS[mask]).eval(), _ids(7, 0), [_ids(7, i) for i in range(1, 5)], lambda p: 0.0)
    )


@pytest.mark.parametrize("mask", MASKS)
def test_the_graph_is_the_module(mask: str) -> None:
    lowering, ids = _lowering(mask), _ids(7, 9)
    with torch.no_grad():
        want, have = lowering.task.model(ids), lowering.traced.graph(ids)
    assert torch.allclose(have, want, atol=1e-5)
    if mask not in ("of queries", "float, finite"):
        assert not want[-1].any()  # an empty sentence
    assert not any(u.float_only for u in lowering.network.units)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("mask", ["boolean", "float"])
def test_both_runtimes_give_zeros(mask: str, backend: str, precision: str) -> None:
    lowering, runtime = _lowering(mask), backends.get(backend)
    variants = uniform(lowering.network, precision)
    model = lowering.onnx(variants, **qdq_form(runtime))
    engine = runtime.build(model.SerializeToString(), BuildOptions(1, "fp32"))
    (have,) = engine(*lowering.arrays())
    with torch.no_grad():
        want = lowering.task.model(lowering.inputs)
    assert np.isfinite(have).all()
    assert not have[want.numpy() == 0].any()
    simulate = Simulator(
        lowering.traced, lowering.traced.args, {}, lowering.weights, lowering.ranges,
        quantize_outputs=runtime.quantize_outputs,
    )  # fmt: skip
    simulated = simulate(variants)[0]
    assert not simulated[want == 0].any()
    if precision == "fp32":
        assert np.abs(have - want.numpy()).max() < 1e-4


def test_a_stored_mask_that_opens_every_row_costs_nothing() -> None:
    class Stored(Attention):
        def __init__(self, allowed: torch.Tensor) -> None:
            super().__init__(lambda valid: self.allowed[None].logical_not().logical_not())
            self.register_buffer("allowed", allowed)

    def operators(allowed: torch.Tensor) -> list[str]:
        graph = trace(Stored(allowed).eval(), _ids(2, 0)).graph.graph
        return [op_name(n) for n in graph.nodes if n.op == "call_function"]

    assert "amax" not in operators(torch.ones(6, 6, dtype=torch.bool).tril())
    closed = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first row may attend to nothing
    assert "amax" in operators(closed)


def test_every_layer_shares_what_is_computed_from_the_mask() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            mask = valid[:, None, :]
            for layer in (self.one, self.two):
                x = F.scaled_dot_product_attention(layer(x), x, x, attn_mask=mask)
            return x

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    traced = trace(model, (x, valid))
    assert sum(n.target is torch.ops.aten.amax.default for n in traced.graph.graph.nodes) == 1
    with torch.no_grad():
        assert torch.allclose(traced.graph(x, valid), model(x, valid), atol=1e-6)


class Mended(nn.Module):
    """Softmax written out: NaN in a row that may attend to nothing, which the network itself puts to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        scores = (h @ h.transpose(1, 2)).masked_fill(~valid[:, None, :], float("-inf"))
        y: torch.Tensor = self.out(torch.nan_to_num(scores.softmax(-1)) @ h)
        return y


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_nan_that_the_network_mends_itself_is_mended_in_both_runtimes(backend: str) -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[False] * 5, [True] * 5, [True, True, False, False, True]])
    inputs = torch.randn(3, 5, 8), valid
    lowering = Lowering(Task(Mended().eval(), inputs, [(torch.randn(3, 5, 8), valid)], lambda p: 0.0))
    assert not any(u.float_only for u in lowering.network.units)
    engine = backends.get(backend).build(
        lowering.onnx(uniform(lowering.network, "fp32")).SerializeToString(), BuildOptions(1, "fp32")
    )
    with torch.no_grad():
        want = lowering.task.model(*inputs).numpy()
    assert np.abs(engine(*lowering.arrays())[0] - want).max() < 1e-5

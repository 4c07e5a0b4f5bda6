"""Aliases are spelled out at the trace, whatever they are called and wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Apply
from torch import nn
from torch.nn import functional as F

from hwsearch.graph.aliases import is_composite, op_name
from hwsearch.graph.trace import trace


def operators(forward: Any, x: torch.Tensor, **modules: nn.Module) -> list[str]:
    """Names of the operators of a traced network, which computes what the module does."""
    torch.manual_seed(0)
    model = Apply(forward, b=nn.Linear(x.shape[-1], 3), **modules).eval()
    traced = trace(model, x)
    with torch.no_grad():
        torch.testing.assert_close(traced.graph(x), model(x))
    nodes = [n for n in traced.graph.graph.nodes if n.op == "call_function"]
    assert not any(is_composite(n.target) for n in nodes)
    return [op_name(n) for n in nodes]


def test_an_alias_is_the_operator_itself() -> None:
    def aliased(self: Any, x: torch.Tensor) -> Any:
        return self.b(torch.special.expit(torch.multiply(x, x).absolute()).moveaxis(0, 1).clip(0.1, 0.9))

    def plain(self: Any, x: torch.Tensor) -> Any:
        return self.b(torch.sigmoid(torch.mul(x, x).abs()).permute(1, 0, 2).clamp(0.1, 0.9))

    x = torch.randn(2, 3, 4)
    assert operators(aliased, x) == operators(plain, x)


def test_what_only_training_does_is_left_out() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return self.b(F.rrelu(F.alpha_dropout(self.drop(x), 0.5, self.training), training=self.training))

    assert operators(run, torch.randn(2, 4), drop=nn.Dropout()) == ["leaky_relu", "linear"]


def test_writing_in_place_is_a_concatenation() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        y[:, 0] = 1.0
        y[0].fill_(2.0)
        return self.b(y)

    found = operators(run, torch.randn(3, 5, 4))
    assert "cat" in found
    assert not {"copy", "fill", "slice_scatter", "select_scatter"} & set(found)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(("start", "end"), [(0, 5), (1, 4), (-2, None), (3, 3), (None, -1)])
def test_any_slice_can_be_written(start: int | None, end: int | None, step: int) -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        y = x * 2
        y[:, start:end:step] = torch.ones((), dtype=torch.int32)
        return self.b(y)

    operators(run, torch.randn(3, 5, 4))


def test_results_of_a_spelled_out_operator_are_read_one_by_one() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        a, b, c = torch.tensor_split(x, 3, 1)
        _, mean = torch.std_mean(x, 1)
        return self.b(torch.cat([c, a, b], 1) + mean.unsqueeze(1))

    assert "tensor_split" not in operators(run, torch.randn(2, 7, 4))


def test_a_product_with_a_sum_is_a_unit() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        return self.b(torch.baddbmm(x, x, x.transpose(1, 2), beta=0.5) + torch.addmm(x[0], x[1], x[0]))

    model = Apply(run, b=nn.Linear(4, 3))
    network = trace(model, torch.randn(2, 4, 4)).network
    assert [u.op for u in network.units] == ["matmul", "matmul", "linear"]


@pytest.mark.parametrize("written", [False, True])
def test_a_bilinear_layer_is_a_linear_one_on_pairs(written: bool) -> None:
    """Whether torch leaves it whole or, as in a graph that writes in place, makes `_trilinear` of it."""

    def run(self: Any, x: torch.Tensor) -> Any:
        y = x * 1
        if written:
            y[:, 0] = 1.0
        return self.b(self.pairs(x, y))

    found = operators(run, torch.randn(3, 2, 4), pairs=nn.Bilinear(4, 4, 4))
    assert not {"bilinear", "_trilinear"} & set(found)
    assert "mul" in found
    model = Apply(run, b=nn.Linear(4, 3), pairs=nn.Bilinear(4, 4, 4))
    units = trace(model, torch.randn(3, 2, 4)).network.units
    assert [(u.op, u.weight_shape) for u in units] == [("linear", (4, 16)), ("linear", (3, 4))]


def test_only_axes_of_one_are_squeezed() -> None:
    def run(self: Any, x: torch.Tensor) -> Any:
        x = x.squeeze(1).squeeze((0, -1)).squeeze()  # nothing, as none of them is 1 long
        return self.b(x.unsqueeze(1).unsqueeze(0).squeeze((0, 1, 2)).squeeze() + x[:1].squeeze(0))

    found = operators(run, torch.randn(3, 2, 4))
    assert found.count("squeeze") == 3

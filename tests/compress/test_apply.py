from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hwsearch.compress.simulate import Simulator
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.task import Task


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x).relu_()
        y += 1
        return self.b(y), self.c(x)


def simulator(model: nn.Module, x: torch.Tensor, **options: bool) -> Simulator:
    made = Lowering(Task(model, x, [x], lambda predict: 0.0))
    return Simulator(made.traced, (x,), {}, made.weights, made.ranges, **options)


def test_nothing_changed_is_dense() -> None:
    model, x = TwoHeads(), torch.randn(4, 8)
    simulate = simulator(model, x)
    with torch.no_grad():
        want = model(x)
    for variants in ({}, {"a": Variant("fp32")}):
        for have, dense in zip(simulate(variants), want, strict=True):
            torch.testing.assert_close(have, dense)


def test_a_unit_changes_only_what_comes_after_it() -> None:
    simulate = simulator(TwoHeads(), torch.randn(4, 8))
    for precision in ("int8", "bf16", "fp16"):
        left, right = simulate({"a": Variant(precision)})
        assert not torch.equal(left, simulate.dense[0])
        assert torch.equal(right, simulate.dense[1])


def test_a_simulation_leaves_no_trace_on_the_next() -> None:
    """In-place operators must not write into the dense run that is kept."""
    simulate = simulator(TwoHeads(), torch.randn(4, 8))
    dense = [t.clone() for t in simulate.dense]
    first = [t.clone() for t in simulate({"a": Variant("int8"), "c": Variant("int8")})]
    again = simulate({"a": Variant("int8"), "c": Variant("int8")})
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(simulate({}), dense, strict=True))


def test_quantized_outputs_have_255_levels_at_most() -> None:
    simulate = simulator(nn.Sequential(nn.Linear(8, 200)), torch.randn(64, 8), quantize_outputs=True)
    (out,) = simulate({"0": Variant("int8")})
    assert len(out.unique()) <= 256


@pytest.mark.parametrize("model", [nn.Linear(8, 4), nn.Conv1d(3, 4, 3), nn.Conv1d(3, 4, 3, padding="same")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_replaced_weights_are_run_in_the_units_variant(model: nn.Module, precision: str) -> None:
    """The same as a network that has these weights."""
    x = torch.randn(16, 8) if isinstance(model, nn.Linear) else torch.randn(2, 3, 8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    ranged, wanted = simulator(nn.Sequential(model), x), simulator(nn.Sequential(other), x)
    variants = {"0": Variant(precision)}
    replaced = {"0": (other.weight.detach(), other.bias.detach())}
    torch.testing.assert_close(ranged(variants, replaced)[0], wanted(variants)[0])
    assert torch.equal(ranged({})[0], ranged.dense[0])


def test_only_what_comes_after_replaced_weights_changes() -> None:
    model = TwoHeads()
    simulate = simulator(model, torch.randn(4, 8))
    left, right = simulate({}, {"a": (torch.zeros(8, 8), None)})
    with torch.no_grad():
        want = model.b(model.a.bias.relu() + 1)
    torch.testing.assert_close(left, want.expand_as(left))
    assert torch.equal(right, simulate.dense[1])

from __future__ import annotations

import torch
from networks import NETWORKS
from oracles import masked

from hwsearch.compress.widths import in_slots, narrow, out_slots
from hwsearch.graph.trace import Traced, trace


def compute(traced: Traced, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = traced.graph(x)
    return found


def test_nothing_removed_is_the_network_itself() -> None:
    model, x = NETWORKS["residual"]()
    traced = trace(model, x)
    whole = narrow(traced, {g: range(n) for g, n in traced.network.channels.items()})
    assert whole.network == traced.network
    torch.testing.assert_close(compute(whole, x), compute(traced, x))


def test_given_weights_replace_those_that_are_left() -> None:
    model, x = NETWORKS["residual"]()
    traced = trace(model, x)
    weight, bias = torch.randn(3, 8, 3, 3), torch.randn(3)
    less = narrow(traced, {"4.conv1": [0, 4, 7]}, {"4.conv1": (weight, bias)})
    assert torch.equal(less.weight("4.conv1"), weight)
    assert torch.equal(less.bias("4.conv1"), bias)
    assert less.weight("4.conv2").shape == (8, 3, 3, 3)
    assert traced.weight("4.conv1").shape == (8, 8, 3, 3)
    assert less.network["4.conv1"].weight_shape == (3, 8, 3, 3)


def test_the_masked_network_reads_zeros() -> None:
    model, x = NETWORKS["residual"]()
    traced = trace(model, x)
    off = masked(traced, {"4.conv1": [0, 4, 7]})
    assert off.network == traced.network
    assert not off.weight("4.conv2")[:, [1, 2, 3, 5, 6]].any()
    assert torch.equal(off.weight("4.conv2")[:, [0, 4, 7]], traced.weight("4.conv2")[:, [0, 4, 7]])
    assert torch.equal(off.weight("4.conv1"), traced.weight("4.conv1"))


def test_slots_of_what_a_unit_reads_and_puts_out() -> None:
    traced = trace(*NETWORKS["transformer_encoder"]())
    heads = traced.channels.groups["layers.0.self_attn.in_proj_weight"]
    columns = [s for s in heads for _ in range(4)]
    assert out_slots(traced, "layers.0.self_attn.in_proj_weight").slots.tolist() == 3 * columns
    assert in_slots(traced, "layers.0.self_attn.out_proj").slots.tolist() == [
        s for s in heads for _ in range(4)
    ]
    assert in_slots(traced, "layers.0.self_attn.in_proj_weight") is None
    transposed = trace(*NETWORKS["transposed_1d"]())
    assert in_slots(transposed, "2").axis == 0
    assert out_slots(transposed, "2").axis == 1

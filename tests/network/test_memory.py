from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, programs
from simulation import grouped
from torch import nn

from hwsearch.graph.trace import trace
from hwsearch.network.memory import peak_bytes, steps, tensors
from hwsearch.network.network import Edge, Network, Unit
from hwsearch.network.variants import Variant, uniform

BASES = {"fp32": 4, "bf16": 2, "fp16": 2}


@settings(max_examples=300, deadline=None)
@given(programs(), st.data())
def test_equals_a_run_with_reference_counts(program: Program, data: st.DataObject) -> None:
    network = program.network
    base, quantize_outputs = data.draw(st.sampled_from(sorted(BASES))), data.draw(st.booleans())
    variants = {u.name: Variant(data.draw(st.sampled_from(["int8", base]))) for u in network.units}
    found = peak_bytes(network, variants, base=base, quantize_outputs=quantize_outputs)
    assert found == program.peak(variants, BASES[base], quantize_outputs)


@given(programs())
def test_steps_left_out_are_within_others(program: Program) -> None:
    """Every set of tensors alive together is in one that is kept, and none that is kept is in another."""
    network = program.network
    found = tensors(network)
    kept = [set(s) for s in steps(found, len(network.units))]
    for i in range(len(network.units)):
        alive = {n for n, t in enumerate(found) if t.first <= i <= t.last}
        assert any(alive <= other for other in kept)
    assert not any(a < b for a in kept for b in kept)


@given(programs(), st.data())
def test_never_more_in_int8(program: Program, data: st.DataObject) -> None:
    """Quantizing one unit more takes no more memory."""
    network = program.network
    names = [u.name for u in network.units]
    some = data.draw(st.sets(st.sampled_from(names)))
    more = some | {data.draw(st.sampled_from(names))}
    few, many = (
        peak_bytes(network, {n: Variant("int8" if n in chosen else "bf16") for n in names}, base="bf16")
        for chosen in (some, more)
    )
    assert many <= few


@given(st.sampled_from([24, 17, 5]), st.sampled_from([40, 3]), st.sampled_from([16, 1]))
def test_widths_count_as_the_narrow_network_does(a: int, b: int, c: int) -> None:
    network = grouped()
    widths = {"conv0": a, "conv1": b, "conv2": c}
    for precision in ("fp32", "int8"):
        variants = uniform(network, precision)
        assert peak_bytes(network, variants, widths, base="fp32") == peak_bytes(
            network.narrow(widths), variants, base="fp32"
        )


def test_a_tensor_read_by_several_counts_once() -> None:
    units = tuple(Unit(n, "linear", ((1, 8),), (1, 8), (8, 8)) for n in "abc")
    network = Network(units, (Edge("a", "b", 32), Edge("a", "c", 32)))
    assert (
        peak_bytes(network, uniform(network, "fp32"), base="fp32") == 3 * 32
    )  # at c: a, the output of b, its own
    assert peak_bytes(network, uniform(network, "int8"), base="fp32") == 8 + 2 * 32  # outputs stay fp32
    mixed = {**uniform(network, "int8"), "c": Variant("fp32")}
    assert peak_bytes(network, mixed, base="fp32") == 3 * 32


def test_what_a_tied_unit_passes_back_lives_to_the_end() -> None:
    units = tuple(Unit(n, "linear", ((1, 8),), (1, 8), (8, 8), calls=2 if n == "a" else 1) for n in "abc")
    network = Network(units, (Edge("a", "b", 32), Edge("b", "a", 32), Edge("a", "c", 32)))
    assert peak_bytes(network, uniform(network, "fp32"), base="fp32") == 3 * 32


class Joined(nn.Module):
    """Two convolutions side by side, put together before a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.last = nn.Conv2d(20, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


@pytest.mark.parametrize(("left", "right"), [(8, 12), (6, 9), (2, 3), (1, 12)])
def test_a_concatenation_is_one_tensor_at_every_width(left: int, right: int) -> None:
    """Each branch has its own channels; beside the whole stands the output of four."""
    torch.manual_seed(0)
    network = trace(Joined(), torch.randn(1, 3, 6, 6)).network
    assert network.channels == {"left": 8, "right": 12}
    found = peak_bytes(network, uniform(network, "fp32"), {"left": left, "right": right}, base="fp32")
    assert found == 4 * 36 * (left + right + 4)


class Attention(nn.Module):
    """Queries, keys and values of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(torch.softmax(q @ k.transpose(-1, -2), -1).matmul(v).transpose(1, 2).flatten(2))


def test_queries_keys_and_values_of_one_projection_all_count() -> None:
    """What the first product reads and returns, and the values that wait for the second one."""
    network = trace(Attention(), torch.randn(1, 6, 16)).network
    tokens, head = 6 * 16, 4 * 6 * 6
    assert peak_bytes(network, uniform(network, "fp32"), base="fp32") == 4 * (3 * tokens + head)

"""Which channels go together, and that a network without some of them computes what the masked one does."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from architectures import BLOCKS, Attention, convolutional, transformer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Apply, image, leaves
from oracles import masked
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hwsearch.compress.widths import narrow
from hwsearch.graph.calls import as_call, flat_inputs
from hwsearch.graph.trace import Traced, trace
from hwsearch.graph.units import outside_units
from hwsearch.network.network import macs

settings.register_profile(
    "architectures",
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
PROFILE = settings.get_profile("architectures")


def run(traced: Traced, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = as_call(inputs)
    flat = flat_inputs(traced.graph, args, kwargs)
    with torch.no_grad():
        return leaves(torch.fx.Interpreter(traced.graph).run(*flat, enable_io_processing=False))


def other(inputs: Any, seed: int) -> Any:
    """Other random inputs of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def one(x: Any) -> Any:
        floating = isinstance(x, torch.Tensor) and x.is_floating_point() and len(x.unique()) > 2
        return torch.randn(x.shape, generator=generator) if floating else x

    return pytree.tree_map(one, inputs)


def shapes(traced: Traced) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a graph, from a run."""
    found: dict[str, tuple[int, ...]] = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                found[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Run(traced.graph).run(
            *flat_inputs(traced.graph, traced.args, traced.kwargs), enable_io_processing=False
        )
    return found


def check_sizes(traced: Traced) -> None:
    """The network says what its graph is: shapes, multiply-accumulates, bytes."""
    real, nodes = shapes(traced), {n.name: n for n in traced.graph.graph.nodes}
    biases: set[int] = set()
    for unit in traced.network.units:
        weight, bias = traced.weight(unit.name), traced.bias(unit.name)
        assert unit.weight_shape == (() if weight is None else tuple(weight.shape)), unit
        if unit.stored:
            assert unit.macs == 0
            continue
        site, own = traced.sites[unit.name][0], 0
        assert unit.output_shape == real[site.node], unit
        sources = [nodes[site.node].args[p].name for p in site.activations]  # type: ignore[union-attr]
        assert unit.input_shapes == tuple(real[s] for s in sources), unit
        for call in traced.sites[unit.name]:
            inputs = tuple(real[nodes[call.node].args[p].name] for p in call.activations)  # type: ignore[union-attr]
            own += macs(unit.op, inputs, real[call.node], unit.weight_shape)
        assert unit.macs == own, unit
        groups = dict(unit.attributes).get("groups", "1")
        node = nodes[site.node]
        if unit.op in ("conv2d", "conv_transpose2d"):
            position = 6
            count = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
            assert groups == str(count), unit
        if bias is not None and bias.data_ptr() not in biases:
            biases.add(bias.data_ptr())
            assert unit.other_bytes == bias.numel() * bias.element_size(), unit
    outside = outside_units(traced.graph, traced.sites, traced.stored)
    assert traced.network.fixed_bytes == sum(t.numel() * t.element_size() for t in outside.values())


def check(traced: Traced, inputs: Any, rng: random.Random) -> None:
    """Narrow to random slots: sizes are as predicted, outputs those of the masked network; twice, for it can go on."""
    check_sizes(traced)
    whole = traced
    for _ in range(2):
        kept = {
            g.name: sorted(rng.sample(range(g.channels), rng.randint(1, g.channels)))
            for g in whole.network.groups
            if rng.random() < 0.8
        }
        less = narrow(whole, kept)
        check_sizes(less)
        x = other(inputs, rng.randrange(1 << 30))
        have, want = run(less, x), run(masked(whole, kept), x)
        assert len(have) == len(want)
        if not whole.channels.rescaled:
            for a, b in zip(have, want, strict=True):
                assert a.shape == b.shape
                assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-5
        whole = less


SPELLINGS = ("fused", "bias", "norm", "rope", "table", "repeat")
seeds = st.integers(0, 1 << 20)
sizes = st.sampled_from([4, 6, 8, 12])


@settings(PROFILE, max_examples=12)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3), st.lists(sizes, min_size=4, max_size=4),
       st.sampled_from(["flatten", "pool", "image", "two"]), seeds)  # fmt: skip
def test_narrow_convolutional_networks_compute_the_masked_ones(
    kinds: list[str], widths: list[int], head: str, seed: int
) -> None:
    model, x = convolutional(kinds, widths[: len(kinds) + 1], head, seed)
    traced = trace(model, x)
    assert traced.network.blocked == ()
    check(traced, x, random.Random(seed))


@settings(PROFILE, max_examples=12)
@given(st.sampled_from([(4, 4), (4, 2), (4, 1), (1, 1), (6, 3)]), st.sets(st.sampled_from(SPELLINGS)),
       sizes, st.sampled_from(["gelu", "swiglu"]), st.sampled_from(["image", "ids", "masked"]), st.sampled_from(["layer", "rms"]),
       st.booleans(), seeds)  # fmt: skip
def test_narrow_transformers_compute_the_masked_ones(
    heads: tuple[int, int],
    kind: set[str],
    hidden: int,
    mlp: str,
    stem: str,
    norm: str,
    residual: bool,
    seed: int,
) -> None:
    if "table" in kind and heads[0] != heads[1]:
        kind = kind | {"repeat"}
    model, inputs = transformer(*heads, " ".join(sorted(kind)), hidden, mlp, stem, norm, seed)
    traced = trace(model, inputs, residual=residual)
    assert traced.network.blocked == ()
    found = traced.network.channels
    assert [g.channels for g in traced.network.groups if g.consumers == ("mlp.down",)] == [hidden]
    own = [g.channels for g in traced.network.groups if g.consumers == ("attention.o",)]
    slots = heads[1] if heads[1] > 1 else heads[0]
    assert own == [slots] if slots > 1 else own in ([], [4])  # of a single head the features of its values
    assert (12 in found.values() and bool(traced.channels.rescaled)) == residual or hidden == 12
    check(traced, inputs, random.Random(seed))


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_kind_of_block_has_groups(kind: str) -> None:
    model, x = convolutional([kind], [8, 8], "pool", 1)
    traced = trace(model, x)
    assert traced.network.blocked == ()
    assert traced.network.groups
    check(traced, x, random.Random(0))


OTHERS = (
    "mlp_3d_batchnorm transposed_1d transposed_3d three_dimensional activations multihead_attention transformer_masked "
    "transformer_decoder gpt_block einsum_attention einsum_weight bool_mask pyramid tied_transposed sliced_weight functional norms "
    "wide_reshapes in_place lstm"
).split()


@pytest.mark.parametrize("name", OTHERS)
def test_narrow_networks_compute_the_masked_ones(name: str) -> None:
    model, inputs = NETWORKS[name]()
    traced = trace(model, inputs)
    kept = {g.name: range(0, g.channels, 3) for g in traced.network.groups}
    less = narrow(traced, kept)
    check_sizes(less)
    for a, b in zip(run(less, inputs), run(masked(traced, kept), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def groups(name: str) -> dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]:
    model, inputs = NETWORKS[name]()
    return {g.name: (g.channels, g.producers, g.consumers) for g in trace(model, inputs).network.groups}


def test_groups_of_a_residual_network() -> None:
    assert groups("residual") == {
        "0": (8, ("0", "4.conv2", "5.conv2"), ("4.conv1", "5.conv1", "9")),
        "4.conv1": (8, ("4.conv1",), ("4.conv2",)),
        "5.conv1": (8, ("5.conv1",), ("5.conv2",)),
    }


def test_groups_of_a_vision_transformer() -> None:
    assert groups("vit") == {
        "layer.self_attn.in_proj_weight": (
            4,
            ("layer.self_attn.in_proj_weight",),
            ("layer.self_attn.out_proj",),
        ),
        "layer.linear1": (32, ("layer.linear1",), ("layer.linear2",)),
    }
    model, inputs = NETWORKS["vit"]()
    wide = trace(model, inputs, residual=True)
    assert sorted(wide.network.channels.values()) == [4, 16, 32]
    group = next(g for g in wide.network.groups if g.channels == 16)
    assert group.consumers == ("layer.self_attn.in_proj_weight", "layer.linear1", "head")
    # class token, ten positions, three LayerNorms
    assert group.fixed_bytes == 4 * (1 + 10 + 6)
    assert wide.channels.rescaled == {group.name}


def test_groups_through_concatenations_splits_and_gates() -> None:
    assert groups("squeeze_excite") == {
        "stem": (8, ("stem", "expand"), ("reduce", "head")),
        "reduce": (2, ("reduce",), ("expand",)),
    }
    assert groups("channel_shuffle") == {
        "stem": (4, ("stem", "a"), ("head",)),  # what is interleaved
        "stem'": (4, ("stem",), ("a",)),
    }
    assert groups("densenet")["0"][0] == 4
    assert set(groups("unet")) == {"down1", "down2", "mid", "up1", "dec1", "dec2"}
    assert groups("grouped") == {"0": (4, ("0",), ("5",))}
    assert groups("mlp_3d_batchnorm") == {"a": (16, ("a",), ("b",))}
    assert groups("shared_linear") == {"a": (8, ("a",), ("shared", "b"))}


def test_what_a_network_reads_and_puts_out_stays_whole() -> None:
    assert groups("dataclass_out") == groups("unit_is_output") == groups("dict_in_dict_out") == {}
    for name in ("residual", "unet", "vit"):
        network = trace(*NETWORKS[name]()).network
        last, first = network.units[-1], network.units[0]
        narrow = network.narrow(dict.fromkeys(network.channels, 1))
        assert narrow.units[-1].output_shape == last.output_shape
        assert narrow.units[0].input_shapes == first.input_shapes


def test_several_inputs_and_outputs_stay_whole() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        a = self.a(x).relu()
        b = self.b(y).relu() + y
        return {"sum": self.d(self.c(a) + b), "b": [b]}

    model = Apply(forward, a=nn.Linear(4, 8), b=nn.Linear(6, 6), c=nn.Linear(8, 6), d=nn.Linear(6, 2))
    traced = trace(model, (torch.randn(3, 4), torch.randn(3, 6)))
    assert {g.name: g.channels for g in traced.network.groups} == {"a": 8}


def blocked(forward: Any, inputs: Any = None, **modules: nn.Module) -> tuple[Traced, tuple[str, ...]]:
    traced = trace(Apply(forward, **modules), image() if inputs is None else inputs)
    return traced, traced.network.blocked


def test_what_is_not_followed_is_named_and_the_rest_goes_on() -> None:
    class Gather(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order = torch.argsort(x.mean((2, 3), keepdim=True), 1).expand_as(x)
            return torch.gather(x, 1, order)

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.mixed(self.b(self.a(x).relu()).relu())).relu())

    traced, why = blocked(
        run,
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 6, 1),
        mixed=Gather(),
        c=nn.Conv2d(6, 4, 1),
        d=nn.Conv2d(4, 2, 1),
    )
    assert {g.name: g.channels for g in traced.network.groups} == {"a": 8, "c": 4}
    assert why
    assert all(w.startswith("mixed: ") for w in why)


def test_recurrent_layers_are_named() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.rnn(self.a(x).relu())[0]).relu())

    traced, why = blocked(
        run,
        torch.randn(2, 5, 6),
        a=nn.Linear(6, 8),
        rnn=nn.LSTM(8, 8, batch_first=True),
        b=nn.Linear(8, 6),
        c=nn.Linear(6, 2),
    )
    assert {g.name: g.channels for g in traced.network.groups} == {"b": 6}
    assert why == (
        "rnn: channels are not followed through operator aten.lstm.input: "
        "a recurrent layer feeds its features back into all of them",
    )


def test_normalizing_over_channels_mixes_them_unless_zeros_add_nothing() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.softmax(self.a(x), 1)) + self.d(F.normalize(self.c(x), dim=1))

    traced, why = blocked(
        run, **{n: nn.Conv2d(i, o, 1) for n, i, o in [("a", 3, 8), ("b", 8, 4), ("c", 3, 8), ("d", 8, 4)]}
    )
    assert {g.name: g.channels for g in traced.network.groups} == {"c": 8}
    assert why == ("(the model itself): softmax over channels mixes them",)
    check(traced, image(), random.Random(0))


def test_each_branch_of_a_concatenation_has_its_own_channels() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))

    sizes = {"a": (3, 24), "b": (3, 25), "c": (49, 6), "d": (6, 2)}
    traced, why = blocked(run, **{n: nn.Conv2d(i, o, 1) for n, (i, o) in sizes.items()})
    assert why == ()
    assert traced.network.channels == {"a": 24, "b": 25, "c": 6}
    less = narrow(traced, {"a": [0, 5], "b": [1, 2, 24]})
    assert less.network["c"].weight_shape == (6, 5, 1, 1)
    for seed in range(3):
        check(traced, image(), random.Random(seed))


def test_many_branches_share_a_width_and_what_is_over_stays() -> None:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(torch.cat([self.a(x), self.b(x), self.e(x)], 1)))

    sizes = {"a": (3, 24), "b": (3, 25), "e": (3, 50), "c": (99, 6), "d": (6, 2)}
    traced, why = blocked(run, **{n: nn.Conv2d(i, o, 1) for n, (i, o) in sizes.items()})
    assert why == ()
    assert traced.network.channels == {"a": 24, "c": 6}  # of b one channel stays, of e two
    assert traced.network.unit_at("c", {"a": 1}).weight_shape == (6, 1 + 2 + 2 + 2, 1, 1)
    check(traced, image(), random.Random(0))


def test_single_heads_keep_queries_and_keys_but_not_values() -> None:
    model = nn.Sequential(Attention(12, 1, 1, "", size=8), nn.Linear(12, 3))
    traced = trace(model, torch.randn(2, 5, 12))
    assert {g.name: (g.channels, g.producers) for g in traced.network.groups}["0.v"] == (8, ("0.v",))
    assert traced.network.blocked == ()

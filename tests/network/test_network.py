"""The network as plain data: what is left of it at some widths is exact."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from simulation import chain, grouped

from hwsearch.compress.widths import narrow
from hwsearch.network.network import ChannelGroup, Network, Unit, Way

NETWORK = grouped((24, 40, 16))
WIDTHS = st.fixed_dictionaries(
    {}, optional={"conv0": st.integers(1, 24), "conv1": st.integers(1, 40), "conv2": st.integers(1, 16)}
)


@pytest.mark.parametrize("network", [NETWORK, chain(4), tiny.lowering("transformer").network])
def test_round_trip(network: Network) -> None:
    again = Network.from_json(json.loads(json.dumps(network.to_json())))
    assert again == network
    assert again.fingerprint == network.fingerprint


def test_the_fingerprint_is_of_the_structure() -> None:
    assert replace(NETWORK, name="other", weights_digest="1").fingerprint == NETWORK.fingerprint
    fewer = replace(NETWORK, groups=NETWORK.groups[1:])
    assert fewer.fingerprint != NETWORK.fingerprint
    assert grouped((24, 40, 15)).fingerprint != NETWORK.fingerprint


@given(WIDTHS)
def test_a_narrow_network_is_that_of_its_sides(widths: dict[str, int]) -> None:
    sides = tuple(widths.get(g, n) for g, n in NETWORK.channels.items())
    left, built = NETWORK.narrow(widths), grouped(sides)
    assert left.channels == built.channels == dict(zip(NETWORK.channels, sides, strict=True))
    assert [replace(u, ways=()) for u in left.units] == [replace(u, ways=()) for u in built.units]
    assert [u.signature for u in left.units] == [u.signature for u in built.units]
    assert (left.edges, left.fixed_bytes, left.macs) == (built.edges, built.fixed_bytes, built.macs)
    assert left.fingerprint == built.fingerprint


@given(WIDTHS)
def test_parts_of_a_narrow_network_are_those_of_the_whole(widths: dict[str, int]) -> None:
    left = NETWORK.narrow(widths)
    for unit in NETWORK.units:
        assert NETWORK.unit_at(unit.name, widths) == left[unit.name]
        own, whole = left[unit.name].output_shape[1], unit.output_shape[1]
        assert NETWORK.share(unit.name, widths) == own / whole
    assert NETWORK.edges_at(widths) == left.edges


def test_whole_widths_change_nothing() -> None:
    assert NETWORK.narrow(NETWORK.channels) is NETWORK
    assert NETWORK.narrow({}) is NETWORK


def test_groups_of_a_unit_are_those_it_reads_then_those_it_puts_out() -> None:
    assert [u.groups for u in NETWORK.units] == [
        ("conv0",), ("conv0", "conv1"), ("conv1", "conv2"), ("conv2",),
    ]  # fmt: skip


def test_a_depthwise_unit_has_as_many_groups_as_channels() -> None:
    ways = tuple(Way("g", t, a, 1) for t, a in (("input0", 1), ("output", 1), ("weight", 0)))
    unit = Unit(
        "depth", "conv2d", ((1, 12, 4, 4),), (1, 12, 4, 4), (12, 1, 3, 3), attributes=(("groups", "12"),),
        macs=12 * 16 * 9, ways=ways,
    )  # fmt: skip
    left = unit.narrow({"g": 5}, {"g": 12})
    assert dict(left.attributes)["groups"] == "5"
    assert left.weight_shape == (5, 1, 3, 3)
    assert left.macs == 5 * 16 * 9


def test_a_slot_of_several_indices_takes_them_all() -> None:
    """A head of 4 features in queries, keys and values."""
    ways = (Way("heads", "output", 2, 12), Way("heads", "weight", 0, 12))
    unit = Unit(
        "qkv", "linear", ((1, 6, 16),), (1, 6, 48), (48, 16), macs=6 * 16 * 48, other_bytes=4 * 48, ways=ways
    )
    left = unit.narrow({"heads": 3}, {"heads": 4})
    assert (left.output_shape, left.weight_shape) == ((1, 6, 36), (36, 16))
    assert (left.macs, left.other_bytes) == (6 * 16 * 36, 4 * 36)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_what_it_says_of_widths_is_what_the_narrow_graph_holds(name: str) -> None:
    traced = tiny.lowering(name).traced
    widths = {g: max(1, n // 3) for g, n in traced.network.channels.items()}
    left = narrow(traced, {g: range(w) for g, w in widths.items()})
    for unit in left.network.units:
        weight = left.weight(unit.name)
        assert (() if weight is None else tuple(weight.shape)) == unit.weight_shape


def test_names_are_unique() -> None:
    unit = NETWORK.units[0]
    with pytest.raises(ValueError, match="not unique"):
        Network((unit, unit))


def test_channels_by_group() -> None:
    assert Network((), groups=(ChannelGroup("a", 3), ChannelGroup("b", 5))).channels == {"a": 3, "b": 5}

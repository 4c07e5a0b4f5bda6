"""Which unit each executed node belongs to, and in which precision units ran."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import hwsearch as hs
from hwsearch.backends.base import NodeTime
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.engine.attribution import attribute, executed_precisions, without_fused_floats
from hwsearch.engine.setup import set_up
from hwsearch.lowering.marked import tensor_names
from hwsearch.network.network import Edge, Network, Unit
from hwsearch.network.variants import Variant, uniform

SHAPE = (1, 8, 4, 4)
NETWORK = Network(
    tuple(Unit(n, "conv2d", (SHAPE,), SHAPE) for n in ("conv1", "layer1.conv1", "layer1.conv2"))
)


def node(name: str, op: str, *sources: str, precision: str = "fp32", time_ns: float = 1.0) -> NodeTime:
    return NodeTime(name, op, sources, precision, time_ns)


NODES = [
    node("a", "Convolution", "conv1|0|Conv", "~conv1|0|Relu"),
    node("b", "Convolution", "layer1.conv1|0|Conv", "layer1.conv2|0|Conv", precision="int8"),
    node("c", "FakeQuantize", "layer1.conv1|0|QuantizeLinear.in.x"),
    node("d", "Pooling", "~conv1|0|MaxPool"),
    node("x_layer1.conv1|0|Conv_f32_layer1.conv2|0|Conv", "Reorder"),
    node("conv1|0|Conv_bf16_layer1.conv1|0|Conv", "Reorder"),
    node("e", "Softmax"),
    node("f", "Convolution", "tensor_of_conv2"),
]


def test_attribution() -> None:
    rows = attribute(NODES, NETWORK, {"tensor_of_conv2": "layer1.conv2|0|Conv"})
    assert [(row.kind, row.units) for row in rows] == [
        ("unit", ("conv1",)),
        ("unit", ("layer1.conv1", "layer1.conv2")),
        ("edge", ("layer1.conv1",)),
        ("rest", ("conv1",)),
        ("edge", ("layer1.conv2",)),
        ("edge", ("layer1.conv1",)),
        ("rest", ()),
        ("unit", ("layer1.conv2",)),
    ]
    assert executed_precisions(rows, NETWORK) == ("fp32", "int8", "int8")
    assert executed_precisions(rows[2:5], NETWORK) == ("", "", "")


def test_the_longest_node_says_in_which_precision_a_unit_ran() -> None:
    nodes = [
        node("a", "Convolution", "conv1|0|Conv", precision="int8", time_ns=2.0),
        node("b", "Convolution", "conv1|1|Conv", precision="bf16", time_ns=5.0),
        node("c", "Reorder", "conv1|0|Conv", precision="fp32", time_ns=9.0),
    ]
    assert executed_precisions(attribute(nodes, NETWORK, {}), NETWORK)[0] == "bf16"


def test_a_generated_kernel_behind_a_product_does_not_say_in_which_precision_it_ran() -> None:
    nodes = [
        node("a", "correlation", "conv1|0|Conv", precision="int8", time_ns=2.0),
        node("b", "kgen", "conv1|0|Conv", "~conv1|0|Relu", precision="fp32", time_ns=5.0),
        node("c", "kgen", "layer1.conv1|0|Conv", precision="fp16", time_ns=5.0),
    ]
    assert executed_precisions(attribute(nodes, NETWORK, {}), NETWORK)[:2] == ("int8", "fp16")


def test_a_change_of_layout_is_an_edge_whichever_nodes_it_is_made_for() -> None:
    nodes = [
        node("x", "Reformat", "conv1|0|Conv", "~conv1|0|Relu"),
        node("Reformatting CopyNode for Input Tensor 0 to layer1.conv2|0|Conv", "Reformat"),
        node("y", "Reformat", "~conv1|0|MaxPool"),
        node("z", "Reformat"),
    ]
    assert [(row.kind, row.units) for row in attribute(nodes, NETWORK, {})] == [
        ("edge", ("conv1",)),
        ("edge", ("layer1.conv2",)),
        ("rest", ("conv1",)),
        ("edge", ()),
    ]


def test_a_fused_node_says_nothing_of_a_float_unit_that_it_holds() -> None:
    rows = attribute(NODES[:2], NETWORK, {})
    allocation = {"conv1": Variant("fp32"), "layer1.conv1": Variant("fp32"), "layer1.conv2": Variant("int8")}
    assert without_fused_floats(("fp32", "int8", "int8"), rows, allocation, NETWORK) == ("fp32", "", "int8")
    alone = [replace(rows[1], units=("layer1.conv1",))]
    assert without_fused_floats(("fp32", "int8", ""), alone, allocation, NETWORK) == ("fp32", "int8", "")


def chain(*names: str, branches: bool = False) -> Network:
    """Layers one after the other; branches: all but the first and the last side by side."""
    units = tuple(Unit(n, "linear", ((1, 8),), (1, 8)) for n in names)
    if branches:
        pairs = [(names[0], n) for n in names[1:-1]] + [(n, names[-1]) for n in names[1:-1]]
    else:
        pairs = list(pairwise(names))
    return Network(units, tuple(Edge(a, b, 32) for a, b in pairs))


def product(name: str, *sources: str) -> NodeTime:
    return node(name, "FullyConnected", *(sources or (name,)), precision="int8")


def owners(nodes: list[NodeTime], network: Network) -> dict[str, tuple[str, ...]]:
    return {r.name: r.units for r in attribute(nodes, network, {}) if r.kind == "unit"}


def test_a_product_without_a_name_is_known_by_its_place() -> None:
    """OpenVINO calls some after a constant that it made: those of BERT's `attention.output.dense`."""
    a, c, d = (product(f"{n}|0|MatMul") for n in "acd")
    nodes = [a, product("Multiply_7169"), c, product("Multiply_7170"), d]
    found = owners(nodes, chain("a", "b", "c", "x", "d"))
    assert found["Multiply_7169"] == ("b",)
    assert found["Multiply_7170"] == ("x",)
    side_by_side = [a, product("Multiply_1"), product("Multiply_2"), d]
    found = owners(side_by_side, chain("a", "b", "c", "d", branches=True))
    assert (found["Multiply_1"], found["Multiply_2"]) == (("b",), ("c",))


def test_a_place_that_leaves_a_choice_tells_nothing() -> None:
    a, d = (product(f"{n}|0|MatMul") for n in "ad")
    assert set(owners([a, product("Multiply_1"), d], chain("a", "b", "c", "d"))) == {a.name, d.name}
    two = [a, product("Multiply_1"), product("Multiply_2"), d]
    assert set(owners(two, chain("a", "b", "d"))) == {a.name, d.name}
    before = [product("Multiply_1"), a, d]  # what b reads is not there yet
    assert set(owners(before, chain("a", "b", "d"))) == {a.name, d.name}


def test_every_layer_of_berts_is_known_in_openvino() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=50
    )
    model = transformers.BertModel(config).eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(ids).last_hidden_state
            return hidden

    ids = torch.randint(0, 50, (1, 16))
    setup = set_up(hs.Task(Hidden(), ids, [ids], lambda predict: 0.0, "bert"), OpenVINOBackend())
    variants = uniform(setup.network, "int8")
    engine, made = setup.build(variants)
    executed = executed_precisions(attribute(engine.nodes(), setup.network, tensor_names(made)), setup.network)
    asked = {u.name: e for u, e in zip(setup.network.units, executed, strict=True) if variants[u.name].quantized}
    assert asked
    assert all(asked.values()), asked

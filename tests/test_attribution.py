"""Which unit each executed node belongs to, and in which precision units ran."""

from __future__ import annotations

from dataclasses import replace

from hwsearch.attribution import attribute, executed_precisions, told_apart
from hwsearch.backends.base import NodeTime
from hwsearch.network import Network, Unit
from hwsearch.variants import Variant

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
    assert told_apart(("fp32", "int8", "int8"), rows, allocation, NETWORK) == ("fp32", "", "int8")
    alone = [replace(rows[1], units=("layer1.conv1",))]
    assert told_apart(("fp32", "int8", ""), alone, allocation, NETWORK) == ("fp32", "int8", "")

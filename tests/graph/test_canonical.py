from __future__ import annotations

import torch
from networks import NETWORKS

from hwsearch.graph.canonical import aten, bound, op_name
from hwsearch.graph.trace import trace


def test_a_canonical_graph_holds_no_batch_norm_no_attention_and_nothing_in_place() -> None:
    for name in ("residual", "mobilenet_v3", "vit"):
        nodes = [n for n in trace(*NETWORKS[name]()).graph.graph.nodes if n.op == "call_function"]
        assert not {op_name(n) for n in nodes} & {"batch_norm", "scaled_dot_product_attention"}
        assert not any(n.target._schema.is_mutable for n in nodes if hasattr(n.target, "_schema"))


def test_arguments_are_bound_however_they_are_given() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    names, defaults = ("input", "dim", "keepdim"), (None, None, False)
    by_position = graph.call_function(aten.mean.dim, (x, [1], True))
    by_name = graph.call_function(aten.mean.dim, (x,), {"keepdim": True, "dim": [1]})
    assert bound(by_position, names, defaults) == bound(by_name, names, defaults) == [x, [1], True]
    assert bound(graph.call_function(aten.mean.dim, (x,)), names, defaults) == [x, None, False]

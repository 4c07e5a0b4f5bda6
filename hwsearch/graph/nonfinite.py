"""NaN and infinity in what a graph computes: which node they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput
from hwsearch.graph.canonical import place


class Recorder(fx.Interpreter):
    """Keeps the value of every node, in `values`."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def finite(value: Any) -> bool:
    """Whether no floating-point tensor in a value holds NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in _floats(value))


def check_finite(outputs: Any, graph: fx.GraphModule, inputs: Sequence[Any], what: str) -> None:
    """Raises InvalidInput where outputs hold NaN or infinity, naming the operator, module and line that they come from.

    inputs: flat, those that the outputs were computed from. what: names them in the message.
    """
    if finite(outputs):
        return
    node = _source(graph, inputs)
    if node is None or node.op == "placeholder":
        raise InvalidInput(
            f"{what} holds NaN or infinity, and so do the model's outputs; expected finite inputs"
        )
    raise InvalidInput(
        f"the model returns NaN or infinity on {what}; expected finite outputs. They come from {place(node)}"
    )


def _source(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.Node | None:
    """The first node whose value is NaN (or, where no output is, infinite) of no such input, and leads to an output."""
    recorder = Recorder(graph)
    with torch.no_grad():
        outputs = recorder.run(*inputs, enable_io_processing=False)
    bad = _has_nan if any(map(_has_nan, _floats(outputs))) else _not_finite
    values = recorder.values
    leads: set[fx.Node] = set()
    for node in reversed(list(graph.graph.nodes)):
        own = any(map(bad, _floats(values[node])))
        if node.op == "output" or (own and any(user in leads for user in node.users)):
            leads.add(node)
    sources = (
        n
        for n in graph.graph.nodes
        if n in leads
        and n.op != "output"
        and not any(i in leads and i.op != "get_attr" for i in n.all_input_nodes)
    )
    return next((n for n in sources if n.op != "get_attr"), None)


def _floats(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _has_nan(value: torch.Tensor) -> bool:
    return bool(torch.isnan(value).any())


def _not_finite(value: torch.Tensor) -> bool:
    return not bool(torch.isfinite(value).all())

"""The units of a traced graph: every convolution, linear layer and matrix product, and what is stored for them."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.canonical import (
    CONVOLUTIONS,
    MATMULS,
    aten,
    is_get_attr,
    module_path,
    op_name,
    tensor_attr,
)
from hwsearch.graph.channels import same
from hwsearch.network.network import Unit, macs


@dataclass(frozen=True)
class Site:
    """One call of a unit in the graph: its node, its activation arguments and its weight argument."""

    node: str
    activations: tuple[int, ...]
    weight: int | None


class Shapes(fx.Interpreter):
    """Shape and dtype of every tensor, from one real run."""

    def __init__(self, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(graph)
        self.shape: dict[str, tuple[int, ...]] = {}
        self.bytes: dict[str, int] = {}
        with torch.no_grad():
            self.run(*flat_inputs(graph, args, kwargs), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shape[n.name] = tuple(value.shape)
            self.bytes[n.name] = value.numel() * value.element_size()
        return value


def find_units(graph: fx.GraphModule, shapes: Shapes) -> tuple[dict[str, list[Site]], list[Unit]]:
    sites: dict[str, list[Site]] = {}
    units: dict[str, Unit] = {}
    of_weight: dict[Any, str] = {}
    biases: set[Any] = set()
    for node in graph.graph.nodes:
        found = _call_site(node)
        if found is None or node.name not in shapes.shape:
            continue
        site, op, weight_node = found
        weight = tensor_attr(graph, str(weight_node.target)) if weight_node is not None else None
        if weight is not None and (weight.dim() < 2 or not weight.is_floating_point()):
            continue
        if weight is not None and op == "matmul" and weight.dim() > 2:
            continue  # a stack of weights: runtimes take per-channel scales for one matrix
        inputs = tuple(shapes.shape[node.args[i].name] for i in site.activations)
        output = shapes.shape[node.name]
        count = macs(op, inputs, output, tuple(weight.shape) if weight is not None else ())
        bias = bias_of(node)
        bias_bytes = 0
        if bias is not None:
            tensor = tensor_attr(graph, str(bias.target))
            bias_bytes = 0 if same(tensor) in biases else tensor.numel() * tensor.element_size()
            biases.add(same(tensor))
        if weight is not None and same(weight) in of_weight:
            name = of_weight[same(weight)]
            old = units[name]
            if old.op == op:
                sites[name].append(site)
                units[name] = replace(
                    old, calls=old.calls + 1, macs=old.macs + count, other_bytes=old.other_bytes + bias_bytes
                )
                continue
        name = _unit_name(node, weight_node, units)
        if weight is not None:
            of_weight.setdefault(same(weight), name)
        out_axis = 0
        if op == "matmul":
            out_axis = (weight.dim() - 1) if weight is not None else 0
        elif op.startswith("conv_transpose"):
            out_axis = 1
        units[name] = Unit(
            name=name,
            op=op,
            input_shapes=inputs,
            output_shape=output,
            weight_shape=tuple(weight.shape) if weight is not None else (),
            out_axis=out_axis,
            attributes=_attributes(node, op),
            macs=count,
            other_bytes=bias_bytes,
        )
        sites[name] = [site]
    return sites, list(units.values())


LEAST_SAVED = 1024
"""Bytes that int8 must save for a stored tensor to be a unit: what the nodes that make it floating again take in a file."""


def find_stored(
    graph: fx.GraphModule, sites: Mapping[str, list[Site]], units: Sequence[Unit]
) -> tuple[list[Unit], dict[str, tuple[str, ...]]]:
    """(units, for each that stands for a stored tensor the nodes that hold it), in the order in which the network runs.

    Stored tensors that something else than a layer reads become units of their own where a scale for each row of them pays:
    the tables of embeddings, the weights of LSTM and GRU, other constants. One that is a layer's weight as well is tied, and
    belongs to the layer's unit.
    """
    site_of = {site.node: site for calls in sites.values() for site in calls}
    order = {n.name: i for i, n in enumerate(graph.graph.nodes)}
    first = {u.name: order[sites[u.name][0].node] for u in units}
    found = {u.name: u for u in units}
    nodes = {n.name: n for n in graph.graph.nodes}
    owner: dict[Any, str] = {}
    for name, calls in sites.items():
        weight = calls[0].weight
        if weight is not None:
            path = str(nodes[calls[0].node].args[weight].target)
            owner.setdefault(same(tensor_attr(graph, path)), name)
    stored: dict[str, tuple[str, ...]] = {}
    for node in graph.graph.nodes:
        value = operator.attrgetter(str(node.target))(graph) if is_get_attr(node) else None
        readers = other_readers(node, site_of) if isinstance(value, torch.Tensor) else []
        if not readers or not isinstance(value, torch.Tensor):
            continue
        name = owner.get(same(value), "")
        if name in sites:
            found[name] = replace(found[name], tied=True)
        elif not name:
            if why_whole(value):
                continue
            name = owner[same(value)] = _unit_name(node, node, found)
            found[name] = Unit(name, _stored_op(readers), (), (), tuple(value.shape))
        first[name] = min(first.get(name, len(order)), *(order[r.name] for r in readers))
        stored[name] = (*stored.get(name, ()), node.name)
    return sorted(found.values(), key=lambda u: first[u.name]), stored


def other_readers(node: fx.Node, site_of: Mapping[str, Site]) -> list[fx.Node]:
    """What reads a stored tensor otherwise than as the weight or the bias of a unit's call."""
    found = []
    for user in node.users:
        site = site_of.get(user.name)
        weight = user.args[site.weight] if site is not None and site.weight is not None else None
        if site is None or (node is not weight and node is not bias_of(user)):
            found.append(user)
    return found


def why_whole(value: torch.Tensor) -> str:
    """Why a stored tensor is not worth a unit; empty where it has rows of finite fp32 numbers that int8 makes smaller."""
    if value.dtype != torch.float32:
        return f"it is of {str(value.dtype).removeprefix('torch.')}"
    if value.dim() < 2:
        return "it is a vector"
    if not bool(torch.isfinite(value).all()):
        return "it holds NaN or infinity"
    saved = 3 * value.numel() - 4 * (value.numel() // max(value.shape[-1], 1))
    return "" if saved >= LEAST_SAVED else "int8 would save next to nothing"


def _stored_op(readers: Sequence[fx.Node]) -> str:
    names = {op_name(r) for r in readers}
    if "embedding" in names:
        return "embedding"
    return "recurrent" if names & {"lstm", "gru", "rnn_tanh", "rnn_relu"} else "constant"


def _call_site(node: fx.Node) -> tuple[Site, str, Any] | None:
    """(site, operator, weight node or None) where the node is a unit's call."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        op = CONVOLUTIONS[node.target]
        return (Site(node.name, (0,), 1), op, node.args[1]) if is_get_attr(node.args[1]) else None
    if node.target is aten.linear.default:
        return (Site(node.name, (0,), 1), "linear", node.args[1]) if is_get_attr(node.args[1]) else None
    if node.target is aten.addmm.default and not node.kwargs and is_get_attr(node.args[2]):
        return Site(node.name, (1,), 2), "matmul", node.args[2]
    if node.target in MATMULS:
        left, right = node.args
        if is_get_attr(left) and is_get_attr(right):
            return None
        if is_get_attr(right):
            return Site(node.name, (0,), 1), "matmul", right
        if is_get_attr(left):
            return None  # a constant on the left is no weight that runtimes quantize per channel
        return Site(node.name, (0, 1), None), "matmul", None
    return None


def _unit_name(node: fx.Node, weight_node: Any, taken: Mapping[str, Unit]) -> str:
    if weight_node is not None:
        base = str(weight_node.target)
        base = base.removesuffix(".weight") if base.endswith(".weight") else base
    else:
        base = ".".join(filter(None, (module_path(node), "matmul")))
    base = re.sub(
        r"[|,~\s\x00-\x1f]", "_", base
    )  # names stand in node names, which runtimes list with commas
    name, count = base, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name


def _attributes(node: fx.Node, op: str) -> tuple[tuple[str, str], ...]:
    if not op.startswith("conv"):
        return ()
    names = ["stride", "padding", "dilation", "groups"]
    if op.startswith("conv_transpose"):
        names = ["stride", "padding", "output_padding", "groups", "dilation"]
    values = {
        **dict(zip(names, node.args[3:], strict=False)),
        **{k: v for k, v in node.kwargs.items() if k in names},
    }
    return tuple(sorted((k, str(v)) for k, v in values.items()))


def bias_of(node: fx.Node) -> Any:
    bias = bias_argument(node, node.args, node.kwargs)
    return bias if is_get_attr(bias) else None


def bias_argument(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Which of the arguments of a unit's call is its bias; None where there is none."""
    if node.target is aten.addmm.default:
        return args[0]
    if node.target in MATMULS:
        return None
    return args[2] if len(args) > 2 else kwargs.get("bias")


def outside_units(
    graph: fx.GraphModule, sites: Mapping[str, list[Site]], stored: Mapping[str, Sequence[str]]
) -> dict[str, torch.Tensor]:
    """Stored tensors that belong to no unit, by path: what something else than a unit reads, and is none itself.

    stored: as `find_stored` returns them.
    """
    held = {node for nodes in stored.values() for node in nodes}
    site_of = {site.node: site for calls in sites.values() for site in calls}
    found: dict[Any, tuple[str, torch.Tensor]] = {}
    for node in graph.graph.nodes:
        value = operator.attrgetter(str(node.target))(graph) if is_get_attr(node) else None
        if isinstance(value, torch.Tensor) and node.name not in held and other_readers(node, site_of):
            found[same(value)] = str(node.target), value
    return dict(found.values())

"""nn.Module -> Network, and the graph that computes it with every unit addressable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.graph import channels
from hwsearch.graph.calls import as_call, copied, evaluating, flat_inputs
from hwsearch.graph.canonical import canonicalize, functional_graph, tensor_attr
from hwsearch.graph.channels import Channels
from hwsearch.graph.edges import find_edges
from hwsearch.graph.export import check_types, export_program, first_line, weights_digest
from hwsearch.graph.nonfinite import check_finite
from hwsearch.graph.trial import tried
from hwsearch.graph.units import Shapes, Site, bias_of, find_stored, find_units, outside_units, why_whole
from hwsearch.network.network import Network
from hwsearch.task import Inputs

NAMED = 8
"""Stored tensors of no unit that a network names."""


@dataclass
class Traced:
    """A network with the graph that computes it.

    graph: takes the model's own arguments and returns the model's own outputs; BatchNorm is folded into
        the units, attention is spelled out as MatMul, Softmax, MatMul.
    sites: for each unit that is a layer, its calls in order.
    args, kwargs: the example inputs it was traced with.
    """

    network: Network
    graph: fx.GraphModule
    sites: dict[str, list[Site]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    """What the model returns on the example: the structure that an engine's flat outputs are put back into."""

    channels: Channels = field(default_factory=Channels)
    """How the network's channel groups run through the graph's tensors."""

    stored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """For each unit that is a stored tensor, or whose weight is tied to one, the nodes that hold it for others than its calls."""

    @cached_property
    def paths(self) -> dict[str, tuple[str | None, str | None]]:
        """For each unit where the graph holds its weight and its bias, None for what it has not."""
        nodes = {n.name: n for n in self.graph.graph.nodes}
        found = {}
        for unit, sites in self.sites.items():
            node, position = nodes[sites[0].node], sites[0].weight
            bias = bias_of(node)
            weight = None if position is None else str(node.args[position].target)
            found[unit] = weight, None if bias is None else str(bias.target)
        for unit, held in self.stored.items():
            found.setdefault(unit, (str(nodes[held[0]].target), None))
        return found

    def weight(self, unit: str) -> torch.Tensor | None:
        """The unit's weight with BatchNorm folded in, or None for a MatMul of two activations."""
        path = self.paths[unit][0]
        return None if path is None else tensor_attr(self.graph, path).detach()

    def bias(self, unit: str) -> torch.Tensor | None:
        """The unit's bias, or None where it has none."""
        path = self.paths[unit][1]
        return None if path is None else tensor_attr(self.graph, path).detach()

    def reads(self) -> list[tuple[str, int]]:
        """(path of its weight, the axis of it that holds what the unit reads) of each layer with a weight."""
        weights = ((self.paths[u.name][0], u.in_axis) for u in self.network.units if not u.stored)
        return [(path, axis) for path, axis in weights if path is not None]


def trace(
    model: torch.nn.Module,
    inputs: Inputs,
    name: str = "",
    *,
    residual: bool = False,
    what: str = "example_inputs",
) -> Traced:
    """Trace a module with `torch.export` and find its units and edges.

    inputs: one example; its batch size is the one the network is built for. residual: the width that LayerNorm
    normalises over may be made narrower too. what: names the inputs in messages.
    Raises UntraceableModel naming the submodule and operator, or the buffer that is state; InvalidInput if the model fails
    on `inputs` or returns NaN or infinity.
    """
    args, kwargs = as_call(inputs)
    signature = _signature(model)
    kwargs = {**{k: kwargs[k] for k in signature if k in kwargs}, **kwargs}
    check_types(model)
    with evaluating(model), torch.no_grad():
        try:
            outputs = model(*copied(args), **copied(kwargs))
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidInput(f"the model fails on {what}: {why}") from error
        graph = functional_graph(export_program(model, args, kwargs))
    graph.meta["signature"] = signature
    canonicalize(graph)
    check_finite(outputs, graph, flat_inputs(graph, args, kwargs), what)
    shapes = Shapes(graph, args, kwargs)
    sites, units = find_units(graph, shapes)
    if not units:
        raise UntraceableModel(
            f"{type(model).__name__} has no layer to compress: no convolution, linear layer or matrix product was found"
        )
    owned, edges = find_edges(graph, sites, shapes)
    units = [replace(unit, fused=tuple(owned[unit.name])) for unit in units]
    units, stored = find_stored(graph, sites, units)
    others = outside_units(graph, sites, stored)
    network = Network(
        units=tuple(units),
        edges=edges,
        fixed_bytes=sum(t.numel() * t.element_size() for t in others.values()),
        input_shapes=tuple(
            tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ),
        weights_digest=weights_digest([*model.named_parameters(), *model.named_buffers()]),
        name=name,
        fixed=_largest(others),
    )
    found = Traced(network, graph, sites, args, kwargs, outputs, stored=stored)
    return _with_channels(found, residual)


def _largest(others: Mapping[str, torch.Tensor]) -> tuple[tuple[str, int, str], ...]:
    """(path, bytes, why it is stored as it is) of the largest stored tensors that belong to no unit."""
    sizes = {path: t.numel() * t.element_size() for path, t in others.items()}
    named = sorted(sizes, key=lambda path: -sizes[path])[:NAMED]
    return tuple((path, sizes[path], why_whole(others[path])) for path in named)


def _with_channels(traced: Traced, residual: bool) -> Traced:
    """Find the channel groups, and keep those that can be made narrower with the right result on the example."""
    graph, sites = traced.graph, traced.sites
    inputs = flat_inputs(graph, traced.args, traced.kwargs)
    op = {u.name: u.op for u in traced.network.units}
    units = {s.node: (unit, op[unit], s.weight) for unit, calls in sites.items() for s in calls}
    found = channels.find(graph, inputs, units, residual=residual)
    found = tried(found, graph, inputs, traced.reads())
    nodes = {n.name: n for n in graph.graph.nodes}
    places = {
        unit: (calls[0].node, [nodes[calls[0].node].args[p].name for p in calls[0].activations])
        for unit, calls in sites.items()
    }
    places |= {u.name: (traced.stored[u.name][0], []) for u in traced.network.units if u.stored}
    weights = {unit: weight for unit, (weight, _) in traced.paths.items() if weight is not None}
    others = {
        path: t.numel() * t.element_size() for path, t in outside_units(graph, sites, traced.stored).items()
    }
    network = channels.describe(found, traced.network, places, weights, others)
    return replace(traced, network=network, channels=found)


def _signature(model: torch.nn.Module) -> list[str]:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]

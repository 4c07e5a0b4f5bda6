"""nn.Module -> Network, and the graph that computes it with every unit addressable."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.fx._pytree import tree_flatten_spec
from torch.utils import _pytree as pytree

from hwsearch import channels
from hwsearch.canonical import (
    CONVOLUTIONS,
    MATMULS,
    aten,
    canonicalize,
    functional_graph,
    is_get_attr,
    module_path,
    op_name,
    tensor_attr,
)
from hwsearch.channels import Channels, same
from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.exporting import check_finite, check_types, export_program, first_line, weights_digest
from hwsearch.narrowing import masked_graph, narrow_graph
from hwsearch.network import Edge, Network, Unit, macs
from hwsearch.task import Inputs

# Elementwise operators that runtimes fuse into the layer before them.
FUSIBLE = frozenset(
    "relu relu_ relu6 relu6_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ "
    "hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ prelu mish mish_ clamp clamp_ clamp_min clamp_min_ "
    "add add_ sub sub_ mul mul_ div div_ batch_norm dropout dropout_ alias clone contiguous detach_ "
    "softplus neg abs sqrt rsqrt exp pow erf to _to_copy".split()
)
_CLAMPS = frozenset("relu relu_ relu6 relu6_ hardtanh hardtanh_ clamp clamp_min".split())
# Operators that move or keep data without computing: they pass a tensor on.
_NOT_FUSED = frozenset("dropout dropout_ alias clone contiguous detach_ to _to_copy".split())


@dataclass(frozen=True)
class Site:
    """One call of a unit in the graph: its node, its activation arguments and its weight argument."""

    node: str
    activations: tuple[int, ...]
    weight: int | None


@dataclass
class Traced:
    """A network with the graph that computes it.

    graph: takes the model's own arguments and returns the model's own outputs; BatchNorm is folded into
        the units, attention is spelled out as MatMul, Softmax, MatMul.
    sites: for each unit, its calls in order.
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

    @cached_property
    def paths(self) -> dict[str, tuple[str | None, str | None]]:
        """For each unit where the graph holds its weight and its bias, None for what it has not."""
        nodes = {n.name: n for n in self.graph.graph.nodes}
        found = {}
        for unit, sites in self.sites.items():
            node, position = nodes[sites[0].node], sites[0].weight
            bias = _bias_of(node)
            weight = None if position is None else str(node.args[position].target)
            found[unit] = weight, None if bias is None else str(bias.target)
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
        """(path of its weight, the axis of it that holds what the unit reads) of each unit with a weight."""
        weights = ((self.paths[u.name][0], reads_axis(u)) for u in self.network.units)
        return [(path, axis) for path, axis in weights if path is not None]


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in any of the forms that a Task takes, as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode; afterwards its submodules' modes and its buffers are what they were."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before) and not (
                torch.isnan(before).any() and buffer.is_floating_point()
            ):
                buffer.detach().copy_(before)


def trace(model: torch.nn.Module, inputs: Inputs, name: str = "", *, residual: bool = False) -> Traced:
    """Trace a module with `torch.export` and find its units and edges.

    inputs: one example; its batch size is the one the network is built for. residual: the width that LayerNorm
    normalises over may be made narrower too.
    Raises UntraceableModel naming the submodule and operator; InvalidInput if the model fails on `inputs`.
    """
    args, kwargs = as_call(inputs)
    signature = _signature(model)
    kwargs = {**{k: kwargs[k] for k in signature if k in kwargs}, **kwargs}
    check_types(model)
    with evaluating(model), torch.no_grad():
        try:
            outputs = model(*args, **kwargs)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidInput(f"the model fails on example_inputs: {why}") from error
        check_finite(outputs)
        graph = functional_graph(export_program(model, args, kwargs))
    graph.meta["signature"] = signature
    canonicalize(graph)
    shapes = _Shapes(graph, args, kwargs)
    sites, units = _find_units(graph, shapes)
    if not units:
        raise UntraceableModel(
            f"{type(model).__name__} has no layer to compress: no convolution, linear layer or matrix product was found"
        )
    owned, edges = _find_edges(graph, sites, shapes)
    units = [replace(unit, fused=tuple(owned[unit.name])) for unit in units]
    others = _outside_units(graph, sites)
    network = Network(
        units=tuple(units),
        edges=edges,
        fixed_bytes=sum(t.numel() * t.element_size() for t in others.values()),
        input_shapes=tuple(
            tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ),
        weights_digest=weights_digest([*model.named_parameters(), *model.named_buffers()]),
        name=name,
    )
    found = Traced(network, graph, sites, args, kwargs, outputs)
    return _with_channels(found, residual)


def _with_channels(traced: Traced, residual: bool) -> Traced:
    """Find the channel groups, and keep those that can be made narrower with the right result on the example."""
    graph, sites = traced.graph, traced.sites
    inputs = flat_inputs(graph, traced.args, traced.kwargs)
    op = {u.name: u.op for u in traced.network.units}
    units = {s.node: (unit, op[unit], s.weight) for unit, calls in sites.items() for s in calls}
    found = channels.find(graph, inputs, units, residual=residual)
    bad = _bad(traced, found, [g for g in found.groups if g not in found.rescaled])
    bad |= _bad(traced, found, [g for g in found.groups if g in found.rescaled])
    found = found.without(bad, [f"channels of {g} stay whole: {why}" for g, why in bad.items()])
    if bad and found.groups and (why := _wrong(traced, found, list(found.groups))):
        found = found.without(list(found.groups), [f"all channels stay whole: {why}"])
    nodes = {n.name: n for n in graph.graph.nodes}
    places = {
        unit: (calls[0].node, [nodes[calls[0].node].args[p].name for p in calls[0].activations])
        for unit, calls in sites.items()
    }
    weights = {unit: weight for unit, (weight, _) in traced.paths.items() if weight is not None}
    others = {path: t.numel() * t.element_size() for path, t in _outside_units(graph, sites).items()}
    network = channels.describe(found, traced.network, places, weights, others)
    return replace(traced, network=network, channels=found)


def _bad(traced: Traced, found: Channels, groups: list[str]) -> dict[str, str]:
    """Groups that fail the trial, and why: halved until each is found."""
    why = _wrong(traced, found, groups) if groups else ""
    if not why or len(groups) == 1:
        return dict.fromkeys(groups, why) if why else {}
    half = len(groups) // 2
    bad = _bad(traced, found, groups[:half]) | _bad(traced, found, groups[half:])
    return bad or dict.fromkeys(groups, why)


def _wrong(traced: Traced, found: Channels, groups: Sequence[str]) -> str:
    """What is wrong with the network with every other slot of some groups gone, or nothing."""
    mask = found.mask({g: range(0, len(found.groups[g]), 2) for g in groups})
    inputs = flat_inputs(traced.graph, traced.args, traced.kwargs)
    run = _Run(narrow_graph(traced.graph, found, mask))
    with torch.no_grad():
        try:
            have = run.run(*inputs, enable_io_processing=False)
        except Exception as error:
            at = run.last
            where = (
                f"{module_path(at) or 'the model itself'} ({at.target})" if at is not None else "the model"
            )
            return f"{where} does not run with fewer: {first_line(error)}"
        if not found.rescaled.isdisjoint(groups):
            return ""
        want = _Run(masked_graph(traced.graph, found, mask, traced.reads())).run(
            *inputs, enable_io_processing=False
        )
    for a, b in zip(pytree.tree_leaves(have), pytree.tree_leaves(want), strict=True):
        if not isinstance(b, torch.Tensor) or not b.is_floating_point():
            continue
        if a.shape != b.shape or float((a - b).norm()) > 1e-3 * float(b.norm()) + 1e-6:
            return "the narrow network computes something else than the masked one"
    return ""


class _Run(fx.Interpreter):
    """Remembers the node that ran last."""

    last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        return super().run_node(n)


def reads_axis(unit: Unit) -> int:
    """The axis of a unit's weight that holds what it reads."""
    return unit.in_axis


def _signature(model: torch.nn.Module) -> list[str]:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


class _Shapes(fx.Interpreter):
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


def flat_inputs(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The placeholders' values, in order, for a call with the model's signature.

    Arguments may be positional or by name, whichever way the example was. Raises InvalidInput on any others.
    """
    codegen: Any = graph.graph._codegen
    spec = codegen.pytree_info.in_spec
    positional, named = spec.children()
    count, names = positional.num_children, list(named.context or ())
    if len(args) != count or set(kwargs) != set(names):
        signature = list(graph.meta.get("signature", ()))
        given = {**dict(zip(signature, args, strict=False)), **kwargs}
        wanted = [*signature[:count], *names]
        extra = [k for k, v in given.items() if k not in wanted and v is not None]
        missing = [k for k in wanted if k not in given]
        if extra or missing or len(args) > len(signature):
            raise InvalidInput(
                f"the model was traced with inputs {', '.join(wanted)}; got {len(args)} by position"
                + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            )
        args, kwargs = tuple(given[k] for k in signature[:count]), {k: given[k] for k in names}
    try:
        return list(tree_flatten_spec((tuple(args), {k: kwargs[k] for k in names}), spec))
    except Exception as error:
        raise InvalidInput(
            f"the inputs have another structure than example_inputs: {first_line(error)}"
        ) from error


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


def _find_units(graph: fx.GraphModule, shapes: _Shapes) -> tuple[dict[str, list[Site]], list[Unit]]:
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
        bias = _bias_of(node)
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


def _bias_of(node: fx.Node) -> Any:
    if node.target is aten.addmm.default:
        bias = node.args[0]
    elif node.target in MATMULS:
        return None
    else:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if is_get_attr(bias) else None


def _outside_units(graph: fx.GraphModule, sites: dict[str, list[Site]]) -> dict[str, torch.Tensor]:
    """Stored tensors that something else than a unit reads, by path.

    A tied weight that an embedding reads as well is among them: it is stored for the embedding, and once more
    for the unit at its own precision.
    """
    site_of = {site.node: site for calls in sites.values() for site in calls}
    found: dict[Any, tuple[str, torch.Tensor]] = {}
    for node in graph.graph.nodes:
        value = operator.attrgetter(str(node.target))(graph) if is_get_attr(node) else None
        if not isinstance(value, torch.Tensor):
            continue
        for user in node.users:
            site = site_of.get(user.name)
            weight = user.args[site.weight] if site is not None and site.weight is not None else None
            if site is None or (node is not weight and node is not _bias_of(user)):
                found[same(value)] = str(node.target), value
    return dict(found.values())


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


def _find_edges(
    graph: fx.GraphModule, sites: dict[str, list[Site]], shapes: _Shapes
) -> tuple[dict[str, list[str]], tuple[Edge, ...]]:
    """Operators owned by each unit, and the edges between units.

    A fusible elementwise operator belongs to the unit that ran last before it (a residual add is fused into the
    later convolution); what else it reads arrives over a fused edge. Any other operator passes on its sources.
    """
    unit_of = {site.node: name for name, calls in sites.items() for site in calls}
    site_of = {site.node: site for calls in sites.values() for site in calls}
    order = {name: i for i, name in enumerate(sites)}
    owned: dict[str, list[str]] = {name: [] for name in sites}
    # For each node: the units whose outputs it carries, each with the operators passed on the way.
    carried: dict[str, dict[str, tuple[str, ...]]] = {}
    edges: dict[tuple[str, str, bool], Edge] = {}

    def connect(source: fx.Node, dst: str, fused: bool) -> None:
        for src, via in carried.get(source.name, {}).items():
            if src != dst and (src, dst, fused) not in edges:
                edges[src, dst, fused] = Edge(src, dst, shapes.bytes.get(source.name, 0), via, fused)

    for node in graph.graph.nodes:
        if node.name in unit_of:
            for position in site_of[node.name].activations:
                connect(node.args[position], unit_of[node.name], fused=False)
            carried[node.name] = {unit_of[node.name]: ()}
            continue
        if node.op != "call_function":
            continue
        name = op_name(node)
        sources = [i for i in node.all_input_nodes if carried.get(i.name)]
        if not sources:
            continue
        if name in FUSIBLE:
            fresh = [(s, u) for s in sources for u, via in carried[s.name].items() if not via]
            if fresh:
                main, owner = max(fresh, key=lambda pair: order[pair[1]])
                for source in sources:
                    if source is not main:
                        connect(source, owner, fused=True)
                if name not in _NOT_FUSED:
                    owned[owner].append(name.rstrip("_"))
                carried[node.name] = {owner: ()}
                continue
        carried[node.name] = {
            u: via if name in _NOT_FUSED else (*via, name)[-8:]
            for s in sources
            for u, via in carried[s.name].items()
        }
    return owned, tuple(edges.values())


def output_node(node: fx.Node) -> fx.Node:
    """Where the range of a unit's output is observed: after the clamp that follows it alone, if one does.

    Its Q/DQ stands before the clamp, so that runtimes fuse it into the unit: what it cuts off, the clamp would.
    """
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) in _CLAMPS else node

"""A canonical graph with fewer channels: narrower tensors, and the operators' own numbers to match."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from hwsearch.graph.canonical import CONVOLUTIONS, aten, op_name, set_attr, tensor_attr
from hwsearch.graph.channels import FILLED, Axis, Channels

Mask = NDArray[np.bool_]
"""For each slot number whether it stays."""

SPLITS = frozenset("split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk".split())


def share_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of one's own on the same tensors: setting one leaves the first graph as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree specs, copied
        shared = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    shared.meta = dict(graph.meta)
    return shared


def narrow_graph(graph: fx.GraphModule, channels: Channels, mask: Mask) -> fx.GraphModule:
    """The graph without the slots that `mask` leaves out."""
    narrow = share_graph(graph)
    for path, axes in channels.tensors.items():
        value = tensor_attr(graph, path)
        left = cut(value, axes, mask)
        if path in channels.numbers:
            left = _numbers_left(left, channels.nodes.get(channels.numbers[path], [[]])[0], mask)
        if left is not value:
            set_attr(narrow, path, left)
    for node in list(narrow.graph.nodes):
        if node.op != "call_function":
            continue
        if node.name in channels.summed:
            _narrow_mean(narrow, node, channels, mask)
        else:
            _narrow_arguments(node, channels, mask)
    narrow.recompile()
    return narrow


def masked_graph(
    graph: fx.GraphModule, channels: Channels, mask: Mask, reads: Iterable[tuple[str, int]]
) -> fx.GraphModule:
    """The whole graph with zeros for the slots left out, in the weights that read them and in what sums over channels.

    reads: (path of a weight, its axis that holds what the unit reads).
    """
    masked = share_graph(graph)
    for node in list(masked.graph.nodes):
        gates = summed_gates(node, channels, mask)
        if gates is not None:
            path = f"_left_{node.name}"
            set_attr(masked, path, gates)
            with masked.graph.inserting_before(node):
                args = (node.args[0], masked.graph.get_attr(path))
                node.update_arg(0, masked.graph.call_function(aten.mul.Tensor, args))
    masked.recompile()
    for path, axis in dict.fromkeys(reads):
        value = tensor_attr(graph, path)
        for own in channels.tensors.get(path, []):
            gone = np.flatnonzero(~mask[own.slots])
            if own.axis == axis and len(gone):
                set_attr(masked, path, value.index_fill(axis, torch.from_numpy(gone), 0.0))
    return masked


def summed_gates(node: fx.Node, channels: Channels, mask: Mask) -> torch.Tensor | None:
    """What a node that sums over channels multiplies its input with: 0 for those that are gone; None where all stay."""
    if node.name not in channels.summed:
        return None
    source: Any = node.args[0]
    shape = channels.shapes.get(source.name, [()])[0]
    gates = torch.ones([1] * len(shape))
    for axis in channels.nodes.get(source.name, [[]])[0]:
        own = torch.from_numpy(mask[axis.slots]).float()
        gates = gates * own.reshape([-1 if d == axis.axis else 1 for d in range(len(shape))])
    return None if bool(gates.all()) else gates


def cut(value: torch.Tensor, axes: Sequence[Axis], mask: NDArray[np.bool_]) -> torch.Tensor:
    """A tensor without the indices whose slots go."""
    for axis in axes:
        left = axis.kept(mask)
        if len(left) < len(axis.slots):
            value = value.index_select(axis.axis, torch.from_numpy(left))
    return value


def left_channels(channels: Channels, mask: NDArray[np.bool_]) -> Channels:
    """The channels of the narrow network, which may be made narrower again."""
    number = np.where(mask, np.cumsum(mask) - 1, -1)

    def axis(a: Axis) -> Axis:
        return Axis(a.axis, number[a.slots[mask[a.slots]]])

    def shape(old: tuple[int, ...], axes: Sequence[Axis]) -> tuple[int, ...]:
        left = {a.axis: len(a.kept(mask)) for a in axes}
        return tuple(left.get(d, size) for d, size in enumerate(old))

    return replace(
        channels,
        groups={g: number[s[mask[s]]] for g, s in channels.groups.items()},
        nodes={n: [[axis(a) for a in axes] for axes in several] for n, several in channels.nodes.items()},
        tensors={p: [axis(a) for a in axes] for p, axes in channels.tensors.items()},
        shapes={
            n: [shape(own, axes) for own, axes in zip(several, channels.nodes[n], strict=True)]
            for n, several in channels.shapes.items()
        },
    )


def _numbers_left(numbers: torch.Tensor, of: Sequence[Axis], mask: Mask) -> torch.Tensor:
    """Numbers of channels, of those that are left, among those that are left."""
    for axis in of:
        place = torch.from_numpy(np.cumsum(mask[axis.slots]) - 1)
        numbers = place[numbers % len(axis.slots)].to(numbers.dtype)
    return numbers


def _narrow_mean(graph: fx.GraphModule, node: fx.Node, channels: Channels, mask: Mask) -> None:
    """A mean over channels still divides by all of them."""
    source: Any = node.args[0]
    if op_name(node) != "mean":
        return
    for axis in channels.nodes.get(source.name, [[]])[0]:
        share = len(axis.kept(mask)) / len(axis.slots)
        if share < 1:
            with graph.graph.inserting_after(node):
                scaled = graph.graph.call_function(aten.mul.Tensor, (node, share))
            scaled.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)  # noqa: B023


def _narrow_arguments(node: fx.Node, channels: Channels, mask: Mask) -> None:
    """Sizes, positions and counts that an operator states as numbers."""

    def axes(n: Any, which: int = 0) -> list[Axis]:
        found = channels.nodes.get(n.name, []) if isinstance(n, fx.Node) else []
        return found[which] if which < len(found) else []

    def rank(n: Any) -> int:
        return len(channels.shapes[n.name][0])

    def before(n: Any, dim: int, index: int) -> int:
        """How many indices before `index` along `dim` stay."""
        for axis in axes(n):
            if axis.axis == dim % rank(n):
                index = index + len(axis.slots) if index < 0 else min(index, len(axis.slots))
                return int(mask[axis.slots[:index]].sum())
        return index

    name = op_name(node).rstrip("_")
    args: list[Any] = list(node.args)
    options: dict[str, Any] = dict(node.kwargs)
    own = axes(node)
    if name in ("reshape", "view", "_unsafe_view", "expand", *FILLED) and own:
        position = FILLED.get(name, 1)
        sizes = list(args[position])
        for axis in own:
            if sizes[axis.axis] != -1:
                sizes[axis.axis] = len(axis.kept(mask))
        node.update_arg(position, sizes)
    elif name == "repeat" and own and not axes(args[0]):  # copies for each channel of a tensor without
        times = list(args[1])
        for axis in own:
            times[axis.axis] = len(axis.kept(mask))
        node.update_arg(1, times)
    elif name == "repeat_interleave" and own and not axes(args[0]):
        node.update_arg(1, len(own[0].kept(mask)))
    elif name == "unflatten" and own:
        dim, sizes = int(args[1]), list(args[2])
        for axis in own:
            position = axis.axis - dim % rank(args[0])
            if 0 <= position < len(sizes) and sizes[position] != -1:
                sizes[position] = len(axis.kept(mask))
        node.update_arg(2, sizes)
    elif name in SPLITS and axes(args[0]):
        dim = args[2] if len(args) > 2 else options.get("dim", 0)
        if any(a.axis == dim % rank(args[0]) for a in axes(args[0])):
            sizes, start = [], 0
            for shape in channels.shapes[node.name]:
                end = start + shape[dim]
                sizes.append(before(args[0], dim, end) - before(args[0], dim, start))
                start = end
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (args[0], sizes, dim), {}
    elif name == "slice" and axes(args[0]):
        dim = int(args[1]) if len(args) > 1 else 0
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        end = args[3] if len(args) > 3 and args[3] is not None else 2**62
        if any(a.axis == dim % rank(args[0]) for a in axes(args[0])):
            node.args = (args[0], dim, before(args[0], dim, start), before(args[0], dim, end), *args[4:])
    elif name == "select" and axes(args[0]):
        node.update_arg(2, before(args[0], int(args[1]), int(args[2])))
    elif name == "group_norm" and axes(args[0]):
        for axis in axes(args[0]):
            node.update_arg(1, int(args[1]) * len(axis.kept(mask)) // len(axis.slots))
    elif name in ("layer_norm", "rms_norm") and axes(args[0]):
        for axis in axes(args[0]):
            if axis.axis == rank(args[0]) - 1:
                node.update_arg(1, [len(axis.kept(mask))])
    elif node.target in CONVOLUTIONS and axes(args[0]):
        _narrow_groups(node, mask, axes(args[0]))


def _narrow_groups(node: fx.Node, mask: Mask, came: Sequence[Axis]) -> None:
    """A depthwise convolution has as many groups as channels; any other keeps the number of its groups."""
    position = 6
    count: Any = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    for axis in came:
        if count != 1 and count == len(axis.slots):
            if len(node.args) > position:
                node.update_arg(position, len(axis.kept(mask)))
            else:
                node.update_kwarg("groups", len(axis.kept(mask)))

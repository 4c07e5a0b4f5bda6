"""Run a graph on labels, and make groups of what is left connected."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from hwsearch.graph.canonical import op_name
from hwsearch.graph.channels.atoms import ALWAYS, Ints, Label, each, same, varied
from hwsearch.graph.channels.groups import Axis, Channels
from hwsearch.graph.channels.labels import Labels
from hwsearch.graph.channels.moving import filled, repeated
from hwsearch.graph.channels.rules import FILLED, REPEATED, operator_label
from hwsearch.graph.channels.weights import unit

Units = Mapping[str, tuple[str, str, int | None]]
"""Node -> (unit, operator, position of the weight among its arguments)."""

MEETING = 3
"""So many groups may meet in a unit with widths of their own: a concatenation of two, and what the unit puts out."""

Signature = Mapping[int, tuple[Any, ...]]
"""For each slot's root the tensors that it runs through, and along how many indices of each."""


def find(graph: fx.GraphModule, inputs: Sequence[Any], units: Units, *, residual: bool = False) -> Channels:
    """The channel groups of a canonical graph.

    inputs: values of its placeholders. residual: also the width that LayerNorm normalises over; narrowing it changes
    the statistics, so that the narrow network does not compute what the masked one would.
    """
    run = Labels(graph, {n: (op, position) for n, (_, op, position) in units.items()}, residual)
    with torch.no_grad():
        _Run(graph, run).run(*inputs, enable_io_processing=False)
    _make_rectangular(run)
    while clash := _clash(run, signature := _signature(run, units)):
        for axis in clash.values():
            _tie(run, axis, signature)
    return _channels(run, units, signature)


class _Run(fx.Interpreter):
    """Real values for their shapes, and each node's label beside them."""

    def __init__(self, graph: fx.GraphModule, labels: Labels) -> None:
        super().__init__(graph)
        self.labels = labels

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.labels.see(n, value)
        self.labels.of[n] = self.label(n)
        return value

    def label(self, n: fx.Node) -> Any:
        labels = self.labels
        if n.op == "output":
            for source in n.all_input_nodes:
                labels.pin(labels.read(source))
        if n.op != "call_function":
            return None
        if n.name not in labels.units and not any(
            labels.is_stored(i) or labels.get(i) is not None for i in n.all_input_nodes
        ):
            name = op_name(n)
            if name in REPEATED.split():
                return repeated(labels, n)
            return filled(labels, n) if name in FILLED else None
        if n.target is operator.getitem:
            several = labels.get(n.args[0])
            return several[n.args[1]] if isinstance(several, list) else None  # type: ignore[index]
        return each(unit(labels, n) if n.name in labels.units else operator_label(labels, n), self.settled)

    def settled(self, label: Ints) -> Label:
        """A label's axes on which it varies; a single channel taken out by its number stays."""
        found = self.labels.atoms.squeezed(label)
        if found is not None and found.size == 1:
            self.labels.pin(found)
            return None
        return found


def _make_rectangular(run: Labels) -> None:
    """Let every tensor vary along one axis only, the one that leaves most slots: else removing one leaves a hole."""
    changed = True
    while changed:
        changed = False
        labels = [
            x for own in run.of.values() for x in (own if isinstance(own, list) else [own]) if x is not None
        ]
        for label in [*labels, *run.elements.values()]:
            found = run.atoms.squeezed(label)
            axes = varied(found)
            if found is None or len(axes) < 2:
                continue
            changed = True
            best = max(axes, key=lambda d, x=found: _classes(x, d))  # type: ignore[misc]
            for axis in axes:
                if axis != best:
                    found = run.atoms.tied(found, axis)


def _classes(label: Ints, axis: int) -> int:
    """How many slots would be left along an axis if the others were tied."""
    flat = np.moveaxis(label, axis, 0).reshape(label.shape[axis], -1)
    n, m = flat.shape
    _, atoms = np.unique(flat, return_inverse=True)
    size = n + int(atoms.max()) + 1
    ends = np.repeat(np.arange(n), m), n + atoms.ravel()
    graph = coo_array((np.ones(n * m, np.int8), ends), shape=(size, size))
    return int(connected_components(graph, directed=False)[0])


def _stored_axes(run: Labels) -> dict[tuple[Any, int], Ints]:
    """Atoms along each axis of each stored tensor that may be narrowed."""
    found = {
        (key, axis): run.atoms.find(atoms) for key, own in run.axes.items() for axis, atoms in own.items()
    }
    for key, elements in run.elements.items():
        label = run.atoms.squeezed(elements) if key not in run.axes else None
        if label is not None and label.size > 1:
            found[key, varied(label)[0]] = label.ravel()
    return found


def _signature(run: Labels, units: Units) -> Signature:
    """Of each slot, in order of appearance."""
    axes: dict[Any, Ints] = dict(_stored_axes(run))
    for n in run.graph.graph.nodes:
        if (
            n.name in units and units[n.name][2] is None
        ):  # a product has no weight that says how it is narrowed
            for label, place in [
                (run.get(n), "output"),
                *((run.get(a), i) for i, a in enumerate(n.args[:2])),
            ]:
                if label is not None:
                    axes[n.name, place] = label.ravel()
    places: dict[int, list[Any]] = {}
    for place, atoms in axes.items():
        for root, count in Counter(atoms.tolist()).items():
            if root != ALWAYS:
                places.setdefault(root, []).append((place, count))
    return {root: tuple(own) for root, own in places.items()}


def _clash(run: Labels, signature: Signature) -> dict[Any, Ints]:
    """Axes of units' weights along which groups are made one: where too many meet in one unit to choose each by itself."""
    found = {}
    for key, own in run.axes.items():
        meet = {axis: _groups_along(run, atoms, signature) for axis, atoms in own.items()}
        if len(set().union(*meet.values())) > MEETING:
            axis = max(meet, key=lambda a: len(meet[a]))
            if len(meet[axis]) > 1:
                found[key, axis] = run.atoms.find(own[axis])
    return found


def _groups_along(run: Labels, atoms: Ints, signature: Signature) -> set[Any]:
    roots = np.unique(run.atoms.find(atoms)).tolist()
    return {signature[r] for r in roots if r != ALWAYS and r in signature}


def _tie(run: Labels, axis: Ints, signature: Signature) -> None:
    """Make the groups along an axis one of proportional parts; what is left over of a part stays."""
    atoms = run.atoms
    parts: dict[Any, list[int]] = {}
    for root in dict.fromkeys(atoms.find(axis).tolist()):
        if root != ALWAYS and root in signature:
            parts.setdefault(signature[root], []).append(root)
    if len(parts) < 2:
        return
    count = _shares([len(p) for p in parts.values()])
    first = None
    for part in parts.values():
        whole = len(part) - len(part) % count
        if whole < len(part):
            atoms.pin(np.array(part[whole:]))
        if not whole:
            continue
        rows = np.array(part[:whole]).reshape(count, -1)
        atoms.union(rows, rows[:, :1])
        if first is not None:
            atoms.union(rows[:, 0], first)
        first = rows[:, 0]


def _shares(sizes: Sequence[int]) -> int:
    """Into how many proportional parts to cut groups of these sizes: fine steps, and few channels left over."""

    def worth(count: int) -> float:
        return sum(s - s % count for s in sizes) / sum(sizes) - 1 / count

    return max(range(1, max(sizes) + 1), key=worth)


def _channels(run: Labels, units: Units, signature: Signature) -> Channels:
    members: dict[tuple[Any, ...], list[int]] = {}
    for root, own in signature.items():
        members.setdefault(own, []).append(root)
    reads, makes = _ends(run, units)
    rescaled = {r for label in run.rescaled for r in run.atoms.find(label).ravel().tolist()}
    number = {ALWAYS: ALWAYS}
    found = Channels(blocked=tuple(run.stopped))
    for roots in members.values():
        producers = tuple(u for u, atoms in makes.items() if not atoms.isdisjoint(roots))
        consumers = tuple(u for u, atoms in reads.items() if not atoms.isdisjoint(roots))
        if len(roots) < 2 or not producers or not consumers:
            continue
        name = producers[0]
        while name in found.groups:
            name += "'"
        start = len(number)
        number |= {root: start + i for i, root in enumerate(roots)}
        found.groups[name] = np.arange(start, start + len(roots))
        found.producers[name], found.consumers[name] = producers, consumers
        if not rescaled.isdisjoint(roots):
            found.rescaled |= {name}

    def numbers(atoms: Ints) -> Ints:
        return np.array([number.get(r, ALWAYS) for r in run.atoms.find(atoms).tolist()], np.int64)

    def axes(label: Label) -> list[Axis]:
        label = None if label is None else run.atoms.squeezed(label)
        own = [Axis(axis, numbers(label.ravel())) for axis in varied(label)] if label is not None else []
        return [axis for axis in own if axis.slots.any()]

    for n, label in run.of.items():
        several = [axes(x) for x in (label if isinstance(label, list) else [label])]
        if any(several):
            value = run.value[n]
            found.nodes[n.name] = several
            found.shapes[n.name] = [tuple(v.shape) for v in (value if isinstance(value, list) else [value])]
    stored = _stored_axes(run)
    for path, key in run.path.items():
        through = [Axis(axis, numbers(atoms)) for (k, axis), atoms in stored.items() if k == key]
        if through := [axis for axis in through if axis.slots.any()]:
            found.tensors[path] = through
    found.summed = frozenset(n.name for n in run.summed)
    found.numbers = {path: n.name for path, n in run.numbers.items() if path in found.tensors}
    for n in run.value:
        if n.op == "get_attr" and str(n.target) in found.tensors:
            found.nodes[n.name], found.shapes[n.name] = [found.tensors[str(n.target)]], [run.shape(n)]
    return found


def _ends(run: Labels, units: Units) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """For each unit the roots that its weight reads, and those that it puts out."""
    reads: dict[str, set[int]] = {}
    makes: dict[str, set[int]] = {}
    for n in run.graph.graph.nodes:
        if n.name not in units:
            continue
        name, op, position = units[n.name]
        own = {} if position is None else run.axes[same(run.value[n.args[position]])]
        if len(own) < 2:
            continue  # a product has no channels of its own; a depthwise convolution passes them on
        came = set(run.atoms.find(own[0 if op == "matmul" or "transpose" in op else 1]).tolist())
        label = run.get(n)
        out = set() if label is None else set(label.ravel().tolist())
        makes.setdefault(name, set()).update(out - came - {ALWAYS})
        reads.setdefault(name, set()).update(came - {ALWAYS})
    return reads, makes

"""The labels of a graph's tensors: which atoms each of their indices is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from hwsearch.graph.canonical import is_get_attr, module_path, tensor_attr
from hwsearch.graph.channels.atoms import ALWAYS, Atoms, Ints, Label, each, same, varied

LARGEST = 1 << 20
"""Stored tensors of more elements, outside of units, stay whole (embeddings are looked at as columns)."""


class Labels:
    """What is known so far of a graph's channels, in the order in which it runs.

    units: node -> (operator, position of its weight among its arguments). residual: also the width that LayerNorm
    normalises over.
    """

    def __init__(
        self, graph: fx.GraphModule, units: Mapping[str, tuple[str, int | None]], residual: bool
    ) -> None:
        self.graph, self.units, self.residual = graph, units, residual
        self.atoms = Atoms()
        self.of: dict[fx.Node, Any] = {}
        self.value: dict[fx.Node, Any] = {}
        self.constant: set[fx.Node] = set()
        """Nodes that depend on no input."""
        self.axes: dict[Any, dict[int, Ints]] = {}
        """Of weights and biases of units, by identity: the atoms along each axis that may be narrowed."""
        self.elements: dict[Any, Ints] = {}
        """Of other stored tensors: the atom of each element."""
        self.path: dict[str, Any] = {}
        """Identity of the stored tensor under each path."""
        self.rescaled: list[Ints] = []
        self.summed: set[fx.Node] = set()
        """Sums, means and norms over channels: what is removed counts as zero."""
        self.numbers: dict[str, fx.Node] = {}
        """Stored positions by which channels are taken, by path, and of what."""
        self.stopped: dict[str, None] = {}

    def see(self, n: fx.Node, value: Any) -> None:
        """Remember a node's value: stored tensors and integers themselves, of the rest the shape."""

        def light(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or is_get_attr(n) or not x.is_floating_point():
                return x
            return torch.empty(x.shape, dtype=x.dtype, device="meta")

        if n.op == "get_attr" or (n.op == "call_function" and self.constant.issuperset(n.all_input_nodes)):
            self.constant.add(n)
        self.value[n] = [light(x) for x in value] if isinstance(value, list | tuple) else light(value)

    def get(self, n: Any) -> Any:
        """The current label of a node: None where it has none, a list where the node has several results."""
        return each(self.of.get(n), self.atoms.squeezed) if isinstance(n, fx.Node) else None

    def read(self, n: fx.Node) -> Any:
        """As `get`, with atoms for the elements of a tensor that the graph stores."""
        return self.stored(n) if self.is_stored(n) else self.get(n)

    def shape(self, n: fx.Node) -> tuple[int, ...]:
        return tuple(self.value[n].shape)

    def rank(self, n: Any) -> int:
        return len(self.shape(n))

    def is_stored(self, n: Any) -> bool:
        """Whether a node is a tensor that the graph stores."""
        return is_get_attr(n) and isinstance(self.value.get(n), torch.Tensor)

    def stored(self, n: fx.Node) -> Ints:
        """Atoms for every element of a tensor that an operator outside of units reads."""
        tensor = tensor_attr(self.graph, str(n.target))
        key = self.path[str(n.target)] = same(tensor)
        whole = np.zeros((1,) * tensor.dim(), np.int64)
        integer = not tensor.is_floating_point() and tensor.dtype != torch.bool  # positions, not channels
        if key in self.axes:  # a unit's weight too: it stays whole
            for atoms in self.axes[key].values():
                self.atoms.pin(atoms)
            self.elements[key] = whole
        elif key not in self.elements:
            small = tensor.numel() <= LARGEST and not integer
            self.elements[key] = self.atoms.fresh(tuple(tensor.shape)) if small else whole
        return self.elements[key]

    def columns(self, n: fx.Node) -> Ints:
        """Atoms for the columns of a stored matrix whose rows are looked up."""
        tensor = tensor_attr(self.graph, str(n.target))
        key = same(tensor)
        if key not in self.axes and key not in self.elements:
            self.path[str(n.target)] = key
            self.elements[key] = self.atoms.fresh((1, tensor.shape[1]))
        found = self.stored(n)
        return np.broadcast_to(self.atoms.tied(found, 0)[0], tensor.shape[1:])

    def weight_axes(self, path: str, axes: Mapping[int, Ints]) -> None:
        """A unit's weight or bias has these atoms along its axes, which are those of other calls with it."""
        key = self.path[path] = same(tensor_attr(self.graph, path))
        known = self.axes.get(key, {})
        for axis, atoms in axes.items():
            if axis in known:
                self.atoms.union(known[axis], atoms)
        self.axes[key] = {**known, **axes}
        if key in self.elements:  # something else reads it too: it stays whole
            for atoms in (*self.axes[key].values(), self.elements[key]):
                self.atoms.pin(atoms)

    def operand(self, n: Any, rank: int) -> tuple[Label, tuple[int, ...]]:
        """(label, shape), both padded in front to a rank."""
        if not isinstance(n, fx.Node) or not isinstance(self.value.get(n), torch.Tensor):
            return None, (1,) * rank
        shape, label = self.shape(n), self.read(n)
        if label is not None:
            label = label.reshape((1,) * (rank - label.ndim) + label.shape)
        return label, (1,) * (rank - len(shape)) + shape

    def vector(self, n: fx.Node, axis: int) -> Ints:
        """The atoms along one axis of a node's tensor; those that differ along the others are tied."""
        size, label = self.shape(n)[axis], self.get(n)
        if label is None:
            return np.zeros(size, np.int64)
        return self.line(label, axis % label.ndim, size)

    def line(self, label: Ints, axis: int, size: int) -> Ints:
        """As `vector`, of a label. What varies along the other axes only stays whole."""
        if label.shape[axis] == 1:
            self.atoms.pin(label)
            return np.zeros(size, np.int64)
        for other in varied(label):
            if other != axis:
                label = self.atoms.tied(label, other)
        return self.atoms.find(label.ravel())

    def pin(self, label: Any) -> None:
        """Nothing of a label may go."""
        each(label, self.atoms.pin)

    def whole(self, n: fx.Node, label: Label, axes: Sequence[int], why: str = "") -> Label:
        """What is left of a label where all of some axes is needed at once: if it varies along others, only along those.

        Else it stays whole, which is reported as `why` unless that is empty.
        """
        along = [d for d in varied(label) if d in axes]
        if label is None or not along:
            return label
        if len(along) == len(varied(label)):
            self.stop(n, why, label)
            return None
        for axis in along:
            label = self.atoms.tied(label, axis)
        return self.atoms.squeezed(label)

    def stop(self, n: fx.Node, why: str, *labels: Any) -> None:
        """Labels stay whole at an operator, which is reported where channels of a unit are among them."""
        roots: set[int] = set()
        for label in labels:
            each(label, lambda x: roots.update(np.unique(self.atoms.find(x)).tolist()))
        if (
            why
            and roots - {ALWAYS}
            and any(
                not roots.isdisjoint(self.atoms.find(atoms).tolist())
                for own in self.axes.values()
                for atoms in own.values()
            )
        ):
            self.report(n, why)
        for label in labels:
            self.pin(label)

    def report(self, n: fx.Node, why: str) -> None:
        """Say where channels stay whole, and why."""
        self.stopped.setdefault(f"{module_path(n) or '(the model itself)'}: {why}")

    def joined(self, operands: Sequence[tuple[Label, tuple[int, ...]]]) -> Label:
        """Tensors combined element by element: what is not broadcast is tied.

        What is broadcast along an axis that varies stays whole, and so do the others along the axes that it spans.
        """
        labels = [x for x, _ in operands if x is not None]
        if not labels:
            return None
        rank = labels[0].ndim
        vary = [d for d in range(rank) if any(x.shape[d] > 1 for x in labels)]
        size = [max(shape[d] for _, shape in operands) for d in range(rank)]
        tied: list[Ints] = []
        spanned: set[int] = set()
        for x, shape in operands:
            broadcast = [d for d in vary if shape[d] == 1 < size[d]]
            if broadcast:
                self.pin(x)
                spanned.update(d for d in vary if shape[d] > 1)
            elif x is not None:
                tied.append(x)
            elif vary:
                tied.append(np.zeros((1,) * rank, np.int64))
        if not tied:
            return None
        self.atoms.union(*tied)
        for x in tied:
            for axis in spanned:
                self.atoms.union(x, x.take([0], axis))
        shape = np.broadcast_shapes(*(x.shape for x in tied))
        found: Ints = self.atoms.find(np.broadcast_to(max(tied, key=np.size), shape))
        return found


def arguments(n: fx.Node) -> Any:
    """A call's arguments by position: nodes, numbers, lists of them."""
    return n.args

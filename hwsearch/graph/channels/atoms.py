"""Union-find over the indices that may be removed, on arrays of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints: TypeAlias = NDArray[np.int64]

Label: TypeAlias = Ints | None
"""Atoms of a tensor: an array of its rank with size 1 along axes on which they do not vary; None where it has none."""

ALWAYS = 0
"""The atom, and the slot, of what can never be removed."""


class Atoms:
    """Sets of atoms that stay or go together."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._count = 1

    def fresh(self, shape: tuple[int, ...]) -> Ints:
        """New atoms, each a set of its own."""
        start, self._count = self._count, self._count + math.prod(shape)
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros(self._count, np.int64)])
        self._parent[start : self._count] = np.arange(start, self._count)
        return np.arange(start, self._count).reshape(shape)

    def find(self, atoms: Ints) -> Ints:
        """The least atom of each one's set."""
        found: Ints = self._parent[atoms]
        while True:
            further: Ints = self._parent[found]
            if np.array_equal(further, found):
                break
            found = further
        self._parent[atoms] = found
        return found

    def union(self, *arrays: Ints) -> None:
        """Make atoms at equal positions of broadcast arrays the same."""
        if len(arrays) < 2:
            return
        first, *others = (np.ravel(a) for a in np.broadcast_arrays(*arrays))
        a, b = self.find(np.tile(first, len(others))), self.find(np.concatenate(others))
        differ = a != b
        if not differ.any():
            return
        roots, ends = np.unique(np.stack([a[differ], b[differ]]), return_inverse=True)
        ends = ends.reshape(2, -1)
        graph = coo_array((np.ones(ends.shape[1], np.int8), (ends[0], ends[1])), shape=(len(roots),) * 2)
        count, component = connected_components(graph, directed=False)
        least = np.full(count, self._count)
        np.minimum.at(least, component, roots)
        self._parent[roots] = least[component]

    def pin(self, atoms: Ints) -> None:
        """They can never be removed."""
        self.union(np.unique(self.find(atoms)), np.zeros(1, np.int64))

    def squeezed(self, label: Ints) -> Label:
        """A label without the axes on which it does not vary; None where nothing of it can go."""
        label = self.find(label)
        for axis in range(label.ndim):
            if label.shape[axis] > 1:
                first = label.take([0], axis)
                if (label == first).all():
                    label = first
        return None if label.size == 1 and label.flat[0] == ALWAYS else label

    def tied(self, label: Ints, axis: int) -> Ints:
        """A label whose atoms along an axis are made the same."""
        first = label.take([0], axis)
        self.union(label, first)
        return self.find(first)


def each(label: Any, function: Callable[[Ints], Any]) -> Any:
    """Apply to a label, or to those of an operator with several results."""
    if label is None:
        return None
    if isinstance(label, list):
        return [None if x is None else function(x) for x in label]
    return function(label)


def along(atoms: Ints, axis: int, rank: int) -> Ints:
    """The label of a tensor that varies along one axis."""
    return atoms.reshape([-1 if d == axis % rank else 1 for d in range(rank)])


def varied(label: Label) -> list[int]:
    """Axes along which a label varies."""
    return [] if label is None else [d for d in range(label.ndim) if label.shape[d] > 1]


def same(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Equal for tensors that are one parameter."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())

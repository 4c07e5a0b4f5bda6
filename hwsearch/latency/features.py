"""The terms of the latency model that an allocation holds, as numbers and values: what equations and predictions are made of.

    T(a) = b0 + sum over units t[u, a_u] + sum over edges r[e, class(a_src), class(a_dst)]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.latency.pooling import Cell
from hwsearch.network.choices import Grid, Offered
from hwsearch.network.network import Edge, Network
from hwsearch.network.variants import Variant, legal

Floats = NDArray[np.float64]
Numbers = NDArray[np.intp]
Feature = tuple[Any, ...]

PAIRS = ((False, True), (True, False), (True, True))
"""Classes (quantized or not) of producer and consumer that add a term; float to float is the baseline."""
SIDES = ("src", "dst")
BYTES = 1e5
"""Bytes of a boundary that count as one, in the term that grows with them."""


def edge_features(
    edge: Edge, pair: tuple[bool, bool], side: str, share: float
) -> list[tuple[Feature, float]]:
    """Terms of a boundary in the time of the unit at its `src` or `dst` side: pooled over edges, and its own.

    share: of the whole tensor's bytes that the edge has; what is its own shrinks with it.
    """
    if pair == (False, False):
        return []
    kind = (side, edge.fused, pair)
    return [
        (("pool", *kind), 1.0),
        (("pool bytes", *kind), edge.tensor_bytes / BYTES),
        (("edge", edge.name, *kind), share),
    ]


@dataclass(frozen=True)
class Terms:
    """unit: which unit each term is of, from 1 on in network order, 0 for the rest; number: of its feature; value."""

    unit: Numbers
    number: Numbers
    value: Floats


class Features:
    """Numbers the features of a network's allocations, the same ones always: the rest is 0, cells come as they are met."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.names: list[Feature] = []
        self.index: dict[Feature, int] = {}
        self.cells: dict[int, Cell] = {}
        """For each number of a unit's time, which stairs it is on."""
        self.position = {u.name: i + 1 for i, u in enumerate(network.units)}
        self.number(("rest",))
        groups = {g: i for i, g in enumerate(network.channels)}
        self._groups = [tuple(groups[g] for g in u.groups) for u in network.units]
        self._own: list[Callable[[Sequence[int]], Any]] = [itemgetter(*own) if own else len for own in self._groups]
        """Of each unit what takes the widths of its groups."""
        self._met: list[dict[tuple[Any, ...], tuple[int, float]]] = [{} for _ in network.units]
        """Of each unit (variant, widths of its groups) -> (number, share of its output that is left)."""
        self._narrow: list[dict[Any, tuple[str, tuple[float, ...], float]]] = [{} for _ in network.units]
        self._quantized: dict[str, bool] = {}
        edges = network.edges
        self._ends = np.array([(self.position[e.src], self.position[e.dst]) for e in edges], np.intp).reshape(-1, 2)
        self._bytes = np.array([e.tensor_bytes for e in edges], np.float64)
        self._edges = np.array(
            [[[self.number(f) for f, _ in edge_features(e, p, s, 1.0)] for s in SIDES] for e in edges for p in PAIRS],
            np.intp,
        ).reshape(len(edges), len(PAIRS), len(SIDES), 3)  # fmt: skip

    def number(self, feature: Feature) -> int:
        """That of a feature, a new one where it has none."""
        found = self.index.setdefault(feature, len(self.names))
        if found == len(self.names):
            self.names.append(feature)
        return found

    def of(self, variants: Sequence[str], widths: Sequence[int], *, boundaries: bool = True) -> Terms:
        """Every term of an allocation. variants: of the units, widths: of the groups, in network order."""
        cells = []
        for place, (met, variant, at) in enumerate(zip(self._met, variants, self._own, strict=True)):
            cells.append(met.get((variant, at(widths))) or self._cell(place, variant, widths))
        numbers, shares = [0, *(n for n, _ in cells)], [1.0, *(s for _, s in cells)]
        unit, number = np.arange(len(numbers)), np.array(numbers, np.intp)
        value = np.ones(len(numbers))
        if not boundaries or not len(self._ends):
            return Terms(unit, number, value)
        known = self._quantized
        quantized = np.array([False, *(known[v] for v in variants)])
        src, dst = quantized[self._ends[:, 0]], quantized[self._ends[:, 1]]
        own = np.flatnonzero(src | dst)
        pair = np.where(src[own], np.where(dst[own], 2, 1), 0)
        bytes_ = np.rint(self._bytes[own] * np.array(shares)[self._ends[own, 0]])
        share = bytes_ / np.where(self._bytes[own] == 0, 1.0, self._bytes[own])
        each = np.stack([np.ones(len(own)), bytes_ / BYTES, share], axis=1)[:, None]
        shape = (len(own), len(SIDES), 3)
        return Terms(
            np.concatenate([unit, np.broadcast_to(self._ends[own][:, :, None], shape).ravel()]),
            np.concatenate([number, self._edges[own, pair].ravel()]),
            np.concatenate([value, np.broadcast_to(each, shape).ravel()]),
        )

    def of_candidate(self, variants: Mapping[str, Variant], widths: Mapping[str, int]) -> Terms:
        """Those of an allocation by name; groups that are not named are whole."""
        network = self.network
        return self.of([str(variants[u.name]) for u in network.units], [widths.get(g, n) for g, n in network.channels.items()])

    def grid(self, offered: Offered, grid: Grid, *, stairs: bool = False) -> list[Numbers]:
        """Of each unit [widths of each of its groups ..., variants]: the number of its time; -1 where that is not legal.

        stairs: only where one of its groups at most is narrower; -1 elsewhere.
        """
        network, widths = self.network, list(self.network.channels.values())
        found = []
        for place, (unit, groups) in enumerate(zip(network.units, self._groups, strict=True)):
            steps, own = [grid[g] for g in unit.groups], offered[unit.name]
            numbers = np.full((*map(len, steps), len(own)), -1)
            for at in np.ndindex(*map(len, steps)):
                if stairs and np.count_nonzero(at) > 1:
                    continue
                chosen = {g: s[j] for g, s, j in zip(unit.groups, steps, at, strict=True)}
                for group, width in zip(groups, chosen.values(), strict=True):
                    widths[group] = width
                can = legal(network.unit_at(unit.name, chosen), own)
                numbers[at] = [self._cell(place, str(v), widths)[0] if v in can else -1 for v in own]
            found.append(numbers)
        return found

    def _cell(self, place: int, variant: str, widths: Sequence[int]) -> tuple[int, float]:
        """(number, share of the unit's output that is left)."""
        met, at = self._met[place], self._own[place](widths)
        found = met.get((variant, at))
        if found is None:
            if at not in self._narrow[place]:
                self._narrow[place][at] = self._narrowed(place, widths)
            signature, shares_left, share = self._narrow[place][at]
            number = self.number(("unit", signature, variant))
            if number not in self.cells:
                unit = self.network.units[place]
                whole = tuple([self.network.channels[g] for g in unit.groups])
                self.cells[number] = Cell((unit.signature, whole), variant, shares_left)
            if variant not in self._quantized:
                self._quantized[variant] = Variant.parse(variant).quantized
            found = met[variant, at] = number, share
        return found

    def _narrowed(self, place: int, widths: Sequence[int]) -> tuple[str, tuple[float, ...], float]:
        """(signature, shares of its groups' channels that are left, share of its output that is left) of a unit."""
        network, unit = self.network, self.network.units[place]
        own = {g: widths[i] for g, i in zip(unit.groups, self._groups[place], strict=True)}
        narrow = network.unit_at(unit.name, own)
        shares = tuple([w / network.channels[g] for g, w in own.items()])
        return narrow.signature, shares, math.prod(narrow.output_shape) / (math.prod(unit.output_shape) or 1)

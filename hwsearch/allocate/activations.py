"""The peak of the activations as costs of a problem: one linear cost for each step that may be the largest.

A tensor's bytes depend on the width that one unit makes or reads it at, and on whether *all* units that make or read it are
quantized. With two units that is a cost of a pair. With more, variables of two choices say whether each is quantized, and
others of four choices put two together at a time; ties from the units decide them all, so that the peak is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hwsearch.allocate.problem import Cost, Problem, Tie
from hwsearch.network.memory import Tensor, element_bytes, steps, tensors
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant

_EXTERNAL_BYTES = 4

Cells = Sequence[Sequence[tuple[Variant, Mapping[str, int]]]]
"""For each unit what its choices stand for: a variant, and the widths of the unit's groups."""


@dataclass
class _Factors:
    """Variables added to those of units and groups, and the parts of each tensor's bytes."""

    cells: Cells
    position: Mapping[str, int]
    sizes: list[int]
    names: list[str] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    known: dict[Any, int] = field(default_factory=dict)

    def quantized(self, unit: str) -> Any:
        """For each choice of a unit whether it is quantized."""
        return np.array([v.quantized for v, _ in self.cells[self.position[unit]]])

    def add(self, key: Any, name: str, size: int) -> int:
        self.known[key] = number = len(self.sizes)
        self.sizes.append(size)
        self.names.append(name)
        return number

    def flag(self, unit: str) -> int:
        """The variable that says whether a unit is quantized."""
        if unit not in self.known:
            of = self.quantized(unit).astype(np.int64)
            self.ties.append(Tie(self.position[unit], self.add(unit, f"int8|{unit}", 2), of))
        return self.known[unit]

    def both(self, units: tuple[str, ...]) -> int:
        """The variable of four choices, the last of which says that all of two or more units are quantized."""
        key = ("both", units)
        if key not in self.known:
            left = self.flag(units[0]) if len(units) == 2 else self.every(units[:-1])
            right = self.flag(units[-1])
            number = self.add(key, f"both|{'|'.join(units)}", 4)
            self.ties += [
                Tie(number, left, np.array([0, 0, 1, 1])),
                Tie(number, right, np.array([0, 1, 0, 1])),
            ]
        return self.known[key]

    def every(self, units: tuple[str, ...]) -> int:
        """The variable that says whether all of two or more units are quantized."""
        key = ("every", units)
        if key not in self.known:
            both = self.both(units)
            number = self.add(key, f"every|{'|'.join(units)}", 2)
            self.ties.append(Tie(both, number, np.array([0, 0, 0, 1])))
        return self.known[key]


@dataclass(frozen=True)
class Activations:
    """What the peak adds to a problem whose first variables are the units.

    variables: names of further variables, with `choices`; ties decide each of them. parts: a cost for each step, over all
    variables.
    """

    variables: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    ties: tuple[Tie, ...]
    parts: tuple[Cost, ...]


def activations(
    network: Network, cells: Cells, groups: Sequence[int], base: str, *, quantize_outputs: bool = False
) -> Activations:
    """The peak of the activations over a problem of units and groups, in bytes, exactly as `memory.peak_bytes` counts it.

    cells: what the choices of each unit stand for. groups: how many choices each of the variables after the units has.
    base, quantize_outputs: as for `peak_bytes`.
    """
    found = tensors(network, quantize_outputs=quantize_outputs)
    position = {u.name: i for i, u in enumerate(network.units)}
    factors = _Factors(cells, position, [*map(len, cells), *groups])
    parts = [_part(t, network, factors, element_bytes(base)) for t in found]
    costs = []
    for alive in steps(found, len(network.units)):
        unary = [np.zeros(n, np.int64) for n in factors.sizes]
        pairwise: dict[tuple[int, int], Any] = {}
        for part in (parts[n] for n in alive):
            for i, values in part.unary.items():
                unary[i] += values
            for pair, matrix in part.pairwise.items():
                pairwise[pair] = pairwise.get(pair, 0) + matrix
        costs.append(Cost(sum(parts[n].fixed for n in alive), tuple(unary), pairwise))
    added = factors.sizes[len(cells) + len(groups) :]
    choices = tuple(tuple(map(str, range(n))) for n in added)
    return Activations(tuple(factors.names), choices, tuple(factors.ties), tuple(costs))


def with_memory(
    problem: Problem, network: Network, cells: Cells, base: str, *, quantize_outputs: bool = False
) -> Problem:
    """A problem of units and groups with the peak of the activations as the column `memory`; see `activations`."""
    old = problem.sizes
    found = activations(network, cells, old[len(cells) :], base, quantize_outputs=quantize_outputs)
    sizes = [len(c) for c in found.choices]
    none = tuple(np.zeros(n, np.int64) for n in sizes)
    return replace(
        problem,
        variables=(*problem.variables, *found.variables),
        choices=(*problem.choices, *found.choices),
        loss=(*problem.loss, *(np.zeros(n) for n in sizes)),
        costs={column: replace(cost, unary=(*cost.unary, *none)) for column, cost in problem.costs.items()},
        ties=(*problem.ties, *found.ties),
        peaks={**problem.peaks, "memory": found.parts},
        implied=problem.implied | frozenset(range(len(old), len(old) + len(sizes))),
    )


@dataclass(frozen=True)
class _Part:
    """Bytes of one tensor: a cost on a few variables."""

    fixed: int = 0
    unary: Mapping[int, Any] = field(default_factory=dict)
    pairwise: Mapping[tuple[int, int], Any] = field(default_factory=dict)


def _part(tensor: Tensor, network: Network, factors: _Factors, floating: int) -> _Part:
    if not tensor.sized:
        return _Part(tensor.elements(network, {}) * (_EXTERNAL_BYTES if tensor.external else floating))
    place = factors.position[tensor.sized]
    count = np.array([tensor.elements(network, w) for _, w in factors.cells[place]], np.int64)
    if tensor.external:
        return _Part(unary={place: count * _EXTERNAL_BYTES})
    own = factors.quantized(tensor.sized)
    others = [m for m in tensor.members if m != tensor.sized]
    if tensor.floating or not own.any() or not all(factors.quantized(m).any() for m in others):
        return _Part(unary={place: count * floating})
    others = sorted((m for m in others if not factors.quantized(m).all()), key=factors.position.__getitem__)
    saved = np.where(own, count * (floating - 1), 0)
    if not others:
        return _Part(unary={place: count * floating - saved})
    if len(others) == 1:
        number, flags = factors.position[others[0]], factors.quantized(others[0])
    else:
        number, flags = factors.both(tuple(others)), np.array([False, False, False, True])
    matrix = -np.outer(saved, flags)
    pair = (place, number) if place < number else (number, place)
    return _Part(unary={place: count * floating}, pairwise={pair: matrix if place < number else matrix.T})

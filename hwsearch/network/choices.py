"""Which whole networks to build: allocations that cover what a table should know, and widths worth knowing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from hwsearch.errors import InvalidInput
from hwsearch.network.network import Network, Unit
from hwsearch.network.variants import Variant, legal

Offered = Mapping[str, Sequence[Variant]]
Grid = Mapping[str, Sequence[int]]
"""For each channel group the widths (slots kept) to choose from, its whole width first."""

AXES = ("width", "precision")
"""What allocations may differ in."""
RESIDUAL = "residual"
"""A further axis on request: the residual width of transformers, which changes what LayerNorm normalises over."""
STORAGE = "storage"
"""A further axis: weights may be stored in int8 and computed with in the base precision. `run` adds it to a budget on size."""

MOST_CANDIDATES = 8
MOST_STEPS = 6
FASTER = 0.01
"""A narrower width is worth a step where it is at least this much faster than every wider one that is."""


def check_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidInput on anything but `width`, `precision`, beside `width` `residual`, and beside `precision` `storage`."""
    unknown = [a for a in axes if a not in (*AXES, RESIDUAL, STORAGE)]
    if unknown or not axes:
        raise InvalidInput(
            f"unknown axes {', '.join(unknown) or '(none)'}; expected {' and '.join(AXES)}, or one of them; "
            f"with width also {RESIDUAL}, with precision also {STORAGE}"
        )
    if RESIDUAL in axes and "width" not in axes:
        raise InvalidInput(f"{RESIDUAL} is a width: ask for width,{RESIDUAL}")
    if STORAGE in axes and "precision" not in axes:
        raise InvalidInput(f"{STORAGE} is a precision: ask for precision,{STORAGE}")
    return tuple(axes)


@dataclass(frozen=True)
class Candidate:
    """One allocation to build: a variant for each unit, a width for each channel group."""

    variants: dict[str, Variant]
    widths: dict[str, int]

    def cells(self, network: Network) -> list[tuple[str, str]]:
        """(signature at these widths, variant) of each unit: what a time belongs to."""
        return [(network.unit_at(u, self.widths).signature, str(v)) for u, v in self.variants.items()]


def whole(network: Network) -> dict[str, list[int]]:
    """The grid on which every group keeps its width."""
    return {g: [n] for g, n in network.channels.items()}


def all_cells(network: Network, offered: Offered, grid: Grid) -> set[tuple[str, str]]:
    """Every (signature, variant) that an allocation may hold."""
    found: set[tuple[str, str]] = set()
    for unit in network.units:
        for widths in product(*(grid[g] for g in unit.groups)):
            narrow = network.unit_at(unit.name, dict(zip(unit.groups, widths, strict=True)))
            signature = narrow.signature
            found.update((signature, str(v)) for v in legal(narrow, offered[unit.name]))
    return found


def offered_at(network: Network, offered: Offered, widths: Mapping[str, int]) -> Offered:
    """What units can become at some widths."""
    return {u: legal(network.unit_at(u, widths), own) for u, own in offered.items()}


def random_allocation(network: Network, offered: Offered, rng: np.random.Generator) -> dict[str, Variant]:
    """A Markov run over the units: neighbours keep a variant with a random stickiness, under a random mix."""
    stickiness = rng.uniform(0.0, 0.9)
    weights: dict[Variant, float] = {}
    allocation: dict[str, Variant] = {}
    previous: Variant | None = None
    for unit in network.units:
        choices = list(offered[unit.name])
        for variant in choices:
            weights.setdefault(variant, float(rng.exponential()))
        if previous in choices and rng.random() < stickiness:
            allocation[unit.name] = previous
        else:
            p = np.array([weights[v] for v in choices]) + 1e-9
            allocation[unit.name] = choices[int(rng.choice(len(choices), p=p / p.sum()))]
        previous = allocation[unit.name]
    return allocation


def random_candidate(network: Network, offered: Offered, grid: Grid, rng: np.random.Generator) -> Candidate:
    """Random variants at widths around a random share of the whole."""
    lean = rng.uniform(0.0, 1.0)
    widths = {}
    for group, steps in grid.items():
        near = np.exp(-3.0 * np.abs(np.linspace(0.0, 1.0, len(steps)) - lean))
        widths[group] = int(rng.choice(list(steps), p=near / near.sum()))
    return Candidate(random_allocation(network, offered_at(network, offered, widths), rng), widths)


def cover(
    network: Network,
    offered: Offered,
    grid: Grid,
    done: Sequence[Candidate],
    rng: np.random.Generator,
    pool: int = 48,
    known: Iterable[tuple[str, str]] = (),
) -> Candidate:
    """The candidate, of a random pool, that most covers what was seldom built: cells and (edge, pair of classes).

    known: cells that other tables tell; they count as if built twice.
    """
    return Coverage(network, offered, grid, done, known).seldom(rng, pool)


class Coverage:
    """How often each (unit at its widths, variant) and (edge, pair of classes) was built.

    known: cells that other tables tell; they count as if built twice.
    """

    def __init__(
        self, network: Network, offered: Offered, grid: Grid, done: Sequence[Candidate], known: Iterable[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        self.network, self.offered, self.grid = network, offered, grid
        self._done = list(done)
        self._cell: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._counts: Counter[tuple[Any, ...]] = Counter()
        for candidate in done:
            self._counts.update(self._facts(candidate))
        self._counts.update(dict.fromkeys(known, 2))

    def count(self, candidate: Candidate, times: int = 1) -> None:
        """Take one more as built, or (-1) no longer."""
        for fact in self._facts(candidate):
            self._counts[fact] += times
        if times > 0:
            self._done.append(candidate)
        else:
            self._done.remove(candidate)

    def seldom(self, rng: np.random.Generator, pool: int) -> Candidate:
        """The candidate, of a random pool, that most covers what was seldom built."""
        network, offered, grid = self.network, self.offered, self.grid
        if any(len(steps) > 1 for steps in grid.values()):
            candidates = [self._drawn(rng) for _ in range(max(pool // 8, 1))]
        else:
            candidates = [random_candidate(network, offered, grid, rng) for _ in range(pool)]
        candidates = [c for c in candidates if c not in self._done] or candidates
        return max(candidates, key=lambda c: sum(1.0 / (1 + self._counts[f]) ** 2 for f in self._facts(c)))

    def _at(self, unit: Unit, variant: Variant, widths: Mapping[str, int]) -> tuple[Any, ...]:
        """The cell that a unit is in."""
        key = (unit.name, variant, *[widths[g] for g in unit.groups])
        found = self._cell.get(key)
        if found is None:
            found = self._cell[key] = self.network.unit_at(unit.name, widths).signature, str(variant)
        return found

    def _facts(self, candidate: Candidate) -> list[tuple[Any, ...]]:
        variants = candidate.variants
        quantized = {u: v.quantized for u, v in variants.items()}
        cells = [self._at(unit, variants[unit.name], candidate.widths) for unit in self.network.units]
        return cells + [(i, quantized[e.src], quantized[e.dst]) for i, e in enumerate(self.network.edges)]

    def _drawn(self, rng: np.random.Generator) -> Candidate:
        """Widths group by group, each the one whose cells were built least; then variants, by the same rule or at random."""
        network, offered, counts = self.network, self.offered, self._counts
        widths: dict[str, int] = {}
        drawn = random_allocation(network, offered, rng) if rng.random() < 0.5 else None
        touched: dict[str, list[Unit]] = {g: [] for g in self.grid}
        for unit in network.units:
            for group in unit.groups:
                touched[group].append(unit)

        def seen(unit: Unit, variant: Variant) -> int:
            return counts.get(self._at(unit, variant, widths), 0)

        def gain(unit: Unit) -> float:
            tried = offered[unit.name] if drawn is None else [drawn[unit.name]]
            return max(1.0 / (1 + seen(unit, v)) ** 2 for v in tried)

        for group, steps in self.grid.items():
            ready = [u for u in touched[group] if all(g in widths or g == group for g in u.groups)]
            best = (-1.0, 0.0, steps[0])
            for width in steps:
                widths[group] = width
                best = max(best, (sum(gain(u) for u in ready), float(rng.random()), width))
            widths[group] = best[2]
        left = offered_at(network, offered, widths)
        if drawn is not None:
            drawn = {u: v if v in left[u] else left[u][0] for u, v in drawn.items()}
        else:
            drawn = {}
            previous: Variant | None = None
            for unit in network.units:
                own = [(-seen(unit, v), v == previous, float(rng.random()), v) for v in left[unit.name]]
                previous = drawn[unit.name] = max(own)[3]
        return Candidate(drawn, widths)


# ---------------------------------------------------------------- widths


def candidate_widths(channels: int) -> list[int]:
    """Widths to try, from all slots down to a quarter: in steps of 16, 8 or 4 where there are many."""
    least = max(channels // 4, 1)
    step = next((s for s, many in ((16, 128), (8, 32), (4, 16)) if channels >= many), 1)
    while (channels - least) // step >= MOST_CANDIDATES:
        step += 16 if step >= 16 else step
    widths = range(channels // step * step, least - 1, -step)
    return list(dict.fromkeys([channels, *widths]))


def worth(times: Mapping[int, Iterable[float]], faster: float = FASTER) -> list[int]:
    """Of the widths tried those that are faster than every wider one kept, at most six, the whole width first.

    times: width -> its time under each precision, the same ones for every width; faster, by this share, under one of them is
    enough.
    """
    kept: list[int] = []
    best: list[float] = []
    for width in sorted(times, reverse=True):
        own = list(times[width])
        if not kept or any(t < b * (1 - faster) for t, b in zip(own, best, strict=True)):
            kept.append(width)
            best = [min(t, b) for t, b in zip(own, best, strict=True)] if best else own
    if len(kept) <= MOST_STEPS:
        return kept
    speed = {w: float(np.mean([t / f for t, f in zip(times[w], times[kept[0]], strict=True)])) for w in kept}
    ends = [kept[0], min(kept[1:], key=lambda w: speed[w])]
    while len(ends) < MOST_STEPS:  # the one furthest in time from those chosen
        rest = [w for w in kept if w not in ends]
        ends.append(max(rest, key=lambda w: min(abs(speed[w] - speed[e]) for e in ends)))
    return sorted(ends, reverse=True)

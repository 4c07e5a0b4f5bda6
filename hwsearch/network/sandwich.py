"""Sandwiches: which units to compile together so that each is measured between its neighbours, and no boundary enters.

A unit compiled alone pays for changing layouts at both ends. Between its neighbours, all of one precision, it does not:
the neighbours (the bread) pay instead, and their times are thrown away.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hwsearch.network.network import Network

RUN = 4
"""Units in a row, at most, that one sandwich is built around."""
MOST = 9
"""Units of a sandwich around more than one unit, at most: it is for networks too large to build whole."""

Context = tuple[str, tuple[tuple[str, ...], ...]]
"""A unit's signature and what stands between it and its consumers: units of one context take the same time."""


@dataclass(frozen=True)
class Sandwich:
    """units: everything in it, in network order. filling: those of them whose neighbours are all in it."""

    units: tuple[str, ...]
    filling: tuple[str, ...]


def neighbours(network: Network) -> dict[str, frozenset[str]]:
    """Of each unit its direct producers and consumers."""
    found: dict[str, set[str]] = {u.name: set() for u in network.units}
    for edge in network.edges:
        found[edge.src].add(edge.dst)
        found[edge.dst].add(edge.src)
    return {name: frozenset(own - {name}) for name, own in found.items()}


def filling(network: Network, units: Collection[str]) -> tuple[str, ...]:
    """Of a part of a network the units that all neighbours stand beside."""
    inside, beside = set(units), neighbours(network)
    return tuple(
        u.name for u in network.units if u.name in inside and not u.stored and beside[u.name] <= inside
    )


def contexts(network: Network) -> dict[str, Context]:
    """Of each layer its context."""
    passed: dict[str, set[tuple[str, ...]]] = {u.name: set() for u in network.units}
    for edge in network.edges:
        passed[edge.src].add(edge.via)
    return {u.name: (u.signature, tuple(sorted(passed[u.name]))) for u in network.units if not u.stored}


def plan(network: Network) -> tuple[Sandwich, ...]:
    """A small set of sandwiches whose fillings hold every context; greedy, the same each time.

    Candidates are built around each run of one to four units. None is the whole network where a unit has not all others for
    neighbours.
    """
    beside, context = neighbours(network), contexts(network)
    names = [u.name for u in network.units if not u.stored]
    candidates: dict[tuple[str, ...], Sandwich] = {}
    for start in range(len(names)):
        for end in range(start + 1, min(start + RUN, len(names)) + 1):
            inside = set(names[start:end]).union(*(beside[n] for n in names[start:end]))
            if end > start + 1 and (len(inside) > MOST or len(inside) == len(names)):
                break
            units = tuple(n for n in names if n in inside)
            held = tuple(n for n in units if beside[n] <= inside)
            candidates.setdefault(units, Sandwich(units, held))
    missing = set(context.values())
    chosen: list[Sandwich] = []
    while missing:
        gain = {u: len(missing & {context[n] for n in s.filling}) for u, s in candidates.items()}
        best = max(candidates, key=lambda u: (gain[u], -len(u)))
        chosen.append(candidates.pop(best))
        missing -= {context[n] for n in chosen[-1].filling}
    return tuple(chosen)


def largest(network: Network, sandwiches: Collection[Sandwich]) -> Sandwich:
    """The one with the most multiply-accumulates: the reference that the others are timed against."""
    return max(sandwiches, key=lambda s: sum(network[u].macs for u in s.units))

"""Channel groups as plain data, and how they run through units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hwsearch.graph.channels.atoms import ALWAYS, Ints
from hwsearch.network.network import ChannelGroup, Network, Way


@dataclass(frozen=True)
class Axis:
    """The slot of each index along one axis of a tensor; `ALWAYS` where the index stays."""

    axis: int
    slots: Ints

    def kept(self, mask: NDArray[np.bool_]) -> Ints:
        """Indices that stay, where `mask` says which slots do."""
        return np.flatnonzero(mask[self.slots])


@dataclass
class Channels:
    """Channel groups of a traced graph, and how they run through its tensors.

    groups: by name; each with its slots' numbers, which are unique over all groups (slot 0 always stays).
    nodes: for each node of the graph the axes of its tensor that groups run along (a list for several tensors).
    tensors: for each stored tensor, by its path, the same.
    shapes: of the tensors of each node that a group runs along. producers, consumers: units, by group.
    blocked: `module: why`, for channels that are not in any group although they are no output.
    rescaled: groups whose number of channels an operator divides by (LayerNorm), so that what the narrow network
        computes is not what the masked one would.
    summed: nodes that sum over channels (a mean, a norm): those removed count as zero, and a mean still divides by all.
    numbers: stored tensors that hold numbers of channels, by path, and the node whose channels these are.
    """

    groups: dict[str, Ints] = field(default_factory=dict)
    nodes: dict[str, list[list[Axis]]] = field(default_factory=dict)
    tensors: dict[str, list[Axis]] = field(default_factory=dict)
    producers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    consumers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()
    rescaled: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()
    numbers: dict[str, str] = field(default_factory=dict)

    def mask(self, kept: Mapping[str, Iterable[int]]) -> NDArray[np.bool_]:
        """For each slot number whether it stays; kept: positions (0 .. channels - 1) that stay, by group."""
        mask = np.ones(1 + sum(len(s) for s in self.groups.values()), bool)
        for name, positions in kept.items():
            slots = self.groups[name]
            mask[slots] = False
            mask[slots[np.asarray(list(positions), np.int64)]] = True
        return mask

    def without(self, names: Iterable[str], why: Iterable[str]) -> Channels:
        """The channels where some groups stay whole after all."""
        names = set(names)
        left = {g: s for g, s in self.groups.items() if g not in names}
        number = np.zeros(1 + sum(map(len, self.groups.values())), np.int64)
        stays = np.concatenate([np.zeros(0, np.int64), *left.values()])
        number[stays] = np.arange(1, len(stays) + 1)

        def axes(axes_of: Sequence[Axis]) -> list[Axis]:
            return [a for a in (Axis(a.axis, number[a.slots]) for a in axes_of) if a.slots.any()]

        nodes = {n: [axes(a) for a in several] for n, several in self.nodes.items()}
        return replace(
            self,
            groups={g: number[s] for g, s in left.items()},
            nodes={n: several for n, several in nodes.items() if any(several)},
            tensors={p: own for p, own in ((p, axes(a)) for p, a in self.tensors.items()) if own},
            producers={g: p for g, p in self.producers.items() if g in left},
            consumers={g: p for g, p in self.consumers.items() if g in left},
            blocked=(*self.blocked, *why),
            rescaled=self.rescaled - names,
        )


def describe(
    channels: Channels,
    network: Network,
    sites: Mapping[str, tuple[str, Sequence[str]]],
    weights: Mapping[str, str],
    stored_bytes: Mapping[str, int],
) -> Network:
    """The network with its groups, and each unit with the ways that they run through it.

    sites: unit -> (node, nodes of its activations) of its first call. weights: unit -> path of its weight. stored_bytes: of
    each stored tensor that belongs to no unit.
    """
    of_slot = {int(s): name for name, slots in channels.groups.items() for s in slots}

    def indices(axis: Axis) -> list[tuple[str, int]]:
        """(group, how many indices belong to each of its slots)"""
        counts = Counter(of_slot[s] for s in axis.slots.tolist() if s != ALWAYS)
        return [(group, count // len(channels.groups[group])) for group, count in counts.items()]

    def ways(tensor: str, axes: Sequence[Axis]) -> list[Way]:
        return [Way(group, tensor, axis.axis, count) for axis in axes for group, count in indices(axis)]

    units = []
    for unit in network.units:
        node, inputs = sites[unit.name]
        own = [] if unit.stored else ways("output", channels.nodes.get(node, [[]])[0])
        for port, source in enumerate(inputs):
            own += ways(f"input{port}", channels.nodes.get(source, [[]])[0])
        if unit.name in weights:
            own += ways("weight", channels.tensors.get(weights[unit.name], []))
        units.append(replace(unit, ways=tuple(own)))
    fixed: Counter[str] = Counter()
    for path, size in stored_bytes.items():
        for axis in channels.tensors.get(path, []):
            for group, count in indices(axis):
                fixed[group] += size // len(axis.slots) * count
    groups = tuple(
        ChannelGroup(name, len(slots), channels.producers[name], channels.consumers[name], fixed[name])
        for name, slots in channels.groups.items()
    )
    return replace(network, units=tuple(units), groups=groups, blocked=channels.blocked)

"""Whole filters and neurons, by channel groups: what residual adds, concatenations and attention tie goes together.

A filter that goes takes along what reads it, so that the network really is narrower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.compress.patterns import largest
from hwsearch.compress.widths import in_slots, out_slots
from hwsearch.errors import InvalidInput
from hwsearch.schemes.patterns import share_of
from hwsearch.schemes.scheme import DENSITY, Number, Step, within
from hwsearch.schemes.subject import Subject


@dataclass(frozen=True)
class StructurePrune(Step):
    """Keep the filters, neurons and attention heads of the largest l2 norm: one threshold over all channel groups.

    The norm of a slot is that of the weights of all layers that produce it. Every group keeps at least its largest.

    Args:
        density: the share of slots that is kept, over all groups together, but at least one of each. Of equal ones the first stay.
        align: every group keeps a multiple of so many, rounded down, and at least so many.
        normalise: the root mean square of a slot's weights decides; else its norm, which favours slots of many weights, so that
            small layers lose first.
        skip: patterns of names of groups, and of layers that produce them, that stay as they are.

    Source:
        Joseph et al., A Programmable Approach to Neural Network Compression, IEEE Micro 2020; there filters go without their
        residual partners.
    """

    narrows: ClassVar[bool] = True
    density: Number = DENSITY
    align: int = 1
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        within("density", self.density, 0.0, 1.0)
        if isinstance(self.align, bool) or not isinstance(self.align, int) or self.align < 1:
            raise InvalidInput(f"align is {self.align!r}; expected a whole number of at least 1")

    def _apply(self, subject: Subject) -> Subject:
        slots = subject.traced.channels.groups
        left = {g: own[subject.mask[own]] for g in subject.groups(self.skipped) if self._takes(subject, g) for own in [slots[g]]}
        if not left:
            raise InvalidInput(f"the network has no channel group for {self}; leave the step out, or change what it skips")
        scores = _norms(subject, self.normalise)
        own = {g: torch.from_numpy(scores[s]) for g, s in left.items()}
        first = [s.index_fill(0, s.argmax(), torch.inf) for s in own.values()]  # each group's best stays whatever the threshold
        masks = largest(first, max(share_of(self.density, sum(map(len, left.values()))), len(left)))
        mask = np.ones_like(subject.mask)
        for (group, score), kept in zip(own.items(), masks, strict=True):
            count = max(int(kept.sum()) // self.align * self.align, min(self.align, len(score)))
            mask[left[group]] = largest([score], count)[0].numpy()
        subject.remove(mask)
        return subject

    def _takes(self, subject: Subject, group: str) -> bool:
        """Whether the step is for a group."""
        return True


@dataclass(frozen=True)
class FilterPrune(StructurePrune):
    """Keep the filters of the largest l2 norm: as `StructurePrune`, of the channel groups that a convolution produces.

    Args:
        density: the share of filters that is kept, over all these groups together.
        align: as for `StructurePrune`.
        normalise: as for `StructurePrune`.
        skip: as for `StructurePrune`.
    """

    def _takes(self, subject: Subject, group: str) -> bool:
        return _of_filters(subject, group)


@dataclass(frozen=True)
class NeuronPrune(StructurePrune):
    """Keep the neurons and heads of the largest l2 norm: as `StructurePrune`, of the channel groups that no convolution produces.

    Args:
        density: the share of neurons and heads that is kept, over all these groups together.
        align: as for `StructurePrune`.
        normalise: as for `StructurePrune`.
        skip: as for `StructurePrune`.
    """

    def _takes(self, subject: Subject, group: str) -> bool:
        return not _of_filters(subject, group)


def _of_filters(subject: Subject, group: str) -> bool:
    return any(subject.traced.network[unit].op.startswith("conv") for unit in subject.traced.channels.producers[group])


def _norms(subject: Subject, normalise: bool) -> NDArray[np.float64]:
    """For each slot number the l2 norm of the weights that put it out, or their root mean square."""
    channels = subject.traced.channels
    squares, counts = np.zeros(len(subject.mask)), np.zeros(len(subject.mask))
    for unit in dict.fromkeys(u for own in channels.producers.values() for u in own if u in subject.homes):
        put, read = out_slots(subject.traced, unit), in_slots(subject.traced, unit)
        if put is None:
            continue
        weight = subject.whole(unit).double().square()
        share = 1.0 if read is None else len(read.kept(subject.mask)) / len(read.slots)
        np.add.at(squares, put.slots, weight.sum([d for d in range(weight.dim()) if d != put.axis]).numpy())
        np.add.at(counts, put.slots, share * weight.numel() / len(put.slots))
    return np.sqrt(squares / np.maximum(counts, 1e-300) if normalise else squares)

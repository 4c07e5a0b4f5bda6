"""A network of a scheme as training needs it: the channels that stay, and what the scheme makes of the weights in them.

Channels are chosen once, by the weights of the dense network. All other steps are applied anew to the weights of now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from hwsearch.errors import InvalidInput
from hwsearch.graph.canonical import tensor_attr
from hwsearch.lowering.lowering import Lowering
from hwsearch.schemes.subject import Subject

if TYPE_CHECKING:
    from hwsearch.schemes.scheme import Step


class Trainable:
    """What training leads weights to. subject: the dense network; steps: of the scheme, in their order.

    Raises InvalidInput where channels go after weights did: these weights would be chosen among others in each projection.
    """

    def __init__(self, subject: Subject, steps: Sequence[Step]) -> None:
        first = next((i for i, step in enumerate(steps) if not step.narrows), len(steps))
        if late := next((step for step in steps[first:] if step.narrows), None):
            raise InvalidInput(
                f"the scheme takes channels away ({type(late).__name__}) after it changed weights ({type(steps[first]).__name__}), "
                "and cannot be trained so: let the steps that take channels come first"
            )
        for step in steps[:first]:
            subject = step._apply(subject)
        self.narrow, self.steps = subject, tuple(steps[first:])

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """The slots of channel groups that stay; empty where all do."""
        if self.narrow.mask.all():
            return {}
        groups = self.narrow.traced.channels.groups
        return {g: tuple(np.flatnonzero(self.narrow.mask[slots]).tolist()) for g, slots in groups.items()}

    @cached_property
    def units(self) -> list[str]:
        """Layers whose weights the steps are for."""
        subject = self.narrow.copy()
        for step in self.steps:
            subject = step._apply(subject)
        return list(subject.touched)

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the steps make of weights, of each of `units`; shapes of the narrow network, before BatchNorm is folded."""
        if not self.units:
            return {}
        found = self._after(self.steps, weights)
        return {unit: found[unit] for unit in self.units}

    def supports(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which weights the steps leave, of units where they do not leave all; what is rounded to zero counts as left."""
        patterns = [step for step in self.steps if not step.rounds]
        if not patterns or not self.units:
            return {}
        found = self._after(patterns, {u: torch.where(w == 0, torch.finfo(w.dtype).tiny, w) for u, w in weights.items()})
        return {unit: mask for unit in self.units if not bool((mask := found[unit] != 0).all())}

    def _after(self, steps: Sequence[Step], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        subject = self.narrow.copy()
        for unit, weight in weights.items():
            subject.put(unit, weight)
        for step in steps:
            subject = step._apply(subject)
        return {unit.name: weight for unit, weight in subject.layers()}

    def left(self, lowering: Lowering) -> Subject:
        """The scheme's network with the weights of a lowering, BatchNorm folded in, for its footprint."""
        own = {unit.name: weight for unit, weight in self.narrow.layers()}
        subject = self.narrow.copy()
        for step in self.steps:  # for what they say of formats, and of layers that they leave out
            subject = step._apply(subject)
        for unit, weight in own.items():
            path = lowering.traced.paths[unit][0]
            new = None if path is None else tensor_attr(lowering.traced.graph, path)
            if new is None or new.shape != weight.shape:
                raise InvalidInput(f"{unit} has another weight where it is deployed than in the module, and cannot be trained")
            subject.put(unit, new.detach())
        return subject

"""Torch calls in the order in which they are made at every inference: what an engine captures, or launches one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hwsearch.backends.torch.calls import Run

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """One torch call. sources: the ONNX nodes it does the work of. precision: as `Variant.executed` writes it, or torch's type.

    reads, writes, frees: places of tensors. views: it only looks at memory in another way, and launches nothing.
    """

    name: str
    op: str
    sources: tuple[str, ...]
    precision: str
    run: Run
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    views: bool
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class OnnxProgram:
    """Calls in order. places: the constants where they stand, None for what is made. size_bytes: of all constants.

    channels_last: inputs of four axes are to lie so in memory. declined: for each product that a kernel did not take, against
    its rules, which it was and torch's reason; what the product runs in instead is its step's precision.
    """

    steps: tuple[Step, ...]
    places: tuple[Tensor | None, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size_bytes: int
    channels_last: bool
    declined: Mapping[str, str]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor], before: Callable[[int], None] | None = None) -> list[Tensor]:
        """Outputs, on the inputs' device. before: called with the index of each step that is about to be run."""
        places = list(self.places)
        for place, value in zip(self.inputs, inputs, strict=True):
            places[place] = value
        for index, step in enumerate(self.steps):
            if before is not None:
                before(index)
            made = step.run(*[places[i] for i in step.reads])
            for place, value in zip(step.writes, made if isinstance(made, tuple) else (made,), strict=False):
                places[place] = value
            for place in step.frees:
                places[place] = None
        outputs = [places[i] for i in self.outputs]
        return [value for value in outputs if value is not None]


def with_frees(steps: Sequence[Step], kept: Sequence[int]) -> tuple[Step, ...]:
    """The steps, each dropping what no later one reads. kept: places that stay: constants and outputs."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last |= dict.fromkeys((*step.reads, *step.writes), index)
    ends: dict[int, list[int]] = {}
    for place, index in last.items():
        if place not in kept:
            ends.setdefault(index, []).append(place)
    return tuple(replace(step, frees=tuple(ends.get(i, ()))) for i, step in enumerate(steps))

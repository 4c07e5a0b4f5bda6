"""Where a training runs: on a GPU where there is one, and in several processes where `accelerate launch` started them.

Each process trains the same network and takes its share of every minibatch; gradients are added up over all, so that a step is the
one that a single process would make of the whole minibatch. Nothing is wrapped: Accelerate says which device and which share is
whose, and adds up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput

T = TypeVar("T")
LAUNCHED, TOGETHER = "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"
"""What `accelerate launch` always sets, and torchrun, which starts several processes for it."""


class Processes:
    """This process alone, or those of an `accelerate.Accelerator`.

    Attributes:
        device: That tensors of the training are on.
        count: Processes.
        index: Of this one; the first is the main one, which alone writes and prints.
    """

    def __init__(self, accelerator: Any = None, device: torch.device | None = None) -> None:
        self._accelerator = accelerator
        alone = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device: torch.device = alone if accelerator is None else accelerator.device
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.index: int = 0 if accelerator is None else accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def share(self, values: Any, samples: int, what: str) -> Any:
        """The part of a minibatch that this process takes: of every tensor its part along dimension 0.

        Raises InvalidInput where there are fewer samples than processes, or something else than tensors of so many samples.
        """
        if self.count == 1:
            return values
        start, end = (samples * i // self.count for i in (self.index, self.index + 1))

        def part(leaf: Any) -> Any:
            if leaf is None:
                return leaf
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or len(leaf) != samples or samples < self.count:
                have = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise InvalidInput(
                    f"{what}: {have} in a batch of {samples} samples cannot be shared among {self.count} processes; expected "
                    f"tensors with the samples in dimension 0, at least {self.count} of them. Give such, or start fewer processes"
                )
            return leaf[start:end]

        return pytree.tree_map(part, values)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes its sum over all processes."""
        if self._accelerator is None or not tensors:
            return
        whole = self._accelerator.reduce(torch.cat([t.reshape(-1) for t in tensors]), "sum")
        for tensor, own in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(own.view_as(tensor))

    def total(self, *numbers: float) -> list[float]:
        """Of each number the sum over all processes."""
        if self._accelerator is None:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        found: list[float] = self._accelerator.reduce(own, "sum").tolist()
        return found

    def of_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in all of them."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = broadcast_object_list([make() if self.main else None])
        made: T = found[0]
        return made


def launched() -> Processes:
    """Those that `accelerate launch` (or torchrun) started, which say so in their environment; else this one alone."""
    if LAUNCHED not in os.environ and int(os.environ.get(TOGETHER, "1")) == 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise InvalidInput(
            "processes that were started together need Accelerate to train together: pip install 'hwsearch[accelerate]'; or start "
            "a single one"
        ) from error
    return Processes(Accelerator())

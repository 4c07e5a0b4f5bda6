"""Where the batch is in a model's outputs: how outputs of pieces of a batch are put together, and compared sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput


@dataclass(frozen=True)
class BatchAxis:
    """Where the batch is in one output.

    axis: the dimension whose size follows the batch; None where none does. each: how many indices of it a sample has.
    inner: the samples of one position stand together (positions x batch), not the positions of one sample (batch x positions).
    mixed: the shape follows the batch in another way (batch x batch, for instance).
    """

    axis: int | None = 0
    each: int = 1
    inner: bool = False
    mixed: bool = False

    def samples(self, y: torch.Tensor) -> int:
        """How many samples an output is of; 1 where no axis follows the batch."""
        return 1 if self.axis is None else y.shape[self.axis] // self.each

    def first(self, y: torch.Tensor, count: int) -> torch.Tensor:
        """The output of the first samples."""
        return self.joined([y], [count])

    def joined(self, pieces: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
        """The first `counts` samples of each piece, one piece after the other."""
        assert self.axis is not None
        where = self.axis + self.inner
        opened = [self._opened(p).narrow(where, 0, n) for p, n in zip(pieces, counts, strict=True)]
        return torch.cat(opened, where).flatten(self.axis, self.axis + 1)

    def by_sample(self, y: torch.Tensor) -> torch.Tensor:
        """[samples, numbers of one sample]; a single row where no axis follows the batch."""
        if self.axis is None:
            return y.reshape(1, -1)
        return self._opened(y).movedim(self.axis + self.inner, 0).flatten(1)

    def _opened(self, y: torch.Tensor) -> torch.Tensor:
        """With the samples on an axis of their own: `axis`, or the one after it where they are inner."""
        assert self.axis is not None
        sizes = [self.samples(y), self.each]
        return y.reshape(
            *y.shape[: self.axis], *(sizes[::-1] if self.inner else sizes), *y.shape[self.axis + 1 :]
        )


def put_together(
    columns: Sequence[Sequence[torch.Tensor]], axes: Sequence[BatchAxis], counts: Sequence[int], batch: int
) -> list[torch.Tensor]:
    """Outputs of a whole batch from those of its pieces, each of `batch` samples of which the first `counts` are its own.

    columns: for each output its pieces. An output without an axis that follows the batch is, where its pieces differ, their mean
    weighted by samples: what a loss or a statistic over the batch is close to. Raises InvalidInput where it has no mean.
    """
    found = []
    for number, (pieces, where) in enumerate(zip(columns, axes, strict=True)):
        if where.axis is not None:
            found.append(where.joined(pieces, counts))
        elif list(counts) == [batch] or (
            not where.mixed and all(torch.equal(p, pieces[0]) for p in pieces[1:])
        ):
            found.append(pieces[0])
        elif where.mixed or not pieces[0].is_floating_point():
            raise InvalidInput(
                f"output {number} (shape {tuple(pieces[0].shape)}) has no axis that follows the batch, and cannot be put together "
                f"from batches of {batch}; evaluate batches of {batch}, or deploy for those that evaluate gives (--batch)"
            )
        else:
            weights = torch.tensor(counts, dtype=torch.float64)
            mean = torch.tensordot(weights / weights.sum(), torch.stack([p.double() for p in pieces]), 1)
            found.append(mean.to(pieces[0].dtype))
    return found


def find_axes(run: Callable[[Any], Any], first: Any, second: Any, both: Any) -> tuple[BatchAxis, ...]:
    """Where the batch is in each output tensor, from the outputs of two halves of a batch and of the whole one.

    run: the outputs for some inputs. A model that takes no other batch than that of the halves is taken to have it on the first
    axis of that size.
    """
    halves = [_tensors(run(first)), _tensors(run(second))]
    size = _samples(first)
    try:
        whole = _tensors(run(both))
    except Exception:
        return tuple(_by_size(y, size) for y in halves[0])
    return tuple(_batch_axis(a, b, y, size) for a, b, y in zip(*halves, whole, strict=True))


def _by_size(y: torch.Tensor, size: int) -> BatchAxis:
    return BatchAxis(next((i for i, n in enumerate(y.shape) if n == size), None))


def _batch_axis(a: torch.Tensor, b: torch.Tensor, whole: torch.Tensor, size: int) -> BatchAxis:
    if whole.shape == a.shape:
        return BatchAxis(None)
    grown = [i for i, (n, m) in enumerate(zip(a.shape, whole.shape, strict=False)) if n != m]
    if whole.dim() != a.dim() or len(grown) != 1:
        return BatchAxis(None, mixed=True)
    axis = grown[0]
    if whole.shape[axis] != 2 * a.shape[axis] or a.shape[axis] % size:
        return BatchAxis(None, mixed=True)
    each = a.shape[axis] // size
    orders = [BatchAxis(axis, each), BatchAxis(axis, each, inner=True)]
    return min(orders[: 1 + (each > 1)], key=lambda own: _off(own.joined([a, b], [size, size]), whole))


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).nan_to_num().abs().sum())


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _samples(inputs: Any) -> int:
    return next((t.shape[0] for t in _tensors(inputs) if t.dim()), 1)

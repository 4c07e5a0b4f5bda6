"""How far outputs are from the dense network's: the loss that sensitivities and reports hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput
from hwsearch.graph.batching import BatchAxis


def divergence(
    outputs: Any, dense: Any, kind: str, axes: Sequence[BatchAxis] | None = None
) -> tuple[float, int]:
    """(sum over samples, samples) of the divergence of flat outputs from the dense ones.

    `kl`: of softmax(dense) against softmax(outputs) over the class dimension (1, or the last of three).
    `mse`: squared error relative to the dense output's mean square. `auto`: kl where there are two classes or more.
    axes: where the batch is in each output tensor; None for dimension 0. An output that has none is compared as a whole, by its
    squared error. Several outputs are averaged.
    """
    mean, samples = mean_divergence(outputs, dense, kind, axes)
    return samples * float(mean), samples


def _pairs(
    outputs: Any, dense: Any, axes: Sequence[BatchAxis] | None
) -> list[tuple[torch.Tensor, torch.Tensor, BatchAxis]]:
    """(output, the dense network's, where its batch is) of each tensor; by default the first dimension."""
    leaves = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(dense), strict=True)
    pairs = [(y, y0) for y, y0 in leaves if isinstance(y0, torch.Tensor)]
    places = [BatchAxis(0 if y0.dim() else None) for _, y0 in pairs] if axes is None else axes
    return [(y, y0, where) for (y, y0), where in zip(pairs, places, strict=True)]


def mean_divergence(
    outputs: Any,
    dense: Any,
    kind: str,
    axes: Sequence[BatchAxis] | None = None,
    squares: Sequence[float] | None = None,
) -> tuple[torch.Tensor, int]:
    """(mean of a sample as a scalar in fp64, with a gradient where outputs have one; samples) of `divergence`.

    squares: of each dense output its mean square; where outputs are a part of a batch, that of the whole. None: their own.
    """
    means, samples = [], 1
    for number, (y, y0, where) in enumerate(_pairs(outputs, dense, axes)):
        if where.axis is not None:
            samples = where.samples(y0)
        if not y0.is_floating_point():
            continue
        y, y0 = y.double(), y0.double()
        axis = _class_axis(y0, where)
        if axis is not None and (kind == "kl" or (kind == "auto" and y0.shape[axis] >= 2)):
            log_p, log_q = torch.log_softmax(y0, axis), torch.log_softmax(y, axis)
            means.append((log_p.exp() * (log_p - log_q)).sum(axis).mean())
        else:
            square = float(y0.square().mean()) if squares is None else squares[number]
            means.append((y - y0).square().mean() / (square or 1.0))
    if not means:
        raise InvalidInput("the model returns no floating-point tensor to compare with the dense network's")
    return torch.stack(means).mean(), samples


def closeness(
    outputs: Any, dense: Any, kind: str, axes: Sequence[BatchAxis] | None = None
) -> tuple[torch.Tensor, bool]:
    """(for each sample how near its outputs are to the dense ones, 1 where they are equal; whether that counts classes alone).

    Where outputs are of classes, as `divergence` has it, the share of positions with the greatest of them at the same class; else 1
    less the squared error relative to the dense output's mean square. Several outputs are averaged.
    """
    found, counted = [], True
    for y, y0, where in _pairs(outputs, dense, axes):
        if not y0.is_floating_point():
            continue
        axis = _class_axis(y0, where)
        if axis is not None and (kind == "kl" or (kind == "auto" and y0.shape[axis] >= 2)):
            near = (y.argmax(axis, keepdim=True) == y0.argmax(axis, keepdim=True)).double()
        else:
            y, y0, counted = y.double(), y0.double(), False
            near = 1.0 - (y - y0).square() / (float(y0.square().mean()) or 1.0)
        found.append(where.by_sample(near).mean(1))
    if not found:
        raise InvalidInput("the model returns no floating-point tensor to compare with the dense network's")
    samples = max(len(each) for each in found)
    return torch.stack([each.expand(samples) for each in found]).mean(0), counted


def _class_axis(y: torch.Tensor, where: BatchAxis) -> int | None:
    """The dimension of classes: 1, or the last of three; another one where the batch is there. None where there is none."""
    if where.axis is None:
        return None
    likely = [2 if y.dim() == 3 else 1, y.dim() - 1, *range(y.dim())]
    return next((axis for axis in likely if axis < y.dim() and axis != where.axis), None)

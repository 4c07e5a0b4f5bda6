"""Zeros in the weights of layers, by magnitude: single weights, blocks, N of every M, and as many of each row.

A layer's weight is a matrix [outputs, inputs] here: all kernels of a convolution that one output reads are a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hwsearch.compress.patterns import balanced_mask, largest, prune
from hwsearch.errors import InvalidInput
from hwsearch.network.network import Unit
from hwsearch.network.variants import Variant, ineligible
from hwsearch.schemes.scheme import DENSITY, Number, Step, given, within
from hwsearch.schemes.subject import Subject


@dataclass(frozen=True)
class Prune(Step):
    """Keep the largest weights of all layers together: one threshold, so that the density of each layer comes out by itself.

    Args:
        density: the share of all weights that is kept, of those in channels that are left. Of equal weights the first stay.
        skip: patterns of names of layers that stay as they are.

    Source:
        Joseph et al., A Programmable Approach to Neural Network Compression, IEEE Micro 2020.
    """

    density: Number = DENSITY

    def __post_init__(self) -> None:
        super().__post_init__()
        within("density", self.density, 0.0, 1.0)

    def _apply(self, subject: Subject) -> Subject:
        layers = _layers(subject, self)
        masks = largest([weight.abs() for _, weight in layers], share_of(self.density, sum(w.numel() for _, w in layers)))
        for (unit, weight), mask in zip(layers, masks, strict=True):
            subject.put(unit.name, weight * mask)
        return subject


@dataclass(frozen=True)
class BlockPrune(Step):
    """Keep the blocks of weights of the largest l2 norm, with one threshold over the blocks of all layers.

    A layer that blocks do not divide stays as it is, and `Footprint.left_out` says so.

    Args:
        density: the share of blocks that is kept. Of equal blocks the first stay.
        block: (outputs, inputs) of a block.
        skip: patterns of names of layers that stay as they are.

    Source:
        Joseph et al., A Programmable Approach to Neural Network Compression, IEEE Micro 2020.
    """

    density: Number = DENSITY
    block: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("density", self.density, 0.0, 1.0)
        object.__setattr__(self, "block", tuple(self.block))
        if len(self.block) != 2 or not all(isinstance(n, int) and n > 0 for n in self.block):
            raise InvalidInput(f"block is {self.block}; expected two whole numbers above 0, outputs and inputs")

    def _apply(self, subject: Subject) -> Subject:
        rows, columns = self.block
        found = []
        for unit, weight in _layers(subject, self):
            matrix = as_rows(unit, weight)
            if matrix.shape[0] % rows or matrix.shape[1] % columns:
                size = f"{matrix.shape[0]} outputs by {matrix.shape[1]} inputs"
                subject.left_out[unit.name] = f"blocks of {rows}x{columns} do not divide {size}"
            else:
                found.append((unit, weight, matrix.reshape(matrix.shape[0] // rows, rows, -1, columns)))
        _require(found, self)
        norms = [cells.double().square().sum((1, 3)) for *_, cells in found]
        masks = largest(norms, share_of(self.density, sum(n.numel() for n in norms)))
        for (unit, weight, cells), mask in zip(found, masks, strict=True):
            subject.put(unit.name, from_rows(unit, (cells * mask[:, None, :, None]).flatten(2).flatten(0, 1), weight))
        return subject


@dataclass(frozen=True)
class NM(Step):
    """Keep the N largest weights of every M consecutive input channels, as sparse tensor cores multiply them (2:4).

    A layer that cannot have the pattern (its input channels are no multiple of M) stays as it is; `Footprint.left_out` says so.

    Args:
        n: how many are kept.
        m: of how many.
        skip: patterns of names of layers that stay as they are.
    """

    n: Number = 2
    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.m, bool) or not isinstance(self.m, int) or self.m < 2:
            raise InvalidInput(f"m is {self.m!r}; expected a whole number of at least 2")
        within("n", self.n, 1, self.m - 1, whole=True)

    def _apply(self, subject: Subject) -> Subject:
        n, found = int(given(self.n)), []
        for unit, weight in _layers(subject, self):
            if why := ineligible(unit, Variant("fp16", f"{n}:{self.m}")):
                subject.left_out[unit.name] = why
            else:
                found.append((unit, weight))
        _require(found, self)
        for unit, weight in found:
            subject.put(unit.name, prune(weight, unit.in_axis, n, self.m))
        return subject


@dataclass(frozen=True)
class Balanced(Step):
    """Keep as many weights in each block of consecutive inputs of each output, the largest: balanced sparsity.

    A layer whose inputs are no multiple of the block stays as it is; `Footprint.left_out` says so.

    Args:
        density: the share of each block that is kept, rounded to whole weights.
        block: consecutive inputs of a block.
        skip: patterns of names of layers that stay as they are.

    Source:
        Yao, Cao et al., Balanced Sparsity for Efficient DNN Inference on GPU, AAAI 2019.
    """

    density: Number = DENSITY
    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        within("density", self.density, 0.0, 1.0)
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise InvalidInput(f"block is {self.block!r}; expected a whole number of at least 2")

    def _apply(self, subject: Subject) -> Subject:
        keep, found = round(given(self.density) * self.block), []
        for unit, weight in _layers(subject, self):
            matrix = as_rows(unit, weight)
            if matrix.shape[1] % self.block:
                subject.left_out[unit.name] = f"an output reads {matrix.shape[1]} inputs, no multiple of the block of {self.block}"
            else:
                found.append((unit, weight, matrix))
        _require(found, self)
        for unit, weight, matrix in found:
            subject.put(unit.name, from_rows(unit, matrix * balanced_mask(matrix, self.block, keep), weight))
        return subject


def as_rows(unit: Unit, weight: torch.Tensor) -> torch.Tensor:
    """A weight as a matrix [outputs, inputs]."""
    return weight.movedim(unit.out_axis, 0).flatten(1)


def from_rows(unit: Unit, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Inverse of `as_rows`. like: a weight of the shape."""
    return matrix.reshape(like.movedim(unit.out_axis, 0).shape).movedim(0, unit.out_axis)


def share_of(density: Number, count: int) -> int:
    """How many of `count` a density keeps: never more than the share."""
    return min(count, math.floor(given(density) * count + 1e-9))


def _layers(subject: Subject, step: Step) -> list[tuple[Unit, torch.Tensor]]:
    layers = list(subject.layers(step.skipped))
    _require(layers, step)
    return layers


def _require(layers: Sequence[object], step: Step) -> None:
    """Raises InvalidInput where there is nothing that a step is for."""
    if not layers:
        raise InvalidInput(f"the network has no layer for {step}; leave the step out, or change its sizes or what it skips")

"""Masks: which weights stay, those of the largest magnitude; of all, of every M, or of each block of a row.

N:M as TensorRT takes them: of every M consecutive input channels N, for each output channel and each position of the kernel on its
own. Which units can have a pattern is told by `hwsearch.network.variants.ineligible`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def nm_mask(weight: torch.Tensor, axis: int, n: int, m: int) -> torch.Tensor:
    """Which weights stay [bool, the weight's shape]: exactly `n` of every `m` along `axis`, the largest magnitudes.

    Of equal magnitudes the first stay. Raises ValueError where `m` does not divide the axis, or not 0 < n < m.
    """
    if not 0 < n < m:
        raise ValueError(f"a pattern keeps N of M weights with 0 < N < M, got {n}:{m}")
    moved = weight.detach().movedim(axis, -1)
    if moved.shape[-1] % m:
        raise ValueError(f"{moved.shape[-1]} input channels are no multiple of {m}")
    blocks = moved.abs().reshape(*moved.shape[:-1], -1, m)
    largest = blocks.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, largest, True)
    return mask.flatten(-2).movedim(-1, axis)


def prune(weight: torch.Tensor, axis: int, n: int, m: int) -> torch.Tensor:
    """The weight with zeros where `nm_mask` leaves nothing."""
    return torch.where(nm_mask(weight, axis, n, m), weight.detach(), torch.zeros_like(weight))


def largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """For each tensor of scores a mask [bool, its shape]: `count` of all together stay, those with one threshold over all tensors.

    Of equal scores the first stay. Raises ValueError where there are fewer than `count`.
    """
    flat = torch.cat([s.detach().flatten() for s in scores])
    if not 0 <= count <= len(flat):
        raise ValueError(f"{count} of {len(flat)} scores cannot stay")
    mask = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(len(flat) - count + 1).values
        mask = flat > threshold
        mask[(flat == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
    return [own.reshape(s.shape) for own, s in zip(torch.split(mask, [s.numel() for s in scores]), scores, strict=True)]


def balanced_mask(matrix: torch.Tensor, block: int, keep: int) -> torch.Tensor:
    """Which weights of a matrix [rows, inputs] stay: exactly `keep` of each `block` consecutive inputs of each row.

    Balanced sparsity (Yao, Cao et al., Balanced Sparsity for Efficient DNN Inference on GPU, 2019). Raises ValueError where `block`
    does not divide the inputs.
    """
    if keep in (0, block):
        return torch.full_like(matrix, bool(keep), dtype=torch.bool)
    return nm_mask(matrix, 1, keep, block)

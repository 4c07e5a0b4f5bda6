"""N:M masks: of every M consecutive input channels N weights stay, those of the largest magnitude.

As TensorRT takes them: for each output channel and each position of the kernel on its own. Which units can have a pattern is
told by `hwsearch.network.variants.ineligible`.
"""

from __future__ import annotations

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

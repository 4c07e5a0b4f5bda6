"""What tests compare with: whether a weight follows a pattern, and the masked network."""

from __future__ import annotations

from dataclasses import replace

import torch

from hwsearch.compress.widths import Kept
from hwsearch.graph.narrow import masked_graph
from hwsearch.graph.trace import Traced


def follows(weight: torch.Tensor, axis: int, n: int, m: int) -> bool:
    """Whether at most `n` of every `m` consecutive weights along `axis` are not zero."""
    moved = weight.detach().movedim(axis, -1)
    if moved.shape[-1] % m:
        return False
    return bool(((moved.reshape(*moved.shape[:-1], -1, m) != 0).sum(-1) <= n).all())


def masked(traced: Traced, kept: Kept) -> Traced:
    """The whole network whose units read zeros in place of the channels that are not kept."""
    mask = traced.channels.mask(kept)
    return replace(traced, graph=masked_graph(traced.graph, traced.channels, mask, traced.reads()))

"""What tests compare with: the best of all choices, whether a weight follows a pattern, and the masked network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch

from hwsearch.allocate.problem import Choice, Problem, Solution
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


def brute_force(problem: Problem) -> Solution | None:
    """The best of all choices, or None if none is feasible: what every solver here must equal.

    Ties go to the least first-budgeted cost. Time grows as the product of the sizes.
    """
    prefer = next(iter(problem.budgets), None)
    allowed: Iterable[Choice] = filter(problem.feasible, product(*map(range, problem.sizes)))
    ranked = ((problem.total_loss(a), problem.cost(prefer, a) if prefer else 0, a) for a in allowed)
    loss, _, best = min(ranked, default=(0.0, 0, None))
    return None if best is None else problem.solution(best, "optimal", loss, 0.0)

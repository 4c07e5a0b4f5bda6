"""Pruned gradients: what enters the product that gives the gradient of a layer's input, sparse as hardware could skip it.

Of a layer's three products in a step, y = W x, dx = W' dy and dW = dy x', only the second is changed, and only in training. `N:M`
keeps the largest N of every M output channels of dy (SDGP, McDanel et al. 2022); `N:M:rescaled` then restores the sum of
magnitudes of each channel; `N:M:mvue` draws N so that the mean is dy, at the least variance (Chmiel et al. 2022); `N:M:random`
keeps any N, the control. `stochastic:P` draws what is small, below a threshold that a share P of normal values is below
(SparseTrain, Dai et al. 2020). `bdwp:N:M` prunes W instead, along output channels (the backward half of BDWP, Fang et al. 2023; its
forward half is the pattern that the allocation gives). dW and the gradient of the bias are always of the whole dy.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch

from hwsearch.compress.patterns import nm_mask
from hwsearch.errors import InvalidInput

DENSE = "dense"
WORDS = (DENSE, "2:4", "2:4:rescaled", "2:4:mvue", "2:4:random", "stochastic:0.9", "bdwp:2:8")
"""Each kind of rule, with numbers that may be others."""
_PATTERN = re.compile(r"(?P<bdwp>bdwp:)?(?P<n>[1-9]\d*):(?P<m>[1-9]\d*)(?(bdwp)|(?::(?P<kind>rescaled|mvue|random))?)")
_SHARE = re.compile(r"stochastic:(?P<share>0?\.\d+)")

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""y of x, weight and bias."""


@dataclass(frozen=True)
class Layer:
    """A convolution or a matrix product. groups: of a convolution; out_axis: that of the weight with its output channels."""

    call: Product
    groups: int = 1
    out_axis: int = 0


@dataclass(frozen=True)
class Rule:
    """What is pruned. kind: `magnitude`, `rescaled`, `mvue`, `random`, `bdwp` or `stochastic`, which has a share and no N:M."""

    kind: str
    n: int = 0
    m: int = 1
    share: float = 0.0

    def gradient(self, dy: torch.Tensor, axis: int, random: torch.Generator) -> torch.Tensor:
        """A gradient of outputs, pruned. axis: of its channels, counted from the end; not for `bdwp`."""
        if self.kind == "stochastic":
            return _drawn(dy, self.share, random)
        if self.kind == "mvue":
            return _least_variance(dy, axis, self.n, self.m, random)
        scores = torch.rand(dy.shape, generator=random).to(dy.device) if self.kind == "random" else dy
        kept = dy * nm_mask(scores, axis, self.n, self.m)
        return _rescaled(kept, dy, axis) if self.kind == "rescaled" else kept


def rule(word: str) -> Rule | None:
    """By its word, as in `WORDS`; None for `dense`. Raises InvalidInput."""
    if word == DENSE:
        return None
    if (match := _PATTERN.fullmatch(word)) and int(match["n"]) < int(match["m"]):
        return Rule("bdwp" if match["bdwp"] else match["kind"] or "magnitude", int(match["n"]), int(match["m"]))
    if (match := _SHARE.fullmatch(word)) and float(match["share"]) > 0:
        return Rule("stochastic", share=float(match["share"]))
    raise InvalidInput(
        f"unknown gradients {word!r}; expected one of {', '.join(WORDS)}, where 2:4 and 2:8 may be any N:M with N below M, and "
        "0.9 any share between 0 and 1"
    )


def _rescaled(kept: torch.Tensor, dy: torch.Tensor, axis: int) -> torch.Tensor:
    """With the sum of magnitudes over the positions of each channel of each sample as it was, where anything is left of it."""
    if dy.dim() < 3:  # a layer of vectors: each sum is of one number
        return kept
    left, was = (t.abs().movedim(axis, 1).flatten(2).sum(2) for t in (kept, dy))
    factor = torch.where(left > 0, was / left, 1.0)
    return kept * factor.reshape(*factor.shape, *[1] * (dy.dim() - 2)).movedim(1, axis)


def _least_variance(dy: torch.Tensor, axis: int, n: int, m: int, random: torch.Generator) -> torch.Tensor:
    """Each a of M channels becomes a/p with probability p and else 0: p = min(1, c|a|), in sum N.

    The variance depends on the p alone, and is least for these; systematic sampling takes N at once.
    """
    moved = dy.movedim(axis, -1)
    blocks = moved.reshape(*moved.shape[:-1], -1, m)
    size = blocks.abs()
    sure, chance = torch.zeros_like(size, dtype=torch.bool), size
    for _ in range(n):  # those of p above 1 are taken for sure, and the others share what is left
        rest = size.masked_fill(sure, 0.0)
        left = n - sure.sum(-1, keepdim=True)
        total = rest.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        chance = torch.where(sure, 1.0, left * (rest / total))
        sure = sure | (chance >= 1)
    start = torch.rand(*size.shape[:-1], 1, generator=random).to(dy.device)
    passed = (chance.cumsum(-1) + start).floor().clamp(max=n)
    taken = passed.diff(prepend=torch.zeros_like(start)) > 0
    return torch.where(taken, blocks / chance, 0.0).flatten(-2).movedim(-1, axis)


def _drawn(dy: torch.Tensor, share: float, random: torch.Generator) -> torch.Tensor:
    """What is below the threshold t becomes t, with its sign, with probability |dy|/t and else 0: the mean stays."""
    size = dy.abs()
    threshold = math.sqrt(math.pi / 2) * NormalDist().inv_cdf((1 + share) / 2) * size.mean()
    risen = torch.rand(dy.shape, generator=random).to(dy.device) * threshold < size
    return torch.where(size < threshold, dy.sign() * threshold * risen, dy)


def _now(x: torch.Tensor) -> float:
    """Seconds, once what was begun on the device of a tensor is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


class Pruning:
    """A rule at work in a training, and what is measured of it: `counts` of entries, and seconds by product."""

    def __init__(self, of: Rule) -> None:
        self.rule, self.random = of, torch.Generator()
        self.counts: dict[str, float] = {}
        self.restart()

    def restart(self, counts: Mapping[str, float] | None = None) -> None:
        """Count from 0, or go on."""
        names = ("entries", "zeros", "zeros_dense", "y_s", "dx_s", "dw_s", "skipped_s")
        self.counts = {name: (counts or {}).get(name, 0.0) for name in names}

    def start(self, seed: int) -> None:
        """Before a step, whose draws depend on nothing else."""
        self.random.manual_seed(seed)

    def product(
        self, layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, whole: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A layer's product, whose backward pass is pruned; not where its output channels are no multiple of M.

        whole: what `bdwp` prunes, where that is not the weight: the weight without the pattern that the allocation gives.
        """
        pruned = (weight if whole is None else whole).detach()
        result: torch.Tensor = _Product.apply(self, layer, pruned, x, weight, bias)  # type: ignore[no-untyped-call]
        return result

    def measured(self) -> dict[str, float]:
        """What was measured, as shares, and what hardware would save of the time of all products, which is estimated."""
        own = self.counts
        entries, seconds = max(own["entries"], 1.0), max(own["y_s"] + own["dx_s"] + own["dw_s"], 1e-12)
        return {
            "zeros": own["zeros"] / entries, "zeros_dense": own["zeros_dense"] / entries,
            "backward_share": own["dx_s"] / seconds, "estimated_saving": own["skipped_s"] / seconds,
        }  # fmt: skip

    def count(self, before: torch.Tensor, after: torch.Tensor, seconds: float, pruned: bool) -> None:
        """A backward product of so many seconds: what it would read, and what it read."""
        of, own = self.rule, self.counts
        zeros = after.numel() - int(after.count_nonzero())
        own["entries"] += after.numel()
        own["zeros"] += zeros
        own["zeros_dense"] += before.numel() - int(before.count_nonzero())
        own["dx_s"] += seconds
        if pruned:
            own["skipped_s"] += seconds * (zeros / after.numel() if of.kind == "stochastic" else 1 - of.n / of.m)


class _Product(torch.autograd.Function):
    """A layer's product, run on a graph of its own, so that each gradient can be taken with other operands."""

    @staticmethod
    def forward(
        ctx: Any, pruning: Pruning, layer: Layer, whole: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        *_, of_x, of_weight, of_bias = ctx.needs_input_grad
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(of_x), weight.detach().requires_grad_(of_weight)
            bias = None if bias is None else bias.detach().requires_grad_(of_bias)
            begun = _now(x)
            y = layer.call(x, weight, bias)
        pruning.counts["y_s"] += _now(x) - begun
        ctx.pruning, ctx.layer, ctx.whole, ctx.operands, ctx.y = pruning, layer, whole, (x, weight, bias), y
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (dy,) = gradients
        x, weight, bias = ctx.operands
        trained = [t for t in (weight, bias) if t is not None and t.requires_grad]
        exact: list[torch.Tensor] = []
        if trained:
            begun = _now(x)
            exact = list(torch.autograd.grad(ctx.y, trained, dy, retain_graph=True))
            ctx.pruning.counts["dw_s"] += _now(x) - begun
        dx = _data_gradient(ctx, dy) if x.requires_grad else None
        of_weight, of_bias = (exact.pop(0) if t is not None and t.requires_grad else None for t in (weight, bias))
        return None, None, None, dx, of_weight, of_bias


def _data_gradient(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    """dx, of pruned operands."""
    pruning, of, (x, weight, bias) = ctx.pruning, ctx.pruning.rule, ctx.operands
    axis = 1 - weight.dim()
    fits = of.kind == "stochastic" or dy.shape[axis] // ctx.layer.groups % of.m == 0
    y, gradient, before, after = ctx.y, dy, dy, dy
    if of.kind == "bdwp":
        before = after = ctx.whole
        if fits:
            after = before * nm_mask(before, ctx.layer.out_axis, of.n, of.m)
            with torch.enable_grad():
                y = ctx.layer.call(x, after, bias)
    elif fits:
        gradient = after = of.gradient(dy, axis, pruning.random)
    begun = _now(x)
    (dx,) = torch.autograd.grad(y, x, gradient)
    pruning.count(before, after, _now(x) - begun, fits)
    found: torch.Tensor = dx
    return found

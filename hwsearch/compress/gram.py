"""Refit a layer's weights after input channels are gone, or round them: regularised least squares on calibration data.

With x what a unit reads (its features: for a convolution the patches under its kernel), G = E[x x^T] their Gram matrix
and W its weight, what is kept (k) stands in best for what is removed (r) as

    W'_k = W_k + W_r G_rk (G_kk + ridge I)^-1,

the minimum of E|W x - W' x_k|^2 + ridge |W' - W_k|^2; it is the Optimal Brain Surgeon update for a whole block (Hassibi and
Stork, 1993; Frantar and Alistarh, OBC, 2022). Where the unit has a bias, G is the covariance and the bias takes up the
difference of the means. Rounding one column after another, each time refitting those not yet rounded, is GPTQ (Frantar et
al., 2022): the same solver with a quantizer.

Transposed convolutions are refitted as if the patches that they add up were their output; grouped convolutions keep their
weights, without the removed ones.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.nn import functional as F

from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.canonical import bound
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site
from hwsearch.network.network import Unit

Batch = tuple[Traced, tuple[Any, ...], dict[str, Any]]
"""A calibration batch: a trace for its shape, and the arguments of the call."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Regularisations to choose from, relative to the mean of the Gram matrix's diagonal."""
RIDGE = 0.1
"""The one where a single batch leaves nothing to choose it on."""
TRIAL_OUTPUTS = 256
"""Outputs of a unit that choosing its regularisation looks at."""
MOST_FEATURES = 5000
"""Units that read more features (a classifier on a whole flattened image) keep their weights, without the removed ones."""
ROWS = 20_000
"""Positions sampled for each unit: this many, or ten for each feature where that is more."""

Quantizer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(weight [out, features], their Hessian [features, features]) -> rounded weight."""


def refittable(unit: Unit) -> bool:
    """Whether the weight can be refitted: a matrix product of what the unit reads and nothing else, in one group, not too large."""
    if unit.stored or unit.tied or not unit.weight_shape or dict(unit.attributes).get("groups", "1") != "1":
        return False
    return math.prod(unit.weight_shape) // unit.weight_shape[1 - unit.in_axis] <= MOST_FEATURES


def as_columns(unit: Unit, weight: torch.Tensor) -> torch.Tensor:
    """The weight as a matrix [outputs, features], the features of one input index side by side."""
    return weight.flatten(1) if unit.in_axis == 1 else weight.flatten(1).T


def from_columns(unit: Unit, matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of `as_columns`, for any number of inputs and outputs."""
    if unit.in_axis == 1:
        return matrix.reshape(len(matrix), -1, *unit.weight_shape[2:])
    return matrix.T.reshape(matrix.shape[1], -1, *unit.weight_shape[2:])


def feature_columns(unit: Unit, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Columns of `as_columns` that belong to indices along the axis that the unit reads."""
    each = math.prod(unit.weight_shape[2:]) if unit.in_axis == 1 else 1
    return (np.asarray(indices, np.int64)[:, None] * each + np.arange(each)).ravel()


def shifts_bias(traced: Traced, unit: str) -> bool:
    """Whether the unit has a bias of its own that takes up a change of its output's mean."""
    path = traced.paths[unit][1]
    alone = path is not None and sum(own == path for _, own in traced.paths.values()) == 1
    return alone and "transpose" not in traced.network[unit].op


def patches(node: fx.Node, unit: Unit, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(what the unit reads, number of its leading axes that are positions); the axes after them are features."""
    if not unit.op.startswith("conv"):
        return x, x.dim() - 1
    spatial = len(unit.weight_shape) - 2
    if x.dim() == spatial + 1:
        x = x[None]
    if not unit.op.startswith("conv_transpose"):
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        _, _, _, stride, padding, dilation, _ = bound(node, names, (None, None, None, 1, 0, 1, 1))
        steps, holes = _each(stride, spatial), _each(dilation, spatial)
        spans = [d * (k - 1) for d, k in zip(holes, unit.weight_shape[2:], strict=True)]
        if isinstance(padding, str):
            around = [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
        else:
            around = [(p, p) for p in _each(padding, spatial)]
        x = F.pad(x, [p for pair in reversed(around) for p in pair])
        for axis, (step, hole, span) in enumerate(zip(steps, holes, spans, strict=True)):
            x = x.unfold(2 + axis, span + 1, step)[..., ::hole]
    positions = [0, *range(2, 2 + spatial)]
    return x.permute(*positions, 1, *range(2 + spatial, x.dim())), 1 + spatial


def outputs(unit: Unit, y: torch.Tensor) -> torch.Tensor:
    """What the unit puts out, with the channels last."""
    if not unit.op.startswith("conv"):
        return y
    spatial = len(unit.weight_shape) - 2
    return (y if y.dim() == spatial + 2 else y[None]).movedim(1, -1)


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [int(v) for v in (values * count if len(values) == 1 else values)]


@dataclass(frozen=True)
class Sample:
    """Random positions of a tensor, the same for every tensor with these leading axes."""

    lead: tuple[int, ...]
    index: NDArray[np.int64] | None

    @staticmethod
    def draw(lead: tuple[int, ...], count: int, seed: int) -> Sample:
        total = math.prod(lead)
        if total <= count:
            return Sample(lead, None)
        return Sample(lead, np.sort(np.random.default_rng(seed).choice(total, count, replace=False)))

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """[positions, features]"""
        if self.index is not None:
            where = np.unravel_index(self.index, self.lead)
            value = value[tuple(torch.from_numpy(i) for i in where)]
            return value.reshape(len(self.index), -1)
        return value.reshape(math.prod(self.lead), -1)


def seeded(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


@dataclass
class Gram:
    """Mean of z z^T in float64, where z is what a unit reads with a one after it.

    matrix: [features + 1, features + 1]. rows: how many positions it is the mean of.
    """

    matrix: torch.Tensor
    rows: int = 0

    @staticmethod
    def empty(features: int) -> Gram:
        return Gram(torch.zeros(features + 1, features + 1, dtype=torch.float64))

    def add(self, second: torch.Tensor, rows: int) -> None:
        """Take in the sum of z z^T over so many rows (`squares`)."""
        self.rows += rows
        if rows:
            self.matrix.mul_(1 - rows / self.rows).add_(second, alpha=1 / self.rows)

    @property
    def finite(self) -> bool:
        """Whether the unit never read NaN or infinity: else nothing can be regressed on what it reads."""
        return bool(torch.isfinite(self.matrix).all())

    def without(self, part: Gram) -> Gram:
        """The mean over the rows that are not in `part`."""
        rows = self.rows - part.rows
        return Gram((self.matrix * self.rows - part.matrix * part.rows) / rows, rows)

    def moments(self, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(E[x x^T], or the covariance where a bias takes up the means; E[x])."""
        second, mean = self.matrix[:-1, :-1], self.matrix[:-1, -1]
        return (second - torch.outer(mean, mean) if bias else second), mean


COLUMNS = 512
"""Of a symmetric product as many columns at a time; what is below its diagonal is copied."""


def with_one(rows: torch.Tensor) -> torch.Tensor:
    """z of rows [..., positions, features]: a one after each, for the means."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)


def squares(z: torch.Tensor) -> torch.Tensor:
    """The sum of z z^T over the rows of z, in their precision."""
    found = z.new_empty(z.shape[1], z.shape[1])
    for at in range(0, z.shape[1], COLUMNS):
        end = at + COLUMNS
        torch.mm(z[:, at:end].T, z[:, at:], out=found[at:end, at:])
        found[end:, at:end] = found[at:end, end:].T
    return found


class Grams(Mapping[str, Gram]):
    """The Gram matrix of what each unit reads, by unit, from one pass over calibration batches.

    units: those to take; None for every unit that can be refitted and reads a channel group. Units that read NaN or infinity
    are left out. Units that read one tensor in one way share a matrix. Positions are sampled at random, the same for one seed.
    ridges: for each unit the regularisation that, fitted on the first three quarters of the batches with a random half
    of the features gone, is best on the last quarter: a layer that reads 1,280 features of 100 samples must not follow
    them as one does that reads 9 features of 20,000 positions.
    """

    def __init__(
        self, batches: Sequence[Batch], units: Iterable[str] | None = None, *, rows: int = ROWS, seed: int = 0
    ) -> None:
        traced = batches[0][0]
        reading = {u for g in traced.network.groups for u in g.consumers}
        wanted = reading if units is None else set(units)
        names = [u.name for u in traced.network.units if u.name in wanted and refittable(u)]
        nodes = {n.name: n for n in traced.graph.graph.nodes}
        self.of: dict[str, tuple[Any, ...]] = {}
        for name in names:
            calls = [nodes[s.node] for s in traced.sites[name]]
            self.of[name] = tuple(
                _way(n, traced.network[name], s) for n, s in zip(calls, traced.sites[name], strict=True)
            )
        unit_of = {ways: name for name, ways in reversed(self.of.items())}

        def empty() -> dict[tuple[Any, ...], Gram]:
            units = ((w, traced.network[n]) for w, n in unit_of.items())
            return {
                w: Gram.empty(as_columns(u, torch.empty(u.weight_shape, device="meta")).shape[1])
                for w, u in units
            }

        self.grams, held = empty(), empty()
        apart = kept_apart(len(batches))
        with torch.no_grad():
            for index, batch in enumerate(batches):
                sites = {s.node: (u, s) for u in unit_of.values() for s in batch[0].sites[u]}
                into = (self.grams, held) if index >= apart else (self.grams,)
                self._take(batch, sites, index, len(batches), rows, seed, into)
        # a unit that reads NaN or infinity has no moments: it is not refitted
        self.of = {n: w for n, w in self.of.items() if bool(torch.isfinite(self.grams[w].matrix).all())}
        self.ridges = {
            name: _best_ridge(traced, name, self[name], held[self.of[name]], seed) for name in self.of
        }

    def _take(
        self,
        batch: Batch,
        sites: Mapping[str, tuple[str, Site]],
        index: int,
        batches: int,
        rows: int,
        seed: int,
        into: Sequence[Mapping[tuple[Any, ...], Gram]],
    ) -> None:
        traced, args, kwargs = batch

        def see(node: fx.Node, inputs: Callable[[fx.Node], Any]) -> None:
            if node.name not in sites:
                return
            name, site = sites[node.name]
            unit = traced.network[name]
            count = -(-max(rows, 10 * (len(self[name].matrix) - 1)) // (batches * unit.calls))
            view, lead = patches(node, unit, inputs(as_node(node.args[site.activations[0]])))
            sample = Sample.draw(tuple(view.shape[:lead]), count, seeded(seed, index, node.name))
            own = sample.rows(view)
            second = squares(with_one(own))
            for grams in into:
                grams[self.of[name]].add(second, len(own))

        _Watcher(traced.graph, see).run(*flat_inputs(traced.graph, args, kwargs), enable_io_processing=False)

    def __getitem__(self, unit: str) -> Gram:
        return self.grams[self.of[unit]]

    def __iter__(self) -> Any:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


def kept_apart(batches: int) -> int:
    """The first of so many batches that fits are judged on, about the last quarter; of a single one there is none."""
    return batches - max(1, round(batches / 4)) if batches > 1 else batches


def _best_ridge(traced: Traced, name: str, whole: Gram, held: Gram, seed: int) -> float:
    unit, weight = traced.network[name], traced.weight(name)
    assert weight is not None
    if not held.rows or held.rows == whole.rows or not whole.finite:
        return RIDGE
    rng = np.random.default_rng(seeded(seed, name))
    inputs = weight.shape[unit.in_axis]
    kept = feature_columns(unit, np.sort(rng.permutation(inputs)[: -(-inputs // 2)]))
    matrix = as_columns(unit, weight)
    if len(matrix) > TRIAL_OUTPUTS:
        matrix = matrix[torch.from_numpy(rng.permutation(len(matrix))[:TRIAL_OUTPUTS])]
    bias, fitted = shifts_bias(traced, name), whole.without(held)

    def error(ridge: float) -> float:
        new, shift = refit(fitted, matrix, kept, bias=bias, ridge=ridge)
        return _squared_error(held, matrix, new, kept, shift)

    return min(RIDGES, key=error)


def _way(node: fx.Node, unit: Unit, site: Site) -> tuple[Any, ...]:
    """What tells the features of two calls apart."""
    source = node.args[site.activations[0]]
    kernel = unit.weight_shape[2:] if unit.in_axis == 1 else ()
    return str(source), kernel, unit.attributes if any(k > 1 for k in kernel) or unit.attributes else ()


def as_node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


class _Watcher(fx.Interpreter):
    """Shows each call of a node before it runs."""

    def __init__(
        self, graph: fx.GraphModule, see: Callable[[fx.Node, Callable[[fx.Node], Any]], None]
    ) -> None:
        super().__init__(graph)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        self.see(n, lambda source: self.env[source])
        return super().run_node(n)


def refit(
    gram: Gram,
    weight: torch.Tensor,
    kept: NDArray[np.int64],
    *,
    bias: bool = True,
    ridge: float,
    quantizer: Quantizer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [out, len(kept)], what to add to the bias [out]) that stand in for a weight [out, features], in float64.

    kept: columns that stay. bias: whether the unit has one; without, the second value is zero. ridge: relative to the mean
    of the Gram matrix's diagonal. quantizer: rounds the refitted weight, for instance `Gptq`.
    """
    second, mean = gram.moments(bias)
    weight = weight.detach().double()
    keep = torch.from_numpy(np.asarray(kept, np.int64))
    gone = torch.from_numpy(np.setdiff1d(np.arange(weight.shape[1]), kept))
    new = weight[:, keep]
    hessian = damped(second[keep][:, keep], ridge) if len(gone) or quantizer is not None else second
    if len(gone):
        factor = torch.linalg.cholesky(hessian)
        new = new + torch.cholesky_solve((weight[:, gone] @ second[gone][:, keep]).T, factor).T
    if quantizer is not None:
        new = quantizer(new, hessian)
    return new, (weight @ mean - new @ mean[keep]) if bias else torch.zeros(len(weight), dtype=torch.float64)


def damped(second: torch.Tensor, ridge: float) -> torch.Tensor:
    """The matrix [..., n, n] with `damping` on its diagonal, so that it can be inverted."""
    return second + damping(second, ridge) * torch.eye(second.shape[-1], dtype=second.dtype)


def damping(second: torch.Tensor, ridge: float, enough: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to a diagonal, [..., 1, 1]: `ridge` times its mean.

    Where that is not enough, ten times as much: moments added up in float32 may have eigenvalues a little below zero.

    enough: A level that was found to be enough for the matrix; more need not be tried.
    """
    level = (
        (ridge * second.diagonal(dim1=-2, dim2=-1).mean(-1)).nan_to_num().clamp_min(1e-12)[..., None, None]
    )
    if enough is not None and bool((level >= enough).all()):
        return level
    eye = torch.eye(second.shape[-1], dtype=second.dtype)
    for _ in range(12):
        # with half of it to spare: what is built on the inverse has rounding errors of its own
        if not bool(torch.linalg.cholesky_ex(second + level / 2 * eye).info.any()):
            break
        level = level * 10.0
    return level


def reconstruction_error(
    gram: Gram,
    weight: torch.Tensor,
    new: torch.Tensor,
    kept: NDArray[np.int64],
    shift: torch.Tensor | None = None,
) -> float:
    """E|W x + b - (W' x_k + b + shift)|^2 over calibration, summed over outputs; relative to E|W x|^2."""
    none = np.zeros(0, np.int64)
    whole = _squared_error(gram, weight, weight[:, :0], none)
    return _squared_error(gram, weight, new, kept, shift) / (whole or 1.0)


def _squared_error(
    gram: Gram, weight: torch.Tensor, new: torch.Tensor, kept: NDArray[np.int64], shift: torch.Tensor | None = None
) -> float:
    weight = weight.detach().double()
    off = torch.cat([weight, weight.new_zeros(len(weight), 1)], 1)
    off[:, torch.from_numpy(np.asarray(kept, np.int64))] -= new.double()
    if shift is not None:
        off[:, -1] -= shift.double()
    return float(((off @ gram.matrix) * off).sum())


@dataclass(frozen=True)
class Gptq:
    """A quantizer to symmetric integers with one scale per output, columns of the largest moment first.

    levels: the largest integer, 127 for int8 and 7 for int4. scales: [out]; None for those of `grid`.
    """

    levels: int = 127
    scales: torch.Tensor | None = None
    block: int = 64

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        scales = (grid(weight, hessian, self.levels) if self.scales is None else self.scales).to(weight)[
            :, None
        ]
        order = torch.argsort(hessian.diagonal(), descending=True)
        # with the order reversed, H = U U^T of an upper U, and the upper factor of its inverse is U^-1
        back = order.flip(0)
        root = torch.linalg.cholesky(hessian[back][:, back]).flip(0, 1)
        upper = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
        left, rounded = weight[:, order].clone(), torch.empty_like(weight)
        for start in range(0, weight.shape[1], self.block):
            end = min(start + self.block, weight.shape[1])
            errors = weight.new_empty(len(weight), end - start)
            for j in range(start, end):
                rounded[:, j] = round_to(left[:, j : j + 1], scales, self.levels)[:, 0]
                errors[:, j - start] = (left[:, j] - rounded[:, j]) / upper[j, j]
                left[:, j + 1 : end] -= torch.outer(errors[:, j - start], upper[j, j + 1 : end])
            left[:, end:] -= errors @ upper[start:end, end:]
        return rounded[:, torch.argsort(order)]


def round_to(weight: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    """The nearest values on the grid of symmetric integers; scales broadcast against the weight."""
    return (weight / scales).round().clamp(-levels, levels) * scales


def grid(weight: torch.Tensor, hessian: torch.Tensor, levels: int) -> torch.Tensor:
    """Scales [out] of least rounding error, each feature weighed by its moment; never above max|w| / levels."""
    top = weight.abs().amax(1, keepdim=True) / levels
    top = torch.where(top > 0, top, torch.ones_like(top))
    if levels >= 127:
        return top[:, 0]
    moment = hessian.diagonal()
    shares = torch.linspace(0.4, 1.0, 31, dtype=weight.dtype)
    errors = torch.stack([((round_to(weight, top * s, levels) - weight).square() @ moment) for s in shares])
    return top[:, 0] * shares[errors.argmin(0)]

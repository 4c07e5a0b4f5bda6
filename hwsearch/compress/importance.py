"""Which channels stay: the slots of each group in order of importance.

A narrower choice is a subset of a wider one: width w keeps the first w of the order. Scores are summed over all that the
slot runs through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.utils import _pytree as pytree

from hwsearch.compress.gram import Batch, Grams, as_columns, damped, feature_columns, shifts_bias
from hwsearch.compress.widths import in_slots, out_slots
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.trace import Traced

Order = Mapping[str, NDArray[np.int64]]
"""For each group the positions of its slots, most important first."""


def order_slots(
    batches: Sequence[Batch], *, grams: Grams | None = None, seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """Positions (0 .. channels - 1) of each group's slots, most important first.

    Slots are removed one by one, each time the one whose removal, with all that is left refitted, changes least what consumers
    put out (`gram`), channels of their outputs weighed by their Fisher information.

    grams: those of the batches where they are known already. Deterministic for one seed.
    """
    return _eliminated(batches, grams or Grams(batches), seed)


def magnitude(traced: Traced, group: str) -> NDArray[np.float64]:
    """Of each slot the squared l2 norm of what stores it in producers and consumers, each relative to its whole."""
    slots = traced.channels.groups[group]
    scores = np.zeros(len(slots))
    units = dict.fromkeys((*traced.channels.producers[group], *traced.channels.consumers[group]))
    for unit in units:
        weight = traced.weight(unit)
        assert weight is not None
        for axis in (in_slots(traced, unit), out_slots(traced, unit)):
            if axis is not None:
                norms = (
                    weight.double().square().sum([d for d in range(weight.dim()) if d != axis.axis]).numpy()
                )
                own = _by_slot(axis.slots, norms[None], slots)[0]
                scores += own / (own.sum() or 1.0)
    return scores


def _by_slot(
    labels: NDArray[np.int64], values: NDArray[Any], slots: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sums of values [n, len(labels)] over the indices of each slot, [n, len(slots)]."""
    place = np.full(max(int(labels.max()), int(slots.max())) + 1, -1)
    place[slots] = np.arange(len(slots))
    to = place[labels]
    found = np.zeros((len(slots), len(values)))
    np.add.at(found, to[to >= 0], np.asarray(values, np.float64).T[to >= 0])
    return found.T


# ---- gradients of the loss with respect to gates


def gate_gradients(
    batches: Sequence[Batch], seed: int = 0
) -> tuple[dict[str, list[NDArray[np.float64]]], dict[str, NDArray[np.float64]]]:
    """One backward pass a batch.

    (for each group and batch the gradient [samples, slots] of each sample's loss with respect to gates on its slots;
    for each consumer of a group the mean square of the loss's gradient at its output, by channel of its output.)
    The loss is the cross-entropy against labels drawn from the network's own outputs; where these are no class logits,
    half the squared distance from the outputs with unit noise. Its expected square is the Gauss-Newton matrix. What is NaN or
    infinite, behind a function without a derivative where it was taken, counts as zero. Operators of which
    torch has no derivative pass no gradient: what is before them alone has gradients of zero, and no mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    gates: dict[str, list[NDArray[np.float64]]] = {}
    squares: dict[str, list[NDArray[np.float64]]] = {}
    for traced, args, kwargs in batches:
        flat = flat_inputs(traced.graph, args, kwargs)
        samples = next(
            (t.shape[0] for t in pytree.tree_leaves(flat) if isinstance(t, torch.Tensor) and t.dim()), 1
        )
        reads, puts, found = _gradients(traced, flat, samples, generator)
        own: dict[str, NDArray[np.float64]] = {}
        for (axis, labels, x), grad in zip(reads, found, strict=False):
            if grad is None:
                continue
            each = (x.detach() * grad).nan_to_num(0.0, 0.0, 0.0).movedim(axis, -1)
            rows = samples if each.shape[0] % samples == 0 else 1
            sums = each.reshape(rows, -1, each.shape[-1]).sum(1).numpy()
            for group, slots in traced.channels.groups.items():
                if np.isin(labels, slots).any():
                    gate = _by_slot(labels, sums, slots)
                    own[group] = own[group] + gate if group in own else gate
        for group, gate in own.items():
            gates.setdefault(group, []).append(gate)
        for (unit, axis, _), grad in zip(puts, found[len(reads) :], strict=True):
            if grad is not None:
                square = grad.double().nan_to_num(0.0, 0.0, 0.0).square().movedim(axis, -1).flatten(0, -2)
                squares.setdefault(unit, []).append(square.mean(0).numpy())
    for group, slots in batches[0][0].channels.groups.items():
        gates.setdefault(group, [np.zeros((1, len(slots)))])
    return gates, {unit: np.mean(own, axis=0) for unit, own in squares.items()}


def removal_losses(
    batches: Sequence[Batch], order: Order, cuts: Sequence[tuple[str, int]], seed: int = 0
) -> dict[tuple[str, int], float]:
    """A second-order estimate of the loss of each (group, width), nothing refitted, from one backward pass for all.

    Half the mean over samples of (sum of the gradients of the gates of all slots removed)^2: the Gauss-Newton form of the
    divergence (Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, with the terms between
    slots kept).
    """
    gates = {g: np.concatenate(own) for g, own in gate_gradients(batches, seed)[0].items()}
    return {(g, w): float(np.square(gates[g][:, order[g][w:]].sum(1)).mean()) / 2 for g, w in cuts}


Read = tuple[int, NDArray[np.int64], torch.Tensor]
"""(axis, slots along it, tensor) of what a consumer reads"""
Put = tuple[str, int, torch.Tensor]
"""(unit, axis of its channels, tensor) of what a consumer puts out"""


def _gradients(
    traced: Traced, flat: Sequence[Any], samples: int, generator: torch.Generator
) -> tuple[list[Read], list[Put], tuple[torch.Tensor | None, ...]]:
    """What consumers of groups read and put out, and the gradient of the loss for each of these.

    Where torch has no derivative of an operator, the run is repeated with what that operator puts out as a constant.
    """
    state = generator.get_state()
    for checked in (False, True):
        generator.set_state(state)
        run = _Gated(traced, checked)
        try:
            with torch.enable_grad():
                loss = _probe(run.run(*flat, enable_io_processing=False), samples, generator)
                wanted = [x for *_, x in (*run.reads, *run.puts)]
                if not loss.requires_grad:
                    break
                return run.reads, run.puts, torch.autograd.grad(loss, wanted, allow_unused=True)
        except RuntimeError:
            if checked:
                raise
    return run.reads, run.puts, (None,) * len(wanted)


class _Gated(fx.Interpreter):
    """Keeps what consumers of groups read, each its own copy, and what they put out.

    checked: what an operator without a derivative puts out is a constant.
    """

    def __init__(self, traced: Traced, checked: bool = False) -> None:
        super().__init__(traced.graph)
        self.traced, self.checked = traced, checked
        consumers = {u for own in traced.channels.consumers.values() for u in own}
        self.sites = {s.node: (u, s) for u in consumers for s in traced.sites[u]}
        self.reads: list[Read] = []
        self.puts: list[Put] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.sites:
            value = super().run_node(n)
            if (
                self.checked
                and n.op == "call_function"
                and not _derivable(n, *self.fetch_args_kwargs_from_env(n))
            ):
                return pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, value)
            return value
        unit, site = self.sites[n.name]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        new = list(args)
        for position in site.activations:
            source = n.args[position]
            assert isinstance(source, fx.Node)
            axes = self.traced.channels.nodes.get(source.name, [[]])[0]
            x = args[position].clone()
            if not x.requires_grad:
                x.requires_grad_()
            new[position] = x
            self.reads += [(axis.axis, axis.slots, x) for axis in axes]
        y = n.target(*new, **kwargs)  # type: ignore[operator]
        conv = self.traced.network[unit].op.startswith("conv")
        channel = y.dim() - (len(self.traced.network[unit].weight_shape) - 1) if conv else y.dim() - 1
        self.puts.append((unit, channel, y))
        return y


def _derivable(n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch has the derivative of a call for all that it is derived for."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    free = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in leaves]
    wanted = [x for x in free if isinstance(x, torch.Tensor) and x.requires_grad]
    own, options = pytree.tree_unflatten(free, spec)
    result = pytree.tree_leaves(n.target(*own, **options))  # type: ignore[operator]
    sums = [y.sum() for y in result if isinstance(y, torch.Tensor) and y.requires_grad]
    if not sums:
        return True
    try:
        torch.autograd.grad(sum(sums, torch.zeros(())), wanted, allow_unused=True)
    except RuntimeError:
        return False
    return True


def _probe(output: Any, samples: int, generator: torch.Generator) -> torch.Tensor:
    """A random loss whose gradient's covariance is the Fisher matrix of the outputs, summed over samples."""
    total = torch.zeros(())
    for y in pytree.tree_leaves(output):
        if not isinstance(y, torch.Tensor) or not y.is_floating_point() or not y.requires_grad:
            continue
        axis = -1 if y.dim() != 4 else 1
        if y.dim() >= 2 and y.shape[axis] >= 2:
            logits = y.movedim(axis, -1).flatten(0, -2)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            share = samples / len(logits)
            total = total - share * logits.log_softmax(-1).gather(1, labels).sum()
        else:
            noise = torch.randn(y.shape, generator=generator)
            scale = float(y.detach().square().mean().sqrt()) or 1.0
            total = total + (y * noise).sum() / scale
    return total


# ---- elimination


PANEL = 48
"""Features that are removed before what they change is taken into the matrices, in one product."""


class Consumer:
    """A consumer of a group, where slots are being removed: the inverse H of its Gram matrix, and Q = W^T W of its weight W.

    Removing the features S of a slot, with R R^T = H_SS, takes L L^T from H and L V^T + V L^T from Q, where L = H_:S R^-T,
    V = Q_:S R^-T - L R^-1 Q_SS R^-T / 2: what the optimal update W - W_S H_SS^-1 H_S: leaves. Of both only the columns of the
    slot that goes and the blocks of each slot are kept up to date; the rest is, every `PANEL` features.
    """

    def __init__(self, weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor) -> None:
        self.inverse, self.product = inverse, weight.T @ weight
        self.columns = columns
        """[slots, features of each]"""
        of = columns[:, :, None], columns[:, None, :]
        self._inverses, self._products = inverse[of], self.product[of]
        self._forget()

    def _forget(self) -> None:
        self._left = self.inverse.new_empty(len(self.inverse), PANEL + self.columns.shape[1])
        self._right, self._count = torch.empty_like(self._left), 0

    def errors(self, left: torch.Tensor) -> torch.Tensor:
        """What removing each slot would add to the error of its output, the rest refitted: trace W_s (H_ss)^-1 W_s^T."""
        inverses, products = self._inverses[left], self._products[left]
        if self.columns.shape[1] == 1:
            single: torch.Tensor = products[:, 0, 0] / inverses[:, 0, 0]
            return single
        solved = torch.cholesky_solve(products, torch.linalg.cholesky(inverses))
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, slot: int) -> None:
        features, count = self.columns[slot], self._count
        done, beside = self._left[:, :count], self._right[:, :count]
        own = self.inverse[:, features] - done @ done[features].T
        both = self.product[:, features] - done @ beside[features].T - beside @ done[features].T
        root = torch.linalg.cholesky(own[features])
        left = torch.linalg.solve_triangular(root, own.T, upper=False).T
        right = torch.linalg.solve_triangular(root, both.T, upper=False).T
        right = right - left @ torch.linalg.solve_triangular(root, right[features], upper=False) / 2
        self._left[:, count : count + len(features)] = left
        self._right[:, count : count + len(features)] = right
        self._count += len(features)
        ours, theirs = left[self.columns], right[self.columns]
        self._inverses -= ours @ ours.mT
        self._products -= ours @ theirs.mT + theirs @ ours.mT
        if self._count >= PANEL:
            self._update()

    def _update(self) -> None:
        left, right = self._left[:, : self._count], self._right[:, : self._count]
        self.inverse.addmm_(left, left.T, alpha=-1)
        self.product.addmm_(left, right.T, alpha=-1)
        self.product.addmm_(right, left.T, alpha=-1)
        self._count = 0

    def compact(self, left: torch.Tensor) -> None:
        """Forget the features of slots that are gone."""
        self._update()
        stay = torch.ones(len(self.inverse), dtype=torch.bool)
        stay[self.columns.flatten()] = False
        stay[self.columns[left].flatten()] = True
        number = torch.cumsum(stay, 0) - 1
        self.inverse, self.product = self.inverse[stay][:, stay], self.product[stay][:, stay]
        self.columns = number[self.columns]
        self._forget()


def _eliminated(batches: Sequence[Batch], grams: Grams, seed: int) -> dict[str, NDArray[np.int64]]:
    traced = batches[0][0]
    information = gate_gradients(batches, seed)[1]
    found = {}
    for group in traced.channels.groups:
        consumers = consumers_of(traced, grams, group, information)
        if consumers:
            found[group] = _eliminate(consumers.values())
        else:
            found[group] = np.argsort(-magnitude(traced, group), kind="stable").astype(np.int64)
    return found


def consumers_of(
    traced: Traced, grams: Grams, group: str, information: Mapping[str, NDArray[np.float64]]
) -> dict[str, Consumer]:
    """The units that read a group and can be refitted. information: of each, of the channels of its output (`gate_gradients`)."""
    read = (unit for unit in traced.channels.consumers[group] if unit in grams)
    made = {unit: _consumer(traced, grams, group, unit, information.get(unit)) for unit in read}
    return {unit: consumer for unit, consumer in made.items() if consumer is not None}


def _consumer(
    traced: Traced, grams: Grams, group: str, unit: str, information: NDArray[np.float64] | None
) -> Consumer | None:
    axis, slots = in_slots(traced, unit), traced.channels.groups[group]
    own = [np.flatnonzero(axis.slots == s) for s in slots.tolist()] if axis is not None else []
    if len({len(o) for o in own}) != 1 or not len(own[0]):
        return None
    weight = traced.weight(unit)
    assert weight is not None
    columns = as_columns(traced.network[unit], weight).double().clone()
    second = grams[unit].moments(shifts_bias(traced, unit))[0]
    if information is not None and information.any():
        columns *= torch.from_numpy(np.sqrt(np.repeat(information, len(columns) // len(information))))[
            :, None
        ]
    else:
        columns /= math.sqrt(float(torch.einsum("of,fg,og->", columns, second, columns)) or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(second, grams.ridges[unit])))
    features = [feature_columns(traced.network[unit], o) for o in own]
    return Consumer(columns, inverse, torch.from_numpy(np.stack(features)))


def _eliminate(consumers: Iterable[Consumer]) -> NDArray[np.int64]:
    """The order in which greedy backward elimination removes slots, last one first."""
    consumers = list(consumers)
    left = torch.arange(len(consumers[0].columns))
    compacted, removed = len(left), []
    while len(left) > 1:
        worst = int(torch.stack([c.errors(left) for c in consumers]).sum(0).argmin())
        slot = int(left[worst])
        removed.append(slot)
        left = torch.cat([left[:worst], left[worst + 1 :]])
        for consumer in consumers:
            consumer.remove(slot)
        if len(left) < 0.8 * compacted:
            compacted = len(left)
            for consumer in consumers:
                consumer.compact(left)
    return np.array([*left.tolist(), *reversed(removed)], np.int64)

"""A narrow network beside the dense one: each unit refitted on what it really reads, in order of execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from hwsearch.compress.formats import stored
from hwsearch.compress.gram import (
    MOST_FEATURES,
    RIDGE,
    RIDGES,
    ROWS,
    Batch,
    Gptq,
    Sample,
    as_columns,
    as_node,
    damping,
    from_columns,
    kept_apart,
    outputs,
    patches,
    seeded,
    shifts_bias,
    squares,
    with_one,
)
from hwsearch.compress.widths import Kept, Weights, narrow, put_weights
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.canonical import aten
from hwsearch.graph.narrow import cut
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site
from hwsearch.network.network import Unit
from hwsearch.network.variants import INT8_BITS, STORAGE, Variant, ineligible, int8_levels


def refit_sequential(
    batches: Sequence[Batch],
    kept: Kept,
    weights: Weights,
    variants: Mapping[str, Variant] | None = None,
    *,
    rows: int = ROWS,
    seed: int = 0,
    int8_bits: int = INT8_BITS,
) -> Weights:
    """`weights` of the narrow network, and of its other units, each regressed on what it really reads.

    In order of execution: the targets are the dense network's outputs, the features what arrives in the narrow network with
    all corrections before, so that errors do not add up (He, Zhang and Sun, Channel Pruning, 2017). Where the unit's output
    is added to a tensor that is there already, the unit takes up that one's error as well. Regularised towards `weights`, by
    as much as is best, fitted on the first three quarters of the batches, on the last quarter.
    Transposed convolutions are only recalibrated; units that run more than once, or share their weight with an embedding or their
    bias, stay, and so does what reads the dense network's own numbers. Weights that are only stored in int8 (w8) count as float
    ones. variants: units are rounded on the way (int8 by `Gptq`; other formats, N:M weights
    and convolutions in groups to nearest, with the bias for the outputs' means), so that later units see the rounding.
    int8_bits: of int8 weights.
    """
    chosen, run = variants or {}, _SideBySide(batches, kept, weights).run
    return run(
        lambda step: _regressed(step, rows, seed, chosen.get(step.unit.name, Variant("fp32")), int8_bits)
    )


@dataclass
class _Step:
    """A unit about to run in the narrow network: for each batch what it reads there, and what it ought to put out."""

    traced: Traced
    unit: Unit
    node: fx.Node
    site: Site
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: Callable[[], Iterator[torch.Tensor]]
    """Runs the unit as it is."""


_Solved = tuple[torch.Tensor, torch.Tensor | None]


class _SideBySide:
    """Runs a dense and a narrow network on all batches at once, node by node."""

    def __init__(self, batches: Sequence[Batch], kept: Kept, weights: Weights) -> None:
        self.dense = batches[0][0]
        self.narrow = narrow(self.dense, kept, weights)
        self.mask = self.dense.channels.mask(kept)
        own = [batch for batch in batches if batch[0] is self.dense]
        self.pairs = [
            (_Stepper(self.dense.graph, flat), _Stepper(self.narrow.graph, flat))
            for flat in (flat_inputs(traced.graph, args, kwargs) for traced, args, kwargs in own)
        ]
        self.weights = dict(weights)
        self.units = {
            calls[0].node: (unit, calls[0])
            for unit, calls in self.dense.sites.items()
            if len(calls) == 1 and not self.dense.network[unit].tied
        }

    def run(self, solve: Callable[[_Step], _Solved | None]) -> Weights:
        """Weights and biases with every solution put in place before the next unit runs."""
        with torch.no_grad():
            nodes = zip(self.dense.graph.graph.nodes, self.narrow.graph.graph.nodes, strict=True)
            for node, slim in nodes:
                if node.op == "output":
                    break
                for dense, _ in self.pairs:
                    dense.step(node)
                if node.name in self.units and self.units[node.name][1].weight is not None:
                    self._correct(node, slim, solve)
                for dense, narrow_ in self.pairs:
                    narrow_.step(slim)
                    dense.forget(node)
                    narrow_.forget(slim)
        return self.weights

    def _correct(self, node: fx.Node, slim: fx.Node, solve: Callable[[_Step], _Solved | None]) -> None:
        name, site = self.units[node.name]
        unit = self.narrow.network[name]
        weight, bias = self.narrow.weight(name), self.narrow.bias(name)
        assert weight is not None
        step = _Step(
            self.narrow, unit, slim, site,
            inputs=[n.env[as_node(slim.args[site.activations[0]])] for _, n in self.pairs],
            targets=[self._target(node, slim, d, n) for d, n in self.pairs],
            weight=weight, bias=bias, outputs=lambda: (n.run_node(slim) for _, n in self.pairs),
        )  # fmt: skip
        if not all(bool(torch.isfinite(t).all()) for t in (*step.inputs, *step.targets)):
            return  # infinity is legal within a network, and nothing can be regressed on it
        solved = solve(step)
        if solved is None:
            return
        self.weights[name] = solved
        put_weights(self.narrow, {name: solved})
        for _, stepper in self.pairs:
            for source in slim.all_input_nodes:
                if source.op == "get_attr":
                    stepper.step(source)

    def _target(self, node: fx.Node, slim: fx.Node, dense: _Stepper, narrow_: _Stepper) -> torch.Tensor:
        def left(n: fx.Node) -> torch.Tensor:
            axes = self.dense.channels.nodes.get(n.name, [[]])[0]
            return cut(dense.env[n], axes, self.mask)

        target = left(node)
        added, users = list(slim.users), list(node.users)
        if len(users) == 1 and users[0].target is aten.add.Tensor and not users[0].kwargs:
            for other, own in zip(users[0].args, added[0].args, strict=True):
                if not isinstance(other, fx.Node) or not isinstance(own, fx.Node):
                    continue
                if other is not node and other in dense.env and own in narrow_.env:
                    have = narrow_.env[own]
                    if isinstance(have, torch.Tensor) and have.shape == target.shape:
                        return target + left(other) - have
        return target


class _Stepper(fx.Interpreter):
    """Runs a graph node by node, when told to."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__(graph)
        self.args_iter = iter(inputs)

    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)

    def forget(self, node: fx.Node) -> None:
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]


def _moments(step: _Step) -> _Solved | None:
    """Scale and shift of each output channel that give the targets' mean and deviation."""
    name = step.unit.name
    if not shifts_bias(step.traced, name) and "transpose" not in step.unit.op:
        return None
    if step.bias is None:
        return None
    have = _mean_and_deviation([outputs(step.unit, y) for y in step.outputs()])
    want = _mean_and_deviation([outputs(step.unit, y) for y in step.targets])
    scale = (want[1] / have[1].clamp_min(1e-12)).clamp(0.5, 2.0)
    shape = [-1 if d == step.unit.out_axis else 1 for d in range(step.weight.dim())]
    if step.unit.op.startswith("conv_transpose") and dict(step.unit.attributes).get("groups", "1") != "1":
        scale = torch.ones_like(scale)  # several output channels share an index of the weight
    else:
        weight = (step.weight.double() * scale.reshape(shape)).float()
    bias = scale * (step.bias.double() - have[0]) + want[0]
    return (weight if float((scale - 1).abs().max()) else step.weight), bias.float()


def _mean_and_deviation(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel (the last axis), over all else."""
    flat = [v.reshape(-1, v.shape[-1]) for v in values]
    count = sum(len(v) for v in flat)
    mean = torch.stack([v.double().sum(0) for v in flat]).sum(0) / count
    square = torch.stack([(v.double() - mean).square().sum(0) for v in flat]).sum(0) / count
    return mean, square.sqrt()


@dataclass
class Moments:
    """Means over positions, group by group: of z z^T and of y z^T, z what is read with a one after it, y the target."""

    second: torch.Tensor
    cross: torch.Tensor
    rows: int = 0
    _enough: dict[bool, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __add__(self, other: Moments) -> Moments:
        rows = self.rows + other.rows
        own, new = self.rows / rows, other.rows / rows
        return Moments(self.second * own + other.second * new, self.cross * own + other.cross * new, rows)

    def solve(
        self, prior: torch.Tensor, ridge: float, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weight [groups, out, features], its bias [groups, out], the regularised second moments)."""
        second, cross = self.second[:, :-1, :-1], self.cross[:, :, :-1]
        goal = self.cross[:, :, -1]
        if bias:
            mean = self.second[:, :-1, -1]
            second = second - mean[:, :, None] * mean[:, None, :]
            cross = cross - goal[:, :, None] * mean[:, None, :]
        level = self._enough[bias] = damping(second, ridge, self._enough.get(bias))
        second = second + level * torch.eye(second.shape[-1], dtype=second.dtype)
        factor = torch.linalg.cholesky(second)
        new = torch.cholesky_solve((cross + level * prior).transpose(1, 2), factor).transpose(1, 2)
        return new, self.shift(new) if bias else torch.zeros_like(goal), second

    def shift(self, weight: torch.Tensor) -> torch.Tensor:
        """The bias with which a weight's outputs have the targets' mean."""
        return self.cross[:, :, -1] - (weight @ self.second[:, :-1, -1:])[:, :, 0]

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """E|y - W x - b|^2, but for what does not depend on W and b."""
        whole = torch.cat([weight, bias[:, :, None]], 2)
        return float((whole * (whole @ self.second - 2 * self.cross)).sum())


def _regressed(step: _Step, rows: int, seed: int, variant: Variant, int8_bits: int) -> _Solved | None:
    """Least squares of the targets on the inputs, rounded; convolutions in groups, group by group."""
    unit = step.unit
    rounds = not variant.plain and variant != STORAGE and not ineligible(unit, variant)
    if not rounds and all(_alike(y, want) for y, want in zip(step.outputs(), step.targets, strict=True)):
        return None
    if "transpose" in unit.op or (step.bias is not None and not shifts_bias(step.traced, unit.name)):
        return _moments(step)
    groups = int(dict(unit.attributes).get("groups", "1"))
    matrix = as_columns(unit, step.weight).double()
    prior = matrix.reshape(groups, -1, matrix.shape[1])
    features = prior.shape[2]
    if features > MOST_FEATURES:
        return _moments(step)
    apart = kept_apart(len(step.inputs))
    parts: list[Moments] = []
    count = -(-max(rows, 10 * features) // len(step.inputs))
    for index, (x, y) in enumerate(zip(step.inputs, step.targets, strict=True)):
        view, lead = patches(step.node, unit, x)
        sample = Sample.draw(tuple(view.shape[:lead]), count, seeded(seed, index, step.node.name))
        own = sample.rows(view)
        own = with_one(own.reshape(len(own), groups, features).transpose(0, 1))
        target = sample.rows(outputs(unit, y))
        target = target.reshape(len(target), groups, -1).permute(1, 2, 0)
        number = own.shape[1]
        second = squares(own[0])[None] if groups == 1 else own.transpose(1, 2) @ own
        new = Moments(second.double() / number, (target @ own).double() / number, number)
        if index in (0, apart):
            parts.append(new)
        else:
            parts[-1] += new
    has_bias, ridge = step.bias is not None, RIDGE
    if len(parts) == 2:
        ridge = min(RIDGES, key=lambda r: parts[1].error(*parts[0].solve(prior, r, has_bias)[:2]))
    moments = parts[0] + parts[1] if len(parts) == 2 else parts[0]
    weight, bias, second = moments.solve(prior, ridge, has_bias)
    if rounds:
        weight = _rounded(unit, variant, weight, second, int8_bits)
        bias = moments.shift(weight) if has_bias else bias
    return (
        from_columns(unit, weight.reshape(matrix.shape)).float().contiguous(),
        bias.flatten().float() if has_bias else None,
    )


def _alike(have: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two outputs differ by no more than the order of float additions."""
    return float((have - want).abs().max()) <= 1e-5 * float(want.abs().max()) if want.numel() else True


def _rounded(
    unit: Unit, variant: Variant, weight: torch.Tensor, second: torch.Tensor, int8_bits: int
) -> torch.Tensor:
    """A weight [groups, out, features] on the grid of a variant. second: its regularised second moments."""
    if len(weight) == 1 and variant == Variant("int8"):
        return Gptq(int8_levels(int8_bits))(weight[0], second[0])[None]
    whole = from_columns(unit, weight.flatten(0, 1)).float()
    values = torch.from_numpy(np.ascontiguousarray(stored(whole, unit, variant, int8_bits).dequantized()))
    return as_columns(unit, values).to(weight.dtype).reshape(weight.shape)

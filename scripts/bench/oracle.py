#!/usr/bin/env python
"""The Taylor oracle: what removing each channel alone costs, beside what each measure of importance says (Molchanov et al. 2019).

Each slot of each channel group is removed from the dense network by itself, simulated in torch. Its loss is the divergence from the
dense network's outputs on samples of the calibration data; importances are found on the first three quarters of these, as ever:

    taylor     square of the mean gradient of a gate on the slot, mean over batches
    fisher     mean over samples of the squared gradient; for both, labels are drawn from the network's own outputs
    obs        what the removal changes in what consumers put out where all that is left is refitted: the first step of `order`
    order      the order that hwsearch removes slots in (`order_slots`), by position; it has no meaning across groups
    magnitude  of the weights that the slot is stored in
    random

Printed are Spearman's and Pearson's correlation with the losses for each group, their mean over groups, and for all slots at once.
With --refit the loss is that of the removal with consumers refitted, as hwsearch removes slots. Then shares of each group's slots
are removed at once by each order, consumers refitted: the divergence that an order is chosen for.

    python scripts/bench/oracle.py zoo:fashion_resnet
    python scripts/bench/oracle.py zoo:fashion_resnet --samples 256 --refit
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import fx

import hwsearch as hs
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.gram import Batch, Grams, as_columns, from_columns, shifts_bias
from hwsearch.compress.importance import Consumer, consumers_of, gate_gradients, magnitude, order_slots
from hwsearch.compress.simulate import Replaced, Simulator
from hwsearch.compress.widths import in_slots
from hwsearch.graph.canonical import aten
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site
from hwsearch.loss.divergence import divergence
from hwsearch.lowering.lowering import Lowering

Scores = Mapping[str, NDArray[np.float64]]
"""Group -> of each slot how important it is."""
ORDER = "order"


def main() -> None:
    parser = common.parser(__doc__, tasks=["zoo:fashion_resnet"])
    parser.add_argument("--samples", type=int, default=1000, help="that losses are measured on, at most")
    parser.add_argument("--refit", action="store_true", help="refit consumers after each removal")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.75, 0.5, 0.25], help="of slots that are left, of each group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.say_machine()
    for spec in args.tasks:
        bench(spec, args)


def bench(spec: str, args: argparse.Namespace) -> None:
    low = Lowering(hs.load(spec))
    print(f"\n{spec}: {sum(low.network.channels.values())} slots in {len(low.network.channels)} channel groups")
    grams = Grams(low.fitting, [u.name for u in low.network.units])
    information = gate_gradients(low.fitting, args.seed)[1]
    found = importances(low, grams, information, args.seed)
    losses, samples, seconds = oracle(low, grams, information, args)
    print(f"  {samples} samples, {'consumers refitted' if args.refit else 'nothing refitted'}, {seconds:.0f} s; "
          "Spearman, Pearson with the oracle")  # fmt: skip
    correlations(found, losses)
    if args.shares:
        removed_at_once(low, grams, found, args.shares)


def importances(low: Lowering, grams: Grams, information: Scores, seed: int) -> dict[str, Scores]:
    """By name."""
    traced, random = low.traced, np.random.default_rng(seed)
    gates = gate_gradients(low.fitting, seed)[0]
    obs = {}
    for group, slots in traced.channels.groups.items():
        consumers = consumers_of(traced, grams, group, information).values()
        errors = [c.errors(torch.arange(len(slots))).numpy() for c in consumers]
        obs[group] = np.sum(errors, axis=0) if errors else magnitude(traced, group)
    order = order_slots(low.fitting, grams=grams, seed=seed)
    return {
        "taylor": {g: np.mean([np.square(x.mean(0)) for x in own], axis=0) for g, own in gates.items()},
        "fisher": {g: np.mean([np.square(x).mean(0) for x in own], axis=0) for g, own in gates.items()},
        "obs": obs,
        ORDER: {g: -np.argsort(own).astype(float) for g, own in order.items()},
        "magnitude": {g: magnitude(traced, g) for g in order},
        "random": {g: random.random(len(own)) for g, own in order.items()},
    }


# ---------------------------------------------------------------- single removals


class Removals(Simulator):
    """Simulates removals of single slots. short: a convolution that reads what it always does computes only what it loses."""

    short = True

    def product(self, node: fx.Node, site: Site, args: list[Any], kwargs: dict[str, Any]) -> Any:
        own = self.traced.network[self.site[node.name][0]]
        dense, plain = self.traced.weight(own.name), dict(own.attributes).get("groups", "1") == "1"
        source: Any = node.args[0]
        if self.short and plain and node.target is aten.conv2d.default and args[0] is self.values[source]:
            change = args[1] - dense
            lost = torch.nonzero(change.abs().amax((0, 2, 3))).flatten()
            if 2 * len(lost) < change.shape[1]:
                left = [args[0].index_select(1, lost), change.index_select(1, lost), None, *args[3:]]
                return self.values[node] + node.target(*left, **{k: v for k, v in kwargs.items() if k != "bias"})
        return super().product(node, site, args, kwargs)


def oracle(
    low: Lowering, grams: Grams, information: Scores, args: argparse.Namespace
) -> tuple[dict[str, NDArray[np.float64]], int, float]:
    """(group -> of each slot the mean loss of a sample without it; samples; seconds)."""
    began, batches, samples = time.perf_counter(), [], 0
    for _, inputs, named in low.calibration:
        rows = min(len(next(x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor))), args.samples - samples)
        if rows > 0:
            batches.append(cut(low, inputs, named, rows))
            samples += rows
    found = {}
    for group, slots in low.traced.channels.groups.items():
        consumers = consumers_of(low.traced, grams, group, information) if args.refit else {}
        losses = np.zeros(len(slots))
        for traced, inputs, named in batches:
            simulate = Removals(traced, inputs, named, {}, {})
            simulate.short = False
            whole = lost(low, simulate, group, 0, grams, consumers)
            simulate.short = not args.refit
            own = [lost(low, simulate, group, slot, grams, consumers) for slot in range(len(slots))]
            assert np.isclose(own[0], whole, rtol=1e-2, atol=1e-6), f"{own[0]} by what is lost, {whole} by what is left"
            losses += own
        found[group] = losses / samples
        print(f"    {group}: {len(slots)} slots, loss {found[group].min():.2e} to {found[group].max():.2e}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return found, samples, time.perf_counter() - began


def cut(low: Lowering, inputs: tuple[Any, ...], named: Mapping[str, Any], rows: int) -> Batch:
    """A batch's first samples, with a trace for their shape."""
    def first(x: Any) -> Any:
        return x[:rows] if isinstance(x, torch.Tensor) and x.dim() else x

    own, by_name = tuple(map(first, inputs)), {k: first(x) for k, x in named.items()}
    return low.traced_for(by_name or own, "calibration data"), own, by_name


def lost(
    low: Lowering, simulate: Simulator, group: str, slot: int, grams: Grams, consumers: Mapping[str, Consumer]
) -> float:
    """The summed loss of a batch's samples without a slot. consumers: those to refit."""
    weights = without(low.traced, group, slot)
    for unit, consumer in consumers.items():
        weights[unit] = refitted(low.traced, grams, unit, consumer.inverse, consumer.columns[slot])
    mask = low.traced.channels.mask({group: [s for s in range(low.network.channels[group]) if s != slot]})
    return divergence(simulate({}, weights, mask), simulate.dense, low.task.divergence, low.batch_axes)[0]


def without(traced: Traced, group: str, slot: int) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights of all that reads a slot, with zeros for it."""
    number, found = traced.channels.groups[group][slot], {}
    for unit in traced.sites:
        axis, weight = in_slots(traced, unit), traced.weight(unit)
        if weight is not None and axis is not None and number in axis.slots:
            found[unit] = weight.index_fill(axis.axis, torch.from_numpy(np.flatnonzero(axis.slots == number)), 0.0), None
    return found


def refitted(
    traced: Traced, grams: Grams, unit: str, inverse: torch.Tensor, gone: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A consumer's weight and bias without some features: the Optimal Brain Surgeon's update."""
    own, weight, bias = traced.network[unit], traced.weight(unit), traced.bias(unit)
    assert weight is not None
    columns = as_columns(own, weight).double()
    new = columns - columns[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    new[:, gone] = 0.0
    if bias is not None and shifts_bias(traced, unit):
        bias = (bias.double() + (columns - new) @ grams[unit].moments(True)[1]).float()
    return from_columns(own, new).float(), bias


# ---------------------------------------------------------------- what is printed


def correlations(found: Mapping[str, Scores], losses: Scores) -> None:
    rows: dict[str, list[str]] = {}
    for name, scores in found.items():
        each = {g: correlated(scores[g], own) for g, own in losses.items() if len(own) > 2}
        rows[name] = [f"{rank:5.2f} {straight:5.2f}" for rank, straight in each.values()]
        rows[name].append("{:5.2f} {:5.2f}".format(*np.nanmean(list(each.values()), axis=0)))
        pooled = correlated(*(np.concatenate([s[g] for g in losses]) for s in (scores, losses)))
        rows[name].append("          -" if name == ORDER else f"{pooled[0]:5.2f} {pooled[1]:5.2f}")
    groups = [f"{g} ({len(own)})" for g, own in losses.items() if len(own) > 2]
    print("  | | " + " | ".join(rows) + " |")
    for number, what in enumerate([*groups, "mean of groups", f"all {sum(map(len, losses.values()))} at once"]):
        print(f"  | {what} | " + " | ".join(own[number] for own in rows.values()) + " |", flush=True)


def correlated(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """(Spearman's, Pearson's); NaN where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan")
    return float(spearmanr(a, b).statistic), float(np.corrcoef(a, b)[0, 1])


def removed_at_once(low: Lowering, grams: Grams, found: Mapping[str, Scores], shares: Sequence[float]) -> None:
    """The divergence of each group alone at shares of its slots, refitted, by each order."""
    orders = {name: {g: np.argsort(-s, kind="stable") for g, s in scores.items()} for name, scores in found.items()}
    print("  slots removed at once, consumers refitted: divergence on the last quarter of calibration data over that by `order`, "
          "geometric mean over groups")  # fmt: skip
    simulators = [Simulator(t, a, k, {}, {}) for t, a, k in low.scoring]
    for share in shares:
        row: dict[str, list[float]] = {}
        for name, order in orders.items():
            bank = WeightBank(None, low.traced, low.fitting, order, grams=grams)
            row[name] = []
            for group, channels in low.network.channels.items():
                widths = {group: max(1, round(share * channels))}
                weights: Replaced = bank.masked_weights(widths)
                outputs = [(s({}, weights, bank.mask(widths)), s.dense) for s in simulators]
                row[name].append(sum(divergence(y, y0, low.task.divergence, low.batch_axes)[0] for y, y0 in outputs))
        ratio = {name: np.exp(np.mean(np.log(own) - np.log(row[ORDER]))) for name, own in row.items()}
        print(f"    {share:.0%} left: " + ", ".join(f"{name} {r:.2f}" for name, r in ratio.items()))


if __name__ == "__main__":
    main()

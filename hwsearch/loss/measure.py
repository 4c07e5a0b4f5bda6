"""Measuring a SensitivityTable: every variant and width simulated in torch on calibration data, then whole networks put together
of them, from which is learnt what the sum of their losses misses.

Batch by batch; what is finished is kept beside the table, so that a killed run resumes at the next one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils import _pytree as pytree

from hwsearch.compress.bank import METHOD as REFIT_METHOD
from hwsearch.compress.bank import Elsewhere, WeightBank
from hwsearch.compress.importance import removal_losses
from hwsearch.compress.simulate import Simulator
from hwsearch.device.timelimit import TimeLimit
from hwsearch.files import changed, write_bytes
from hwsearch.loss.divergence import divergence
from hwsearch.loss.interactions import LEAST, Agreement, Correction, learn
from hwsearch.loss.interactions import METHOD as LEARNING_METHOD
from hwsearch.loss.stitched import ROUND, stitched
from hwsearch.loss.table import GROUP, NOT_FINITE, UNIT, SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, legal
from hwsearch.progress import Progress

if TYPE_CHECKING:
    from hwsearch.loss.cluster import Cluster

METHOD = 2
"""Of measuring losses, counted up whenever it computes something else."""
SAMPLES = 256
"""Samples that losses are of, at most."""
LEAST_SAMPLES, COMPUTED = 8, 1e13
"""... and no more than the first of a network whose units times its MACs for all samples are above the second: about what two cores
compute in a few minutes."""
STITCHED = 48
"""Stitched networks that interactions are learnt from, where there is time; each takes a forward pass on every batch."""
MOST_WIDTHS = 150
"""Of more (group, width) the costliest by their Fisher estimate are not measured."""

REFITTING, SCORING, STITCHING = "refitting weights", "the sensitivities", "stitched networks"
"""Stages of a whole run that are planned; see `Progress.plan`."""

Vector = np.ndarray[Any, np.dtype[np.float64]]

Choice = tuple[Mapping[str, Variant], Mapping[str, int]]
"""What is simulated: variants by unit, widths by group; what is not named stays dense fp32 and whole."""


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        variants: (unit, variant) alone in the dense network.
        cuts: (group, width) alone in the dense network.
        every: All (group, width) that get a loss; those beyond `cuts` follow `estimates`.
        estimates: Fisher estimate of the loss of each of `every`; empty where all are measured.
    """

    variants: Sequence[tuple[str, Variant]]
    cuts: Sequence[tuple[str, int]]
    every: Sequence[tuple[str, int]]
    estimates: Mapping[tuple[str, int], float]

    def choices(self) -> list[Choice]:
        """In the order of `variants` and `cuts`."""
        return [({unit: v}, {}) for unit, v in self.variants] + [({}, {g: w}) for g, w in self.cuts]


def measure_sensitivity(
    lowering: Lowering,
    out: str | Path | None = None,
    *,
    variants: Sequence[Variant],
    quantize_outputs: bool = False,
    seed: int = 0,
    grid: Mapping[str, Sequence[int]] | None = None,
    bank: WeightBank | None = None,
    limit: TimeLimit | None = None,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Score every (unit, variant it can become) and (channel group, width) of `grid`, in torch, by the task's divergence.

    Of more than 150 widths those with the greatest loss by a Fisher estimate (one backward pass for all) are estimated from it.

    Args:
        out: File of the table; finished batches are kept beside it.
        variants: What units may become; a unit is scored in those that are legal for it.
        quantize_outputs: Whether int8 and fp8 quantize outputs, as the backend deploys them.
        bank: Refitted weights, and the order in which slots go; needed with a grid, and for int8 weights to be refitted.
        limit: No further batch begins where it leaves no time for one and for a round of stitched networks, no further round where
            it leaves none for that; losses are then means of fewer samples, interactions are learnt from fewer networks, or not at
            all, and what is missing is measured by another call. One batch is measured in any case.
        cluster: Whose workers refit and score; None for this process.
    """
    kind = lowering.task.divergence
    progress = progress or Progress.silent()
    variants = [v for v in variants if v != Variant("fp32")]
    plan = _plan(lowering, variants, grid or {}, bank, seed, progress)
    batches = batches_of(lowering)
    made_of = ingredients(lowering, kind=kind, quantize_outputs=quantize_outputs, seed=seed)
    begun_with = {
        **made_of, "variants": ", ".join(map(str, variants)), "widths": str(plan.cuts),
        "refitted weights": bank.key if bank is not None else "none",
    }  # fmt: skip
    sums, limit = _Sums(out, begun_with, progress), limit or TimeLimit(math.inf)
    if bank is not None and len(sums.batches) < len(batches):
        progress.enter(REFITTING)
        _refit(bank, plan, variants, progress, None if cluster is None else partial(cluster.refit, lowering, bank))
    progress.enter(SCORING)
    scorer = Scorer(kind, quantize_outputs, bank, progress, cluster)
    _score(lowering, batches, plan.choices(), sums, scorer, limit)
    whole = stitched(*_by_name(lowering.network, plan, sums.first())[:2], STITCHED, seed)
    _stitch(lowering, batches, whole, sums, scorer, limit)
    loss, width_loss, refused = _by_name(lowering.network, plan, sums.mean())
    measured = set(plan.cuts)
    table = SensitivityTable(
        network=lowering.network,
        loss=loss,
        samples=sums.count,
        divergence=kind,
        quantize_outputs=quantize_outputs,
        int8_bits=lowering.int8_bits,
        unsigned=lowering.unsigned,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        width_loss=width_loss,
        order=_order(lowering.network, bank) if bank is not None and plan.every else {},
        estimated=frozenset(c for c in plan.every if c not in measured and c[1] in width_loss[c[0]]),
        refused=refused,
        made_of=made_of,
    )
    simulated = sums.stitched(len(whole))
    table = replace(_corrected(table, whole, simulated), passes=len(simulated) * len(sums.batches))
    if out is not None:
        table.save(out)
    if len(sums.batches) == len(batches) and not sums.lacking(len(whole)):
        sums.remove()
    return table


def samples_of(lowering: Lowering) -> int:
    """How many samples losses are of, at most: fewer of a large network, each of whose units is run on its own."""
    network = lowering.network
    each = max(network.macs // lowering.batch, 1) * len(network.units)
    return int(np.clip(COMPUTED / each, LEAST_SAMPLES, SAMPLES))


def batches_of(lowering: Lowering) -> list[Any]:
    """The calibration batches that losses are measured on."""
    return _limited(lowering.scoring, samples_of(lowering))


def ingredients(lowering: Lowering, *, kind: str, quantize_outputs: bool, seed: int = 0) -> dict[str, str]:
    """Everything that a loss depends on beside the variant or the width that it is of, by name."""
    return {
        "network": lowering.network.fingerprint,
        "weights": lowering.network.weights_digest,
        "calibration data": lowering.calibration_digest,
        "divergence": kind,
        "samples": str(samples_of(lowering)),
        "seed": str(seed),
        "bits of int8 weights": str(lowering.int8_bits),
        "unsigned int8 activations": str(lowering.unsigned),
        "quantized outputs": str(quantize_outputs),
        "method of ranges": lowering.method,
        "method of refitting": str(REFIT_METHOD),
        "method of scoring": str(METHOD),
        "method of learning interactions": str(LEARNING_METHOD),
        "stitched networks": str(STITCHED),
    }


@dataclass(frozen=True)
class Scorer:
    """How choices are compared with the dense network, and by whom: the workers of a cluster, or this process."""

    kind: str
    quantize_outputs: bool
    bank: WeightBank | None
    progress: Progress
    cluster: Cluster | None = None

    def of_batch(self, lowering: Lowering, index: int, batch: Any) -> Callable[[Sequence[Choice]], tuple[list[float], int]]:
        """What gives (divergence of each choice summed over the samples of a batch, of this number, and how many those are)."""
        if self.cluster is not None:
            return partial(self.cluster.losses, lowering, self, index)
        traced, args, kwargs = batch
        simulate = lowering.simulator(traced, args, kwargs, quantize_outputs=self.quantize_outputs)
        return partial(self.losses, lowering, simulate)

    def losses(self, lowering: Lowering, simulate: Simulator, choices: Sequence[Choice]) -> tuple[list[float], int]:
        """(divergence of each choice summed over the samples of a batch, how many samples those are)."""
        losses, count = [], 1
        for units, widths in choices:
            replaced = self.bank.masked_weights(widths, units) if self.bank is not None else {}
            mask = self.bank.mask(widths) if self.bank is not None and widths else None
            outputs = simulate(units, replaced, mask)
            loss, count = divergence(outputs, simulate.dense, self.kind, lowering.batch_axes)
            losses.append(loss)
            self.progress.advance()
        return losses, count


def _score(
    lowering: Lowering, batches: Sequence[Any], choices: Sequence[Choice], sums: _Sums, scorer: Scorer, limit: TimeLimit
) -> None:
    """Add to the sums the batches that they lack, while there is time; one at least."""
    progress, longest = scorer.progress, 0.0
    name = lowering.network.name or "the network"
    progress.start(len(choices) * len(batches), f"sensitivity of {name}", len(choices) * len(sums.batches))
    try:
        for index, batch in enumerate(batches):
            if str(index) in sums.batches:
                continue
            # a stitched network takes about twice as long as one of which a single unit is run again
            round_s = 2.0 * longest * ROUND / max(len(choices), 1) * (len(sums.batches) + 1)
            if sums.batches and limit.left_s < longest + round_s:
                progress.say(f"the time limit ends it: losses are of {sums.count} samples; the same command scores the others")
                break
            begun = limit.used_s
            sums.add(index, *scorer.of_batch(lowering, index, batch)(choices))
            longest = max(longest, limit.used_s - begun)
            progress.step(f"batch {index + 1} of {len(batches)}", len(choices) * len(sums.batches))
    finally:
        progress.stop()


def _stitch(
    lowering: Lowering, batches: Sequence[Any], whole: Sequence[Choice], sums: _Sums, scorer: Scorer, limit: TimeLimit
) -> None:
    """Add to the sums the stitched networks that they lack, round by round on all batches that are scored, while there is time."""
    progress, longest, lacking = scorer.progress, 0.0, sums.lacking(len(whole))
    progress.enter(STITCHING)
    progress.start(len(lacking) * ROUND, f"stitched networks of {lowering.network.name or 'the network'}")
    try:
        for done, (number, index) in enumerate(lacking):
            left = sum(n == number for n, _ in lacking[done:])
            if limit.left_s <= 0.0 or limit.left_s < longest * left:
                learnt = len(sums.stitched(len(whole)))
                progress.say(f"the time limit ends it: {learnt} of {len(whole)} stitched networks; the same command goes on")
                break
            begun = limit.used_s
            own = whole[number * ROUND : (number + 1) * ROUND]
            sums.add_stitched(number, index, scorer.of_batch(lowering, int(index), batches[int(index)])(own)[0])
            longest = max(longest, limit.used_s - begun)
            progress.step(f"round {number + 1}, {left - 1} batches to go", (done + 1) * ROUND)
    finally:
        progress.stop()


def _plan(
    lowering: Lowering,
    variants: Sequence[Variant],
    grid: Mapping[str, Sequence[int]],
    bank: WeightBank | None,
    seed: int,
    progress: Progress,
) -> Plan:
    network = lowering.network
    narrower: dict[str, list[int]] = {}
    if bank is not None:
        narrower = {g: [w for w in steps if w < network.channels[g]] for g, steps in grid.items()}
    every = [(g, w) for g, steps in narrower.items() for w in steps]
    estimates: dict[tuple[str, int], float] = {}
    if bank is not None and len(every) > MOST_WIDTHS:
        progress.start(None, "estimating which widths matter")
        estimates = removal_losses(lowering.fitting, bank.order, every, seed)
        progress.stop()
    return Plan(
        variants=[(unit.name, v) for unit in network.units for v in legal(unit, variants)],
        cuts=_worth_measuring(every, estimates),
        every=every,
        estimates=estimates,
    )


def _refit(
    bank: WeightBank, plan: Plan, variants: Sequence[Variant], progress: Progress, elsewhere: Elsewhere | None
) -> None:
    """Refit the weights that the plan's networks read, where the bank lacks them."""
    if plan.cuts:
        groups = dict.fromkeys(g for g, _ in plan.every)
        bank.build({g: [w for own, w in plan.cuts if own == g] for g in groups}, progress=progress, elsewhere=elsewhere)
    if any(v.precision == "int8" for v in variants):
        bank.build({}, ["int8"], progress=progress, elsewhere=elsewhere)


def _order(network: Network, bank: WeightBank) -> dict[str, tuple[int, ...]]:
    return {g: tuple(map(int, bank.order[g])) for g in network.channels}


def _corrected(table: SensitivityTable, whole: Sequence[Choice], simulated: Sequence[float]) -> SensitivityTable:
    """The table with what is learnt from the stitched networks that were simulated, and how well their losses are predicted."""
    offered = [i for i, loss in enumerate(simulated) if math.isfinite(loss) and loss > 0 and table.offers(*whole[i])]
    known = [(parts, simulated[i]) for i in offered if sum((parts := table.parts(*whole[i])).values()) > 0]
    pairs = tuple((float(sum(parts.values())), loss) for parts, loss in known)
    unseen: tuple[float, ...] = ()
    if len(known) >= LEAST:
        names = sorted({name for parts, _ in known for name in parts})
        losses = np.array([[parts.get(name, 0.0) for name in names] for parts, _ in known])
        law, predicted = learn(losses, np.array([loss for _, loss in pairs]))
        unseen = tuple(predicted.tolist())
        own = dict(zip(names, np.exp(law.logs).tolist(), strict=True))
        units, groups = ({n: c for (kind, n), c in own.items() if kind == what and c != 1.0} for what in (UNIT, GROUP))
        table = replace(table, correction=Correction(units, groups, law.factor, law.exponent))
    found = Agreement.of(unseen or [p for p, _ in pairs], [loss for _, loss in pairs])
    return replace(table, validation=pairs, corrected=unseen, rank_correlation=found.tau if found else None)


def _by_name(
    network: Network, plan: Plan, mean: Vector
) -> tuple[dict[str, dict[str, float]], dict[str, dict[int, float]], dict[str, dict[str, str]]]:
    """(losses of variants, losses of widths, what is refused) from the mean losses of the plan's choices.

    The widths that were not measured follow the estimates from the narrowest measured one on.
    """
    losses = np.maximum(mean, 0.0).tolist()
    loss: dict[str, dict[str, float]] = {u.name: {"dense.fp32": 0.0} for u in network.units}
    refused: dict[str, dict[str, str]] = {}
    for (unit, variant), value in zip(plan.variants, losses, strict=False):
        if np.isfinite(value):
            loss[unit][str(variant)] = value
        else:
            refused.setdefault(unit, {})[str(variant)] = NOT_FINITE
    width_loss: dict[str, dict[int, float]] = {g: {network.channels[g]: 0.0} for g, _ in plan.cuts}
    for (group, width), value in zip(plan.cuts, losses[len(plan.variants) :], strict=True):
        if np.isfinite(value):
            width_loss[group][width] = value
        else:
            refused.setdefault(group, {})[f"width{width}"] = NOT_FINITE
    measured = set(plan.cuts)
    for group, width in sorted((c for c in plan.every if c not in measured), key=lambda c: -c[1]):
        own = width_loss[group]
        if any(v.startswith("width") for v in refused.get(group, ())):
            refused[group][f"width{width}"] = f"a wider one is refused: {NOT_FINITE}"
            continue
        last = min(own)  # the narrowest so far, measured or estimated
        share = plan.estimates[group, width] / max(plan.estimates.get((group, last), 0.0), 1e-30)
        own[width] = own[last] * max(share, 1.0)
    return loss, width_loss, refused


def _worth_measuring(
    cuts: Sequence[tuple[str, int]], estimates: Mapping[tuple[str, int], float]
) -> list[tuple[str, int]]:
    """The widths with the least estimated loss, at most 150; of every group the two widest in any case."""
    if not estimates:
        return list(cuts)
    widest = {g: sorted((w for own, w in cuts if own == g), reverse=True)[:2] for g, _ in cuts}
    kept = {(g, w) for g, widths in widest.items() for w in widths}
    for cut in sorted(cuts, key=lambda c: estimates[c]):
        if len(kept) >= MOST_WIDTHS:
            break
        kept.add(cut)
    # what lies between two measured widths is measured as well: estimates go on from the narrowest
    least = {g: min(w for own, w in kept if own == g) for g in widest}
    return [(g, w) for g, w in cuts if w >= least[g]]


def _limited(batches: Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]], samples: int) -> list[Any]:
    """As many batches as hold `samples` samples, at least one."""
    kept: list[Any] = []
    count = 0
    for traced, args, kwargs in batches:
        if kept and count >= samples:
            break
        kept.append((traced, args, kwargs))
        count += next(
            (t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if hasattr(t, "shape") and t.dim()), 1
        )
    return kept


class _Sums:
    """Sums of losses of finished batches, in a JSON file beside the table until it is whole.

    batches: number -> losses of the choices and samples of each. rounds: of stitched networks, number -> batch -> losses.
    """

    def __init__(self, out: str | Path | None, made_of: Mapping[str, str], progress: Progress) -> None:
        self.path = Path(f"{out}.partial") if out is not None else None
        self.made_of = dict(made_of)
        self.batches: dict[str, dict[str, Any]] = {}
        self.rounds: dict[str, dict[str, list[float]]] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_bytes())
            before, batches, rounds = dict(data.get("made_of", {})), dict(data["sums"]), dict(data.get("stitched", {}))
            losses = [x for own in batches.values() for x in own["units"]]
            losses += [x for own in rounds.values() for each in own.values() for x in each]
            if not all(isinstance(x, float) for x in losses) or any(int(own["count"]) < 1 for own in batches.values()):
                raise ValueError("a loss is no number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            progress.say(f"{self.path} is damaged: begun anew")
            return
        if why := changed(before, self.made_of):
            progress.say(f"{self.path} was begun with other {why}: begun anew")
        else:
            self.batches, self.rounds = batches, rounds

    def add(self, index: int, units: list[float], count: int) -> None:
        """A batch of samples."""
        self.batches[str(index)] = {"units": units, "count": count}
        self._save()

    def add_stitched(self, number: int, index: str, losses: list[float]) -> None:
        """A round of stitched networks on a batch."""
        self.rounds.setdefault(str(number), {})[index] = losses
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            data = {"made_of": self.made_of, "sums": self.batches, "stitched": self.rounds}
            write_bytes(self.path, json.dumps(data).encode())

    @property
    def count(self) -> int:
        """Samples of all batches."""
        return int(sum(entry["count"] for entry in self.batches.values()))

    def first(self) -> Vector:
        """Mean losses of the choices on the first batch, whatever else there was time for."""
        entry = self.batches[min(self.batches, key=int)]
        own: Vector = np.array(entry["units"], dtype=np.float64)
        return own / int(entry["count"])

    def mean(self) -> Vector:
        """Mean losses of the choices."""
        total: Vector = np.sum([entry["units"] for entry in self.batches.values()], axis=0, dtype=np.float64)
        return total / self.count

    def lacking(self, networks: int) -> list[tuple[int, str]]:
        """(round, batch) of so many stitched networks that are not simulated yet, the first rounds first."""
        rounds = range(-(-networks // ROUND))
        return [(n, index) for n in rounds for index in self.batches if index not in self.rounds.get(str(n), {})]

    def stitched(self, networks: int) -> list[float]:
        """Mean losses of the first stitched networks, as many of them as have been simulated on every batch."""
        first = min((n for n, _ in self.lacking(networks)), default=-(-networks // ROUND))
        done = [[self.rounds[str(n)][index] for index in self.batches] for n in range(first)]
        return [float(x) / self.count for own in done for x in np.sum(own, axis=0)]

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

"""How the time limit of a run is shared out: the profile may take what refitting, sensitivities and the closed loop leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hwsearch.compress.bank import WeightBank
from hwsearch.deployment.evaluate import score
from hwsearch.deployment.session import SHARE, SHORTEST_S, VERIFY, uniform_candidates
from hwsearch.device.timelimit import TimeLimit
from hwsearch.engine.reference import INSTANCES, Reference
from hwsearch.engine.setup import Setup
from hwsearch.graph.calls import evaluating
from hwsearch.graph.trace import Traced
from hwsearch.loss.cluster import Cluster
from hwsearch.loss.measure import MOST_WIDTHS, REFITTING, SCORING, STITCHED, STITCHING
from hwsearch.loss.sensitivity import bank_for
from hwsearch.network.choices import candidate_widths
from hwsearch.network.variants import legal
from hwsearch.progress import Progress, spoken
from hwsearch.table.table import LatencyTable

PREPARING, PROFILE, LOOP, RECOVERY = "making ready", "the profile", "search, deployment and verification", "recovery"
"""Stages of a run, beside those of the sensitivities; see `Progress.plan`."""
MOST_RESERVED = 0.75
"""Of what is left when the profile begins, the share that is kept for later stages at most."""
MOST_SCORING = 0.3
"""Of it, the share for sensitivities, where that is enough for a batch of samples."""
WINDOWS = 2.5
"""Windows in which an answer is likely to be measured again, beside the dense network: two or three."""
FEW = 20
"""Builds of a profile; after fewer, answers keep so far below the budget that one window decides."""
ROUNDS = 2
"""Rounds that the closed loop is left time for: where the first answer misses its budgets, the next knows by how much."""


@dataclass(frozen=True)
class Allowance:
    """What the stages of a run are expected to take, by what was timed before the profile and by the builds of a table so far.

    Attributes:
        limit: Of the whole run.
        setup: What is profiled.
        axes: What may be chosen.
        reference: Of the profile and the closed loop.
        bank: Refitted weights with the order of the channels; None where none is needed, or the sensitivities are there already.
        dense_score: The task's score of the module.
        score_s, scored, rest_s: Seconds to score the module, samples that it ran on for that, and what the task itself took of it.
        pass_s, refit_s: Seconds to run a batch of calibration data once, and to refit a unit in int8.
        begun_s: Seconds of the limit that were left when the profile began.
        recovery_s: Seconds for recovery, which are not of the limit.
        samples: That a search for a floor may measure.
        workers: That score at a time.
    """

    limit: TimeLimit
    setup: Setup
    axes: Collection[str]
    reference: Reference
    bank: WeightBank | None = None
    dense_score: float = 0.0
    score_s: float = 0.0
    scored: int = 0
    rest_s: float = 0.0
    pass_s: float = 0.0
    refit_s: float = 0.0
    begun_s: float = 0.0
    recovery_s: float = 0.0
    samples: int = 0
    workers: int = 1

    def scoring_s(self, table: LatencyTable | None, batches: int) -> float:
        """Of so many batches of samples, or (0) of the least that is measured; none where the sensitivities are there already."""
        return sum(self._scoring_parts_s(table, batches))

    def _scoring_parts_s(self, table: LatencyTable | None, batches: int) -> tuple[float, float]:
        """(of the choices one by one, of stitched networks)."""
        if not self.pass_s:
            return 0.0, 0.0
        network = self.setup.network
        grid = table.grid() if table and table.header.grid else {g: candidate_widths(n) for g, n in network.channels.items()}
        widths = min(MOST_WIDTHS, sum(len(steps) - 1 for steps in grid.values())) if "width" in self.axes else 0
        variants = [legal(u, self.setup.variants()) for u in network.units]
        choices = sum(map(len, variants)) + widths
        if not batches:  # the least: one batch, without stitched networks
            return choices * self.pass_s / self.workers, 0.0
        refits = len(variants) * min(STITCHED / 2, max(map(len, grid.values()))) if widths else 0
        stitching_s = batches * STITCHED * self.pass_s + refits * self.refit_s
        return batches * choices * self.pass_s / self.workers, stitching_s / self.workers

    def loop_s(self, table: LatencyTable | None, rounds: int = 1) -> float:
        """Of the closed loop with so many rounds, or of all samples: engines are built, timed and scored, answers several times."""
        uniforms = len(uniform_candidates(self.setup, table.header.unsupported if table else {}))
        builds = table.builds if table else ()
        build_s = float(np.median([b.build_s for b in builds])) if builds else 0.0
        answers = 1 if self.samples else rounds
        engines = uniforms + self.samples + answers * (1 + 2 * (WINDOWS if len(builds) >= FEW else 1))
        networks = answers + self.samples
        refits = networks * len(self.setup.network.units)
        reference_s = 0.0 if self.reference.compiled else INSTANCES * build_s
        others_s = reference_s + engines * build_s + networks * self._score_s(table) + refits * self.refit_s
        each_s = VERIFY.limit_s
        for _ in range(5):  # by the time that is left when the loop begins, which may be what it takes itself
            left_s = min(self.limit.left_s, others_s + engines * each_s)
            each_s = float(np.clip(left_s / SHARE, SHORTEST_S, VERIFY.limit_s))
        return others_s + engines * each_s

    def _score_s(self, table: LatencyTable | None) -> float:
        """To score an engine: no slower than the reference, nor than the module."""
        if table is None or not table.builds:
            return self.score_s
        each_s = table.header.reference_ns / 1e9 / self.setup.lowering.batch
        return min(self.score_s, self.rest_s + self.scored * each_s)

    def reserve(self, table: LatencyTable | None) -> float:
        """Seconds that the profile leaves to the stages after it: sensitivities of one batch of samples at least, and the loop."""
        return min(self._scoring_s(table) + self.loop_s(table, ROUNDS), MOST_RESERVED * self.begun_s)

    def _scoring_s(self, table: LatencyTable | None) -> float:
        """Seconds that are kept for the sensitivities while a profile goes on."""
        most, least = self.scoring_s(table, len(self.setup.lowering.scoring)), self.scoring_s(table, 0)
        return min(most, max(least, MOST_SCORING * self.begun_s))

    def after_profile(self, table: LatencyTable | None, scoring: float | None = None) -> tuple[dict[str, float], float]:
        """(seconds of the stages after a profile, with one round of the closed loop; seconds of another round), as expected by now.

        scoring: Of the sensitivities, None while the profile goes on.
        """
        scoring = self._scoring_s(table) if scoring is None else scoring
        alone = min(self._scoring_parts_s(table, len(self.setup.lowering.scoring))[0], scoring)
        left = max(self.limit.left_s - scoring, 0.0)
        loop = self.loop_s(table)
        again = max(0.0, min(self.loop_s(table, ROUNDS), left) - loop)
        if self.samples:
            loop = min(loop, left)  # as many samples as there is time for
        return {SCORING: alone, STITCHING: scoring - alone, LOOP: loop, RECOVERY: self.recovery_s}, again

    def plan(self, table: LatencyTable | None) -> tuple[dict[str, float], float]:
        """(seconds of the stages to come, seconds of another round), for `Progress.plan`; table: None before the profile."""
        left = max(self.limit.left_s, 0.0)
        if table is None:
            later, again = self.after_profile(None)
            return {PROFILE: max(left - self.reserve(None), 0.0), **later}, again
        most, least = self.scoring_s(table, len(self.setup.lowering.scoring)), self.scoring_s(table, 0)
        scoring = min(most, max(least, left - self.loop_s(table, ROUNDS)))
        later, again = self.after_profile(table, scoring)
        return {REFITTING: 0.0, **later}, again

    def scoring_limit(self, table: LatencyTable) -> TimeLimit:
        """Of the sensitivities."""
        return TimeLimit(self.limit.left_s - self.loop_s(table, ROUNDS), self.setup.clock)


def prepared(
    allowance: Allowance, weights: str | Path | None, *, scored: bool, progress: Progress, cluster: Cluster | None = None
) -> Allowance:
    """What does not depend on the profile, done before it and timed: the score of the module, the order of channels, int8 weights.

    scored: The sensitivities are there already.
    """
    setup = allowance.setup
    network, clock = setup.network, setup.clock
    progress.start(None, "scoring the dense network")
    with evaluating(setup.lowering.task.model) as model, _timed_calls(model, clock) as (asked, ran_ns):
        begun = clock()
        dense = score(setup.lowering.task, model, "the dense model")
        score_ns = clock() - begun
    allowance = replace(
        allowance, dense_score=dense, score_s=score_ns / 1e9, scored=sum(asked), rest_s=(score_ns - sum(ran_ns)) / 1e9
    )
    if not scored:
        batch = setup.lowering.scoring[0]
        begun = clock()
        run_once(*batch)
        allowance = replace(allowance, pass_s=(clock() - begun) / 1e9)
        grid = {g: candidate_widths(n) for g, n in network.channels.items()} if "width" in allowance.axes else {}
        bank = bank_for(setup, weights, grid, progress)
        begun = clock()
        if bank is not None and any(v.precision == "int8" for v in setup.variants()):
            elsewhere = None if cluster is None else partial(cluster.refit, setup.lowering, bank)
            bank.build({}, ["int8"], progress=progress, elsewhere=elsewhere)
        refits_s = (clock() - begun) / 1e9 if cluster is None else cluster.refits_s
        workers = 1 if cluster is None else cluster.cpus
        allowance = replace(allowance, bank=bank, refit_s=refits_s / len(network.units), workers=workers)
    return replace(allowance, begun_s=max(allowance.limit.left_s, 0.0))


@contextmanager
def _timed_calls(model: torch.nn.Module, clock: Callable[[], int]) -> Iterator[tuple[list[int], list[int]]]:
    """(samples, nanoseconds) of each call of the module while the block runs."""
    samples, begun, ran_ns = list[int](), list[int](), list[int]()

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        samples.append(next((len(t) for t in leaves if isinstance(t, torch.Tensor) and t.dim()), 1))
        begun.append(clock())

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda *_: ran_ns.append(clock() - begun[-1])),
    ]
    try:
        yield samples, ran_ns
    finally:
        for hook in hooks:
            hook.remove()


def run_once(traced: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The dense network on a batch of calibration data."""
    with torch.no_grad():
        traced.graph(*args, **kwargs)


def shared_out(limit: TimeLimit, stages: Mapping[str, float], again_s: float) -> str:
    """What each stage of a run may take, and what is kept for a second round of the loop, to read."""
    shares = {**stages, "a second round, if one is needed": again_s}
    parts = [f"{spoken(seconds)} for {stage}" for stage, seconds in shares.items() if seconds >= 0.5]
    whole = limit.used_s + limit.left_s + stages.get(RECOVERY, 0.0)
    return f"time limit {spoken(whole)}: {spoken(limit.used_s)} used, {', '.join(parts)}"

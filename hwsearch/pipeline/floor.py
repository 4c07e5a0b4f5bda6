"""A run with a floor: of the networks whose measured score keeps to it, the one of least cost.

For a bound on the predicted loss the search minimises the cost exactly; the score of what it answers falls as the bound grows. The
largest bound that holds the floor is looked for in a few measured samples, on data that the final score does not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import LOSS, Budget, attainable
from hwsearch.allocate.costs import Costs
from hwsearch.allocate.search import as_limits, search
from hwsearch.allocate.space import Offer
from hwsearch.compress.bank import WeightBank
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import Refits, deploy, metadata_of, parse_variants
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Job, Session
from hwsearch.deployment.verify import measure_allocation
from hwsearch.engine.record import wrong_variants
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, BudgetMissed, Infeasible
from hwsearch.latency.model import fit
from hwsearch.loss.table import SensitivityTable
from hwsearch.pipeline.bracket import Range, Tried, next_bound, proportional
from hwsearch.pipeline.closed_loop import as_fast_as_now, slower_now, without_refused, without_wrong
from hwsearch.pipeline.goal import Goal
from hwsearch.pipeline.samples import FOLDER, Sample, Samples, logarithm
from hwsearch.pipeline.scorer import Scorer, scorer_for
from hwsearch.progress import Progress
from hwsearch.table.build import Build, Role
from hwsearch.table.table import LatencyTable

SPAN = math.log(1e5)
"""Bounds are searched down to the loss of the cheapest network over this; the dense network stands for what is below."""
TRIES = 3
"""Samples that hold the floor and are measured in windows, until one meets the budgets there as well."""
STRICTER = 0.996
"""What a budget that a sample missed is multiplied with, beside what it was over."""


@dataclass(frozen=True)
class Held:
    """What a search for a floor found.

    Attributes:
        goal: What was asked for.
        scorer: What samples were scored by.
        samples: All that were measured, now or before, in the order of their bounds.
        answer: The one that was deployed; None where it is the dense network.
    """

    goal: Goal
    scorer: Scorer
    samples: tuple[Sample, ...]
    answer: Sample | None

    def judged(self, report: Report) -> Report:
        """The report, with the floor, how the final score stands to it, and every sample."""
        return replace(report, floor={
            **self.scorer.judged(self.goal, report.score["dense"], report.score["deployed"]),
            "samples": [
                {**s.to_json(), "holds": s.spare(self.scorer) >= 0, "reused": s.reused, "answer": s is self.answer}
                for s in self.samples
            ],
        })  # fmt: skip

    def missed(self, report: Report, folder: Path) -> BudgetMissed:
        """What breaks, the floor or the budgets, by the report of the nearest answer."""
        own = cast(dict[str, Any], report.floor)
        score, broken = report.score["deployed"], []
        if not own["held"]:
            errors = own["standard_errors"]
            noise = "" if errors is None else f", by {-errors:.1f} standard errors"
            broken.append(f"the floor breaks: the score is {score:.4f}, and {own['text']} is {own['least']:.4f}{noise}")
        if report.judged.state == State.MISSED:
            over = {c: most for c, most in report.bound.known().items() if report.measured[c] > most}
            told = [f"{c}={attainable(c, round(report.measured[c]))} for {attainable(c, round(most))}" for c, most in over.items()]
            broken.append(f"the budgets break: of what holds the floor the nearest takes {', '.join(told) or 'more now'}")
        elif report.bound.known():
            broken.append("the budgets hold")
        return BudgetMissed(
            f"{'; '.join(broken)}; as measured, in {folder}. Ask for a little less, give more samples, or train with recovery",
            nearest=report,
        )


def hold_floor(
    session: Session, table: LatencyTable, sensitivity: SensitivityTable, budgets: Sequence[Budget], goal: Goal, folder: Path, *,
    axes: Sequence[str], keep: Sequence[str], weights: str | Path | WeightBank | None, progress: Progress,
) -> tuple[Report, Allocation, LatencyTable, Held]:  # fmt: skip
    """Find, deploy and measure the network of least cost whose score holds a floor, within budgets.

    Leaves `model.onnx` and `alloc.json` in `folder`, and each sample in `samples` there. Where all that was measured loses too
    much, or costs more, the dense network is the answer.

    Returns:
        The report, without the floor (see `Held.judged`), the allocation, the table with what was measured, and what was found.

    Raises:
        Infeasible: The budgets cannot be met, or nothing within them holds the floor; it says which breaks.
        InvalidInput: The dense network does not hold the floor, or it cannot be told.
    """
    progress.start(None, "search for what holds the floor")
    try:
        own = _Search(session, table, sensitivity, budgets, goal, folder, {"axes": axes, "keep": keep}, weights, progress)
        own.run()
        return own.answer()
    finally:
        progress.stop()


class _Search:
    """Bounds on the loss, the exact answers under them, and what these score."""

    def __init__(
        self, session: Session, table: LatencyTable, sensitivity: SensitivityTable, budgets: Sequence[Budget], goal: Goal,
        folder: Path, offer: Offer, weights: str | Path | WeightBank | None, progress: Progress,
    ) -> None:  # fmt: skip
        self.session, self.setup, self.sensitivity = session, session.setup, sensitivity
        self.budgets, self.goal, self.folder, self.offer = budgets, goal, folder, offer
        self.progress, self._refits = progress, Refits(weights, sensitivity.order)
        self.table = table.with_header(unsupported=without_refused(table, sensitivity))
        self.bound, self.dense = session.bounds(budgets, self.table)
        _ = self.dense[goal.minimize]  # an energy that nothing counts is an error before anything is searched
        limits = as_fast_as_now(as_limits(self.bound), budgets, session)
        self.limits = {} if self.dense.within(Costs(**limits)) else dict(limits)
        self.model = fit(self.table) if self.table.builds else None
        self.scorer = scorer_for(session, goal.floor)
        self.family = f"least {goal.minimize} within {', '.join(map(str, budgets)) or 'no budget'}"
        self.samples = Samples(folder / FOLDER, self._made_of(), progress.say)
        self.tried = [s.tried(self.scorer, math.log(s.bound)) for s in self.samples.known.values() if s.family == self.family]
        self.builds: list[Build] = []
        self.measured = 0
        self.lowest = self._least_loss()
        self.free = self.lowest.uniform == "dense.fp32" and self.lowest.predicted["loss"] == 0

    def _made_of(self) -> dict[str, Any]:
        """What has to be the same for a sample to be used again."""
        return {**self.scorer.made_of(), "offer": self.offer, "interactions": self.sensitivity.correction.to_json()}

    def run(self) -> None:
        """Measure samples until the bracket is narrow, or none is left."""
        within, longest_s = self._range(), 0.0
        while (x := next_bound(self.tried, within, self.scorer.allowed, self.goal.samples - self.measured)) is not None:
            allocation = self._at(x, within)
            if allocation is None:  # nothing but the dense network loses so little
                self.tried.append(Tried(x, x, 0.0, 0.0))
                continue
            sample = self.samples.get(allocation)
            if sample is None:
                if self.measured and self.session.limit.left_s < 2 * longest_s and (self.free or self._holding()):
                    self.progress.say("no time is left for another sample")
                    break
                before = self.table
                sample = self._measure(allocation, math.exp(x))
                longest_s = max(longest_s, sample.seconds)
                if self.table is not before:
                    continue  # what computes wrongly is not offered any more: another answer
            self.tried.append(sample.tried(self.scorer, x))

    def _search(self, budgets: Sequence[Budget], minimize: str) -> Allocation:
        bounded = {b.column for b in budgets}
        limits = {c: most for c, most in self.limits.items() if c in bounded}
        return search(
            self.table, self.sensitivity, budgets, minimize=minimize, model=self.model, tighten=limits or None, **self.offer
        )

    def _least_loss(self) -> Allocation:
        """Within the budgets; the dense network where it is within them."""
        try:
            return self._search(self.budgets or (Budget.parse("size=100%"),), LOSS)
        except Infeasible as error:
            found = slower_now(error, self.budgets, self.session)
            raise Infeasible(f"the budgets break, whatever the floor: {found}", found.least) from None

    def _range(self) -> Range:
        cheapest = self._search([*self.budgets, _at_most(2.0 * self.sensitivity.most() + 1.0)], self.goal.minimize)
        high = logarithm(cheapest.predicted["loss"])
        return Range(high - SPAN if self.free else min(logarithm(self.lowest.predicted["loss"]), high), high, self.free)

    def _at(self, x: float, within: Range) -> Allocation | None:
        """The answer under the bound exp(x); None where there is none."""
        if not self.free and x <= within.low:
            return self.lowest
        try:
            return self._search([*self.budgets, _at_most(math.exp(x))], self.goal.minimize)
        except Infeasible:
            return None

    def _measure(self, allocation: Allocation, bound: float) -> Sample:
        """One sample: built, timed and scored; a failure is one too."""
        begun_s, variants = self.session.limit.used_s, parse_variants(allocation)
        base = str(allocation.options["base"])
        failed, score, error, costs = "", None, None, Costs()
        self.measured += 1
        try:
            deployed = self._refits.deployed(self.setup, allocation)
            job = Job(variants, base, metadata_of(allocation, base), deployed)
            own = self.session.measure({"sample": job})["sample"]
            if own.build.wrong:
                failed, wrong = "the runtime computes wrong outputs", wrong_variants(deployed, variants, base)
                self.table = self.table.with_header(unsupported=without_wrong(self.table, allocation, wrong))
            else:
                score, error = self.scorer(own)
                costs = self.session.costs(own)
                self.builds.append(replace(own.build, role=Role.DEPLOYED))
        except BackendUnavailable as problem:
            failed = str(problem)
        sample = Sample(
            allocation=allocation, family=self.family, bound=bound, score=score, error=error, costs=costs,
            seconds=self.session.limit.used_s - begun_s, failed=failed,
        )  # fmt: skip
        self.samples.add(sample)
        self._tighten(costs)
        self.progress.step(f"sample {self.measured} of at most {self.goal.samples}: {self._said(sample)}")
        return sample

    def _said(self, sample: Sample) -> str:
        if sample.score is None:
            return f"failed: {sample.failed}"
        error = "" if sample.error is None else f" ± {sample.error:.4f}"
        verdict = "holds" if sample.spare(self.scorer) >= 0 else "does not hold"
        return (
            f"score {sample.score:.4f}{error} at a predicted loss of {sample.loss:.3g}, {verdict} {self.scorer.floor:.4f}, "
            f"{sample.costs['latency'] / 1e6:.4g} ms, {sample.costs['size']:,.0f} bytes"
        )

    def _tighten(self, costs: Costs) -> None:
        """Ask for as much less of what a sample was over."""
        for column, most in self.bound.known().items():
            cost = getattr(costs, column)
            if cost is not None and cost > most:
                self.limits[column] = int(self.limits.get(column, most) * most / cost * STRICTER)

    def _holding(self) -> list[Sample]:
        """What holds the floor, the cheapest first of what is within the budgets, then what is nearest to them."""
        found = [s for s in self.samples.known.values() if s.spare(self.scorer) >= 0]
        over = {id(s): 0.0 if s.costs.within(self.bound) else s.costs.excess(self.bound) for s in found}
        return sorted(found, key=lambda s: (over[id(s)], s.costs[self.goal.minimize]))

    def answer(self) -> tuple[Report, Allocation, LatencyTable, Held]:
        """The cheapest that holds the floor and the budgets, deployed and measured."""
        holding = self._holding()
        fine = [s for s in holding if s.costs.within(self.bound)]
        tries: list[tuple[Allocation, Sample | None]] = [(s.allocation, s) for s in (fine[:TRIES] or holding[:1])]
        if self.free and not (fine and fine[0].costs[self.goal.minimize] <= self.dense[self.goal.minimize]):
            tries = [(self.lowest, None)]
        if not tries:
            raise self._breaks()
        best: tuple[Report, Allocation, Sample | None, Setup] | None = None
        for allocation, sample in tries:
            deployed = self._refits.deployed(self.setup, allocation)
            report, build = measure_allocation(
                self.session, allocation, deployed, table=self.table, budgets=self.budgets, rounds=max(1, self.measured)
            )
            self.builds.append(replace(build, role=Role.DEPLOYED))
            if best is None or report.rank < best[0].rank:
                best = report, allocation, sample, deployed
            if report.state != State.MISSED:
                break
        assert best is not None
        report, allocation, answer, deployed = best
        deploy(self.setup.lowering.task, allocation, self.folder / "model.onnx", setup=deployed)
        allocation.save(self.folder / "alloc.json")
        table = self.table
        for build in self.builds if table.builds else ():
            table = table.with_build(build)
        told = sorted(self.samples.known.values(), key=lambda s: s.bound)
        return report, allocation, table, Held(self.goal, self.scorer, tuple(told), answer)

    def _breaks(self) -> Infeasible:
        """Nothing within the budgets holds the floor: the most that they allow, and the least that the floor is likely to take."""
        budgets, floor = ", ".join(map(str, self.budgets)), self.goal.floor.text
        scored = [s for s in self.samples.known.values() if s.score is not None and s.family == self.family]
        best = max(scored, key=lambda s: cast(float, s.score), default=None)
        most = "none could be scored"
        if best is not None:
            error = "" if best.error is None else f" ± {best.error:.4f}"
            most = f"the best of them scores {best.score:.4f}{error}, for at least {self.scorer.floor:.4f} ({self.scorer.by})"
        return Infeasible(
            f"the floor breaks: nothing measured within {budgets or 'what may be chosen'} holds {floor} with a standard error to "
            f"spare: {most}{self._likely()}. Give larger budgets or a lower floor, or train with recovery"
        )

    def _likely(self) -> str:
        """What the floor is likely to take of each budget alone, by the score lost per loss so far."""
        x, told = proportional(self.tried), []
        for budget in self.budgets if x is not None else ():
            try:
                found = self._search([_at_most(math.exp(cast(float, x)))], budget.column)
            except Infeasible:
                continue
            told.append(f"{budget.column}={attainable(budget.column, round(found.costs[budget.column]))}")
        return f"; alone, the floor is likely to take at least {' or '.join(told)}, as predicted" if told else ""


def _at_most(loss: float) -> Budget:
    """A budget on the loss, rounded up to six digits."""
    return Budget(LOSS, "absolute", float(f"{loss * (1.0 + 5e-6):.6g}"))

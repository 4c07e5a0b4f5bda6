"""The closed loop: search, deploy and measure, until the budgets hold as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hwsearch import files
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import TAILS, Budget
from hwsearch.allocate.costs import Costs
from hwsearch.allocate.search import KAPPA, as_limits, search
from hwsearch.compress.bank import WeightBank
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import Refits, deploy, parse_variants
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Session, uniform_candidates
from hwsearch.deployment.verify import best_uniform, measure_allocation
from hwsearch.errors import Infeasible
from hwsearch.latency.model import LatencyModel, Prediction, fit
from hwsearch.latency.regression import USUAL_SLOWDOWN
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.choices import AXES
from hwsearch.progress import Progress, spoken
from hwsearch.table.build import Role
from hwsearch.table.table import LatencyTable

MAX_ROUNDS = 5
SPARE, MOST_SPENT, MARGIN = 0.025, 1.15, 0.02
"""How much faster than asked is worth another round, by how much at most the limit is raised for it, and what is left to noise."""

Limits = Mapping[str, int]
"""What the search is to keep below, by column, in ns, bytes, MACs and nJ."""


@dataclass(frozen=True)
class Round:
    """One answer of the search, deployed and measured."""

    allocation: Allocation
    report: Report

    def over(self) -> dict[str, float]:
        """Each cost that is not within its budget for sure -> by which factor it is over, or its interval ends over."""
        judged, sure = self.report.judged, self.report.state != State.MISSED
        own = (judged.upper if sure else judged.measured, judged.bound)
        now = (judged.now_high if sure else judged.now, judged.bound_now)
        factors: dict[str, float] = {}
        for costs, bound in (own, now):
            for column, most in bound.known().items():
                factors[column] = max(factors.get(column, 0.0), costs[column] / most)
        return {column: factor for column, factor in factors.items() if factor > 1.0}

    def same(self, allocation: Allocation) -> bool:
        """Whether an answer is this one again."""
        own = self.allocation
        return (allocation.variants, allocation.widths) == (own.variants, own.widths)


def closed_loop(
    session: Session, table: LatencyTable, sensitivity: SensitivityTable, budgets: Sequence[Budget], folder: Path, *,
    axes: Sequence[str] = AXES, keep: Sequence[str] = (), weights: str | Path | WeightBank | None = None,
    progress: Progress | None = None,
) -> tuple[Report, Allocation, LatencyTable]:  # fmt: skip
    """Search, deploy and measure until the budgets hold as measured, at most five times.

    Each measurement joins the table and the model is fitted again; the limits also fall by what it still misses of the
    last answer, so that every round asks for less; likewise where the budgets are met only within the noise. An answer that is
    faster than asked by more than `SPARE`, for sure, is followed by one more round, which asks for what it left over. Leaves in
    `folder` the files of the best round: of least loss of those that met the budgets, else of those that met them within the
    noise, else the nearest. Returns its report and allocation, and the table with what was measured.

    After the first, a round begins only where the session has as much time left as the longest round took.
    """
    clock, longest_s = session.limit, 0.0
    progress = progress or Progress.silent()
    progress.start(None, "search, deploy and verify")
    table = table.with_header(unsupported=without_refused(table, sensitivity))
    bound, limits = _begun(session, budgets, table)
    trial = _Trial(session, budgets, folder, Refits(weights, sensitivity.order))
    best = last = None
    spending = False
    try:
        for number in range(1, MAX_ROUNDS + 1):
            begun_s = clock.used_s
            if best is not None and clock.left_s < longest_s:
                progress.say(f"no time is left for another round, which took {spoken(longest_s)}")
                break
            model = fit(table) if table.builds else None
            if last is not None:
                again = _predicted(model, last.allocation)
                limits = looser(limits, last, again) if spending and again else tighter(limits, last, again)
            try:
                allocation = search(
                    table, sensitivity, budgets, axes=axes, keep=keep, model=model, tighten=limits, doubtful=True
                )
            except Infeasible as error:
                if best is None:
                    raise slower_now(error, budgets, session) from None
                break  # nothing predicted to be faster is left
            if last is not None and last.same(allocation):
                if spending:
                    break
                limits = {c: int(limit * 0.98) for c, limit in (limits or as_limits(bound)).items()}
                continue
            last, table = trial.measure(number, allocation, table)
            longest_s = max(longest_s, clock.used_s - begun_s)
            if best is None or last.report.rank < best.report.rank:
                best = last
                trial.keep(number, best)
            enough = spending or (last.report.met and not (limits and _left_over(last.report) > 1.0 + SPARE))
            spending = last.report.met
            further = 0 if enough else min(1 if spending else 2, MAX_ROUNDS - number)
            further = sum(clock.left_s >= rounds * longest_s for rounds in range(1, further + 1))
            progress.more(longest_s * min(further, 1), longest_s * max(further - 1, 0))
            progress.step(_said(last.report))
            if enough:
                break
    finally:
        progress.stop()
        trial.clean()
    assert best is not None
    assert last is not None
    report = replace(best.report, rounds=last.report.rounds)  # all that it took, the best may not have been the last
    report.save(folder / "report.json")
    return report, best.allocation, table


def _begun(session: Session, budgets: Sequence[Budget], table: LatencyTable) -> tuple[Costs, Limits]:
    """(what the budgets allow, what the search is to keep below), with the uniform allocations measured and the best one scored.

    Relative budgets are of the dense network as it is now, not as it was when the table was made. What is done once is done before
    the rounds are timed.
    """
    bound, dense = session.bounds(budgets, table)
    _, uniforms = session.measure_all(None, uniform_candidates(session.setup, table.header.unsupported))
    best_uniform(session, uniforms, bound)
    limits = as_fast_as_now(as_limits(bound), budgets, session)
    return bound, {} if dense.within(Costs(**limits)) else limits


class _Trial:
    """Deploying and measuring answers, their files in `folder`."""

    def __init__(
        self,
        session: Session,
        budgets: Sequence[Budget],
        folder: Path,
        refits: Refits,
    ) -> None:
        self.setup, self.session, self.budgets, self.folder = session.setup, session, budgets, folder
        self.refits = refits

    def measure(
        self, number: int, allocation: Allocation, table: LatencyTable
    ) -> tuple[Round, LatencyTable]:
        """Deploy and measure the answer of a round; the table, with the build, is saved."""
        deployed = self.refits.deployed(self.setup, allocation)
        deploy(self.setup.lowering.task, allocation, self._path(number), setup=deployed)
        report, build = measure_allocation(
            self.session, allocation, deployed, table=table, budgets=self.budgets, rounds=number
        )
        measured = bool(table.builds)
        if measured:
            table = table.with_build(replace(build, role=Role.DEPLOYED))
        if report.wrong_units:
            table = table.with_header(unsupported=without_wrong(table, allocation, report.wrong_units))
        if measured:
            table.save(self.folder / "table.parquet")
        return Round(allocation, report), table

    def keep(self, number: int, best: Round) -> None:
        """The files of a round take the places of the answer's."""
        files.copy(self._path(number), self.folder / "model.onnx")
        best.allocation.save(self.folder / "alloc.json")
        best.report.save(self.folder / "report.json")

    def clean(self) -> None:
        """Remove the ONNX files of the rounds."""
        for path in self.folder.glob("round*.onnx"):
            path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"round{number}.onnx"


def _said(report: Report) -> str:
    latency = report.latency_ms
    predicted = f"{latency['predicted']:.4g} predicted, " if latency["predicted"] is not None else ""
    return f"round {report.rounds}: {latency['measured']:.4g} ms measured, {predicted}{report.verdict}"


def _left_over(report: Report) -> float:
    """Budget / the most that the latency may be, where that alone is bounded; else 1."""
    bound = report.bound.known()
    if set(bound) != {"latency"}:
        return 1.0
    upper = report.judged.upper["latency"]
    if report.judged.bound_now.known():
        upper = max(upper, report.judged.now_high["latency"])
    return bound["latency"] / upper


def without_refused(table: LatencyTable, sensitivity: SensitivityTable) -> dict[str, dict[str, str]]:
    """What the table does not offer, with the variants that have no loss."""
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit in table.network.units:
        if lost := sensitivity.refused.get(unit.name):
            variants = {v: why for v, why in lost.items() if not v.startswith("width")}
            refused[unit.name] = {**refused.get(unit.name, {}), **variants}
    return refused


def without_wrong(
    table: LatencyTable, allocation: Allocation, wrong: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """What is not offered any more once an allocation's engine returned wrong outputs by these units."""
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit, why in wrong.items():
        refused.setdefault(unit, {})[allocation.variants[unit]] = why
    return refused


def _predicted(model: LatencyModel | None, allocation: Allocation) -> Prediction | None:
    """What a model says of an allocation; of one under another base (the dense one) what was said before.

    None where none was predicted, as nothing bounds its latency.
    """
    if model is None or "latency_ns" not in allocation.predicted:
        return None
    if allocation.options["base"] != model.table.header.options["base"]:
        return Prediction(float(allocation.predicted["latency_ns"]), float(allocation.predicted["sigma_ns"]))
    return model.predict(parse_variants(allocation), allocation.widths)


def as_fast_as_now(limits: Limits, budgets: Sequence[Budget], session: Session) -> Limits:
    """Limits on the scale of the table that are absolute budgets on the machine as slow as it is now."""
    slower = max(1.0, session.reference_now_ns / session.scale_ns)
    timed = {b.column for b in budgets if b.kind == "absolute" and b.column in ("latency", *TAILS)}
    return {c: int(limit / slower) if c in timed else limit for c, limit in limits.items()}


def slower_now(error: Infeasible, budgets: Sequence[Budget], session: Session) -> Infeasible:
    """The same error, with how slow the machine is where an absolute budget is of it."""
    slower = session.reference_now_ns / session.scale_ns
    if slower <= 1.0 + USUAL_SLOWDOWN or not any(b.kind == "absolute" and b.column in ("latency", *TAILS) for b in budgets):
        return error
    return Infeasible(
        f"{error}. The machine is {slower - 1.0:.0%} slower now than when the table was made, and an absolute budget has to hold "
        "now: wait until it is as fast again, or profile again",
        error.least,
    )


def tighter(limits: Limits, last: Round, again: Prediction | None) -> Limits:
    """Limits for the next round, by what the last answer was over.

    Args:
        limits: Those of the last round; empty where there were none but the budgets.
        again: What the model, fitted with the measurement, predicts of the last answer now. Where it has learnt the whole
            difference the latency limit stays; else it falls by the rest. Every round asks for a little less.
    """
    bound, now = last.report.bound, last.allocation.costs
    if again is not None:
        learnt = again.time_ns / now["latency"]
        now = replace(now, **{c: now[c] * learnt for c in ("latency", *TAILS) if c in now.known()})
    next_limits = dict(limits)
    for column, factor in last.over().items():
        predicted = getattr(now, column)
        short = min(1.0, (predicted if predicted is not None else 0.0) / (factor * bound[column]))
        least = int(bound[column] * short * (1.0 - 0.004 * last.report.rounds))
        next_limits[column] = min(limits.get(column, int(bound[column])), least)
    return next_limits


def looser(limits: Limits, last: Round, again: Prediction) -> Limits:
    """The limit on latency for a round that spends what the last answer left over, to come out `MARGIN` below the budget, or
    as far as measurements are uncertain.

    again: what the model, fitted with the measurement, predicts of that answer now. If what it has learnt held for every other
    answer, the limit would rise by the rest, and by the sigma that the search keeps off it; if for none, by all that was left.
    Half-way.
    """
    measured, bound = last.report.measured["latency"], last.report.bound["latency"]
    margin = max(MARGIN, 1.0 - measured / last.report.judged.upper["latency"])
    learnt = bound * (again.time_ns / measured + KAPPA * again.sigma_ns / again.time_ns)
    unlearnt = limits["latency"] * bound / measured
    limit = min((1.0 - margin) * (learnt + unlearnt) / 2.0, MOST_SPENT * bound)
    return {**limits, "latency": max(limits["latency"], int(limit))}

"""Several runtimes on one machine: how fast each runs the dense network, and which of their answers is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import Any

from hwsearch import files
from hwsearch.allocate.budget import TAILS, Budget
from hwsearch.allocate.front import Front
from hwsearch.deployment.confirm import State
from hwsearch.deployment.report import Report
from hwsearch.device import fingerprint as devices
from hwsearch.device.lock import lock
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, BudgetMissed, HwsearchError, Infeasible
from hwsearch.network.variants import uniform
from hwsearch.plot import plot_fronts
from hwsearch.progress import Progress

RACE = Protocol(width=0.01, limit_s=4.0)


def dense_ratios(setups: Sequence[Setup], say: Callable[[str], None] | None = None) -> dict[str, float]:
    """Backend -> time of its dense fp32 network over that of the fastest, all timed in turns.

    Raises BackendUnavailable where a runtime does not build the network.
    """
    first, *others = setups
    with ExitStack() as stack:
        for device in sorted({devices.fingerprint_for(s.backend).id for s in setups}):
            stack.enter_context(lock(device, say=say))
        engines = {s.backend.name: s.build(uniform(s.network, "fp32"), "fp32")[0] for s in setups}
        name = first.backend.name
        timed = paired(engines[name].run, {o.backend.name: engines[o.backend.name].run for o in others}, RACE, clock=first.clock)
    times = {name: 1.0, **{other: timing.ratio for other, timing in timed.items()}}
    return {backend: time / min(times.values()) for backend, time in times.items()}


def of_own(budgets: Sequence[Budget], ratio: float) -> tuple[Budget, ...]:
    """Budgets as shares of the fastest runtime's dense network, as shares of a runtime's own; absolute ones stay.

    Only times are changed: sizes, MACs and memory of the dense network are those of every runtime, energies are not compared.

    Args:
        ratio: Time of the runtime's dense network over that of the fastest.
    """
    return tuple(_of_own(b, ratio) if b.kind != "absolute" and b.column in ("latency", *TAILS) else b for b in budgets)


def _of_own(budget: Budget, ratio: float) -> Budget:
    value = Decimal(repr(budget.value))
    if budget.kind == "fraction":
        return replace(budget, value=float(Context(prec=4, rounding=ROUND_FLOOR).divide(value, Decimal(ratio))))
    return replace(budget, value=float(Context(prec=4, rounding=ROUND_CEILING).multiply(value, Decimal(ratio))))


def run_each(
    run_one: Callable[[str, Sequence[Budget], Path, float], Report],
    ratios: Mapping[str, float],
    budgets: Sequence[Budget],
    folder: Path,
    left_s: Callable[[], float],
    progress: Progress,
) -> Report:
    """Run every runtime into a folder of its own; the best answer's files come into `folder`.

    The best met its budgets for sure, else within the noise, else came nearest; of several it lost least, as measured.

    Args:
        run_one: Runs one: backend, its budgets, its folder, its time limit in seconds.
        ratios: See `dense_ratios`; runtimes run in the order of it.
        budgets: Shares of times are of the fastest runtime's dense network.
        folder: Gets a folder for each runtime, and the best answer.
        left_s: Seconds that are left to all of them.
        progress: Is told of each.

    Raises:
        Infeasible: No runtime can meet the budgets, as predicted.
        BudgetMissed: None met them as measured.
        BackendUnavailable: None could run the network.
    """
    reports: dict[str, Report] = {}
    failed: dict[str, HwsearchError] = {}
    for number, (name, ratio) in enumerate(ratios.items()):
        own = of_own(budgets, ratio)
        slower = "the fastest dense network" if ratio == 1.0 else f"its dense network takes {ratio:.3g} times the fastest's"
        progress.say(f"{name}: {slower}; {', '.join(map(str, own))} of its own")
        try:
            reports[name] = run_one(name, own, folder / name, max(left_s() / (len(ratios) - number), 1.0))
        except BudgetMissed as error:
            failed[name] = error
            if isinstance(error.nearest, Report):
                reports[name] = error.nearest
        except (Infeasible, BackendUnavailable) as error:
            failed[name] = error
            progress.say(f"{name}: {error}")
    if not reports:
        raise _nothing(failed, ratios)
    best = min(reports, key=lambda n: reports[n].rank)
    report = replace(reports[best], runtimes=[_line(n, ratios[n], reports.get(n), failed.get(n)) for n in ratios])
    for file in ("model.onnx", "alloc.json"):
        files.copy(folder / best / file, folder / file)
    report.save(folder / "report.json")
    _leave_fronts(folder, ratios, reports)
    if report.state == State.MISSED:
        raise BudgetMissed(f"of {len(ratios)} runtimes none met the budgets; {best} came nearest: {failed[best]}", nearest=report)
    return report


def _line(name: str, ratio: float, report: Report | None, error: HwsearchError | None) -> dict[str, Any]:
    """What a report says of one of several runtimes."""
    line: dict[str, Any] = {"backend": name, "dense_over_fastest": ratio}
    if report is None:
        return {**line, "error": str(error)}
    latency = report.latency_ms
    return {
        **line, "state": str(report.state), "latency_ms": latency["measured"], "dense_ms": latency["dense"],
        "loss": report.loss["measured"], "score": report.score["deployed"], "size_bytes": report.measured.size,
    }  # fmt: skip


def _nothing(failed: Mapping[str, HwsearchError], ratios: Mapping[str, float]) -> HwsearchError:
    """The error where no runtime has an answer: the runtime whose least is nearest to its budget is named first."""
    said = "; ".join(f"{name}: {error}" for name, error in failed.items())
    impossible = {name: e for name, e in failed.items() if isinstance(e, Infeasible)}
    if not impossible:
        return BackendUnavailable(f"none of the runtimes {', '.join(ratios)} can run this network: {said}")
    fastest = min(impossible, key=lambda n: ratios[n])
    return Infeasible(f"no runtime can meet the budgets: {said}", impossible[fastest].least)


def _leave_fronts(folder: Path, ratios: Mapping[str, float], reports: Mapping[str, Report]) -> None:
    found = {n: folder / n / "front.parquet" for n in reports}
    fronts = {n: Front.load(path) for n, path in found.items() if path.exists()}
    if fronts:
        plot_fronts(fronts, folder / "front.png", ratios=ratios)

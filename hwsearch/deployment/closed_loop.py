"""The whole line: profile, score, search, deploy, verify, and once more where the measurement says so."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import TAILS, Budget, parse_budgets
from hwsearch.allocate.front import Point
from hwsearch.allocate.search import KAPPA, front, search
from hwsearch.backends.base import Backend
from hwsearch.compress.bank import WeightBank
from hwsearch.deployment.deploy import as_deployed, deploy, parse_variants
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Session
from hwsearch.deployment.verify import verify_with_build
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import BudgetMissed, IncompatibleTables, Infeasible
from hwsearch.latency.model import LatencyModel, Prediction, fit
from hwsearch.loss.sensitivity import SensitivityTable, measure_sensitivity
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.choices import AXES, RESIDUAL, STORAGE, check_axes
from hwsearch.network.variants import STORAGE as IN_INT8
from hwsearch.network.variants import legal
from hwsearch.plot import plot_front
from hwsearch.profiler.profile import profile
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable
from hwsearch.task import Task

MAX_ROUNDS = 5
FRONT_POINTS = 12
SPARE, MOST_SPENT, MARGIN = 0.025, 1.15, 0.02
"""How much faster than asked is worth another round, by how much at most the limit is raised for it, and what is left to noise."""


def run(
    task: Task,
    budgets: Sequence[str | Budget],
    out: str | Path,
    *,
    backend: str | Backend = "openvino",
    threads: int = 1,
    base: str | None = None,
    batch: int | None = None,
    seed: int = 0,
    time_limit_s: float = 600.0,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    load: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Find and deploy the allocation of least loss that meets the budgets as measured on this device.

    axes: what may be chosen, `width`, `precision` or both, `residual` beside `width`, and `storage` beside `precision`, which a
    budget on size brings with it. keep: patterns of names of units
    whose channels all stay. load: busy workers beside the network, while profiling and verifying.
    Leaves table.parquet, sens.parquet, alloc.json, model.onnx, report.json and front.png in `out`, and refitted weights in
    `weights`; another run there, with another budget, uses the table and the sensitivities again.
    Raises Infeasible (with the least that can be met) and BudgetMissed (after five rounds; the nearest is left in `out`).
    """
    parsed = parse_budgets([str(b) for b in budgets])
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    progress = progress or Progress.silent()
    runtime = backends.get(backend) if isinstance(backend, str) else backend
    axes = check_axes(axes)
    storage = STORAGE in axes or ("precision" in axes and any(b.column == "size" for b in parsed))
    energy = any(b.column == "energy" for b in parsed)
    setup = set_up(
        task, runtime, threads=threads, base=base, batch=batch, residual=RESIDUAL in axes, load=load, storage=storage,
        energy=energy,
    )  # fmt: skip
    table_path, sens_path = folder / "table.parquet", folder / "sens.parquet"
    if sens_path.exists():  # before an hour of profiling
        try:
            SensitivityTable.load(sens_path).require(setup.network, setup.lowering.int8_bits, setup.lowering.unsigned)
        except IncompatibleTables as error:
            raise IncompatibleTables(
                f"{folder} holds the sensitivities of another network, batch or input shape, of one with or without the axis "
                f"residual, or of int8 weights of other bits; run into another folder ({error})"
            ) from error
    table = profile(
        setup, table_path, time_limit_s=time_limit_s, axes=axes, seed=seed, progress=progress, extend=False
    )
    grid = table.grid() if "width" in axes else {}
    weights = folder / "weights"
    sensitivity = sensitivity_for(setup, sens_path, seed=seed, grid=grid, weights=weights, progress=progress)
    report, _, table = closed_loop(
        task, setup, table, sensitivity, parsed, folder, progress, axes=axes, keep=keep, weights=weights
    )
    table.save(table_path)
    sweep = front(table, sensitivity, axes=axes, keep=keep).with_measured(measured_points(report))
    sweep.save(folder / "front.parquet")
    plot_front(sweep, folder / "front.png")
    if not report.met:
        raise BudgetMissed(
            f"no allocation met {', '.join(map(str, parsed))} as measured in {report.rounds} rounds; the nearest measured "
            f"{report.latency_ms['measured']:.4g} ms, {report.size_bytes['deployed']:,.0f} bytes and is in {folder}. "
            "Ask for a little more, or profile again on a quieter machine.",
            nearest=report,
        )
    return report


def sensitivity_for(
    setup: Setup,
    path: str | Path | None,
    *,
    seed: int = 0,
    grid: Mapping[str, Sequence[int]] | None = None,
    weights: str | Path | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """The sensitivities at `path` where they are of this network and form, else measured anew.

    grid: widths of the channel groups to score. weights: folder of refitted weights to use and to leave.
    """
    variants = setup.variants()
    wanted = {u.name: set(map(str, legal(u, variants))) for u in setup.network.units}
    narrower = {g: steps for g, steps in (grid or {}).items() if len(steps) > 1}
    if path is not None and Path(path).exists():
        found = SensitivityTable.load(path)
        found.require(setup.network, setup.lowering.int8_bits, setup.lowering.unsigned)
        have = {v for row in found.loss.values() for v in row}
        missing = {v for u, own in wanted.items() for v in own - {*found.loss[u], *found.refused.get(u, {})}}
        if missing - {str(IN_INT8)} or found.quantize_outputs != setup.backend.quantize_outputs:
            raise IncompatibleTables(
                f"{path} was made for another backend or base precision (it holds {', '.join(sorted(have))}); give another file"
            )
        scored = {g: {f"width{w}" for w in own} for g, own in found.width_loss.items()}
        if not missing and all(
            {f"width{w}" for w in steps} <= {*scored.get(g, ()), *found.refused.get(g, {})}
            for g, steps in narrower.items()
        ):
            return found
    bank = None
    if narrower:
        progress_ = progress or Progress.silent()
        progress_.start(None, "finding which channels matter")
        bank = weight_bank(setup.lowering, weights)
        progress_.stop()
    elif any(v.precision == "int8" for v in variants):
        bank = weight_bank(setup.lowering, weights, {g: range(n) for g, n in setup.network.channels.items()})
    return measure_sensitivity(
        setup.lowering, path, variants=variants, quantize_outputs=setup.backend.quantize_outputs,
        kind=setup.lowering.task.divergence, seed=seed, grid=narrower, bank=bank, progress=progress,
    )  # fmt: skip


def closed_loop(
    task: Task,
    setup: Setup,
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[Budget],
    folder: Path,
    progress: Progress | None = None,
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    weights: str | Path | None = None,
    session: Session | None = None,
) -> tuple[Report, Allocation, LatencyTable]:
    """Search, deploy and measure until the budget holds as measured, at most five times.

    Each measurement joins the table and the model is fitted again; the limits also fall by what it still misses of the
    last answer, so that every round asks for less. An answer that is faster than asked by more than `SPARE` is followed by one
    more round, which asks for what it left over. Leaves in `folder` the files of the best round: of least loss of those that met
    the budgets, else the nearest.
    """
    progress = progress or Progress.silent()
    progress.start(MAX_ROUNDS, "search, deploy and verify")
    session = session or Session(setup, table)
    table = table.with_header(unsupported=_without_refused(table, sensitivity))
    # relative budgets are of the dense network as it is now, not as it was when the table was made
    wanted, dense = session.limits(budgets, table)
    tighten = {} if all(dense[column] <= limit for column, limit in wanted.items()) else dict(wanted)
    best: tuple[tuple[bool, float], Report, Allocation] | None = None
    last: tuple[Report, Allocation] | None = None
    bank: WeightBank | None = None
    spending = False
    try:
        for number in range(1, MAX_ROUNDS + 1):
            model = fit(table)
            if last is not None:
                again = _predicted(model, last[1])
                if spending:
                    tighten = _looser(tighten, last[0], again)
                else:
                    tighten = _tighter(tighten, wanted, *last, again, step=number - 1)
            try:
                allocation = search(
                    table, sensitivity, budgets, axes=axes, keep=keep, model=model, tighten=tighten
                )
            except Infeasible:
                if best is None:
                    raise
                break  # nothing predicted to be faster is left
            if last is not None and (allocation.variants, allocation.widths) == (
                last[1].variants,
                last[1].widths,
            ):
                if spending:
                    break
                tighten = {c: int(limit * 0.98) for c, limit in (tighten or wanted).items()}
                continue
            if bank is None and allocation.narrow:
                bank = weight_bank(setup.lowering, weights, sensitivity.order)
            own = as_deployed(setup, allocation, bank)
            deploy(task, allocation, folder / f"round{number}.onnx", setup=own)
            report, build = verify_with_build(
                task, allocation, table=table, setup=setup, own=own, rounds=number, session=session
            )
            table = table.with_build(replace(build, role="deployed"))
            if report.wrong_units:
                table = table.with_header(unsupported=_without_wrong(table, allocation, report.wrong_units))
            table.save(folder / "table.parquet")
            progress.step(
                f"round {number}: {report.latency_ms['measured']:.4g} ms measured, "
                f"{report.latency_ms['predicted']:.4g} predicted, {report.verdict}"
            )
            rank = (not report.met, report.loss["measured"] if report.met else _excess(report))
            if best is None or rank < best[0]:
                best = rank, report, allocation
                _keep(folder, number, report, allocation)
            last = report, allocation
            left = _left_over(report) if report.met and tighten and not spending else 1.0
            if spending or (report.met and left <= 1.0 + SPARE):
                break
            spending = report.met
    finally:
        progress.stop()
        for path in folder.glob("round*.onnx"):
            path.unlink()
    assert best is not None
    assert last is not None
    report = replace(best[1], rounds=last[0].rounds)  # all that it took, the best may not have been the last
    report.save(folder / "report.json")
    return report, best[2], table


def _left_over(report: Report) -> float:
    """Budget / measured of the latency, where that alone is bounded; else 1."""
    costs = _against_budgets(report)
    if set(costs) != {"latency"}:
        return 1.0
    measured, bound = costs["latency"]
    return bound / measured


def _without_refused(table: LatencyTable, sensitivity: SensitivityTable) -> dict[str, dict[str, str]]:
    """What the table does not offer, with the variants that have no loss."""
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit in table.network.units:
        if own := sensitivity.refused.get(unit.name):
            kept = {v: why for v, why in own.items() if not v.startswith("width")}
            refused[unit.name] = {**refused.get(unit.name, {}), **kept}
    return refused


def _without_wrong(
    table: LatencyTable, allocation: Allocation, wrong: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """What is not offered any more once an allocation's engine returned wrong outputs by these units."""
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit, why in wrong.items():
        refused.setdefault(unit, {})[allocation.variants[unit]] = why
    return refused


def _predicted(model: LatencyModel, allocation: Allocation) -> Prediction:
    """What a model says of an allocation; of one under another base (the dense one) what was said before."""
    if allocation.options["base"] != model.table.header.options["base"]:
        return Prediction(float(allocation.predicted["latency_ns"]), float(allocation.predicted["sigma_ns"]))
    return model.predict(parse_variants(allocation), allocation.widths)


def _tighter(
    old: Mapping[str, int],
    wanted: Mapping[str, int],
    report: Report,
    allocation: Allocation,
    again: Prediction,
    step: int,
) -> dict[str, int]:
    """Limits for the next round, by what the last answer was over.

    again: what the model, fitted with the measurement, says of that answer now. Where it has learnt the whole difference
    the latency limit stays; else it falls by the rest. Every round asks for a little less.
    """
    costs = _against_budgets(report)
    now = {
        "latency": again.time_ns,
        "size": allocation.predicted["size_bytes"],
        "macs": allocation.predicted["macs"],
        "memory": allocation.predicted["memory_bytes"],
        "energy": allocation.predicted.get("energy_nj", 0.0),
    }
    tighter = dict(old)
    for column, limit in wanted.items():
        measured, bound = costs[column]
        if measured > bound:
            tail = allocation.predicted.get(f"{column}_ns", 0.0) / allocation.predicted["latency_ns"]
            predicted = now[column] if column in now else again.time_ns * tail
            short = min(1.0, predicted / measured)
            tighter[column] = min(old.get(column, limit), int(limit * short * (1.0 - 0.004 * step)))
    return tighter


def _looser(old: Mapping[str, int], report: Report, again: Prediction) -> dict[str, int]:
    """The limit on latency for a round that spends what the last answer left over, to come out `MARGIN` below the budget.

    again: what the model, fitted with the measurement, says of that answer now. If what it has learnt held for every other
    answer, the limit would rise by the rest, and by the sigma that the search keeps off it; if for none, by all that was left.
    Half-way.
    """
    measured, bound = _against_budgets(report)["latency"]
    learnt = bound * (again.time_ns / measured + KAPPA * again.sigma_ns / again.time_ns)
    unlearnt = old["latency"] * bound / measured
    limit = min((1.0 - MARGIN) * (learnt + unlearnt) / 2.0, MOST_SPENT * bound)
    return {**old, "latency": max(old["latency"], int(limit))}


def _excess(report: Report) -> float:
    """How far over its budgets an allocation measured, relatively (0 and below: met); the worst of them."""
    return max((measured / bound - 1.0 for measured, bound in _against_budgets(report).values()), default=0.0)


def _against_budgets(report: Report) -> dict[str, tuple[float, float]]:
    """(measured, bound) of every cost that has a budget, in ns, bytes and MACs."""
    times = {"latency": ("measured", "budget")}
    times |= {t: (t.removeprefix("latency_"), f"budget_{t.removeprefix('latency_')}") for t in TAILS}
    pairs = {c: (report.latency_ms.get(m), report.latency_ms.get(b), 1e6) for c, (m, b) in times.items()}
    pairs["size"] = report.size_bytes["deployed"], report.size_bytes["budget"], 1.0
    pairs["energy"] = report.energy_mj.get("measured"), report.energy_mj.get("budget"), 1e6
    for column, costs in (("macs", report.macs), ("memory", report.memory)):
        pairs[column] = costs.get("deployed"), costs.get("budget"), 1.0
    return {c: (m * scale, b * scale) for c, (m, b, scale) in pairs.items() if m is not None and b}


def _keep(folder: Path, number: int, report: Report, allocation: Allocation) -> None:
    shutil.copyfile(folder / f"round{number}.onnx", folder / "model.onnx")
    allocation.save(folder / "alloc.json")
    report.save(folder / "report.json")


def measured_points(report: Report) -> list[Point]:
    """Measured allocations to draw on a front: the deployed one, with its interval."""
    latency = {
        name: (value if value is not None else float("nan")) * 1e6
        for name, value in report.latency_ms.items()
    }
    return [
        Point(
            label="deployed",
            latency_ns=latency["measured"],
            low_ns=latency["measured_low"],
            high_ns=latency["measured_high"],
            size_bytes=float(report.size_bytes["deployed"] or 0),
            memory_bytes=float(report.memory.get("deployed") or float("nan")),
            loss=report.loss["measured"],
            score=report.score["deployed"],
            variants=tuple(report.variants.values()),
            widths=tuple(kept for kept, _ in report.widths.values()),
        )
    ]

"""Predicted beside measured: whether an allocation meets its budgets on this device, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import Budget, parse_budgets
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.deployment.confirm import MEASURED, MOST_WINDOWS, Judgement, State, Window, decided, judge
from hwsearch.deployment.deploy import metadata_of, parse_variants
from hwsearch.deployment.report import Report, Timed
from hwsearch.deployment.session import DENSE, Job, Measured, Session, require_energy, uniform_candidates
from hwsearch.deployment.unexplained import unexplained
from hwsearch.device import fingerprint as devices
from hwsearch.engine.record import wrong_variants
from hwsearch.engine.setup import Setup
from hwsearch.loss.table import NOT_FINITE
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable


def measure_allocation(
    session: Session,
    allocation: Allocation,
    deployed: Setup,
    *,
    table: LatencyTable | None = None,
    budgets: Sequence[Budget] | None = None,
    rounds: int = 1,
) -> tuple[Report, Build]:
    """Measure an allocation beside every uniform one; returns the report, and the build for the table.

    Where that is within the budgets or near, it is measured again in other windows, in each as a newly built engine beside a
    newly built dense one, and these alone decide: the first measurement is the one that chose it.

    Args:
        session: Engines timed together, which give the scale. Uniform allocations are measured once in a session.
        allocation: What to measure.
        deployed: The session's setup at the allocation's widths, its weights refitted.
        table: Of this device and network; what it does not offer is left out of the uniform allocations.
        budgets: Those to hold; None for the allocation's own.
        rounds: Rounds of the closed loop until now, for the report.
    """
    setup, variants = session.setup, parse_variants(allocation)
    base = str(allocation.options.get("base", setup.options.base))
    base = base if base in setup.backend.bases() else setup.options.base
    unsupported = table.header.unsupported if table is not None else {}
    job = Job(variants, base, metadata_of(allocation, base), deployed)
    own, uniforms = session.measure_all(job, uniform_candidates(setup, unsupported))
    assert own is not None
    if budgets is None:
        budgets = parse_budgets([b["text"] for b in allocation.budgets]) if allocation.budgets else ()
    dense = session.costs(uniforms[DENSE])
    require_energy(budgets, dense)
    bound = bounds(budgets, dense)  # of the window in which the uniform allocations were measured
    first = session.as_window(uniforms[DENSE] if own.build.key == uniforms[DENSE].build.key else own, uniforms[DENSE])
    judged = _judged(session, job, first, budgets)
    measured = judged.measured
    drift = None
    if table is not None and table.header.mode != Mode.SANDWICHED and _parted(measured, allocation):
        drift = session.check(table).to_json()
    loss = {"predicted": allocation.predicted["loss"], "measured": session.loss(own)}
    score = {"dense": session.dense_score, "deployed": session.score(own, "the deployed engine")}
    report = Report(
        task=setup.lowering.task.name,
        backend=setup.backend.name,
        device=devices.fingerprint_for(setup.backend).to_json(),
        options={**setup.described, "base": base},
        rounds=rounds,
        predicted=allocation.costs,
        judged=judged,
        timed=_timed(session, own, judged, allocation),
        score=score,
        loss=loss,
        widths={g: [w, setup.network.channels[g]] for g, w in deployed.network.channels.items()},
        solver={"status": allocation.solver["status"], "gap": allocation.solver["gap"]},
        uniform=best_uniform(session, uniforms, bound),
        uniforms=[_as_row(session, n, m, met=_meets(session, m, bound)) for n, m in uniforms.items()],
        variants=dict(allocation.variants),
        not_as_asked=_not_as_asked(setup, own.build),
        unstable=session.unstable(own) or session.unstable(uniforms[DENSE]),
        output_error=own.build.output_error,
        wrong_outputs=own.build.wrong,
        wrong_units=wrong_variants(deployed, variants, base) if own.build.wrong else {},
        unexplained=unexplained(deployed, setup, variants, base, loss, score),
        table_check=drift,
        slowdown=session.slowdown,
        float_only=_float_only(setup, unsupported),
        properties=dict(getattr(own.engine, "properties", {})),
    )
    return report, own.build


def _meets(session: Session, measured: Measured, bound: Costs) -> bool:
    """Whether right outputs came at costs within all bounds."""
    return not measured.build.wrong and session.costs(measured).within(bound)


def _judged(session: Session, job: Job, first: Window, budgets: Sequence[Budget]) -> Judgement:
    """By windows of newly built engines, where the first measurement is within the budgets or near them; else by that one."""
    earlier = session.earlier()
    judged = judge([first], earlier, budgets)
    far = judged.state == State.MISSED and decided(judged)
    if first.wrong or far or first.deployed == first.dense or not any(c in MEASURED for c in judged.bound.known()):
        return judged
    if earlier[0] is not None:
        earlier[0] = [*earlier[0], first.dense]
    windows: list[Window] = []
    while len(windows) < MOST_WINDOWS:
        left_s = session.limit.left_s
        windows.append(session.window(job))
        judged = judge(windows, earlier, budgets)
        if decided(judged) or session.limit.left_s < left_s - session.limit.left_s:
            break
    return judged


def _timed(session: Session, measured: Measured, judged: Judgement, allocation: Allocation) -> Timed:
    return Timed(
        sigma=allocation.predicted.get("sigma_ns"),
        unconverted=judged.measured["latency"] * measured.timing.ratio * session.scale_ns / session.time_ns(measured),
        reference=session.scale_ns,
        reference_now=session.reference_now_ns,
    )


def best_uniform(session: Session, uniforms: Mapping[str, Measured], bound: Costs) -> dict[str, Any] | None:
    """The uniform allocation of the best score that meets the same budgets, the faster of two as good; None without one."""
    scores = {name: session.score(m, name) for name, m in uniforms.items() if _meets(session, m, bound)}
    best = max(scores, key=lambda n: (scores[n], -session.ms(uniforms[n])), default=None)
    return None if best is None else _as_row(session, best, uniforms[best], score=scores[best])


def _as_row(session: Session, name: str, measured: Measured, **more: Any) -> dict[str, Any]:
    """A uniform allocation in a report."""
    return {
        "variant": name,
        "latency_ms": session.ms(measured),
        "size_bytes": measured.file_bytes,
        **more,
    }


def _not_as_asked(setup: Setup, build: Build) -> dict[str, str]:
    """Units that the engine executed in another precision than asked for."""
    return {
        u.name: f"asked {v}, executed in {e}"
        for u, v, e in zip(setup.network.units, build.variants, build.executed, strict=True)
        if e and not Variant.parse(v).runs_as(e)
    }


def _float_only(setup: Setup, unsupported: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Units that are not quantized for what they read, or for what their simulation returns, and why."""
    read = {u.name: u.float_only for u in setup.network.units if u.float_only}
    lost = {
        unit: f"as {v}, {why}"
        for unit, reasons in unsupported.items()
        for v, why in reasons.items()
        if why == NOT_FINITE
    }
    return {**lost, **read}


def _parted(measured: Costs, allocation: Allocation) -> bool:
    """Whether a measurement is further from the prediction than that is uncertain."""
    if "latency_ns" not in allocation.predicted:
        return False
    predicted, sigma = allocation.predicted["latency_ns"], allocation.predicted["sigma_ns"]
    return bool(abs(measured["latency"] - predicted) > max(3 * sigma, 0.05 * predicted))

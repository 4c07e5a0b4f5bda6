"""Predicted beside measured: whether an allocation meets its budgets on this device, as a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import TAILS, parse_budgets
from hwsearch.backends.base import Backend
from hwsearch.deployment.deploy import as_deployed, bank_of, metadata_of, of_allocation, parse_variants
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Job, Measured, Session, require_energy, uniform_candidates
from hwsearch.deployment.unexplained import unexplained
from hwsearch.device import fingerprint as devices
from hwsearch.engine.setup import Setup, wrong_variants
from hwsearch.loss.sensitivity import NOT_FINITE
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build
from hwsearch.table.header import SANDWICHED
from hwsearch.table.table import LatencyTable
from hwsearch.task import Task


def verify(
    task: Task,
    allocation: Allocation,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    lock_clocks: bool = False,
    setup: Setup | None = None,
    rounds: int = 1,
    session: Session | None = None,
) -> Report:
    """Measure an allocation on this device and report predicted beside measured.

    Latencies are ratios to engines timed in the same session, on the scale of the table's session where one is
    given. The budget holds only as measured. weights: as for `deploy`. lock_clocks: as for `profile`.
    Raises IncompatibleTables where the table is of another device.
    """
    report, _ = verify_with_build(
        task, allocation, backend=backend, threads=threads, table=table, weights=weights, lock_clocks=lock_clocks,
        setup=setup, rounds=rounds, session=session,
    )  # fmt: skip
    if out is not None:
        report.save(out)
    return report


def verify_with_build(
    task: Task,
    allocation: Allocation,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    lock_clocks: bool = False,
    setup: Setup | None = None,
    own: Setup | None = None,
    rounds: int = 1,
    session: Session | None = None,
) -> tuple[Report, Build]:
    """As `verify`, with the measured build for the table. own: `setup` at the allocation's widths."""
    setup = setup or of_allocation(task, allocation, backend, threads, lock_clocks)
    device = devices.fingerprint_for(setup.backend)
    if table is not None:
        table.require(device=device.to_json(), network=setup.network, backend=setup.backend.name)
    session = session or Session(setup, table)
    base = str(allocation.options.get("base", setup.options.base))
    variants = parse_variants(allocation)
    unsupported = table.header.unsupported if table is not None else {}
    candidates = uniform_candidates(setup, unsupported)
    base = base if base in setup.backend.bases() else setup.options.base
    own = own or as_deployed(setup, allocation, bank_of(setup, allocation, weights))
    job = Job(variants, base, metadata_of(allocation, base), own)
    deployed, measured = session.measure_all(job, candidates)
    assert deployed is not None
    dense = measured["dense.fp32"]
    budgets = parse_budgets([b["text"] for b in allocation.budgets]) if allocation.budgets else ()
    require_energy(budgets, session.costs(dense))
    limit = {b.column: b.resolve(session.costs(dense)[b.column]) for b in budgets}
    costs = session.costs(deployed)
    drift = None
    if table is not None and table.header.mode != SANDWICHED and _parted(costs["latency"], allocation):
        drift = session.check(table).to_json()
    loss = {"predicted": allocation.predicted["loss"], "measured": session.loss(deployed)}
    score = {"dense": session.dense_score, "deployed": session.score(deployed, "the deployed engine")}
    report = Report(
        task=task.name,
        backend=setup.backend.name,
        device=device.to_json(),
        options={**setup.described, "base": base},
        met=_within(session, deployed, limit),
        rounds=rounds,
        latency_ms=_latency_ms(session, dense, deployed, allocation, limit),
        score=score,
        loss=loss,
        size_bytes={
            "dense": dense.file_bytes,
            "budget": limit.get("size"),
            "predicted": allocation.predicted["size_bytes"],
            "deployed": deployed.file_bytes,
        },
        macs={"dense": setup.network.macs, "budget": limit.get("macs"), "deployed": own.network.macs},
        memory={
            "dense": session.costs(dense)["memory"],
            "budget": limit.get("memory"),
            "deployed": costs["memory"],
            "source": "estimated",
        },
        energy_mj=_energy_mj(session, dense, deployed, allocation, limit),
        widths={g: [w, setup.network.channels[g]] for g, w in own.network.channels.items()},
        solver={"status": allocation.solver["status"], "gap": allocation.solver["gap"]},
        uniform=_best_uniform(session, {n: measured[n] for n in candidates}, limit),
        uniforms=[
            {"variant": n, "latency_ms": session.ms(m), "size_bytes": m.file_bytes, "met": _within(session, m, limit)}
            for n, m in measured.items()
        ],
        variants=dict(allocation.variants),
        not_as_asked=_not_as_asked(setup, deployed.build),
        unstable=deployed.timing.unstable or dense.timing.unstable,
        output_error=deployed.build.output_error,
        wrong_outputs=deployed.build.wrong,
        wrong_units=wrong_variants(own, variants, base) if deployed.build.wrong else {},
        unexplained=unexplained(own, setup, variants, base, loss, score),
        table_check=drift,
        slowdown=session.slowdown,
        float_only=_float_only(setup, unsupported),
    )
    return report, deployed.build


def _within(session: Session, measured: Measured, limit: Mapping[str, int]) -> bool:
    """Whether right outputs came at costs below all limits, in ns, nJ, bytes and MACs."""
    costs = session.costs(measured)
    # a nanosecond (or nanojoule) of slack: a time of 100 % is rounded down to whole ones; bytes and MACs are whole
    slack = {c: int(c.startswith("latency") or c == "energy") for c in limit}
    return not measured.build.wrong and all(costs[c] <= bound + slack[c] for c, bound in limit.items())


def _latency_ms(
    session: Session, dense: Measured, deployed: Measured, allocation: Allocation, limit: Mapping[str, int]
) -> dict[str, float | None]:
    """See `Report.latency_ms`."""
    costs, timing = session.costs(deployed), deployed.timing
    return {
        "dense": session.ms(dense),
        "budget": limit["latency"] / 1e6 if "latency" in limit else None,
        "predicted": allocation.predicted["latency_ns"] / 1e6,
        "sigma": allocation.predicted["sigma_ns"] / 1e6,
        "measured": session.ms(deployed),
        "measured_low": timing.low / timing.ratio * session.ms(deployed),
        "measured_high": timing.high / timing.ratio * session.ms(deployed),
        "measured_unconverted": timing.ratio * session.scale_ns / 1e6,
        "measured_now": timing.median_ns / 1e6,
        "reference": session.scale_ns / 1e6,
        "reference_now": session.reference_now_ns / 1e6,
        **{column.removeprefix("latency_"): costs[column] / 1e6 for column in TAILS},
        **{f"budget_{c.removeprefix('latency_')}": limit[c] / 1e6 for c in TAILS if c in limit},
    }


def _energy_mj(
    session: Session, dense: Measured, deployed: Measured, allocation: Allocation, limit: Mapping[str, int]
) -> dict[str, float | None]:
    """See `Report.energy_mj`."""
    if "energy" not in session.costs(deployed):
        return {}
    predicted = allocation.predicted.get("energy_nj")
    return {
        "dense": session.costs(dense)["energy"] / 1e6,
        "budget": limit["energy"] / 1e6 if "energy" in limit else None,
        "predicted": predicted / 1e6 if predicted is not None else None,
        "measured": session.costs(deployed)["energy"] / 1e6,
    }


def _best_uniform(
    session: Session, measured: Mapping[str, Measured], limit: Mapping[str, int]
) -> dict[str, Any] | None:
    """The uniform allocation of the best score that meets the same limits, the faster of two as good; None without one."""
    scores = {name: session.score(m, name) for name, m in measured.items() if _within(session, m, limit)}
    best = max(scores, key=lambda n: (scores[n], -session.ms(measured[n])), default=None)
    if best is None:
        return None
    return {
        "variant": best,
        "latency_ms": session.ms(measured[best]),
        "score": scores[best],
        "size_bytes": measured[best].file_bytes,
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
        u: f"as {v}, {why}" for u, own in unsupported.items() for v, why in own.items() if why == NOT_FINITE
    }
    return {**lost, **read}


def _parted(measured_ns: float, allocation: Allocation) -> bool:
    """Whether a measurement is further from the prediction than that is uncertain."""
    predicted, sigma = allocation.predicted["latency_ns"], allocation.predicted["sigma_ns"]
    return bool(abs(measured_ns - predicted) > max(3 * sigma, 0.05 * predicted))

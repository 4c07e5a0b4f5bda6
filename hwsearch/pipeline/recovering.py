"""The answer of a run, trained: exported and measured again beside the same engines, in the places of the refitted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hwsearch import files
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import Budget
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import as_deployed, bank_of, deploy, kept_of, parse_variants
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Session
from hwsearch.deployment.verify import measure_allocation
from hwsearch.plot import plot_recovery
from hwsearch.progress import Progress
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.table.table import LatencyTable

TRAINED, PICTURE = "trained.safetensors", "recover.png"


def recovered_answer(
    session: Session,
    allocation: Allocation,
    report: Report,
    folder: Path,
    options: Options,
    *,
    table: LatencyTable | None,
    budgets: Sequence[Budget],
    weights: str | Path | None,
    progress: Progress,
) -> Report:
    """Train the answer that `folder` holds; its model and report are then of the trained one, where that is better.

    The refitted one stays where held-out data show nothing better, or the trained one misses a budget that the refitted one met.
    Raises HwsearchError where training cannot go on: all that the folder holds is then as it was.
    """
    setup = session.setup
    start = as_deployed(setup, allocation, bank_of(setup, allocation, weights))
    done = Recovery(
        setup.lowering, start.lowering, kept_of(allocation, setup.network), parse_variants(allocation), options,
        quantize_outputs=setup.backend.quantize_outputs, out=folder / TRAINED, progress=progress,
    ).run()  # fmt: skip
    told = {**done.to_json(), "kept": False, "why": "held-out loss", "latency_ms": {"refitted": report.latency_ms["measured"]}}
    told["score"] = {"dense": report.score["dense"], "refitted": report.score["deployed"]}
    new = report
    if done.better:
        progress.start(None, "measuring the recovered network")
        deployed = replace(setup, lowering=done.lowering)
        path = folder / "recovered.onnx"
        deploy(setup.lowering.task, allocation, path, setup=deployed)
        new, _ = measure_allocation(
            session, allocation, deployed, table=table, budgets=budgets, rounds=report.rounds
        )
        told["score"] |= {"recovered": new.score["deployed"]}
        told["latency_ms"] |= {"recovered": new.latency_ms["measured"]}
        if new.state == State.MISSED:
            told["why"], new = "the trained network missed a budget as measured", report
        else:
            told["kept"] = True
            files.copy(path, folder / "model.onnx")
        path.unlink()
        progress.stop()
    new = replace(new, recovery=told)
    new.save(folder / "report.json")
    plot_recovery(told, folder / PICTURE)
    return new

#!/usr/bin/env python
"""Whether floors hold: `hwsearch run --floor` on networks of the zoo, for the least latency and the least size.

Each floor is searched for by itself, from one table and one file of sensitivities of its network. Printed for each: the samples
measured, the final score (on data that chose nothing) and by how many of its standard errors it is above the floor, what the answer
costs beside the dense network, seconds. Held means within two standard errors. With --sweep the size that the search found for
each of the first task's floors stands beside the best of so many points: bounds on the predicted loss from the cheapest
answer's downwards, the exact answer under each scored by the same data and margin as the samples.

What was measured is kept in `--out`: the same command goes on where it was stopped.

    python scripts/bench/floors.py --sweep 100
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

import hwsearch as hs
from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import Budget
from hwsearch.allocate.search import search
from hwsearch.deployment.deploy import as_deployed, metadata_of, parse_variants
from hwsearch.deployment.session import Job, Session
from hwsearch.engine.setup import set_up
from hwsearch.errors import BudgetMissed, Infeasible
from hwsearch.lowering.refitted import weight_bank
from hwsearch.pipeline.floor import SPAN
from hwsearch.pipeline.goal import Floor
from hwsearch.pipeline.scorer import scorer_for
from hwsearch.progress import Progress

TASKS = ("zoo:fashion_resnet", "zoo:minilm", "zoo:efficientnet_lite0")
FLOORS = ("99.5%", "99%", "98%", "95%")
OBJECTIVES = ("latency", "size")
MADE = ("table.parquet", "sens.parquet", "weights")
WITHIN = 2.0
"""Standard errors below the floor that still count as held."""
Row = dict[str, Any]


def main() -> None:
    parser = common.searching(__doc__, TASKS, "bench-floors")
    parser.add_argument("--floors", nargs="+", default=list(FLOORS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--sweep", type=int, default=0, metavar="POINTS", help="of the first task's sizes")
    args = parser.parse_args()
    common.say_machine()
    rows = [row for spec in args.tasks for row in floors(spec, args)]
    held = sum(row["errors"] is None or row["errors"] >= -WITHIN for row in rows if row["samples"] is not None)
    print(f"held within {WITHIN:g} standard errors: {held} of {len(rows)}; most samples {max(r['samples'] or 0 for r in rows)}")
    if args.sweep and "size" in args.objectives:
        tell_sweep(args.tasks[0], args, [row for row in rows if row["task"] == args.tasks[0] and row["objective"] == "size"])


def floors(spec: str, args: argparse.Namespace) -> Iterator[Row]:
    """Every floor and objective of a task."""
    task, out = hs.load(spec), args.out / spec.replace(":", "_")
    for floor in args.floors:
        for objective in args.objectives:
            kept = out / f"{floor}-{objective}" / "row.json"
            if not kept.exists():
                if not (out / "made" / "sens.parquet").exists():
                    common.tables(set_up(task, backends.get("openvino")), out / "made", args)
                write(kept, one(task, spec, floor, objective, out / "made", kept.parent, args.time_limit))
            row = json.loads(kept.read_text())
            print(as_line(row), flush=True)
            yield row


def one(task: hs.Task, spec: str, floor: str, objective: str, made: Path, folder: Path, time_limit_s: float) -> Row:
    """One floor, in a folder with copies of what was made once."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in MADE:
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy
        copy(made / name, folder / name)
    row: Row = {"task": spec, "floor": floor, "objective": objective, "samples": None, "errors": None}
    try:
        report = hs.run(task, [], folder, floor=floor, minimize=objective, time_limit_s=time_limit_s, progress=Progress())
    except (BudgetMissed, Infeasible) as error:
        nearest = getattr(error, "nearest", None)
        if nearest is None:
            return {**row, "failed": str(error)}
        report = nearest
    own: Row = report.floor or {}
    measured, dense = report.judged.measured, report.judged.dense
    return {
        **row, "samples": sum(not s["reused"] for s in own["samples"]), "errors": own["standard_errors"], "held": own["held"],
        "score": report.score["deployed"], "dense": report.score["dense"], "least": own["least"],
        "share": measured[objective] / dense[objective], "cost": measured[objective], "by": own["search"]["by"],
        "allocation": str(folder / "alloc.json"), "seconds": sum(s["seconds"] for s in own["samples"]),
    }  # fmt: skip


def as_line(row: Row) -> str:
    begin = f"{row['task']:24s} {row['floor']:>6s} least {row['objective']:8s}"
    if row["samples"] is None:
        return f"{begin} failed: {row['failed']}"
    errors = "noise not known" if row["errors"] is None else f"{row['errors']:+.1f} standard errors"
    return (
        f"{begin} {row['samples']:2d} samples ({row['by']}), score {row['score']:.4f} of {row['dense']:.4f}, "
        f"floor {row['least']:.4f} ({errors}), {row['share']:.1%} of dense"
    )


def tell_sweep(spec: str, args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """The least size among the points of a sweep that hold each floor, beside what the search found."""
    out = args.out / spec.replace(":", "_")
    setup = set_up(hs.load(spec), backends.get("openvino"))
    table, scores = common.tables(setup, out / "made", args)
    session = Session(setup, table)
    points = sweep(session, table, scores, out, args.sweep)
    for row in rows:
        scorer = scorer_for(session, Floor.parse(row["floor"]))
        fine = [p["size"] for p in points if p["score"] - (p["error"] or 0.0) >= scorer.floor]
        found = Allocation.load(Path(row["allocation"])).costs["size"]
        best = min(fine, default=math.nan)
        print(f"floor {row['floor']}: {found:,.0f} bytes (predicted); least of {len(points)} networks of the sweep {best:,.0f}: "
              f"{found / best - 1.0:+.1%}", flush=True)  # fmt: skip


def sweep(
    session: Session, table: hs.LatencyTable, scores: hs.SensitivityTable, out: Path, count: int
) -> list[Row]:
    """The distinct answers of least size under so many bounds on the predicted loss, scored as samples are."""
    kept = out / "sweep.json"
    points: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    setup = session.setup
    scorer, bank = scorer_for(session, Floor.parse("50%")), weight_bank(setup.lowering, out / "made" / "weights", scores.order)
    high = math.log(2.0 * scores.most() + 1.0)
    cheapest = search(table, scores, [Budget.parse(f"loss={math.exp(high):.6g}")], minimize="size")
    high = math.log(cheapest.predicted["loss"])
    for x in np.linspace(high - SPAN, high, count):
        key = f"loss={math.exp(x) * (1.0 + 5e-6):.6g}"
        if key in points:
            continue
        try:
            allocation = search(table, scores, [Budget.parse(key)], minimize="size")
        except Infeasible:
            continue
        size = allocation.costs["size"]
        same = next((p for p in points.values() if p["size"] == size and p["variants"] == allocation.variants), None)
        if same is None:
            base = str(allocation.options["base"])
            variants = parse_variants(allocation)
            job = Job(variants, base, metadata_of(allocation, base), as_deployed(setup, allocation, bank))
            score, error = scorer(session.measure({"point": job})["point"])
            same = {"size": size, "variants": allocation.variants, "score": score, "error": error}
        write(kept, points | {key: same})
        points[key] = same
        print(f"  {len(points)} points of the sweep: {key}, {size:,.0f} bytes, {same['score']:.4f}", end="\r", flush=True)
    return list({(p["size"], p["score"]): p for p in points.values()}.values())


def write(path: Path, content: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    main()

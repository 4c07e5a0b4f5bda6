#!/usr/bin/env python
"""The main job's bars on `zoo:fashion_resnet` (or other tasks), one thread.

For each backend: profile, take the budget half-way between the all-int8 and the all-base network as measured, run,
and print the report beside the bars; then run the deployed ONNX file in OpenVINO and in ONNX Runtime and compare scores.

    python scripts/bench/main_job.py zoo:fashion_resnet
"""

from __future__ import annotations

from pathlib import Path

import common

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import BuildOptions
from hwsearch.deployment.evaluate import predictor, score
from hwsearch.deployment.report import Report
from hwsearch.errors import BudgetMissed, Infeasible
from hwsearch.lowering.lowering import Lowering
from hwsearch.progress import Progress


def main() -> None:
    parser = common.parser(__doc__, tasks=["zoo:fashion_resnet"])
    parser.add_argument("--backends", nargs="*", default=["openvino", "onnxruntime"])
    parser.add_argument("--out", type=Path, default=Path("bench-main"))
    args = parser.parse_args()
    common.say_machine()
    for spec in args.tasks:
        for name in args.backends:
            bench(spec, name, args.out)


def bench(spec: str, name: str, out: Path) -> None:
    task = hs.load(spec)
    folder = out / f"{task.name}.{name}"
    table = hs.profile(
        task, out=folder / "table.parquet", backend=name, axes=["precision"], progress=Progress()
    )
    base = table.header.options["base"]
    plain, coarse = table.time_ns(table.find("reference")), table.time_ns(table.find("uniform"))
    dense = table.dense_ns
    print(
        f"\n{spec} on {name}: dense fp32 {dense / 1e6:.3f} ms, all {base} {plain / dense:.1%} of it, all int8 {coarse / dense:.1%}"
    )
    budget = f"latency={(plain + coarse) / 2 / dense:.2%}"
    try:
        report = hs.run(task, [budget], folder, backend=name, axes=["precision"], progress=Progress())
    except Infeasible as error:
        print(f"  {budget}: infeasible: {error}")
        return
    except BudgetMissed as error:
        print(f"  {budget}: missed: {error}")
        return
    print(f"  budget {budget}\n" + "\n".join("  " + line for line in str(report).splitlines()))
    check(report)
    across(task, folder / "model.onnx", report)


def check(report: Report) -> None:
    counts = {v: list(report.variants.values()).count(v) for v in set(report.variants.values())}
    drop = 100 * (report.score["dense"] - report.score["deployed"])
    print(f"  bars: met {report.met}; score within 0.3 points: {abs(drop) <= 0.3 or drop < 0} ({-drop:+.2f} points); "
          f"mixed: {len(counts) > 1} {counts}")  # fmt: skip


def across(task: hs.Task, path: Path, report: Report) -> None:
    """The deployed file's score in both runtimes."""
    lowering, scores = Lowering(task, report.options["batch"], int8_bits=report.options.get("int8_bits", 8)), {}
    for name in ("openvino", "onnxruntime"):
        backend = backends.get(name)
        base = report.options["base"] if report.options["base"] in backend.bases() else backend.bases()[0]
        engine = backend.build(path.read_bytes(), BuildOptions(report.options["threads"], base))
        scores[name] = score(task, predictor(lowering, engine), name)
    apart = 100 * abs(scores["openvino"] - scores["onnxruntime"])
    print(f"  one file in both runtimes: {scores}, {apart:.2f} points apart (bar 0.2)")


if __name__ == "__main__":
    main()

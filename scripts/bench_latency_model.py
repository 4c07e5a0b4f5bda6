#!/usr/bin/env python
"""Predicted against measured latency on allocations that the fit has not seen.

For each network: profile in context and layer by layer (or go on with the tables in --out), then build and time
`--heldout` random allocations, and print the errors of the latency model beside the baselines: the isolated sum,
the additive model without boundary terms, a constant, and the noise floor (one allocation built and timed twice).

    python scripts/bench_latency_model.py zoo:fashion_resnet zoo:minilm zoo:efficientnet_lite0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

import hwsearch as hs
from hwsearch import backends, device
from hwsearch.design import random_allocation
from hwsearch.latency import fit
from hwsearch.measure import paired
from hwsearch.profiler import profile
from hwsearch.progress import Progress
from hwsearch.regime import Regime, regime
from hwsearch.table import LatencyTable, usable
from hwsearch.variants import Variant, uniform


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tasks", nargs="*", default=["zoo:fashion_resnet", "zoo:efficientnet_lite0", "zoo:minilm"]
    )
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heldout", type=int, default=15)
    parser.add_argument(
        "--twice", type=int, default=5, help="how many of them are built and timed a second time"
    )
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each profile")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--out", type=Path, default=Path("bench-latency"))
    args = parser.parse_args()
    print(f"machine: {device.fingerprint()}")
    for spec in args.tasks:
        bench(spec, args)


def bench(spec: str, args: argparse.Namespace) -> None:
    task = hs.load(spec)
    at = regime(task, backends.get(args.backend), threads=args.threads)
    stem = f"{task.name}.{args.backend}.{args.threads}t"
    tables: dict[str, LatencyTable] = {}
    for mode in ("context", "isolated"):
        tables[mode] = profile(
            at,
            args.out / f"{stem}.{mode}.parquet",
            time_limit_s=args.time_limit,
            mode=mode,
            axes=["precision"],
            progress=Progress(),
        )
    table = tables["context"]
    ratios, again, allocations = measure_heldout(at, table, args)
    scale = table.header.reference_ns
    measured = np.array(ratios) * scale
    model = fit(table)
    isolated = fit(tables["isolated"])
    isolated_scale = scale / tables["isolated"].header.reference_ns
    additive = fit(table, boundaries=False)
    predictions = [model.predict(a) for a in allocations]
    rows = {
        "latency model": np.array([p.time_ns for p in predictions]),
        "additive in context": np.array([additive.predict(a).time_ns for a in allocations]),
        "isolated sum": np.array([isolated.predict(a).time_ns for a in allocations]) * isolated_scale,
        "constant": np.full(len(allocations), float(np.mean([table.time_ns(b) for b in usable(table)]))),
    }
    print(f"\n{task.name}: {args.backend}, {args.threads} thread(s), {len(at.network.units)} units, "
          f"{len(table.builds)} builds, {len(allocations)} held-out allocations, dense {table.dense_ns / 1e6:.3f} ms, "
          f"measured {measured.min() / 1e6:.3f}-{measured.max() / 1e6:.3f} ms")  # fmt: skip
    for name, predicted in rows.items():
        error = np.abs(predicted / measured - 1)
        tau = kendalltau(predicted, measured).statistic if np.ptp(predicted) > 0 else float("nan")
        print(
            f"  {name:20s} median error {np.median(error):6.1%}  90th percentile {np.percentile(error, 90):6.1%}  tau {tau:5.2f}"
        )
    z = np.abs(rows["latency model"] - measured) / np.array([p.sigma_ns for p in predictions])
    print(f"  inside sigma {np.mean(z <= 1):.0%}, inside two sigma {np.mean(z <= 2):.0%}; "
          f"noise floor (built and timed twice) median {np.median(again):.1%}")  # fmt: skip


def measure_heldout(
    at: Regime, table: LatencyTable, args: argparse.Namespace
) -> tuple[list[float], list[float], list[dict[str, Variant]]]:
    """(ratios to the reference, relative differences of a second build, the allocations)."""
    offered = {u: [Variant.parse(v) for v in vs] for u, vs in table.offered().items()}
    rng = np.random.default_rng(args.seed)
    known = {b.variants for b in table.builds}
    allocations: list[dict[str, Variant]] = []
    while len(allocations) < args.heldout:
        drawn = random_allocation(at.network, offered, rng)
        if tuple(map(str, drawn.values())) not in known:
            allocations.append(drawn)
    reference, _ = at.build(uniform(at.network, at.options.base))
    ratios, again = [], []
    for index, allocation in enumerate(allocations):
        ratios.append(_ratio(at, reference.run, allocation))
        if index < args.twice:
            again.append(abs(_ratio(at, reference.run, allocation) / ratios[-1] - 1))
    return ratios, again, allocations


def _ratio(at: Regime, reference: Callable[[], None], allocation: dict[str, Variant]) -> float:
    engine, _ = at.build(allocation)
    return paired(reference, {"candidate": engine.run})["candidate"].ratio


if __name__ == "__main__":
    main()

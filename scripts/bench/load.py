#!/usr/bin/env python
"""Profile while another process takes a whole core on and off: what the table is worth, and whether it says so.

Two profiles of one network over precisions, one on the machine as it is, one beside a busy process that comes and goes; then
allocations that neither has seen, timed on the quiet machine. Printed: the error of both fitted models on them, the error that
each predicts (sigma), how many builds each table flags as unstable, and the widths of their intervals.

    python scripts/bench/load.py zoo:fashion_resnet
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import common
import numpy as np

import hwsearch as hs
from hwsearch import backends
from hwsearch.cli.overview import disturbed
from hwsearch.device.load import background
from hwsearch.engine.reference import reference_engine
from hwsearch.engine.setup import set_up
from hwsearch.latency.model import fit
from hwsearch.network.choices import Candidate, random_allocation
from hwsearch.network.variants import Variant
from hwsearch.profiler.profile import Effort, profile
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable


def main() -> None:
    parser = common.parser(__doc__, tasks="zoo:fashion_resnet", threads=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--period", type=float, default=4.0, help="seconds that it runs, and that it rests")
    parser.add_argument("--time-limit", type=float, default=120.0)
    parser.add_argument("--heldout", type=int, default=15)
    args = parser.parse_args()
    common.say_machine()
    setup = set_up(hs.load(args.task), backends.get("openvino"), threads=args.threads)
    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, LatencyTable] = {}
        for name in ("quiet", "disturbed"):
            over = threading.Event()
            other = threading.Thread(target=disturb, args=(over, args.workers, args.period))
            if name == "disturbed":
                other.start()
            try:
                tables[name] = profile(
                    setup, Path(folder) / f"{name}.parquet", Effort(args.time_limit), axes=["precision"], progress=Progress()
                )  # fmt: skip
            finally:
                over.set()
                if name == "disturbed":
                    other.join()
    offered = {u: [Variant.parse(v) for v in vs] for u, vs in tables["quiet"].offered().items()}
    rng = np.random.default_rng(99)
    whole = dict(setup.network.channels)
    drawn = [Candidate(random_allocation(setup.network, offered, rng), whole) for _ in range(args.heldout)]
    reference = reference_engine(setup)
    ratios = np.array([common.against(reference.run, common.build(setup, c)).ratio for c in drawn])
    for name, table in tables.items():
        model = fit(table)
        found = [model.predict(c.variants) for c in drawn]
        measured = ratios * table.header.reference_ns
        error = common.Errors.of([p.time_ns for p in found], measured)
        sigma = np.array([p.sigma_ns for p in found]) / measured
        width = [(b.high - b.low) / b.ratio for b in table.builds]
        print(f"  {name:10s} {len(table.builds)} builds, {np.mean([b.unstable for b in table.builds]):.0%} flagged unstable, "
              f"{disturbed(table)} measured on a disturbed machine all the while, reference {spread_of(table):.0%} slower at its "
              f"slowest tenth; "
              f"interval {np.median(width):.1%}; error on {len(drawn)} allocations timed quietly: median {error.median:.1%}, "
              f"90th percentile {error.p90:.1%}; predicted sigma {np.median(sigma):.1%}")  # fmt: skip


def spread_of(table: LatencyTable) -> float:
    """How much slower than on the quiet machine the slowest tenth of the reference's inferences was."""
    return float(
        np.quantile(np.concatenate([b.reference_ns for b in table.builds]), 0.9) / table.quiet_ns - 1
    )


def disturb(over: threading.Event, workers: int, period: float) -> None:
    while not over.is_set():
        with background(workers):
            over.wait(period)
        over.wait(period)


if __name__ == "__main__":
    main()

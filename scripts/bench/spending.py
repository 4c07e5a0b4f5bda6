"""What the closed loop's last round wins, which spends what an answer left over of the budget: with and without it.

The real loop on a small network (tests/tiny.py) and a simulated device whose law the model can only come near to, at random
budgets, each with the table as profiled.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

from hwsearch.allocate.budget import parse_budgets
from hwsearch.allocate.milp import minimise
from hwsearch.allocate.space import make_space
from hwsearch.backends.base import BuildOptions
from hwsearch.deployment.session import Session
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.errors import Infeasible
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.pipeline import closed_loop
from hwsearch.profiler.profile import Effort, profile
from hwsearch.testing import LatencyLaw, SimulatedBackend

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

BUDGETS = 40
FAST = Protocol(width=0.05, block_ns=1, warmup_ns=1, limit_s=0.5)


def compare(name: str = "cnn", budgets: int = BUDGETS, build_noise: float = 0.01) -> None:
    """A line with the round and one without it: slack, loss and rounds over the budgets that both met."""
    import tiny

    law = LatencyLaw.random(tiny.lowering(name).network, 2)
    backend = SimulatedBackend(law, noise=0.003, build_noise=build_noise, node_noise=0.02)
    setup = Setup(tiny.lowering(name), backend, BuildOptions())
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"HWSEARCH_CACHE": f"{folder}/cache"}),
    ):
        home = Path(folder)
        table = profile(setup, None, Effort(60.0, protocol=FAST))
        losses = sensitivity_for(
            setup, home / "sens.parquet", grid=table.grid(), weights=home / "weights"
        )
        least = minimise(make_space(table, losses).problem, "latency").costs["latency"]
        most = table.time_ns(table.find("reference"))
        shares = np.random.default_rng(0).uniform(0.02, 0.4, budgets)
        found: dict[str, list[tuple[float, float, float] | None]] = {"with": [], "without": []}
        for share in shares:
            bound = int(least + share * (most - least))
            for way, spare in (("with", closed_loop.SPARE), ("without", float("inf"))):
                with patch.object(closed_loop, "SPARE", spare):
                    try:
                        report, _, _ = closed_loop.closed_loop(
                            Session(setup, table), table, losses, parse_budgets([f"latency={bound}ns"]), home,
                            weights=home / "weights",
                        )  # fmt: skip
                    except Infeasible:
                        found[way].append(None)
                        continue
                measured = (report.latency_ms["measured"] or 0.0) * 1e6
                own = 100 * (1.0 - measured / bound), report.loss["measured"], float(report.rounds)
                found[way].append(own if report.met else None)
    both = [i for i, pair in enumerate(zip(*found.values(), strict=True)) if all(pair)]
    values = {way: np.array([own[i] for i in both]) for way, own in found.items()}
    for way, own in values.items():
        slack, loss, rounds = own.T
        met = sum(f is not None for f in found[way])
        print(
            f"{way:8s} the round that spends what was left over: met {met} of {budgets}; slack median "
            f"{np.median(slack):.2f} %, 90th percentile {np.percentile(slack, 90):.2f} %; loss mean {loss.mean():.3g}, median "
            f"{np.median(loss):.3g}; rounds {rounds.mean():.2f}"
        )
    ratio = values["with"][:, 1] / values["without"][:, 1]
    print(f"loss with / without: median {np.median(ratio):.3f}, mean {ratio.mean():.3f}, below 1 in {np.mean(ratio < 1):.0%}")

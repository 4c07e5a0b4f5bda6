#!/usr/bin/env python
"""Whether "met" is true: the closed loop on simulated devices that drift, are noisy and build no engine twice alike.

Each run has a device of its own (its drift, its noise), the table and the sensitivities of one profile of such a device, and a
random budget. The truth is the device's law. Printed for each kind of device: how many runs were met, met within noise, missed or
infeasible; of those met the share that is truly over its budget by more than 1 %; how often the 95 % interval of
the latency holds the truth; how many rounds it took, and what was left of the budget. Devices at half speed have absolute
budgets: what is met there falsely is counted.

    python scripts/bench/met.py --runs 400 --jobs 2

What each run came to is kept in `--out`, a line each: the same command goes on where it was stopped. After a change of
the code give another folder.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn

import hwsearch as hs
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import parse_budgets
from hwsearch.deployment.confirm import State
from hwsearch.deployment.deploy import parse_variants
from hwsearch.deployment.session import Session
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import Infeasible
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.pipeline.closed_loop import closed_loop
from hwsearch.profiler.profile import Effort
from hwsearch.profiler.profile import profile as measure_table
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend
from hwsearch.testing.simulated import sizes_of

INFEASIBLE = "infeasible"
TABLES = 6
"""Profiles of each kind of device; the runs take them in turn."""


@dataclass(frozen=True)
class Kind:
    """A kind of device: relative standard deviations of an inference, of an engine and of a window of ten seconds; the amplitude
    of a slow drift of each network's ratio; how slow the machine is beside when its table was made."""

    name: str
    inference: float = 0.01
    engine: float = 0.003
    window: float = 0.003
    drift: float = 0.0
    slower: float = 1.0

    def backend(self, law: LatencyLaw, seed: int, *, slower: float = 1.0) -> SimulatedBackend:
        return SimulatedBackend(
            law, noise=self.inference, build_noise=self.engine, seed=seed, wander=self._wander(seed), build_ns=2_000_000_000,
            drift=(lambda second: slower) if slower != 1.0 else None,
        )  # fmt: skip

    def _wander(self, seed: int) -> Callable[[float, str], float]:
        def wander(second: float, network: str) -> float:
            own = np.random.default_rng([seed, zlib.crc32(network.encode())])
            period, phase = own.uniform(600.0, 3600.0), own.uniform(0.0, 2.0 * math.pi)
            slow = self.drift * math.sin(2.0 * math.pi * second / period + phase)
            window = np.random.default_rng([seed, zlib.crc32(network.encode()), int(second // 10.0)])
            return math.exp(slow + self.window * float(window.standard_normal()))

        cache: dict[tuple[int, str], float] = {}

        def kept(second: float, network: str) -> float:  # one value a second of each network
            key = (int(second), network)
            if key not in cache:
                cache[key] = wander(float(key[0]), network)
            return cache[key]

        return kept


KINDS = (
    Kind("slow drift of 1 %", drift=0.01),
    Kind("noisy windows", window=0.01, engine=0.005),
    Kind("engines differ", window=0.004, engine=0.01),
    Kind("all of it", window=0.007, engine=0.007, drift=0.01),
    Kind("half speed", window=0.004, engine=0.004, slower=2.0),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 112), nn.ReLU(), nn.Linear(112, 8)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x)
        return out


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--runs", type=int, default=400, help="of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--out", type=Path, default=Path("bench-met"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = [torch.randn(1, 24) for _ in range(16)]
    task = hs.Task(Net().eval(), data[0], data, lambda predict: 1.0, "simulated")
    law = LatencyLaw.random(set_up(task, SimulatedBackend(LatencyLaw({}))).network, unit_ns=200_000.0)
    plain = set_up(task, SimulatedBackend(law))
    outcomes: list[Outcome] = []
    for kind in KINDS:
        found = run_kind(kind, plain, law, args.out / f"{kind.name.replace(' ', '_')}.jsonl", args.runs, args.jobs)
        tell(kind.name, found)
        outcomes += found
    tell("all kinds", outcomes)


@dataclass(frozen=True)
class Outcome:
    state: str
    over: float = 0.0
    """By how much the truth is over the budget, relatively."""
    holds: bool = True
    """Whether the interval of the latency holds the truth."""
    half: float = 0.0
    rounds: int = 0


def run_kind(kind: Kind, plain: Setup, law: LatencyLaw, kept: Path, runs: int, jobs: int) -> list[Outcome]:
    """The outcomes of all runs of a kind; those that are in `kept` are not run again."""
    found = {n: Outcome(**o) for n, o in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    missing = [n for n in range(runs) if n not in found]
    if missing:
        setups = [replace(plain, backend=kind.backend(law, 1_000_000 + i)) for i in range(TABLES)]
        tables = [measure_table(s, None, Effort(builds=16)) for s in setups]
        scored = [sensitivity_for(plain, None, seed=0, grid=t.grid()) for t in tables]
        work.update(kind=kind, plain=plain, law=law, tables=tables, scored=scored)
        # forked, as simulated devices do not pickle
        with multiprocessing.get_context("fork").Pool(jobs, alone) as pool, kept.open("a") as file:
            for number, outcome in pool.imap_unordered(one, missing):
                found[number] = outcome
                file.write(json.dumps([number, asdict(outcome)]) + "\n")
                file.flush()
                print(f"  {kind.name}: {len(found)} of {runs}, {outcome}", end="\r", flush=True)
    return [found[n] for n in range(runs)]


work: dict[str, Any] = {}
"""What the processes of a kind's runs share."""


def alone() -> None:
    """A cache of its own for this process: under the lock of the machine, whose time nobody measures here, one run would wait."""
    os.environ["HWSEARCH_CACHE"] = tempfile.mkdtemp()


def one(number: int) -> tuple[int, Outcome]:
    """(number, what the run of that number came to)."""
    kind, law, of = work["kind"], work["law"], number % TABLES
    backend = kind.backend(law, number, slower=kind.slower)
    backend.advance(900e9)
    with tempfile.TemporaryDirectory() as folder:
        setup = replace(work["plain"], backend=backend)
        rng = np.random.default_rng(number)
        return number, run(setup, law, work["tables"][of], work["scored"][of], rng, Path(folder), kind.slower)


def run(
    setup: Setup, law: LatencyLaw, table: LatencyTable, scored: SensitivityTable, rng: np.random.Generator, folder: Path,
    slower: float,
) -> Outcome:  # fmt: skip
    dense_ns = law.time_ns(dict.fromkeys(law.units, "fp32"))
    share = float(rng.uniform(0.35, 0.95))
    absolute = slower > 1.0 or rng.random() < 0.5
    budget = f"latency={round(share * dense_ns)}ns" if absolute else f"latency={100 * share:.2f}%"
    try:
        report, chosen, _ = closed_loop(
            Session(setup, table), table, scored, parse_budgets([budget]), folder, weights=folder / "weights"
        )
    except Infeasible:
        return Outcome(INFEASIBLE)
    true_ns = truth(law, setup, chosen)
    judged = report.judged
    return Outcome(
        str(report.state), true_ns * slower / (share * dense_ns) - 1.0,
        judged.low["latency"] <= true_ns <= judged.high["latency"], judged.high["latency"] / judged.measured["latency"] - 1.0,
        report.rounds,
    )  # fmt: skip


def truth(law: LatencyLaw, setup: Setup, chosen: Allocation) -> float:
    """What the law says an allocation takes, in ns."""
    return law.time_ns(
        {u: v.executed for u, v in parse_variants(chosen).items()}, sizes_of(setup.network, chosen.widths)
    )


def tell(name: str, found: Sequence[Outcome]) -> None:
    count = Counter(o.state for o in found)
    met = [o for o in found if o.state == State.MET]
    measured = [o for o in found if o.state != INFEASIBLE]
    over = sum(o.over > 0.01 for o in met)
    rounds = [o.rounds for o in measured]
    print(
        f"{name:20s} {', '.join(f'{count[s]} {s}' for s in (*State, INFEASIBLE))}; of met {over} truly over by more than "
        f"1 % ({over / max(len(met), 1):.1%}); the interval (median ± {np.median([o.half for o in measured]):.1%}) holds the truth "
        f"in {np.mean([o.holds for o in measured]):.1%}; {np.mean(rounds):.2f} rounds, at most two in "
        f"{np.mean(np.array(rounds) <= 2):.1%}; met with {-np.median([o.over for o in met] or [0.0]):.1%} of the budget to spare",
        flush=True,
    )


if __name__ == "__main__":
    main()

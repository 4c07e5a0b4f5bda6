"""What the benches share: their arguments, the machine they ran on, engines of allocations, and errors of predictions."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

import hwsearch as hs
from hwsearch.backends.base import Engine
from hwsearch.deployment.session import Measured, Session, uniform_candidates
from hwsearch.device import fingerprint as device
from hwsearch.device.timing import Timing, paired
from hwsearch.engine.setup import Setup
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.network.choices import Candidate
from hwsearch.profiler.profile import Effort, profile
from hwsearch.progress import Progress


def parser(
    doc: str | None, *, tasks: Sequence[str] | str = (), threads: Sequence[int] | int | None = None,
    backend: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    """With the bench's docstring as help. tasks, threads: the defaults; one of them where only one is taken."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if isinstance(tasks, str):
        made.add_argument("task", nargs="?", default=tasks)
    elif tasks:
        made.add_argument("tasks", nargs="*", default=list(tasks))
    if backend:
        made.add_argument("--backend", default="openvino")
    if isinstance(threads, int):
        made.add_argument("--threads", type=int, default=threads)
    elif threads:
        made.add_argument("--threads", type=int, nargs="+", default=list(threads))
    return made


def searching(doc: str | None, tasks: Sequence[str], out: str) -> argparse.ArgumentParser:
    """Of a bench that searches: with the folder for its files, and the time of each profile."""
    made = parser(doc, tasks=tasks)
    made.add_argument("--out", type=Path, default=Path(out))
    made.add_argument("--time-limit", type=float, default=600.0, help="of each profile, in seconds")
    return made


def tables(setup: Setup, folder: Path, args: argparse.Namespace) -> tuple[hs.LatencyTable, hs.SensitivityTable]:
    """Both tables, with refitted weights in `folder / "weights"`; those of an earlier run are used again."""
    table = profile(setup, folder / "table.parquet", Effort(args.time_limit), progress=Progress())
    began = time.perf_counter()
    scores = sensitivity_for(setup, folder / "sens.parquet", grid=table.grid(), weights=folder / "weights", progress=Progress())
    print(f"  order of channels, refitted weights and sensitivities: {time.perf_counter() - began:.0f} s "
          "(0 where they were on disk)")  # fmt: skip
    return table, scores


def uniforms(setup: Setup, table: hs.LatencyTable) -> tuple[Session, dict[str, Measured], str]:
    """(a session, the uniform networks as measured in it, the name of the fastest)."""
    session = Session(setup, table)
    _, found = session.measure_all(None, uniform_candidates(setup, table.header.unsupported))
    return session, found, min(found, key=lambda name: session.ms(found[name]))


def say_machine() -> None:
    print(f"machine: {device.fingerprint()}", flush=True)


def build(setup: Setup, candidate: Candidate) -> Engine:
    """The engine of an allocation at its widths."""
    return setup.narrow({g: range(w) for g, w in candidate.widths.items()}).build(candidate.variants)[0]


def against(run: Callable[[], None], engine: Engine, quiet_ns: float | None = None) -> Timing:
    """An engine timed beside another, as in a profile."""
    return paired(run, {"engine": engine.run}, quiet_ns=quiet_ns)["engine"]


@dataclass(frozen=True)
class Errors:
    """Of predictions, |predicted / measured - 1|, and how well they keep the order."""

    median: float
    p90: float
    tau: float

    @staticmethod
    def of(predicted: Iterable[float], measured: Iterable[float]) -> Errors:
        p, m = np.array(list(predicted)), np.array(list(measured))
        error = np.abs(p / m - 1.0)
        ordered = len(m) > 2 and np.ptp(p) > 0
        return Errors(
            float(np.median(error)), float(np.percentile(error, 90)),
            float(kendalltau(p, m).statistic) if ordered else float("nan"),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"median error {self.median:6.1%}  90th percentile {self.p90:6.1%}  tau {self.tau:5.2f}"

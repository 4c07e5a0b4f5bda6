#!/usr/bin/env python
"""How well a ratio of two times can be known on this machine: the same engines timed beside each other for minutes.

The reference, the network at whole widths in every uniform variant, at a quarter of its widths, and mixed allocations, all
interleaved as `timing.paired` does it. Rounds are put together to windows of a few seconds, as long as one build of a profile
is timed. Printed for each engine: its time in the quiet windows; the standard deviation of its ratio to the reference from window
to window, over all of them and over those in which the reference was not slower than its quiet time by more than
`regression.USUAL_SLOWDOWN`; and how much longer it took in the others. No latency model can predict one window better than that.

    python scripts/bench/machine.py zoo:minilm --threads 1 2 --seconds 150
"""

from __future__ import annotations

import time

import common
import numpy as np
from common import build
from processes import drawn

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import Engine
from hwsearch.deployment.session import uniform_candidates
from hwsearch.device.stopwatch import times
from hwsearch.device.timing import QUIET, Protocol
from hwsearch.engine.setup import Setup, set_up
from hwsearch.latency.regression import USUAL_SLOWDOWN
from hwsearch.network.choices import Candidate
from hwsearch.network.variants import uniform

WINDOW = 6
"""Rounds of one window."""
PROTOCOL = Protocol()


def main() -> None:
    parser = common.parser(__doc__, tasks=["zoo:minilm"], threads=[1, 2], backend=True)
    parser.add_argument("--seconds", type=float, default=150.0)
    args = parser.parse_args()
    common.say_machine()
    for task in args.tasks:
        for threads in args.threads:
            setup = set_up(hs.load(task), backends.get(args.backend), threads=threads)
            tell(f"{task}, {threads} thread(s)", *watched(engines(setup), args.seconds))


def engines(setup: Setup) -> dict[str, Engine]:
    """The reference first."""
    whole = dict(setup.network.channels)
    quarter = {g: max(1, n // 4) for g, n in whole.items()}
    base = setup.options.base
    found = {"reference": build(setup, Candidate(uniform(setup.network, base), whole))}
    for name, job in uniform_candidates(setup, {}).items():
        if job.base == base and name != f"dense.{base}":
            found[name] = build(setup, Candidate(job.variants, whole))
        if job.base == base and whole:
            found[f"{name}, quarter widths"] = build(setup, Candidate(job.variants, quarter))
    for number, candidate in enumerate(drawn(setup, 3, seed=11)):
        found[f"mixed {number}"] = build(setup, candidate)
    return found


def watched(found: dict[str, Engine], seconds: float) -> tuple[list[str], np.ndarray]:
    """(names, [windows, engines] of times in ns)."""
    count: dict[str, tuple[int, int]] = {}
    for name, engine in found.items():
        usual = float(np.median(times(engine.run, 10)))
        count[name] = (
            int(np.clip(PROTOCOL.settle_ns // usual, 1, 200)),
            int(np.clip(PROTOCOL.block_ns // usual, 2, 200)),
        )
    rounds: list[list[float]] = []
    begun = time.monotonic()
    while time.monotonic() - begun < seconds or len(rounds) < 3 * WINDOW:
        taken: dict[str, list[float]] = {name: [] for name in found}
        for name in (*found, *reversed(found)):
            settle, block = count[name]
            times(found[name].run, settle)
            taken[name].append(float(np.median(times(found[name].run, block))))
        rounds.append([float(np.mean(t)) for t in taken.values()])
    whole = np.array(rounds[: len(rounds) // WINDOW * WINDOW])
    return list(found), np.median(whole.reshape(-1, WINDOW, len(found)), axis=1)


def tell(what: str, names: list[str], windows: np.ndarray) -> None:
    """A line an engine."""
    reference = windows[:, 0]
    slower = reference / np.quantile(reference, QUIET) - 1.0
    quiet = slower <= USUAL_SLOWDOWN
    print(f"\n{what}: {len(windows)} windows, the reference slower by more than {USUAL_SLOWDOWN:.0%} in {np.sum(~quiet)} of them "
          f"(by {np.median(slower[~quiet]) if (~quiet).any() else 0:.0%}, median)")  # fmt: skip
    for place, name in enumerate(names):
        ratio = np.log(windows[:, place] / reference)
        line = f"  {name:28s} {np.median(windows[quiet, place]) / 1e6:7.3f} ms; ratio to the reference: "
        line += f"standard deviation {ratio.std(ddof=1):5.1%}, on the quiet machine {ratio[quiet].std(ddof=1):5.1%}"
        if (~quiet).any():
            more = np.median(windows[~quiet, place]) / np.median(windows[quiet, place]) - 1.0
            line += f"; {more:+.0%} on the slow one"
        print(line, flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What the time of an engine depends on beside its network: where its memory lies, and how long it has been running.

First: engines of the same mixed allocations are built again and again, as in a profile, others in between, and each is timed
against one of its kind that was built at the beginning and kept. In one process, as one would do it without a second thought; in a
process for each; and in a process for each whose memory is in huge pages (`backends/process.py`), which is how hwsearch does it.

Second: the first inferences of an engine whose turn comes behind another one, against those it settles to.

    python scripts/bench/processes.py zoo:minilm zoo:efficientnet_lite0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import common
import numpy as np
from common import build

import hwsearch as hs
from hwsearch import backends
from hwsearch.device.stopwatch import times
from hwsearch.engine.setup import Setup, set_up
from hwsearch.network.choices import Candidate, random_allocation
from hwsearch.network.variants import legal, uniform

BETWEEN = 2
"""Other networks that are built, run and dropped between two builds of the same."""
SHARES = (0.25, 0.5, 0.75, 1.0)
TURNS, INFERENCES = 25, 24


def main() -> None:
    parser = common.parser(__doc__, tasks=["zoo:minilm", "zoo:efficientnet_lite0"], threads=[1, 2], backend=True)
    parser.add_argument("--again", type=int, default=6, help="how often each allocation is built again")
    args = parser.parse_args()
    common.say_machine()
    for task in args.tasks:
        setup = set_up(hs.load(task), backends.get(args.backend), threads=args.threads[0])
        rebuilt(task, setup, args.again)
        for threads in args.threads:
            settling(task, set_up(setup.lowering.task, setup.backend, threads=threads))


def rebuilt(task: str, setup: Setup, again: int) -> None:
    """The spread of engines of the same allocation, and whether later ones are slower."""
    for way, (apart, huge) in {
        "one process": (False, False), "a process for each": (True, False),
        "a process for each, huge pages": (True, True),
    }.items():  # fmt: skip
        with memory(setup, apart=apart, huge=huge):
            kept = [(c, build(setup, c)) for c in drawn(setup, 2, seed=7)]
            ratios = []
            for number in range(again):
                for candidate in drawn(setup, BETWEEN, seed=1000 + number):
                    engine = build(setup, candidate)
                    engine.run()
                    engine.nodes()
                    del engine
                ratios.append([common.against(old.run, build(setup, c)).ratio for c, old in kept])
        found = 100.0 * (np.array(ratios) - 1.0)
        print(f"{task}: {way:30s} built again: {found.mean():+.1f} % on average, from {found.min():+.1f} to {found.max():+.1f} %, "
              f"standard deviation {found.std(ddof=1):.1f} %", flush=True)  # fmt: skip


@contextmanager
def memory(setup: Setup, *, apart: bool, huge: bool) -> Iterator[None]:
    """Engines are built in processes of their own or not, with huge pages or not."""
    plain = {} if huge else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    with patch.object(type(setup.backend), "own_process", apart), patch.dict("os.environ", plain):
        yield


def settling(task: str, setup: Setup) -> None:
    """The median time by place in the turn, against that of the last quarter of it."""
    networks = {
        "whole": build(setup, Candidate(uniform(setup.network, setup.options.base), dict(setup.network.channels)))
    }
    networks.update({f"mixed {i}": build(setup, c) for i, c in enumerate(drawn(setup, 2, seed=7))})
    taken: dict[str, list[list[int]]] = {name: [] for name in networks}
    for _ in range(TURNS):
        for name, engine in networks.items():
            taken[name].append(times(engine.run, INFERENCES))
    for name, found in taken.items():
        middle = np.median(np.array(found), axis=0)
        settled = float(np.mean(middle[-INFERENCES // 4 :]))
        places = {n: middle[n - 1] / settled - 1.0 for n in (1, 2, 3, 5, 8, 12)}
        print(f"{task}, {setup.options.threads} thread(s), {name}, {settled / 1e6:.2f} ms: "
              + ", ".join(f"inference {n} {share:+.0%}" for n, share in places.items()), flush=True)  # fmt: skip


def drawn(setup: Setup, count: int, seed: int) -> list[Candidate]:
    """Mixed allocations at mixed widths."""
    rng = np.random.default_rng(seed)
    variants = setup.backend.variants(setup.options.base)
    offered = {u.name: legal(u, variants) for u in setup.network.units}
    return [
        Candidate(
            random_allocation(setup.network, offered, rng),
            {g: max(1, round(n * rng.choice(SHARES))) for g, n in setup.network.channels.items()},
        )
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()

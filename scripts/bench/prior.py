#!/usr/bin/env python
"""What a device's table of one network saves when another is profiled that shares layers with it.

The second network has the stages of `zoo:fashion_resnet` at other depths (random weights: it is only timed). It is profiled
twice, cold, and with the first one's table as --prior in less than half of those seconds; then allocations that neither profile has
built are timed. Printed: builds and seconds of both profiles, and the errors of both fitted models on the same allocations.

    python scripts/bench/prior.py --first profiles-of-mine/fashion_resnet.parquet
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch
from torch import nn

import hwsearch as hs
from hwsearch import backends
from hwsearch.engine.reference import reference_engine
from hwsearch.engine.setup import Setup, set_up
from hwsearch.latency.model import fit
from hwsearch.network.choices import Candidate, random_candidate
from hwsearch.network.variants import Variant
from hwsearch.profiler.profile import Effort, profile
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable
from hwsearch.zoo.fashion_resnet import WIDTHS, Block, FashionResNet

DEPTHS = (2, 3, 2)
SHARE = 0.45
"""Of the cold profile's seconds, what the other one may take; a build that it has begun then is finished."""


class Other(FashionResNet):
    """The same stages, deeper."""

    def __init__(self) -> None:
        super().__init__()
        stages, c_in = [], WIDTHS[0]
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            ins = [c_in, *[width] * (depth - 1)]
            stages.append(
                nn.Sequential(*(Block(c, width, 2 if i and not j else 1) for j, c in enumerate(ins)))
            )
            c_in = width
        self.stages = nn.Sequential(*stages)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--first", type=Path, help="a table of zoo:fashion_resnet; measured anew without")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each profile")
    parser.add_argument("--heldout", type=int, default=15)
    args = parser.parse_args()
    common.say_machine()
    known = hs.load("zoo:fashion_resnet")
    torch.manual_seed(0)
    second = dataclasses.replace(known, model=Other().eval(), name="deeper")
    backend = backends.get("openvino")
    setup = set_up(second, backend)
    with tempfile.TemporaryDirectory() as folder:
        first = (
            hs.LatencyTable.load(args.first)
            if args.first
            else profiled(set_up(known, backend), Path(folder) / "first.parquet", args.time_limit, [])[0]
        )
        tables, seconds = {}, {}
        for name, prior in (("cold", []), ("with prior", [first])):
            limit = SHARE * seconds["cold"] if prior else args.time_limit
            tables[name], seconds[name] = profiled(setup, Path(folder) / f"{name}.parquet", limit, prior)
    models = {name: fit(table) for name, table in tables.items()}
    heldout = candidates(list(tables.values()), args.heldout)
    reference = reference_engine(setup)
    ratios = []
    for candidate in heldout:
        timing = common.against(reference.run, common.build(setup, candidate), tables["cold"].quiet_ns)
        ratios.append(timing.ratio)
    for name, table in tables.items():
        print(
            f"{name}: {len(table.builds)} builds in {seconds[name]:.0f} s; ended by: {table.header.design.get('stopped')}"
        )
        predicted = np.array([models[name].predict(c.variants, c.widths).time_ns for c in heldout])
        error = common.Errors.of(predicted, np.array(ratios) * table.header.reference_ns)
        print(f"  {name}, {len(heldout)} held out: {error}")
    builds = [len(t.builds) for t in tables.values()]
    print(f"with prior: {builds[1] / builds[0]:.0%} of the builds, "
          f"{seconds['with prior'] / seconds['cold']:.0%} of the seconds")  # fmt: skip


def profiled(
    setup: Setup, path: Path, time_limit_s: float, prior: list[LatencyTable]
) -> tuple[LatencyTable, float]:
    begun = time.monotonic()
    table = profile(setup, path, Effort(time_limit_s), prior=prior, progress=Progress())
    return table, time.monotonic() - begun


def candidates(tables: list[LatencyTable], count: int) -> list[Candidate]:
    """Random allocations, at widths and of variants that every table offers, that none has built and every model knows."""
    network = tables[0].network
    offered = {
        u: [Variant.parse(v) for v in vs if all(v in t.offered()[u] for t in tables)]
        for u, vs in tables[0].offered().items()
    }
    grid = {
        g: [w for w in steps if all(w in t.grid()[g] for t in tables)]
        for g, steps in tables[0].grid().items()
    }
    models, rng = [fit(t) for t in tables], np.random.default_rng(7)
    built = {b.key[1:] for t in tables for b in t.builds}
    found: list[Candidate] = []
    for _ in range(400 * count):
        drawn = random_candidate(network, offered, grid, rng)
        key = (tuple(map(str, drawn.variants.values())), tuple(drawn.widths.values()))
        known = all(m.knows(u, v, drawn.widths) for m in models for u, v in drawn.variants.items())
        if known and key not in built:
            found.append(drawn)
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    main()

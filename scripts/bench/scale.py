"""How seconds and memory of each stage grow with the layers of a network, on simulated tables.

Networks are chains of different layers, each with a channel group of six widths and two variants; a table holds so many builds
of random allocations. Printed are CPU seconds of each stage, the peak memory of its process, and the exponent of the seconds over
layers from one size to the next (1: linear). Every size runs in a process of its own, with one thread.

    python scripts/bench/scale.py                                # 30, 100, 300 and 1,000 layers at 100 builds
    python scripts/bench/scale.py --layers 1000 --builds 400     # the largest that is promised: the fit under 10 s and 2 GB
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import numpy as np
from simulation import OFFERED, header, scores, simulated_build

from hwsearch.allocate.search import search
from hwsearch.latency.model import fit
from hwsearch.latency.regression import Equations
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.choices import Candidate, random_candidate
from hwsearch.network.network import ChannelGroup, Edge, Network, Unit, Way
from hwsearch.network.variants import network_bytes, uniform
from hwsearch.profiler.proposal import propose
from hwsearch.table.build import Build
from hwsearch.table.table import LatencyTable, usable
from hwsearch.testing import LatencyLaw

WIDTHS = 6
STAGES = ("equations", "fit", "proposal", "sensitivities", "search")
SOLVER = "search"
"""The stage that holds an integer program, whose time no exponent is promised of."""
MOST = 1.2


def different(layers: int) -> Network:
    """A chain of convolutions no two of which are the same work, each with a channel group but the last."""
    sides = [64 + 8 * (i % 40) for i in range(layers + 1)]
    names = [f"conv{i}" for i in range(layers)]
    units, groups = [], []
    for i, name in enumerate(names):
        into, out, pixels = sides[i], sides[i + 1], 4 + i // 40
        ways = [Way(names[i - 1], "input0", 1, 1), Way(names[i - 1], "weight", 1, 1)] if i else []
        if i < layers - 1:
            ways += [Way(name, "output", 1, 1), Way(name, "weight", 0, 1)]
            groups.append(ChannelGroup(name, out, (name,), (names[i + 1],), fixed_bytes=8))
        units.append(
            Unit(name, "conv2d", ((1, into, pixels, pixels),), (1, out, pixels, pixels), (out, into, 3, 3),
                 macs=pixels**2 * 9 * into * out, other_bytes=4 * out, ways=tuple(ways))
        )  # fmt: skip
    edges = [Edge(names[i], names[i + 1], 4 * units[i].weight_shape[0] * 64) for i in range(layers - 1)]
    return Network(tuple(units), tuple(edges), tuple(groups), input_shapes=((1, 64, 4, 4),), name=f"{layers} layers")


def grid_of(network: Network) -> dict[str, list[int]]:
    return {g: [n - i * (n // 8) for i in range(WIDTHS)] for g, n in network.channels.items()}


def made(layers: int, builds: int) -> LatencyTable:
    """What a profile of so many builds would hold."""
    network, rng = different(layers), np.random.default_rng(0)
    law, grid = LatencyLaw.random(network, 1), grid_of(network)
    offered = {u.name: OFFERED for u in network.units}

    def build(role: str, of: Candidate) -> Build:
        return simulated_build(network, law, of.variants, role, noise=0.01, node_noise=0.03, rng=rng, widths=of.widths)

    first = zip(("reference", "dense", "uniform"), ("fp32", "fp32", "int8"), strict=True)
    rows = [build(role, Candidate(uniform(network, precision), network.channels)) for role, precision in first]
    rows += [build("design", random_candidate(network, offered, grid, rng)) for _ in range(builds - len(rows))]
    return LatencyTable(
        header(network, law, grid=grid, graph_bytes=500, dense_file_bytes=500 + network_bytes(network, uniform(network, "fp32"))),
        tuple(rows),
    )


def kept(sensitivity: SensitivityTable) -> SensitivityTable:
    """Written to a file and read back."""
    with tempfile.TemporaryDirectory() as folder:
        sensitivity.save(Path(folder) / "s.json")
        return SensitivityTable.load(Path(folder) / "s.json")


def measure(layers: int, builds: int, stages: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Stage -> (CPU seconds, peak of the process so far in GB)."""
    table = made(layers, builds)
    network, grid = table.network, table.grid()
    offered = {u.name: OFFERED for u in network.units}
    sensitivity = scores(network, grid)
    runs: dict[str, Callable[[], Any]] = {
        "equations": lambda: Equations(table, usable(table)),
        "fit": lambda: fit(table),
        "proposal": lambda: propose(table, offered, grid, np.random.default_rng(0)),
        "sensitivities": lambda: kept(sensitivity),
        "search": lambda: search(table, sensitivity, ["latency=60%"]),
    }
    found = {}
    for stage in stages:
        begun = time.process_time()
        runs[stage]()
        found[stage] = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  {layers} layers, {stage}: {found[stage][0]:.2f} s, {found[stage][1]:.2f} GB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 100, 300, 1000])
    parser.add_argument("--builds", type=int, default=100)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    found = {}
    for layers in args.layers:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[layers] = pool.submit(measure, layers, args.builds, args.stages).result()
    print(f"\n| stage, {args.builds} builds | " + " | ".join(f"{n} layers" for n in found) + " | exponents |")
    print("|---" * (2 + len(found)) + "|")
    for stage in args.stages:
        own = [found[n][stage] for n in found]
        cells = " | ".join(f"{seconds:.2f} s, {peak:.2f} GB" for seconds, peak in own)
        pairs = zip(found, list(found)[1:], own, own[1:], strict=False)
        exponents = [math.log(b[0] / a[0]) / math.log(m / n) for n, m, a, b in pairs if a[0] > 0]
        over = " <- above 1.2" if stage != SOLVER and any(e > MOST for e in exponents) else ""
        print(f"| {stage} | {cells} | " + ", ".join(f"{e:.2f}" for e in exponents) + f"{over} |")


if __name__ == "__main__":
    main()

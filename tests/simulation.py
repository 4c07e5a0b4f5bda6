"""Networks and tables made from a latency law, without torch or ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from hwsearch.backends.base import NodeTime
from hwsearch.engine.attribution import attribute, executed_precisions
from hwsearch.latency.staircase import group_times
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.choices import (
    Candidate,
    Grid,
    all_cells,
    candidate_widths,
    cover,
    random_candidate,
    whole,
    worth,
)
from hwsearch.network.network import ChannelGroup, Edge, Network, Unit, Way
from hwsearch.network.variants import Variant, network_bytes, uniform
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Header
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, sizes_of

DEVICE = {"id": "0123456789ab", "chip": "Simulated CPU"}
OFFERED = (Variant("fp32"), Variant("int8"))


def chain(length: int = 16, *, kinds: int = 6) -> Network:
    """Convolutions in a row, of a few distinct signatures, with a residual edge over every third."""
    units, edges = [], []
    for i in range(length):
        channels = 8 * (1 + i % kinds)
        shape = (1, channels, 16, 16)
        units.append(Unit(f"layer{i}.conv", "conv2d", (shape,), shape, (channels, channels, 3, 3), macs=1000))
        if i:
            edges.append(Edge(f"layer{i - 1}.conv", f"layer{i}.conv", 4 * 256 * 8 * (1 + (i - 1) % kinds)))
        if i >= 3 and i % 3 == 0:
            edges.append(
                Edge(f"layer{i - 3}.conv", f"layer{i}.conv", 4 * 256 * 8 * (1 + (i - 3) % kinds), fused=True)
            )
    return Network(tuple(units), tuple(edges), input_shapes=((1, 8, 16, 16),), name="chain")


def grouped(channels: tuple[int, ...] = (24, 40, 16)) -> Network:
    """Convolutions in a row, each with a channel group of its own but the last; an edge over the first two."""
    sides = (3, *channels, 10)
    units, groups = [], []
    names = [f"conv{i}" for i in range(len(sides) - 1)]
    for i, name in enumerate(names):
        into, out = sides[i], sides[i + 1]
        ways = [Way(names[i - 1], "input0", 1, 1), Way(names[i - 1], "weight", 1, 1)] if i else []
        if i < len(channels):
            ways += [Way(name, "output", 1, 1), Way(name, "weight", 0, 1)]
            groups.append(ChannelGroup(name, out, (name,), (names[i + 1],), fixed_bytes=8))
        k = (3, 5, 1, 7)[i % 4]  # no two units become the same work: the law gives each a time of its own
        units.append(
            Unit(name, "conv2d", ((1, into, 8, 8),), (1, out, 8, 8), (out, into, k, k), macs=64 * k * k * into * out,
                 other_bytes=4 * out, ways=tuple(ways))
        )  # fmt: skip
    pairs = [*pairwise(names), (names[0], names[2])]
    edges = tuple(Edge(a, b, 4 * 64 * sides[1 + names.index(a)]) for a, b in pairs)
    return Network(
        tuple(units), edges, tuple(groups), fixed_bytes=100 + 8 * sum(channels), input_shapes=((1, 3, 8, 8),),
        name="grouped",
    )  # fmt: skip


def scores(network: Network, grid: Grid, seed: int = 0) -> SensitivityTable:
    """Losses that grow as widths fall, and an order of the slots."""
    rng = np.random.default_rng(seed)
    loss = {u.name: {"dense.fp32": 0.0, "dense.int8": float(rng.uniform(0.1, 1.0))} for u in network.units}
    width_loss = {
        g: dict(zip(steps, np.cumsum([0.0, *rng.uniform(0.1, 1.0, len(steps) - 1)]).tolist(), strict=True))
        for g, steps in grid.items()
        if len(steps) > 1
    }
    order = {g: tuple(map(int, rng.permutation(n))) for g, n in network.channels.items()}
    return SensitivityTable(network, loss, 8, "kl", False, width_loss=width_loss, order=order)


def reference_ns(law: LatencyLaw) -> float:
    """Time of the engine that everything is timed against: all units in fp32."""
    return law.time_ns(dict.fromkeys(law.units, "fp32"))


def random_variants(network: Network, rng: np.random.Generator) -> dict[str, Variant]:
    return {unit.name: OFFERED[rng.integers(2)] for unit in network.units}


def simulated_build(
    network: Network, law: LatencyLaw, variants: Mapping[str, Variant], role: str = "design", *, noise: float = 0.0,
    node_noise: float = 0.0, rng: np.random.Generator | None = None, widths: Mapping[str, int] | None = None,
) -> Build:  # fmt: skip
    """One whole network: `noise` is the error of its ratio, `node_noise` that of each of its nodes."""
    rng = rng or np.random.default_rng(0)
    precisions = {unit: v.precision for unit, v in variants.items()}
    sizes = sizes_of(network, widths)
    ratio = law.time_ns(precisions, sizes) / reference_ns(law) * float(np.exp(noise * rng.standard_normal()))
    nodes = [
        NodeTime(
            n.name,
            n.op,
            n.sources,
            n.precision,
            n.time_ns * float(np.exp(node_noise * rng.standard_normal())),
        )
        for n in law.nodes(precisions, sizes=sizes)
    ]
    rows = attribute(nodes, network, {})
    error = 1.96 * max(noise, 1e-3)
    return Build(
        role=Role(role), base="fp32", variants=tuple(str(variants[u.name]) for u in network.units),
        ratio=ratio, low=ratio * (1 - error), high=ratio * (1 + error), unstable=False,
        samples_ns=np.full(10, round(ratio * reference_ns(law)), np.int64),
        reference_ns=np.full(10, round(reference_ns(law)), np.int64),
        executed=executed_precisions(rows, network), nodes=rows, file_bytes=1000,
        widths=tuple({**network.channels, **(widths or {})}.values()),
    )  # fmt: skip


def header(network: Network, law: LatencyLaw, **changes: Any) -> Header:
    fields: dict[str, Any] = {
        "network": network, "device": DEVICE, "backend": "simulated", "versions": {"simulated": "1"},
        "options": {"threads": 1, "base": "fp32", "batch": 1}, "reference_ns": reference_ns(law),
    }  # fmt: skip
    return Header(**{**fields, **changes})


def simulated_table(
    network: Network, law: LatencyLaw, *, design: int = 18, heldout: int = 0, noise: float = 0.0,
    node_noise: float = 0.0, seed: int = 0, grid: Grid | None = None,
) -> LatencyTable:  # fmt: skip
    """What a profile of a device with this law would hold; with a grid, as many builds more as cover its cells."""
    rng = np.random.default_rng(seed)
    offered = {u.name: OFFERED for u in network.units}
    steps = {**whole(network), **(grid or {})}

    def build(role: str, of: Candidate) -> Build:
        return simulated_build(
            network, law, of.variants, role, noise=noise, node_noise=node_noise, rng=rng, widths=of.widths
        )

    done = [Candidate(uniform(network, p), network.channels) for p in ("fp32", "fp32", "int8")]
    builds = [build(role, c) for role, c in zip(("reference", "dense", "uniform"), done, strict=True)]
    while len(done) < 3 + design or all_cells(network, offered, steps) - {
        x for c in done for x in c.cells(network)
    }:
        done.append(cover(network, offered, steps, done, rng))
        builds.append(build("design", done[-1]))
    for _ in range(heldout):
        widths = random_candidate(network, offered, steps, rng).widths
        builds.append(build("heldout", Candidate(random_variants(network, rng), widths)))
    dense = network_bytes(network, uniform(network, "fp32")) + 500
    made = header(
        network,
        law,
        graph_bytes=500,
        dense_file_bytes=dense,
        grid={g: list(s) for g, s in (grid or {}).items()},
    )
    return LatencyTable(made, tuple(builds))


def probed() -> LatencyTable:
    """A table of `grouped` that holds probes of every width, group by group, and the grid that came of them."""
    network = grouped()
    law = LatencyLaw.random(network, 3)
    plain = [uniform(network, p) for p in ("fp32", "int8")]
    builds = [
        simulated_build(network, law, v, r) for r, v in zip(("reference", "uniform"), plain, strict=True)
    ]
    for group, channels in network.channels.items():
        for width in candidate_widths(channels)[1:]:
            builds += [simulated_build(network, law, v, "probe", widths={group: width}) for v in plain]
    grid = {g: candidate_widths(n) for g, n in network.channels.items()}
    table = LatencyTable(header(network, law, grid=grid), tuple(builds))
    return table.with_header(grid={g: worth(times) for g, times in group_times(table).items()})


def alone_table(network: Network, law: LatencyLaw) -> LatencyTable:
    """The same device measured layer by layer, each by itself."""
    builds = [
        simulated_build(network, law, uniform(network, "fp32"), role) for role in ("reference", "dense")
    ]
    for unit in {u.signature: u for u in network.units}.values():
        for variant in OFFERED:
            ratio = law.time_ns({unit.name: variant.precision}) / reference_ns(law)
            builds.append(
                Build(
                    role=Role.ALONE, base="fp32",
                    variants=tuple(str(variant) if u is unit else "" for u in network.units),
                    ratio=ratio, low=ratio, high=ratio, unstable=False,
                    samples_ns=np.ones(1, np.int64), reference_ns=np.ones(1, np.int64),
                    executed=tuple(variant.precision if u is unit else "" for u in network.units),
                )
            )  # fmt: skip
    return LatencyTable(header(network, law, mode="alone"), tuple(builds))

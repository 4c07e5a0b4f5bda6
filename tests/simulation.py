"""Networks and tables made from a latency law, without torch or ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hwsearch.backends.base import NodeTime
from hwsearch.network import Edge, Network, Unit
from hwsearch.attribution import attribute, executed_precisions
from hwsearch.design import cover
from hwsearch.table import Build, Header, LatencyTable
from hwsearch.testing import LatencyLaw
from hwsearch.variants import Variant, uniform

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


def reference_ns(law: LatencyLaw) -> float:
    """Time of the engine that everything is timed against: all units in fp32."""
    return law.time_ns(dict.fromkeys(law.units, "fp32"))


def random_variants(network: Network, rng: np.random.Generator) -> dict[str, Variant]:
    return {unit.name: OFFERED[rng.integers(2)] for unit in network.units}


def simulated_build(
    network: Network, law: LatencyLaw, variants: Mapping[str, Variant], role: str = "design", *, noise: float = 0.0,
    node_noise: float = 0.0, rng: np.random.Generator | None = None,
) -> Build:  # fmt: skip
    """One whole network: `noise` is the error of its ratio, `node_noise` that of each of its nodes."""
    rng = rng or np.random.default_rng(0)
    precisions = {unit: v.precision for unit, v in variants.items()}
    ratio = law.time_ns(precisions) / reference_ns(law) * float(np.exp(noise * rng.standard_normal()))
    nodes = [
        NodeTime(
            n.name,
            n.op,
            n.sources,
            n.precision,
            n.time_ns * float(np.exp(node_noise * rng.standard_normal())),
        )
        for n in law.nodes(precisions)
    ]
    rows = attribute(nodes, network, {})
    error = 1.96 * max(noise, 1e-3)
    return Build(
        role=role, base="fp32", variants=tuple(str(variants[u.name]) for u in network.units),
        ratio=ratio, low=ratio * (1 - error), high=ratio * (1 + error), unstable=False,
        samples_ns=np.full(10, round(ratio * reference_ns(law)), np.int64),
        reference_ns=np.full(10, round(reference_ns(law)), np.int64),
        executed=executed_precisions(rows, network), nodes=rows, file_bytes=1000,
    )  # fmt: skip


def header(network: Network, law: LatencyLaw, **changes: Any) -> Header:
    fields: dict[str, Any] = {
        "network": network, "device": DEVICE, "backend": "simulated", "versions": {"simulated": "1"},
        "options": {"threads": 1, "base": "fp32", "batch": 1}, "reference_ns": reference_ns(law),
    }  # fmt: skip
    return Header(**{**fields, **changes})


def simulated_table(
    network: Network, law: LatencyLaw, *, design: int = 18, heldout: int = 0, noise: float = 0.0,
    node_noise: float = 0.0, seed: int = 0,
) -> LatencyTable:  # fmt: skip
    """What a profile of a device with this law would hold."""
    rng = np.random.default_rng(seed)

    def build(role: str, variants: Mapping[str, Variant]) -> Build:
        return simulated_build(network, law, variants, role, noise=noise, node_noise=node_noise, rng=rng)

    builds = [build(role, uniform(network, "fp32")) for role in ("reference", "dense")]
    builds.append(build("uniform", uniform(network, "int8")))
    done: list[Mapping[str, Variant]] = [uniform(network, "fp32"), uniform(network, "int8")]
    for _ in range(design):
        done.append(cover(network, {u.name: OFFERED for u in network.units}, done, rng))
        builds.append(build("design", done[-1]))
    builds += [build("heldout", random_variants(network, rng)) for _ in range(heldout)]
    return LatencyTable(header(network, law), tuple(builds))


def isolated_table(network: Network, law: LatencyLaw) -> LatencyTable:
    """The same device measured layer by layer."""
    builds = [
        simulated_build(network, law, uniform(network, "fp32"), role) for role in ("reference", "dense")
    ]
    for unit in {u.signature: u for u in network.units}.values():
        for variant in OFFERED:
            ratio = law.time_ns({unit.name: variant.precision}) / reference_ns(law)
            builds.append(
                Build(
                    role="isolated", base="fp32",
                    variants=tuple(str(variant) if u is unit else "" for u in network.units),
                    ratio=ratio, low=ratio, high=ratio, unstable=False,
                    samples_ns=np.ones(1, np.int64), reference_ns=np.ones(1, np.int64),
                    executed=tuple(variant.precision if u is unit else "" for u in network.units),
                )
            )  # fmt: skip
    return LatencyTable(header(network, law, mode="isolated"), tuple(builds))

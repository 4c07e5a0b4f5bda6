"""Latency as a sum over layers, from tables made layer by layer: of units between their neighbours, or each alone.

    T(a) = rest + sum over units t[u, a_u]

What a boundary between two precisions costs, such tables do not tell: it is taken as zero, and its size as a part of sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InvalidInput
from hwsearch.latency.features import Feature, edge_features
from hwsearch.latency.overhead import beside, worked_ns
from hwsearch.network.sandwich import Context, contexts, filling
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable

UNIT = 0.1
"""Relative standard error of one unit's time, taken from its place in the network."""
WHOLE = 0.15
"""The same of the sum, where no whole network was built. What is in a sandwich stays in the caches from one inference to the
next: on CPUs sums came out up to a fifth below the whole network's time, more so in fp32."""
CORRECTED = 0.03
"""The least that it is where whole networks were measured."""
BOUNDARY = 0.3
"""Standard deviation of what one boundary between precisions costs, relative to a typical unit."""


@dataclass(frozen=True)
class Terms:
    """What a LatencyModel is made of: features with their mean and variance in ns, each by itself; floor: relative, of the
    whole sum."""

    features: list[Feature]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    floor: float


def layer_terms(table: LatencyTable, base: str | None = None) -> Terms:
    """The terms of a table made layer by layer, under a base precision (None: the table's own).

    Raises InvalidInput where it holds no layer under that base.
    """
    base = base or str(table.header.options["base"])
    sandwiched = table.header.mode == Mode.SANDWICHED
    role = Role.SANDWICH if sandwiched else Role.ALONE
    builds = [b for b in table.builds if b.role == role and b.base == base]
    rest, times = _between(table, builds) if sandwiched else (0.0, _alone(table, builds))
    if times:  # a stored tensor is no work of its own
        times |= {(u.signature, f"dense.{base}"): 0.0 for u in table.network.units if u.stored}
    if not times:
        raise InvalidInput(
            f"the table has no layer measured under base {base}; profile with --mode {'sandwiched' if sandwiched else 'alone'}"
        )
    features: list[Feature] = [("rest",), *(("unit", *cell) for cell in times)]
    mean = np.array([rest, *times.values()])
    deviation = UNIT * mean
    if not sandwiched:
        return Terms(features, mean, deviation**2, 0.0)
    edges = _edges(table)
    typical = BOUNDARY * float(np.median(list(times.values()))) / np.sqrt(2.0)
    features += edges
    mean = np.concatenate([mean, np.zeros(len(edges))])
    deviation = np.concatenate([deviation, np.full(len(edges), typical)])
    scale, floor = _as_measured(table, features, mean)
    return Terms(features, scale * mean, (scale * deviation) ** 2, floor)


def dense_ns(table: LatencyTable) -> tuple[float, float, bool]:
    """(ns, standard error, whether estimated) of the dense fp32 network.

    Measured where it was built; a sum over sandwiches where only those were. Raises InvalidInput where there is neither.
    """
    if table.header.mode != Mode.SANDWICHED:
        build = table.find(Role.DENSE)
        return table.time_ns(build), (build.high - build.low) / 3.92 * table.header.reference_ns, False
    terms = layer_terms(table, "fp32")
    index = {f: i for i, f in enumerate(terms.features)}
    row = np.zeros(len(index))
    row[index["rest",]] = 1.0
    for unit in table.network.units:
        feature = ("unit", unit.signature, "dense.fp32")
        if feature not in index:
            raise InvalidInput(
                f"the table has no time of unit {unit.name} in fp32, and so none of the dense network; profile again, it resumes"
            )
        row[index[feature]] += 1.0
    time_ns = float(row @ terms.mean)
    return time_ns, float(np.sqrt(row**2 @ terms.variance + (terms.floor * time_ns) ** 2)), True


def dense_unit_ns(table: LatencyTable, unit: str) -> float:
    """Time of a unit of the dense fp32 network, from a sandwiched table. Raises InvalidInput where it was not measured."""
    terms = layer_terms(table, "fp32")
    feature = ("unit", table.network[unit].signature, "dense.fp32")
    if feature not in terms.features:
        raise InvalidInput(f"the table has no time of unit {unit} in fp32; profile again, it resumes")
    return float(terms.mean[terms.features.index(feature)])


def _alone(table: LatencyTable, builds: Sequence[Build]) -> dict[tuple[str, str], float]:
    """(signature, variant) -> ns of all calls, a layer's end-to-end time."""
    found: dict[tuple[str, str], list[float]] = {}
    calls = {u.signature: u.calls for u in table.network.units}
    for build in builds:
        unit, variant = next((u, v) for u, v in zip(table.network.units, build.variants, strict=True) if v)
        found.setdefault((unit.signature, variant), []).append(table.time_ns(build))
    return {cell: float(np.median(own)) * calls[cell[0]] for cell, own in found.items()}


def _between(table: LatencyTable, builds: Sequence[Build]) -> tuple[float, dict[tuple[str, str], float]]:
    """(rest, (signature, variant) -> ns): of fillings only, over units of one signature as often as each context occurs.

    The rest is what an inference takes beside its nodes, and nodes of no unit at the network's input.
    """
    builds = [b for b in builds if sum(n.time_ns for n in b.nodes) > 0]
    times, counted = (np.array([f(b) for b in builds]) for f in (table.time_ns, lambda b: sum(n.time_ns for n in b.nodes)))
    besides = beside(times, counted, np.array([float(len(b.nodes)) for b in builds]))
    dispatch = besides.dispatch_ns
    network, context = table.network, contexts(table.network)
    found: dict[tuple[Context, str], list[float]] = {}
    first: list[float] = []
    for build in builds:
        work = worked_ns(np.array([n.time_ns for n in build.nodes]), besides.counter_ns)
        scale = max(table.time_ns(build) - dispatch, 0.0) / float(work.sum())
        asked = dict(zip(context, zip(build.variants, build.executed, strict=True), strict=True))
        held = filling(network, [u for u, (v, _) in asked.items() if v])
        for unit in held:
            variant, executed = asked[unit]
            if not executed or Variant.parse(variant).runs_as(executed):
                own = sum(t / len(n.units) for n, t in zip(build.nodes, work.tolist(), strict=True) if unit in n.units)
                found.setdefault((context[unit], variant), []).append(scale * own)
        if network.units[0].name in held:
            first.append(scale * sum(t for n, t in zip(build.nodes, work.tolist(), strict=True) if not n.units))
    cells: dict[tuple[str, str], list[float]] = {}
    for one in network.units:
        for variant in dict.fromkeys(v for c, v in found if c == context[one.name]):
            cells.setdefault((one.signature, variant), []).append(
                float(np.median(found[context[one.name], variant]))
            )
    rest = dispatch + (float(np.median(first)) if first else 0.0)
    return rest, {cell: float(np.mean(own)) for cell, own in cells.items()}


def _edges(table: LatencyTable) -> list[Feature]:
    """The terms, pooled over edges, of boundaries between an int8 unit and another."""
    return list(
        dict.fromkeys(
            feature
            for edge in table.network.edges
            for pair in ((False, True), (True, False))
            for side in ("src", "dst")
            for feature, _ in edge_features(edge, pair, side, 1.0)
            if feature[0] == "pool"
        )
    )


def _as_measured(table: LatencyTable, features: Sequence[Feature], mean: Any) -> tuple[float, float]:
    """(factor on all terms, relative error of the sum) from whole networks that were deployed since, if any."""
    index = {f: i for i, f in enumerate(features)}
    base = table.header.options["base"]
    ratios = []
    for build in table.builds:
        if build.partial or build.base != base or not build.as_asked():
            continue
        candidate = table.candidate(build)
        cells = [
            ("unit", table.network.unit_at(u, candidate.widths).signature, str(v)) for u, v in candidate.variants.items()
        ]
        if all(c in index for c in cells):
            predicted = mean[index["rest",]] + sum(mean[index[c]] for c in cells)
            ratios.append(table.time_ns(build) / predicted)
    if not ratios:
        return 1.0, WHOLE
    return float(np.median(ratios)), max(CORRECTED, float(np.std(ratios)))

"""What builds say of the terms of a latency model, as linear equations, and their least squares.

    T(a) = b0 + sum over units t[u, a_u] + sum over edges r[e, class(a_src), class(a_dst)]

Every build gives one equation for its end-to-end time and one for each unit, from its executed nodes. A machine whose other
load comes and goes does not slow every network alike: a slow change of all times against the reference, over a profile, is one
more parameter, and predictions are for the middle of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.sparse import csr_array

from hwsearch.network import Edge, Network
from hwsearch.table import Build, Evidence, LatencyTable
from hwsearch.variants import Variant

Floats = NDArray[np.float64]
Feature = tuple[Any, ...]

PAIRS = ((False, True), (True, False), (True, True))
"""Classes (quantized or not) of producer and consumer that add a term; float to float is the baseline."""


def edge_features(edge: Edge, pair: tuple[bool, bool], side: str) -> list[tuple[Feature, float]]:
    """Terms of a boundary in the time of the unit at its `src` or `dst` side: pooled over edges, and its own."""
    if pair == (False, False):
        return []
    kind = (side, edge.fused, pair)
    return [
        (("pool", *kind), 1.0),
        (("pool bytes", *kind), edge.tensor_bytes / 1e5),
        (("edge", edge.name, *kind), 1.0),
    ]


def all_features(
    network: Network, variants: Mapping[str, Variant], widths: Mapping[str, int]
) -> dict[str, list[tuple[Feature, float]]]:
    """For each unit the terms of its own time and of the edges that it is on; under "" the rest."""
    features: dict[str, list[tuple[Feature, float]]] = {"": [(("rest",), 1.0)]}
    for unit in network.units:
        signature = network.unit_at(unit.name, widths).signature
        features[unit.name] = [(("unit", signature, str(variants[unit.name])), 1.0)]
    for edge in network.edges_at(widths):
        pair = variants[edge.src].quantized, variants[edge.dst].quantized
        features[edge.src] += edge_features(edge, pair, "src")
        features[edge.dst] += edge_features(edge, pair, "dst")
    return features


@dataclass(frozen=True)
class Row:
    """One equation: features . parameters = value, with its standard error, both in ns."""

    features: list[tuple[Feature, float]]
    value: float
    error: float

    def drifting(self, when: float) -> Row:
        """The same as measured at some time of a profile, -0.5 at its beginning and 0.5 at its end."""
        return replace(self, features=[*self.features, (("drift",), when * self.value)]) if when else self


def rows_of(table: LatencyTable, build: Build, boundaries: bool) -> list[Row]:
    """One equation for the whole build, then one for each unit (fused ones together)."""
    reference = table.header.reference_ns
    total = build.ratio * reference
    candidate = table.candidate(build)
    features = all_features(table.network, candidate.variants, candidate.widths)
    if not boundaries:
        features = {
            name: [f for f in terms if f[0][0] in ("unit", "rest")] for name, terms in features.items()
        }
    everything = [f for group in features.values() for f in group]
    error = max((build.high - build.low) / 3.92 * reference, 0.002 * total)
    rows = [Row(everything, total, error)]
    counted = sum(n.time_ns for n in build.nodes)
    if counted <= 0:
        return rows
    scale = total / counted
    spread = float(
        np.hypot(0.04, (build.high - build.low) / 3.92 / build.ratio)
    )  # scaled by a total that is as uncertain
    group_of = _fused_groups(build)
    times: dict[str, float] = {"": 0.0}
    for node in build.nodes:
        unit = node.units[0] if node.units else ""
        key = group_of.get(unit, unit)
        times[key] = times.get(key, 0.0) + node.time_ns * scale
    members: dict[str, list[str]] = {}
    for name in features:
        members.setdefault(group_of.get(name, name), []).append(name)
    for key, names in members.items():
        value = times.get(key, 0.0)
        rows.append(Row([f for n in names for f in features[n]], value, spread * value + 0.004 * total))
    return rows


def _fused_groups(build: Build) -> dict[str, str]:
    """Unit -> the first unit of those that the runtime fused with it, directly or through others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.get(name, name) != name:
            name = parent[name]
        return name

    for node in build.nodes:
        if node.kind == "unit":
            for other in node.units[1:]:
                parent[root(other)] = root(node.units[0])
    return {name: root(name) for node in build.nodes for name in node.units}


@dataclass(frozen=True)
class Scales:
    """Prior standard deviations relative to a typical time: of pooled boundary terms, and of one edge's own."""

    pool: float
    own: float


SCALES = [Scales(pool, own) for pool in (0.003, 0.01, 0.03, 0.1) for own in (0.001, 0.01, 0.03, 0.1)]


FEW_SCALES = [Scales(0.01, 0.001), Scales(0.03, 0.01), Scales(0.1, 0.03)]
MANY = 400
"""Parameters above which fewer priors are compared: the time to solve grows with their cube."""


class Equations:
    """All equations of some builds as one matrix, solved under different priors and on different builds.

    What other tables of the device tell (`Header.prior`) are further equations, which every solution sees.
    """

    def __init__(self, table: LatencyTable, builds: Sequence[Build], boundaries: bool) -> None:
        rows = [(k, row) for k, build in enumerate(builds) for row in rows_of(table, build, boundaries)]
        self.builds = len(builds)
        self.told = {e.feature for e in table.header.prior}
        kinds = ("unit", "pool", "pool bytes") if boundaries else ("unit",)
        evidence = [e for e in table.header.prior if e.feature[0] in kinds]
        told = [(len(builds), row) for row in _told(evidence, [row for _, row in rows])]
        when = _when(builds)
        rows = [(k, row.drifting(when[k])) for k, row in rows] + told
        self.features = list(dict.fromkeys(f for _, row in rows for f, _ in row.features))
        index = {f: i for i, f in enumerate(self.features)}
        self.of_build = np.array([k for k, _ in rows])
        design = np.zeros((len(rows), len(self.features)))
        for i, (_, row) in enumerate(rows):
            for feature, value in row.features:
                design[i, index[feature]] += value
        error = np.array([row.error for _, row in rows])
        self.a = csr_array(design / error[:, None])
        self.b = np.array([row.value for _, row in rows]) / error
        first = np.searchsorted(self.of_build, np.arange(len(builds)))
        self.totals = design[first]
        """Features of the whole builds, as at the middle of the profile."""
        self.totals[:, [i for f, i in index.items() if f == ("drift",)]] = 0.0
        self.measured = np.array([rows[i][1].value for i in first])
        self.typical = float(np.mean(self.measured))
        self.units = len(table.network.units)

    def solve(
        self, scales: Scales, builds: NDArray[np.intp], *, bounded: bool = False
    ) -> tuple[Floats, Floats]:
        """Posterior mean, and the lower Cholesky factor of the inverse of its covariance, on some of the builds.

        bounded: hold times of units and the rest at zero or above.
        """
        deviation = {"unit": 3.0, "rest": 1.0, "pool": scales.pool, "pool bytes": scales.pool,
                     "edge": scales.own / np.sqrt(self.units)}  # fmt: skip
        # what other tables tell is not shrunk away
        deviation["drift"] = DRIFT / self.typical  # a share, not a time
        prior = self.typical * np.array(
            [max(deviation[f[0]], 0.1) if f in self.told else deviation[f[0]] for f in self.features]
        )
        chosen = np.isin(self.of_build, builds) | (self.of_build == self.builds)
        a, b = self.a[chosen], self.b[chosen]
        precision, target = (a.T @ a).toarray() + np.diag(prior**-2.0), a.T @ b
        factor = cholesky(precision, lower=True)
        mean = cho_solve((factor, True), target)
        if bounded:
            mean = _non_negative(
                precision, target, mean, np.array([f[0] in ("unit", "rest") for f in self.features])
            )
        return mean, factor


DRIFT = 0.1
"""Prior standard deviation of the share by which times change against the reference's from a profile's beginning to its end."""


def _when(builds: Sequence[Build]) -> list[float]:
    """For each build when in the profile it was measured, -0.5 to 0.5; 0 for those that were deployed, in other sessions."""
    number = np.cumsum([b.role != "deployed" for b in builds]) - 1
    last = max(int(number[-1]), 1)
    return [
        0.0 if b.role == "deployed" else float(n / last - 0.5) for b, n in zip(builds, number, strict=True)
    ]


def _told(evidence: Sequence[Evidence], rows: Sequence[Row]) -> list[Row]:
    """What other tables tell as equations on this table's scale.

    The two sessions may have run at different speeds: the ratio is taken from units that both measured, the weighted median
    over equations that hold nothing but such units; without one it is 1, and uncertain.
    """
    told = {e.feature: e.ns for e in evidence if e.feature[0] == "unit"}
    ratios, weights = [], []
    for row in rows:
        theirs = sum(value * told.get(feature, float("nan")) for feature, value in row.features)
        if theirs > 0:  # not where a term is unknown
            ratios.append(row.value / theirs)
            weights.append(row.value)
    speed, spread = 1.0, 0.1
    if ratios:
        order = np.argsort(ratios)
        share = np.cumsum(np.array(weights)[order]) / np.sum(weights)
        speed, spread = float(np.array(ratios)[order][np.searchsorted(share, 0.5)]), SESSIONS
    return [
        Row(
            [(e.feature, 1.0)],
            speed * e.ns,
            float(np.hypot(speed * e.error_ns, spread * abs(speed * e.ns))) or 1.0,
        )
        for e in evidence
    ]


SESSIONS = 0.05
"""Relative standard error of a layer's time between two networks or sessions on one device."""


def _non_negative(precision: Floats, target: Floats, mean: Floats, physical: NDArray[np.bool_]) -> Floats:
    """The least squares with some parameters at zero or above, by block principal pivoting (Portugal et al., 1994)."""
    free = np.ones(len(mean), bool)
    for _ in range(50):
        slack = precision @ mean - target
        below, freed = physical & free & (mean < 0), ~free & (slack < 0)
        if not below.any() and not freed.any():
            break
        free = (free & ~below) | freed
        mean = np.zeros(len(free))
        mean[free] = np.linalg.solve(precision[np.ix_(free, free)], target[free])
    return np.where(physical, np.maximum(mean, 0.0), mean)

"""What builds say of the terms of a latency model, as linear equations, and their least squares.

    T(a) = b0 + sum over units t[u, a_u] + sum over edges r[e, class(a_src), class(a_dst)]

Every build gives one equation for its end-to-end time and one for each unit, from its executed nodes; what an inference takes
beside those (`overhead`) is the rest's. A machine does not slow every network alike: a slow change of all times against the
reference, over a profile, is one more parameter, and predictions are for the middle of it; and how much of a slowdown is the same
time for every executed node, and not the same share, is another, and predictions are for the quiet machine.
Cells that were built once or twice lean on those of the same unit at other widths (`pooling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.sparse import csr_array

from hwsearch.latency.overhead import dispatch_ns
from hwsearch.latency.pooling import Cell, pooled
from hwsearch.network.choices import Candidate
from hwsearch.network.network import Edge, Network, Unit
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Evidence
from hwsearch.table.table import LatencyTable

Floats = NDArray[np.float64]
Feature = tuple[Any, ...]

PAIRS = ((False, True), (True, False), (True, True))
"""Classes (quantized or not) of producer and consumer that add a term; float to float is the baseline."""


def edge_features(
    edge: Edge, pair: tuple[bool, bool], side: str, share: float
) -> list[tuple[Feature, float]]:
    """Terms of a boundary in the time of the unit at its `src` or `dst` side: pooled over edges, and its own.

    share: of the whole tensor's bytes that the edge has; what is its own shrinks with it.
    """
    if pair == (False, False):
        return []
    kind = (side, edge.fused, pair)
    return [
        (("pool", *kind), 1.0),
        (("pool bytes", *kind), edge.tensor_bytes / 1e5),
        (("edge", edge.name, *kind), share),
    ]


def all_features(
    network: Network, variants: Mapping[str, Variant], widths: Mapping[str, int]
) -> dict[str, list[tuple[Feature, float]]]:
    """For each unit the terms of its own time and of the edges that it is on; under "" the rest."""
    features: dict[str, list[tuple[Feature, float]]] = {"": [(("rest",), 1.0)]}
    for unit in network.units:
        signature = network.unit_at(unit.name, widths).signature
        features[unit.name] = [(("unit", signature, str(variants[unit.name])), 1.0)]
    for edge, whole in zip(network.edges_at(widths), network.edges, strict=True):
        pair = variants[edge.src].quantized, variants[edge.dst].quantized
        share = edge.tensor_bytes / (whole.tensor_bytes or 1)
        features[edge.src] += edge_features(edge, pair, "src", share)
        features[edge.dst] += edge_features(edge, pair, "dst", share)
    return features


NODE_SPREAD, NODE_SHARE = 0.04, 0.004
"""Standard error of a node's counter: of its own time, and of the whole network's."""


@dataclass(frozen=True)
class Row:
    """One equation: features . parameters = value, in ns, with a standard error of `share` of that value and `error` beside."""

    features: list[tuple[Feature, float]]
    value: float
    error: float
    share: float = 0.0

    def drifting(self, moment: float) -> Row:
        """The same as measured at some time of a profile, -0.5 at its beginning and 0.5 at its end."""
        return replace(self, features=[*self.features, (("drift",), moment * self.value)]) if moment else self


USUAL_SLOWDOWN = 0.05
"""By how much a machine may be slower or faster with all ratios as they were."""
PER_NODE = ("slowdown per node",)
"""The parameter of how much of a slowdown is the same time for every executed node (1), and not the same share of its time (0)."""
USUAL = (0.7, 0.2)
"""What it is before a table tells, and its standard deviation: tables made here told 0.3 to 0.6."""


def slowed(slowdown: float, nodes: float, ratio: float) -> float:
    """By how much what was measured is off the quiet machine's ratio, for each unit of `PER_NODE`.

    slowdown: of the reference, relative; up to `USUAL_SLOWDOWN` it tells nothing. nodes: executed nodes / the reference's. ratio:
    time / the reference's, measured together. Where every node takes d longer (threads that wait for each other after each, on
    virtual cores that lie further apart), times are T + n d and R + m d, of n and m nodes, and their ratio r tells that of the
    quiet times: T / R = r - s (n / m - r), with s = m d / R.
    """
    return slowdown * (nodes - ratio) if abs(slowdown) > USUAL_SLOWDOWN else 0.0


DISTURBANCE, TAKEN, INTRUSION = 0.05, 0.25, 0.3
"""Standard error of a ratio that was measured on a slower machine, for each unit by which the reference was: the first up to the
second, where a slowdown follows a law, and the third beyond, where a program that takes a core away hits one more than another."""


def error_share(table: LatencyTable, build: Build) -> float:
    """Relative standard error of a build's measured time: from its interval, and where something else took the machine."""
    slower = max(table.slowdown(build) - USUAL_SLOWDOWN, 0.0)
    disturbed = DISTURBANCE * slower + INTRUSION * max(slower - TAKEN, 0.0)
    return float(np.hypot(max((build.high - build.low) / 3.92 / build.ratio, 0.002), disturbed))


def error_ns(table: LatencyTable, build: Build) -> float:
    """Standard error of a build's measured time, in ns."""
    return error_share(table, build) * build.ratio * table.header.reference_ns


def beside_nodes(table: LatencyTable, builds: Sequence[Build]) -> float:
    """What an inference takes beside its executed nodes, in ns on the table's scale."""
    scale = table.header.reference_ns
    pairs = [
        (table.time_ns(b), counted * scale / float(np.median(b.reference_ns)))
        for b in builds
        if (counted := sum(n.time_ns for n in b.nodes)) > 0
    ]
    return dispatch_ns(*np.array(pairs).T) if pairs else 0.0


def rows_of(table: LatencyTable, build: Build, boundaries: bool, beside_ns: float) -> list[Row]:
    """One equation for the whole build, then one for each unit (fused ones together) and the rest, which has `beside_ns`."""
    reference = table.header.reference_ns
    total = build.ratio * reference
    candidate = table.candidate(build)
    features = all_features(table.network, candidate.variants, candidate.widths)
    if not boundaries:
        features = {
            name: [f for f in terms if f[0][0] in ("unit", "rest")] for name, terms in features.items()
        }
    slowdown, executed = table.slowdown(build), table.reference_nodes

    def row(
        terms: list[tuple[Feature, float]], value: float, error: float, share: float, nodes: float
    ) -> Row:
        off = slowed(slowdown, nodes, value / reference) * reference
        return Row([*terms, (PER_NODE, off)] if off else terms, value, error, share)

    everything = [f for group in features.values() for f in group]
    rows = [row(everything, total, error_ns(table, build), 0.0, table.nodes(build))]
    counted = sum(n.time_ns for n in build.nodes)
    if counted <= 0:
        return rows
    beside_ns = min(beside_ns, total)
    scale = (total - beside_ns) / counted
    # scaled by a total that is as uncertain
    spread = float(np.hypot(NODE_SPREAD, error_share(table, build)))
    group_of = _fused_groups(build)
    times: dict[str, float] = {"": beside_ns}
    nodes: dict[str, int] = {}
    for node in build.nodes:
        unit = node.units[0] if node.units else ""
        key = group_of.get(unit, unit)
        times[key] = times.get(key, 0.0) + node.time_ns * scale
        nodes[key] = nodes.get(key, 0) + 1
    members: dict[str, list[str]] = {}
    for name in features:
        members.setdefault(group_of.get(name, name), []).append(name)
    for key, names in members.items():
        value = times.get(key, 0.0)
        terms = [f for n in names for f in features[n]]
        rows.append(row(terms, value, NODE_SHARE * total, spread, nodes.get(key, 0) / executed))
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


POOL, OWN = 0.1, 0.03
"""Prior standard deviations relative to a typical time: of pooled boundary terms, and of one edge's own."""


@dataclass(frozen=True)
class Prior:
    """What is known of each parameter before any build: mean and standard deviation, in ns."""

    mean: Floats
    deviation: Floats


class Equations:
    """All equations of some builds as one matrix, and their solutions.

    What other tables of the device tell (`Header.prior`) are further equations, which every solution sees.
    """

    def __init__(self, table: LatencyTable, builds: Sequence[Build], boundaries: bool = True) -> None:
        self.network = table.network
        beside = beside_nodes(table, builds)
        rows = [
            (k, row) for k, build in enumerate(builds) for row in rows_of(table, build, boundaries, beside)
        ]
        self.builds = len(builds)
        self.in_prior = {e.feature for e in table.header.prior}
        kinds = ("unit", "pool", "pool bytes") if boundaries else ("unit",)
        evidence = [e for e in table.header.prior if e.feature[0] in kinds]
        known = [(len(builds), row) for row in _prior_rows(evidence, [row for _, row in rows])]
        moments = _session_times(builds)
        rows = [(k, row.drifting(moments[k])) for k, row in rows] + known
        self.features = list(dict.fromkeys(f for _, row in rows for f, _ in row.features))
        self.index = {f: i for i, f in enumerate(self.features)}
        self.cells = _cells(self.network, list(map(table.candidate, builds)), self.index)
        self.of_build = np.array([k for k, _ in rows])
        design = np.zeros((len(rows), len(self.features)))
        for i, (_, row) in enumerate(rows):
            for feature, value in row.features:
                design[i, self.index[feature]] += value
        value, error, share = np.array([(row.value, row.error, row.share) for _, row in rows]).T
        self._weigh(design, value, error + share * value)
        first = np.searchsorted(self.of_build, np.arange(len(builds)))
        self.totals = design[first]
        """Features of the whole builds, as at the middle of the profile, on the machine as it was just then."""
        self.totals[:, [i for f, i in self.index.items() if f == ("drift",)]] = 0.0
        self.measured = value[first]
        self.errors = error[first]
        self.typical = float(np.mean(self.measured))
        # an error that is a share of the measured time would favour whatever was measured too fast
        expected = design @ self.solve(self.weak_prior(), bounded=True)[0]
        self._weigh(design, value, error + share * np.maximum(expected, 0.2 * value))

    def _weigh(self, design: Floats, value: Floats, error: Floats) -> None:
        self.a, self.b = csr_array(design / error[:, None]), value / error

    def weak_prior(self) -> Prior:
        """The prior of somebody who knows no more than how large times are."""
        mean = np.array([USUAL[0] if f == PER_NODE else 0.0 for f in self.features])
        return Prior(mean, np.array([self.scale(f) for f in self.features]))

    def scale(self, feature: Feature) -> float:
        """Prior standard deviation of a parameter, in ns."""
        deviation = {"unit": 3.0, "rest": 1.0, "pool": POOL, "pool bytes": POOL,
                     "edge": OWN / np.sqrt(len(self.network.units)),
                     "drift": DRIFT / self.typical, PER_NODE[0]: USUAL[1] / self.typical}[feature[0]]  # fmt: skip
        # what other tables tell is not shrunk away
        return self.typical * float(max(deviation, 0.1) if feature in self.in_prior else deviation)

    def prior(self) -> Prior:
        """What is known of each parameter but for its own equations: of a cell, what others predict (`pooling`)."""
        weak_prior = self.weak_prior()
        if not any(any(w is not None for w in c.levels) for c in self.cells.values()):
            return weak_prior
        mean, factor = self.solve(weak_prior)
        error = np.sqrt(np.square(solve_triangular(factor, np.eye(len(mean)), lower=True)).sum(axis=0))
        place = np.array(list(self.cells))
        found = pooled(list(self.cells.values()), mean[place], error[place] / np.maximum(mean[place], 1e-9))
        known = np.isfinite(found.time)
        weak_prior.mean[place[known]] = found.time[known]
        weak_prior.deviation[place[known]] = (found.time * found.error)[known]
        return weak_prior

    def solve(self, prior: Prior, *, bounded: bool = False) -> tuple[Floats, Floats]:
        """Posterior mean, and the lower Cholesky factor of the inverse of its covariance.

        bounded: hold times of units and the rest at zero or above.
        """
        weight = prior.deviation**-2.0
        precision = (self.a.T @ self.a).toarray() + np.diag(weight)
        target = self.a.T @ self.b + weight * prior.mean
        factor = cholesky(precision, lower=True)
        mean = cho_solve((factor, True), target)
        if bounded:
            mean = _non_negative(
                precision, target, mean, np.array([f[0] in ("unit", "rest") for f in self.features])
            )
        return mean, factor

    def left_out(self, mean: Floats, factor: Floats) -> tuple[Floats, Floats]:
        """What a solution on all builds says of each of them once its equations are taken away: time in ns, variance.

        mean, factor: as `solve` returns them. With C the covariance, A the equations of a build and r their residuals, the mean
        without them is m - C A^T (I - A C A^T)^-1 r (Rasmussen & Williams, Gaussian Processes, 5.4.2).
        """
        # transposed it is the same, and in the order in which sparse products read it without a copy
        covariance = cho_solve((factor, True), np.eye(len(mean))).T
        covaried = self.totals @ covariance
        guess = self.totals @ mean
        variance = np.einsum("ij,ij->i", covaried, self.totals)
        for k in range(self.builds):
            own = np.flatnonzero(self.of_build == k)
            a, residual = self.a[own], self.b[own] - self.a[own] @ mean
            left = np.eye(len(own)) - a @ (a @ covariance).T
            beside = a @ covaried[k]
            solved = np.linalg.solve(left, np.stack([residual, beside], axis=1))
            guess[k] -= beside @ solved[:, 0]
            variance[k] += beside @ solved[:, 1]
        return guess, np.maximum(variance, 0.0)


def _cells(
    network: Network, candidates: Sequence[Candidate], index: Mapping[Feature, int]
) -> dict[int, Cell]:
    """For each parameter that is a unit's time, which stairs it is on."""
    found: dict[int, Cell] = {}
    for candidate in candidates:
        for unit in network.units:
            variant = str(candidate.variants[unit.name])
            feature = ("unit", network.unit_at(unit.name, candidate.widths).signature, variant)
            if (place := index.get(feature)) is None or place in found:
                continue
            found[place] = cell_of(network, unit, candidate.widths, variant)
    return found


def cell_of(network: Network, unit: Unit, widths: Mapping[str, int], variant: str) -> Cell:
    """Which stairs a unit is on in a variant, and where on them at some widths."""
    whole = {g: network.channels[g] for g in unit.groups}
    levels = tuple(None if widths.get(g, n) == n else widths[g] for g, n in whole.items())
    return Cell((unit.signature, tuple(whole.values()), variant), levels)


DRIFT = 0.1
"""Prior standard deviation of the share by which times change against the reference's from a profile's beginning to its end."""


def _session_times(builds: Sequence[Build]) -> list[float]:
    """For each build when in the profile it was measured, -0.5 to 0.5; 0 for those that were deployed, in other sessions."""
    number = np.cumsum([b.role != Role.DEPLOYED for b in builds]) - 1
    last = max(int(number[-1]), 1)
    return [
        0.0 if b.role == Role.DEPLOYED else float(n / last - 0.5) for b, n in zip(builds, number, strict=True)
    ]


def _prior_rows(evidence: Sequence[Evidence], rows: Sequence[Row]) -> list[Row]:
    """What other tables know, as equations on this table's scale.

    The two sessions may have run at different speeds: the ratio is taken from units that both measured, the weighted median
    over equations that hold nothing but such units; without one it is 1, and uncertain.
    """
    known = {e.feature: e.ns for e in evidence if e.feature[0] == "unit"}
    logs, weights = [], []
    for row in rows:
        before = sum(value * known.get(feature, float("nan")) for feature, value in row.features)
        if before > 0 and row.value > 0:  # not where a term is unknown
            logs.append(np.log(row.value / before))
            weights.append(row.value)
    speed, spread = 1.0, 0.1
    if logs:
        middle = _median(np.array(logs), np.array(weights))
        speed = float(np.exp(middle))
        away = 1.5 * _median(np.abs(np.array(logs) - middle), np.array(weights))
        # few equations say little of how far apart the sessions are
        spread = float(np.hypot(LEAST_SESSIONS, (away * len(logs) + SESSIONS * 10) / (len(logs) + 10)))
    return [
        Row(
            [(e.feature, 1.0)],
            speed * e.ns,
            float(np.hypot(speed * e.error_ns, spread * abs(speed * e.ns))) or 1.0,
        )
        for e in evidence
    ]


SESSIONS, LEAST_SESSIONS = 0.05, 0.01
"""Relative standard error of a layer's time between two networks or sessions on one device, where nothing tells, and at least."""


def _median(values: Floats, weights: Floats) -> float:
    """The weighted median."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / np.sum(weights)
    return float(values[order][np.searchsorted(share, 0.5)])


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
        mean[free] = cho_solve((cholesky(precision[np.ix_(free, free)], lower=True), True), target[free])
    return np.where(physical, np.maximum(mean, 0.0), mean)

"""What builds say of the terms of a latency model, as linear equations, and their least squares.

    T(a) = b0 + sum over units t[u, a_u] + sum over edges r[e, class(a_src), class(a_dst)]

Every build gives one equation for its end-to-end time and one for each unit, from its executed nodes; what an inference takes
beside those (`overhead`) is the rest's. A machine does not slow every network alike: a slow change of all times against the
reference, over a profile, is one more parameter, and predictions are for the middle of it; by what share another machine of the
kind takes longer against its own reference than the first is another, and predictions are for the first; and how much of a slowdown
is the same time for every executed node, and not the same share, is another, and predictions are for the quiet machine.
Cells that were built once or twice lean on those of the same unit at other widths (`pooling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from hwsearch.latency.features import Feature, Features, Floats, Numbers
from hwsearch.latency.overhead import Beside, beside, worked_ns
from hwsearch.latency.pooling import pooled
from hwsearch.latency.posterior import Directions, Normal, Posterior, Prior, Sparse
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Evidence
from hwsearch.table.table import LatencyTable

NODE_SPREAD, NODE_SHARE = 0.04, 0.004
"""Standard error of a node's counter: of its own time, and of the whole network's."""


@dataclass(frozen=True)
class Rows:
    """Equations: sums of features . parameters = value, in ns, with a standard error of `share` of that value and `error` beside.

    row, number, factor: of each term its equation, its feature and what it is multiplied by. wide: whether an equation holds
    most units.
    """

    row: Numbers
    number: Numbers
    factor: Floats
    value: Floats
    error: Floats
    share: Floats
    wide: NDArray[np.bool_]

    def with_term(self, number: int, factor: Floats) -> Rows:
        """With one more feature, in the equations where its factor is not zero."""
        own = np.flatnonzero(factor)
        return replace(
            self, row=np.concatenate([self.row, own]), factor=np.concatenate([self.factor, factor[own]]),
            number=np.concatenate([self.number, np.full(len(own), number)]),
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """One after another."""
        begin = np.cumsum([0, *(len(p.value) for p in parts)])
        names = ("number", "factor", "value", "error", "share", "wide")
        fields = {f: np.concatenate([getattr(p, f) for p in parts]) for f in names}
        return Rows(np.concatenate([p.row + at for p, at in zip(parts, begin, strict=False)]), **fields)


USUAL_SLOWDOWN = 0.05
"""By how much a machine may be slower or faster with all ratios as they were."""
PER_NODE = ("slowdown per node",)
"""The parameter of how much of a slowdown is the same time for every executed node (1), and not the same share of its time (0)."""
USUAL = (0.7, 0.2)
"""What it is before a table tells, and its standard deviation: tables made here told 0.3 to 0.6."""


def slowed(slowdown: float, nodes: Any, ratio: Any) -> Any:
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
    return float(np.hypot(max(build.width / 3.92, 0.002), disturbed))


def error_ns(table: LatencyTable, build: Build) -> float:
    """Standard error of a build's measured time, in ns."""
    return error_share(table, build) * build.ratio * table.header.reference_ns


def beside_nodes(table: LatencyTable, builds: Sequence[Build]) -> Beside:
    """What an inference takes beside its executed nodes, and each of these only while it is counted, in ns on the table's scale."""
    scale = table.header.reference_ns
    rows = [
        (table.time_ns(b), counted * scale / float(np.median(b.reference_ns)), float(len(b.nodes)))
        for b in builds
        if (counted := sum(n.time_ns for n in b.nodes)) > 0
    ]
    return beside(*np.array(rows).T) if rows else Beside()


def rows_of(table: LatencyTable, build: Build, features: Features, boundaries: bool, besides: Beside) -> Rows:
    """One equation for the whole build, then one for each unit (fused ones together) and the rest, which has the dispatch."""
    reference = table.header.reference_ns
    total = build.ratio * reference
    widths = build.widths or tuple(table.network.channels.values())
    terms = features.of(build.variants, widths, boundaries=boundaries)
    row, number, factor = np.zeros(len(terms.unit), np.intp), terms.number, terms.value
    value, error, share = [np.array([v]) for v in (total, error_ns(table, build), 0.0)]
    nodes, wide = np.array([table.nodes(build)]), np.ones(1, bool)
    counter_ns = besides.counter_ns * float(np.median(build.reference_ns)) / reference
    group, time, count = _by_unit(build, features, counter_ns)
    if (counted := float(time.sum())) > 0:
        dispatch_ns = min(besides.dispatch_ns, total)
        time = time * (total - dispatch_ns) / counted
        time[0] += dispatch_ns
        keys, own, members = np.unique(group, return_inverse=True, return_counts=True)
        row = np.concatenate([row, 1 + own[terms.unit]])
        number, factor = np.tile(number, 2), np.tile(factor, 2)
        value = np.append(value, time[keys])
        error = np.append(error, np.full(len(keys), NODE_SHARE * total))
        # scaled by a total that is as uncertain
        spread = float(np.hypot(NODE_SPREAD, error_share(table, build)))
        share = np.append(share, np.full(len(keys), spread))
        nodes = np.append(nodes, count[keys] / table.reference_nodes)
        wide = np.append(wide, members > len(table.network.units) / 2)
    off = slowed(table.slowdown(build), nodes, value / reference) * reference
    rows = Rows(row, number, factor, value, error, share, wide)
    return rows.with_term(features.number(PER_NODE), np.broadcast_to(off, value.shape))


def _by_unit(build: Build, features: Features, counter_ns: float) -> tuple[Numbers, Floats, Floats]:
    """By number of the unit, 0 for the rest: the first of those that the runtime fused it with, directly or through others; and of
    those the time of their nodes, without what it takes to count them, and how many there are."""
    position = features.position
    parent = list(range(len(position) + 1))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    for node in build.nodes:
        if node.kind == "unit":
            for other in node.units[1:]:
                parent[root(position[other])] = root(position[node.units[0]])
    group = np.array([i if own == i else root(i) for i, own in enumerate(parent)], np.intp)
    of: Numbers = group[[position[n.units[0]] if n.units else 0 for n in build.nodes]]
    time = np.bincount(of, worked_ns(np.array([n.time_ns for n in build.nodes]), counter_ns), len(parent)).astype(np.float64)
    return group, time, np.bincount(of, minlength=len(parent)).astype(np.float64)


LEFT_OUT = 64
"""Builds that are left out of a fit in turn, evenly spread, to tell how far off it is."""
OWN_KINDS = ("unit", "edge")
"""Features that few equations hold: of one unit, of one edge."""
POOL, OWN = 0.1, 0.03
"""Prior standard deviations relative to a typical time: of pooled boundary terms, and of one edge's own."""


UNKNOWN = 0.6
"""Relative standard error of a cell of which nothing but its time at whole widths is known, if that."""


@dataclass(frozen=True)
class Unbuilt:
    """Time of a cell that no build holds, in ns. error_ns: its standard error, given the time of its variant at whole widths, which
    is parameter `like` where builds hold it."""

    time_ns: float
    error_ns: float
    like: int | None


class Equations:
    """All equations of some builds as one matrix, and their solutions.

    What other tables of the device tell (`Header.prior`) are further equations, which every solution sees.
    """

    def __init__(self, table: LatencyTable, builds: Sequence[Build], boundaries: bool = True) -> None:
        self.network = table.network
        besides = beside_nodes(table, builds)
        self.known = known = Features(self.network)
        parts = [rows_of(table, build, known, boundaries, besides) for build in builds]
        self.builds = len(builds)
        self.in_prior = {e.feature for e in table.header.prior}
        kinds = ("unit", "pool", "pool bytes") if boundaries else ("unit",)
        evidence = [e for e in table.header.prior if e.feature[0] in kinds]
        told = _prior_rows(evidence, Rows.joined(parts), known)
        times = _session_times(table, builds)
        parts = [_of_session(table, b, p, known, moment) for b, p, moment in zip(builds, parts, times, strict=True)]
        rows = Rows.joined([*parts, told])
        self.of_build = np.repeat(np.arange(len(parts) + 1), [len(p.value) for p in (*parts, told)])
        used = np.flatnonzero(np.bincount(rows.number, minlength=len(known.names)))
        column = np.zeros(len(known.names), np.intp)
        column[used] = np.arange(len(used))
        self.features = [known.names[i] for i in used]
        self.index = {f: i for i, f in enumerate(self.features)}
        self.cells = {i: known.cells[n] for i, n in enumerate(used.tolist()) if n in known.cells}
        """For each parameter that is a unit's time, which stairs it is on."""
        design: Sparse = csr_array((rows.factor, (rows.row, column[rows.number])), shape=(len(rows.value), len(used)))
        self.wide = rows.wide
        self._shared = np.array([f[0] not in OWN_KINDS for f in self.features])
        self._weigh(design, rows.value, rows.error + rows.share * rows.value)
        first = np.searchsorted(self.of_build, np.arange(len(builds)))
        self.totals = design[first]
        """Features of the whole builds, as at the middle of the profile, on the machine as it was just then."""
        drifts = [place for feature, place in self.index.items() if feature[0] == "drift"]
        self.totals.data[np.isin(self.totals.indices, drifts)] = 0.0
        self.measured = rows.value[first]
        self.errors = rows.error[first]
        self.typical = float(np.mean(self.measured))
        # an error that is a share of the measured time would favour whatever was measured too fast
        weak = self.posterior(self.weak_prior())
        expected = design @ np.where(self._physical, np.maximum(weak.mean, 0.0), weak.mean)
        self._prior = self._pooled(weak)
        self._weigh(design, rows.value, rows.error + rows.share * np.maximum(expected, 0.2 * rows.value))

    def _weigh(self, design: Sparse, value: Floats, error: Floats) -> None:
        self.a: Sparse
        self.a, self.b = csr_array(diags_array(1.0 / error) @ design), value / error
        self.normal = Normal.of(self.a, self.b, self.wide, self._shared)

    def weak_prior(self) -> Prior:
        """The prior of somebody who knows no more than how large times are."""
        mean = np.array([USUAL[0] if f == PER_NODE else 0.0 for f in self.features])
        return Prior(mean, np.array([self.scale(f) for f in self.features]))

    def scale(self, feature: Feature) -> float:
        """Prior standard deviation of a parameter, in ns."""
        own = self._scales[feature[0]]
        # what other tables tell is not shrunk away
        return max(own, 0.1 * self.typical) if feature in self.in_prior else own

    @cached_property
    def _scales(self) -> dict[str, float]:
        edge, typical = OWN / len(self.network.units) ** 0.5, self.typical
        return {"unit": 3.0 * typical, "rest": typical, "pool": POOL * typical, "pool bytes": POOL * typical,
                "edge": edge * typical, "drift": DRIFT, "machine": APART, PER_NODE[0]: USUAL[1]}  # fmt: skip

    def prior(self) -> Prior:
        """What is known of each parameter but for its own equations: of a cell, what others predict (`pooling`)."""
        return self._prior

    def _pooled(self, weak: Posterior) -> Prior:
        """The same. weak: what equations tell after the weak prior."""
        prior = self.weak_prior()
        if all(cell.whole for cell in self.cells.values()):
            return prior
        place = np.array(list(self.cells))
        error = weak.covariance.deviations(place) / np.maximum(weak.mean[place], 1e-9)
        others = pooled(list(self.cells.values()), weak.mean[place], error)
        known = np.isfinite(others.time)
        prior.mean[place[known]] = others.time[known]
        prior.deviation[place[known]] = (others.time * others.error)[known]
        return prior

    def unbuilt(self, posterior: Posterior, mean: Floats, numbers: Numbers) -> dict[int, Unbuilt]:
        """Times of cells that no build holds, by their numbers, as others of the same work tell them at other widths; else, roughly
        as what their variant takes at whole widths. Without those where neither is known. mean: of every parameter, in ns.

        What is uncertain of all cells of a variant alike (what of its time is its own, and what its boundaries') says nothing of
        how times fall with widths: each is given what all others are.
        """
        built, cells = list(self.cells.values()), [self.known.cells[n] for n in numbers.tolist()]
        place = np.array(list(self.cells), np.intp)
        covariance, times = posterior.covariance, mean[place]
        errors = np.minimum(covariance.deviations(place), np.sqrt(covariance.inner.diagonal()[place]))
        absent = np.full(len(cells), np.nan)
        found = pooled(
            [*built, *cells], np.concatenate([times, absent]), np.concatenate([errors / np.maximum(times, 1e-9), absent])
        )
        whole = {(c.work, c.variant): i for i, c in enumerate(built) if c.whole}
        told = {}
        for i, (number, cell) in enumerate(zip(numbers.tolist(), cells, strict=True), len(built)):
            at = whole.get((cell.work, cell.variant))
            like = None if at is None else int(place[at])
            if np.isfinite(found.error[i]):
                told[number] = Unbuilt(float(found.time[i]), float(found.time[i] * found.error[i]), like)
            elif at is not None:
                told[number] = Unbuilt(float(times[at]), float(np.hypot(UNKNOWN * times[at], errors[at])), like)
        return told

    def posterior(self, prior: Prior) -> Posterior:
        """Of every parameter, in ns."""
        return Posterior(self.normal, prior)

    @cached_property
    def _physical(self) -> NDArray[np.bool_]:
        """Which parameters are times that are zero or above: of units, and the rest."""
        return np.array([f[0] in ("unit", "rest") for f in self.features])

    def bounded(self, posterior: Posterior) -> Floats:
        """Its mean with times of units and the rest at zero or above."""
        return posterior.non_negative(self._physical)[0]

    def left_out(self, posterior: Posterior) -> tuple[Floats, Floats]:
        """What a posterior of all builds says of builds once their equations are taken away: time in ns, variance [builds].

        NaN of most where there are more than `LEFT_OUT`.
        """
        covariance, target = posterior.covariance, posterior.target
        inner, spread = covariance.inner.sparse, covariance.inner @ target
        outer = covariance.outer.T @ target
        wide = np.cumsum(self.wide) - 1 + len(posterior.shared)
        """Of each wide equation its row in the covariance's core."""
        guess, variance = np.full((2, self.builds), np.nan)
        begin = np.searchsorted(self.of_build, np.arange(self.builds + 1))
        for k in np.unique(np.linspace(0, self.builds - 1, min(self.builds, LEFT_OUT)).round().astype(int)):
            own = np.arange(begin[k], begin[k + 1])
            narrow, gone = own[~self.wide[own]], own[self.wide[own]]
            rows, total = self.a[narrow], self.totals[[k]]
            # two vectors: the total, and the target without what the build adds to it
            taken: Sparse = csr_array((self.b[own] @ self.a[own])[None])
            by_total, by_taken = total @ inner, taken @ inner
            cross = (total @ spread)[0] - by_total.multiply(taken).sum()
            of = Directions(
                inner=np.array([[by_total.multiply(total).sum(), cross], [cross, 0.0]]),
                beside=np.stack([(rows @ by_total.T).toarray()[:, 0], rows @ spread - (rows @ by_taken.T).toarray()[:, 0]], axis=1),
                outer=np.stack([(total @ covariance.outer)[0], outer - (taken @ covariance.outer)[0]], axis=1),
            )  # fmt: skip
            variance[k], guess[k] = covariance.after(rows, -1.0, of, wide[gone])[0]
        return guess, np.maximum(variance, 0.0)


DRIFT = 0.02
"""Prior standard deviation of the share by which times change against the reference's from a profile's beginning to its end."""


APART = 0.1
"""The same of the share by which a machine's times against its reference are longer than the first one's."""


def _session_times(table: LatencyTable, builds: Sequence[Build]) -> list[float]:
    """For each build when in its machine's profile it was measured, -0.5 to 0.5; 0 for deployed ones, of other sessions."""
    moments = np.zeros(len(builds))
    for name in table.machines:
        own = [i for i, b in enumerate(builds) if b.role != Role.DEPLOYED and table.machine(b) == name]
        moments[own] = np.arange(len(own)) / max(len(own) - 1, 1) - 0.5
    return [float(m) for m in moments]


def _of_session(table: LatencyTable, build: Build, rows: Rows, features: Features, moment: float) -> Rows:
    """Equations of a build with the terms of its machine: how its times change, and how far apart it is from the first one."""
    name, (first, *_) = table.machine(build), table.machines
    if name == first:
        return rows.with_term(features.number(("drift",)), moment * rows.value)
    rows = rows.with_term(features.number(("drift", name)), moment * rows.value)
    return rows.with_term(features.number(("machine", name)), rows.value)


def _prior_rows(evidence: Sequence[Evidence], rows: Rows, features: Features) -> Rows:
    """What other tables know, as equations on this table's scale.

    The two sessions may have run at different speeds: the ratio is taken from units that both measured, the weighted median
    over equations that hold nothing but such units; without one it is 1, and uncertain.
    """
    number = np.array([features.number(e.feature) for e in evidence], np.intp)
    ns = np.array([e.ns for e in evidence])
    known = np.full(len(features.names), np.nan)
    units = np.array([e.feature[0] == "unit" for e in evidence], bool)
    known[number[units]] = ns[units]
    before = np.bincount(rows.row, rows.factor * known[rows.number], len(rows.value))
    own = (before > 0) & (rows.value > 0)  # not where a term is unknown
    speed, spread = 1.0, 0.1
    if own.any():
        logs, weights = np.log(rows.value[own] / before[own]), rows.value[own]
        middle = _median(logs, weights)
        speed = float(np.exp(middle))
        away = 1.5 * _median(np.abs(logs - middle), weights)
        # few equations say little of how far apart the sessions are
        spread = float(np.hypot(LEAST_SESSIONS, (away * len(logs) + SESSIONS * 10) / (len(logs) + 10)))
    error = np.hypot(speed * np.array([e.error_ns for e in evidence]), spread * np.abs(speed * ns))
    none = np.zeros(len(evidence))
    return Rows(
        np.arange(len(evidence)), number, none + 1.0, speed * ns, np.where(error == 0.0, 1.0, error), none, none > 0
    )


SESSIONS, LEAST_SESSIONS = 0.05, 0.01
"""Relative standard error of a layer's time between two networks or sessions on one device, where nothing tells, and at least."""


def _median(values: Floats, weights: Floats) -> float:
    """The weighted median."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / np.sum(weights)
    return float(values[order][np.searchsorted(share, 0.5)])

"""The next whole networks to build: those that most reduce the variance of what a search will ask for.

After a first batch that covers (`choices.cover`), the builds so far give every term of the latency model a posterior. What
matters is not that posterior but the error of the allocations that a search is likely to pick; so a few dozen of those are
drawn, and of a pool of candidates the one is built whose equations, as far as can be foreseen, leave the least mean variance
over them (A-optimal design; Pukelsheim, Optimal Design of Experiments, 2006). Several are chosen at a time, each as if those
before it had been measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, diags_array, vstack

from hwsearch.device.spent import FITTING, Spent
from hwsearch.latency.features import Feature, Floats, Terms
from hwsearch.latency.model import solved
from hwsearch.latency.posterior import Directions, Normal, Posterior, Prior, Sparse
from hwsearch.latency.regression import NODE_SHARE, NODE_SPREAD, OWN_KINDS, UNKNOWN, Equations
from hwsearch.latency.uncertainty import ErrorScale
from hwsearch.network.choices import Candidate, Coverage, Grid, Offered, random_candidate
from hwsearch.network.variants import Variant
from hwsearch.table.table import LatencyTable, usable

TARGETS = 48
POOL = 24
SWEEPS = 2
LEAST = 0.01
"""Share of the fastest build that a network is at least believed to take: a model of few noisy builds may say less than nothing."""


@dataclass(frozen=True)
class Proposal:
    """What to build next, and what is expected of it.

    error: relative standard error, root mean square over the likely allocations, that the builds so far leave; after: what
    it will be with the proposed ones. Neither holds what the model's form cannot tell.
    """

    candidates: tuple[Candidate, ...]
    error: float
    after: float


def propose(
    table: LatencyTable, offered: Offered, grid: Grid, rng: np.random.Generator, count: int = 4, spent: Spent | None = None
) -> Proposal:
    """The next `count` builds of a table that has at least two.

    offered: variants of each unit; grid: widths of each channel group. spent: is told how much of it is fitting.
    """
    network = table.network
    with (spent or Spent()).on(FITTING):
        belief = Belief(table, offered, grid)
    done = [table.candidate(b) for b in table.builds if b.base == table.header.options["base"]]
    targets = belief.likely(rng, TARGETS * 3 // 4)
    targets += [random_candidate(network, offered, grid, rng) for _ in range(TARGETS - len(targets))]
    pool = belief.likely(rng, POOL // 3)
    coverage, covering = Coverage(network, offered, grid, done), list[Candidate]()
    for _ in range(POOL - len(pool)):
        covering.append(coverage.seldom(rng, 16))
        coverage.count(covering[-1])
        if len(covering) > count:
            coverage.count(covering[-1 - count], -1)
    pool += covering
    pool = [c for c in pool if c not in done] or pool
    state = _State(belief, targets, pool)
    error, chosen = state.error(), []
    left = list(range(len(pool)))
    for _ in range(min(count, len(pool))):
        best = max(left, key=state.gain)
        state.learn(best)
        chosen.append(pool[best])
        left.remove(best)
    return Proposal(tuple(chosen), error, state.error())


class Belief:
    """What the builds of a table tell of every cell of a grid, built or not, and of boundaries."""

    def __init__(self, table: LatencyTable, offered: Offered, grid: Grid) -> None:
        self.network, self.offered, self.grid = table.network, offered, grid
        builds = [b for b in usable(table) if not b.kept_out]
        self.equations = equations = Equations(table, builds)
        self.prior = equations.prior()
        self.posterior = equations.posterior(self.prior)
        self.model = solved(table, equations, self.posterior, ErrorScale())
        self.build_error = float(np.median(equations.errors / equations.measured))
        self.least_ns = LEAST * min(map(table.time_ns, builds))
        self._place = {u.name: i for i, u in enumerate(self.network.units)}
        self._numbers = equations.known.grid(offered, grid)
        self.unbuilt = self._unbuilt()
        """Mean and standard error, in ns, of the cells of the grid that no build holds."""
        known = {f: t for f, (t, _) in self.unbuilt.items()}
        names = equations.known.names
        time = np.array([self.model.value(f) if f in self.model.index else known.get(f, np.inf) for f in names])
        self._times = [np.where(n < 0, np.inf, time[n]) for n in self._numbers]
        """Of each unit [widths of each of its groups ..., variants]: ns, infinite where it cannot become the variant."""
        self._edges = {(e.src, e.dst): self.model.edge_ns(e.src, e.dst) for e in self.network.edges}

    def _unbuilt(self) -> dict[Feature, tuple[float, float]]:
        model, known = self.model, self.equations.known
        fallback: dict[int, float] = {}
        for unit, numbers in zip(self.network.units, self._numbers, strict=True):
            for j, variant in enumerate(self.offered[unit.name]):
                whole_ns = self._whole_ns(unit.name, variant)
                for number in numbers[..., j].ravel().tolist():
                    if number >= 0 and known.names[number] not in model.index:
                        fallback.setdefault(number, whole_ns)
        told = self.equations.unbuilt(self.posterior, model.mean, np.array(list(fallback), np.intp))
        deviation = self.posterior.covariance.deviations()
        found = {}
        for number, whole_ns in fallback.items():
            time_ns, error_ns = whole_ns, UNKNOWN * whole_ns
            if (own := told.get(number)) is not None:
                share = 0.0 if own.like is None else own.time_ns / max(model.mean[own.like], 1e-9) * deviation[own.like]
                time_ns, error_ns = own.time_ns, float(np.hypot(own.error_ns, min(share, UNKNOWN * own.time_ns)))
            found[known.names[number]] = time_ns, error_ns
        return found

    def _whole_ns(self, unit: str, variant: Variant) -> float:
        """Time of a unit at whole widths in this variant or in any other, else a typical one."""
        signature = self.network[unit].signature
        for other in (variant, *self.offered[unit]):
            time_ns = self.model.value(("unit", signature, str(other)))
            if time_ns is not None:
                return time_ns
        return self.equations.typical / len(self.network.units)

    def unit_ns(self, unit: str, widths: Mapping[str, int], variant: Variant) -> float:
        """Expected time of a unit at some widths of the grid; infinite where it cannot become the variant at them."""
        groups = self.network[unit].groups
        at = [self.grid[g].index(widths.get(g, self.network.channels[g])) for g in groups]
        return float(self._times[self._place[unit]][*at, list(self.offered[unit]).index(variant)])

    def likely(self, rng: np.random.Generator, count: int) -> list[Candidate]:
        """Allocations as a search might pick them: near the least time under random losses and a random price of them.

        By coordinate descent (iterated conditional modes: Besag, 1986), over widths and variants, of all of them at once.
        """
        units, groups = self.network.units, list(self.grid)
        place = self._place
        price = self.equations.typical / len(units) * 10.0 ** rng.uniform(-1.5, 1.5, (count, 1))
        loss, quantized = [], []
        for unit in units:
            own = self.offered[unit.name]
            free = np.array([v.plain for v in own])
            loss.append(np.where(free, 0.0, price * rng.exponential(size=(count, len(own)))))
            quantized.append(np.array([v.quantized for v in own], int))
        steps = {g: rng.exponential(size=(count, len(self.grid[g]))) for g in groups}
        stairs = {g: price * (np.cumsum(own, axis=1) - own[:, :1]) for g, own in steps.items()}
        width = {g: rng.integers(len(self.grid[g]), size=count) for g in groups}
        variant = [rng.integers(len(self.offered[u.name]), size=count) for u in units]
        touched: dict[str, list[int]] = {g: [] for g in groups}
        for i, unit in enumerate(units):
            for group in unit.groups:
                touched[group].append(i)
        beside: list[list[tuple[int, Floats]]] = [[] for _ in units]
        for (src, dst), totals in self._edges.items():
            cost = np.array([[totals[a, b] for b in (False, True)] for a in (False, True)])
            beside[place[src]].append((place[dst], cost))
            beside[place[dst]].append((place[src], cost.T))

        def times(unit: int, free: str | None) -> Floats:
            """[count, choices] of a group's widths, or of the variants, all else as it is."""
            at = [np.arange(len(self.grid[g])) if g == free else width[g][:, None] for g in units[unit].groups]
            last = variant[unit][:, None] if free else np.arange(len(self.offered[units[unit].name]))
            return np.asarray(self._times[unit][(*at, last)])

        for _ in range(SWEEPS):
            for number in rng.permutation(len(groups)).tolist():
                group = groups[number]
                width[group] = np.argmin(stairs[group] + sum(times(u, group) for u in touched[group]), axis=1)
            for number in rng.permutation(len(units)).tolist():
                cost = times(number, None) + loss[number]
                for other, matrix in beside[number]:
                    cost = cost + matrix[quantized[number][None, :], quantized[other][variant[other]][:, None]]
                variant[number] = np.argmin(cost, axis=1)
        return [
            Candidate(
                {u.name: self.offered[u.name][own[k]] for u, own in zip(units, variant, strict=True)},
                {g: self.grid[g][width[g][k]] for g in groups},
            )
            for k in range(count)
        ]


class _State:
    """Posterior over the built terms and those unbuilt ones that some allocations hold, as builds are foreseen.

    aims: allocations whose time is to be known. pool: those that may be built.
    """

    def __init__(self, belief: Belief, aims: Sequence[Candidate], pool: Sequence[Candidate]) -> None:
        known, model, equations = belief.equations.known, belief.model, belief.equations
        terms = [known.of_candidate(c.variants, c.widths) for c in (*aims, *pool)]
        self.place = np.array([model.index.get(f, -1) for f in known.names], np.intp)
        met = np.unique(np.concatenate([t.number for t in terms]))
        new = met[self.place[met] < 0]
        built = len(model.mean)
        self.place[new] = built + np.arange(len(new))
        names = [known.names[n] for n in new]
        told = np.array([belief.unbuilt.get(f) or (0.0, equations.scale(f)) for f in names]).reshape(-1, 2)
        self.mean = np.concatenate([model.mean, told[:, 0]])
        size = len(self.mean)
        self.prior = Prior(
            np.concatenate([belief.prior.mean, told[:, 0]]), np.concatenate([belief.prior.deviation, told[:, 1]])
        )
        normal = equations.normal
        shared = np.concatenate([normal.shared, [f[0] not in OWN_KINDS for f in names]]).astype(bool)
        self.normal = Normal(
            _padded(normal.second, size, size), _padded(normal.whole, normal.whole.shape[0], size),
            np.concatenate([normal.target, np.zeros(len(new))]), shared,
        )  # fmt: skip
        self.least_ns, self.build_error = belief.least_ns, belief.build_error
        self.aims = csr_array(vstack([self._summed(t)[0] for t in terms[: len(aims)]]))
        self.times = np.maximum(self.aims @ self.mean, belief.least_ns)
        self.rows = [self._equations(t) for t in terms[len(aims) :]]
        self._solve()

    def _summed(self, terms: Terms) -> tuple[Sparse, Sparse]:
        """(the whole build [1, parameters], each unit and the rest [1 + units, parameters])."""
        place, shape = self.place[terms.number], (1, len(self.mean))
        whole = csr_array((terms.value, (np.zeros_like(place), place)), shape=shape)
        return whole, csr_array((terms.value, (terms.unit, place)), shape=(int(terms.unit.max()) + 1, shape[1]))

    def _equations(self, terms: Terms) -> Sparse:
        """[equations, parameters]: what a build would say, each divided by its standard error; the whole build first."""
        a = csr_array(vstack(self._summed(terms)))
        times = np.maximum(a @ self.mean, 0.0)
        times[0] = max(times[0], self.least_ns)
        error = np.hypot(NODE_SPREAD, self.build_error) * times + NODE_SHARE * times[0]
        error[0] = self.build_error * times[0]
        return csr_array(diags_array(1.0 / error) @ a)

    def _solve(self) -> None:
        self.covariance = Posterior(self.normal, self.prior).covariance
        self.inner = self.covariance.inner @ self.aims.T.toarray()
        self.outer = self.aims @ self.covariance.outer
        self.variances = self.covariance.variances(self.aims)

    def gain(self, number: int) -> float:
        """By how much measuring a build of the pool lowers the mean relative variance of the aims."""
        whole, rows = self.rows[number][[0]], self.rows[number][1:]
        covariance = self.covariance
        inner = np.concatenate([self.inner, covariance.inner.sparse @ whole.T.toarray()], axis=1)
        of = Directions(
            inner=np.concatenate([self.aims @ inner, whole @ inner]), beside=rows @ inner,
            outer=np.concatenate([self.outer, whole @ covariance.outer]).T,
        )  # fmt: skip
        left = covariance.after(rows, 1.0, of)
        own, cross, total = np.diag(left)[:-1], left[:-1, -1], left[-1, -1]
        return float(np.mean((self.variances - own + cross**2 / (1.0 + total)) / self.times**2))

    def learn(self, number: int) -> None:
        """As if a build of the pool had been measured."""
        rows = self.rows[number]
        self.normal = self.normal.with_equations(rows, np.arange(rows.shape[0]) == 0)
        self._solve()

    def error(self) -> float:
        """Root mean square over the aims of their relative standard error."""
        return float(np.sqrt(np.mean(self.variances / self.times**2)))


def _padded(matrix: Sparse, rows: int, columns: int) -> Sparse:
    """With zeros after its own rows and columns."""
    padded = matrix.copy()
    padded.resize((rows, columns))
    return padded

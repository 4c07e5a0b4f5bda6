"""The next whole networks to build: those that most reduce the variance of what a search will ask for.

After a first batch that covers (`choices.cover`), the builds so far give every term of the latency model a posterior. What
matters is not that posterior but the error of the allocations that a search is likely to pick; so a few dozen of those are
drawn, and of a pool of candidates the one is built whose equations, as far as can be foreseen, leave the least mean variance
over them (A-optimal design; Pukelsheim, Optimal Design of Experiments, 2006). Several are chosen at a time, each as if those
before it had been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from hwsearch.latency.model import solved
from hwsearch.latency.pooling import Cell, pooled
from hwsearch.latency.regression import NODE_SHARE, NODE_SPREAD, Equations, Feature, all_features, cell_of
from hwsearch.latency.uncertainty import ErrorScale
from hwsearch.network.choices import Candidate, Grid, Offered, cover, random_candidate
from hwsearch.network.variants import Variant, legal
from hwsearch.table.table import LatencyTable, usable

Floats = NDArray[np.float64]

_Choice = TypeVar("_Choice")

TARGETS = 48
POOL = 24
SWEEPS = 2
LEAST = 0.01
"""Share of the fastest build that a network is at least believed to take: a model of few noisy builds may say less than nothing."""
UNKNOWN = 0.6
"""Relative standard error of a cell of which nothing is known."""


@dataclass(frozen=True)
class Proposal:
    """What to build next, and what is expected of it.

    error: relative standard error, root mean square over the likely allocations, that the builds so far leave; after: what
    it will be with the proposed ones. Neither holds what the model's form cannot tell.
    """

    candidates: tuple[Candidate, ...]
    error: float
    after: float

    @property
    def gain(self) -> float:
        """By how much each proposed build is expected to lower the error, relatively."""
        return 1.0 - (self.after / self.error) ** (1.0 / max(len(self.candidates), 1)) if self.error else 0.0


def propose(
    table: LatencyTable, offered: Offered, grid: Grid, rng: np.random.Generator, count: int = 4
) -> Proposal:
    """The next `count` builds of a table that has at least two.

    offered: variants of each unit; grid: widths of each channel group.
    """
    network = table.network
    belief = Belief(table, offered, grid)
    done = [table.candidate(b) for b in table.builds if b.base == table.header.options["base"]]
    targets = [belief.likely(rng) for _ in range(TARGETS * 3 // 4)]
    targets += [random_candidate(network, offered, grid, rng) for _ in range(TARGETS - len(targets))]
    pool = [belief.likely(rng) for _ in range(POOL // 3)]
    covering: list[Candidate] = []
    for _ in range(POOL - len(pool)):
        covering.append(cover(network, offered, grid, [*done, *covering[-count:]], rng, pool=16))
    pool += covering
    pool = [c for c in pool if c not in done] or pool
    state = _State(belief, [*targets, *pool])
    aims = np.stack([state.row(c) for c in targets])
    times = np.maximum(aims @ state.mean, belief.least_ns)
    error = state.error(aims, times)
    chosen: list[Candidate] = []
    rows = [state.equations(c) for c in pool]
    for _ in range(min(count, len(pool))):
        gains = [state.gain(own, aims, times) for own in rows]
        best = int(np.argmax(gains))
        state.learn(rows[best])
        chosen.append(pool[best])
        rows.pop(best)
        pool.pop(best)
    return Proposal(tuple(chosen), error, state.error(aims, times))


class Belief:
    """What the builds of a table tell of every cell of a grid, built or not, and of boundaries."""

    def __init__(self, table: LatencyTable, offered: Offered, grid: Grid) -> None:
        self.network, self.offered, self.grid = table.network, offered, grid
        builds = [b for b in usable(table) if not b.kept_out]
        self.equations = equations = Equations(table, builds)
        self.model = solved(table, equations, equations.prior(), ErrorScale())
        self.build_error = float(np.median(equations.errors / equations.measured))
        self.least_ns = LEAST * min(map(table.time_ns, builds))
        self.unbuilt = self._unbuilt()
        """Mean and standard error, in ns, of the cells of the grid that no build holds."""
        self._edges = {(e.src, e.dst): self.model.edge_ns(e.src, e.dst) for e in self.network.edges}

    def _unbuilt(self) -> dict[Feature, tuple[float, float]]:
        model, network = self.model, self.network
        cells: dict[Feature, Cell] = {}
        fallback: dict[Feature, float] = {}
        for unit in network.units:
            for steps in product(*(self.grid[g] for g in unit.groups)):
                widths = dict(zip(unit.groups, steps, strict=True))
                narrow = network.unit_at(unit.name, widths)
                for variant in legal(narrow, self.offered[unit.name]):
                    feature = ("unit", narrow.signature, str(variant))
                    if feature not in model.index and feature not in cells:
                        cells[feature] = cell_of(network, unit, widths, str(variant))
                        fallback[feature] = self._whole_ns(unit.name, variant)
        known = self.equations.cells
        place = np.array(list(known), dtype=np.intp)
        time = model.mean[place]
        error = np.sqrt(np.diag(model.covariance)[place]) / np.maximum(time, 1e-9)
        absent = np.full(len(cells), np.nan)
        found = pooled(
            [*known.values(), *cells.values()],
            np.concatenate([time, absent]),
            np.concatenate([error, absent]),
        )
        return {
            feature: (t, t * e) if np.isfinite(t) else (fallback[feature], UNKNOWN * fallback[feature])
            for feature, t, e in zip(cells, found.time[len(known) :], found.error[len(known) :], strict=True)
        }

    def _whole_ns(self, unit: str, variant: Variant) -> float:
        """Time of a unit at whole widths in this variant or in any other, else a typical one."""
        signature = self.network[unit].signature
        for other in (variant, *self.offered[unit]):
            time_ns = self.model.value(("unit", signature, str(other)))
            if time_ns is not None:
                return time_ns
        return self.equations.typical / len(self.network.units)

    def unit_ns(self, unit: str, widths: Mapping[str, int], variant: Variant) -> float:
        """Expected time of a unit at some widths of the grid."""
        feature = ("unit", self.network.unit_at(unit, widths).signature, str(variant))
        time_ns = self.model.value(feature)
        # infinite where the unit cannot become the variant at these widths
        return self.unbuilt.get(feature, (float("inf"), 0.0))[0] if time_ns is None else time_ns

    def likely(self, rng: np.random.Generator) -> Candidate:
        """An allocation as a search might pick it: near the least time under random losses and a random price of them.

        By coordinate descent (iterated conditional modes: Besag, 1986), over widths and variants.
        """
        units = self.network.units
        price = self.equations.typical / len(units) * 10.0 ** rng.uniform(-1.5, 1.5)
        loss = {
            (u.name, v): price * float(rng.exponential())
            for u in units
            for v in [v for v in self.offered[u.name] if not v.plain] or [Variant("int8")]
        }
        stairs = {
            g: dict(zip(steps, price * np.cumsum([0.0, *rng.exponential(size=len(steps) - 1)]), strict=True))
            for g, steps in self.grid.items()
        }
        widths = {g: int(rng.choice(list(steps))) for g, steps in self.grid.items()}
        variants = {u: vs[int(rng.integers(len(vs)))] for u, vs in self.offered.items()}
        touched = {g: [u.name for u in units if g in u.groups] for g in self.grid}
        beside: dict[str, list[tuple[str, str]]] = {u.name: [] for u in units}
        for src, dst in self._edges:
            beside[src].append((src, dst))
            beside[dst].append((src, dst))

        def boundaries(unit: str) -> float:
            return sum(
                self._edges[e][variants[e[0]].quantized, variants[e[1]].quantized] for e in beside[unit]
            )

        def set_width(group: str, width: int) -> float:
            widths[group] = width
            return float(stairs[group][width]) + sum(
                self.unit_ns(u, widths, variants[u]) for u in touched[group]
            )

        def set_variant(unit: str, variant: Variant) -> float:
            variants[unit] = variant
            own = self.unit_ns(unit, widths, variant) + boundaries(unit)
            return float(own + loss.get((unit, variant), 0.0))

        for _ in range(SWEEPS):
            for group in rng.permutation(list(self.grid)):
                _least(self.grid[group], partial(set_width, str(group)))
            for unit in rng.permutation([u.name for u in units]):
                can = legal(self.network.unit_at(str(unit), widths), self.offered[unit])
                _least(can, partial(set_variant, str(unit)))
        return Candidate(variants, widths)


def _least(choices: Sequence[_Choice], cost: Callable[[_Choice], float]) -> None:
    """Leave the choice of least cost set."""
    cost(min(choices, key=cost))


class _State:
    """Posterior over the built terms and those unbuilt cells that some allocations hold, as builds are foreseen."""

    def __init__(self, belief: Belief, candidates: Sequence[Candidate]) -> None:
        self.belief, self.network = belief, belief.network
        self.index = dict(belief.model.index)
        deviation = []
        for candidate in candidates:
            for own in all_features(self.network, candidate.variants, candidate.widths).values():
                for feature, _ in own:
                    if feature not in self.index:
                        self.index[feature] = len(self.index)
                        deviation.append(
                            belief.unbuilt.get(feature) or (0.0, belief.equations.scale(feature))
                        )
        self.mean = np.concatenate([belief.model.mean, [t for t, _ in deviation]])
        self.variance = np.square([s for _, s in deviation])
        self.learnt: list[Floats] = []
        """Covariance minus U U^T for each of these U [parameters, equations]."""

    def row(self, candidate: Candidate) -> Floats:
        """[parameters]: terms of the whole build."""
        row = np.zeros(len(self.index))
        for own in all_features(self.network, candidate.variants, candidate.widths).values():
            self._add(row, own)
        return row

    def _add(self, row: Floats, features: Sequence[tuple[Feature, float]]) -> None:
        for feature, value in features:
            row[self.index[feature]] += value

    def equations(self, candidate: Candidate) -> Floats:
        """[equations, parameters]: what a build would say, each divided by its standard error."""
        features = all_features(self.network, candidate.variants, candidate.widths)
        a = np.zeros((1 + len(features), len(self.index)))
        for i, own in enumerate(features.values()):
            self._add(a[1 + i], own)
        a[0] = a[1:].sum(axis=0)
        times = np.maximum(a @ self.mean, 0.0)
        times[0] = max(times[0], self.belief.least_ns)
        error = np.hypot(NODE_SPREAD, self.belief.build_error) * times + NODE_SHARE * times[0]
        error[0] = self.belief.build_error * times[0]
        return np.asarray(a / error[:, None])

    def _covary(self, rows: Floats) -> Floats:
        """Covariance @ rows^T."""
        model = self.belief.model
        built = len(model.mean)
        product_ = np.concatenate(
            [model.covariance @ rows.T[:built], self.variance[:, None] * rows.T[built:]]
        )
        for u in self.learnt:
            product_ -= u @ (u.T @ rows.T)
        return np.asarray(product_)

    def _whiten(self, rows: Floats) -> tuple[Floats, Floats]:
        covaried = self._covary(rows)
        return covaried, cholesky(np.eye(len(rows)) + rows @ covaried, lower=True)

    def gain(self, rows: Floats, aims: Floats, times: Floats) -> float:
        """By how much measuring these equations lowers the mean relative variance of the aims."""
        covaried, lower = self._whiten(rows)
        return float(
            np.mean(
                np.square(solve_triangular(lower, covaried.T @ aims.T, lower=True)).sum(axis=0) / times**2
            )
        )

    def learn(self, rows: Floats) -> None:
        """As if the equations had been measured."""
        covaried, lower = self._whiten(rows)
        self.learnt.append(np.asarray(solve_triangular(lower, covaried.T, lower=True)).T)

    def error(self, aims: Floats, times: Floats) -> float:
        """Root mean square over the aims of their relative standard error."""
        variance = np.einsum("ij,ji->i", aims, self._covary(aims))
        return float(np.sqrt(np.mean(np.maximum(variance, 0.0) / times**2)))

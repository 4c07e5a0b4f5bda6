"""LatencyModel: the time of any allocation, fitted on a table, with its uncertainty.

    T(a) = b0 + sum over units t[u, a_u] + sum over edges r[e, class(a_src), class(a_dst)]

All terms are linear, and every build says something of each: its executed nodes give one equation a unit
(what the unit and the conversions around it took), its end-to-end time one more. They are solved together as a
Bayesian linear regression: boundary terms are pooled over edges by tensor size and shrunk towards that pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import kendalltau

from hwsearch.errors import InvalidInput
from hwsearch.latency.features import PAIRS, SIDES, Feature, Features, Floats, edge_features
from hwsearch.latency.layer_sum import layer_terms
from hwsearch.latency.posterior import Covariance, Posterior
from hwsearch.latency.regression import PER_NODE, Equations, Unbuilt, error_ns, slowed
from hwsearch.latency.uncertainty import KNOWN, ErrorScale, calibrated, rescaled
from hwsearch.network.choices import Grid
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build, Role
from hwsearch.table.header import LAYERED
from hwsearch.table.table import LatencyTable, usable


@dataclass(frozen=True)
class Prediction:
    """time_ns of one inference and its standard error sigma_ns."""

    time_ns: float
    sigma_ns: float


class LatencyModel:
    """Fitted by `fit`; `predict` is for whole allocations, `terms` are what an allocator needs."""

    def __init__(
        self, table: LatencyTable, features: list[Feature], mean: Floats, covariance: Covariance, *, error_scale: ErrorScale,
        left_out: Sequence[tuple[Build, Prediction]] = (),
    ) -> None:  # fmt: skip
        self.table = table
        self.index = {f: i for i, f in enumerate(features)}
        self.mean, self.covariance = mean, covariance
        """Posterior of the terms, by `index`, in ns."""
        self.error_scale = error_scale
        self.left_out = tuple(left_out)
        """Builds of the fit with what a fit without them says, where the others tell all that they hold."""
        self.unbuilt: dict[Feature, Unbuilt] = {}
        """Times of units at widths of the grid that no build holds: other widths of theirs tell them."""
        self.network: Network = table.network
        self._features = Features(self.network)

    def predict(self, variants: Mapping[str, Variant], widths: Mapping[str, int] | None = None) -> Prediction:
        """Time of an allocation under the table's base. Raises InvalidInput on a variant that nothing measured tells.

        widths: slots kept, of the channel groups that are not whole.
        """
        terms, names = self._features.of_candidate(variants, widths or {}), self._features.names
        place = np.array([self.index.get(names[n], -1) for n in terms.number.tolist()], np.intp)
        own = place >= 0
        columns, values = place[own].tolist(), terms.value[own].tolist()
        time_ns, variance = float(self.mean[columns] @ values), 0.0
        for feature in (names[n] for n in terms.number[~own].tolist()):
            if (told := self.unbuilt.get(feature)) is not None:
                time_ns, variance = time_ns + told.time_ns, variance + told.error_ns**2
                if told.like is not None and self.mean[told.like] > 0:
                    columns.append(told.like)
                    values.append(told.time_ns / self.mean[told.like])
            elif feature[0] == "unit":
                raise InvalidInput(f"the table has no measurement of {feature[2]} for unit signature {feature[1]}")
        row = csr_array((values, (np.zeros(len(columns), np.intp), columns)), shape=(1, len(self.mean)))
        variance += float(self.covariance.variances(row)[0])
        return Prediction(time_ns, float(self.error_scale.sigma(variance, time_ns)))

    def predict_build(self, build: Build) -> Prediction:
        """What a build of the table should have been measured to take, on the machine as it was just then.

        Raises InvalidInput where it holds what no build of the fit does.
        """
        candidate = self.table.candidate(build)
        found = self.predict(candidate.variants, candidate.widths)
        off = slowed(self.table.slowdown(build), self.table.nodes(build), build.ratio)
        time_ns = found.time_ns + self.per_node * off * self.table.header.reference_ns
        apart = self.value(("machine", self.table.machine(build))) or 0.0
        return replace(found, time_ns=time_ns / (1.0 - min(apart, 0.5)))

    def on_quiet_machine(self, ratio: float, nodes: float, slowdown: float) -> Prediction:
        """Time on the quiet machine of what was measured to take `ratio` of the reference on a machine so much slower.

        nodes: executed nodes / the reference's. sigma_ns: by how much the conversion may be off; 0 where nothing is converted.
        At most half of what was measured is taken off: on a machine so busy that the terms ask for more, they do not hold.
        """
        reference = self.table.header.reference_ns
        off = slowed(slowdown, nodes, ratio) * reference
        _, error = self.terms().get(PER_NODE, (0.0, 0.0))
        time_ns = max(ratio * reference - self.per_node * off, ratio * reference / 2.0)
        return Prediction(time_ns, error * abs(off))

    @cached_property
    def per_node(self) -> float:
        """How much of a slowdown is the same time for every executed node: 0 none of it, 1 all. 0 where no build of the fit was
        measured on a slower machine: then the table does not tell."""
        return float(np.clip(self.value(PER_NODE) or 0.0, 0.0, 1.0))

    @cached_property
    def drift(self) -> float:
        """The share by which times changed against the reference's over the profile."""
        return self.value(("drift",)) or 0.0

    @cached_property
    def apart(self) -> dict[str, tuple[float, float]]:
        """Of each machine beyond the first: by what share its times against its reference are longer, and the standard error."""
        return {str(f[1]): told for f, told in self.terms().items() if f[0] == "machine"}

    @cached_property
    def rest_ns(self) -> float:
        """b0: what no unit and no edge accounts for."""
        return float(self.mean[self.index["rest",]])

    def value(self, feature: Feature) -> float | None:
        """A term of the model, in ns; None where no build of the fit has it, and none tells it."""
        place = self.index.get(feature)
        if place is None:
            return self.unbuilt[feature].time_ns if feature in self.unbuilt else None
        return float(self.mean[place])

    def unit_ns(self, unit: str, variant: Variant, widths: Mapping[str, int] | None = None) -> float:
        """t[u, v] without any boundary, at some widths. Raises InvalidInput on what was not measured."""
        found = self.value(("unit", self.network.unit_at(unit, widths or {}).signature, str(variant)))
        if found is None:
            raise InvalidInput(
                f"the table has no measurement of {variant} for unit {unit} at widths {widths or 'whole'}"
            )
        return found

    def terms(self) -> dict[Feature, tuple[float, float]]:
        """Every term that builds hold, with its value and its standard error, in ns."""
        deviation = self.covariance.deviations()
        return {f: (float(self.mean[i]), float(deviation[i])) for f, i in self.index.items()}

    def knows(self, unit: str, variant: Variant, widths: Mapping[str, int]) -> bool:
        """Whether the time of a unit in a variant at some widths was measured, or others at its other widths tell it."""
        feature = ("unit", self.network.unit_at(unit, widths).signature, str(variant))
        return feature in self.index or feature in self.unbuilt

    def predicts(self, build: Build) -> bool:
        """Whether the model knows every unit as it was built."""
        candidate = self.table.candidate(build)
        return all(self.knows(u, v, candidate.widths) for u, v in candidate.variants.items())

    def edge_ns(self, src: str, dst: str, share: float = 1.0) -> dict[tuple[bool, bool], float]:
        """Sum over the edges from src to dst of r[e, class pair]; float to float is 0.

        share: of its whole size that src's output has.
        """
        totals = {(False, False): 0.0, **dict.fromkeys(PAIRS, 0.0)}
        for edge in self.network.between.get((src, dst), ()):
            edge = replace(edge, tensor_bytes=round(edge.tensor_bytes * share))
            for pair in PAIRS:
                for side in SIDES:
                    for feature, value in edge_features(edge, pair, side, share):
                        totals[pair] += value * (self.value(feature) or 0.0)
        return totals


def fit(
    table: LatencyTable, *, builds: Sequence[Build] | None = None, boundaries: bool = True, stairs: Grid | None = None
) -> LatencyModel:
    """Fit on a table's builds, held-out and test ones excepted, or on the given ones.

    The held-out ones only say how large sigma has to be (`uncertainty`), the test ones nothing.
    boundaries: False leaves the boundary terms out (a baseline). stairs: widths of each group that are predicted where no build
    holds them, with the other groups whole; None for every pair of widths of the table's grid.
    Raises InvalidInput where there are too few. A table made layer by layer gives the sum over layers instead.
    """
    if table.header.mode in LAYERED:
        return layer_sum(table)
    heldout: list[Build] = []
    if builds is None:
        heldout = [b for b in usable(table) if b.role == Role.HELDOUT]
        builds = [b for b in usable(table) if not b.kept_out]
    if len(builds) < 2:
        raise InvalidInput(
            f"the table has {len(builds)} usable builds, a fit needs at least 2; run `hwsearch profile` again, it resumes"
        )
    equations = Equations(table, builds, boundaries)
    posterior = equations.posterior(equations.prior())
    guess, variances = equations.left_out(posterior)
    error_scale = calibrated(builds, guess, variances, equations.measured, equations.errors)
    known = np.sqrt(variances) < KNOWN * guess
    each = zip(builds, guess, error_scale.sigma(variances, guess), known, strict=True)
    left_out = [(b, Prediction(float(t), float(s))) for b, t, s, told in each if told]
    model = solved(table, equations, posterior, error_scale, left_out)
    model.unbuilt = _unbuilt(table, equations, posterior, model.mean, stairs)
    if heldout := [b for b in heldout if model.predicts(b)]:
        times, measured, sigma = _against(model, heldout)
        model.error_scale = rescaled(error_scale, (measured - times) / sigma)
    return model


def solved(
    table: LatencyTable, equations: Equations, posterior: Posterior, error_scale: ErrorScale,
    left_out: Sequence[tuple[Build, Prediction]] = (),
) -> LatencyModel:  # fmt: skip
    """The model that equations say."""
    mean = equations.bounded(posterior)
    return LatencyModel(
        table, equations.features, mean, posterior.covariance, error_scale=error_scale, left_out=left_out
    )


def _unbuilt(
    table: LatencyTable, equations: Equations, posterior: Posterior, mean: Floats, stairs: Grid | None
) -> dict[Feature, Unbuilt]:
    """What the cells of `fit` and of held-out builds that no other build holds are likely to take, of those that others tell."""
    if not table.header.grid:
        return {}
    known = equations.known
    offered = {u: tuple(map(Variant.parse, own)) for u, own in table.offered().items()}
    grid = known.grid(offered, stairs or table.grid(), stairs=stairs is not None)
    kept_out = [known.of(b.variants, b.widths, boundaries=False).number for b in usable(table) if b.kept_out and b.widths]
    every = np.unique(np.concatenate([*(n.ravel() for n in grid), *kept_out]))
    numbers = np.array([n for n in every.tolist() if n in known.cells and known.names[n] not in equations.index], np.intp)
    return {known.names[n]: told for n, told in equations.unbuilt(posterior, mean, numbers).items()}


def _against(model: LatencyModel, builds: Sequence[Build]) -> tuple[Floats, Floats, Floats]:
    """(predicted, measured, standard error of their difference) of builds, in ns."""
    table = model.table
    predicted = [model.predict_build(b) for b in builds]
    sigma = np.hypot([p.sigma_ns for p in predicted], [error_ns(table, b) for b in builds])
    return (
        np.array([p.time_ns for p in predicted]),
        np.array([table.time_ns(b) for b in builds]),
        np.maximum(sigma, 1.0),
    )


def layer_sum(table: LatencyTable) -> LatencyModel:
    """The sum over layers of a table made layer by layer; boundaries between precisions count in sigma only."""
    terms = layer_terms(table)
    covariance = Covariance.independent(terms.variance)
    return LatencyModel(table, terms.features, terms.mean, covariance, error_scale=ErrorScale(1.0, terms.floor))


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Validation:
    """Errors are |predicted / measured - 1|. noise: the same for one allocation built again, where there is one."""

    builds: int
    median_error: float
    p90_error: float
    kendall_tau: float
    inside_sigma: float
    inside_two_sigma: float
    noise: float | None


def validate(model: LatencyModel, builds: Sequence[Build]) -> Validation:
    """Predicted against measured on builds that the fit has not seen.

    Sigma was scaled on the table's own held-out builds, where the model was fitted by `fit(table)`: how many of those are
    inside it is no proof of it.
    """
    return summarise(*_against(model, builds), noise_floor(model.table))


def summarise(times: Floats, measured: Floats, sigma: Floats, noise: float | None) -> Validation:
    """Predicted times against measured ones. sigma: standard errors of their differences."""
    errors = np.abs(times / measured - 1.0)
    z = np.abs(times - measured) / np.maximum(sigma, 1.0)
    tau = float(kendalltau(times, measured).statistic) if len(times) > 2 else float("nan")
    return Validation(
        builds=len(times),
        median_error=float(np.median(errors)),
        p90_error=float(np.percentile(errors, 90)),
        kendall_tau=tau,
        inside_sigma=float(np.mean(z <= 1)),
        inside_two_sigma=float(np.mean(z <= 2)),
        noise=noise,
    )


def noise_floor(table: LatencyTable) -> float | None:
    """Median relative difference between builds of one and the same allocation.

    The `reference` build is a second build of the engine that everything is timed against: its ratio would be 1.
    """
    groups: dict[Any, list[float]] = {}
    for build in table.builds:
        key = build.key, table.machine(build)
        if build.role == Role.REFERENCE:
            groups.setdefault(key, []).insert(0, 1.0)
        if not build.partial:
            groups.setdefault(key, []).append(build.ratio)
    differences = [abs(a / g[0] - 1.0) for g in groups.values() for a in g[1:]]
    return float(np.median(differences)) if differences else None

"""What a latency model gets wrong, and when: its errors on builds left out of the fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from hwsearch.errors import InvalidInput
from hwsearch.latency.model import LatencyModel, Validation, noise_floor, summarise
from hwsearch.latency.regression import error_ns
from hwsearch.table.build import Build, Role

Floats = NDArray[np.float64]

CAUSES = ("boundaries", "share of int8", "share of width", "measured time", "order of measuring")
"""What errors should not depend on: boundaries between classes, ..., the number of the build in the table."""
SUSPECT = 0.01
"""The p-value below which a rank correlation of errors with one of the causes is pointed at."""


@dataclass(frozen=True)
class BuildError:
    """One build: measured and predicted ns, with the standard errors of both, and the causes.

    heldout: left out of the fit for good. disturbed: something else slowed the machine down in all rounds of its timing.
    """

    role: str
    measured_ns: float
    error_ns: float
    predicted_ns: float
    sigma_ns: float
    heldout: bool
    disturbed: bool
    causes: dict[str, float]

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_ns / self.measured_ns - 1.0

    @property
    def z(self) -> float:
        """The error in standard errors of what was predicted and of what was measured, together."""
        return (self.predicted_ns - self.measured_ns) / max(self.together_ns, 1.0)

    @property
    def together_ns(self) -> float:
        """Standard error of the difference between predicted and measured."""
        return math.hypot(self.sigma_ns, self.error_ns)


@dataclass(frozen=True)
class Diagnosis:
    """points: builds of the fit, each predicted by a fit without it where the others tell all that it holds, and the
    held-out ones. correlations: Spearman's rank correlation of the signed error with each cause, and its p-value. quality:
    errors over all points. drift: the share by which times changed against the reference's over the profile.
    """

    points: tuple[BuildError, ...]
    correlations: dict[str, tuple[float, float]]
    quality: Validation
    drift: float = 0.0

    @property
    def suspects(self) -> list[str]:
        """Causes that errors depend on."""
        return [cause for cause, (_, p) in self.correlations.items() if p < SUSPECT]

    def to_json(self) -> dict[str, Any]:
        own = {c: {"correlation": r, "p": p} for c, (r, p) in self.correlations.items()}
        points = [{**asdict(p), "error": p.error, "z": p.z} for p in self.points]
        return {
            "quality": asdict(self.quality),
            "drift": self.drift,
            "correlations": own,
            "suspects": self.suspects,
            "points": points,
        }

    def __str__(self) -> str:
        q = self.quality
        noise = "not measured" if q.noise is None else f"{q.noise:.1%}"
        lines = [
            f"{q.builds} builds, each predicted without itself: median error {q.median_error:.1%}, 90th percentile "
            f"{q.p90_error:.1%}, Kendall tau {q.kendall_tau:.2f}, noise floor {noise}",
            f"inside one sigma {q.inside_sigma:.0%} (68 % expected), inside two {q.inside_two_sigma:.0%} (95 %)",
        ]
        for cause, (r, p) in self.correlations.items():
            mark = " <- errors depend on it" if p < SUSPECT else ""
            lines.append(f"error against {cause}: rank correlation {r:+.2f} (p {p:.2g}){mark}")
        lines.append(
            f"drift: against the reference, times changed by {self.drift:+.1%} from the beginning of the profile to its end "
            "(the model allows for it)"
        )
        return "\n".join(lines)


def diagnose(model: LatencyModel) -> Diagnosis:
    """Errors of a fitted model. Raises InvalidInput where there are fewer than three builds to see them on.

    In a table over widths most cells were built once: of such builds the others tell too little, and only held-out ones count.
    """
    table = model.table
    number = {id(b): i for i, b in enumerate(table.builds)}
    points = []
    for build, p in model.left_out:
        if build.role != Role.REFERENCE:  # it is what everything is measured against
            points.append((build, p.time_ns, p.sigma_ns))
    for build in table.builds:
        if build.kept_out and build.as_asked():
            found = model.predict_build(build)
            points.append((build, found.time_ns, found.sigma_ns))
    made = tuple(
        BuildError(
            role=b.role, measured_ns=table.time_ns(b), error_ns=error_ns(table, b), predicted_ns=t, sigma_ns=s,
            heldout=b.kept_out, disturbed=table.disturbed(b), causes=_causes(model, b, number[id(b)]),
        )
        for b, t, s in points
    )  # fmt: skip
    if len(made) < 3:
        raise InvalidInput(
            "the table has too few builds of whole networks that others predict, or that were held out; profile longer, "
            "and in context"
        )
    errors = np.array([p.error for p in made])
    correlations = {}
    for cause in CAUSES:
        values = np.array([p.causes[cause] for p in made])
        if np.ptp(values) > 0 and np.ptp(errors) > 0:
            found_r = spearmanr(values, errors)
            correlations[cause] = float(found_r.statistic), float(found_r.pvalue)
    quality = summarise(
        np.array([p.predicted_ns for p in made]),
        np.array([p.measured_ns for p in made]),
        np.array([p.together_ns for p in made]),
        noise_floor(table),
    )
    return Diagnosis(made, correlations, quality, model.drift)


def _causes(model: LatencyModel, build: Build, number: int) -> dict[str, float]:
    table, network = model.table, model.network
    candidate = table.candidate(build)
    quantized = {u: v.quantized for u, v in candidate.variants.items()}
    shares = [w / network.channels[g] for g, w in candidate.widths.items()]
    values = (
        sum(quantized[e.src] != quantized[e.dst] for e in network.edges),
        float(np.mean(list(quantized.values()))),
        float(np.mean(shares)) if shares else 1.0,
        table.time_ns(build),
        number,
    )
    return dict(zip(CAUSES, map(float, values), strict=True))

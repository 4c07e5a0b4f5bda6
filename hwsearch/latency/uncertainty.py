"""Sigma: how far a latency model may be off, calibrated on builds that its fit has not seen.

First on builds of the fit, each left out of it in its turn (a fit without them knows a little less than the whole one, and such
builds are timed briefly); then, as far as there are any, on builds held out of every fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.latency.student_t import log_density
from hwsearch.table.build import Build, Role

Floats = NDArray[np.float64]

SESSION_SPREAD = 0.01
"""Relative difference of two measurements of one network on one machine that says nothing."""


@dataclass(frozen=True)
class ErrorScale:
    """How uncertain predictions are, calibrated on builds left out of the fit.

    inflate: on the standard error that the posterior covariance gives. floor: relative, of what two builds of one
    allocation differ by and the model's form does not hold.
    """

    inflate: float = 1.0
    floor: float = 0.0

    def sigma(self, variance: Any, time_ns: Any) -> Any:
        """Standard error in ns, of scalars or arrays."""
        return np.sqrt(self.inflate**2 * variance + np.square(self.floor * time_ns))

    def scaled(self, scale: float) -> ErrorScale:
        """So many times as wide, but never better than what two sessions on one machine differ by."""
        return ErrorScale(max(self.inflate * scale, 0.1), max(self.floor * scale, SESSION_SPREAD))


_INFLATES = np.geomspace(0.5, 6.0, 16)
_FLOORS = np.geomspace(0.002, 0.08, 20)
_ENOUGH = 8
"""Builds from which on sigma is calibrated on them."""
KNOWN = 0.1
"""Relative standard error above which a build left out of the fit held terms that the others do not tell."""
_UNCALIBRATED = ErrorScale(1.0, 0.02)
"""Where too few builds can be predicted by the others: 2 % is what sessions on shared machines differ by."""
_TRUST = 6
"""Held-out builds that count as much as the calibration on builds of the fit."""


def calibrated(
    builds: Sequence[Build], guess: Floats, variances: Floats, measured: Floats, errors: Floats
) -> ErrorScale:
    """The scale that fits the errors on left-out builds.

    Its shape is the likeliest where errors follow Student's t with four degrees of freedom, so that a build that went wrong
    does not widen all others, under a weak prior; its scale is that of `scale_of`, but never claims to be better than one
    percent. Builds of the design look most like what a search picks: where there are enough, they alone count. errors: standard
    errors of the measured times, which are no fault of the model.
    """
    known = np.sqrt(variances) < KNOWN * guess
    design = known & np.array([b.role == Role.DESIGN for b in builds])
    chosen = design if design.sum() >= _ENOUGH else known
    if chosen.sum() < _ENOUGH:
        return _UNCALIBRATED
    off, variance, time, noise = (x[chosen] for x in (measured - guess, variances, guess, errors))

    def likelihood(scale: ErrorScale) -> float:
        fit = float(np.sum(log_density(off, np.square(scale.sigma(variance, time)) + noise**2)))
        away = np.square(np.log(scale.inflate)) + np.square(np.log(scale.floor / _UNCALIBRATED.floor))
        return fit - float(away) / 2.0

    best = max((ErrorScale(float(k), float(f)) for k in _INFLATES for f in _FLOORS), key=likelihood)
    z = np.abs(off) / np.hypot(best.sigma(variance, time), noise)
    return best.scaled(scale_of(z))


def scale_of(z: Floats) -> float:
    """By how much sigma has to be multiplied for 68 % of errors to be inside it and 95 % inside two of it.

    z: errors in units of sigma, absolute. Heavy tails want more for the second than for the first: it is half-way.
    """
    one, two = np.quantile(z, (0.683, 0.954)) / (1.0, 2.0)
    return float(np.sqrt(one * two))


def rescaled(scale: ErrorScale, z: Floats) -> ErrorScale:
    """The scale as builds held out of the fit have it: few of them move it a little, many decide.

    z: their errors in units of sigma.
    """
    share = len(z) / (len(z) + _TRUST)
    return scale.scaled(max(scale_of(np.abs(z)), 0.1) ** share)

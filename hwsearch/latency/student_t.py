"""Student's t with four degrees of freedom: errors of which a few are far larger than the others, and do not decide."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FREEDOM = 4.0
NORMAL = 0.62
"""Of normal errors of variance 1 the squared scale that it is likeliest to have."""


def log_density(off: Floats, square: Floats) -> Floats:
    """Of errors with a squared scale, up to a constant."""
    tail = (FREEDOM + 1.0) / 2.0 * np.log1p(off**2 / square / FREEDOM)
    return np.asarray(-0.5 * np.log(square) - tail)


def weight(z: Floats) -> Floats:
    """What an equation off by z of its scale counts in least squares that find the likeliest solution (reweighed in turns)."""
    return np.asarray((FREEDOM + 1.0) / (FREEDOM + np.square(z)))

"""The bias of an int8 product, which runtimes add as a whole number of the product's own steps.

One step is the scale of the activation times that of the weight, for each output channel. ONNX Runtime rounds a bias to steps in 32
bits, and lets it overflow; so it is stored as a multiple of the step, and the scales of channels that are nothing beside their
bias are chosen for it. What is stored here is what is simulated.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hwsearch.compress.formats import StoredWeight

MOST_STEPS = 2.0**24
"""Integers up to this one are exact in fp32."""
DEAD_STEPS = 2.0**20
"""Steps of a bias whose channel has no weight: rounding to them loses half a millionth of it."""


def fitted(weight: StoredWeight, bias: NDArray[np.float32], activation: float) -> StoredWeight:
    """The same int8 weight with scales that suit a bias [out]: no bias above 2^24 steps, and none rounded away.

    activation: scale of what the weight is multiplied with. A channel of zeros may have any scale, and gets one of which its
    bias is 2^20 steps; one of next to nothing gets a larger scale, and its numbers are rounded anew.
    """
    assert weight.scales is not None
    own = np.abs(bias).astype(np.float64) / float(activation)
    dead = ~weight.values.any(axis=tuple(d for d in range(weight.values.ndim) if d != weight.axis))
    tiny = float(np.finfo(np.float32).tiny)
    scales = np.where(dead & (own > 0), np.maximum(own / DEAD_STEPS, tiny), weight.scales)
    new = np.maximum(scales, own / MOST_STEPS).astype(np.float32)
    shape = [-1 if d == weight.axis else 1 for d in range(weight.values.ndim)]
    share = np.where(dead, 0.0, weight.scales / new).reshape(shape)
    return replace(weight, values=np.round(weight.values * share).astype(np.int8), scales=new)


def steps(weight: StoredWeight, activation: float) -> NDArray[np.float32]:
    """What one unit of an int8 product is worth, for each output channel."""
    assert weight.scales is not None
    return np.asarray(np.float32(activation) * weight.scales, np.float32)


def on_steps(bias: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """A bias rounded to whole steps; as it is where the product of two scales is too small for fp32."""
    whole = np.where(step > 0, step, 1)
    return np.where(step > 0, np.round(bias / whole) * step, bias).astype(np.float32)

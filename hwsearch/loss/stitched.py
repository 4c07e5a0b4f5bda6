"""Stitched networks: whole allocations drawn at random where a search would go, to learn from what they lose together.

A search takes from every unit and group about as much as its price allows: the coarsest choice whose loss is below a level. Each
network has a level of its own, so that the sums of losses are spread over two decades; the level is tilted at random for each unit
and group, and some choose at random below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hwsearch.network.variants import Variant

ROUND = 12
"""Networks of one round, spread over the whole range."""
TOP, SPAN = 1.0, 100.0
"""The largest sum of losses, where there are as large ones, and its ratio to the least."""
TILT, COARSEST, LEVELS = 1.0, 0.75, 400
"""Standard deviation of the logarithm of a tilt; the share that take the coarsest choice; levels that are tried."""


def stitched(
    loss: Mapping[str, Mapping[str, float]], width_loss: Mapping[str, Mapping[int, float]], count: int, seed: int
) -> list[tuple[dict[str, Variant], dict[str, int]]]:
    """(variants of units, widths of groups) of each network; none where nothing loses anything.

    loss: unit -> variant -> loss. width_loss: group -> width -> loss.
    """
    units = [(u, sorted(own.items(), key=lambda pair: pair[1])) for u, own in loss.items() if len(own) > 1]
    groups = [(g, sorted(own.items(), key=lambda pair: pair[1])) for g, own in width_loss.items() if len(own) > 1]
    losses = [np.array([x for _, x in own]) for _, own in units] + [np.array([x for _, x in own]) for _, own in groups]
    most = sum(float(own[-1]) for own in losses)
    if not 0.0 < most < math.inf:
        return []
    least = min(float(own[own > 0].min()) for own in losses if own[-1] > 0)
    levels = np.geomspace(least * math.exp(-3 * TILT), max(float(own[-1]) for own in losses) * math.exp(3 * TILT), LEVELS)
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        wanted = min(most, TOP) * SPAN ** -((number % ROUND + rng.random()) / ROUND)
        places = []
        for own in losses:
            allowed = np.maximum(np.searchsorted(own, levels * math.exp(rng.normal(0.0, TILT)), "right"), 1)
            luck = rng.random()
            shares = (luck - COARSEST) / (1.0 - COARSEST)
            places.append(allowed - 1 if luck < COARSEST else (allowed * shares).astype(int))
        sums = np.sum([own[at] for own, at in zip(losses, places, strict=True)], axis=0)
        nearest = int(np.abs(np.log(np.maximum(sums, 1e-300) / wanted)).argmin())
        chosen = [int(at[nearest]) for at in places]
        variants = {u: Variant.parse(own[at][0]) for (u, own), at in zip(units, chosen, strict=False)}
        found.append((variants, {g: own[at][0] for (g, own), at in zip(groups, chosen[len(units) :], strict=True)}))
    return found

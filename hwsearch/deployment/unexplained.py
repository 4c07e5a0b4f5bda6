"""What a report cannot explain: a loss, or a fall of the score, far above the predicted loss; and the likeliest layer.

A sum of losses of single layers predicts that of a whole network to a small factor. Where it is off by more, layers spoil each
other's work, or the calibration data does not show what the network meets, and "met" would be half of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hwsearch.deployment.evaluate import predictor
from hwsearch.engine.setup import Setup
from hwsearch.loss.divergence import divergence
from hwsearch.network.variants import Variant

FAR = 10.0
"""Measured loss / predicted, from which on it is not explained."""
LEAST = 1e-3
"""Losses below this one change too little to be worth a word, whatever was predicted."""
NOISE = 0.01
"""Relative fall of a score that says nothing."""


def unforeseen(predicted: float, measured: float) -> bool:
    """Whether a measured loss is far above the predicted one."""
    return measured > max(FAR * predicted, LEAST)


def fall_explained(predicted: float) -> float:
    """The relative fall of a score that a predicted loss explains.

    Outputs whose KL divergence is d differ by at most sqrt(d / 2) in the share of answers that change (Pinsker's inequality), and
    those with a relative squared error d by sqrt(d) of their size. Twice the latter, for what a score makes of it.
    """
    return NOISE + 2.0 * math.sqrt(max(predicted, 0.0))


def unexplained(
    setup: Setup,
    whole: Setup,
    variants: Mapping[str, Variant],
    base: str,
    loss: Mapping[str, float],
    score: Mapping[str, float],
) -> list[str]:
    """Sentences for the report and the exit; empty where the measurement is as predicted.

    setup: the deployed network; whole: the same with all channels. loss: predicted, measured. score: dense, deployed (higher is
    better).
    """
    said = []
    predicted, measured = loss["predicted"], loss["measured"]
    fall = (score["dense"] - score["deployed"]) / (abs(score["dense"]) or 1.0)
    if unforeseen(predicted, measured):
        times = f"{measured / predicted:,.0f} times" if predicted > 0 else "far above"
        said.append(f"the measured loss {measured:.3g} is {times} the predicted {predicted:.3g}")
    if fall > (most := fall_explained(predicted)):
        said.append(
            f"the score fell by {fall:.1%}, of which a predicted loss of {predicted:.3g} explains {most:.1%}"
        )
    if not said:
        return []
    if unforeseen(predicted, measured):
        return [f"{'; '.join(said)}; {likeliest(setup, whole, variants, base, measured)}"]
    return [
        f"{said[0]}; the loss on calibration data does not show it: see that they are like what the score is taken on, and "
        f"that the divergence ({setup.lowering.task.divergence}) sees what it counts"
    ]


def likeliest(setup: Setup, whole: Setup, variants: Mapping[str, Variant], base: str, measured: float) -> str:
    """The layer that brings most of the loss, in words: that without whose variant the loss is least.

    As simulated, where the simulation loses as much; else every layer is left out of an engine in turn.
    """
    coarse = [u for u, v in variants.items() if not v.plain]
    simulated = _losses(setup, whole, lambda chosen: None)
    plain = dict.fromkeys(variants, Variant("fp32"))
    everything, nothing = simulated(variants), simulated(plain)
    if not coarse or (setup.network.channels != whole.network.channels and nothing > 0.5 * measured):
        return f"narrow layers bring it about, {_narrowest(setup, whole)} the likeliest: keep it with --keep"
    lost = simulated if everything > measured / 3 else _losses(setup, whole, lambda v: setup.build(v, base)[0])
    without = {u: lost({**variants, u: Variant(base)}) for u in coarse}
    name = min(without, key=lambda u: without[u])
    how = "as simulated" if lost is simulated else "by its engine, not by the simulation"
    return f"the likeliest layer is {name} ({variants[name]}): without it the loss is {without[name]:.3g} ({how})"


def _losses(
    setup: Setup, whole: Setup, build: Callable[[Mapping[str, Variant]], Any]
) -> Callable[[Mapping[str, Variant]], float]:
    """Variants -> mean loss on the first calibration batch kept apart, of an engine (None: of the simulation)."""
    kind = setup.lowering.task.divergence
    traced, args, kwargs = setup.lowering.scoring[0]
    with torch.no_grad():
        dense = whole.lowering.scoring[0][0].graph(*args, **kwargs)
    simulate = setup.lowering.simulator(traced, args, kwargs, quantize_outputs=setup.backend.quantize_outputs)

    def lost(variants: Mapping[str, Variant]) -> float:
        engine = build(variants)
        found = simulate(variants) if engine is None else predictor(setup.lowering, engine)(*args, **kwargs)
        total, samples = divergence(found, dense, kind)
        return total / samples

    return lost


def _narrowest(setup: Setup, whole: Setup) -> str:
    channels = setup.network.channels
    group = min(channels, key=lambda g: channels[g] / whole.network.channels[g])
    return f"{group} ({channels[group]} of {whole.network.channels[group]} channels)"

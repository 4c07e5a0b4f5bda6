"""Whether budgets hold, from several windows of measurement, each with freshly built engines.

Two engines of one network differ, and so do two windows of time, by more than the interval of one measurement tells. How far is
estimated from every network that was measured more than once: the allocation and the dense network in the windows, and what
the table and the session have in common. Costs are taken as logarithms; the interval is Student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.special import stdtrit

from hwsearch.allocate.budget import TAILS, Budget
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.latency.uncertainty import SESSION_SPREAD

MOST_WINDOWS = 3
MEASURED = ("latency", *TAILS, "energy")
"""Costs that are measured, not counted: only these differ from window to window."""
_PRIOR = 3
"""Repeated measurements that the usual spread, `SESSION_SPREAD`, counts as."""


class State(StrEnum):
    """How an allocation stands to its budgets."""

    MET = "met"
    WITHIN_NOISE = "met_within_noise"
    MISSED = "missed"


@dataclass(frozen=True)
class Window:
    """What the allocation and the dense fp32 network cost in one window, each as an engine built for it.

    deployed, dense: on the scale of the table. deployed_now, dense_now: as the machine is now; only what is measured. wrong: the
    engine of the allocation returned wrong outputs.
    """

    deployed: Costs
    dense: Costs
    deployed_now: Costs
    dense_now: Costs
    wrong: bool = False


@dataclass(frozen=True)
class Judgement:
    """What several windows tell.

    Attributes:
        dense, bound, measured: Costs on the scale of the table, means over the windows.
        low, high: 95 % intervals of what is measured.
        upper: What has to be within `bound` for the budgets to be met: `high`, wider where the bound is of the dense network, which
            was measured as well.
        now, now_high: As the machine is now, and the upper ends of its intervals.
        bound_now: Absolute budgets on what is measured, which bound `now` as well.
        state: Whether the budgets hold.
        windows: How many there were.
    """

    dense: Costs
    bound: Costs
    measured: Costs
    low: Costs
    high: Costs
    upper: Costs
    now: Costs
    now_high: Costs
    bound_now: Costs
    state: State
    windows: int


def judge(
    windows: Sequence[Window], earlier: Sequence[Sequence[Costs] | None], budgets: Sequence[Budget]
) -> Judgement:
    """Whether budgets hold, by the means of windows and how far measurements of one network differ.

    A budget is met where the upper end of the 95 % interval is within it, and met within noise where only the mean is. A relative
    budget is of the dense network of the same windows, whose error counts too. An absolute one bounds the cost on the scale of
    the table and the one that the machine shows now. Where an engine returned wrong outputs nothing is met.

    Args:
        windows: At least one.
        earlier: What networks cost when they were measured before on the scale of the table, a sequence for each network; the
            first is the dense one's. None: how far it differs tells nothing of others.
    """
    dense, measured, now = (_mean([getattr(w, name) for w in windows]) for name in ("dense", "deployed", "deployed_now"))
    bound = bounds(budgets, dense)
    absolute = [b for b in budgets if b.kind == "absolute" and b.column in MEASURED]
    bound_now = bounds(absolute, dense)
    relative = {b.column for b in budgets if b.kind != "absolute"}
    halves, halves_now = {}, {}
    for column in (c for c in MEASURED if getattr(measured, c) is not None):
        first, *others = earlier or [()]
        dense_costs = [] if first is None else [*first, *(w.dense for w in windows)]
        own = [[w.deployed for w in windows], dense_costs, *(group for group in others if group is not None)]
        halves[column] = half_width([[c[column] for c in group if getattr(c, column)] for group in own], len(windows))
        if getattr(now, column) is not None:
            of_now = [[w.deployed_now[column] for w in windows], [w.dense_now[column] for w in windows]]
            halves_now[column] = half_width(of_now, len(windows))
    high = _scaled(measured, halves, 1.0)
    now_high = _scaled(now, halves_now, 1.0)
    two = 0.0 if all(w.deployed == w.dense for w in windows) else np.sqrt(2.0)  # errors of two networks, or of one and itself
    upper = _scaled(measured, {c: h * (two if c in relative else 1.0) for c, h in halves.items()}, 1.0)
    if any(w.wrong for w in windows) or not (measured.within(bound) and now.within(bound_now)):
        state = State.MISSED
    elif upper.within(bound) and now_high.within(bound_now):
        state = State.MET
    else:
        state = State.WITHIN_NOISE
    return Judgement(
        dense=dense, bound=bound, measured=measured, low=_scaled(measured, halves, -1.0), high=high, upper=upper,
        now=now, now_high=now_high, bound_now=bound_now, state=state, windows=len(windows),
    )  # fmt: skip


def half_width(groups: Sequence[Sequence[float]], windows: int) -> float:
    """Half the width of the 95 % interval of the logarithm of a mean over so many windows of one session.

    Half of the variance of a single measurement is taken to be shared by all windows of a session: what differs slowly.

    Args:
        groups: Costs of one network each, of several engines or windows.
        windows: Those that the mean is over.
    """
    freedom, squares = float(_PRIOR), _PRIOR * SESSION_SPREAD**2
    for group in groups:
        if len(group) > 1:
            logs = np.log(group)
            freedom += len(logs) - 1
            squares += float(np.square(logs - logs.mean()).sum())
    shared = (1.0 + 1.0 / windows) / 2.0
    return float(stdtrit(freedom, 0.975) * np.sqrt(squares / freedom * shared))


def decided(judgement: Judgement) -> bool:
    """Whether another window would hardly change the verdict: the budgets are met, or far from it."""
    if judgement.state == State.MISSED:
        spread = {c: np.log(judgement.upper[c] / judgement.measured[c]) for c in judgement.low.known()}
        over = {c: judgement.measured[c] / most for c, most in judgement.bound.known().items() if c in spread}
        over |= {c: max(over[c], judgement.now[c] / most) for c, most in judgement.bound_now.known().items()}
        return all(np.log(share) <= 0 or np.log(share) > spread[c] for c, share in over.items())
    return judgement.state == State.MET


def _mean(costs: Sequence[Costs]) -> Costs:
    """Geometric means of what is measured; the rest is the same in all."""
    first = costs[0]
    measured = {
        column: float(np.exp(np.mean(np.log([c[column] for c in costs]))))
        for column in MEASURED
        if getattr(first, column) is not None
    }
    return Costs(**{**first.known(), **measured})


def _scaled(costs: Costs, halves: dict[str, float], sign: float) -> Costs:
    """Costs at an end of their intervals."""
    return Costs(**{**costs.known(), **{c: costs[c] * float(np.exp(sign * half)) for c, half in halves.items()}})

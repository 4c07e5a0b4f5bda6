"""Where to look next for the largest bound on the loss whose answer still holds a floor: a guarded bracket on its logarithm.

Score falls as loss grows. A guess by the score that was lost per loss so far is kept to where bisection can still finish: whatever
the curve, the bracket is as narrow as bisection would make it with the samples that there are. So are guesses of others, on other
lines along which a score falls (see `knobs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOLERANCE = 0.05
"""Of the logarithm of the bound: a bracket so narrow is not searched any further."""
EDGE = 0.99
"""Of the tolerance, how near to the ends of the bracket a guess may be: a right one closes it."""
_SAME = 1e-9


@dataclass(frozen=True)
class Tried:
    """The answer of a search under a bound on the loss, scored.

    Attributes:
        bound: Logarithm of the bound.
        reached: Logarithm of the predicted loss of the answer, at most the bound.
        drop: By how much it scores less than the dense network; infinite where it could not be scored.
        spare: By how much more it might score less; below 0 it does not hold the floor.
    """

    bound: float
    reached: float
    drop: float
    spare: float

    @property
    def holds(self) -> bool:
        """Whether it holds the floor, with the margin that is asked for."""
        return self.spare >= 0.0


@dataclass(frozen=True)
class Range:
    """Logarithms of the bounds that are worth asking for.

    free: an answer at `low` is known to hold without a sample, as the dense network does.
    """

    low: float
    high: float
    free: bool = True


def bracket(tried: Sequence[Tried], within: Range) -> tuple[float, float]:
    """(the largest bound that is known to hold, the least loss above it that is known not to), or the ends of the range."""
    held = max((t.bound for t in tried if t.holds), default=within.low)
    failed = [max(t.reached, held) for t in tried if not t.holds and t.bound > held]
    return held, min(failed, default=max(within.high, held))


def next_bound(
    tried: Sequence[Tried], within: Range, allowed: float, left: int, tolerance: float = TOLERANCE,
    guess: Callable[[float, float], float] | None = None,
) -> float | None:  # fmt: skip
    """The logarithm of the bound to ask for next; None where nothing more is worth a sample.

    Args:
        tried: All answers until now.
        within: Where bounds may be.
        allowed: By how much the floor lets the score fall.
        left: How many samples there are.
        tolerance: A bracket so narrow is not searched any further.
        guess: Where the floor is likely to be, between two ends; None goes by the score that was lost per loss.
    """
    lo, hi = bracket(tried, within)
    held, failed = any(t.holds for t in tried), any(not t.holds for t in tried)
    if left < 1 or any(t.holds and t.bound >= within.high - _SAME for t in tried):
        return None
    if not within.free and not held:
        if any(t.bound <= within.low + _SAME for t in tried):
            return None  # nothing holds
        left -= 1  # for the least loss that there is
        if failed or left < 1 or hi - lo <= tolerance:
            return within.low
    width = hi - lo
    if width <= tolerance:
        return None
    middle, edge, reach = (lo + hi) / 2.0, EDGE * tolerance, tolerance * 2.0 ** (left - 1)
    if width > 2.0 * reach or width < 2.0 * edge or _known_before(tried):
        return middle
    likely = _guess(tried, allowed, middle, hi) if guess is None else guess(lo, hi)
    likely = min(max(likely, lo + edge), hi - edge if failed else hi)
    return min(max(likely, hi - reach), lo + reach)


def _known_before(tried: Sequence[Tried]) -> bool:
    """Whether the last bound brought no new answer: guesses are then finer than what there is to choose from."""
    return any(t.reached == tried[-1].reached for t in tried[:-1])


def _guess(tried: Sequence[Tried], allowed: float, middle: float, top: float) -> float:
    if not tried:
        return math.log(allowed) if allowed > 0 else middle  # a hundredth of score for a hundredth of divergence
    found = proportional(tried)
    if found is not None:
        return found
    return top if all(t.holds for t in tried) else middle


def proportional(tried: Sequence[Tried]) -> float | None:
    """Logarithm of the loss at which the score has fallen as far as it may, if it falls in proportion; None where nothing tells."""
    falling = [t for t in tried if 0.0 < t.drop < math.inf and t.drop + t.spare > 0.0]
    if not falling:
        return None
    nearest = min(falling, key=lambda t: abs(math.log((t.drop + t.spare) / t.drop)))
    return nearest.reached + math.log((nearest.drop + nearest.spare) / nearest.drop)

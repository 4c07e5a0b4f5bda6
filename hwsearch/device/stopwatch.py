"""The innermost loop of every measurement."""

from __future__ import annotations

import time
from collections.abc import Callable


def times(run: Callable[[], None], count: int, clock: Callable[[], int] = time.perf_counter_ns) -> list[int]:
    """Nanoseconds of so many inferences one after another.

    A `run` that keeps time itself has a method `times(count)`; see `backends.process`.
    """
    own: Callable[[int], list[int]] | None = getattr(run, "times", None)
    if own is not None:
        return own(count)
    found = []
    for _ in range(count):
        start = clock()
        run()
        found.append(clock() - start)
    return found


def block(run: Callable[[], None], count: int, clock: Callable[[], int] = time.perf_counter_ns) -> list[int]:
    """As `times`; of a `run` with a method `replays(count)`, one value: the mean of so many inferences without gaps between them.

    What launches work on a GPU takes tens of microseconds for each inference that is waited for. That is no part of what
    networks differ in, so that ratios are of such means.
    """
    replays: Callable[[int], int] | None = getattr(run, "replays", None)
    return times(run, count, clock) if replays is None else [replays(count)]

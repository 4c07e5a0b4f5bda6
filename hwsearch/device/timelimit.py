"""How much of the time that a command was given is used, and how much is left."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeLimit:
    """Runs from when it is made. clock: in ns. say: told once of each share that is used up.

    reserve: seconds of it that are kept for what comes afterwards, by what is known at the time.
    """

    def __init__(
        self,
        limit_s: float,
        clock: Callable[[], int] = time.perf_counter_ns,
        say: Callable[[str], None] = lambda text: None,
        *,
        reserve: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._limit_s, self._clock, self._say, self._reserve = limit_s, clock, say, reserve
        self._start = clock()
        self._said = set[float]()

    @property
    def used_s(self) -> float:
        """Seconds since it was made."""
        return (self._clock() - self._start) / 1e9

    @property
    def left_s(self) -> float:
        """Seconds to the end, less what is reserved; below 0 after it."""
        return self._limit_s - self._reserve() - self.used_s

    def late(self, share: float = 1.0) -> bool:
        """Whether more than this share of the time is used."""
        limit_s = max(self._limit_s - self._reserve(), 0.0)
        if self.used_s <= share * limit_s:
            return False
        if limit_s and share not in self._said:
            self._said.add(share)
            self._say(f"{share:.0%} of the time limit of {limit_s:.0f} s is used")
        return True

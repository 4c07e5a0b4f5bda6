"""How much of the time that a command was given is used."""

from __future__ import annotations

from collections.abc import Callable


class TimeLimit:
    """Runs from when it is made. clock: in ns. say: told once of each share that is used up."""

    def __init__(self, limit_s: float, clock: Callable[[], int], say: Callable[[str], None]) -> None:
        self._limit_s, self._clock, self._say = limit_s, clock, say
        self._start = clock()
        self._said = set[float]()

    def late(self, share: float = 1.0) -> bool:
        """Whether more than this share of the time is used."""
        if self._clock() - self._start <= share * self._limit_s * 1e9:
            return False
        if share not in self._said:
            self._said.add(share)
            self._say(f"{share:.0%} of the time limit of {self._limit_s:.0f} s is used")
        return True

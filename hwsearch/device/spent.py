"""Where the time of a long job goes: seconds by what was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

TRACING, EXPORTING, ASSEMBLING = "tracing the model", "exporting", "assembling"
STARTING, COMPILING, REFERENCE = "starting processes", "compiling", "choosing the reference"
WARMING, TIMING = "warming up", "timing"
QUIET, COUNTING, COMPARING = "waiting for quiet", "counting nodes", "comparing outputs"
FITTING, PROPOSING, SAVING, OTHER = "fitting", "proposing", "saving", "other"
"""What a profile does. Waiting for quiet: for another command's lock on the device, and measuring on after the time that a build
was given, for rounds that nothing else disturbs."""


class Spent:
    """Seconds of each thing that is done. What is done within another counts as itself alone.

    clock: in ns.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._begun = clock()
        self._open: list[str] = []
        self._since = self._begun
        self._ns: dict[str, int] = {}

    def _turn(self) -> None:
        now = self._clock()
        if self._open:
            self._ns[self._open[-1]] = self._ns.get(self._open[-1], 0) + now - self._since
        self._since = now

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """The block is spent on this."""
        self._turn()
        self._open.append(what)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def move(self, source: str, to: str, seconds: float) -> None:
        """So much of what counted as one thing was another."""
        own = min(round(seconds * 1e9), self._ns.get(source, 0))
        if own > 0:
            self._ns[source] -= own
            self._ns[to] = self._ns.get(to, 0) + own

    @property
    def seconds(self) -> dict[str, float]:
        """By what was done, most first, what is known of nothing as `other`; of all so far."""
        self._turn()
        whole = self._since - self._begun
        found = {**self._ns, OTHER: max(whole - sum(self._ns.values()), 0)}
        return {what: ns / 1e9 for what, ns in sorted(found.items(), key=lambda item: -item[1])}


def in_words(seconds: Mapping[str, float]) -> str:
    """What took half a second or more, most first."""
    most = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} {s:.0f} s" for what, s in most if s >= 0.5) or "next to none"

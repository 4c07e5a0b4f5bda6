from __future__ import annotations

import pytest

from hwsearch.device.spent import OTHER, Spent, in_words
from hwsearch.errors import InvalidInput


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def test_what_is_done_within_another_counts_as_itself_alone() -> None:
    clock = Clock()
    spent = Spent(clock)
    clock.ns += 1_000_000_000
    with spent.on("proposing"):
        clock.ns += 2_000_000_000
        with spent.on("fitting"):
            clock.ns += 4_000_000_000
        clock.ns += 8_000_000_000
    with spent.on("fitting"):
        clock.ns += 16_000_000_000
    assert spent.seconds == {"fitting": 20.0, "proposing": 10.0, OTHER: 1.0}
    assert list(spent.seconds) == ["fitting", "proposing", OTHER]


def test_seconds_are_of_all_so_far_and_of_what_an_error_ended() -> None:
    clock = Clock()
    spent = Spent(clock)

    def fail() -> None:
        with spent.on("compiling"):
            clock.ns += 1_000_000_000
            assert spent.seconds == {"compiling": 1.0, OTHER: 0.0}
            raise InvalidInput("broken")

    with pytest.raises(InvalidInput, match="broken"):
        fail()
    assert spent.seconds == {"compiling": 1.0, OTHER: 0.0}
    clock.ns += 2_000_000_000
    assert spent.seconds == {OTHER: 2.0, "compiling": 1.0}


def test_no_more_is_moved_than_there_is() -> None:
    clock = Clock()
    spent = Spent(clock)
    with spent.on("timing"):
        clock.ns += 3_000_000_000
    spent.move("timing", "warming up", 1.0)
    spent.move("timing", "waiting for quiet", -5.0)
    spent.move("exporting", "warming up", 1.0)
    assert spent.seconds == {"timing": 2.0, "warming up": 1.0, OTHER: 0.0}
    spent.move("timing", "warming up", 7.0)
    assert spent.seconds["warming up"] == 3.0


def test_words_name_what_took_long_most_first() -> None:
    assert in_words({"fitting": 0.4, "timing": 2.4, "compiling": 61.0}) == "compiling 61 s, timing 2 s"
    assert in_words({}) == "next to none"

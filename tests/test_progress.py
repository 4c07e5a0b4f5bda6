"""Progress: plain lines with time left, a bar on a terminal, silence when nobody asked."""

from __future__ import annotations

import io

import pytest

from hwsearch.progress import Progress, spoken


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_one_a_step_with_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    progress.start(12, "profiling")
    for note in ("one", "two"):
        clock.now += 10
        progress.step(note)
    progress.stop()
    assert stream.getvalue().splitlines() == [
        "[ 1/12] profiling: one, 1 min 50 s left",
        "[ 2/12] profiling: two, 1 min 40 s left",
    ]


def test_steps_that_an_earlier_run_did_do_not_make_the_rest_look_short() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    progress.start(10, "profiling")
    for _ in range(4):
        clock.now += 0.01
        progress.step("on disk already")
    clock.now += 10
    progress.step("measured")
    assert progress.seconds_left == pytest.approx(50)


def test_a_resumed_stage_says_what_was_kept() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    progress.start(10, "profiling", done=8)
    assert progress.seconds_left is None
    clock.now += 3
    progress.step("nine")
    assert stream.getvalue().splitlines() == [
        "[ 8/10] profiling: done before, kept",
        "[ 9/10] profiling: nine, 3 s left",
    ]


def test_jumping_to_the_end_leaves_nothing() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    progress.start(10, "profiling")
    clock.now += 5
    progress.step("one")
    progress.step("time limit reached", done=10)
    assert progress.seconds_left == 0
    progress.step("back to an earlier count", done=3)
    progress.step("the same again", done=3)


def test_a_time_limit_bounds_the_time_left() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    ends = clock.now + 60
    progress.start(100, "profiling", until=lambda: ends - clock.now)
    clock.now += 10
    progress.step("one")
    assert progress.seconds_left == pytest.approx(50)
    clock.now += 70
    progress.step("past the limit")
    assert progress.seconds_left == 0


def test_without_a_total() -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock=Clock())
    progress.start(None, "closing the loop")
    progress.step("round")
    assert stream.getvalue() == "[1] closing the loop: round\n"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.start(4, "profiling")
        clock.now += 10
        progress.step("a [note] with brackets")
        assert progress._bar is not None
        assert not progress._bar.live.auto_refresh, "nothing may run beside what is timed"
        progress.start(2, "scoring")
    shown = stream.getvalue()
    assert "1/4" in shown
    assert "30 s left" in shown
    assert "a [note] with brackets" in shown
    assert "scoring" in shown


def test_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(stream, clock=Clock())
    progress.start(1, "profiling")
    progress.step("one")
    assert stream.getvalue() == "[1/1] profiling: one, 0 s left\n"


def test_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress.silent()
    progress.start(3, "profiling", done=1)
    progress.step("two")
    progress.stop()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (7500, "2 h 05 min")]
)
def test_spoken(seconds: float, text: str) -> None:
    assert spoken(seconds) == text

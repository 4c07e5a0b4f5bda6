"""Progress: plain lines with time left, a bar on a terminal, silence when nobody asked."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

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


def test_a_long_first_step_counts_for_little() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    progress.start(10, "profiling")
    for seconds in (10.0, 1.0, 1.0, 1.0, 1.0):
        clock.now += seconds
        progress.step("one")
    assert progress.seconds_left is not None
    assert 5 <= progress.seconds_left <= 10


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


@dataclass(frozen=True)
class Stage:
    """A stage of a simulated run: what it was expected to take, and its steps; limit: seconds after which it ends."""

    expected: float
    steps: tuple[float, ...]
    foreseen: int | None = None
    limit: float | None = None


SCENARIOS = {
    "as planned": [Stage(60, (3.0,) * 20, limit=60), Stage(20, (1.0,) * 20), Stage(20, (10.0, 10.0))],
    "unequal steps": [Stage(100, (9.0, 5.0, 4.0, *(1.5, 3.0) * 18), 50, limit=100), Stage(30, (0.5, 1.0) * 20), Stage(25, (30.0,))],
    "a stage that ends early": [Stage(100, (2.0,) * 40, limit=100), Stage(30, (1.0,) * 30), Stage(20, (20.0,))],
    "later stages take less": [Stage(120, (2.0,) * 60, limit=120), Stage(40, (1.0,) * 34), Stage(30, (25.0,))],
    "later stages take longer": [Stage(120, (2.0,) * 60, limit=120), Stage(30, (1.0,) * 36), Stage(30, (18.0, 18.0))],
    "more was foreseen than there is time for": [Stage(60, (2.0,) * 30, 90, limit=60), Stage(30, (3.0,) * 10), Stage(20, (20.0,))],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_time_left_of_a_whole_run_is_right_within_a_quarter(name: str) -> None:
    """After its first tenth; at the end of what is left, within a tenth of the whole."""
    stages, clock = SCENARIOS[name], Clock()
    whole = sum(sum(s.steps) for s in stages)
    begun = clock.now
    progress = Progress(io.StringIO(), clock=clock)
    progress.plan({str(i): s.expected for i, s in enumerate(stages)})
    for number, stage in enumerate(stages):
        ends = clock.now + (stage.limit or math.inf)
        progress.enter(str(number))
        last = number == len(stages) - 1  # nobody knows how many rounds there will be
        progress.start(None if last else stage.foreseen or len(stage.steps), "stage", until=lambda e=ends: e - clock.now)
        for step in stage.steps:
            clock.now += step
            progress.step("one")
            used, shown = clock.now - begun, progress.seconds_left
            if 0.1 * whole <= used < whole:
                assert shown is not None
                left = whole - used
                assert abs(shown - left) <= max(0.25 * left, 0.1 * whole), (number, used, shown, left)


def test_stages_that_were_skipped_are_over() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    progress.plan({"profile": 100.0, "sensitivities": 20.0, "loop": 30.0})
    assert progress.seconds_left == 150
    progress.enter("loop")
    progress.enter("something that nobody planned")
    clock.now += 10
    assert progress.seconds_left == 20
    clock.now += 100
    assert progress.seconds_left == 0
    progress.more(40.0)  # another round
    assert progress.seconds_left == 40
    clock.now += 15
    assert progress.seconds_left == 25
    progress.more(0.0)  # it was the last one
    assert progress.seconds_left == 0


def test_what_is_to_come_is_revised_and_what_goes_on_is_not() -> None:
    clock = Clock()
    progress = Progress(io.StringIO(), clock=clock)
    progress.plan({"profile": 100.0, "sensitivities": 20.0, "loop": 30.0})
    progress.enter("profile")
    clock.now += 10
    progress.revise({"profile": 1.0, "loop": 70.0, "recovery": 5.0}, 0.0)
    assert progress.seconds_left == 90 + 20 + 70
    progress.enter("loop")
    progress.revise({"sensitivities": 9.0}, 0.0)
    assert progress.seconds_left == 70


def test_rounds_that_may_be_needed_are_told_beside() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    progress.plan({"profile": 100.0, "loop": 30.0}, 20.0)
    progress.enter("profile")
    progress.start(None, "profile")
    assert stream.getvalue().endswith("profile, 2 min 10 s left, 20 s more for each further round\n")
    progress.revise({"loop": 40.0}, 30.0)
    progress.enter("loop")
    progress.start(None, "loop")
    assert stream.getvalue().endswith("loop, 40 s left, 30 s more for each further round\n")
    progress.more(30.0)
    progress.step("round 1")
    assert stream.getvalue().endswith("round 1, 30 s left\n")


def test_where_nobody_knows_yet_nothing_is_said() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    progress.plan({"making ready": math.inf})
    progress.enter("making ready")
    progress.start(None, "finding which channels matter")
    clock.now += 10
    progress.say("a warning")
    progress.start(2, "refitting")
    clock.now += 10
    progress.step("one")
    assert "left" not in stream.getvalue()
    assert stream.getvalue().startswith("finding which channels matter\n")
    progress.plan({"the profile": 60.0})
    progress.enter("the profile")
    progress.say("time limit")
    assert stream.getvalue().endswith("\ntime limit\n")


def test_one_bar_for_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.plan({"profile": 100.0, "loop": 100.0})
        for stage in ("profile", "loop"):
            progress.enter(stage)
            progress.start(2, stage)
            bar = progress._bar
            clock.now += 50
            progress.step("a note that is far too long for what is left of the line " * 3)
            progress.stop()
            assert progress._bar is bar, "it stays for the next stage"
    shown = stream.getvalue()
    assert "2 min 30 s left" in shown
    assert shown.count("\n") == 1, "one line, drawn anew at its place"
    assert "…" in shown


def test_the_log_has_every_line_with_the_time(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for error in (None, ValueError("why it ended")):
        progress = Progress.silent()
        try:
            with progress.logged(path):
                progress.start(2, "profiling")
                progress.step("one")
                assert path.read_text().splitlines()[-1].endswith("[1/2] profiling: one, 0 s left"), "at once"
                progress.record("a report\nof two lines")
                if error is not None:
                    raise error
        except ValueError:
            pass
        progress.step("after the run")
    lines = path.read_text().splitlines()
    assert len(lines) == 9, "a further run is added"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*  \S", line) for line in lines)
    assert lines[-1].endswith("ended by ValueError: why it ended")
    assert not any("after the run" in line for line in lines)


def test_a_full_disk_ends_the_log_and_not_the_run() -> None:
    class Full(io.StringIO):
        name = "run.log"

        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    stream = io.StringIO()
    progress = Progress(stream, clock=Clock())
    progress._logs.append(Full())
    progress.start(1, "profiling")
    progress.step("one")
    assert "run.log cannot be written any more (No space left on device)" in stream.getvalue()
    assert "[1/1] profiling: one" in stream.getvalue()

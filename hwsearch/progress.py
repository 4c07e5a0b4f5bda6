"""What is printed while a long job runs: how far it is (a bar on a terminal, plain lines elsewhere, or nothing).

Standard output is left to results, which may be JSON for a program.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


class Progress:
    """Progress of one stage after another, written to `stream` (standard error unless said), and to a log where there is one.

    Nothing is drawn between steps: a thread that redraws a bar would disturb what is being timed.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic, quiet: bool = False
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._quiet = quiet
        self._logs: list[TextIO] = []
        self._bar: Bar | None = None
        self._row: TaskID | None = None
        self._total: int | None = None
        self._what = ""
        self._done = 0
        self._at = self._begun = clock()
        self._until: Callable[[], float] = lambda: math.inf
        self._times: list[float] = []
        self._plan: dict[str, float] = {}
        self._again = 0.0
        self._stage = ""
        self._entered = 0.0

    @staticmethod
    def silent() -> Progress:
        """One that shows nothing, for callers who did not ask."""
        return Progress(quiet=True)

    @contextmanager
    def logged(self, path: Path) -> Iterator[Self]:
        """Every line also goes to the end of a file, with the time, while the block runs; so does the error that ends it.

        A block within another writes both files.
        """
        with path.open("a", encoding="utf-8", buffering=1) as log:
            self._logs.append(log)
            self.record(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
            try:
                yield self
            except BaseException as error:
                self.record(f"ended by {type(error).__name__}: {error}")
                raise
            finally:
                if log in self._logs:
                    self._logs.remove(log)
                self._plan, self._again = {}, 0.0
                self._close()

    def plan(self, stages: Mapping[str, float], again_s: float = 0.0) -> None:
        """The stages of a whole run that are to come, in order, with the seconds that each is expected to take.

        The time left is then that of all of them; none is shown while one of them may take for ever. What was planned before is
        replaced. again_s: Of each further round, of which nobody knows before whether they are needed: it is shown beside.
        """
        self._plan, self._again = dict(stages), again_s

    def revise(self, stages: Mapping[str, float], again_s: float) -> None:
        """What planned stages that have not begun are expected to take, and each further round, as is known by now."""
        self._again = again_s
        self._plan |= {stage: s for stage, s in stages.items() if stage in self._plan and stage != self._stage}

    def enter(self, stage: str) -> None:
        """A planned stage begins: those planned before it are over. Does nothing where none of that name is planned."""
        if stage in self._plan:
            names = list(self._plan)
            self._plan = {name: self._plan[name] for name in names[names.index(stage) :]}
            self._stage, self._entered = stage, self._clock()
            self._total, self._times, self._what = None, [], ""

    def more(self, seconds: float, again_s: float = 0.0) -> None:
        """The planned stage that is under way takes so long from now on, however long it has taken; `again_s` as in `plan`.

        Does nothing without one.
        """
        if self._stage in self._plan:
            self._again = again_s
            self._plan[self._stage] = self._clock() - self._entered + seconds

    def start(
        self, total: int | None, what: str, done: int = 0, until: Callable[[], float] | None = None
    ) -> None:
        """Begin a job of `total` steps (None where nobody knows), `done` of them by an earlier run.

        until: seconds to when it ends, done or not. A job before it, if still open, ends.
        """
        self.stop()
        self._until = until or (lambda: math.inf)
        self._total, self._what = total, what
        self._done = done
        self._at, self._times = self._clock(), []
        if done:
            self._tell(f"{self._count()} {what}: done before, kept", "")
        elif self._plan:
            self._tell(", ".join(part for part in (what, self._left()) if part), "")
        elif self._on_terminal():
            self._show("")

    def step(self, note: str, done: int | None = None) -> None:
        """One step is done, or `done` steps in all; `note` says what the last one was."""
        self.advance(1 if done is None else done - self._done)
        line = ", ".join(part for part in (f"{self._count()} {self._what}: {note}", self._left()) if part)
        self._tell(line, note)

    def advance(self, fresh: int = 1) -> None:
        """So many steps more are done, of which there is nothing to say."""
        self._done += fresh
        before, self._at = self._at, self._clock()
        self._times += [(self._at - before) / max(1, fresh)] * fresh  # none where `done` did not grow
        if self._bar is not None:
            self._show(None)

    def expect(self, more: int) -> None:
        """So many steps are left: for jobs that find out how many they need."""
        self._total = self._done + more

    def say(self, note: str) -> None:
        """Something worth knowing that is no step."""
        self._tell(f"{self._count()} {self._what}: {note}" if self._what else note, note)

    def record(self, text: str) -> None:
        """Only into the log: each line with the time. A log that cannot be written ends, and that is said."""
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        for log in list(self._logs):
            try:
                log.write("".join(f"{now}  {line}\n" for line in text.splitlines() or [""]))
            except OSError as error:
                self._logs.remove(log)
                self.say(f"{log.name} cannot be written any more ({error.strerror})")

    def stop(self) -> None:
        """End the job; does nothing where none is open. The bar of a whole run stays."""
        self._until = lambda: math.inf  # what it asks may hold on to engines
        if not self._plan:
            self._close()

    @property
    def seconds_left(self) -> float | None:
        """Time that is still needed, of all that is planned; None where nobody knows."""
        own = self._steps_left()
        if not self._plan:
            return own
        of_stage = self._plan.get(self._stage, 0.0)
        later = sum(seconds for stage, seconds in self._plan.items() if stage != self._stage)
        if own is None or math.isinf(of_stage):
            own = max(0.0, of_stage - (self._clock() - self._entered))
        return own + later

    def _steps_left(self) -> float | None:
        """Time that the steps to come will take if they are like those before; None before the first.

        Steps far shorter than the longest do not count: they found their work done by an earlier run. Between their mean and their
        median: the first ones may have been longer than all others will be.
        """
        if self._total is None or not self._times:
            return None
        real = [t for t in self._times if t >= max(self._times) / 10]
        steps = (mean(real) + median(real)) / 2 * max(0, self._total - self._done)
        return min(steps, max(0.0, self._until()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _on_terminal(self) -> bool:
        return not self._quiet and self._stream.isatty() and os.environ.get("TERM", "") != "dumb"

    def _show(self, note: str | None) -> None:
        """Draw the line anew; note: None leaves what it says."""
        if self._bar is None:
            self._open_bar()
        assert self._bar is not None
        assert self._row is not None
        left = self.seconds_left
        done, total = float(self._done), self._total
        if self._plan:  # the bar is of the whole run, by time
            done, total = 1e3 * (self._clock() - self._begun) / max(self._clock() - self._begun + (left or 0.0), 1e-9), 1000
        said: dict[str, Any] = {} if note is None else {"note": note}
        self._bar.update(
            self._row, description=self._what, total=total, completed=done, count=self._count(), left=self._left(), **said
        )
        self._bar.refresh()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        self._bar = Bar(*columns, console=Console(file=self._stream), auto_refresh=False)
        self._row = self._bar.add_task(self._what, total=self._total, completed=self._done, count="", left="", note="")
        self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._row = None

    def _count(self) -> str:
        width = len(str(self._total or ""))
        return f"[{self._done}]" if self._total is None else f"[{self._done:{width}d}/{self._total}]"

    def _left(self) -> str:
        seconds = self.seconds_left
        if seconds is None or math.isinf(seconds):
            return ""
        further = f", {spoken(self._again)} more for each further round" if self._plan and self._again >= 0.5 else ""
        return f"{spoken(seconds)} left{further}"

    def _tell(self, line: str, note: str) -> None:
        """A line in the log; the note in the bar on a terminal, the line elsewhere."""
        self.record(line)
        if self._on_terminal():
            self._show(note)
        elif not self._quiet:
            print(line, file=self._stream, flush=True)


def spoken(seconds: float) -> str:
    """A duration to read: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def seconds_of(duration: str) -> float:
    """Seconds of `90s`, `10m`, `1h`, `1h30m` or `90`. Raises ValueError."""
    match = _DURATION.fullmatch(duration.strip().lower().replace(" ", ""))
    total = 0.0
    if match:
        total = sum(float(n) * unit for n, unit in zip(match.groups("0"), (3600, 60, 1), strict=True))
    if total <= 0:
        raise ValueError(f"{duration!r} is no duration; expected for instance 90s, 10m, 1h or 1h30m")
    return total


@contextmanager
def stdout_kept() -> Iterator[None]:
    """What the block prints past Python's streams goes to standard error; nothing is changed where standard output is closed."""
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        if sys.stdout is not None:  # closed, and its number given to another file
            sys.stdout.flush()
        os.dup2(2, 1)
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)  # what C has buffered would come out later
        os.dup2(kept, 1)
        os.close(kept)

"""What is printed while a long job runs: how far it is (a bar on a terminal, plain lines elsewhere, or nothing).

Standard output is left to results, which may be JSON for a program.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """Progress of one stage after another, written to `stream` (standard error unless said).

    Nothing is drawn between steps: a thread that redraws a bar would disturb what is being timed.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._quiet = False
        self._bar: Bar | None = None
        self._row: TaskID | None = None
        self._total: int | None = None
        self._what = ""
        self._done = 0
        self._at = 0.0
        self._end = math.inf
        self._times: list[float] = []

    @staticmethod
    def silent() -> Progress:
        """One that shows nothing, for callers who did not ask."""
        progress = Progress()
        progress._quiet = True
        return progress

    def start(self, total: int | None, what: str, done: int = 0, limit_s: float | None = None) -> None:
        """Begin a stage of `total` steps (None where nobody knows), `done` of them by an earlier run.

        limit_s: seconds after which it ends, done or not. A stage before it, if still open, ends.
        """
        self.stop()
        self._end = math.inf if limit_s is None else self._clock() + limit_s
        self._total, self._what = total, what
        self._done = done
        self._at, self._times = self._clock(), []
        if self._quiet:
            return
        if self._on_terminal():
            self._open_bar()
        elif done:
            self._line(f"{self._count()} {what}: done before, kept")

    def step(self, note: str, done: int | None = None) -> None:
        """One step is done, or `done` steps in all; `note` says what the last one was."""
        fresh = 1 if done is None else done - self._done
        self._done += fresh
        before, self._at = self._at, self._clock()
        self._times += [(self._at - before) / max(1, fresh)] * fresh  # none where `done` did not grow
        if self._quiet:
            return
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=self._done, note=note, left=self._left())
            self._bar.refresh()
        else:
            self._line(
                ", ".join(part for part in (f"{self._count()} {self._what}: {note}", self._left()) if part)
            )

    def expect(self, more: int) -> None:
        """So many steps are left: for stages that find out how many they need."""
        self._total = self._done + more
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, total=self._total)

    def say(self, note: str) -> None:
        """Something worth knowing that is no step."""
        if self._quiet:
            return
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, note=note)
            self._bar.refresh()
        else:
            self._line(f"{self._count()} {self._what}: {note}" if self._what else note)

    def stop(self) -> None:
        """End the stage; does nothing where none is open."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._row = None

    @property
    def seconds_left(self) -> float | None:
        """Time that the steps to come will take if they are like those before; None before the first.

        Steps far shorter than the longest do not count: they found their work done by an earlier run.
        """
        if self._total is None or not self._times:
            return None
        real = [t for t in self._times if t >= max(self._times) / 10]
        steps = sum(real) / len(real) * max(0, self._total - self._done)
        return min(steps, max(0.0, self._end - self._clock()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _on_terminal(self) -> bool:
        return self._stream.isatty() and os.environ.get("TERM", "") != "dumb"

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        self._bar = Bar(*columns, console=Console(file=self._stream), auto_refresh=False)
        self._bar.start()
        self._row = self._bar.add_task(self._what, total=self._total, completed=self._done, left="", note="")
        self._bar.refresh()

    def _count(self) -> str:
        width = len(str(self._total or ""))
        return f"[{self._done}]" if self._total is None else f"[{self._done:{width}d}/{self._total}]"

    def _left(self) -> str:
        seconds = self.seconds_left
        return "" if seconds is None else f"{spoken(seconds)} left"

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def spoken(seconds: float) -> str:
    """A duration to read: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


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

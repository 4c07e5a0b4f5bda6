#!/usr/bin/env python
"""Is the time that a run says is left right within a quarter, once a tenth of it is over? Read from the logs of runs.

    hwsearch run zoo:fashion_resnet --budget latency=20% --time-limit 5m --out out
    python scripts/bench/time_left.py out/run.log

Every line of the log has the time, and most end with what is left. Of a file that several runs wrote the last one is judged. The
last seconds, where a second or two are a quarter, are left out: what is shown is rounded, and `least` seconds are forgiven. What a
line tells of each further round of the loop is counted as often as there were further ones.
"""

from __future__ import annotations

import argparse
import re
from datetime import datetime
from pathlib import Path

LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*)  (.*)$")
SPOKEN = r"(?:(\d+) h )?(?:(\d+) min ?)?(?:(\d+) s )?"
LEFT = re.compile(rf"{SPOKEN}left(?:, {SPOKEN}more for each further round)?$")
ROUND = re.compile(r"round \d+: .* ms measured")
FIRST, OFF = 0.1, 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--least", type=float, default=3.0, help="seconds that a time may be off whatever is left")
    given = parser.parse_args()
    for path in given.logs:
        print(f"{path}: {told(path.read_text(), given.least)}")


def told(text: str, least: float) -> str:
    """How many of the times left were right, and the one that was furthest off."""
    lines = [m.groups() for m in map(LINE.match, text.splitlines()) if m]
    starts = [i for i, (_, said) in enumerate(lines) if re.match(r"\S+ run ", said)]
    lines = lines[starts[-1] :] if starts else lines
    times = [datetime.fromisoformat(at) for at, _ in lines]
    begun, whole = times[0], (times[-1] - times[0]).total_seconds()
    rows = []
    for at, (_, said) in zip(times, lines, strict=True):
        used, match = (at - begun).total_seconds(), LEFT.search(said)
        if match and FIRST * whole <= used < whole:
            parts, left = [int(part or 0) for part in match.groups()], whole - used
            one, further = (3600 * hours + 60 * minutes + seconds for hours, minutes, seconds in (parts[:3], parts[3:]))
            rounds = sum(later > at and bool(ROUND.search(said)) for later, (_, said) in zip(times, lines, strict=True))
            shown = one + further * max(rounds - 1, 0)
            rows.append((max(0.0, abs(shown - left) - least) / left, used, shown, left))
    if not rows:
        return "no line says what is left"
    off, used, shown, left = max(rows)
    right = sum(row[0] <= OFF for row in rows)
    return (
        f"{whole:.0f} s in all, {right} of {len(rows)} times right within a quarter; furthest off after {used:.0f} s: "
        f"{shown:.0f} s said, {left:.0f} s true ({off:.0%})"
    )


if __name__ == "__main__":
    main()

"""Background load: as many busy processes as asked for, gone afterwards whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hwsearch.device.load import background, cpus
from hwsearch.errors import InvalidInput


def children() -> dict[int, float]:
    """CPU seconds used by each live child process."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def test_workers_are_busy_and_end_with_the_block() -> None:
    before = set(children())
    with background(2):
        first = {p: t for p, t in children().items() if p not in before}
        assert len(first) == 2
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if all(children()[p] > t for p, t in first.items()):
                break
            time.sleep(0.05)
        else:
            pytest.fail("a worker did nothing")
    assert set(children()) <= before


def test_workers_end_where_the_block_fails() -> None:
    before = set(children())
    with pytest.raises(ZeroDivisionError), background(1):
        raise ZeroDivisionError
    assert set(children()) <= before


def test_workers_end_with_a_killed_parent() -> None:
    code = (
        "import os, signal\nfrom hwsearch.device.load import background\nfrom pathlib import Path\n"
        "with background(1):\n"
        "    kids = Path(f'/proc/self/task/{os.getpid()}/children').read_text()\n"
        "    print(kids, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    (worker,) = done.stdout.split()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_no_load_and_too_much() -> None:
    before = set(children())
    with background(0):
        assert set(children()) <= before
    with pytest.raises(InvalidInput, match="expected 0 to"), background(1000):
        pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_a_restricted_process_says_so() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert cpus() == ("" if os.cpu_count() == 1 else str(min(mine)))
    finally:
        os.sched_setaffinity(0, mine)

"""Background load: what else runs on the device while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hwsearch.errors import BackendUnavailable, InvalidInput

_WORK = """
import os, sys
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
import numpy as np
parent = int(sys.argv[1])
x = np.random.default_rng(0).normal(size=(384, 384)).astype(np.float32)
y = x.copy()
print("ready", flush=True)
while os.getppid() == parent:
    for _ in range(50):
        np.matmul(x, y, out=y)
        y *= 1.0 / max(float(np.abs(y).max()), 1e-30)
"""
"""Matrix products that keep a core's vector units and part of its caches busy; ends when its parent is gone."""


def cpus() -> str:
    """The CPUs that this process may run on where they are not all (under `taskset`, in a container); else nothing."""
    try:
        mine = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return ""
    return ",".join(map(str, sorted(mine))) if len(mine) < (os.cpu_count() or 1) else ""


@contextmanager
def background(workers: int) -> Iterator[None]:
    """So many processes of one busy thread each, for as long as the block lasts.

    Raises InvalidInput on more workers than the machine can take beside the measured one, BackendUnavailable where one
    does not start.
    """
    if not 0 <= workers <= 4 * (os.cpu_count() or 1):
        raise InvalidInput(f"a load of {workers} workers; expected 0 to {4 * (os.cpu_count() or 1)}")
    running: list[subprocess.Popen[str]] = []
    try:
        for _ in range(workers):
            worker = [sys.executable, "-c", _WORK, str(os.getpid())]
            running += [subprocess.Popen(worker, stdout=subprocess.PIPE, text=True)]
        for process in running:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise BackendUnavailable("a worker of the background load did not start")
        if running:
            time.sleep(0.2)  # clocks settle
        yield
        if any(process.poll() is not None for process in running):
            raise BackendUnavailable("a worker of the background load died while measuring; measure again")
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

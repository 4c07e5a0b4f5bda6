"""Standard output left to results, which may be JSON for a program: what native libraries print goes to standard error."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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

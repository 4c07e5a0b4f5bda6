"""Standard output is left to results, whatever a native library prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hwsearch.progress import stdout_kept

pytestmark = pytest.mark.skipif(os.name == "nt", reason="C's buffers are flushed on POSIX only")

_PRINTS = """
import ctypes, os
from hwsearch.progress import stdout_kept

print("before")
with stdout_kept():
    os.write(1, b"unbuffered\\n")
    ctypes.CDLL(None).puts(b"buffered by C")
os.write(1, b"after\\n")
"""

_CLOSED = """
import os, sys
from hwsearch.progress import stdout_kept

with stdout_kept():
    os.write(2, b"in the block")
"""


def test_what_a_library_prints_goes_to_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", _PRINTS], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n"
    assert done.stderr == "unbuffered\nbuffered by C\n"


@pytest.mark.parametrize("shell", ['exec "$0" -c "$1" 1>&-', 'exec "$0" -c "import os; os.close(1)$1"'])
@pytest.mark.parametrize("taken", ["", "import os; os.open(os.devnull, os.O_RDONLY)"])
def test_it_runs_where_standard_output_is_closed(shell: str, taken: str) -> None:
    """By a program's parent, or by the program itself; and where another file took its number."""
    words = ["sh", "-c", shell, sys.executable, f"\n{taken}\n{_CLOSED}"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "in the block")


def _printing_and_failing() -> None:
    with stdout_kept():
        os.write(1, b"in the block")
        raise ZeroDivisionError


def test_it_is_put_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        _printing_and_failing()
    os.write(1, b"after")
    assert capfd.readouterr() == ("after", "in the block")

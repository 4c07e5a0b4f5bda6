"""A lock lets one process in, waits for another, names it, and lets go of the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hwsearch.device.lock import lock, lock_path
from hwsearch.errors import DeviceBusy, InvalidInput

HOLD = """
import sys, time
sys.argv = ["/usr/bin/hwsearch", "profile", "zoo:some task"]
from hwsearch.device.lock import lock
with lock("dev"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@contextmanager
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of device `dev`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_keeps_other_processes_out_and_names_the_holder() -> None:
    with holder() as other:
        with pytest.raises(DeviceBusy) as caught, lock("dev", wait_s=0.0):
            pytest.fail("two hold the lock")
        with lock("another device", wait_s=0.0):
            pass
    message = str(caught.value)
    assert f"pid {other.pid}" in message
    assert "hwsearch profile 'zoo:some task'" in message
    assert "since 2" in message
    assert f"kill {other.pid}" in message


def test_that_of_a_killed_process_is_free() -> None:
    with holder() as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with lock("dev", wait_s=0.0):
            pass


def test_it_waits_as_long_as_asked_and_says_for_whom() -> None:
    said: list[str] = []

    def heard(note: str) -> None:
        said.append(note)
        other.terminate()

    with holder() as other, lock("dev", wait_s=30, say=heard):
        assert other.wait(5) is not None
    assert len(said) == 1
    assert f"pid {other.pid}" in said[0]
    assert "waiting for it" in said[0]


def test_who_is_waited_for_is_a_warning_where_nobody_listens() -> None:
    with holder() as other, pytest.warns(UserWarning, match=f"pid {other.pid}"), pytest.raises(DeviceBusy), lock("dev", wait_s=0.1):
        pytest.fail("two hold the lock")


def test_it_is_released_by_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), lock("dev"):
        raise ZeroDivisionError
    refused: list[DeviceBusy] = []

    def elsewhere() -> None:
        try:
            with lock("dev", wait_s=0.0):
                pass
        except DeviceBusy as error:
            refused.append(error)

    with lock("dev", wait_s=0.0), lock("dev", wait_s=0.0):
        pass  # a thread that has it gets it again
    with lock("dev"):
        with lock("dev"):
            pass
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert f"pid {os.getpid()}" in str(refused[0]), "the inner block did not let go of it"


def test_one_writer_of_a_folder(tmp_path: Path) -> None:
    refused: list[DeviceBusy] = []

    def elsewhere() -> None:
        with lock_path(tmp_path / "other", wait_s=0.0):
            pass
        try:
            with lock_path(tmp_path / "sub/../out", wait_s=0.0):
                pass
        except DeviceBusy as error:
            refused.append(error)

    with lock_path(tmp_path / "out"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "out is in use" in str(refused[0])
    assert "mix their files" in str(refused[0])
    assert not (tmp_path / "out").exists(), "nothing is left beside what is written"


def test_without_the_name_of_its_holder(cache: Path) -> None:
    with holder():
        (cache / "locks/dev.lock").write_text("")
        with pytest.raises(DeviceBusy, match="another process is about to use"), lock("dev", wait_s=0.0):
            pytest.fail("two hold the lock")


def test_one_that_cannot_be_kept_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(InvalidInput, match="set HWSEARCH_CACHE"), lock("dev"):
        pytest.fail("no lock file, yet locked")

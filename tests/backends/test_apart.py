from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from frail import FrailBackend, FrailEngine

from hwsearch.backends import process
from hwsearch.backends.base import Array, Backend, BuildOptions, Engine
from hwsearch.backends.process import ENVIRONMENT, ApartEngine, compiler, huge_pages
from hwsearch.device.stopwatch import times
from hwsearch.device.timing import Protocol, paired
from hwsearch.errors import BackendUnavailable, InvalidInput

ZEROS = np.zeros((2, 3), np.float32)


def built(what: str) -> Engine:
    return compiler(FrailBackend())(what.encode(), BuildOptions())


def process_of(engine: Engine) -> int:
    return int(engine(ZEROS)[0][0])


def lives(pid: int) -> bool:
    """Whether a process is there that has not ended, though nobody may have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end(pid: int) -> None:
    for _ in range(200):
        if not lives(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_an_engine_elsewhere_is_an_engine() -> None:
    engine = built("doubles")
    assert isinstance(engine, Engine)
    assert isinstance(engine, ApartEngine)
    assert [s.name for s in (*engine.inputs, *engine.outputs)] == ["x", "y"]
    assert engine.size_bytes == 7
    assert engine.properties == {"FRAIL": "1"}
    np.testing.assert_array_equal(engine(ZEROS + 1.5)[0], ZEROS + 3.0)
    assert engine.nodes(5)[0].time_ns == 5.0
    with pytest.raises(InvalidInput, match="built for"):
        engine.prepare(ZEROS[:1])
    engine.prepare(ZEROS)  # and it goes on after an error


def test_many_calls_go_to_an_engine_elsewhere_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [[ZEROS + number] for number in range(7)]
    asked: list[int] = []
    each = ApartEngine.each

    def counted(engine: ApartEngine, own: Sequence[Sequence[Array]]) -> list[list[Array]]:
        asked.append(len(own))
        return each(engine, own)

    monkeypatch.setattr(ApartEngine, "each", counted)
    monkeypatch.setattr(process, "MOST_MOVED", 3 * 2 * ZEROS.nbytes)
    engine = built("doubles")
    for found in (process.run_each(engine, calls), process.run_each(FrailEngine("doubles"), calls)):
        assert len(found) == 7
        for number, (y,) in enumerate(found):
            np.testing.assert_array_equal(y, ZEROS + 2 * number)
    assert asked == [3, 3, 1], "an engine of this process is called as ever"
    assert process.run_each(engine, []) == []
    monkeypatch.setattr(process, "MOST_MOVED", 1)
    assert len(process.run_each(engine, calls)) == 7, "one call, however large"
    with pytest.raises(InvalidInput, match="built for"):
        process.run_each(engine, [[ZEROS], [ZEROS[:1]]])


def test_each_engine_has_a_process_which_keeps_the_time_and_ends_with_it() -> None:
    first, second = built("pid"), built("pid")
    one, other = process_of(first), process_of(second)
    assert len({one, other, os.getpid()}) == 3
    taken = times(first.run, 4)
    assert len(taken) == 4
    assert min(taken) > 0
    first.run()
    assert first(ZEROS)[0][1] == 5, "four timed inferences and one that was not, there"
    del first
    gc.collect()
    wait_for_the_end(one)
    assert process_of(second) == other


def test_engines_elsewhere_are_timed_side_by_side() -> None:
    protocol = Protocol(block_ns=1000, settle_ns=1000, warmup_ns=1000, limit_s=0.2)
    timing = paired(built("pid").run, {"same": built("pid").run}, protocol)["same"]
    assert 0.2 < timing.ratio < 5.0


def test_a_backend_that_does_not_ask_for_it_builds_where_it_is() -> None:
    backend: Backend = FrailBackend()
    backend.own_process = False  # type: ignore[attr-defined]
    assert process_of(compiler(backend)(b"pid", BuildOptions())) == os.getpid()


@pytest.mark.parametrize(
    ("what", "told"),
    [("refused", "frail does not like it"), ("wrong", "ZeroDivisionError: of the runtime's own")],
)
def test_what_fails_there_is_told_here(what: str, told: str) -> None:
    with pytest.raises(BackendUnavailable, match=told):
        built(what)


def test_a_runtime_that_dies_is_one_clear_error() -> None:
    with pytest.raises(BackendUnavailable, match=r"frail .* ended \(SIGKILL, perhaps for want of memory\)"):
        built("killed")
    engine, other = built("crashes"), built("doubles")
    with pytest.raises(BackendUnavailable, match="SIGABRT"):
        engine.run()
    with pytest.raises(BackendUnavailable, match="SIGABRT"):
        engine.run()
    np.testing.assert_array_equal(other(ZEROS)[0], ZEROS)


def test_a_backend_that_cannot_be_made_again_is_one_clear_error(capfd: pytest.CaptureFixture[str]) -> None:
    class Local(FrailBackend):
        pass

    with pytest.raises(BackendUnavailable, match="exit code 1"):
        compiler(Local())(b"pid", BuildOptions())
    assert "AttributeError" in capfd.readouterr().err


def test_a_process_that_cannot_be_started_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BackendUnavailable, match="no process can be started for frail"):
        compiler(FrailBackend())


def test_standard_output_stays_the_parents(capfd: pytest.CaptureFixture[str]) -> None:
    engine = built("pid")
    engine.run()
    del engine
    assert capfd.readouterr().out == ""


def test_memory_is_asked_for_in_huge_pages_and_the_users_own_settings_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    tunables, *path = built("environment")(ZEROS)[0]
    assert tunables == ENVIRONMENT["GLIBC_TUNABLES"]
    assert set(sys.path) - {""} <= set(path)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert built("environment")(ZEROS)[0][0] == "glibc.malloc.hugetlb=0"


def test_whether_there_are_huge_pages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    given = enabled.exists() and "[never]" not in enabled.read_text()
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    share = huge_pages()
    if not Path("/proc/self/smaps_rollup").exists():
        assert share is None
    elif not given:
        assert share == 0.0
    elif "[madvise]" in enabled.read_text():  # and only who asks for them gets them
        assert share is not None
        assert share > 0.9
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
        assert huge_pages() == 0.0
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert huge_pages() is None


IMPORTS = """
import os, signal, threading, time
import numpy as np
from frail import FrailBackend
from hwsearch.backends.process import compiler
from hwsearch.backends.base import BuildOptions
from hwsearch.errors import BackendUnavailable
"""


def python(code: str) -> subprocess.Popen[str]:
    """Another Python, for what would hurt the one that runs the tests."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", IMPORTS + code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env, text=True
    )  # fmt: skip


INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background has it ignored
engine = compiler(FrailBackend())(b'sleeps', BuildOptions())
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    engine.run()
except KeyboardInterrupt:
    print("interrupted")
try:
    engine.nodes()
except BackendUnavailable:
    print("ended")
"""


def test_an_interrupt_ends_the_engine_it_waits_for() -> None:
    """An answer that comes too late would be taken for the next one."""
    with python(INTERRUPTED) as other:
        try:
            told, _ = other.communicate(timeout=60.0)
        finally:
            other.kill()
    assert told.split() == ["interrupted", "ended"]


ORPHANED = """
engine = compiler(FrailBackend())(b'pid', BuildOptions())
print(int(engine(np.zeros((2, 3)))[0][0]), flush=True)
time.sleep(600)
"""


def test_processes_end_with_a_killed_parent() -> None:
    with python(ORPHANED) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert lives(child)
        finally:
            parent.kill()
    wait_for_the_end(child)

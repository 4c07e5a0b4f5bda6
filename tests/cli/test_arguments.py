"""What the words of options mean, and that a backend that is not there is told at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from invoking import invoke

import hwsearch as hs
from hwsearch.allocate.allocation import Allocation
from hwsearch.cli.arguments import seconds
from hwsearch.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5m", 90),
        ("45", 45),
        ("2min 5s", 125),
        ("1 H", 3600),
    ],
)
def test_durations(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "-5m", "0s", "5d", "m", "1m1h", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected for instance 90s"):
        seconds(text)


ABSENT = """
from hwsearch.errors import BackendUnavailable
class Backend:
    name = "absent"
    def versions(self): raise BackendUnavailable("its runtime is not installed; install it with: pip install absent")
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment where backend `absent` is registered, and importing torch, onnx or pandas fails."""
    (tmp_path / "absent_backend.py").write_text(ABSENT)
    info = tmp_path / "absent_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: absent-backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hwsearch.backends]\nabsent = absent_backend:Backend\n")
    for heavy in ("torch", "onnx", "pandas"):
        (tmp_path / f"{heavy}.py").write_text(f"raise SystemExit('{heavy} was imported')")
    paths = [str(tmp_path), str(Path(hs.__file__).parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    "words",
    [
        "doctor --backend absent",
        "profile zoo:x -o t.parquet --backend absent",
        "sensitivity zoo:x -o s.parquet --backend absent",
        "run zoo:x --budget latency=1ms -o out --backend absent",
    ],
)
def test_a_backend_that_is_not_there_is_told_before_anything_heavy_is_loaded(
    without_torch: dict[str, str], tmp_path: Path, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from hwsearch.cli import main; main()", *words.split()],
        capture_output=True, text=True, env=without_torch, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install absent" in done.stderr


@pytest.mark.parametrize(
    "words", ["profile zoo:x -o t --lock-clocks", "verify zoo:x {} -o r.json --lock-clocks"]
)
def test_clocks_of_a_cpu_are_not_locked(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="openvino"))
    result = invoke(*words.format("a.json").split(), *(["--backend", "openvino"]))
    assert result.exit_code == 2
    assert "openvino runs on the CPU; go without --lock-clocks" in result.stderr

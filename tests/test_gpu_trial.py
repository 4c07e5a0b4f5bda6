"""The trial for a GPU machine, under the imitation of one: its steps run, say what they should, and leave what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRIAL = ROOT / "scripts" / "gpu_trial.py"
ENVIRONMENT = {
    **os.environ,
    "GPU_TRIAL_SIMULATE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "PYTHON": sys.executable,
    "MPLBACKEND": "agg",
}


def step(*words: str, timeout: float = 600.0) -> str:
    done = subprocess.run(
        [sys.executable, str(TRIAL), *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_facts(tmp_path: Path) -> None:
    step("facts", "-o", str(tmp_path / "facts.json"))
    found = json.loads((tmp_path / "facts.json").read_text())
    assert "torch" in found["hwsearch"]
    assert "dense.fp8" in found["variants"]["fp16"]
    assert found["versions"]["gpu"] == "Simulated GPU (sm90)"
    assert found["nvml"]["gpu"].startswith("NVIDIA")


@pytest.mark.slow
def test_kernels_are_kept_as_they_come(tmp_path: Path) -> None:
    step("kernels", "--few", "-o", str(tmp_path / "kernels.json"))
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {r["kernel"] for r in found["products"]} == {
        "fp16",
        "int8",
        "fp8",
        "2:4.int8",
        "2:4.fp16",
        "2:4.bf16",
    }
    assert not [r for r in found["products"] if "failed" in r]
    assert max(r["error"] for r in found["products"]) < 0.01
    failed = {k: v for k, v in found["others"].items() if "Error" in str(v)}
    assert not failed
    told = found["others"]["after a capture that fails"]
    assert "the next capture works" in told or "did not fail" in told


@pytest.mark.slow
def test_rivals_are_timed_beside_the_dense_network_and_a_summary_says_so(tmp_path: Path) -> None:
    out = tmp_path / "rivals-transformer.json"
    words = ("--task", f"{TRIAL}:transformer", "--batch", "2", "--limit", "600", "-o", str(out))
    step("rivals", str(tmp_path), *words)
    found = json.loads(out.read_text())
    assert found["rows"][0]["name"] == found["reference"] == "hwsearch fp16"
    assert all(r["off by"] < 0.05 for r in found["rows"])
    assert set(found["left out"].values()) <= {"no time left"}
    assert "rivals     transformer, batch 2, against hwsearch fp16" in step("summary", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["facts kernels doctor tests", "fashion", "transformer rivals cnn"])
def test_the_whole_trial(steps: str, tmp_path: Path) -> None:
    places = {name: str(tmp_path / name.lower()) for name in ("WORK", "OUT", "SITE")}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_trial.sh"), "run", *steps.split()],
        env={**ENVIRONMENT, **places, "TOTAL": "3600", "SCALE": "20"}, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ended = [line.split() for line in (tmp_path / "out" / "steps.txt").read_text().splitlines()]
    codes = {words[0]: int(words[2]) for words in ended if words[1] == "exit" and words[0] != "install"}
    # 5: pytest found no GPU to run its tests on; 3: a budget that the imitation's times do not meet
    allowed = {"tests": {0, 5}, "fashion-run": {0, 2, 3}, "transformer-run": {0, 2, 3}}
    assert codes
    failed = {name: code for name, code in codes.items() if code not in allowed.get(name, {0})}
    assert not failed, failed
    assert (tmp_path / "out" / "results.tgz").stat().st_size > 100

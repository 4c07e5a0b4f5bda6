"""`hwsearch deploy`, `verify` and `run`: what they pass on, what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invoking import Install, Report, Scores, Table, invoke, raising

from hwsearch.allocate.allocation import Allocation
from hwsearch.errors import BudgetMissed


def test_deploy(api: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="onnxruntime"))
    seen: list[Any] = []

    def deploy(task: str, chosen: Any, out: Path, *, backend: str | None, weights: Path | None) -> Any:
        seen.append((backend, weights))
        return SimpleNamespace(path=out, size_bytes=1_250_000)

    api(deploy=deploy)
    assert invoke("deploy", "zoo:x", "a.json", "-o", "m.onnx").stdout == "m.onnx: 1.25 MB\n"
    result = invoke(*"deploy zoo:x a.json -o m.onnx --backend openvino --weights w --json".split())
    assert json.loads(result.stdout) == {"path": "m.onnx", "size_bytes": 1_250_000}
    assert seen == [(None, None), ("openvino", Path("w"))]


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_verify_ends_with_whether_the_budget_is_met(
    api: Install, monkeypatch: pytest.MonkeyPatch, met: bool, code: int
) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: Scores(f"allocation {path}"))
    report = Report(met)
    seen: dict[str, Any] = {}
    api(
        verify=lambda task, chosen, **options: seen.update(options, chosen=chosen) or report,
        LatencyTable=Table,
    )
    words = "verify zoo:x a.json -o r.json --threads 2 --table t.parquet --lock-clocks"
    result = invoke(*words.split())
    assert result.exit_code == code
    assert result.stdout == f"the report, met: {met}\n"
    assert ("missed" in result.stderr) is (not met)
    assert report.saved == Path("r.json")
    assert seen == {
        "chosen": "allocation a.json", "backend": None, "threads": 2, "table": "table t.parquet", "weights": None,
        "lock_clocks": True,
    }  # fmt: skip
    assert json.loads(invoke("verify", "zoo:x", "a.json", "-o", "r.json", "--json").stdout) == {"met": met}


def test_what_a_report_cannot_explain_is_said_at_the_end(
    api: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="onnxruntime"))
    report = Report(True, ["the measured loss is 1,430 times the predicted; the likeliest layer is conv1"])
    api(verify=lambda *args, **options: report)
    result = invoke("verify", "zoo:x", "a.json", "-o", "r.json")
    assert result.exit_code == 0
    assert (
        "warning: the measured loss is 1,430 times the predicted; the likeliest layer is conv1"
        in result.stderr
    )


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 3)])
def test_run(api: Install, tmp_path: Path, met: bool, code: int) -> None:
    seen: dict[str, Any] = {}

    def run(task: str, budgets: list[str], out: Path, **options: Any) -> Report:
        seen.update(options, task=task, budgets=budgets, out=out)
        (out / "front.png").write_bytes(b"")
        return Report(met)

    api(run=run)
    words = (
        "run",
        "zoo:x",
        "--budget",
        "latency=40%",
        "--budget",
        "size=2MB",
        "--out",
        str(tmp_path),
        "--time-limit",
        "90s",
    )
    result = invoke(*words)
    assert result.exit_code == code
    assert result.stdout.startswith(f"the report, met: {met}\n")
    assert result.stdout.endswith(f"plot: {tmp_path / 'front.png'}\n")
    assert "latency table" not in result.stdout, "only what is there"
    del seen["progress"]
    assert 60.0 < seen.pop("time_limit_s") <= 90.0, "loading the task is part of the run"
    assert seen == {
        "task": "task zoo:x", "budgets": ["latency=40%", "size=2MB"], "out": tmp_path, "backend": "openvino",
        "threads": 1, "base": None, "batch": None, "seed": 0, "mode": "context", "axes": ["width", "precision"],
        "keep": (), "load": 0, "prior": (), "lock_clocks": False, "energy": False,
        "recover_s": 0.0, "gradients": "dense", "scales": "fixed", "batchnorm": "folded", "floor": None, "minimize": None,
        "samples": 10, "ray": None,
    }  # fmt: skip
    assert json.loads(invoke(*words, "--json").stdout) == {"met": met}
    invoke(*words, *"--axes width --keep classifier*".split())
    assert (seen["axes"], seen["keep"]) == (["width"], ["classifier*"])
    invoke(*words, *"--mode sandwiched --prior a.parquet --lock-clocks --energy --seed 3 --load 1".split())
    assert (seen["mode"], seen["prior"], seen["lock_clocks"]) == ("sandwiched", [Path("a.parquet")], True)
    assert (seen["energy"], seen["seed"], seen["load"]) == (True, 3, 1)


def test_run_with_a_floor(api: Install, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    api(run=lambda task, budgets, out, **options: seen.update(options, budgets=budgets) or Report(True))
    words = ["run", "zoo:x", "--out", str(tmp_path), "--floor"]
    assert invoke(*words, "-0.5pt").exit_code == 0
    assert (seen["budgets"], seen["floor"], seen["minimize"], seen["samples"]) == ((), "-0.5pt", None, 10)
    assert invoke(*words, *"99% --minimize size --samples 6 --budget latency=5ms --recover 1m".split()).exit_code == 0
    assert (seen["budgets"], seen["floor"], seen["minimize"], seen["samples"]) == (["latency=5ms"], "99%", "size", 6)
    assert seen["recover_s"] == 60.0
    result = invoke(*words, "99%", "--minimize", "loss")
    assert result.exit_code == 2
    assert "latency" in result.stderr
    assert invoke(*words, "99%", "--samples", "0").exit_code == 2


def test_run_that_missed_shows_the_nearest(api: Install, tmp_path: Path) -> None:
    api(run=raising(BudgetMissed("nearest 6 ms", Report(False))))
    result = invoke("run", "zoo:x", "--budget", "latency=5ms", "--out", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr) == (
        3,
        "the report, met: False\n",
        "error: nearest 6 ms\n",
    )


def test_quiet_shows_no_progress(api: Install, tmp_path: Path) -> None:
    def run(task: str, budgets: list[str], out: Path, *, progress: Any, **options: Any) -> Report:
        progress.start(1, "profiling")
        progress.step("one")
        return Report(True)

    api(run=run)
    words = ("run", "zoo:x", "--budget", "latency=40%", "--out", str(tmp_path))
    assert invoke(*words).stderr == "[1/1] profiling: one, 0 s left\n"
    assert invoke(*words, "--quiet").stderr == ""


def test_the_result_may_go_to_standard_output_alone(api: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: Scores(f"allocation {path}"))
    report = Report(True)
    api(verify=lambda task, chosen, **options: report)
    assert json.loads(invoke("verify", "zoo:x", "a.json", "--json").stdout) == {"met": True}
    assert report.saved is None
    result = invoke("verify", "zoo:x", "a.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--output (-o)" in result.stderr
    assert "--json" in result.stderr


def test_recovery_in_a_run_comes_on_top_of_the_default_limit(api: Install, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    api(run=lambda task, budgets, out, **options: seen.update(options) or Report(True))
    words = ["run", "zoo:x", "--budget", "latency=40%", "--out", str(tmp_path), "--recover", "2m"]
    assert invoke(*words, *"--gradients 2:4:mvue --scales learned --batchnorm unfolded".split()).exit_code == 0
    assert (seen["recover_s"], seen["gradients"], seen["scales"]) == (120.0, "2:4:mvue", "learned")
    assert seen["batchnorm"] == "unfolded"
    assert 660.0 < seen["time_limit_s"] <= 720.0


def test_recover(api: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Allocation, "load", lambda path: SimpleNamespace(backend="onnxruntime"))
    seen: dict[str, Any] = {}

    class Done:
        def to_json(self) -> dict[str, Any]:
            return {"method": "lc"}

        def __str__(self) -> str:
            return "how it went"

    def recover(task: str, chosen: Any, out: Path, **options: Any) -> Done:
        seen.update(options, out=out)
        out.write_bytes(b"x" * 1000)
        return Done()

    api(recover=recover)
    out = tmp_path / "t.safetensors"
    options = "--epochs 3 --time-limit 2m --method lc --gradients 2:4:mvue --scales learned --batchnorm unfolded --lr 3e-4 --seed 1"
    words = ["recover", "zoo:x", "a.json", "-o", str(out), *options.split()]
    assert invoke(*words).stdout == f"how it went\n{out}: 1.00 KB; give it to deploy and verify as --weights\n"
    del seen["progress"]
    assert seen == {
        "out": out, "epochs": 3, "time_limit_s": 120.0, "method": "lc", "gradients": "2:4:mvue", "scales": "learned",
        "batchnorm": "unfolded", "rate": 3e-4, "seed": 1, "weights": None, "backend": None,
    }  # fmt: skip
    assert json.loads(invoke(*words, "--json").stdout) == {"path": str(out), "method": "lc"}
    for wrong, message in (
        (["-o", "t.bin"], "t.safetensors"),
        (["-o", str(out), "--lr", "fast"], "'fast' is no learning rate"),
        (["-o", str(out), "--lr", "-1"], "no learning rate"),
        (["-o", str(out), "--method", "magic"], "magic"),
        (["-o", str(out), "--gradients", "4:2"], "unknown gradients '4:2'; expected one of dense, 2:4"),
    ):
        result = invoke("recover", "zoo:x", "a.json", *wrong)
        assert result.exit_code == 2
        assert message in result.stderr

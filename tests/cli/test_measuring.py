"""`hwsearch profile` and `hwsearch sensitivity`: what they pass on and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invoking import Install, Table, invoke

from hwsearch.loss.interactions import Agreement, Correction
from hwsearch.progress import Progress


def test_profile_passes_on_everything(api: Install) -> None:
    seen: dict[str, Any] = {}

    def profile(task: str, **options: Any) -> Table:
        seen.update(task=task, **options)
        options["progress"].start(2, "profiling")
        options["progress"].step("one")
        return Table()

    api(profile=profile, LatencyTable=Table)
    words = (
        "profile zoo:x -o t.parquet --backend onnxruntime --threads 2 --base fp32 --batch 8 --time-limit 1h"
    )
    words += " --mode sandwiched --axes precision --load 2 --seed 3 --prior a.parquet --prior b.parquet"
    words += " --shape 2x3x8x8 --shape ids=2x5 --lock-clocks --energy --trace time.json --ray auto"
    result = invoke(*words.split())
    assert (result.exit_code, result.stdout) == (0, "a table of 24 builds\n")
    assert "[1/2] profiling: one" in result.stderr
    assert isinstance(seen.pop("progress"), Progress)
    assert seen == {
        "task": "task zoo:x", "out": Path("t.parquet"), "backend": "onnxruntime", "threads": 2, "base": "fp32",
        "batch": 8, "time_limit_s": 3600.0, "mode": "sandwiched", "axes": ["precision"], "load": 2, "seed": 3,
        "prior": [Path("a.parquet"), Path("b.parquet")], "shape": ["2x3x8x8", "ids=2x5"], "lock_clocks": True,
        "energy": True, "trace": Path("time.json"), "ray": "auto",
    }  # fmt: skip
    assert json.loads(invoke(*words.split(), "--json").stdout) == {"backend": "openvino"}


def test_profile_defaults(api: Install) -> None:
    seen: dict[str, Any] = {}
    api(profile=lambda task, **options: seen.update(options) or Table())
    assert invoke("profile", "zoo:x", "-o", "t").exit_code == 0
    del seen["progress"]
    assert seen == {
        "out": Path("t"), "backend": "openvino", "threads": 1, "base": None, "batch": None, "time_limit_s": 600.0,
        "mode": "context", "axes": ["width", "precision"], "load": 0, "seed": 0, "prior": (),
        "shape": None, "lock_clocks": False, "energy": False, "trace": None, "ray": None,
    }  # fmt: skip


def test_sensitivity(api: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = SimpleNamespace(
        network=SimpleNamespace(name="net", channels={"stem": 32}), divergence="softmax", samples=512,
        rank_correlation=0.875, width_loss={"stem": {32: 0.0, 16: 0.25, 8: 0.5}}, estimated={("stem", 8)},
        loss={"calm": {"dense.fp32": 0.0, "dense.int8": 1e-4}, "touchy": {"dense.fp32": 0.0, "dense.int8": 0.5}},
        agreement=(Agreement(0.75, 0.4, 0.5, 48), Agreement(0.875, 0.9, 1.0, 48)), passes=96, correction=Correction(factor=0.5),
        trust=lambda: {"passes": 96},
    )  # fmt: skip
    seen: dict[str, Any] = {}
    api(sensitivity=lambda task, **options: seen.update(options) or scores)
    result = invoke("sensitivity", "zoo:x", "-o", "s.parquet", "--seed", "1")
    assert result.exit_code == 0
    assert result.stdout.index("touchy") < result.stdout.index("calm")
    assert "5.00e-01" in result.stdout
    assert "16: 2.5e-01, 8: 5.0e-01~" in result.stdout
    assert "~: 1 estimated" in result.stdout
    assert "0.88" in result.stdout
    said = " ".join(result.stdout.split())
    assert "48 stitched networks, 96 forward passes; predicted by the sum of losses: rank correlation 0.75, 40% within" in said
    assert "what was learnt from the others: rank correlation 0.88, 90% within" in said
    del seen["progress"]
    assert seen == {
        "out": Path("s.parquet"), "backend": "openvino", "base": None, "batch": None, "axes": ["width", "precision"],
        "table": None, "weights": None, "seed": 1, "ray": None,
    }  # fmt: skip
    assert json.loads(invoke("sensitivity", "zoo:x", "-o", "s", "--json").stdout)["loss"] == scores.loss
    monkeypatch.setattr("hwsearch.cli.sections.table_of_task", lambda path, task, **wanted: f"table {path} {wanted}")
    words = "sensitivity zoo:x -o s --table t.parquet --weights w --axes width --threads 2 --batch 4"
    assert invoke(*words.split()).exit_code == 0
    assert (seen["weights"], seen["axes"], seen["batch"]) == (Path("w"), ["width"], 4)
    assert invoke(*words.split(), "--ray", "10.0.0.5:6379").exit_code == 0
    assert seen["ray"] == "10.0.0.5:6379"
    assert seen["table"] == f"table t.parquet { {'batch': 4, 'base': None, 'threads': 2} }"
    assert "with --table" in invoke(*"sensitivity zoo:x -o s --threads 2".split()).stderr

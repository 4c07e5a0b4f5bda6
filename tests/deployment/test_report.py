"""The report of one verified allocation: for programs whole, for people a screenful."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hwsearch.deployment.report import SCHEMA, Report

REPORT = Report(
    task="tiny",
    backend="simulated",
    device={"chip": "a chip"},
    options={"threads": 1},
    met=True,
    rounds=2,
    latency_ms={"dense": 4.0, "budget": 2.0, "predicted": 1.9, "sigma": 0.1, "measured": 1.95},
    score={"dense": 0.9, "deployed": 0.89},
    loss={"predicted": 0.01, "measured": 0.02},
    size_bytes={"dense": 4000, "budget": None, "predicted": 900, "deployed": 950},
    solver={"status": "optimal", "gap": 0.0},
    uniform=None,
    variants={"a": "dense.int8", "b": "dense.fp32"},
    widths={"a": [8, 16], "b": [24, 24]},
    macs={"dense": 1000, "budget": None, "deployed": 400},
)


def test_the_file_holds_everything(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data == {"schema": SCHEMA, **json.loads(json.dumps(REPORT.__dict__))}
    assert data["widths"] == {"a": [8, 16], "b": [24, 24]}


def test_a_person_reads_what_is_narrower() -> None:
    said = str(REPORT)
    assert "1 of 2 channel groups narrower, down to 50%; 40% of the multiply-accumulates" in said
    assert "1.95 ms measured" in said
    assert "(2.05x)" in said
    whole = replace(REPORT, widths={"a": [16, 16], "b": [24, 24]})
    assert "narrower" not in str(whole)
    assert "narrower" not in str(replace(REPORT, widths={}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"met": False}, "MISSED"),
        ({"wrong_outputs": True, "output_error": 0.7}, "wrong outputs (relative error 0.7)"),
        ({"unstable": True}, "unstable"),
        (
            {"slowdown": 0.23, "latency_ms": {**REPORT.latency_ms, "measured_unconverted": 2.3}},
            "the machine was 23% slower than when the table was made: 2.3 ms, converted",
        ),
        (
            {"slowdown": -0.1, "latency_ms": {**REPORT.latency_ms, "measured_unconverted": 1.95}},
            "10% faster than when the table was made: the table does not tell what that does",
        ),
        ({"not_as_asked": {"a": "asked dense.int8, executed in fp32"}}, "1 unit(s) did not execute as asked"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], said: str) -> None:
    assert said in str(replace(REPORT, **change))
    assert said not in str(REPORT)

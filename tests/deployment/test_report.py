"""The report of one verified allocation: for programs whole, for people a screenful."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hwsearch.allocate.costs import Costs
from hwsearch.deployment.confirm import Judgement, State
from hwsearch.deployment.report import SCHEMA, Report, Timed

TIMED = Timed(sigma=1e5, unconverted=1.95e6, reference=4e6, reference_now=4.5e6)
JUDGED = Judgement(
    dense=Costs(latency=4e6, size=4000, macs=1000),
    bound=Costs(latency=2e6),
    measured=Costs(latency=1.95e6, size=950, macs=400),
    low=Costs(latency=1.9e6),
    high=Costs(latency=2.0e6),
    upper=Costs(latency=2.0e6),
    now=Costs(latency=2.2e6),
    now_high=Costs(latency=2.3e6),
    bound_now=Costs(),
    state=State.MET,
    windows=2,
)

REPORT = Report(
    task="tiny",
    backend="simulated",
    device={"chip": "a chip"},
    options={"threads": 1},
    rounds=2,
    predicted=Costs(latency=1.9e6, size=900),
    judged=JUDGED,
    timed=TIMED,
    score={"dense": 0.9, "deployed": 0.89},
    loss={"predicted": 0.01, "measured": 0.02},
    solver={"status": "optimal", "gap": 0.0},
    uniform=None,
    variants={"a": "dense.int8", "b": "dense.fp32"},
    widths={"a": [8, 16], "b": [24, 24]},
)


def test_the_file_holds_everything(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    own = {f.name for f in fields(Report)} - {"predicted", "judged", "timed"}
    assert set(data) == own | {"schema", "state", "met", "windows", "latency_ms", "size_bytes", "macs", "memory", "energy_mj"}
    assert data["schema"] == SCHEMA
    assert (data["state"], data["met"], data["windows"]) == ("met", True, 2)
    assert data["latency_ms"] == {
        "dense": 4.0, "budget": 2.0, "predicted": 1.9, "sigma": 0.1, "measured": 1.95, "measured_low": 1.9, "measured_high": 2.0,
        "measured_unconverted": 1.95, "measured_now": 2.2, "reference": 4.0, "reference_now": 4.5,
    }  # fmt: skip
    assert data["size_bytes"] == {"dense": 4000, "budget": None, "predicted": 900, "deployed": 950}
    assert data["macs"] == {"dense": 1000, "budget": None, "deployed": 400}
    assert data["memory"] == {"dense": None, "budget": None, "deployed": None, "source": "estimated"}
    assert data["energy_mj"] == {}
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
        ({"judged": replace(JUDGED, state=State.MISSED)}, "MISSED"),
        ({"judged": replace(JUDGED, state=State.WITHIN_NOISE)}, "budget   met_within_noise after"),
        ({"judged": replace(JUDGED, bound_now=Costs(latency=2e6))}, "now      2.2 ms (at most 2.3)"),
        (
            {"judged": replace(JUDGED, bound_now=Costs(latency=2e6), state=State.MISSED)},
            "latency: within the budget on the machine as it was when the table was made, but not now",
        ),
        ({"wrong_outputs": True, "output_error": 0.7}, "wrong outputs (relative error 0.7)"),
        ({"unstable": True}, "unstable"),
        (
            {"slowdown": 0.23, "timed": replace(TIMED, unconverted=2.3e6)},
            "the machine was 23% slower than when the table was made: 2.3 ms, converted",
        ),
        (
            {"slowdown": -0.1},
            "10% faster than when the table was made: the table does not tell what that does",
        ),
        ({"properties": {"SNIPPETS_MODE": "DISABLE"}}, "compiled with SNIPPETS_MODE=DISABLE"),
        ({"not_as_asked": {"a": "asked dense.int8, executed in fp32"}}, "1 unit(s) did not execute as asked"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, object], said: str) -> None:
    assert said in str(replace(REPORT, **change))
    assert said not in str(REPORT)


def test_tails_and_energy_are_told_where_they_are_known() -> None:
    report = replace(
        REPORT,
        judged=replace(
            JUDGED,
            bound=Costs(latency=2e6, latency_p99=3e6, energy=5e6),
            measured=replace(REPORT.measured, latency_p90=2.1e6, latency_p99=2.5e6, energy=4e6),
            dense=replace(REPORT.dense, energy=9e6),
        ),
    )
    assert (report.latency_ms["p99"], report.latency_ms["budget_p99"], report.latency_ms["p90"]) == (2.5, 3.0, 2.1)
    assert report.energy_mj == {"dense": 9.0, "budget": 5.0, "predicted": None, "measured": 4.0}
    assert "tail     p99 2.5 ms measured, budget 3 ms" in str(report)
    assert "energy   4 mJ measured, budget 5 mJ, dense 9 mJ" in str(report)


SAMPLE = {
    "family": "least latency within no budget", "loss_bound": 0.01, "loss": 0.009, "score": 0.88, "error": 0.004,
    "costs": {"latency": 1.95e6, "size": 950}, "seconds": 12.0, "failed": "", "holds": True, "reused": False, "answer": True,
}  # fmt: skip
FLOOR = {
    "text": "98%", "least": 0.882, "held": True, "error": 0.004, "scored": 5000, "standard_errors": 2.0, "minimized": "latency",
    "search": {"by": "validate", "says": "by the task's `validate`", "dense": 0.91, "least": 0.8918},
    "samples": [SAMPLE, {**SAMPLE, "score": None, "holds": False, "failed": "it does not build", "answer": False}],
}  # fmt: skip


def test_a_floor_is_told_with_how_sure_it_is_and_every_sample(tmp_path: Path) -> None:
    report = replace(REPORT, floor=FLOOR)
    lines = str(report).splitlines()
    assert "floor    held: 0.8900 for 0.8820 (98%), by +2.0 standard errors of 0.0040 (binomial, 5,000 samples)" in lines
    assert "search   least latency, 2 sample(s) scored by the task's `validate`; there at least 0.8918, dense 0.9100" in lines
    assert (
        "sample   loss 0.009 predicted, at most 0.01: score 0.8800 ± 0.0040, holds, 1.95 ms, 950 bytes, 12 s, the answer" in lines
    )
    assert "sample   loss 0.009 predicted, at most 0.01: failed: it does not build" in lines
    assert any(line.startswith("budget   met after") for line in lines)
    report.save(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["floor"] == FLOOR
    unknown = replace(REPORT, floor={**FLOOR, "error": None, "scored": None, "standard_errors": None})
    assert "its noise is not known" in str(unknown)


def test_a_missed_floor_is_a_missed_budget() -> None:
    report = replace(REPORT, floor={**FLOOR, "held": False, "standard_errors": -1.5})
    assert (report.state, report.met, report.to_json()["state"]) == (State.MISSED, False, "missed")
    assert "floor    MISSED: 0.8900 for 0.8820 (98%), by -1.5 standard errors" in str(report)
    assert "budget   met after" in str(report), "the budgets hold"
    unbounded = replace(report, judged=replace(JUDGED, bound=Costs()))
    assert "budget   none after" in str(unbounded)


def test_how_far_predicted_losses_can_be_trusted_is_told() -> None:
    before = {"tau": 0.8, "within": 0.4, "ratio": 0.5, "networks": 48}
    after = {"tau": None, "within": 0.9, "ratio": 1.0, "networks": 48}
    told = str(replace(REPORT, interactions={"sum": before, "corrected": after, "passes": 96}))
    assert "trust    loss of 48 stitched networks (96 passes) as predicted: rank correlation not known, 90% within" in told
    assert "by the sum of losses alone rank correlation 0.80, 40% within a factor of 1.5" in told
    told = str(replace(REPORT, interactions={"sum": before, "corrected": None, "passes": 9}))
    assert "(9 passes) as predicted: by the sum of losses rank correlation 0.80" in told
    assert "trust" not in str(REPORT)

"""Runs with a floor, on a simulated device and a network whose score is a known falling function of its loss."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import falling
import pytest
import recovering
import tiny
import torch

import hwsearch as hs
from hwsearch.deployment.deploy import parse_variants, with_weights
from hwsearch.deployment.evaluate import predictor
from hwsearch.deployment.report import Report
from hwsearch.deployment.session import Session
from hwsearch.engine.setup import set_up
from hwsearch.errors import BackendUnavailable, BudgetMissed, Infeasible, InvalidInput
from hwsearch.graph.batching import BatchAxis
from hwsearch.loss.divergence import closeness
from hwsearch.pipeline.goal import Floor, Goal
from hwsearch.pipeline.scorer import binomial
from hwsearch.profiler.profile import without_times
from hwsearch.recovery.recovery import Recovery
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
STEEP = 2e4
law_of, task = partial(falling.law_of, STEEP), partial(falling.task, STEEP, 5000)


def run(folder: Path, floor: str, budgets: tuple[str, ...] = (), of: hs.Task | None = None, **options: Any) -> Any:
    fields = {"backend": falling.backend(), "minimize": "size", **options}
    return hs.run(of or task(), budgets, folder, floor=floor, **fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return folder, run(folder, "95%")


@pytest.fixture
def again(done: tuple[Path, Any], tmp_path: Path) -> Path:
    """A folder with all that the first run left."""
    return shutil.copytree(done[0], tmp_path / "again")


def test_the_floor_is_held_in_ten_samples_and_each_is_told(done: tuple[Path, Any]) -> None:
    folder, report = done
    own = report.floor
    assert own["held"]
    assert report.met
    assert report.score["deployed"] >= own["least"] == pytest.approx(0.95 * report.score["dense"])
    assert 1 <= len(own["samples"]) <= 10
    (answer,) = (s for s in own["samples"] if s["answer"])
    assert answer["holds"]
    assert answer["score"] >= own["search"]["least"]
    assert answer["costs"]["size"] == min(s["costs"]["size"] for s in own["samples"] if s["holds"])
    assert report.measured.size == answer["costs"]["size"] < report.dense.size
    told = str(report)
    assert told.count("sample   loss") == len(own["samples"])
    assert "by the task's `validate`" in told
    log = (folder / "run.log").read_text()
    assert log.count("sample   loss") == len(own["samples"])
    assert log.count("of at most 10: score") == len(own["samples"])
    saved = json.loads((folder / "report.json").read_text())
    assert saved["floor"] == own
    assert (saved["state"], saved["met"]) == ("met", True)
    assert hs.Allocation.load(folder / "alloc.json").solver["minimized"] == "size"
    assert (folder / "model.onnx").stat().st_size == report.size_bytes["deployed"]


@pytest.mark.slow
def test_nothing_that_a_hundred_points_find_is_much_smaller(done: tuple[Path, Any]) -> None:
    """Of the answers under a hundred bounds, none that is 3 % smaller holds the floor."""
    folder, report = done
    of, sens = task(), hs.SensitivityTable.load(folder / "sens.parquet")
    setup = set_up(of, falling.backend(), axes=["width", "precision", "storage"])
    table, found = without_times(setup), {}
    losses = [s["loss"] for s in report.floor["samples"]]
    low, high = math.log(min(losses)) - 1.0, math.log(max(losses)) + 1.0
    for i in range(100):
        bound = math.exp(low + (high - low) * i / 99)
        allocation = hs.search(table, sens, [f"loss={bound:.9f}"], minimize="size")
        found[str((allocation.variants, allocation.widths))] = allocation
    smaller = [a for a in found.values() if a.predicted["size_bytes"] < 0.97 * report.predicted.size]
    assert smaller, "the floor is what keeps it from being smaller"
    for allocation in smaller:
        own = with_weights(setup, allocation, folder / "weights")
        engine, _ = own.build(parse_variants(allocation), "fp32")
        score = of.validate(predictor(own.lowering, engine))
        assert score - (binomial(score, 5000) or 0.0) < report.floor["search"]["least"], allocation.predicted


def test_the_same_floor_again_measures_nothing_and_a_new_one_little(again: Path, done: tuple[Path, Any]) -> None:
    before = {p.name for p in (again / "samples").iterdir()}
    assert len(before) == 2 * len(done[1].floor["samples"])
    same = run(again, "95%")
    assert {p.name for p in (again / "samples").iterdir()} == before
    assert all(s["reused"] for s in same.floor["samples"])
    assert same.measured.size == done[1].measured.size
    other = run(again, "94.5%")
    new = [s for s in other.floor["samples"] if not s["reused"]]
    assert len(new) < len(before) / 2
    assert other.measured.size <= same.measured.size


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_samples(
    again: Path, done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(again / "samples")
    measured, real = [], Session.measure

    def measure(self: Session, wanted: Any) -> Any:
        if "sample" in wanted:
            if measured:
                raise KeyboardInterrupt
            measured.append(wanted)
        return real(self, wanted)

    monkeypatch.setattr(Session, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(again, "95%")
    monkeypatch.setattr(Session, "measure", real)
    report = run(again, "95%")
    assert [s["reused"] for s in report.floor["samples"]].count(True) == 1
    assert len(report.floor["samples"]) <= 10
    assert report.measured.size == pytest.approx(done[1].measured.size, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["the answer", "the next that does not hold", "another"])
def test_a_sample_that_cannot_be_read_is_measured_again(again: Path, done: tuple[Path, Any], which: str) -> None:
    """Where the answer rests on it; the others are used again, and the answer is as good."""
    before = sorted(done[1].floor["samples"], key=lambda s: s["loss"])
    answer = next(i for i, s in enumerate(before) if s["answer"])
    assert not before[answer + 1]["holds"], "an end of the bracket"
    lost = before[{"the answer": answer, "the next that does not hold": answer + 1, "another": answer - 1}[which]]
    own = [p for p in (again / "samples").glob("*.json") if "alloc" not in p.name]
    (damaged,) = (p for p in own if json.loads(p.read_text())["loss_bound"] == lost["loss_bound"])
    damaged.write_text("{")
    report = run(again, "95%")
    assert f"the sample {damaged} cannot be read" in (again / "run.log").read_text()
    found = report.floor["samples"]
    reused = [s["loss_bound"] for s in found if s["reused"]]
    assert sorted(reused) == sorted(s["loss_bound"] for s in before if s is not lost)
    new = len(found) - len(reused)
    assert new == 0 if which == "another" else 1 <= new < len(before)
    assert report.measured.size == pytest.approx(done[1].measured.size, rel=0.03)


@pytest.mark.slow
def test_failures_are_samples(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that could not be built do not hold, and count."""
    shutil.rmtree(again / "samples")
    real, count = Session.measure, []

    def measure(self: Session, wanted: Any) -> Any:
        if "sample" in wanted:
            count.append(1)
            if len(count) % 2:
                raise BackendUnavailable("it does not build")
        return real(self, wanted)

    monkeypatch.setattr(Session, "measure", measure)
    report = run(again, "95%", samples=4)
    assert len(count) == len(report.floor["samples"]) <= 4
    assert any(s["failed"] == "it does not build" and not s["holds"] for s in report.floor["samples"])
    assert "failed: it does not build" in str(report)


def test_the_final_score_is_taken_on_other_data_and_may_miss(again: Path) -> None:
    """`evaluate` finds a point less than `validate` promised: the floor breaks, by so many standard errors."""
    with pytest.raises(BudgetMissed, match=r"the floor breaks: the score is 0\.8\d+, and 95% is 0\.8550, by \d") as caught:
        run(again, "95%", of=task(evaluate=law_of(1, lowered=0.06)))
    report = caught.value.nearest
    assert isinstance(report, Report)
    assert caught.value.exit_code == 3
    assert report.state == "missed"
    assert "floor    MISSED: " in str(report)
    assert "budget   none" in str(report)
    assert json.loads((again / "report.json").read_text())["state"] == "missed"


def test_the_noise_of_scores_keeps_a_margin(done: tuple[Path, Any]) -> None:
    report = done[1]
    search = report.floor["search"]
    (answer,) = (s for s in report.floor["samples"] if s["answer"])
    assert answer["error"] == pytest.approx(binomial(answer["score"], 5000))
    assert answer["score"] - answer["error"] >= search["least"]
    final = report.score["deployed"]
    assert report.floor["error"] == pytest.approx(math.sqrt(final * (1 - final) / 5000), rel=0.01)
    assert report.floor["standard_errors"] == pytest.approx(
        (report.score["deployed"] - report.floor["least"]) / report.floor["error"]
    )
    assert "standard errors of 0.00" in str(report)
    assert "its noise is not known" not in str(report)


def test_budgets_that_break_are_named(again: Path) -> None:
    with pytest.raises(Infeasible, match=r"the budgets break, whatever the floor: .*the least size is") as caught:
        run(again, "95%", ("size=1%",))
    assert caught.value.least["size"] > 0
    begun = len(list((again / "samples").glob("*.alloc.json")))
    with pytest.raises(Infeasible, match=r"the floor breaks: nothing measured within macs=20% holds 99\.99%.*scores 0\.\d+"):
        run(again, "99.99%", ("macs=20%",))
    assert len(list((again / "samples").glob("*.alloc.json"))) - begun <= 2
    report = run(again, "95%", ("macs=95%",))
    assert report.macs["deployed"] <= 0.95 * report.macs["dense"]
    assert report.floor["held"]


def test_the_fastest_is_found_on_a_profile(tmp_path: Path) -> None:
    accuracy = task(evaluate=tiny.task("cnn").evaluate, validate=None, scored=32)
    report = run(tmp_path, "90%", of=accuracy, minimize=None)
    own = report.floor
    assert own["minimized"] == "latency"
    assert own["search"]["by"] == "agreement"
    assert "by agreement with the dense network" in str(report)
    assert own["search"]["least"] == pytest.approx(0.9)
    assert len(own["samples"]) <= 10
    assert report.latency_ms["measured"] <= report.latency_ms["dense"] * 1.01
    assert (tmp_path / "front.png").is_file()
    table = LatencyTable.load(tmp_path / "table.parquet")
    assert sum(b.role == "deployed" for b in table.builds) >= len(own["samples"])


@pytest.mark.slow
def test_nothing_holds_a_floor_of_all_but_the_dense_network(again: Path) -> None:
    report = run(again, "100%", samples=3)
    assert report.floor["held"]
    assert report.score["deployed"] == pytest.approx(report.score["dense"], abs=1e-6)
    assert sum(not s["reused"] for s in report.floor["samples"]) <= 3


@pytest.mark.slow
def test_the_final_score_is_that_of_the_trained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "_planned", lambda self, student: (24, 2e-3))
    runtime = SimulatedBackend(LatencyLaw.random(recovering.lowering().network), noise=0.003)
    report = hs.run(
        recovering.task(scored=256), [], tmp_path, backend=runtime, axes=["width"], floor="70%", minimize="macs", samples=4,
        recover_s=60.0,
    )  # fmt: skip
    assert report.recovery is not None
    assert report.recovery["kept"]
    assert report.score["deployed"] == report.recovery["score"]["recovered"]
    error = report.floor["error"]
    assert report.floor["standard_errors"] == pytest.approx((report.score["deployed"] - report.floor["least"]) / error)
    assert json.loads((tmp_path / "report.json").read_text())["floor"]["held"]


@pytest.mark.parametrize(
    ("text", "dense", "least"),
    [("99%", 0.9, 0.891), ("100 %", 0.9, 0.9), ("-0.5pt", 0.9, 0.895), ("-2PT", 0.9, 0.88), ("0pt", 0.9, 0.9), ("0.93", 0.95, 0.93),
     (0.93, 0.95, 0.93), ("-3.5", -2.0, -3.5), ("80", 93.1, 80.0)],
)  # fmt: skip
def test_floors_as_they_are_written(text: str | float, dense: float, least: float) -> None:
    assert Floor.parse(text).of(dense) == pytest.approx(least)


@pytest.mark.parametrize("text", ["", "high", "0%", "101%", "-5%", "0.5pt", "-100pt", "nan", "1e999", "99 percent"])
def test_malformed_floors_say_what_is_expected(text: str) -> None:
    with pytest.raises(InvalidInput, match="floor"):
        Floor.parse(text)


@pytest.mark.parametrize(("text", "dense"), [("99%", -1.0), ("99%", 0.0), ("-1pt", 93.0), ("0.95", 0.9)])
def test_floors_that_a_score_cannot_have(text: str, dense: float) -> None:
    with pytest.raises(InvalidInput, match="give a"):
        Floor.parse(text).of(dense)


def test_what_goes_with_a_floor_alone(tmp_path: Path) -> None:
    another = falling.backend()
    another.name = "another"
    assert Goal.of(None, None, 10) is None
    for options in ({"minimize": "size"}, {"samples": 3}, {"floor": "99%", "minimize": "memory"}, {"floor": "99%", "samples": 0}):
        with pytest.raises(InvalidInput, match="floor"):
            hs.run(task(), ["size=50%"], tmp_path, backend=falling.backend(), **options)
    with pytest.raises(InvalidInput, match="one runtime"):
        hs.run(task(), [], tmp_path, backend=[falling.backend(), another], floor="99%")
    with pytest.raises(InvalidInput, match="scored=0"):
        task(scored=0)
    with pytest.raises(InvalidInput, match="no budget was given"):
        hs.run(task(), [], tmp_path, backend=falling.backend())


def test_agreement_counts_classes_and_measures_numbers() -> None:
    dense = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[2.0, 1.0], [1.0, 0.0], [3.0, 0.0], [0.0, 9.0]])
    values, classes = closeness(other, dense, "auto")
    assert (values.tolist(), classes) == ([1.0, 0.0, 1.0, 1.0], True)
    values, classes = closeness(dense + 0.1, dense, "mse")
    assert classes is False
    assert values.tolist() == pytest.approx([1.0 - 0.01 / 0.5] * 4)
    both, _ = closeness((other, dense), (dense, dense), "auto")
    assert both.tolist() == [1.0, 0.5, 1.0, 1.0]
    tokens = torch.stack([dense, dense.flip(1)], 1)  # [4 samples, 2 positions, 2 classes]
    values, _ = closeness(tokens.flip(1), tokens, "kl")
    assert values.tolist() == [0.0] * 4
    rows, _ = closeness(dense.roll(1, 0), dense, "kl", [BatchAxis(0, each=2)])
    assert rows.tolist() == [0.0, 0.0]
    with pytest.raises(InvalidInput, match="no floating-point"):
        closeness(torch.arange(3), torch.arange(3), "auto")


def test_the_standard_error_of_a_share() -> None:
    assert binomial(0.9, 10_000) == pytest.approx(0.003, rel=0.01)
    assert 0 < binomial(1.0, 100) < 0.01  # a hundred right ones do not prove that all are
    assert binomial(0.9, None) is None
    assert binomial(93.0, 100) is None

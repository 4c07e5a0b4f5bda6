"""The whole line on a simulated device with a known latency law: budgets hold as measured, files are whole and used again."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnx
import pytest
import tiny
import torch

import hwsearch as hs
from hwsearch.allocate.costs import Costs
from hwsearch.cli import printing as show
from hwsearch.deployment.confirm import State
from hwsearch.errors import BudgetMissed, IncompatibleTables, Infeasible, InvalidInput
from hwsearch.latency.model import ErrorScale, LatencyModel, Prediction, fit
from hwsearch.latency.staircase import measured_widths
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.choices import candidate_widths
from hwsearch.pipeline import closed_loop as loop
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
FILES = {
    "table.parquet",
    "sens.parquet",
    "alloc.json",
    "model.onnx",
    "report.json",
    "front.png",
    "run.log",
    "front.parquet",
    "weights",
}
SCORE = 0.75


def task(name: str = "cnn") -> hs.Task:
    old = tiny.task(name)
    return hs.Task(old.model, old.example_inputs, old.calibration, lambda predict: SCORE, "simulated")


def backend(name: str = "cnn", **options: Any) -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(tiny.lowering(name).network), **{"noise": 0.003, **options})


def between(law: LatencyLaw, share: float) -> str:
    """A budget so far from all-int8 (0) to dense (1), at whole widths."""
    dense, coarse = (law.time_ns(dict.fromkeys(law.units, p)) for p in ("fp32", "int8"))
    return f"latency={100 * (coarse + share * (dense - coarse)) / dense:.3f}%"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hs.Task, Any]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        runtime = backend()
        return folder, task(), hs.run(task(), [between(runtime.law, -0.3)], folder, backend=runtime)


def test_the_budget_holds_and_every_file_is_there(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, report = done
    assert report.met
    assert report.latency_ms["measured"] <= report.latency_ms["budget"]
    assert {p.name for p in folder.iterdir()} == FILES
    assert report.size_bytes["deployed"] == (folder / "model.onnx").stat().st_size
    assert report.size_bytes["deployed"] <= report.size_bytes["predicted"]


def test_the_report_holds_what_is_promised(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    data = json.loads((folder / "report.json").read_text())
    assert {"task", "backend", "device", "met", "rounds", "uniform"} <= set(data)
    assert {"dense", "budget", "predicted", "sigma", "measured"} <= set(data["latency_ms"])
    assert data["score"] == {"dense": SCORE, "deployed": SCORE}
    assert {"predicted", "measured"} <= set(data["loss"])
    assert {"dense", "deployed"} <= set(data["size_bytes"])
    assert {"status", "gap"} <= set(data["solver"])
    assert data["widths"] == {g: [w, n] for g, (w, n) in data["widths"].items()}
    assert [n for _, n in data["widths"].values()] == list(tiny.lowering("cnn").network.channels.values())
    assert any(w < n for w, n in data["widths"].values())
    narrow = tiny.lowering("cnn").network.narrow({g: w for g, (w, _) in data["widths"].items()})
    assert data["macs"] == {
        "dense": tiny.lowering("cnn").network.macs,
        "budget": None,
        "deployed": narrow.macs,
    }


def test_what_is_deployed_is_really_narrower(done: tuple[Path, hs.Task, Any]) -> None:
    """Below what all-int8 takes no allocation of whole widths comes."""
    folder, _, report = done
    assert report.latency_ms["measured"] < min(u["latency_ms"] for u in report.uniforms)
    allocation = hs.Allocation.load(folder / "alloc.json")
    assert allocation.widths == {g: w for g, (w, _) in report.widths.items()}
    stored = {t.name: tuple(t.dims) for t in onnx.load(folder / "model.onnx").graph.initializer}
    narrow = tiny.lowering("cnn").network.narrow(allocation.widths)
    shapes = {tuple(sorted(s)) for s in stored.values()}
    assert {tuple(sorted(u.weight_shape)) for u in narrow.units} <= shapes


def test_another_budget_uses_the_table_and_the_sensitivities_again(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    before = LatencyTable.load(folder / "table.parquet")
    sensitivities = (folder / "sens.parquet").read_bytes()

    def entries() -> dict[Path, int]:
        files = (p for p in folder.rglob("*.safetensors") if p.parent.name != "allocations")
        return {p: p.stat().st_mtime_ns for p in files}

    weights = entries()
    assert weights
    assert hs.run(task(), [between(backend().law, 0.9)], folder, backend=backend()).met
    assert entries() == weights
    after = LatencyTable.load(folder / "table.parquet")
    assert [b.role for b in after.builds if b.role != "deployed"] == [
        b.role for b in before.builds if b.role != "deployed"
    ]
    assert (folder / "sens.parquet").read_bytes() == sensitivities


@pytest.mark.slow
def test_beside_a_budget_on_what_is_computed_every_measured_width_may_be_chosen(
    done: tuple[Path, hs.Task, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(done[0], tmp_path / "run")
    before = LatencyTable.load(folder / "table.parquet")
    before = before.with_header(grid={**before.grid(), "stem": [24, 16, 8]})  # as if the others were no faster
    before.save(folder / "table.parquet")
    assert before.grid()["stem"] != measured_widths(before)["stem"]
    report = hs.run(task(), ["macs=95%", between(backend().law, 0.9)], folder, backend=backend())
    assert report.met
    assert report.macs["deployed"] <= 0.95 * report.macs["dense"]
    scored = hs.SensitivityTable.load(folder / "sens.parquet").width_loss
    assert {g: sorted(own, reverse=True) for g, own in scored.items()} == measured_widths(before)
    after = LatencyTable.load(folder / "table.parquet")
    assert [b.role for b in after.builds if b.role != "deployed"] == [b.role for b in before.builds if b.role != "deployed"]


def test_budgets_on_what_is_computed_alone_need_no_profile(tmp_path: Path) -> None:
    """Any width may be chosen; latency is measured of the answer, and neither predicted nor bounded."""
    folder = tmp_path / "run"
    report = hs.run(task(), ["size=30%", "macs=40%"], folder, backend=backend())
    assert report.met
    assert {p.name for p in folder.iterdir()} == FILES - {"table.parquet", "front.png", "front.parquet"}
    assert report.latency_ms["predicted"] is report.latency_ms["sigma"] is report.latency_ms["budget"] is None
    assert 0 < report.latency_ms["measured"] < report.latency_ms["dense"]
    assert "not predicted, not bounded, dense" in str(report)
    assert report.size_bytes["deployed"] <= report.size_bytes["budget"]
    found = hs.Allocation.load(folder / "alloc.json")
    assert "latency_ns" not in found.predicted
    scored = hs.SensitivityTable.load(folder / "sens.parquet").width_loss
    channels = tiny.lowering("cnn").network.channels
    assert {g: sorted(own, reverse=True) for g, own in scored.items()} == {g: candidate_widths(n) for g, n in channels.items()}
    show.allocation(found, machine=False)
    with pytest.raises(Infeasible, match=r"the least size is .*made of the graph \d+% \(.*convolutions \d+% \(") as caught:
        hs.run(task(), ["size=1%"], folder, backend=backend())
    assert "so far" not in str(caught.value), "every width was searched"


def test_without_widths_every_channel_stays(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    report = hs.run(task(), [between(backend().law, 0.6)], folder, backend=backend(), axes=["precision"])
    assert report.met
    assert all(w == n for w, n in report.widths.values())
    assert report.macs["deployed"] == report.macs["dense"]
    assert len(set(report.variants.values())) == 2


def test_kept_layers_stay_whole(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    report = hs.run(task(), ["macs=85%"], folder, backend=backend(), keep=["stem"])
    assert report.met
    assert report.widths["stem"] == [24, 24]
    assert report.macs["deployed"] <= report.macs["budget"]
    with pytest.raises(InvalidInput, match="no layer is named like"):
        hs.run(task(), ["macs=85%"], folder, backend=backend(), keep=["classifier*"])


@pytest.mark.slow
def test_a_transformer_loses_heads_and_neurons(tmp_path: Path) -> None:
    report = hs.run(
        task("transformer"), ["macs=60%"], tmp_path, backend=backend("transformer"), axes=["width"]
    )
    assert report.met
    assert set(report.variants.values()) == {"dense.fp32"}
    assert any(w < n for w, n in report.widths.values())
    deployed = hs.deploy(task("transformer"), hs.Allocation.load(tmp_path / "alloc.json"), tmp_path / "again.onnx",
                         backend=backend("transformer"), weights=tmp_path / "weights")  # fmt: skip
    ours, theirs = (
        {t.name: t for t in onnx.load(tmp_path / name).graph.initializer}
        for name in ("again.onnx", "model.onnx")
    )
    assert ours == theirs
    assert isinstance(deployed.module, torch.nn.Module)


def test_dense_is_the_answer_where_it_meets_the_budget(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    table, sens = (
        LatencyTable.load(folder / "table.parquet"),
        hs.SensitivityTable.load(folder / "sens.parquet"),
    )
    allocation = hs.search(table, sens, ["latency=1x"])
    assert allocation.uniform == "dense.fp32"
    assert allocation.predicted["loss"] == 0.0


def test_the_dense_network_is_within_itself(tmp_path: Path) -> None:
    """Every engine is off by a few per cent: whatever another one built of the dense network takes, it is 100 %."""
    law = LatencyLaw.random(tiny.lowering("cnn").network, precisions=("fp32", "bf16", "int8"))
    runtime = backend(bases=("bf16", "fp32"), build_noise=0.02, seed=2)
    runtime.law = law
    report = hs.run(task(), ["latency=100%"], tmp_path, backend=runtime, axes=["precision"])
    assert report.met
    assert report.rounds == 1


def test_what_an_answer_leaves_over_is_spent_on_less_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is very unsure keeps far from the budget; the round after the first one asks for what was left."""
    law = LatencyLaw.random(tiny.lowering("cnn").network)
    budget = [between(law, 0.8)]

    def loss(where: str, spare: float) -> tuple[float, int]:
        monkeypatch.setattr(loop, "SPARE", spare)
        report = hs.run(task(), budget, tmp_path / where, backend=backend(), axes=["precision"])
        assert report.met
        deployed = sum(
            b.role == "deployed" for b in LatencyTable.load(tmp_path / where / "table.parquet").builds
        )
        return report.loss["measured"], deployed

    def unsure(table: LatencyTable, **options: Any) -> LatencyModel:
        model = fit(table, **options)
        model.error_scale = ErrorScale(1.0, 0.12)
        return model

    monkeypatch.setattr(loop, "fit", unsure)
    kept, one = loss("kept", 10.0)
    spent, two = loss("spent", 0.025)
    assert (one, two) == (1, 2)
    assert spent < kept


@pytest.mark.parametrize(
    ("predicted_ns", "limit_ns"),
    [(95e4, 0.98 * (1.01e6 + 1e6 / 0.95) / 2), (99e4, 0.98 * ((99 / 95 + 0.01) * 1e6 + 1e6 / 0.95) / 2), (5e6, 1.15e6)],
)  # fmt: skip
def test_a_round_that_spends_asks_for_what_the_model_has_not_learnt(
    predicted_ns: float, limit_ns: float
) -> None:
    """0.95 ms measured of 1 ms. What the model says of it now: just that, or still too much, or something absurd."""
    judged = SimpleNamespace(upper=Costs(latency=0.96e6))
    report: Any = SimpleNamespace(measured=Costs(latency=0.95e6, size=1.0), bound=Costs(latency=1e6), judged=judged)
    last = loop.Round(cast(Any, None), report)
    found = loop.looser({"latency": 1_000_000, "size": 7}, last, Prediction(predicted_ns, 0.01 * predicted_ns))
    assert found == {"latency": pytest.approx(limit_ns, abs=1.0), "size": 7}
    assert loop.looser({"latency": 2_000_000}, last, Prediction(predicted_ns, 0.0))["latency"] == 2_000_000


def test_the_next_round_asks_for_less_by_what_the_model_has_not_learnt() -> None:
    """1.1 ms measured of 1 ms, predicted as 1 ms before: the limit falls by what the model still misses, and stays else."""
    costs = Costs(latency=1e6, latency_p99=2e6, size=10.0, macs=5.0)
    before: Any = SimpleNamespace(costs=costs)
    measured = Costs(latency=1.1e6, latency_p99=2.5e6, size=9.0, macs=5.0)
    bound = Costs(latency=1e6, latency_p99=2e6, size=9.5)
    judged = SimpleNamespace(measured=measured, bound=bound, now=Costs(), bound_now=Costs())
    report: Any = SimpleNamespace(bound=bound, rounds=1, judged=judged, state=State.MISSED)
    last = loop.Round(before, report)
    blind = loop.tighter({}, last, Prediction(1e6, 1e4))
    assert blind == {"latency": int(1e6 / 1.1 * 0.996), "latency_p99": int(2e6 * 2 / 2.5 * 0.996)}
    learnt = loop.tighter({}, last, Prediction(1.1e6, 1e4))
    assert learnt == {"latency": int(1e6 * 0.996), "latency_p99": int(2e6 * 2.2 / 2.5 * 0.996)}
    assert loop.tighter({"latency": 7, "size": 3}, last, Prediction(1e6, 1e4)) == {**blind, "latency": 7, "size": 3}


def test_an_impossible_budget_names_the_least(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    table, sens = (
        LatencyTable.load(folder / "table.parquet"),
        hs.SensitivityTable.load(folder / "sens.parquet"),
    )
    with pytest.raises(Infeasible, match="least") as caught:
        hs.search(table, sens, ["latency=1us"])
    assert caught.value.least["latency"] > 1000
    assert caught.value.exit_code == 3


def test_malformed_budgets_are_usage_errors(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    table, sens = (
        LatencyTable.load(folder / "table.parquet"),
        hs.SensitivityTable.load(folder / "sens.parquet"),
    )
    for text in ("latency", "latency=", "latency=-1ms", "latency=2MB", "speed=3", "latency=nan%"):
        with pytest.raises(InvalidInput):
            hs.search(table, sens, [text])
    with pytest.raises(InvalidInput, match="a budget on loss is for"):
        hs.run(task(), ["loss=0.01"], folder, backend=backend())


@pytest.mark.slow
def test_a_device_that_is_slower_than_its_table_ends_in_budget_missed(tmp_path: Path) -> None:
    """The mixed allocations that the search picks run far slower than the table said: five rounds, then an honest end."""
    runtime = backend()
    folder = tmp_path / "run"
    hs.run(task(), [between(runtime.law, 0.9)], folder, backend=runtime)
    slower = _SlowWhenMixed(LatencyLaw.random(tiny.lowering("cnn").network))
    with pytest.raises(BudgetMissed) as caught:
        hs.run(task(), [between(runtime.law, 0.5)], folder, backend=slower, axes=["precision"])
    assert caught.value.exit_code == 3
    report = json.loads((folder / "report.json").read_text())
    assert report["met"] is False
    assert report["rounds"] <= 5


def test_an_absolute_budget_holds_on_the_clock_of_a_machine_at_half_speed(done: tuple[Path, hs.Task, Any]) -> None:
    """The table is of a machine twice as fast: what is met takes no longer now, and what cannot be met says why."""
    folder, _, _ = done
    table = LatencyTable.load(folder / "table.parquet")
    slow = backend(drift=lambda second: 2.0)
    report = hs.run(task(), [f"latency={1.8 * table.dense_ns:.0f}ns"], folder, backend=slow)
    assert report.state != State.MISSED
    assert report.latency_ms["measured_now"] <= report.latency_ms["budget"]
    assert report.latency_ms["measured"] == pytest.approx(report.latency_ms["measured_now"] / 2, rel=0.05)
    assert "now      " in str(report)
    low = min(b.ratio for b in table.builds) * table.header.reference_ns
    with pytest.raises((Infeasible, BudgetMissed), match=r"slower now than when the table was made|no allocation met"):
        hs.run(task(), [f"latency={1.2 * low:.0f}ns"], folder, backend=backend(drift=lambda second: 2.0))
    share = hs.run(task(), [between(slow.law, 0.9)], folder, backend=backend(drift=lambda second: 2.0))
    assert share.state != State.MISSED, "a share is of the dense network at the same speed"


def test_two_runs_into_one_folder_take_turns(tmp_path: Path) -> None:
    """The one that comes second says for whom it waits, and uses what the first left."""
    said, reports = io.StringIO(), []
    budget = between(backend().law, 0.8)

    def run() -> None:
        reports.append(
            hs.run(task(), [budget], tmp_path, backend=backend(), axes=["precision"], progress=Progress(said))
        )

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.state == State.MISSED for r in reports] == [False, False]
    assert f"{tmp_path} is in use by pid {os.getpid()}" in said.getvalue()
    made = [b.role for b in LatencyTable.load(tmp_path / "table.parquet").builds]
    assert made.count("deployed") >= 2, "of both"
    assert made.count("dense") == 1, "profiled once"
    assert not list(tmp_path.glob("round*.onnx"))
    assert hs.Allocation.load(tmp_path / "alloc.json")


class _SlowWhenMixed(SimulatedBackend):
    """Everything that is not dense takes three times what the law says."""

    def __init__(self, law: LatencyLaw) -> None:
        super().__init__(law)

    def build(self, onnx: bytes, options: Any) -> Any:
        engine = super().build(onnx, options)
        if b"/int8" in onnx:  # the name of a quantized constant
            engine.time_ns *= 3
        return engine


def test_a_table_of_another_network_is_refused(done: tuple[Path, hs.Task, Any]) -> None:
    folder, _, _ = done
    other = tiny.task("transformer")
    with pytest.raises(IncompatibleTables, match="network"):
        hs.profile(other, out=folder / "table.parquet", backend=backend())


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_the_residual_width_on_request(tmp_path: Path) -> None:
    """It is narrowed where asked, and every later step knows that it was from the allocation alone."""
    runtime = SimulatedBackend(LatencyLaw.random(trace_residual().network), noise=0.003)
    tiny_task, axes = task("transformer"), ["width", "precision", "residual"]
    # a budget on MACs asks little of the table, and each build of this axis is exported anew
    hs.profile(tiny_task, out=tmp_path / "table.parquet", backend=runtime, axes=axes, builds=4)
    report = hs.run(tiny_task, ["macs=40%"], tmp_path, backend=runtime, axes=axes)
    assert report.met
    assert report.options["residual"] is True
    narrowed = {g for g, (kept, whole) in report.widths.items() if kept < whole}
    assert set(trace_residual().network.channels) - set(tiny.lowering("transformer").network.channels)
    allocation = hs.Allocation.load(tmp_path / "alloc.json")
    again = hs.deploy(
        tiny_task, allocation, tmp_path / "again.onnx", backend=runtime, weights=tmp_path / "weights"
    )
    assert again.size_bytes == report.size_bytes["deployed"]
    assert narrowed
    with pytest.raises(IncompatibleTables, match="residual"):
        hs.run(tiny_task, ["macs=40%"], tmp_path, backend=runtime)


def trace_residual() -> Lowering:
    return Lowering(tiny.task("transformer"), residual=True)


def test_a_budget_on_a_tail_of_the_latency(done: tuple[Path, hs.Task, Any]) -> None:
    """The 99th percentile of single inferences is bounded as measured, and predicted from all raw samples."""
    folder, _, _ = done
    table = LatencyTable.load(folder / "table.parquet")
    ratio = table.tail(0.99)
    assert ratio > 1.0
    dense_ms = table.dense_ns / 1e6
    budget = 0.7 * dense_ms
    report = hs.run(task(), [f"latency_p99={budget:.6f}ms"], folder, backend=backend(noise=0.02))
    assert report.met
    assert report.latency_ms["budget_p99"] == pytest.approx(budget, rel=1e-4)
    assert report.latency_ms["measured"] < report.latency_ms["p99"] <= report.latency_ms["budget_p99"]
    assert report.latency_ms["p90"] <= report.latency_ms["p95"] <= report.latency_ms["p99"]
    assert "tail     p99" in str(report)
    allocation = hs.Allocation.load(folder / "alloc.json")
    assert allocation.predicted["latency_p99_ns"] == pytest.approx(
        allocation.predicted["latency_ns"] * LatencyTable.load(folder / "table.parquet").tail(0.99), rel=0.05
    )
    with pytest.raises(Infeasible, match="latency_p99") as caught:
        hs.run(task(), ["latency_p99=1us"], folder, backend=backend())
    assert set(caught.value.least) == {"latency_p99"}

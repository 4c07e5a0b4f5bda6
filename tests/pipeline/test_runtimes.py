"""Several runtimes: shares are of the fastest dense network, the best answer is kept, and what failed is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import hwsearch as hs
from hwsearch import backends
from hwsearch.allocate.budget import Budget
from hwsearch.errors import BackendUnavailable, BudgetMissed, Infeasible, InvalidInput
from hwsearch.pipeline.runtimes import of_own
from hwsearch.plot import plot_fronts
from hwsearch.progress import Progress
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


class Another(SimulatedBackend):
    """A second runtime on the device of the first: it shares its clock."""

    def __init__(self, name: str, first: SimulatedBackend, law: LatencyLaw, **options: Any) -> None:
        self.name, self.first = name, first  # type: ignore[misc]
        super().__init__(law, **options)

    def clock(self) -> int:
        return self.first.clock()

    def advance(self, time_ns: float) -> None:
        self.first.advance(time_ns)


def task() -> hs.Task:
    old = tiny.task("cnn")
    return hs.Task(old.model, old.example_inputs, old.calibration, lambda predict: 0.75, "simulated")


def scaled(law: LatencyLaw, factor: float) -> LatencyLaw:
    """The same device, slower."""
    units = {u: {p: t * factor for p, t in times.items()} for u, times in law.units.items()}
    boundaries = {pair: (fixed * factor, each * factor) for pair, (fixed, each) in law.boundaries.items()}
    rest = {name: getattr(law, name) * factor for name in ("rest_ns", "end_ns", "dispatch_ns", "node_ns")}
    return replace(law, units=units, boundaries=boundaries, **rest)


def two(factor: float = 2.0, **options: Any) -> tuple[SimulatedBackend, Another]:
    law = LatencyLaw.random(tiny.lowering("cnn").network)
    first = SimulatedBackend(law, noise=0.003)
    return first, Another("second", first, scaled(law, factor), noise=0.003, **options)


@pytest.mark.parametrize(
    ("text", "ratio", "own"),
    [
        ("latency=60%", 2.0, "latency=30%"),
        ("latency=2x", 1.5, "latency=3x"),
        ("latency_p99=50%", 3.0, "latency_p99=16.66%"),
        ("latency=2x", 4 / 3, "latency=2.667x"),
        ("latency=4ms", 2.0, "latency=4ms"),
        ("size=50%", 2.0, "size=50%"),
    ],
)
def test_a_share_is_of_the_fastest_dense_network(text: str, ratio: float, own: str) -> None:
    """And never looser than what was asked."""
    (budget,) = of_own([Budget.parse(text)], ratio)
    assert str(budget) == own


def test_the_names_of_several() -> None:
    assert [b.name for b in backends.several("openvino, onnxruntime")] == ["openvino", "onnxruntime"]
    assert {"openvino", "onnxruntime"} <= {b.name for b in backends.several("all")}
    own = two()[0]
    assert backends.several(own) == (own,)
    for wrong in ("openvino,openvino", "", []):
        with pytest.raises(InvalidInput, match="backend"):
            backends.several(wrong)


def test_the_best_of_two_is_kept(tmp_path: Path) -> None:
    """The one that is twice as slow has to lose more for the same time; both are in the report and in the picture."""
    first, second = two()
    report = hs.run(task(), ["latency=80%"], tmp_path, backend=[second, first], time_limit_s=60.0)
    assert report.met
    assert report.backend == "simulated"
    lines = {line["backend"]: line for line in report.runtimes}
    assert lines["simulated"]["dense_over_fastest"] == 1.0
    assert lines["second"]["dense_over_fastest"] == pytest.approx(2.0, rel=0.02)
    assert "runtime  second: " in str(report)
    assert lines["second"]["state"] == "missed" or lines["second"]["loss"] > lines["simulated"]["loss"]
    assert json.loads((tmp_path / "report.json").read_text())["runtimes"] == report.runtimes
    assert hs.Allocation.load(tmp_path / "alloc.json").backend == "simulated"
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "simulated" / "model.onnx").read_bytes()
    assert (tmp_path / "front.png").stat().st_size > 10_000
    for name in ("simulated", "second"):
        assert (tmp_path / name / "table.parquet").exists()
    log = (tmp_path / "run.log").read_text()
    assert "its dense network takes" in log
    assert "round 1" in log


def test_a_runtime_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """It builds the dense network for the comparison, and nothing afterwards."""
    first, second = two(failing=range(1, 1000))
    report = hs.run(task(), ["latency=80%"], tmp_path, backend=[first, second], time_limit_s=60.0)
    assert report.met
    (line,) = [line for line in report.runtimes if "error" in line]
    assert line["backend"] == "second"
    assert "fails on build" in line["error"]
    assert "no answer" in str(report)


@pytest.mark.slow
def test_none_that_can_is_infeasible(tmp_path: Path) -> None:
    first, second = two()
    with pytest.raises((Infeasible, BudgetMissed), match=r"no runtime can meet|none met") as caught:
        hs.run(task(), ["latency=1%"], tmp_path, backend=[first, second], axes=["precision"], time_limit_s=60.0)
    assert "second" in str(caught.value)
    broken = two(failing=range(1000))
    with pytest.raises(BackendUnavailable, match="fails on build"):
        hs.run(task(), ["latency=80%"], tmp_path / "b", backend=broken, time_limit_s=60.0)


def test_a_log_within_a_log(tmp_path: Path) -> None:
    """What an inner block says is in both files, and the outer one goes on."""
    progress = Progress.silent()
    with progress.logged(tmp_path / "a"):
        with progress.logged(tmp_path / "b"):
            progress.say("inner")
        progress.say("outer")
    assert "inner" in (tmp_path / "a").read_text()
    assert "outer" in (tmp_path / "a").read_text()
    assert "inner" in (tmp_path / "b").read_text()
    assert "outer" not in (tmp_path / "b").read_text()


def test_fronts_want_latency() -> None:
    with pytest.raises(InvalidInput, match="over latency"):
        plot_fronts({})

"""A run with recovery: the answer is trained, exported, measured again, and replaces the refitted one where it is better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import recovering
from onnx import numpy_helper

import hwsearch as hs
from hwsearch.errors import HwsearchError, InvalidInput
from hwsearch.pipeline.allowance import RECOVERY
from hwsearch.plot import plot_recovery
from hwsearch.progress import Progress
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
BUDGET = "macs=25%"


def backend() -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(recovering.lowering().network), noise=0.003)


def run(folder: Path, **options: Any) -> Any:
    fields = {"backend": backend(), "axes": ["width"], **options}
    return hs.run(recovering.task(), [BUDGET], folder, **fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Recovery, "_planned", lambda self, student: (24, 2e-3))
        return folder, run(folder, recover_s=120.0, gradients="1:2:mvue")


def test_the_report_has_both_scores_the_time_and_the_curve(done: tuple[Path, Any]) -> None:
    folder, report = done
    own = report.recovery
    assert own["kept"]
    assert own["gradients"]["rule"] == "1:2:mvue"
    assert 0.4 < own["gradients"]["zeros"] < 1.0
    assert ", gradients 1:2:mvue)" in str(report)
    assert own["held_out"]["recovered"] < own["held_out"]["refitted"]
    assert own["score"].keys() == {"dense", "refitted", "recovered"}
    assert report.score["deployed"] == own["score"]["recovered"]
    assert own["latency_ms"]["recovered"] == report.latency_ms["measured"]
    assert own["latency_ms"]["recovered"] == pytest.approx(own["latency_ms"]["refitted"], rel=0.05)  # of one engine's shape
    assert json.loads((folder / "report.json").read_text())["recovery"]["curve"] == own["curve"]
    assert f"score {own['score']['recovered']:.4f}, {own['score']['refitted']:.4f} refitted" in str(report)
    assert (folder / "recover.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_that_is_left_is_the_trained_one_in_the_same_shapes(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, report = done
    chosen = hs.Allocation.load(folder / "alloc.json")
    files = {}
    for name, weights in (("trained", folder / "trained.safetensors"), ("refitted", folder / "weights")):
        path = tmp_path / f"{name}.onnx"
        hs.deploy(recovering.task(), chosen, path, backend=backend(), weights=weights)
        files[name] = path.read_bytes()
    assert (folder / "model.onnx").read_bytes() == files["trained"]
    assert files["trained"] != files["refitted"]
    shapes = [
        {t.name: numpy_helper.to_array(t).shape for t in onnx.load_from_string(data).graph.initializer} for data in files.values()
    ]
    assert shapes[0] == shapes[1]
    assert not list(folder.glob("recovered.onnx"))
    assert not list(folder.glob("*.begun"))
    verified = hs.verify(recovering.task(), chosen, backend=backend(), weights=folder / "trained.safetensors")
    assert verified.score["deployed"] == report.score["deployed"]


def test_an_answer_that_cannot_be_trained_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Recovery) -> Any:
        raise HwsearchError("no memory")

    monkeypatch.setattr(Recovery, "run", fail)
    with pytest.warns(UserWarning, match="stays as refitted, as it could not be trained: no memory"):
        report = run(tmp_path, recover_s=60.0)
    assert report.recovery is None
    assert (tmp_path / "model.onnx").is_file()
    assert not (tmp_path / "trained.safetensors").exists()


def test_recovery_is_of_the_time_limit_and_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[dict[str, float]] = []
    real = Progress.plan

    def plan(self: Progress, stages: Any, again_s: float = 0.0) -> None:
        planned.append(dict(stages))
        real(self, stages, again_s)

    monkeypatch.setattr(Progress, "plan", plan)

    def fail(self: Recovery) -> Any:
        assert self.options == Options(time_limit_s=100.0, seed=3, scored=False, scales="learned", batchnorm="unfolded")
        raise HwsearchError("enough")

    monkeypatch.setattr(Recovery, "run", fail)
    with pytest.warns(UserWarning, match="enough"):
        run(tmp_path, recover_s=100.0, time_limit_s=500.0, seed=3, scales="learned", batchnorm="unfolded")
    assert planned[-1][RECOVERY] == 100.0
    with pytest.raises(InvalidInput, match=r"10 min 00 s of recovery are of the run's time limit, 1 min 40 s"):
        run(tmp_path, recover_s=600.0, time_limit_s=100.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gradients": "4:2", "recover_s": 60.0}, "unknown gradients '4:2'"), ({"gradients": "2:4"}, "give --recover"),
     ({"scales": "learned"}, "the answer is not trained; give"), ({"scales": "odd", "recover_s": 60.0}, "unknown scales 'odd'")],
)  # fmt: skip
def test_how_to_train_is_refused_before_anything_is_measured(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()


def test_the_picture_shows_what_is_kept(done: tuple[Path, Any]) -> None:
    own = done[1].recovery
    (axes,) = plot_recovery(own).axes
    kept = next(line for line in axes.lines if line.get_label() == "kept")
    assert list(kept.get_xdata()) == [own["best_step"]]
    assert list(kept.get_ydata()) == [own["held_out"]["recovered"]]

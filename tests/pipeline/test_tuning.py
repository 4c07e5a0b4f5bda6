"""hs.bayes on a simulated device, and a network whose score is a known falling function of what it loses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import falling
import onnxruntime
import pytest
import recovering
import tiny
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.deployment.session import Session
from hwsearch.errors import BackendUnavailable, BudgetMissed, InvalidInput
from hwsearch.pipeline.knobs import TOLERANCE
from hwsearch.pipeline.scorer import binomial
from hwsearch.pipeline.tuning import Tuned
from hwsearch.recovery.recovery import Recovery
from hwsearch.recovery.training import Diverged
from hwsearch.schemes import Allocate, Compose, FilterPrune, Free, Prune, Quantize
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
STEEP = 2e3
law_of, task = partial(falling.law_of, STEEP), partial(falling.task, STEEP, 50_000)
SCHEME = Compose(Prune(), Quantize("int8"))


def bayes(folder: Path, floor: str = "95%", scheme: Any = SCHEME, of: hs.Task | None = None, **options: Any) -> Tuned:
    return hs.bayes(of or task(), scheme, folder, floor=floor, **{"backend": falling.backend(), **options})


@pytest.fixture(scope="module", autouse=True)
def few_places() -> Iterator[None]:
    """A prior from fewer networks, so that it is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwsearch.pipeline.knobs.GRID", {1: 3, 2: 3, 3: 2})
        patch.setattr("hwsearch.pipeline.knobs.HALVINGS", 3)
        yield


@pytest.fixture(scope="module")
def done(few_places: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    folder = tmp_path_factory.mktemp("bayes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return folder, bayes(folder)


@pytest.fixture
def again(done: tuple[Path, Tuned], tmp_path: Path) -> Path:
    """A folder with all that the first search left."""
    return shutil.copytree(done[0], tmp_path / "again")


def test_one_sample_gives_an_answer_and_is_a_folder(tmp_path: Path) -> None:
    found = bayes(tmp_path, "80%", samples=1)
    assert found.met
    (sample,) = found.floor["samples"]
    (own,) = (tmp_path / "samples").iterdir()
    assert json.loads((own / "sample.json").read_text())["values"] == sample["values"]
    tensors = load_file(own / "weights.safetensors")
    assert all(torch.equal(tensors[n], t) for n, t in SCHEME(task(), **sample["values"]).task.model.state_dict().items())
    assert json.loads((tmp_path / "report.json").read_text())["values"] == found.values
    assert all((tmp_path / name).stat().st_size > 0 for name in ("model.onnx", "bayes.png", "run.log"))


@pytest.mark.slow
def test_the_floor_is_held_in_ten_samples_and_each_is_a_folder(done: tuple[Path, Tuned]) -> None:
    folder, found = done
    samples = found.floor["samples"]
    assert found.met
    assert 1 <= len(samples) <= 10
    assert [s["number"] for s in samples] == list(range(1, len(samples) + 1))
    (answer,) = (s for s in samples if s["answer"])
    assert answer["values"] == found.values
    assert answer["costs"]["size"] == min(s["costs"]["size"] for s in samples if s["holds"]) == found.measured.size
    assert answer["score"] - answer["error"] >= found.floor["search"]["least"] == pytest.approx(0.95 * falling.DENSE)
    assert answer["error"] == pytest.approx(binomial(answer["score"], 50_000))
    assert found.score["deployed"] >= found.floor["least"]
    told = str(found)
    assert told.count("\nsample   ") == len(samples)
    saved = json.loads((folder / "report.json").read_text())
    assert saved["floor"] == json.loads(json.dumps(found.floor))
    assert (saved["met"], saved["values"]) == (True, found.values)
    folders = sorted((folder / "samples").iterdir())
    assert len(folders) == len(samples)
    for own in folders:
        sample = json.loads((own / "sample.json").read_text())
        assert sample["values"] in [s["values"] for s in samples]
        assert {"score", "error", "seconds", "bytes"} <= set(sample)
        assert sample["costs"]["latency"] > 0
        small = SCHEME(task(), **sample["values"])
        tensors = load_file(own / "weights.safetensors")
        assert all(torch.equal(tensors[n], t) for n, t in small.task.model.state_dict().items())
        assert sample["bytes"]["packed"] == small.footprint.packed_bytes == sample["costs"]["size"]
    assert (folder / "bayes.png").stat().st_size > 0
    assert (folder / "model.onnx").is_file()
    assert (folder / "run.log").read_text().count("of at most 10") == len(samples)


@pytest.mark.slow
def test_nothing_that_a_hundred_densities_find_is_smaller_by_more_than_the_tolerance(done: tuple[Path, Tuned]) -> None:
    found, of = done[1], task()
    assert found.values is not None
    least = 0.95 * falling.DENSE
    for n in range(100):
        density = n / 100.0
        if density < found.values["density"] - TOLERANCE - 1e-6:
            score = of.validate(SCHEME(of, density=density).task.model)
            assert score - (binomial(score, 50_000) or 0.0) < least + 1e-6, density


@pytest.mark.slow
def test_the_same_floor_again_measures_nothing_and_another_one_little(again: Path, done: tuple[Path, Tuned]) -> None:
    before = {p.name for p in (again / "samples").iterdir()}
    same = bayes(again)
    assert {p.name for p in (again / "samples").iterdir()} == before
    assert all(s["reused"] for s in same.floor["samples"])
    assert same.values == done[1].values
    other = bayes(again, "93%")
    new = [s for s in other.floor["samples"] if not s["reused"]]
    assert len(new) <= 4
    assert other.met
    assert other.values is not None
    assert same.values is not None
    assert other.values["density"] <= same.values["density"]
    assert other.measured["size"] <= same.measured["size"]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_samples(
    tmp_path: Path, done: tuple[Path, Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, real = [], Session.measure

    def measure(self: Session, wanted: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(wanted)
        return real(self, wanted)

    monkeypatch.setattr(Session, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bayes(tmp_path)
    monkeypatch.setattr(Session, "measure", real)
    found = bayes(tmp_path)
    assert [s["reused"] for s in found.floor["samples"]] == [True] + [False] * (len(done[1].floor["samples"]) - 1)
    assert found.values == done[1].values


@pytest.mark.slow
def test_a_scheme_that_makes_other_weights_uses_no_sample_of_before(again: Path) -> None:
    other = Compose(Prune(skip="head"), Quantize("int8"))
    found = bayes(again, scheme=other, samples=3)
    pruned = [s for s in found.floor["samples"] if s["values"]["density"] < 1.0]  # at 1 both make the same weights
    assert pruned
    assert not any(s["reused"] for s in pruned)


@pytest.mark.slow
def test_failures_are_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = Session.measure, []

    def measure(self: Session, wanted: Any) -> Any:
        if "sample" in wanted:
            count.append(1)
            if len(count) % 2:
                raise BackendUnavailable("it does not build")
        return real(self, wanted)

    monkeypatch.setattr(Session, "measure", measure)
    found = bayes(tmp_path, samples=4)
    assert len(count) == len(found.floor["samples"]) <= 4
    failed = [s for s in found.floor["samples"] if s["failed"]]
    assert failed
    assert not any(s["holds"] or s["answer"] for s in failed)
    assert "failed: it does not build" in str(found)
    assert found.met


@pytest.mark.slow
def test_the_final_score_is_taken_on_other_data_and_may_miss(again: Path) -> None:
    with pytest.raises(BudgetMissed, match=r"the floor breaks: the score is 0\.\d+, and 95% is 0\.8550") as caught:
        bayes(again, of=task(evaluate=law_of(1, lowered=0.06)))
    assert isinstance(caught.value.nearest, Tuned)
    assert caught.value.exit_code == 3
    assert json.loads((again / "report.json").read_text())["met"] is False
    assert "MISSED" in str(caught.value.nearest)


@pytest.mark.slow
def test_where_nothing_cheaper_holds_the_dense_network_is_the_answer(tmp_path: Path) -> None:
    found = bayes(tmp_path, "100%", scheme=Compose(Prune(), Quantize(2)))
    assert found.values is None
    assert found.met
    assert found.measured.size == found.dense.size
    assert len(found.floor["samples"]) <= 2, "at the greatest density it does not hold, so that nothing does"
    assert "the dense network" in str(found)


@pytest.mark.slow
def test_the_fastest_filters_are_found_by_measured_latency(tmp_path: Path) -> None:
    found = bayes(tmp_path, "80%", scheme=FilterPrune(Free("filters", 0.3, 1.0)), minimize="latency")
    assert found.met
    assert len(found.floor["samples"]) <= 10
    assert found.measured["latency"] <= found.dense["latency"]
    (answer,) = (s for s in found.floor["samples"] if s["answer"])
    held = [s["costs"]["latency"] for s in found.floor["samples"] if s["holds"]]
    assert answer["costs"]["latency"] == min(held)


@pytest.mark.slow
def test_two_knobs_are_searched_and_drawn(tmp_path: Path) -> None:
    scheme = Compose(Prune(), Quantize(Free("bits", 2, 8, whole=True)))
    found = bayes(tmp_path, "90%", scheme=scheme)
    assert found.met
    assert found.values is not None
    assert isinstance(found.values["bits"], int)
    assert len(found.floor["samples"]) <= 10
    assert found.posterior is not None
    assert found.posterior["knobs"] == ["density", "bits"]
    assert (tmp_path / "bayes.png").stat().st_size > 0


@pytest.mark.slow
def test_without_validate_samples_are_scored_by_agreement(tmp_path: Path) -> None:
    of = task(evaluate=tiny.task("cnn").evaluate, validate=None, scored=32)
    found = bayes(tmp_path, "90%", of=of, samples=4)
    assert found.floor["search"]["by"] == "agreement"


def stripes() -> hs.Task:
    """A task whose training brings back what pruning costs, with 1,024 images to score samples on."""
    x, y = recovering.images(1024, seed=5)

    def validate(predict: hs.task.Predict) -> float:
        return float((predict(x).argmax(1) == y).float().mean())

    return recovering.task(train=recovering.train, loss=F.cross_entropy, validate=validate, validated=1024, scored=256)


def trained(folder: Path, recover: str = "mask:epochs=3,lr=2e-3", **options: Any) -> Tuned:
    backend = SimulatedBackend(LatencyLaw.random(recovering.lowering().network), noise=0.003)
    scheme = Compose(Prune(Free("density", 0.02, 0.5)), Quantize("int8"))
    fields = {"floor": "90%", "scheme": scheme, "samples": 2, "backend": backend, **options}
    return bayes(folder, of=stripes(), recover=recover, **fields)


def test_samples_are_trained_and_the_answer_is_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real = [], Recovery.run
    monkeypatch.setattr(Recovery, "run", lambda self: runs.append(self) or real(self))
    found = trained(tmp_path)
    assert found.met
    assert found.values is not None
    assert len(runs) == len(found.floor["samples"]) == 2
    assert "trained  each sample, by mask" in str(found)
    first = found.floor["samples"][0]["values"]["density"]
    assert first == pytest.approx(0.1, abs=0.001), "half-way in a range from 0.02 to 0.5: the untrained score is no prior"
    for sample in found.floor["samples"]:
        own = sample["training"]
        assert own["held_out"]["recovered"] < own["held_out"]["refitted"]
        assert (own["method"], own["rate"]) == ("mask", 2e-3)
    assert found.posterior is not None
    for sample in found.floor["samples"]:
        curve, density = zip(found.posterior["places"][0], found.posterior["mean"], strict=True), sample["values"]["density"]
        near = min(curve, key=lambda own: abs(own[0] - density))
        assert near[1] == pytest.approx(sample["score"], abs=1.5 * sample["error"]), "the posterior is of the score"
    (answer,) = (s for s in found.floor["samples"] if s["answer"])
    untrained = Compose(Prune(answer["values"]["density"]), Quantize("int8"))(stripes())
    assert answer["score"] > stripes().validate(untrained.task.model) + 0.02  # type: ignore[misc]
    assert answer["costs"]["size"] == found.measured.size <= untrained.footprint.packed_bytes
    engine = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x, y = recovering.images(256, seed=2)
    name = engine.get_inputs()[0].name
    hits = sum(int(engine.run(None, {name: i.numpy()})[0].argmax() == t) for i, t in zip(x.split(1), y, strict=True))
    assert hits / 256 == pytest.approx(found.score["deployed"], abs=0.01)
    folders = sorted((tmp_path / "samples").iterdir())
    assert all((f / "trained.safetensors").is_file() and (f / "weights.safetensors").is_file() for f in folders)

    again = trained(tmp_path)
    assert len(runs) == 2, "nothing is trained again"
    assert [s["reused"] for s in again.floor["samples"]] == [True, True]
    assert (again.values, again.score) == (found.values, found.score)
    other = trained(tmp_path, "lc:epochs=1,lr=2e-3,steps=4", samples=1)
    assert len(runs) == 3, "trained in another way it is another sample"
    assert other.floor["samples"][0]["training"]["method"] == "lc"
    trained(tmp_path, "lc:epochs=1,lr=2e-3,steps=4", samples=1, seed=1)
    assert len(runs) == 4, "and with another seed"


def test_a_search_that_was_killed_after_a_training_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real, measure = [], Recovery.run, Session.measure
    monkeypatch.setattr(Recovery, "run", lambda self: runs.append(self) or real(self))

    def killed(self: Session, wanted: Any) -> Any:
        if "sample" in wanted:
            raise KeyboardInterrupt
        return measure(self, wanted)

    monkeypatch.setattr(Session, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, samples=1)
    monkeypatch.setattr(Session, "measure", measure)
    trained(tmp_path, samples=1)
    assert len(runs) == 1


def test_a_training_that_diverges_is_a_failed_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Recovery.run

    def diverge(self: Recovery) -> Any:
        raise Diverged("the loss became nan at step 3")

    monkeypatch.setattr(Recovery, "run", diverge)
    found = trained(tmp_path / "none", samples=1)
    assert [s["failed"] for s in found.floor["samples"]] == ["the loss became nan at step 3"]
    assert found.values is None

    def diverge_late(self: Recovery) -> Any:
        real(self)
        raise Diverged("the loss became nan at step 40")

    monkeypatch.setattr(Recovery, "run", diverge_late)
    found = trained(tmp_path / "late", samples=1)
    assert [s["failed"] for s in found.floor["samples"]] == [""], "what was best until then was written"
    assert found.floor["samples"][0]["training"]["best_step"] > 0


def test_a_training_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for recover, message in (
        ("ste", "--recover ste: ste trains allocations, and a scheme is trained by mask or lc"),
        ("lc:steps=0", "lc takes at least one step"),
        ("often", "--recover often: often is not understood"),
    ):
        with pytest.raises(InvalidInput, match=message):
            trained(tmp_path, recover)
    with pytest.raises(InvalidInput, match="let the steps that take channels come first"):
        trained(tmp_path, scheme=Compose(Prune(), FilterPrune(0.5)))
    assert not list(tmp_path.glob("samples/*"))


def test_a_file_of_the_users_own_names_the_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scheme.py").write_text(
        "import hwsearch as hs\nvalue = hs.schemes.Prune()\nnumber = 3\n"
        "def made():\n    return hs.schemes.Prune(0.5)\n\ndef broken():\n    raise KeyError('x')\n"
    )
    monkeypatch.setattr("hwsearch.api.tune", lambda session, scheme, *words, **options: scheme)
    assert bayes(tmp_path / "out", scheme="own_scheme.py:value") == Prune()  # type: ignore[comparison-overlap]
    assert bayes(tmp_path / "out", scheme="own_scheme.py:made") == Prune(0.5)  # type: ignore[comparison-overlap]
    for spec, message in (
        ("own_scheme.py:number", "own_scheme.py:number is int; expected a hwsearch scheme"),
        ("own_scheme.py:nothing", "own_scheme.py:nothing is not there; expected a hwsearch scheme"),
        ("own_scheme.py:broken", "own_scheme.py:broken failed: KeyError"),
        ("absent.py:value", "scheme file absent.py does not exist"),
        ("value", "scheme 'value' is not understood; expected file.py:NAME"),
    ):
        with pytest.raises(InvalidInput, match=message):
            bayes(tmp_path / "out", scheme=spec)


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be minimised over a scheme; expected one of size, latency, macs"):
        bayes(tmp_path, minimize="energy")
    with pytest.raises(InvalidInput, match="search over Allocate alone"):
        bayes(tmp_path, scheme=Compose(Allocate("t.parquet", "s.parquet", latency=0.5), Prune()))
    with pytest.raises(InvalidInput, match="the scheme has 0 free parameters; a search is over one to 3"):
        bayes(tmp_path, scheme=Prune(0.5))
    four = Compose(Prune(Free("a")), Prune(Free("b")), Prune(Free("c")), Prune(Free("d")))
    with pytest.raises(InvalidInput, match=r"has 4 free parameters \(a, b, c, d\); a search is over one to 3"):
        bayes(tmp_path, scheme=four)
    with pytest.raises(InvalidInput, match="floor"):
        bayes(tmp_path, floor="high")

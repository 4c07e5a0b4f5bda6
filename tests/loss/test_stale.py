"""Sensitivities, what is begun of them and refitted weights are used again only where all that made them is the same."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hwsearch as hs
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import IncompatibleTables
from hwsearch.loss import measure as scoring
from hwsearch.loss import sensitivity as of_setup
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering import refitted
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import weight_bank
from hwsearch.progress import Progress
from hwsearch.table.parquet import KEY
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend


def setup(task: hs.Task) -> Setup:
    backend = SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network), noise=0.01)
    return set_up(task, backend, axes=("precision",))


def told(task: hs.Task, path: Path, **options: Any) -> tuple[SensitivityTable, str]:
    """The sensitivities at a path, and what was said."""
    stream = io.StringIO()
    found = sensitivity_for(setup(task), path, progress=Progress(stream), **options)
    return found, stream.getvalue()


def other_data() -> hs.Task:
    torch.manual_seed(7)
    old = tiny.task("cnn")
    return replace(old, calibration=[old.calibration[0], torch.randn(32, 3, 8, 8)])


def other_weights() -> hs.Task:
    old = tiny.task("cnn")
    model = copy.deepcopy(old.model)
    with torch.no_grad():
        model.conv1.weight.mul_(1.1)
    return replace(old, model=model)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("before") / "sens.parquet"
    told(tiny.task("cnn"), path)
    return path


def test_nothing_changed_and_nothing_is_measured(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_setup, "measure_sensitivity", None)
    found, said = told(tiny.task("cnn"), before)
    assert said == ""
    assert found == SensitivityTable.load(before)


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        (other_data, {}, "calibration data"),
        (other_weights, {}, "weights"),
        (lambda: replace(tiny.task("cnn"), divergence="mse"), {}, "divergence (auto, now mse)"),
        (lambda: tiny.task("cnn"), {"seed": 3}, "seed (0, now 3)"),
    ],
)
def test_what_changed_is_named_measured_anew_and_replaced(
    before: Path, tmp_path: Path, task: Callable[[], hs.Task], options: dict[str, Any], what: str
) -> None:
    path = tmp_path / "sens.parquet"
    path.write_bytes(before.read_bytes())
    found, said = told(task(), path, **options)
    assert f"{path} is of other {what}: measured anew" in said
    fresh, _ = told(task(), tmp_path / "fresh.parquet", **options)
    assert (found.loss, found.validation) == (fresh.loss, fresh.validation)
    old = SensitivityTable.load(before)
    assert (found.loss, found.validation) != (old.loss, old.validation)
    assert SensitivityTable.load(path) == found
    assert told(task(), path, **options)[1] == ""


@pytest.mark.parametrize(
    ("module", "what"), [(scoring, "METHOD"), (scoring, "REFIT_METHOD"), (scoring, "LEARNING_METHOD")]
)
def test_another_method_is_another_file(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, what: str
) -> None:
    path = tmp_path / "sens.parquet"
    path.write_bytes(before.read_bytes())
    monkeypatch.setattr(module, what, getattr(module, what) + 1)
    assert "method of" in told(tiny.task("cnn"), path)[1]


def test_a_file_that_does_not_say_what_made_it_loads_and_is_not_used_again(before: Path, tmp_path: Path) -> None:
    path = tmp_path / "sens.parquet"
    table = pq.read_table(before)
    header = json.loads(table.schema.metadata[KEY])
    del header["made_of"]
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(header).encode()}), path)
    assert SensitivityTable.load(path).loss == SensitivityTable.load(before).loss
    found, said = told(tiny.task("cnn"), path)
    assert "does not say" in said
    assert SensitivityTable.load(path).made_of == found.made_of != {}


def test_a_file_of_another_network_stays(before: Path, tmp_path: Path) -> None:
    path = tmp_path / "sens.parquet"
    path.write_bytes(before.read_bytes())
    with pytest.raises(IncompatibleTables, match="other network"):
        told(tiny.cnn_at(12), path)
    assert path.read_bytes() == before.read_bytes()


@pytest.mark.parametrize("lie", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in ("damage", "loss"))])
def test_what_was_begun_otherwise_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str | None
) -> None:
    path = tmp_path / "sens.parquet"
    partial = tmp_path / "sens.parquet.partial"
    with monkeypatch.context() as patch:
        patch.setattr(scoring._Sums, "mean", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            told(tiny.task("cnn"), path)
    if lie == "damage":
        partial.write_bytes(partial.read_bytes()[:50])
    if lie == "loss":
        data = json.loads(partial.read_bytes())
        data["sums"]["0"]["units"][0] = "none"
        partial.write_text(json.dumps(data))
    _, said = told(tiny.task("cnn"), path, seed=0 if lie else 5)
    assert str(partial) in said
    assert ("is damaged" if lie else "seed (0, now 5)") in said
    assert [p.name for p in tmp_path.iterdir()] == ["sens.parquet"]


def bank_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_refitted_weights_say_what_made_them(tmp_path: Path) -> None:
    order = {g: range(n) for g, n in tiny.lowering("cnn").network.channels.items()}
    said: list[str] = []
    bank = weight_bank(tiny.lowering("cnn"), tmp_path, order, said.append)
    want = bank.weight("conv2", {"conv1": 8})[0]
    assert said == []
    with safe_open(bank_files(tmp_path)[0], "pt") as file:
        assert json.loads(file.metadata()["made_of"]) == bank.made_of
    for task, what in ((other_data(), "calibration data"), (other_weights(), "weights")):
        weight_bank(Lowering(task), tmp_path, order, said.append)
        assert said.pop() == f"the weights in {tmp_path} are of other {what}: refitted anew"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another order is another choice of axes
        weight_bank(tiny.lowering("cnn"), tmp_path, {g: own[::-1] for g, own in order.items()})
    [file_] = bank_files(tmp_path)
    honest = load_file(file_)
    with safe_open(file_, "pt") as file:
        metadata = file.metadata()
    for lie, header in (
        ({"weight": honest["weight"] * torch.nan}, metadata),
        ({"weight": honest["weight"][:, :1].contiguous()}, metadata),
        ({"weight": 2 * honest["weight"]}, {**metadata, "made_of": "{}"}),
        ({"weight": 2 * honest["weight"]}, None),
        ({"other": honest["weight"]}, metadata),
    ):
        save_file(lie, file_, header)
        again = weight_bank(tiny.lowering("cnn"), tmp_path, order, said.append).weight("conv2", {"conv1": 8})[0]
        torch.testing.assert_close(again, want)


def test_a_killed_process_does_not_find_the_order_of_slots_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weight_bank(tiny.lowering("cnn"), tmp_path).order
    [kept] = tmp_path.glob("order.*.json")
    with monkeypatch.context() as patch:
        patch.setattr(refitted, "order_slots", None)  # it would fail
        again = weight_bank(tiny.lowering("cnn"), tmp_path).order
    assert {g: own.tolist() for g, own in again.items()} == {g: own.tolist() for g, own in first.items()}
    for damage in ("{", "[]", json.dumps({g: own.tolist()[1:] for g, own in first.items()})):
        kept.write_text(damage)
        found = weight_bank(tiny.lowering("cnn"), tmp_path).order
        assert {g: own.tolist() for g, own in found.items()} == {g: own.tolist() for g, own in first.items()}
    weight_bank(Lowering(other_data()), tmp_path)
    assert len(list(tmp_path.glob("order.*.json"))) == 2


def test_losses_of_a_large_network_are_of_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    low = tiny.lowering("cnn")
    assert scoring.samples_of(low) == scoring.SAMPLES
    each = low.network.macs // low.batch * len(low.network.units)
    monkeypatch.setattr(scoring, "COMPUTED", 20.5 * each)
    assert scoring.samples_of(low) == 20
    monkeypatch.setattr(scoring, "COMPUTED", 1.0)
    assert scoring.samples_of(low) == scoring.LEAST_SAMPLES


@pytest.mark.usefixtures("own_locks")
@pytest.mark.slow
def test_a_model_that_was_trained_on_runs_in_the_same_folder(tmp_path: Path) -> None:
    """Its times are used again, its sensitivities are not."""
    runtime = SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network), noise=0.003)
    hs.run(tiny.task("cnn"), ["latency=80%"], tmp_path, backend=runtime, axes=["precision"])
    times = len(LatencyTable.load(tmp_path / "table.parquet").builds)
    stream = io.StringIO()
    task = other_weights()
    report = hs.run(
        task, ["latency=80%"], tmp_path, backend=runtime, axes=["precision"], progress=Progress(stream)
    )
    assert report.met
    assert "is of other weights: measured anew" in stream.getvalue()
    assert "other weights than when it was profiled" in stream.getvalue()
    table = LatencyTable.load(tmp_path / "table.parquet")
    assert len(table.builds) <= times + 5, "it was profiled again"
    assert table.network.weights_digest == Lowering(task).network.weights_digest

"""A simulated device that executes 2:4 and fp8 beside fp16, from the profile to the deployed network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
from onnx import numpy_helper
from oracles import follows
from typer.testing import CliRunner

import hwsearch as hs
from hwsearch import cli
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.marked import unit_of
from hwsearch.network.variants import Variant, legal
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

OFFERED = ("2:4.fp16", "dense.fp8")
SPARSE = "conv2"


def law() -> LatencyLaw:
    """fp8 takes 0.7 of fp16 and 2:4 as long as fp16, but for one unit, whose zeros are worth far more than fp8."""
    network = tiny.lowering("cnn").network
    of = LatencyLaw.random(network, 1, precisions=("fp32", "fp16", "fp8", "2:4.fp16"))
    units = {}
    for unit, times in of.units.items():
        half = 0.5 * times["fp32"] * (4.0 if unit == SPARSE else 1.0)
        sparse = 0.2 if unit == SPARSE else 1.0
        units[unit] = {"fp32": 2 * half, "fp16": half, "fp8": 0.7 * half, "2:4.fp16": sparse * half}
    return replace(of, units=units, boundaries={})


def backend(**options: Any) -> SimulatedBackend:
    own = {"bases": ("fp16", "fp32"), "int8": False, "more": OFFERED, "noise": 0.003, **options}
    return SimulatedBackend(law(), **own)


def time_ns(of: LatencyLaw, name: str, **others: str) -> float:
    """Every unit in one variant where it can become that, else in the base."""
    units = tiny.lowering("cnn").network.units
    asked = {u.name: (*legal(u, [Variant.parse(name)]), Variant("fp16"))[0].executed for u in units}
    return of.time_ns({**asked, **others})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A budget that all fp8 does not meet, and all fp8 with one unit in 2:4 does."""
    folder = tmp_path_factory.mktemp("run")
    least, fp8 = time_ns(law(), "dense.fp8", **{SPARSE: "2:4.fp16"}), time_ns(law(), "dense.fp8")
    budget = f"latency={(least + 0.3 * (fp8 - least)) / 1e6:.6f}ms"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        old = tiny.task("cnn")
        task = hs.Task(old.model, old.example_inputs, old.calibration, lambda predict: 0.5, "simulated")
        return folder, hs.run(task, [budget], folder, backend=backend(), axes=["precision"])


def test_the_table_and_the_sensitivities_hold_what_each_unit_can_become(done: tuple[Path, Any]) -> None:
    folder, _ = done
    table, scores = (
        LatencyTable.load(folder / "table.parquet"),
        SensitivityTable.load(folder / "sens.parquet"),
    )
    for unit in table.network.units:
        can = {str(v) for v in legal(unit, [Variant("fp16"), *map(Variant.parse, OFFERED)])}
        assert set(table.offered()[unit.name]) == can
        assert set(scores.loss[unit.name]) == can | {"dense.fp32"}
        if "2:4.fp16" in can:
            assert scores[unit.name, "2:4.fp16"] > scores[unit.name, "dense.fp16"] >= 0.0
    assert table.header.unsupported == {}
    assert "2:4.fp16" not in scores.loss["stem"], "its three input channels hold no four"


def test_the_search_picks_2_4_where_it_wins(done: tuple[Path, Any]) -> None:
    folder, report = done
    assert report.met
    assert report.not_as_asked == {}
    assert [u for u, v in report.variants.items() if v == "2:4.fp16"] == [SPARSE]
    uniforms = {u["variant"] for u in report.uniforms}
    assert uniforms == {"dense.fp32", "dense.fp16", *OFFERED}
    model = onnx.load(folder / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    node = next(n for n in model.graph.node if n.name.endswith(".weight") and unit_of(n.name)[0] == SPARSE)
    assert follows(torch.from_numpy(numpy_helper.to_array(stored[node.input[0]]).astype("float32")), 1, 2, 4)


def test_the_same_from_the_command_line(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, report = done
    files = ["--table", str(folder / "table.parquet"), "--sensitivity", str(folder / "sens.parquet")]
    budget = f"latency={report.latency_ms['budget']}ms"
    words = ["search", *files, "--budget", budget, "--axes", "precision", "-o", str(tmp_path / "a.json")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    found = hs.Allocation.load(tmp_path / "a.json")
    assert found.variants[SPARSE] == "2:4.fp16"
    loose = [*words[:6], f"latency={2 * report.latency_ms['budget']}ms", *words[7:]]
    assert CliRunner().invoke(cli.app, loose).exit_code == 0
    assert set(hs.Allocation.load(tmp_path / "a.json").variants.values()) <= {"dense.fp16", "dense.fp8"}


@pytest.mark.usefixtures("own_locks")
def test_a_pattern_that_the_runtime_did_not_pick_is_recorded_and_not_offered(tmp_path: Path) -> None:
    old = tiny.task("cnn")
    table = hs.profile(
        old, out=tmp_path / "t.parquet", backend=backend(refused=(SPARSE,)), axes=["precision"]
    )
    assert (
        table.header.unsupported[SPARSE]["2:4.fp16"] == "eligible, but simulated did not pick a sparse kernel"
    )
    assert table.offered()[SPARSE] == ("dense.fp16",)


@pytest.mark.usefixtures("own_locks")
def test_widths_at_which_a_unit_cannot_be_2_4_are_never_asked_for(tmp_path: Path) -> None:
    """Any number of channels may go, and an engine that got 22 of them in 2:4 would have been refused."""
    old = tiny.task("cnn")
    table = hs.profile(old, out=tmp_path / "t.parquet", backend=backend(), time_limit_s=60)
    assert any(len(steps) > 1 for steps in table.grid().values())
    for build in table.builds:
        candidate = table.candidate(build)
        for unit, variant in candidate.variants.items():
            assert legal(table.network.unit_at(unit, candidate.widths), [variant])
        assert build.as_asked()


@pytest.mark.usefixtures("own_locks")
def test_layer_by_layer(tmp_path: Path) -> None:
    old = tiny.task("cnn")
    table = hs.profile(old, out=tmp_path / "t.parquet", backend=backend(), mode="sandwiched")
    for unit in table.network.units:
        assert {"dense.fp16", "dense.fp8"} <= set(table.offered()[unit.name])
    assert "2:4.fp16" in table.offered()[SPARSE]

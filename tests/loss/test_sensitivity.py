"""Sensitivities: what a variant or a width of one unit or group loses, and what whole allocations lose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from simulation import grouped, scores

import hwsearch as hs
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.importance import removal_losses
from hwsearch.device.timelimit import TimeLimit
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.loss import measure as scoring
from hwsearch.loss.divergence import divergence
from hwsearch.loss.measure import measure_sensitivity
from hwsearch.loss.stitched import ROUND
from hwsearch.loss.table import SCHEMA, SensitivityTable
from hwsearch.lowering import lowering as lower
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.choices import candidate_widths
from hwsearch.network.variants import Variant, uniform
from hwsearch.table.header import Header
from hwsearch.table.parquet import KEY
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

NAMES = ("cnn", "transformer")
STITCHING = 3 * scoring.STITCHED // ROUND
"""Simulators that stitched networks take: one for each of three batches in every round."""


@pytest.fixture(scope="module")
def banks() -> dict[str, WeightBank]:
    return {name: weight_bank(tiny.lowering(name)) for name in NAMES}


def grid(name: str) -> dict[str, list[int]]:
    return {g: candidate_widths(n)[:4] for g, n in tiny.lowering(name).network.channels.items()}


def measure(name: str, bank: WeightBank | None, out: Path | None = None, **options: Any) -> SensitivityTable:
    return measure_sensitivity(
        tiny.lowering(name),
        out,
        variants=(Variant("fp32"), Variant("int8")),
        grid=grid(name),
        bank=bank,
        **options,
    )


@pytest.fixture(scope="module")
def measured(banks: dict[str, WeightBank]) -> dict[str, SensitivityTable]:
    return {name: measure(name, banks[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_and_every_width_has_a_loss(measured: dict[str, SensitivityTable], name: str) -> None:
    table, network = measured[name], tiny.lowering(name).network
    assert set(table.loss) == set(network.by_name)
    for row in table.loss.values():
        assert row["dense.fp32"] == 0.0
        assert row["dense.int8"] >= 0.0
    assert {g: list(row) for g, row in table.width_loss.items()} == grid(name)
    for group, row in table.width_loss.items():
        assert row[network.channels[group]] == 0.0
        assert all(loss >= 0.0 for loss in row.values())
        assert sorted(table.order[group]) == list(range(network.channels[group]))
    assert table.samples == 24, "a quarter of 96, the one that no weight was refitted on"


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_grows_as_widths_fall_in_the_mean(measured: dict[str, SensitivityTable], name: str) -> None:
    rows = [list(row.values()) for row in measured[name].width_loss.values()]
    shortest = min(map(len, rows))
    mean = np.mean([row[:shortest] for row in rows], axis=0)
    assert np.all(np.diff(mean) > 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_stitched_networks_are_predicted_about_right(measured: dict[str, SensitivityTable], name: str) -> None:
    """By what was learnt from others no worse than by the sum; in forward passes that are counted."""
    table = measured[name]
    before, after = table.agreement
    assert before is not None
    assert after is not None
    assert before.networks == after.networks == len(table.validation) == len(table.corrected) > 40
    assert table.passes == 3 * scoring.STITCHED, "on three batches"
    assert table.rank_correlation == after.tau
    assert after.tau is not None
    assert before.tau is not None
    assert after.tau > max(0.7, before.tau - 0.05)
    assert after.within >= before.within
    assert 1 / 1.5 < after.ratio < 1.5


def test_a_width_is_scored_as_the_refitted_network_computes(
    measured: dict[str, SensitivityTable], banks: dict[str, WeightBank]
) -> None:
    """The loss of one width is the divergence of the really narrow network from the dense one."""
    of, bank = tiny.lowering("cnn"), banks["cnn"]
    narrow = of.narrow(bank.kept({"conv1": 8}), bank.assemble({"conv1": 8}))
    total = count = 0.0
    for (own, args, kwargs), (whole, _, _) in zip(narrow.scoring, of.scoring, strict=True):
        with torch.no_grad():
            value, samples = divergence(own.graph(*args, **kwargs), whole.graph(*args, **kwargs), "auto")
        total, count = total + value, count + samples
    assert measured["cnn"].of_width("conv1", 8) == pytest.approx(total / count, rel=1e-3)


def test_of_many_widths_the_costliest_are_estimated(
    measured: dict[str, SensitivityTable], banks: dict[str, WeightBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MOST_WIDTHS", 7)
    table, every = measure("cnn", banks["cnn"]), measured["cnn"]
    widths = [(g, w) for g, row in every.width_loss.items() for w in row]
    assert [(g, w) for g, row in table.width_loss.items() for w in row] == widths
    assert 0 < len(table.estimated) < len(widths) - 7
    estimates = removal_losses(
        tiny.lowering("cnn").fitting, banks["cnn"].order, [c for c in widths if c[1] < len(every.order[c[0]])]
    )
    for group, row in table.width_loss.items():
        for width, loss in row.items():
            if (group, width) in table.estimated:
                wider = min(w for w in row if w > width)
                growth = max(estimates[group, width] / estimates[group, wider], 1.0)
                assert loss == pytest.approx(row[wider] * growth)
            else:
                assert loss == pytest.approx(every.of_width(group, width))


def test_the_estimates_are_kept_with_the_table(
    banks: dict[str, WeightBank], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scoring, "MOST_WIDTHS", 7)
    table = measure("cnn", banks["cnn"], tmp_path / "s.parquet")
    assert SensitivityTable.load(tmp_path / "s.parquet").estimated == table.estimated != frozenset()


def test_without_a_bank_only_variants_are_scored() -> None:
    table = measure("cnn", None)
    assert table.width_loss == {}
    assert table.order == {}


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Counts the simulators that are made; the one after `batches` is interrupted."""
    made: list[int] = []
    real = lower.Simulator

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if len(made) == batches:
                raise KeyboardInterrupt
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(lower, "Simulator", Counted)
    return made


def test_an_interrupted_run_resumes_at_the_next_batch(
    measured: dict[str, SensitivityTable],
    banks: dict[str, WeightBank],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            measure("cnn", banks["cnn"], out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        made = _interrupt_after(patch, 99)
        table = measure("cnn", banks["cnn"], out)
        assert len(made) == 2 + STITCHING, "the first batch of three was simulated again"
    assert replace(table, created="") == replace(measured["cnn"], created="")
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_an_interrupted_run_resumes_at_the_next_round_of_stitched_networks(
    measured: dict[str, SensitivityTable], banks: dict[str, WeightBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 3 + 5)
        with pytest.raises(KeyboardInterrupt):
            measure("cnn", banks["cnn"], out)
    made = _interrupt_after(monkeypatch, 99)
    table = measure("cnn", banks["cnn"], out)
    assert len(made) == STITCHING - 5
    assert replace(table, created="") == replace(measured["cnn"], created="")


def test_the_stitched_networks_are_as_many_as_there_is_time_for(
    measured: dict[str, SensitivityTable], banks: dict[str, WeightBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes a second; time for all batches and two rounds. Another call goes on."""
    out, now, run = tmp_path / "s.parquet", [0], lower.Simulator.__call__

    def simulate(self: Any, *args: Any) -> Any:
        now[0] += 10**9
        return run(self, *args)

    monkeypatch.setattr(lower.Simulator, "__call__", simulate)
    choices = sum(map(len, measured["cnn"].loss.values())) - len(measured["cnn"].loss)
    choices += sum(len(row) - 1 for row in measured["cnn"].width_loss.values())
    limit_s = 3 * choices + 3 * 2 * ROUND + 1
    table = measure("cnn", banks["cnn"], out, limit=TimeLimit(limit_s, lambda: now[0]))
    assert (table.samples, table.passes) == (24, 3 * 2 * ROUND)
    assert now[0] <= 1e9 * limit_s
    assert replace(measure("cnn", banks["cnn"], out), created="") == replace(measured["cnn"], created="")
    none = measure("cnn", banks["cnn"], tmp_path / "none.parquet", limit=TimeLimit(1.0, lambda: now[0]))
    assert (none.passes, none.corrected, none.rank_correlation) == (0, (), None)
    assert none.correction.plain


def test_what_was_begun_for_another_grid_is_not_taken(
    banks: dict[str, WeightBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.parquet"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            measure("cnn", None, out)
    made = _interrupt_after(monkeypatch, 99)
    measure("cnn", banks["cnn"], out)
    assert len(made) == 3 + STITCHING


@pytest.fixture
def saved(measured: dict[str, SensitivityTable], tmp_path: Path) -> Path:
    measured["transformer"].save(tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


def test_round_trip(measured: dict[str, SensitivityTable], saved: Path) -> None:
    loaded = SensitivityTable.load(saved)
    assert loaded == measured["transformer"]
    before = saved.read_bytes()
    loaded.save(saved)
    assert saved.read_bytes() == before


def test_a_file_from_before_interactions_predicts_the_sum(measured: dict[str, SensitivityTable], saved: Path) -> None:
    _header(lambda h: [h.pop(key) for key in ("correction", "corrected", "passes")], saved)
    table = SensitivityTable.load(saved)
    assert (table.loss, table.validation) == (measured["transformer"].loss, measured["transformer"].validation)
    assert (table.correction.plain, table.corrected, table.passes) == (True, (), 0)
    variants = dict.fromkeys(table.loss, Variant("int8"))
    assert table.total(variants) == pytest.approx(sum(own["dense.int8"] for own in table.loss.values()))
    assert table.agreement[1] is None


def _header(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[KEY])
    change(header)
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(header).encode()}), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("order"),
        lambda h: h.pop("network"),
        lambda h: h["order"].update({next(iter(h["order"])): [0, 0, 1, 2]}),
        lambda h: h["order"].update(nothing=[0]),
        lambda h: h.update(order=3),
    ],
)
def test_damaged_headers(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    _header(change, saved)
    with pytest.raises(InvalidInput, match="damaged"):
        SensitivityTable.load(saved)


def test_another_schema(saved: Path) -> None:
    _header(lambda h: h.update(schema=1), saved)
    with pytest.raises(IncompatibleTables, match=f"schema 1.*reads schema {SCHEMA}"):
        SensitivityTable.load(saved)


def test_losses_that_are_not_finite_are_damage(measured: dict[str, SensitivityTable], tmp_path: Path) -> None:
    table = measured["cnn"]
    replace(table, width_loss={"conv1": {20: 0.0, 8: float("nan")}}).save(tmp_path / "s.parquet")
    with pytest.raises(InvalidInput, match=r"row .*: loss is nan"):
        SensitivityTable.load(tmp_path / "s.parquet")


def test_the_total_is_the_sum() -> None:
    network = grouped()
    table = scores(network, {"conv0": [24, 8], "conv1": [40, 16]})
    variants = {**uniform(network, "fp32"), "conv3": Variant("int8")}
    expected = table["conv3", "dense.int8"] + table.of_width("conv1", 16)
    assert table.total(variants, {"conv0": 24, "conv1": 16}) == pytest.approx(expected)
    assert table.total(variants) == table["conv3", "dense.int8"]
    assert len(table.to_frame()) == 2 * 4 + 2 * 2


def test_what_was_not_scored_is_an_error_that_says_what_to_do() -> None:
    table = scores(grouped(), {"conv0": [24, 8]})
    with pytest.raises(InvalidInput, match="no loss of conv0 at 16 channels"):
        table.of_width("conv0", 16)
    with pytest.raises(InvalidInput, match="--table"):
        table.of_width("conv1", 8)
    with pytest.raises(InvalidInput, match=r"no loss of dense\.bf16"):
        _ = table["conv0", "dense.bf16"]
    with pytest.raises(IncompatibleTables, match="network"):
        table.require(grouped((24, 40, 8)))
    with pytest.raises(IncompatibleTables, match="weights"):
        table.require(replace(table.network, weights_digest="other"))


def test_the_api_scores_the_widths_that_a_table_found(tmp_path: Path) -> None:
    task = tiny.task("cnn")
    backend = SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network))
    grid = {"stem": [24], "conv1": [20, 8], "conv3": [16]}
    table = LatencyTable(
        Header(tiny.lowering("cnn").network, {}, backend.name, {}, {"base": "fp32"}, grid=grid)
    )
    out, weights = tmp_path / "s.parquet", tmp_path / "weights"
    found = hs.sensitivity(task, out=out, backend=backend, table=table, weights=weights)
    assert {g: list(row) for g, row in found.width_loss.items()} == {"conv1": [20, 8]}
    files = {p: p.stat().st_mtime_ns for p in weights.rglob("*.safetensors")}
    assert files
    before = out.read_bytes()
    again = hs.sensitivity(task, out=out, backend=backend, table=table, weights=weights)
    assert again == found
    assert out.read_bytes() == before
    plain = hs.sensitivity(task, backend=backend, axes=["precision"])
    assert plain.width_loss == {}
    assert plain.loss == found.loss
    assert {p: p.stat().st_mtime_ns for p in weights.rglob("*.safetensors")} == files
    with pytest.raises(InvalidInput, match="unknown axes"):
        hs.sensitivity(task, backend=backend, axes=["depth"])

"""Several setups and input shapes of one model in one file: profiled, told of one another, chosen, searched, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from typer.testing import CliRunner, Result

import hwsearch as hs
from hwsearch import cli
from hwsearch.cli import overview
from hwsearch.cli.sections import table_of_task
from hwsearch.errors import BackendUnavailable, IncompatibleTables, InvalidInput
from hwsearch.profiler.transfer import of_sections, signatures
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
HERE = Path(__file__).resolve().parents[1]
CNN, LARGER = f"{HERE / 'tiny.py'}:cnn", f"{HERE / 'tiny.py'}:larger"
OPTIONS: dict[str, Any] = {"axes": ["precision"], "builds": 5}


def backend(name: str = "cnn", **options: Any) -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(tiny.lowering(name).network, 2), **{"noise": 0.003, **options})


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def unchanged(old: LatencyTable, new: LatencyTable) -> bool:
    pairs = zip(old.builds, new.builds, strict=True)
    return old.header == new.header and all(np.array_equal(a.samples_ns, b.samples_ns) for a, b in pairs)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the network at 8x8, at a batch of 4, and at 12x12."""
    path = tmp_path_factory.mktemp("several") / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        for more in ({}, {"batch": 4}, {"shape": "1x3x12x12"}):
            hs.profile(tiny.task("cnn"), out=path, backend=backend(), **OPTIONS, **more)
    return path


@pytest.fixture
def several(profiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(profiled, tmp_path / "t.parquet"))


def test_each_profile_adds_a_section(several: Path) -> None:
    found = LatencyTable.sections(several)
    assert [t.network.input_shapes for t in found] == [((1, 3, 8, 8),), ((4, 3, 8, 8),), ((1, 3, 12, 12),)]
    assert [t.header.options["batch"] for t in found] == [1, 4, 1]
    assert all(t.header.ended and len(t.builds) == 8 for t in found)
    assert len({t.network.fingerprint for t in found}) == 3
    assert len({t.network.model for t in found}) == 1


@pytest.mark.parametrize("more", [{}, {"batch": 4}, {"shape": ["1x3x12x12"]}])
def test_the_same_command_goes_on_with_its_own_section(several: Path, more: dict[str, Any]) -> None:
    before = LatencyTable.sections(several)
    again = hs.profile(tiny.task("cnn"), out=several, backend=backend(), **{**OPTIONS, "builds": 6}, **more)
    after = LatencyTable.sections(several)
    grown = [len(b.builds) - len(a.builds) for a, b in zip(before, after, strict=True)]
    assert sorted(grown) == [0, 0, 1]
    assert unchanged(after[grown.index(1)], again)
    assert all(unchanged(a, b) for a, b, n in zip(before, after, grown, strict=True) if not n)


def test_a_profile_that_dies_leaves_the_other_sections_and_goes_on(several: Path) -> None:
    before = LatencyTable.sections(several)
    with pytest.raises(BackendUnavailable):
        hs.profile(tiny.task("cnn"), out=several, backend=backend(failing=[6]), threads=2, **OPTIONS)
    *kept, begun = LatencyTable.sections(several)
    assert all(unchanged(a, b) for a, b in zip(before, kept, strict=True))
    assert len(begun.builds) == 3
    done = hs.profile(tiny.task("cnn"), out=several, backend=backend(), threads=2, **OPTIONS)
    assert [b.measured_at for b in done.builds[:3]] == [b.measured_at for b in begun.builds]
    assert len(LatencyTable.sections(several)) == 4


def test_another_model_is_refused_and_the_file_kept(several: Path) -> None:
    before = several.read_bytes()
    with pytest.raises(IncompatibleTables, match="another network"):
        hs.profile(tiny.task("transformer"), out=several, backend=backend("transformer"), **OPTIONS)
    with pytest.raises(InvalidInput, match="of batch 2, not 4"):
        hs.profile(tiny.task("cnn"), out=several, backend=backend(), shape="2x3x8x8", batch=4, **OPTIONS)
    assert several.read_bytes() == before


# ---------------------------------------------------------------- what sections tell one another


def test_a_new_section_begins_with_what_the_others_tell(profiled: Path) -> None:
    first, batch, larger = LatencyTable.sections(profiled)
    assert first.header.prior == ()
    assert {e.table for e in batch.header.prior} == {f"cnn ({first.network.fingerprint})"}
    assert {e.feature[0] for e in batch.header.prior} <= {"unit", "pool", "pool bytes"}
    told = {e.table for e in larger.header.prior}
    assert told == {f"cnn ({t.network.fingerprint})" for t in (first, batch)}
    assert all(f"told by the table of {name}" in overview.summary(larger) for name in told)
    assert "told by" not in overview.summary(first)


def test_layers_of_the_same_shape_need_not_be_learnt_again(several: Path) -> None:
    """The residual width is another setup of the very same layers."""
    first = LatencyTable.sections(several)[0]
    wanted = signatures(first.network)
    table = LatencyTable(first.header).with_header(options={**first.header.options, "residual": True})
    told = of_sections([first], table, wanted)
    assert {e.feature[1] for e in told if e.feature[0] == "unit"} == {
        u.signature for u in first.network.units
    }
    assert {u.signature for u in first.network.units} <= {
        s for s, _ in table.with_header(prior=tuple(told)).known()
    }


def test_other_regimes_and_tables_cut_short_tell_nothing(several: Path) -> None:
    first = LatencyTable.sections(several)[0]
    wanted = signatures(first.network)
    assert of_sections([first], first, wanted)
    for options in ({"threads": 2}, {"base": "bf16"}, {"load": 1}, {"cpus": "0"}):
        other = LatencyTable(first.header).with_header(options={**first.header.options, **options})
        assert of_sections([first], other, wanted) == []
    assert of_sections([LatencyTable(first.header, first.builds[:1])], first, wanted) == []


def test_what_a_section_was_told_it_does_not_tell_on(profiled: Path) -> None:
    first, batch, _ = LatencyTable.sections(profiled)
    wanted = signatures(first.network)
    assert batch.header.prior
    own = of_sections([batch.with_header(prior=())], first, wanted)
    assert of_sections([batch], first, wanted) == own


# ---------------------------------------------------------------- choosing


def test_the_task_chooses_by_its_input_shape(several: Path) -> None:
    first, batch, larger = LatencyTable.sections(several)
    assert unchanged(table_of_task(several, tiny.task("cnn")), first)
    assert unchanged(table_of_task(several, tiny.task("cnn"), batch=4), batch)
    assert unchanged(table_of_task(several, tiny.cnn_at(12)), larger)
    with pytest.raises(InvalidInput, match=r"3 sections.*--batch and --shape"):
        table_of_task(several, tiny.cnn_at(16))
    first.with_header(options={**first.header.options, "threads": 2}).save(several)
    with pytest.raises(InvalidInput, match=r"2 sections.*choose one with --threads "):
        table_of_task(several, tiny.task("cnn"))
    assert unchanged(table_of_task(several, tiny.task("cnn"), threads=1), first)


@pytest.mark.parametrize("place", range(3))
def test_a_check_brings_the_task_to_the_shape_of_its_table(several: Path, place: int) -> None:
    table = LatencyTable.sections(several)[place]
    assert hs.recheck(table, tiny.task("cnn"), backend=backend(), builds=2).holds


def test_a_prior_file_gives_its_tables_of_this_regime(several: Path) -> None:
    first, batch, larger = LatencyTable.sections(several)
    first.with_header(options={**first.header.options, "threads": 2}).save(several)
    table = hs.profile(tiny.task("cnn"), backend=backend(), prior=[several], **OPTIONS)
    names = {f"cnn ({t.network.fingerprint})" for t in (first, batch, larger)}
    assert {e.table for e in table.header.prior} == names
    assert {e.feature[1] for e in table.header.prior if e.feature[0] == "unit"} >= {
        u.signature for u in first.network.units
    }
    with pytest.raises(IncompatibleTables, match="another load"):
        hs.profile(tiny.task("cnn"), backend=backend(), prior=[several], load=1, **OPTIONS)


def test_sensitivities_at_the_batch_of_their_table(several: Path) -> None:
    _, batch, _ = LatencyTable.sections(several)
    scores = hs.sensitivity(tiny.task("cnn"), backend=backend(), table=batch, axes=["precision"])
    assert scores.network.fingerprint == batch.network.fingerprint
    assert hs.search(batch, scores, ["latency=90%"], axes=["precision"]).options["batch"] == 4


@pytest.mark.slow
def test_a_run_in_a_folder_of_another_shape_ends_before_it_profiles(tmp_path: Path) -> None:
    runtime = backend()
    hs.run(tiny.task("cnn"), ["latency=90%"], tmp_path, backend=runtime, axes=["precision"])
    hs.run(tiny.task("cnn"), ["latency=90%"], tmp_path, backend=runtime, axes=["precision"], threads=2)
    assert [t.header.options["threads"] for t in LatencyTable.sections(tmp_path / "table.parquet")] == [1, 2]
    before = runtime.builds
    with pytest.raises(IncompatibleTables, match="run into another folder"):
        hs.run(tiny.cnn_at(12), ["latency=90%"], tmp_path, backend=runtime, axes=["precision"])
    assert runtime.builds == before


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_line_from_two_shapes_to_a_report_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hwsearch.backends.get", lambda name: backend())
    table = str(tmp_path / "t.parquet")
    only = ["--axes", "precision"]
    for more in ([], ["--shape", "1x3x12x12"]):
        result = invoke("profile", CNN, "-o", table, "--backend", "simulated", *only, *more)
        assert result.exit_code == 0, result.stderr
    assert [len(t.builds) > 5 for t in LatencyTable.sections(table)] == [True, True]

    listed = invoke("table", "show", table)
    assert listed.exit_code == 0
    assert "1x3x8x8" in listed.stdout
    assert "1x3x12x12" in listed.stdout
    rows = json.loads(invoke("table", "show", table, "--json").stdout)["sections"]
    assert [r["input_shapes"] for r in rows] == [[[1, 3, 8, 8]], [[1, 3, 12, 12]]]
    one = invoke("table", "show", table, "--shape", "1x3x12x12")
    assert "shape 1x3x12x12; mode context" in one.stdout
    assert (
        json.loads(invoke("table", "show", table, "--shape", "1x3x12x12", "--json").stdout)["kind"]
        == "latency_table"
    )

    for words in (["table", "diagnose", table], ["table", "staircase", table]):
        refused = invoke(*words)
        assert refused.exit_code == 2
        assert "2 sections" in refused.stderr
        assert "--shape" in refused.stderr
    assert invoke("table", "diagnose", table, "--shape", "1x3x8x8").exit_code == 0
    assert invoke("table", "show", table, "--threads", "3").exit_code == 2

    for number, (spec, shape) in enumerate(((CNN, [1, 3, 8, 8]), (LARGER, [1, 3, 12, 12]))):
        scores, chosen, report = (str(tmp_path / f"{n}{number}") for n in ("s.parquet", "a.json", "r.json"))
        result = invoke("sensitivity", spec, "-o", scores, "--table", table, *only)
        assert result.exit_code == 0, result.stderr
        result = invoke(
            "search",
            "--table",
            table,
            "--sensitivity",
            scores,
            "--budget",
            "latency=90%",
            "-o",
            chosen,
            *only,
        )
        assert result.exit_code == 0, result.stderr
        own = LatencyTable.load(table, shape=[shape])
        assert hs.Allocation.load(chosen).network == own.network.fingerprint
        assert hs.Allocation.load(chosen).dense["latency_ns"] == pytest.approx(own.dense_ns, rel=1e-6)
        result = invoke("verify", spec, chosen, "-o", report, "--table", table)
        assert result.exit_code in (0, 3), result.stderr  # 3: a little over, as no loop follows
        said = json.loads(Path(report).read_text())["latency_ms"]
        assert said["measured"] == pytest.approx(said["predicted"], rel=0.1)
        checked = invoke("table", "recheck", table, "--task", spec, "--builds", "2")
        assert checked.exit_code == 0, checked.stderr
    wrong = invoke(
        "search", "--table", table, "--sensitivity", str(tmp_path / "s.parquet0"), "--budget", "latency=90%",
        "-o", str(tmp_path / "x.json"), "--shape", "1x3x12x12", *only,
    )  # fmt: skip
    assert wrong.exit_code == 1
    assert "other network" in wrong.stderr

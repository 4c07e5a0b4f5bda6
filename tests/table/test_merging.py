"""Tables that several machines of one kind measured, as one: each build knows its machine, and machines that disagree are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from simulation import chain, random_variants, simulated_table
from typer.testing import CliRunner, Result

import hwsearch as hs
from hwsearch import cli
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.latency.model import LatencyModel, fit, validate
from hwsearch.table.build import Role
from hwsearch.table.header import Mode
from hwsearch.table.merging import apart, merged
from hwsearch.table.parquet import KEY
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

NETWORK = chain(16)
LAW = LatencyLaw.random(NETWORK, 1)


def table_of(machine: str, *, factor: float = 1.0, slower: float = 1.0, **options: Any) -> LatencyTable:
    """What a machine measures whose times are so many times as long, all of them, and again all but those of its reference."""
    table = simulated_table(NETWORK, LAW, **{"noise": 0.005, "node_noise": 0.02, **options})
    builds = (
        replace(
            b, machine=machine, ratio=b.ratio * factor, low=b.low * factor, high=b.high * factor,
            samples_ns=np.rint(b.samples_ns * factor * slower).astype(np.int64),
            reference_ns=np.rint(b.reference_ns * slower).astype(np.int64),
        )
        for b in table.builds
    )  # fmt: skip
    return LatencyTable(table.header, tuple(builds)).rescaled()


def median_error(model: LatencyModel) -> float:
    rng = np.random.default_rng(99)
    chosen = [random_variants(NETWORK, rng) for _ in range(60)]
    law_ns = [LAW.time_ns({u: v.precision for u, v in c.items()}) for c in chosen]
    return float(np.median([abs(model.predict(c).time_ns / t - 1.0) for c, t in zip(chosen, law_ns, strict=True)]))


@pytest.mark.parametrize("factor", [0.93, 1.0, 1.07])
def test_the_fit_finds_by_how_much_a_machine_is_apart(factor: float) -> None:
    few, many = table_of("a", design=3), table_of("b", factor=factor, slower=1.04, heldout=10, seed=5)
    table = merged([("", few), ("", many)])
    model = fit(table)
    share, error = model.apart["b"]
    assert share == pytest.approx(1.0 - 1.0 / factor, abs=0.012)
    assert 0.0 < error < 0.02
    assert median_error(model) < 0.015
    assert validate(model, [b for b in table.builds if b.role == Role.HELDOUT]).median_error < 0.015
    as_one = LatencyTable(table.header, tuple(replace(b, machine="") for b in table.builds))
    if factor != 1.0:
        assert median_error(fit(as_one)) > 2 * median_error(model)


def test_times_are_those_of_the_first_machine_whatever_the_speed_of_the_others() -> None:
    first, other = table_of("a", noise=0.0, node_noise=0.0), table_of("b", slower=1.18, noise=0.0, node_noise=0.0)
    table = merged([("", first), ("", other)])
    assert table.header.reference_ns == first.header.reference_ns
    assert not any(map(table.disturbed, table.builds)), "a slower machine is no disturbed one"
    assert table.quiet_on("b") == pytest.approx(1.18 * table.quiet_ns, rel=1e-3)
    assert median_error(fit(table)) < 0.005


def test_a_table_of_one_machine_is_fitted_as_if_no_build_knew_it() -> None:
    named = table_of("a", heldout=4)
    plain = LatencyTable(named.header, tuple(replace(b, machine="") for b in named.builds))
    half = LatencyTable(named.header, tuple(replace(b, machine="") if i % 2 else b for i, b in enumerate(named.builds)))
    assert named.machines == half.machines == ["a"]
    for other in (plain, half):
        assert np.array_equal(fit(named).mean, fit(other).mean)
        assert fit(other).apart == {}


def test_machines_that_disagree_are_named() -> None:
    calm, odd = table_of("calm", design=6), table_of("odd", factor=1.12, slower=0.9, design=6, seed=3)
    assert [m.against("calm") for m in apart(merged([("", calm), ("", table_of("like", design=6, seed=3))]))] == [""]
    (found,) = apart(merged([("", calm), ("", odd)]))
    told = found.against("calm")
    assert told.startswith("machine odd disagrees with calm: its reference takes 10.0% less")
    assert found.builds >= 2
    assert found.shape == pytest.approx(0.12, abs=0.02)
    with pytest.raises(IncompatibleTables, match=r"machine slow disagrees with calm: its reference takes 50\.0% longer"):
        merged([("", calm), ("", table_of("slow", slower=1.5, design=6))])


def test_what_does_not_belong_together_is_refused() -> None:
    one, two = table_of("a", design=3), table_of("b", design=3)
    with pytest.raises(InvalidInput, match="two tables are of the machine a"):
        merged([("", one), ("", table_of("a", design=3, seed=1))])
    assert merged([("", one), ("c", table_of("a", design=3, seed=1))]).machines == ["a", "c"]
    with pytest.raises(InvalidInput, match="does not tell"):
        merged([("", one), ("", table_of("", design=3))])
    with pytest.raises(InvalidInput, match="several machines"):
        merged([("x", merged([("", one), ("", two)])), ("", table_of("c", design=3))])
    with pytest.raises(IncompatibleTables, match="another threads"):
        merged([("", one), ("", two.with_header(options={**two.header.options, "threads": 2}))])
    with pytest.raises(IncompatibleTables, match="another device"):
        merged([("", one), ("", two.with_header(device={"id": "other", "chip": "Other CPU"}))])
    with pytest.raises(IncompatibleTables, match="mode sandwiched cannot be merged"):
        merged([("", one), ("", two.with_header(mode=Mode.SANDWICHED))])
    with pytest.raises(InvalidInput, match="no dense build"):
        merged([("", one), ("", LatencyTable(two.header, two.builds[:1]))])


def test_the_machine_comes_back_and_older_files_tell_none(tmp_path: Path) -> None:
    path, table = tmp_path / "t.parquet", merged([("", table_of("a", design=3)), ("", table_of("b", design=3, seed=1))])
    table.save(path)
    assert [b.machine for b in LatencyTable.load(path).builds] == [b.machine for b in table.builds]
    rows = pq.read_table(path)
    header = {**json.loads(rows.schema.metadata[KEY]), "schema": 4}
    pq.write_table(rows.drop_columns(["machine"]).replace_schema_metadata({KEY: json.dumps(header).encode()}), path)
    older = LatencyTable.load(path)
    assert {b.machine for b in older.builds} == {""}
    assert older.machines == [""]


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, words)))


def test_the_command_merges_and_warns(tmp_path: Path) -> None:
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for seed, (path, slower) in enumerate(zip(files, (1.0, 1.1), strict=True)):
        table_of("", slower=slower, design=3, seed=seed).save(path)
    out = tmp_path / "all.parquet"
    result = invoke("table", "merge", files[0], f"odd={files[1]}", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "warning: machine odd disagrees with one: its reference takes 10.0% longer: predicted times are one's" in result.stderr
    assert "machine    one: 6 builds; times are its own" in result.stdout
    assert "machine    odd: 6 builds; reference +10.0%, times against it" in result.stdout
    assert LatencyTable.load(out).machines == ["one", "odd"]
    again = invoke("table", "merge", files[0], f"odd={files[1]}", "-o", out)
    assert again.exit_code == 2
    assert "not overwritten" in again.stderr
    alone = invoke("table", "merge", files[0], "-o", tmp_path / "other.parquet")
    assert alone.exit_code == 2
    assert "two tables or more" in alone.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_profiles_of_two_machines_are_merged_and_gone_on_with(tmp_path: Path) -> None:
    law, axes = LatencyLaw.random(tiny.lowering("cnn").network, 2), ["precision"]
    backends = {name: SimulatedBackend(law, noise=0.003, seed=seed) for seed, name in enumerate(("a", "b"))}
    files = {name: tmp_path / f"{name}.parquet" for name in backends}
    for seed, (name, backend) in enumerate(backends.items()):
        backend.machine = name
        hs.profile(tiny.task("cnn"), out=files[name], backend=backend, axes=axes, builds=5, seed=seed)
    out = tmp_path / "all.parquet"
    result = invoke("table", "merge", *files.values(), "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "warning" not in result.stderr
    table = LatencyTable.load(out)
    assert [len(table.of_machine(name)) for name in ("a", "b")] == [8, 8]
    again = hs.profile(tiny.task("cnn"), out=out, backend=backends["b"], axes=axes, builds=12, seed=3)
    assert len(again.of_machine("b")) > 8 == len(again.of_machine("a"))
    assert again.header.reference_ns == table.header.reference_ns

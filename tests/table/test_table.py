from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import numbered, rewrite
from simulation import DEVICE, alone_table, chain, grouped, simulated_table

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.table.table import SCHEMA, LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK = chain(5)
LAW = LatencyLaw.random(NETWORK)


@pytest.fixture
def table() -> LatencyTable:
    return simulated_table(NETWORK, LAW, design=4, heldout=1, noise=0.02)


@pytest.fixture
def saved(table: LatencyTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "table.parquet")
    return tmp_path / "table.parquet"


def test_round_trip(table: LatencyTable, saved: Path) -> None:
    loaded = LatencyTable.load(saved)
    assert loaded.header == table.header
    assert loaded.network.fingerprint == NETWORK.fingerprint
    assert len(loaded.builds) == len(table.builds)
    for a, b in zip(loaded.builds, table.builds, strict=True):
        assert np.array_equal(a.samples_ns, b.samples_ns)
        assert np.array_equal(a.reference_ns, b.reference_ns)
        assert a.samples_ns.dtype == np.int64
        empty = np.zeros(0, np.int64)
        assert repr(replace(a, samples_ns=empty, reference_ns=empty)) == repr(
            replace(b, samples_ns=empty, reference_ns=empty)
        )
        assert a.nodes == b.nodes
        assert a.source == "measured"


GROUPED = grouped()
GRID = {"conv0": [24, 16], "conv1": [40, 8], "conv2": [16]}


@pytest.fixture
def narrow(tmp_path: Path) -> LatencyTable:
    """A table of a network with channel groups; it is also at `narrow.parquet`."""
    made = simulated_table(GROUPED, LatencyLaw.random(GROUPED), design=3, grid=GRID)
    made.save(tmp_path / "narrow.parquet")
    return made


def test_widths_and_their_grid_come_back(narrow: LatencyTable, tmp_path: Path) -> None:
    loaded = LatencyTable.load(tmp_path / "narrow.parquet")
    assert loaded.header == narrow.header
    assert loaded.network == GROUPED
    assert loaded.grid() == GRID
    assert [b.widths for b in loaded.builds] == [b.widths for b in narrow.builds]
    assert {b.widths[1] for b in loaded.builds} == {40, 8}
    for build in loaded.builds:
        candidate = loaded.candidate(build)
        assert tuple(candidate.widths.values()) == build.widths
        assert tuple(map(str, candidate.variants.values())) == build.variants


def test_without_a_grid_every_group_is_whole(narrow: LatencyTable) -> None:
    assert narrow.with_header(grid={}).grid() == {"conv0": [24], "conv1": [40], "conv2": [16]}
    plain = replace(narrow.builds[0], widths=())
    assert narrow.candidate(plain).widths == GROUPED.channels


def test_saving_twice_gives_the_same_bytes(table: LatencyTable, saved: Path, tmp_path: Path) -> None:
    LatencyTable.load(saved).save(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == saved.read_bytes()


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        LatencyTable.load(tmp_path / "none.parquet")


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_truncated_file(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(InvalidInput, match="truncated"):
        LatencyTable.load(saved)


def test_foreign_files(saved: Path) -> None:
    saved.write_bytes(b"\x80\x04 no parquet at all" * 50)
    with pytest.raises(InvalidInput, match="not a readable Parquet"):
        LatencyTable.load(saved)
    pq.write_table(pa.table({"a": [1, 2]}), saved)
    with pytest.raises(InvalidInput, match="not a latency table"):
        LatencyTable.load(saved)


def test_another_kind_of_file_of_ours(saved: Path) -> None:
    rewrite(saved, lambda h: h.update(kind="sensitivity_table"))
    with pytest.raises(InvalidInput, match="found: sensitivity_table"):
        LatencyTable.load(saved)


def test_another_schema(saved: Path) -> None:
    rewrite(saved, lambda h: h.update(schema=SCHEMA + 1))
    with pytest.raises(IncompatibleTables, match=f"schema {SCHEMA + 1}.*reads schema {SCHEMA}, 4, 3, 2"):
        LatencyTable.load(saved)


def test_a_table_of_schema_2_has_no_energies(saved: Path) -> None:
    """Files from before energies were kept: the columns are not there."""
    new = LatencyTable.load(saved)
    lacking = ["energy_j", "reference_energy_j", "energy_error", "section"]
    rewrite(
        saved, lambda h: h.update(h.pop("sections")[0], schema=2), lambda table: table.drop_columns(lacking)
    )
    old = LatencyTable.load(saved)
    assert [b.key for b in old.builds] == [b.key for b in new.builds]
    assert all(b.energy_j is None and b.energy_ratio is None for b in old.builds)


_WRITER = """
import os, sys
from hwsearch.table.table import LatencyTable
table = LatencyTable.load(sys.argv[1])
replace = os.replace
os.replace = lambda *a: os.kill(os.getpid(), 9)   # everything is written, nothing is in place
os.fsync = (lambda f: os.kill(os.getpid(), 9)) if sys.argv[2] == "fsync" else os.fsync
LatencyTable(table.header, table.builds[:1]).save(sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_killed_writer_leaves_the_old_file(saved: Path, when: str) -> None:
    before = saved.read_bytes()
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", _WRITER, str(saved), when], env=environment, check=False)
    assert done.returncode == -9
    assert saved.read_bytes() == before


def test_require_names_what_differs(table: LatencyTable) -> None:
    table.require(
        device=DEVICE,
        network=NETWORK,
        backend="simulated",
        options={"threads": 1, "base": "fp32", "batch": 1},
    )
    table.require()
    with pytest.raises(
        IncompatibleTables,
        match=r"another device: table=Simulated CPU \(0123456789ab\), current=Other \(ff\)",
    ):
        table.require(device={"id": "ff", "chip": "Other"})
    other = chain(6)
    with pytest.raises(
        IncompatibleTables, match=f"another network: .*{NETWORK.fingerprint}.*{other.fingerprint}"
    ):
        table.require(network=other)
    with pytest.raises(IncompatibleTables, match="another backend: table=simulated, current=openvino"):
        table.require(backend="openvino")
    with pytest.raises(IncompatibleTables, match="another threads: table=1, current=2"):
        table.require(options={"threads": 2, "base": "fp32", "batch": 1})
    with pytest.raises(IncompatibleTables, match="another batch: table=1, current=8"):
        table.require(options={"threads": 1, "base": "fp32", "batch": 8})
    with pytest.raises(IncompatibleTables, match="another load: table=None, current=2"):
        table.require(options={"threads": 1, "base": "fp32", "batch": 1, "load": 2})
    with pytest.raises(IncompatibleTables, match="another residual: table=True, current=None"):
        table.with_header(options={"threads": 1, "residual": True}).require(options={"threads": 1})
    with pytest.raises(IncompatibleTables, match=r"another runtime: .*'1'.*'2'"):
        table.require(versions={"simulated": "2"})


def test_the_same_structure_under_another_name_and_other_weights_is_accepted(table: LatencyTable) -> None:
    table.require(network=replace(NETWORK, name="other", weights_digest="0"))


def test_find_says_that_the_profile_was_interrupted(table: LatencyTable) -> None:
    assert table.find("uniform").variants == ("dense.int8",) * 5
    with pytest.raises(InvalidInput, match=r"no dense build.*run `hwsearch profile` again"):
        LatencyTable(table.header).find("dense")


def test_offered_is_what_was_measured_and_ran_as_asked(table: LatencyTable) -> None:
    assert table.offered() == {u.name: ("dense.fp32", "dense.int8") for u in NETWORK.units}
    refused = table.with_header(unsupported={"layer1.conv": {"dense.int8": "executed in fp32"}})
    assert refused.offered()["layer1.conv"] == ("dense.fp32",)
    only = LatencyTable(table.header, table.builds[:1])
    assert set(only.offered().values()) == {("dense.fp32",)}
    for offered in alone_table(NETWORK, LAW).offered().values():
        assert "" not in offered


def test_frame_has_a_row_for_each_build(table: LatencyTable) -> None:
    assert len(table.to_frame()) == len(table.builds)
    assert len(LatencyTable(table.header).to_frame()) == 0
    assert "chain on Simulated CPU" in repr(table)


# ---------------------------------------------------------------- several tables in one file

OTHERS: list[dict[str, Any]] = [
    {"threads": 1, "base": "fp32", "batch": 1},
    {"threads": 4, "base": "fp32", "batch": 1},
    {"threads": 1, "base": "fp32", "batch": 1, "load": 2},
]


def at_size(table: LatencyTable, size: int) -> LatencyTable:
    """Of the same model on images of another size."""
    units = tuple(
        replace(
            u,
            input_shapes=tuple((*s[:2], size, size) for s in u.input_shapes),
            output_shape=(*u.output_shape[:2], size, size),
        )
        for u in table.network.units
    )
    return table.with_header(network=replace(table.network, units=units, input_shapes=((1, 8, size, size),)))


@pytest.fixture
def several(table: LatencyTable, tmp_path: Path) -> tuple[Path, list[LatencyTable]]:
    made = [LatencyTable(t.header, t.builds[: 3 + i]) for i, t in enumerate(
        [*(table.with_header(options=o) for o in OTHERS), at_size(table, 24)]
    )]  # fmt: skip
    for one in made:
        one.save(tmp_path / "several.parquet")
    return tmp_path / "several.parquet", made


def same(a: LatencyTable, b: LatencyTable) -> bool:
    return a.header == b.header and [x.key for x in a.builds] == [x.key for x in b.builds]


def test_sections_come_back_in_the_order_in_which_they_were_saved(
    several: tuple[Path, list[LatencyTable]],
) -> None:
    path, made = several
    found = LatencyTable.sections(path)
    assert len(found) == len(made)
    assert all(same(a, b) for a, b in zip(found, made, strict=True))
    assert same(LatencyTable.load(path, threads=4), made[1])
    assert same(LatencyTable.load(path, load=2), made[2])
    assert same(LatencyTable.load(path, shape="1x8x24x24"), made[3])
    assert same(LatencyTable.load(path, network=made[3].network.fingerprint), made[3])
    assert same(LatencyTable.load(path, like=OTHERS[1], network=made[0].network.fingerprint), made[1])
    assert len(LatencyTable.sections(path, threads=1)) == 3
    with pytest.raises(InvalidInput, match=r"4 sections.*--threads and --shape and --load"):
        LatencyTable.load(path)
    with pytest.raises(InvalidInput, match="no section of threads 3"):
        LatencyTable.sections(path, threads=3)


@pytest.mark.parametrize("place", range(4))
def test_saving_a_section_replaces_just_it(several: tuple[Path, list[LatencyTable]], place: int) -> None:
    path, made = several
    mine = LatencyTable(made[place].header, made[place].builds[:1]).with_header(command="another")
    mine.save(path)
    found = LatencyTable.sections(path)
    assert len(found) == len(made)
    for i, (a, b) in enumerate(zip(found, made, strict=True)):
        assert same(a, mine if i == place else b)
        assert all(
            np.array_equal(x.samples_ns, y.samples_ns) for x, y in zip(a.builds, b.builds, strict=False)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": {"id": "ff", "chip": "Other"}}, "another device"),
        ({"backend": "openvino"}, "another backend"),
        ({"versions": {"simulated": "2"}}, "another runtime"),
        ({"network": chain(6)}, "another network"),
    ],
)
def test_what_does_not_belong_into_the_file_is_refused(
    several: tuple[Path, list[LatencyTable]], change: dict[str, Any], message: str
) -> None:
    path, _ = several
    before = path.read_bytes()
    other = LatencyTable(replace(LatencyTable.load(path, threads=4).header, **change))
    with pytest.raises(IncompatibleTables, match=message):
        other.save(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_table_is_not_overwritten(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="not a readable Parquet"):
        table.save(path)
    assert path.read_text() == "mine"


_SECTION_WRITER = """
import os, sys
from hwsearch.table.table import LatencyTable
table = LatencyTable.load(sys.argv[1], threads=4)
os.replace = lambda *a: os.kill(os.getpid(), 9)
os.fsync = (lambda f: os.kill(os.getpid(), 9)) if sys.argv[2] == "fsync" else os.fsync
options = {**table.header.options, "threads": int(sys.argv[3])}
LatencyTable(table.header, table.builds[:1]).with_header(options=options).save(sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("threads", [4, 8])
def test_a_killed_writer_loses_nothing_of_any_section(
    several: tuple[Path, list[LatencyTable]], when: str, threads: int
) -> None:
    path, made = several
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _SECTION_WRITER, str(path), when, str(threads)],
        env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == -9
    assert all(same(a, b) for a, b in zip(LatencyTable.sections(path), made, strict=True))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda h: h.update(sections=[]), lambda t: t),
        (lambda h: h.update(sections=3), lambda t: t),
        (lambda h: h.update(sections=[1, 2, 3, 4]), lambda t: t),
        (lambda h: h.pop("sections"), lambda t: t),
        (lambda h: h["sections"].pop(), lambda t: t),
        (lambda h: h["sections"].append(h["sections"][0]), lambda t: t),
        (lambda h: h["sections"][1].update(backend="openvino"), lambda t: t),
        (lambda h: h["sections"][1].update(options={}), lambda t: t),
        (lambda h: h["sections"][1].update(options=[]), lambda t: t),
        (lambda h: h["sections"][1].pop("network"), lambda t: t),
        (lambda h: None, lambda t: t.drop_columns(["section"])),
        (lambda h: None, numbered(lambda n: [None] * len(n))),
        (lambda h: None, numbered(lambda n: [-1] * len(n))),
        (lambda h: None, numbered(lambda n: [x + 1 for x in n])),
        (lambda h: None, numbered(lambda n: [str(x) for x in n])),
    ],
)
def test_damaged_sections(
    several: tuple[Path, list[LatencyTable]],
    change: Callable[[dict[str, Any]], Any],
    rows: Callable[[pa.Table], pa.Table],
) -> None:
    path, _ = several
    rewrite(path, change, rows)
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.sections(path)
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(path, threads=4)


def test_a_file_of_schema_2_is_one_of_one_section(saved: Path, table: LatencyTable) -> None:
    def older(header: dict[str, Any]) -> None:
        [own] = header.pop("sections")
        header.update(own, schema=2)

    rewrite(saved, older, lambda t: t.drop_columns(["section"]))
    assert same(LatencyTable.load(saved), table)
    more = table.with_header(options=OTHERS[1])
    more.save(saved)
    found = LatencyTable.sections(saved)
    assert [same(a, b) for a, b in zip(found, (table, more), strict=True)] == [True, True]


def test_the_published_tables_load() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "profiles").glob("*.parquet"))
    assert files
    for file in files:
        table = LatencyTable.load(file)
        assert (
            table.header.section
            == LatencyTable.load(file, threads=1, shape=table.network.input_shapes).header.section
        )

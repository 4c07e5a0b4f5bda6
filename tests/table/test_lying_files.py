"""Files that say what no honest one says: an error names the file, the row where there are rows, the field, and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from simulation import grouped, scores, simulated_table

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.front import Front
from hwsearch.allocate.search import front, search
from hwsearch.cli.ending import _explain
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.loss.table import SensitivityTable
from hwsearch.table.parquet import KEY
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK = grouped()
GRID = {"conv0": [24, 16], "conv1": [40, 8], "conv2": [16]}
ROW = 2
"""The one that lies."""
LOADERS: dict[str, Callable[[Path], Any]] = {
    "table.parquet": LatencyTable.load,
    "sens.parquet": SensitivityTable.load,
    "front.parquet": Front.load,
    "alloc.json": Allocation.load,
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of each kind, of a simulated profile."""
    folder = tmp_path_factory.mktemp("honest")
    table = simulated_table(NETWORK, LatencyLaw.random(NETWORK), design=4, noise=0.02, grid=GRID)
    own = scores(NETWORK, GRID)
    table.save(folder / "table.parquet")
    own.save(folder / "sens.parquet")
    front(table, own, points=4).save(folder / "front.parquet")
    search(table, own, ["latency=80%", "size=700KB"]).save(folder / "alloc.json")
    return folder


Change = Callable[[Path], None]


def row(**values: Any) -> Change:
    """Other values in one row of a file's rows."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        rows = table.to_pylist()
        for name, value in values.items():
            rows[ROW][name] = value(rows[ROW][name]) if callable(value) else value
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    return change


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Something else in the header: in the only section's, where there are sections."""

    def rewrite(path: Path) -> None:
        table = pq.read_table(path)
        data = json.loads(table.schema.metadata[KEY])
        change(data["sections"][0] if "sections" in data else data)
        pq.write_table(table.replace_schema_metadata({KEY: json.dumps(data).encode()}), path)

    return rewrite


def columns(change: Callable[[pa.Table], pa.Table]) -> Change:
    """Other columns or rows."""
    return lambda path: pq.write_table(change(pq.read_table(path)), path)


def answer(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Something else in the JSON."""

    def rewrite(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return rewrite


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda old: [value, *old[1:]]


def node(**values: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda old: [{**old[0], **values}, *old[1:]]


def cast(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.schema.get_field_index(name), name, t[name].cast(kind))


def again(table: pa.Table) -> pa.Table:
    """The loss of one choice twice, and not the same."""
    other = table.slice(0, 1).set_column(table.schema.get_field_index("loss"), "loss", pa.array([9.0]))
    return pa.concat_tables([table.slice(0, ROW), other, table.slice(ROW)])


def twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, ROW), table.slice(0, 1), table.slice(ROW)])


T, S, F, A = "table.parquet", "sens.parquet", "front.parquet", "alloc.json"
IN_ROW = {
    "ratio": [
        (T, row(ratio=math.nan)),
        (T, row(ratio=0.0)),
        (T, row(ratio=-1.0)),
        (T, row(ratio=math.inf)),
        (T, row(ratio=lambda r: 9 * r)),
    ],
    "low": [(T, row(low=lambda x: 4 * x)), (T, row(low=math.nan)), (T, row(low=-0.1))],
    "high": [(T, row(high=0.0)), (T, row(high=math.nan))],
    "samples_ns": [
        (T, row(samples_ns=first(0))),
        (T, row(samples_ns=first(-5))),
        (T, row(samples_ns=[])),
        (T, row(samples_ns=first(None))),
    ],
    "reference_ns": [
        (T, row(reference_ns=first(-1))),
        (T, row(reference_ns=[])),
        (T, row(reference_ns=None)),
    ],
    "singles_ns": [(T, row(singles_ns=[0]))],
    "nodes.units": [(T, row(nodes=node(units=["ghost"])))],
    "nodes.time_ns": [(T, row(nodes=node(time_ns=math.nan))), (T, row(nodes=node(time_ns=-1.0)))],
    "nodes.kind": [(T, row(nodes=node(kind="other")))],
    "role": [(T, row(role="guess")), (T, row(role=None))],
    "base": [(T, row(base="fp31"))],
    "source": [(T, row(source="estimated"))],
    "variants": [
        (T, row(variants=first("dense.int3"))),
        (T, row(variants=lambda v: v[1:])),
        (T, row(variants=first(""))),
        (F, row(variants=first("9:4.int8"))),
        (F, row(variants=lambda v: [*v, "dense.int8"])),
    ],
    "executed": [(T, row(executed=first("quickly"))), (T, row(executed=lambda e: [*e, "fp32"]))],
    "widths": [
        (T, row(widths=first(25))),
        (T, row(widths=first(0))),
        (T, row(widths=[24])),
        (F, row(widths=first(0))),
        (F, row(widths=[24])),
    ],
    "file_bytes": [(T, row(file_bytes=-1))],
    "build_s": [(T, row(build_s=math.nan))],
    "output_error": [(T, row(output_error=-0.1))],
    "energy_j": [(T, row(energy_j=-1e-3))],
    "loss": [
        (S, row(loss=-1e-9)),
        (S, row(loss=math.nan)),
        (S, row(loss=math.inf)),
        (F, row(loss=-0.5)),
        (F, row(loss=math.nan)),
    ],
    "unit": [(S, row(unit="ghost")), (S, columns(twice)), (S, columns(again))],
    "variant": [
        (S, row(variant="dense.int3")),
        (S, row(unit="conv0", variant="width25")),
        (S, row(unit="conv0", variant="width0")),
        (S, row(unit="conv0", variant="widthy")),
    ],
    "latency_ns": [(F, row(latency_ns=0.0)), (F, row(latency_ns=math.nan))],
    "size_bytes": [(F, row(size_bytes=-3.0))],
    "low_ns": [(F, row(low_ns=2.0, high_ns=1.0))],
    "memory_bytes": [(F, row(memory_bytes=-1.0))],
    "is the same": [(T, columns(twice))],
}
IN_HEADER = {
    "reference_ns": [
        (T, header(lambda h: h.update(reference_ns=2 * h["reference_ns"]))),
        (T, header(lambda h: h.update(reference_ns=0.0))),
        (T, header(lambda h: h.update(reference_ns=math.nan))),
        (T, header(lambda h: h.update(reference_ns="fast"))),
    ],
    "options.threads": [
        (T, header(lambda h: h["options"].update(threads="1"))),
        (T, header(lambda h: h["options"].update(threads=0))),
    ],
    "options.batch": [(T, header(lambda h: h["options"].update(batch=1.5)))],
    "options.base": [(T, header(lambda h: h["options"].update(base=8)))],
    "options.int8_bits": [(T, header(lambda h: h["options"].update(int8_bits=4)))],
    "options.residual": [(T, header(lambda h: h["options"].update(residual="yes")))],
    "options.colour": [(T, header(lambda h: h["options"].update(colour=["red"])))],
    "grid of conv0": [
        (T, header(lambda h: h["grid"].update(conv0=[24, 99]))),
        (T, header(lambda h: h["grid"].update(conv0=[24, -1]))),
    ],
    "unsupported of ghost": [(T, header(lambda h: h.update(unsupported={"ghost": {"dense.int8": "slow"}})))],
    "unit_bytes of conv0": [(T, header(lambda h: h.update(unit_bytes={"conv0": {"dense.int8": "many"}})))],
    "graph_bytes": [
        (T, header(lambda h: h.update(graph_bytes=-1 - h["network"]["fixed_bytes"]))),
        (T, header(lambda h: h.update(graph_bytes=0.5))),
    ],
    "dense_file_bytes": [(T, header(lambda h: h.update(dense_file_bytes=-1)))],
    "macs": [
        (T, header(lambda h: h["network"]["units"][0].update(macs="all"))),
        (S, header(lambda h: h["network"]["units"][0].update(macs=-1))),
    ],
    "network.edges": [(T, header(lambda h: h["network"]["edges"][0].update(src="ghost")))],
    "samples": [(S, header(lambda h: h.update(samples=0)))],
    "divergence": [(S, header(lambda h: h.update(divergence="guess")))],
    "int8_bits": [(S, header(lambda h: h.update(int8_bits=3)))],
    "rank_correlation": [(S, header(lambda h: h.update(rank_correlation=1.5)))],
    "validation": [(S, header(lambda h: h.update(validation=[[0.1, -0.2]])))],
    "correction.factor": [(S, header(lambda h: h.update(correction={"factor": -1.0})))],
    "correction.exponent": [(S, header(lambda h: h.update(correction={"exponent": "much"})))],
    "correction.units": [
        (S, header(lambda h: h.update(correction={"units": {"ghost": 1.0}}))),
        (S, header(lambda h: h.update(correction={"units": {"conv0": -0.5}}))),
    ],
    "correction.groups": [(S, header(lambda h: h.update(correction={"groups": 3})))],
    "corrected": [(S, header(lambda h: h.update(corrected=[0.1])))],
    "passes": [(S, header(lambda h: h.update(passes=-1)))],
    "order of conv0": [(S, header(lambda h: h.update(order={"conv0": [0, 0]})))],
    "estimated of conv0": [(S, header(lambda h: h.update(estimated=[["conv0", 99]])))],
    "quantize_outputs": [(S, header(lambda h: h.update(quantize_outputs="no")))],
    "unit conv3": [(S, columns(lambda t: t.filter(pa.compute.not_equal(t["unit"], "conv3"))))],
    "over": [(F, header(lambda h: h.update(over="beauty")))],
    "column ratio": [
        (T, columns(cast("ratio", pa.string()))),
        (T, columns(lambda t: t.drop_columns(["ratio"]))),
    ],
    "column loss": [
        (S, columns(cast("loss", pa.string()))),
        (F, columns(lambda t: t.drop_columns(["loss"]))),
    ],
    "truncated": [(name, lambda path: path.write_bytes(path.read_bytes()[:-9])) for name in (T, S, F)],
    "not JSON": [(A, lambda path: path.write_bytes(path.read_bytes()[:-9]))],
    "variants.conv1": [(A, answer(lambda d: d["variants"].update(conv1="dense.int3")))],
    "predicted.latency_ns": [
        (A, answer(lambda d: d["predicted"].update(latency_ns=-1))),
        (A, answer(lambda d: d["predicted"].update(latency_ns=0))),
    ],
    "predicted.loss": [(A, answer(lambda d: d["predicted"].update(loss=-0.1)))],
    "dense.size_bytes": [(A, answer(lambda d: d["dense"].update(size_bytes=0)))],
    "solver.gap": [(A, answer(lambda d: d["solver"].update(gap=-1)))],
    "budgets.0.text": [
        (A, answer(lambda d: d["budgets"][0].update(text="faster, please"))),
        (A, answer(lambda d: d["budgets"][0].update(text=4))),
    ],
    "budgets.0.column": [
        (A, answer(lambda d: d["budgets"][0].update(column="size"))),
        (A, answer(lambda d: d["budgets"][0].update(column="beauty"))),
    ],
    "budgets.0.limit": [
        (A, answer(lambda d: d["budgets"][0].update(limit=10**9))),
        (A, answer(lambda d: d["budgets"][0].update(limit=1.5))),
    ],
    "budgets.1.limit": [(A, answer(lambda d: d["budgets"][1].update(limit=1)))],
    "options.load": [(A, answer(lambda d: d["options"].update(load="much")))],
    "widths.conv0": [
        (A, answer(lambda d: d["widths"].update(conv0=0))),
        (A, answer(lambda d: d.update(widths={"conv0": 3}, order={"conv0": "1 0"}))),
    ],
    "order.conv0": [(A, answer(lambda d: d.update(widths={}, order={"conv0": "0 1"})))],
}
LIES = [
    pytest.param(name, change, field, field in IN_ROW and source is IN_ROW, id=f"{name}-{field}-{i}")
    for source in (IN_ROW, IN_HEADER)
    for field, own in source.items()
    for i, (name, change) in enumerate(own)
]


def test_there_are_enough_lies() -> None:
    assert len(IN_ROW) + len(IN_HEADER) >= 20


def test_honest_files_load(honest: Path) -> None:
    for name, load in LOADERS.items():
        load(honest / name)


def test_a_file_may_be_smaller_than_what_the_network_stores_in_no_unit(honest: Path, tmp_path: Path) -> None:
    """The exporter computes constants ahead: of a transformer with masks and positions the bytes beside units are negative."""
    path = tmp_path / T
    table = LatencyTable.load(honest / T)
    network = replace(table.network, fixed_bytes=2000)
    table.with_header(network=network, graph_bytes=-1256).save(path)
    assert LatencyTable.load(path).header.graph_bytes == -1256


@pytest.mark.parametrize(("name", "change", "field", "in_row"), LIES)
def test_a_lie_is_refused_by_file_row_and_field(
    honest: Path, tmp_path: Path, name: str, change: Change, field: str, in_row: bool
) -> None:
    path = tmp_path / name
    path.write_bytes((honest / name).read_bytes())
    change(path)
    with pytest.raises((InvalidInput, IncompatibleTables)) as caught:
        LOADERS[name](path)
    line, code = _explain(caught.value)
    assert code == 2
    assert str(path) in line
    assert field in line
    assert f"row {ROW}" in line or not in_row
    assert any(
        todo in line for todo in ("take another copy", "search again", "make it again", "hwsearch search")
    )


def test_of_several_sections_the_one_that_lies_is_named(honest: Path, tmp_path: Path) -> None:
    table = LatencyTable.load(honest / T)
    table.save(tmp_path / T)
    wrong = replace(table.builds[1], low=2 * table.builds[1].ratio)
    other = LatencyTable(table.header, (table.builds[0], wrong))
    with_options = other.with_header(options={**table.header.options, "threads": 2})
    with_options.save(tmp_path / T)
    with pytest.raises(InvalidInput, match="row 1 of section 2: low is"):
        LatencyTable.load(tmp_path / T, threads=1)

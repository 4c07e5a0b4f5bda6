"""Rows of builds: what a file says comes back, and what no measurement can say is damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damaging import column, rewrite
from simulation import chain, grouped, simulated_build, simulated_table

from hwsearch.device.nvidia import State
from hwsearch.errors import InvalidInput
from hwsearch.network.variants import uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK, GROUPED = chain(5), grouped()


@pytest.fixture
def table() -> LatencyTable:
    return simulated_table(NETWORK, LatencyLaw.random(NETWORK), design=4, heldout=1, noise=0.02)


@pytest.fixture
def saved(table: LatencyTable, tmp_path: Path) -> Path:
    table.save(tmp_path / "table.parquet")
    return tmp_path / "table.parquet"


def test_one_allocation_at_other_widths_is_another_build() -> None:
    law = LatencyLaw.random(GROUPED)
    variants = uniform(GROUPED, "int8")
    keys = {simulated_build(GROUPED, law, variants, widths={"conv1": w}).key for w in (40, 8)}
    assert len(keys) == 2


def test_states_round_trip_and_a_table_of_schema_3_has_none(saved: Path, table: LatencyTable) -> None:
    states = (State(1410, 9251, 123.5, 61, ("power cap",)), State(throttle=()))
    with_states = LatencyTable(table.header, (replace(table.builds[0], states=states), *table.builds[1:]))
    with_states.save(saved)
    assert [b.states for b in LatencyTable.load(saved).builds] == [b.states for b in with_states.builds]
    rewrite(saved, lambda h: h.update(schema=3), lambda t: t.drop_columns(["states"]))
    old = LatencyTable.load(saved)
    assert old.header == table.header
    assert [b.key for b in old.builds] == [b.key for b in table.builds]
    assert all(b.states == () for b in old.builds)
    more = with_states.with_header(options={**table.header.options, "clocks": 1410})
    more.save(saved)
    assert [next(b.states for b in t.builds) for t in LatencyTable.sections(saved)] == [(), states]


@pytest.mark.parametrize("value", [[24, 40], [24, 40, 17], [24, 0, 16], [24, -8, 16], None])
def test_damaged_widths(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "narrow.parquet"
    simulated_table(GROUPED, LatencyLaw.random(GROUPED), design=3).save(path)
    LatencyTable.load(path)
    rewrite(path, lambda h: None, column("widths", value))
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "estimated"), ("ratio", float("nan")), ("ratio", -1.0), ("ratio", 0.0), ("variants", ["dense.int8"]),
        ("variants", None), ("samples_ns", None), ("nodes", None), ("executed", None), ("executed", ["fp32"]),
        ("ratio", None), ("variants", ["dense.fp7"] * 5), ("source", None), ("role", None),
    ],
)  # fmt: skip
def test_damaged_rows(saved: Path, name: str, value: Any) -> None:
    rewrite(saved, lambda h: None, column(name, value))
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(saved)


def test_a_lost_column_is_damage(saved: Path) -> None:
    rewrite(saved, lambda h: None, lambda t: t.drop_columns(["ratio"]))
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(saved)

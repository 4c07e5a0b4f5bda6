"""Headers of tables: one that lacks a field, or whose widths no network has, is damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from damaging import rewrite
from simulation import grouped, simulated_table

from hwsearch.errors import InvalidInput
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

GROUPED = grouped()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    grid = {"conv0": [24, 16], "conv1": [40, 8], "conv2": [16]}
    simulated_table(GROUPED, LatencyLaw.random(GROUPED), design=3, grid=grid).save(tmp_path / "table.parquet")
    return tmp_path / "table.parquet"


@pytest.mark.parametrize("key", ["network", "device", "backend", "options"])
def test_a_header_without_a_field_is_damage(saved: Path, key: str) -> None:
    rewrite(saved, lambda h: h["sections"][0].pop(key))
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(saved)


@pytest.mark.parametrize(
    "grid", [{"conv0": [24, 30]}, {"conv0": [16, 8]}, {"conv0": [24, 0]}, {"conv0": 3}, {"conv9": [24]}, [1]]
)
def test_a_damaged_grid(saved: Path, grid: Any) -> None:
    LatencyTable.load(saved)
    rewrite(saved, lambda h: h["sections"][0].update(grid=grid))
    with pytest.raises(InvalidInput, match="damaged"):
        LatencyTable.load(saved)

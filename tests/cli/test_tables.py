"""`hwsearch table ...`: what each command shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from invoking import Install, Table, invoke
from simulation import chain, grouped, probed, simulated_table

from hwsearch.latency.staircase import staircase
from hwsearch.testing import LatencyLaw


def test_table_show(api: Install) -> None:
    api(LatencyTable=SimpleNamespace(sections=lambda path: [Table()]))
    assert invoke("table", "show", "t.parquet").stdout == "a table of 24 builds\n"
    assert json.loads(invoke("table", "show", "t.parquet", "--json").stdout) == {"backend": "openvino"}


def test_table_staircase(tmp_path: Path) -> None:
    table = probed()
    table.save(tmp_path / "t.parquet")
    plot = tmp_path / "stairs.png"
    result = invoke("table", "staircase", str(tmp_path / "t.parquet"), "--plot", str(plot))
    assert result.exit_code == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()][-len(staircase(table)) :]
    assert rows[0][:2] == ["conv0", "24"]
    assert [row[-1] == "kept" for row in rows] == [step.kept for step in staircase(table)]
    steps = json.loads(invoke("table", "staircase", str(tmp_path / "t.parquet"), "--json").stdout)
    assert [(s["group"], s["width"], s["times_ns"], s["kept"]) for s in steps] == [
        (s.group, s.width, s.times_ns, s.kept) for s in staircase(table)
    ]


def test_table_staircase_without_widths(tmp_path: Path) -> None:
    network = grouped()
    simulated_table(network, LatencyLaw.random(network), design=1).save(tmp_path / "t.parquet")
    result = invoke("table", "staircase", str(tmp_path / "t.parquet"))
    assert result.exit_code == 0
    assert "holds no widths" in result.stdout
    assert invoke("table", "staircase", str(tmp_path / "t.parquet"), "--plot", "s.png").exit_code == 2


def checked(holds: bool) -> Any:
    found = [SimpleNamespace(role="design", then=0.5, now=0.55, change=0.1, error=0.02)]

    class Found:
        builds = found

        def __str__(self) -> str:
            return "1 build measured again"

        def to_json(self) -> dict[str, Any]:
            return {"holds": holds}

    Found.holds = holds  # type: ignore[attr-defined]
    return Found()


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_table_recheck(api: Install, monkeypatch: pytest.MonkeyPatch, holds: bool, code: int) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("hwsearch.cli.sections.table_of_task", lambda path, task: f"table {path} of {task}")
    api(
        LatencyTable=Table,
        recheck=lambda table, task, **options: seen.update(table=table, task=task, **options) or checked(holds),
    )
    result = invoke("table", "recheck", "t.parquet", "--task", "zoo:x", "--builds", "3")
    assert result.exit_code == code
    assert "+10.0%" in result.stdout
    assert result.stdout.endswith("1 build measured again\n")
    del seen["progress"]
    assert seen == {
        "table": "table t.parquet of task zoo:x", "task": "task zoo:x", "builds": 3, "lock_clocks": False,
    }  # fmt: skip
    result = invoke("table", "recheck", "t.parquet", "--json")
    assert (json.loads(result.stdout), result.exit_code) == ({"holds": holds}, code)
    assert seen["task"] is None


def test_table_diagnose(tmp_path: Path) -> None:
    network = chain(16)
    table = simulated_table(network, LatencyLaw.random(network, 1), heldout=5, noise=0.02, node_noise=0.05)
    table.save(tmp_path / "t.parquet")
    result = invoke("table", "diagnose", str(tmp_path / "t.parquet"), "--plot", str(tmp_path / "d.png"))
    assert result.exit_code == 0
    assert "inside one sigma" in result.stdout
    assert (tmp_path / "d.png").exists()
    assert {"quality", "correlations", "points"} <= set(
        json.loads(invoke("table", "diagnose", str(tmp_path / "t.parquet"), "--json").stdout)
    )

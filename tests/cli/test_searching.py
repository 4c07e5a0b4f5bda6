"""`hwsearch search` and `hwsearch front`: what they pass on and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invoking import Install, Scores, Table, invoke

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.front import Front, Point


def test_search(api: Install, tmp_path: Path) -> None:
    chosen = Allocation(
        variants={"a": "dense.int8", "b": "dense.bf16", "c": "dense.int8"},
        predicted={"latency_ns": 4.1e6, "sigma_ns": 5e4, "size_bytes": 1_200_000, "macs": 9.0, "loss": 0.0123},
        dense={"latency_ns": 1e7, "size_bytes": 4_800_000},
        budgets=[
            {"text": "latency=42%", "column": "latency", "limit": 4_200_000},
            {"text": "size=2MB", "column": "size", "limit": 2_000_000},
        ],
        solver={"status": "optimal", "gap": 0.0, "bound": 0.0123},
        network="", weights_digest="", device={}, backend="openvino", options={},
    )  # fmt: skip
    path = tmp_path / "alloc.json"
    seen: list[Any] = []

    def find(*words: Any, **options: Any) -> Allocation:
        seen.append((*words, options))
        return chosen

    api(LatencyTable=Table, SensitivityTable=Scores, search=find)
    words = f"search --table t --sensitivity s --budget latency=42% --budget size=2MB -o {path}"
    result = invoke(*words.split())
    assert result.exit_code == 0
    for text in (
        "4.1 ± 0.05 ms",
        "10 ms",
        "1.20 MB",
        "0.0123",
        "2 dense.int8, 1 dense.bf16",
        "gap 0",
        "size=2MB",
    ):
        assert text in result.stdout
    assert Table.asked == {"network": "f00"}
    given = ("table t", "scores s", ["latency=42%", "size=2MB"])
    assert seen == [(*given, {"axes": ["width", "precision"], "keep": ()})]
    assert Allocation.load(path) == chosen
    assert json.loads(invoke(*words.split(), "--json").stdout) == chosen.to_json()
    invoke(*words.split(), *"--axes precision,width --keep stem* --keep head".split())
    assert seen[-1] == (*given, {"axes": ["precision", "width"], "keep": ["stem*", "head"]})
    invoke(
        *words.split(),
        *"--threads 2 --batch 8 --base bf16 --shape 8x3x4x4 --load 0 --no-residual --cpus 0".split(),
    )
    assert Table.asked == {
        "network": "f00", "threads": 2, "batch": 8, "base": "bf16", "shape": ["8x3x4x4"], "load": 0, "residual": False,
        "cpus": "0",
    }  # fmt: skip


def test_front(api: Install, tmp_path: Path) -> None:
    found = Front(
        (
            Point(budget=1e6, infeasible=True),
            Point(budget=4e6, latency_ns=3.9e6, sigma_ns=5e4, size_bytes=2e6, loss=0.5),
            Point(budget=5e6, latency_ns=4.5e6, sigma_ns=5e4, size_bytes=2e6, loss=0.5, dominated=True),
            Point(latency_ns=4e6, size_bytes=2e6, loss=0.6, measured=True, label="deployed"),
        ),
        "latency",
        ("a", "b"),
    )
    seen: dict[str, Any] = {}
    plotted: list[Any] = []

    def draw(front: Front, path: Path) -> None:
        plotted.append((front, path))

    sweep = lambda table, scores, **options: seen.update(options) or found  # noqa: E731
    api(LatencyTable=Table, SensitivityTable=Scores, plot_front=draw, front=sweep)
    files = ["--table", "t", "--sensitivity", "s", "-o", str(tmp_path / "f.parquet")]
    result = invoke("front", *files, *"--over latency --points 3 --budget size=2MB --plot f.png".split())
    assert result.exit_code == 0
    assert seen == {
        "over": "latency", "points": 3, "budgets": ["size=2MB"], "axes": ["width", "precision"], "keep": (),
    }  # fmt: skip
    assert plotted == [(found, Path("f.png"))]
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()][-4:]
    assert rows[0] == ["1", "ms", "-", "-", "-", "-", "infeasible"]
    assert rows[1] == ["4", "ms", "3.9", "±", "0.05", "ms", "2.00", "MB", "-", "0.5"]
    assert rows[2][-1] == "dominated"
    assert rows[3] == ["deployed", "4", "ms", "2.00", "MB", "-", "0.6"]
    assert len(Front.load(tmp_path / "f.parquet").points) == 4
    points = json.loads(invoke("front", *files, "--json").stdout)["points"]
    assert [p["latency_ns"] for p in points] == [None, 3.9e6, 4.5e6, 4e6]
    assert len(plotted) == 1
    assert seen["budgets"] == ()

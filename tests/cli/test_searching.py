"""`hwsearch search` and `hwsearch front`: what they pass on and what they print."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from invoking import Install, Report, Scores, Table, invoke, raising

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.front import Front, Point
from hwsearch.allocate.search import KAPPA
from hwsearch.errors import BudgetMissed


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
    usual = {"minimize": "loss", "kappa": KAPPA, "axes": ["width", "precision"], "keep": (), "forbid": (), "only": ()}
    assert seen == [(*given, usual)]
    assert Allocation.load(path) == chosen
    assert json.loads(invoke(*words.split(), "--json").stdout) == chosen.to_json()
    invoke(*words.split(), *"--axes precision,width --keep stem* --keep head".split())
    assert seen[-1] == (*given, {**usual, "axes": ["precision", "width"], "keep": ["stem*", "head"]})
    rules = "--forbid a:int8 --forbid b:2:4.* --only c:fp32 --keep a=dense.bf16"
    invoke(*words.split(), *f"--minimize latency {rules} --kappa 2".split())
    assert seen[-1] == (*given, {
        **usual, "minimize": "latency", "forbid": ["a:int8", "b:2:4.*"], "only": ["c:fp32"], "keep": ["a=dense.bf16"], "kappa": 2.0,
    })  # fmt: skip
    invoke(
        *words.split(),
        *"--threads 2 --batch 8 --base bf16 --shape 8x3x4x4 --load 0 --no-residual --cpus 0".split(),
    )
    assert Table.asked == {
        "network": "f00", "threads": 2, "batch": 8, "base": "bf16", "shape": ["8x3x4x4"], "load": 0, "residual": False,
        "cpus": "0",
    }  # fmt: skip


def test_several_answers_are_several_files(api: Install, tmp_path: Path) -> None:
    """The best under the name given, the others numbered; fewer than asked for is a warning."""
    first = Allocation(
        variants={"a": "dense.int8", "b": "dense.fp32"},
        predicted={"size_bytes": 10, "loss": 0.1, "latency_ns": 5.0, "sigma_ns": 0.0},
        dense={"latency_ns": 9.0, "size_bytes": 40}, budgets=[{"text": "loss=0.2", "column": "loss", "limit": 0.2}],
        solver={"status": "optimal", "gap": 0.0, "bound": 5, "minimized": "latency"}, network="", weights_digest="", device={},
        backend="openvino", options={},
    )  # fmt: skip
    second = replace(first, variants={"a": "dense.fp32", "b": "dense.fp32"})
    seen: list[Any] = []
    api(
        LatencyTable=Table, SensitivityTable=Scores,
        search_diverse=lambda *words, **options: seen.append((words[3:], options["differ"])) or [first, second],
    )  # fmt: skip
    path = tmp_path / "best.json"
    words = f"search --table t --sensitivity s --budget loss=0.2 --minimize latency --diverse 3 --differ 1 -o {path}".split()
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert seen == [((3,), 1)]
    assert [Allocation.load(tmp_path / name) for name in ("best.json", "best-2.json")] == [first, second]
    assert "least latency: optimal" in result.stdout
    assert "answer 2 of 2: 1 units and 0 channel groups other than in answer 1" in result.stdout
    assert "only 2 of 3 answers" in result.stderr
    assert json.loads(invoke(*words, "--json").stdout) == [first.to_json(), second.to_json()]


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
        "over": ["latency"], "points": 3, "budgets": ["size=2MB"], "axes": ["width", "precision"], "keep": (), "forbid": (),
        "only": (),
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
    assert (seen["budgets"], seen["over"], seen["points"]) == ((), ["latency"], None)


def test_a_front_over_two_costs_shows_both_budgets(api: Install, tmp_path: Path) -> None:
    point = Point(budget=4e6, budget_beside=2e6, latency_ns=3.9e6, sigma_ns=0.0, size_bytes=1e6, loss=0.5)
    found = Front((Point(budget=1e6, budget_beside=3e6, infeasible=True), point), "latency", ("a",), beside="size")
    seen: dict[str, Any] = {}
    api(LatencyTable=Table, SensitivityTable=Scores, front=lambda table, scores, **options: seen.update(options) or found)
    words = "front --table t --sensitivity s --over latency --over size --only a:fp32 -o".split()
    result = invoke(*words, str(tmp_path / "f.parquet"))
    assert result.exit_code == 0, result.output
    assert (seen["over"], seen["only"]) == (["latency", "size"], ["a:fp32"])
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()][-2:]
    assert rows[0] == ["1", "ms", "3.00", "MB", "-", "-", "-", "-", "infeasible"]
    assert rows[1] == ["4", "ms", "2.00", "MB", "3.9", "ms", "1.00", "MB", "-", "0.5"]
    assert Front.load(tmp_path / "f.parquet").swept == ("latency", "size")
    assert json.loads(invoke(*words, str(tmp_path / "f.parquet"), "--json").stdout)["beside"] == "size"


def test_bayes(api: Install, tmp_path: Path) -> None:
    seen: list[Any] = []

    def find(*words: Any, **options: Any) -> Report:
        seen.append((words, options))
        return Report(True)

    api(bayes=find)
    (tmp_path / "bayes.png").touch()
    words = f"bayes zoo:x --scheme s.py:s --floor 98% -o {tmp_path}".split()
    result = invoke(*words)
    assert result.exit_code == 0
    assert result.stdout.startswith("the report, met: True\n")
    assert f"plot of the samples: {tmp_path / 'bayes.png'}" in result.stdout
    given, options = seen[0]
    assert given == ("task zoo:x", "s.py:s", tmp_path)
    options.pop("progress")
    usual = {"floor": "98%", "minimize": "size", "samples": 10, "backend": "openvino", "threads": 1, "batch": None, "seed": 0}
    usual["recover"] = None
    assert options == usual
    own = "--json --minimize latency --samples 4 --threads 2 --seed 3 --recover lc:steps=9"
    assert json.loads(invoke(*words, *own.split()).stdout) == {"met": True}
    options = seen[-1][1]
    options.pop("progress")
    assert options == {**usual, "minimize": "latency", "samples": 4, "threads": 2, "seed": 3, "recover": "lc:steps=9"}
    assert invoke(*words, "--minimize", "energy").exit_code == 2

    api(bayes=raising(BudgetMissed("the floor breaks: ...", nearest=Report(False))))
    missed = invoke(*words)
    assert missed.exit_code == 3
    assert "the report, met: False" in missed.stdout
    assert missed.stderr == "error: the floor breaks: ...\n"

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import network, problems
from tied import consistent_choices, tied_problems

from hwsearch.allocate.front import Front, Point, as_front, dominated, sweep, sweep_grid
from hwsearch.allocate.milp import minimise
from hwsearch.allocate.problem import Problem
from hwsearch.errors import IncompatibleTables, Infeasible, InvalidInput
from hwsearch.table.parquet import KEY

PROBLEM = network(12, 4)


@pytest.fixture(scope="module")
def front() -> Front:
    found = sweep(PROBLEM, "latency", 6)
    sigma = {s.choice: 10.0 for _, s in found if s}
    chosen = {s.choice: (tuple(PROBLEM.variants(s.choice).values()), (8, 16)) for _, s in found if s}
    measured = Point(
        latency_ns=3e5, low_ns=2.9e5, high_ns=3.2e5, size_bytes=4e5, loss=0.1, label="deployed", score=0.9
    )
    return as_front(
        found,
        PROBLEM.variables,
        ("a", "b"),
        chosen,
        ("latency",),
        sigma,
        dict.fromkeys(sigma, 7000),
        {"network": "n", "dense": {"latency": 1.0}},
    ).with_measured([measured])


@settings(max_examples=50, deadline=None)
@given(problems(budgets=False) | tied_problems(budgets=False), st.integers(2, 6))
def test_a_sweep_is_monotone_and_lies_on_the_front(problem: Problem, points: int) -> None:
    found = sweep(problem, "latency", points)
    all_points = [(problem.cost("latency", a), problem.total_loss(a)) for a in consistent_choices(problem)]
    assert found[0][1] is None
    assert found[0][0] < min(c for c, _ in all_points)
    budgets = [b for b, _ in found]
    assert budgets == sorted(set(budgets))
    solutions = [s for _, s in found if s is not None]
    assert len(solutions) == len(found) - 1 <= points
    for (budget, _), s in zip(found[1:], solutions, strict=True):
        assert s.costs["latency"] <= budget
        reachable = [(loss, c) for c, loss in all_points if c <= budget]
        loss, cost = min(reachable)
        assert s.loss == pytest.approx(loss, rel=1e-9, abs=0)
        assert s.loss != loss or s.costs["latency"] == cost
    losses = [s.loss for s in solutions]
    assert losses == sorted(losses, reverse=True)
    kept = [s for s, beaten in zip(solutions, dominated(solutions, "latency"), strict=True) if not beaten]
    assert len({s.costs["latency"] for s in kept}) == len({s.loss for s in kept}) == len(kept)
    assert losses[-1] == pytest.approx(min(loss for _, loss in all_points), rel=1e-9, abs=0)


def test_other_budgets_hold_throughout() -> None:
    size = PROBLEM.cost("size", (0,) * 12) // 2
    for _, s in sweep(replace(PROBLEM, budgets={"size": size}), "latency", 5)[1:]:
        assert s is not None
        assert s.costs["size"] <= size
    with pytest.raises(Infeasible):
        sweep(replace(PROBLEM, budgets={"size": 1}), "latency", 5)


def test_a_sweep_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least 2 points"):
        sweep(PROBLEM, "latency", 1)
    with pytest.raises(InvalidInput, match="no cost 'energy'"):
        sweep(PROBLEM, "energy", 3)


@settings(max_examples=30, deadline=None)
@given(problems(budgets=False) | tied_problems(budgets=False), st.integers(2, 4))
def test_a_grid_holds_the_least_loss_of_each_pair_of_budgets(problem: Problem, points: int) -> None:
    """Over all choices; what is marked as dominated is what another point beats, and `best` are the others."""
    problem = replace(problem, costs={**problem.costs, "size": problem.costs.get("size", problem.costs["latency"])})
    found = sweep_grid(problem, ("latency", "size"), points)
    every = [(problem.cost("latency", a), problem.cost("size", a), problem.total_loss(a)) for a in consistent_choices(problem)]
    assert len(found) == len({x for (x, _), _ in found}) * len({y for (_, y), _ in found}) <= points**2
    for (x, y), solution in found:
        losses = [loss for latency, size, loss in every if latency <= x and size <= y]
        assert (solution is None) == (not losses)
        if solution is not None:
            assert solution.costs["latency"] <= x
            assert solution.costs["size"] <= y
            assert solution.loss == pytest.approx(min(losses), rel=1e-9, abs=0)
    for k in range(2):
        assert min(budget[k] for budget, _ in found) == min(row[k] for row in every)
    choices = {s.choice for _, s in found if s}
    chosen: dict[tuple[int, ...], Any] = dict.fromkeys(choices, (("dense.fp32",), ()))
    front = as_front(found, ("u",), (), chosen, ("latency", "size"), dict.fromkeys(choices, 1.0), dict.fromkeys(choices, 1), {})
    keys = [(p.latency_ns, p.size_bytes, p.loss) for p in front.points if not p.infeasible]
    assert {(p.latency_ns, p.size_bytes, p.loss) for p in front.best()} == {
        a for a in keys if not any(all(x <= y for x, y in zip(b, a, strict=True)) and a != b for b in keys)
    }
    assert len(front.best()) == len({(p.latency_ns, p.size_bytes, p.loss) for p in front.best()})


def test_a_grid_over_one_cost_is_refused() -> None:
    with pytest.raises(InvalidInput, match="over size twice"):
        sweep_grid(PROBLEM, ("size", "size"), 3)


def test_dominated_points_are_marked() -> None:
    s = minimise(PROBLEM, "latency")
    other = [
        replace(s, loss=loss, costs={"latency": cost})
        for cost, loss in [(5, 2.0), (6, 1.0), (6, 1.0), (7, 1.0), (4, 3.0)]
    ]
    assert dominated(other, "latency") == [False, False, True, True, False]


def test_best_points_rise_in_cost_and_fall_in_loss(front: Front) -> None:
    best = front.best()
    assert [p.latency_ns for p in best] == sorted({p.latency_ns for p in best})
    assert [p.loss for p in best] == sorted({p.loss for p in best}, reverse=True)
    assert not any(p.measured or p.infeasible or p.dominated for p in best)


def test_round_trip(front: Front, tmp_path: Path) -> None:
    front.save(tmp_path / "f.parquet")
    loaded = Front.load(tmp_path / "f.parquet")
    assert (loaded.over, loaded.units, loaded.header) == (front.over, front.units, front.header)
    assert loaded.groups == ("a", "b")
    assert [p.widths for p in loaded.best()] == [(8, 16)] * len(front.best())
    pd.testing.assert_frame_equal(loaded.to_frame(), front.to_frame())
    assert loaded.points[1].variants == front.points[1].variants
    assert loaded.points[0].infeasible
    assert loaded.points[-1].measured
    assert np.isnan(loaded.points[-1].budget)


def test_a_front_over_two_costs_is_read_again(front: Front, tmp_path: Path) -> None:
    both = replace(front, beside="size", points=tuple(replace(p, budget_beside=5.0) for p in front.points))
    both.save(tmp_path / "f.parquet")
    loaded = Front.load(tmp_path / "f.parquet")
    assert loaded.swept == ("latency", "size")
    assert {p.budget_beside for p in loaded.points} == {5.0}
    replace(both, beside="power").save(tmp_path / "f.parquet")
    with pytest.raises(InvalidInput, match="over is 'power'"):
        Front.load(tmp_path / "f.parquet")


def test_a_front_of_schema_3_is_over_one_cost(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    front.save(path)
    rows = pq.read_table(path).drop_columns(["budget_beside"])
    header = {k: v for k, v in json.loads(rows.schema.metadata[KEY]).items() if k != "beside"}
    pq.write_table(rows.replace_schema_metadata({KEY: json.dumps({**header, "schema": 3}).encode()}), path)
    assert Front.load(path).swept == ("latency",)


def test_a_front_of_schema_2_has_no_memory(front: Front, tmp_path: Path) -> None:
    """Files from before the peak of the activations was kept: the column is not there."""
    path = tmp_path / "f.parquet"
    front.save(path)
    assert {p.memory_bytes for p in Front.load(path).best()} == {7000.0}
    rows = pq.read_table(path).drop_columns(["memory_bytes"])
    header = {**json.loads(rows.schema.metadata[KEY]), "schema": 2}
    pq.write_table(rows.replace_schema_metadata({KEY: json.dumps(header).encode()}), path)
    old = Front.load(path)
    assert [p.loss for p in old.best()] == [p.loss for p in front.best()]
    assert all(np.isnan(p.memory_bytes) for p in old.points)


def test_a_frame_has_a_row_for_each_point(front: Front) -> None:
    frame = front.to_frame()
    assert len(frame) == len(front.points)
    assert (frame["latency_ms"] * 1e6).equals(frame["latency_ns"]) or np.allclose(
        frame["latency_ms"] * 1e6, frame["latency_ns"], equal_nan=True
    )
    assert frame["infeasible"].tolist() == [True] + [False] * (len(frame) - 1)


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_truncated_files(front: Front, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "f.parquet"
    front.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidInput, match="truncated"):
        Front.load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    with pytest.raises(InvalidInput, match="does not exist"):
        Front.load(path)
    path.write_bytes(b"\x80\x04 anything else" * 99)
    with pytest.raises(InvalidInput, match="not a readable Parquet"):
        Front.load(path)
    pq.write_table(pa.table({"loss": [1.0]}), path)
    with pytest.raises(InvalidInput, match="not a front of hwsearch"):
        Front.load(path)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"schema": 99}, IncompatibleTables, "schema 99"),
        ({"kind": "latency_table"}, InvalidInput, "found: latency_table"),
        ({"units": None}, InvalidInput, "damaged"),
        ({"groups": None}, InvalidInput, "damaged"),
    ],
)
def test_other_headers(
    front: Front, tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    path = tmp_path / "f.parquet"
    front.save(path)
    table = pq.read_table(path)
    header = {**json.loads(table.schema.metadata[KEY]), **change}
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(header).encode()}), path)
    with pytest.raises(error, match=said):
        Front.load(path)


def test_a_file_that_lacks_a_column(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    front.save(path)
    table = pq.read_table(path)
    pq.write_table(table.append_column("colour", pa.array(["red"] * len(table))), path)
    with pytest.raises(InvalidInput, match="colour"):
        Front.load(path)
    for column in ("variants", "widths"):
        pq.write_table(table.drop_columns([column]), path)
        with pytest.raises(InvalidInput, match=column):
            Front.load(path)

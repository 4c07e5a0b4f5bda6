"""Front: allocations that no other beats, over a sweep of budgets.

Schema history:
  1  one row a point, measured points beside them; header under the Parquet key `hwsearch`.
  2  widths of channel groups.
  3  peak activation memory; files of 2 are read, without it.
  4  a second cost, swept beside the first; files of 2 and 3 are read, without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Choice, Problem, Solution
from hwsearch.errors import InvalidInput
from hwsearch.table.checking import Rows
from hwsearch.table.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 4
READS = (2, 3, 4)
KIND = "front"
SWEPT = ("latency", "size", "memory")
"""Costs that a front may be over."""
TODO = "make it again with `hwsearch front`"


@dataclass(frozen=True)
class Point:
    """One allocation of a sweep, or one measured. Costs in ns and bytes; NaN where there is none.

    budget: limit of the swept column that it answers; budget_beside: of the second, where two are. infeasible: nothing meets
    that. dominated: another point has no more of any swept cost and no more loss. label: what it is (`predicted`, or a measured
    point's own).
    low_ns, high_ns: the interval of a measured latency. memory_bytes: peak of the activations, always estimated.
    """

    budget: float = np.nan
    latency_ns: float = np.nan
    sigma_ns: float = np.nan
    size_bytes: float = np.nan
    loss: float = np.nan
    variants: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    status: str = ""
    gap: float = np.nan
    dominated: bool = False
    infeasible: bool = False
    measured: bool = False
    label: str = "predicted"
    low_ns: float = np.nan
    high_ns: float = np.nan
    score: float = np.nan
    memory_bytes: float = np.nan
    budget_beside: float = np.nan

    def cost(self, column: str) -> float:
        """`latency`, `size` or `memory`, in ns or bytes."""
        return {"latency": self.latency_ns, "size": self.size_bytes, "memory": self.memory_bytes}[column]


@dataclass(frozen=True)
class Front:
    """Points over a sweep of one cost column, or of two, with what they belong to.

    over: the swept column (`latency`, `size` or `memory`). units, groups: names, in the order of `Point.variants` and
    `Point.widths`. beside: the second swept column, empty for none. header: network, backend, device,
    options; under `dense` the dense network's costs in ns and bytes.
    """

    points: tuple[Point, ...]
    over: str
    units: tuple[str, ...]
    header: dict[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    beside: str = ""

    @property
    def swept(self) -> tuple[str, ...]:
        """The one or two columns that were swept."""
        return (self.over, self.beside) if self.beside else (self.over,)

    def to_frame(self) -> pd.DataFrame:
        """One row a point; `latency_ms` and `sigma_ms` beside the raw columns."""
        import pandas as pd

        frame = pd.DataFrame([p.__dict__ for p in self.points], columns=list(Point.__dataclass_fields__))
        frame["latency_ms"] = frame["latency_ns"] / 1e6
        frame["sigma_ms"] = frame["sigma_ns"] / 1e6
        return frame

    def with_measured(self, points: Sequence[Point]) -> Front:
        """The front with measured points beside it."""
        return replace(self, points=(*self.points, *(replace(p, measured=True) for p in points)))

    def best(self) -> tuple[Point, ...]:
        """The predicted points that are feasible and not dominated, by rising cost."""
        kept = [p for p in self.points if not (p.dominated or p.infeasible or p.measured)]
        return tuple(sorted(kept, key=lambda p: tuple(map(p.cost, self.swept))))

    def save(self, path: str | Path) -> None:
        """Write Parquet, in place in one step."""
        import pyarrow as pa

        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "over": self.over,
            "beside": self.beside,
            "units": list(self.units),
            "groups": list(self.groups),
            "header": self.header,
        }
        rows = [{**p.__dict__, "variants": list(p.variants), "widths": list(p.widths)} for p in self.points]
        write_parquet(pa.Table.from_pylist(rows, schema=_schema()), header, path)

    @staticmethod
    def load(path: str | Path) -> Front:
        """Raises InvalidInput (absent, truncated, foreign, damaged) or IncompatibleTables (another schema)."""
        table, header = read_parquet(path, KIND, *READS)
        try:
            over, beside, own = header["over"], header.get("beside", ""), dict(header["header"])
            units, groups = tuple(header["units"]), tuple(header["groups"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{path} is damaged: header: {error!r}; {TODO}") from error
        for column in (over, beside or over):
            if column not in SWEPT:
                raise InvalidInput(f"{path} is damaged: header: over is {column!r}, expected one of {', '.join(SWEPT)}; {TODO}")
        _check(Rows(table, path, TODO), units, groups)
        points = tuple(
            Point(**{**row, "variants": tuple(row["variants"]), "widths": tuple(row["widths"])})
            for row in table.to_pylist()
        )
        return Front(points, over, units, own, groups, beside)


def _check(rows: Rows, units: Sequence[str], groups: Sequence[str]) -> None:
    """Raises InvalidInput on the first row that no sweep and no measurement leaves."""
    rows.typed(_schema(), ["memory_bytes", "budget_beside"])
    found = ~rows.array("infeasible").astype(bool)
    for column in ("latency_ns", "size_bytes", "loss"):
        least = "a finite loss from 0 on" if column == "loss" else "a finite number above 0"
        rows.numbers(
            column, least, lambda v, c=column: ~found | (np.isfinite(v) & ((v >= 0) if c == "loss" else (v > 0)))
        )
    for column in ("sigma_ns", "gap", "low_ns", "high_ns", "memory_bytes", "budget_beside"):
        if column in rows.rows.schema.names:
            rows.numbers(column, "a finite number from 0 on, or none", lambda v: ~(v < 0) & ~np.isinf(v))
    low, high = rows.array("low_ns"), rows.array("high_ns")
    if (low > high).any():
        row = int((low > high).argmax())
        rows.refuse(row, "low_ns", float(low[row]), f"at most high_ns, which is {high[row]:.6g}")
    rows.lengths("variants", len(units), "units", or_none=True)
    rows.lengths("widths", len(groups), "channel groups", or_none=True)
    rows.variants("variants")
    rows.elements("widths", "widths from 1 on", lambda v: v > 0)


def _schema() -> Any:
    import pyarrow as pa

    kinds = {
        "float": pa.float64(),
        "bool": pa.bool_(),
        "str": pa.string(),
        "tuple[str, ...]": pa.list_(pa.string()),
        "tuple[int, ...]": pa.list_(pa.int64()),
    }
    return pa.schema([(name, kinds[str(f.type)]) for name, f in Point.__dataclass_fields__.items()])


def sweep(problem: Problem, column: str, points: int) -> list[tuple[int, Solution | None]]:
    """(budget, least-loss solution within it), for budgets spread from the least cost to the least loss's cost.

    One budget below the least cost leads, whose solution is None: it cannot be met. Budgets of the problem on other
    columns hold throughout. Raises InvalidInput on fewer than two points, Infeasible where those budgets cannot be met.
    """
    others = {c: b for c, b in problem.budgets.items() if c != column}
    budgets, step = _spread(replace(problem, budgets=others), column, points)
    found: list[tuple[int, Solution | None]] = [(budgets[0] - step, None)]
    warm = None
    for budget in budgets:
        solution = solve(replace(problem, budgets={column: budget, **others}), warm=warm)
        found.append((budget, solution))
        warm = solution.choice  # within every larger budget too
    return found


def sweep_grid(
    problem: Problem, columns: tuple[str, str], points: int
) -> list[tuple[tuple[int, int], Solution | None]]:
    """((budget, budget), least-loss solution within both), for a grid of budgets on two columns; None where nothing meets both.

    Each is spread as `sweep` spreads its own, `points` of them at most. Raises as `sweep` does.
    """
    if columns[0] == columns[1]:
        raise InvalidInput(f"a front over {columns[0]} twice is one over {columns[0]}: give it once, or another cost")
    others = {c: b for c, b in problem.budgets.items() if c not in columns}
    free = replace(problem, budgets=others)
    first, second = (_spread(free, column, points)[0] for column in columns)
    found: dict[tuple[int, int], Solution | None] = {}
    for x in first:
        beside = replace(problem, budgets={columns[0]: x, **others})
        least = minimise(beside, columns[1]).costs[columns[1]]
        warm: Choice | None = None
        for y in second:
            if y < least:
                found[x, y] = None
                continue
            best = solve(replace(problem, budgets={columns[0]: x, columns[1]: y, **others}), warm=warm)
            found[x, y], warm = best, best.choice
    return list(found.items())


def _spread(free: Problem, column: str, points: int) -> tuple[list[int], int]:
    """(budgets from the least cost to the least loss's, how far they are apart)."""
    if points < 2:
        raise InvalidInput(f"a front needs at least 2 points, got {points}")
    if column not in free.columns:
        raise InvalidInput(f"there is no cost {column!r} to sweep; there are {', '.join(free.columns)}")
    least = minimise(free, column).costs[column]
    most = max(solve(free, prefer=column).costs[column], least)
    return sorted({round(b) for b in np.linspace(least, most, points)}), max(1, (most - least) // (points - 1))


def dominated(solutions: Sequence[Solution], *columns: str) -> list[bool]:
    """For each solution whether another has no more loss and no more of any cost, and less of one (or the same, earlier)."""
    keys = [(*(s.costs[c] for c in columns), s.loss) for s in solutions]
    return [
        any(
            all(own <= other for own, other in zip(a, b, strict=True)) and (a != b or j < i)
            for j, a in enumerate(keys)
            if j != i
        )
        for i, b in enumerate(keys)
    ]


def as_front(
    swept: Sequence[tuple[int | tuple[int, int], Solution | None]],
    units: Sequence[str],
    groups: Sequence[str],
    chosen: Mapping[tuple[int, ...], tuple[tuple[str, ...], tuple[int, ...]]],
    columns: Sequence[str],
    sigma_ns: Mapping[tuple[int, ...], float],
    memory: Mapping[tuple[int, ...], int],
    header: Mapping[str, Any],
) -> Front:
    """A sweep as a Front.

    chosen: for each choice the variants of the units and the widths of the groups. columns: what was swept, one cost or two.
    sigma_ns: standard error of its predicted latency. memory: peak of its activations in bytes.
    """
    solutions = [s for _, s in swept if s is not None]
    beaten = dict(zip(map(id, solutions), dominated(solutions, *columns), strict=True))
    points = []
    for budget, s in swept:
        first, second = budget if isinstance(budget, tuple) else (budget, np.nan)
        if s is None:
            points.append(Point(budget=float(first), budget_beside=float(second), infeasible=True))
            continue
        points.append(
            Point(
                budget=float(first),
                budget_beside=float(second),
                latency_ns=float(s.costs["latency"]),
                sigma_ns=float(sigma_ns[s.choice]),
                size_bytes=float(s.costs["size"]),
                loss=s.loss,
                variants=chosen[s.choice][0],
                widths=chosen[s.choice][1],
                status=s.status,
                gap=s.gap,
                dominated=beaten[id(s)],
                memory_bytes=float(memory[s.choice]),
            )
        )
    return Front(tuple(points), columns[0], tuple(units), dict(header), tuple(groups), *columns[1:])

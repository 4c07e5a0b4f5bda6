"""A build: one compiled allocation as it was measured, and the row of a table's file that keeps it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.device.nvidia import State
from hwsearch.device.timing import quietest, relative
from hwsearch.network.network import Network
from hwsearch.network.variants import PRECISIONS, Variant
from hwsearch.table.checking import Rows


class Role(StrEnum):
    """Why a build was made. Written to files as its value."""

    REFERENCE = "reference"
    DENSE = "dense"
    UNIFORM = "uniform"
    PROBE = "probe"
    DESIGN = "design"
    HELDOUT = "heldout"
    TEST = "test"
    DEPLOYED = "deployed"
    ALONE = "alone"
    SANDWICH = "sandwich"


PARTS = (Role.ALONE, Role.SANDWICH)
"""Roles of builds of a part of the network: one unit by itself, or some between their neighbours."""

KINDS = ("unit", "edge", "rest")
"""Where the time of a node belongs, see `NodeRow`."""


@dataclass(frozen=True)
class NodeRow:
    """Time of one executed node, on the runtime's counters, and where it belongs.

    kind: `unit` (the work of `units`; several where the runtime fused them), `edge` (a conversion or reorder on
    the way into `units[0]`) or `rest` (what follows `units[0]`, or nothing of any unit).
    """

    name: str
    op: str
    kind: str
    units: tuple[str, ...]
    precision: str
    time_ns: float


@dataclass(frozen=True)
class Build:
    """One compiled allocation, measured end to end against the reference engine, and its executed nodes.

    role: why it was made; `alone` and `sandwich` are of a part of the network.
    base: base precision it was compiled with. variants: for each unit, in network order; empty where it is no part.
    widths: slots kept of each channel group, in network order.
    ratio, low, high: median time / the reference's, and its 95 % interval; `unstable`: see `timing.too_wide`.
    samples_ns, reference_ns, singles_ns: see `timing.Timing`. executed: for each unit, the precision read back
    (empty where the runtime's record does not name the unit).
    output_error: relative error of the engine's outputs from the simulated ones; `wrong`: too large to be rounding.
    source: always `measured`; estimates never enter a table.
    energy_j, reference_energy_j: joules of an inference of this engine and of the reference, and energy_error the relative
    standard error of their ratio; None where no counter was read.
    states: of the GPU before and after it was timed; empty where it ran on a CPU.
    machine: its name in its network; empty in tables of before.
    """

    role: Role
    base: str
    variants: tuple[str, ...]
    ratio: float
    low: float
    high: float
    unstable: bool
    samples_ns: NDArray[np.int64] = field(repr=False)
    reference_ns: NDArray[np.int64] = field(repr=False)
    executed: tuple[str, ...] = ()
    nodes: tuple[NodeRow, ...] = field(default=(), repr=False)
    build_s: float = 0.0
    file_bytes: int = 0
    measured_at: str = ""
    output_error: float = 0.0
    wrong: bool = False
    source: str = "measured"
    widths: tuple[int, ...] = ()
    energy_j: float | None = None
    reference_energy_j: float | None = None
    energy_error: float | None = None
    states: tuple[State, ...] = ()
    singles_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    machine: str = ""

    @property
    def width(self) -> float:
        """Relative width of the interval of the ratio."""
        return (self.high - self.low) / self.ratio

    @property
    def inferences(self) -> NDArray[np.float64]:
        """Times of single inferences, relative to their median."""
        return relative(self.samples_ns, self.singles_ns)

    @property
    def energy_ratio(self) -> float | None:
        """Energy / the reference's, where both were measured."""
        if not self.energy_j or not self.reference_energy_j:
            return None
        return self.energy_j / self.reference_energy_j

    @cached_property
    def row(self) -> Any:
        """The build as a pyarrow table of one row; made once, as a growing table is written after every build."""
        import pyarrow as pa

        raw = {name: getattr(self, name) for name in ("samples_ns", "reference_ns", "singles_ns")}
        own = {**asdict(self), "role": str(self.role), **raw}
        return pa.Table.from_pylist([own], schema=columns())

    @cached_property
    def quiet_ns(self) -> float:
        """Time of the reference while this build was measured, in the quietest moments of it."""
        return quietest(self.reference_ns)

    @property
    def partial(self) -> bool:
        """Whether it is of a part of the network only."""
        return self.role in PARTS

    @property
    def kept_out(self) -> bool:
        """Whether no fit sees it. Held-out builds end a profile and widen its predictions; test builds do nothing but judge it."""
        return self.role in (Role.HELDOUT, Role.TEST)

    @property
    def key(self) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        return self.base, self.variants, self.widths

    @property
    def leading(self) -> str:
        """The variant of most units, without the word `dense`."""
        return max(dict.fromkeys(self.variants), key=self.variants.count).removeprefix("dense.")

    def as_asked(self) -> bool:
        """Whether the outputs are right and every unit that the runtime names executed in the precision asked for."""
        if self.wrong:
            return False
        pairs = set(zip(self.variants, self.executed, strict=True))
        return all(not e or not v or Variant.parse(v).runs_as(e) for v, e in pairs)


TODO = "take another copy, or move it away and profile again"
LATER = ("energy_j", "reference_energy_j", "energy_error", "states", "singles_ns", "machine")
"""Columns that older files lack, and that may be null."""


def read_builds(rows: Any, network: Network, path: str | Path, where: str = "") -> tuple[Build, ...]:
    """The builds that rows of a file (a pyarrow table) say. where: their section, in words.

    Raises InvalidInput, which names row and field, where they say what no measurement of this network can say.
    """
    _check(Rows(rows, path, TODO, where), network)
    numbers = ("samples_ns", "reference_ns", "singles_ns")
    have = [n for n in numbers if n in rows.schema.names]
    arrays = {n: [np.array(v.values, np.int64) if v.is_valid else None for v in rows[n]] for n in have}
    none = np.zeros(0, np.int64)

    def times(name: str, i: int) -> NDArray[np.int64]:
        found = arrays[name][i] if name in arrays else None
        return none if found is None else found

    return tuple(
        Build(
            **{
                **row,
                **{n: times(n, i) for n in numbers},
                "role": Role(now_called(row["role"])),
                "variants": tuple(row["variants"]),
                "executed": tuple(row["executed"]),
                "widths": tuple(row["widths"]),
                "nodes": tuple(NodeRow(**{**n, "units": tuple(n["units"])}) for n in row["nodes"]),
                "states": tuple(_state(s) for s in row.get("states") or ()),
                "machine": row.get("machine") or "",
            }
        )
        for i, row in enumerate(rows.drop_columns(have).to_pylist())
    )


def _check(rows: Rows, network: Network) -> None:
    """Raises InvalidInput on the first field that lies."""
    rows.typed(columns(), LATER)
    have = rows.rows.schema.names
    rows.words("role", {*Role, "isolated"}, f"one of {', '.join(Role)}")
    rows.words("base", PRECISIONS, f"one of {', '.join(PRECISIONS)}")
    rows.words("source", ["measured"], "'measured': estimates are not kept in tables")
    _check_times(rows)
    for column in ("build_s", "file_bytes"):
        rows.numbers(column, "a finite number from 0 on", lambda v: np.isfinite(v) & (v >= 0))
    rows.numbers("output_error", "a number from 0 on", lambda v: v >= 0)
    for column in ("energy_j", "reference_energy_j"):
        if column in have:
            rows.numbers(column, "a finite number from 0 on", lambda v: np.isfinite(v) & (v >= 0))
    if "energy_error" in have:
        rows.numbers("energy_error", "a number from 0 on", lambda v: v >= 0)
    for column in ("variants", "executed"):
        rows.lengths(column, len(network.units), "units")
    rows.variants("variants", or_none=True)
    rows.elements("executed", f"one of {', '.join(PRECISIONS)}", _executed)
    _check_whole(rows)
    _check_widths(rows, network)
    _check_nodes(rows, network)
    rows.once("role", "base", "ratio", "low", "high", "build_s", "file_bytes", "measured_at")


def _check_times(rows: Rows) -> None:
    for column in ("samples_ns", "reference_ns"):
        rows.elements(column, "times above 0 ns", lambda v: v > 0, least=1)
    if "singles_ns" in rows.rows.schema.names:
        rows.elements("singles_ns", "times above 0 ns", lambda v: v > 0)
    for column in ("ratio", "low", "high"):
        rows.numbers(column, "a finite number above 0", lambda v: np.isfinite(v) & (v > 0))
    low, ratio, high = (rows.array(f) for f in ("low", "ratio", "high"))
    for column, above in (("low", low > high), ("ratio", (ratio < low) | (ratio > high))):
        if above.any():
            row = int(above.argmax())
            told = f"low <= ratio <= high, which are {low[row]:.6g}, {ratio[row]:.6g} and {high[row]:.6g}"
            rows.refuse(row, column, rows.array(column)[row].item(), told)


def _check_whole(rows: Rows) -> None:
    """Builds of the whole network say a variant of every unit."""
    values, at = rows.flat("variants")
    roles = np.array(rows.rows["role"].to_pylist(), object)
    empty = np.asarray(values.to_numpy(zero_copy_only=False) == "", bool)
    wrong = empty & ~np.isin(roles[at].astype(str), [*PARTS, "isolated"])
    if wrong.any():
        rows.refuse(int(at[wrong.argmax()]), "variants", "", "a variant for each unit of a whole network")


def _check_widths(rows: Rows, network: Network) -> None:
    rows.lengths("widths", len(network.groups), "channel groups", or_none=True)
    values, at = rows.flat("widths")
    most = np.tile([g.channels for g in network.groups], len(values) // max(len(network.groups), 1))
    found = np.asarray(values)
    wrong = (found < 1) | (found > most)
    if wrong.any():
        place = int(wrong.argmax())
        group = network.groups[place % len(network.groups)]
        rows.refuse(int(at[place]), f"widths of {group.name}", int(found[place]), f"1 to {group.channels}")


def _check_nodes(rows: Rows, network: Network) -> None:
    nodes, at = rows.flat("nodes")
    fields = {name: nodes.field(name) for name in ("kind", "units", "time_ns", "name", "op", "precision")}
    for name, values in fields.items():
        if values.null_count:
            rows.refuse(int(at[np.asarray(values.is_null()).argmax()]), f"nodes.{name}", None, "a value")
    time = np.asarray(fields["time_ns"])
    kind = np.asarray(fields["kind"].to_numpy(zero_copy_only=False), str)
    for name, found, wrong, expected in (
        ("time_ns", time, ~(np.isfinite(time) & (time >= 0)), "a finite number from 0 on"),
        ("kind", kind, ~np.isin(kind, KINDS), f"one of {', '.join(KINDS)}"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            rows.refuse(int(at[place]), f"nodes.{name}", found[place].item(), expected)
    units = fields["units"]
    names = units.flatten()
    unknown = set(names.unique().to_pylist()) - set(network.by_name)
    if unknown:
        owner = np.repeat(at, np.diff(np.asarray(units.offsets)))
        place = next(i for i, name in enumerate(names.to_pylist()) if name in unknown)
        rows.refuse(int(owner[place]), "nodes.units", names[place].as_py(), "units of the network")


def now_called(name: str) -> str:
    """A role, or a mode of a table, under its present name."""
    return "alone" if name == "isolated" else name


def _state(row: Mapping[str, Any]) -> State:
    throttle = row["throttle"]
    return State(**{**row, "throttle": None if throttle is None else tuple(throttle)})


def _executed(values: Any) -> Any:
    """Which of many strings say what a unit executed in, as `Variant.executed` does; empty ones where nothing told."""
    names, of = np.unique(values.astype(str), return_inverse=True)
    known = {"", *PRECISIONS}
    right = []
    for name in names.tolist():
        kept, _, precision = name.rpartition(".")
        right.append(precision in known and (not kept or re.fullmatch(r"[1-9]\d*:[1-9]\d*", kept) is not None))
    return np.array(right, bool)[of]


def columns() -> Any:
    """Of the rows that builds are kept in, the pyarrow schema."""
    import pyarrow as pa

    node = pa.struct(
        [
            ("name", pa.string()),
            ("op", pa.string()),
            ("kind", pa.string()),
            ("units", pa.list_(pa.string())),
            ("precision", pa.string()),
            ("time_ns", pa.float64()),
        ]
    )
    state = pa.struct(
        [
            ("sm_mhz", pa.int64()),
            ("memory_mhz", pa.int64()),
            ("power_w", pa.float64()),
            ("temperature_c", pa.int64()),
            ("throttle", pa.list_(pa.string())),
        ]
    )
    return pa.schema(
        [
            ("role", pa.string()),
            ("base", pa.string()),
            ("variants", pa.list_(pa.string())),
            ("ratio", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
            ("unstable", pa.bool_()),
            ("samples_ns", pa.list_(pa.int64())),
            ("reference_ns", pa.list_(pa.int64())),
            ("executed", pa.list_(pa.string())),
            ("nodes", pa.list_(node)),
            ("build_s", pa.float64()),
            ("file_bytes", pa.int64()),
            ("measured_at", pa.string()),
            ("output_error", pa.float64()),
            ("wrong", pa.bool_()),
            ("source", pa.string()),
            ("widths", pa.list_(pa.int64())),
            ("energy_j", pa.float64()),
            ("reference_energy_j", pa.float64()),
            ("energy_error", pa.float64()),
            ("states", pa.list_(state)),
            ("singles_ns", pa.list_(pa.int64())),
            ("machine", pa.string()),
        ]
    )

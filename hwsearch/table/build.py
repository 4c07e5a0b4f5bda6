"""A build: one compiled allocation as it was measured, and the row of a table's file that keeps it."""

from __future__ import annotations

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
from hwsearch.errors import InvalidInput
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant


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
    ratio, low, high: median time / the reference's, and its 95 % interval; `unstable` if wider than asked.
    samples_ns, reference_ns, singles_ns: see `timing.Timing`. executed: for each unit, the precision read back
    (empty where the runtime's record does not name the unit).
    output_error: relative error of the engine's outputs from the simulated ones; `wrong`: too large to be rounding.
    source: always `measured`; estimates never enter a table.
    energy_j, reference_energy_j: joules of an inference of this engine and of the reference, and energy_error the relative
    standard error of their ratio; None where no counter was read.
    states: of the GPU before and after it was timed; empty where it ran on a CPU.
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
        pairs = zip(self.variants, self.executed, strict=True)
        return all(not e or not v or Variant.parse(v).runs_as(e) for v, e in pairs)


def read_builds(rows: Any, network: Network, path: str | Path) -> tuple[Build, ...]:
    """The builds that rows of a file (a pyarrow table) say. Raises InvalidInput where they are damaged."""
    try:
        builds = tuple(
            Build(
                **{
                    **row,
                    "role": Role(now_called(row["role"])),
                    "variants": tuple(row["variants"]),
                    "executed": tuple(row["executed"]),
                    "widths": tuple(row["widths"]),
                    "samples_ns": np.array(row["samples_ns"], np.int64),
                    "reference_ns": np.array(row["reference_ns"], np.int64),
                    "nodes": tuple(NodeRow(**{**n, "units": tuple(n["units"])}) for n in row["nodes"]),
                    "singles_ns": np.array(row.get("singles_ns") or (), np.int64),
                    "states": tuple(_state(s) for s in row.get("states") or ()),
                }
            )
            for row in rows.to_pylist()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} is damaged: {error!r}; profile again or take another copy") from error
    for build in builds:
        if why := _damage(build, network):
            raise InvalidInput(f"{path} is damaged: {why}")
    return builds


def now_called(name: str) -> str:
    """A role, or a mode of a table, under its present name."""
    return "alone" if name == "isolated" else name


def _state(row: Mapping[str, Any]) -> State:
    throttle = row["throttle"]
    return State(**{**row, "throttle": None if throttle is None else tuple(throttle)})


def _damage(build: Build, network: Network) -> str:
    """What a row says that no measurement of this network can say; empty where nothing."""
    if build.source != "measured" or build.role is None or not build.ratio or not 0 < build.ratio < np.inf:
        return f"a row has source {build.source!r}, role {build.role!r} and ratio {build.ratio}"
    for what, values in (("variants", build.variants), ("executed precisions", build.executed)):
        if len(values) != len(network.units):
            return f"a row has {len(values)} {what} for {len(network.units)} units"
    if build.widths and len(build.widths) != len(network.groups):
        return f"a row has {len(build.widths)} widths for {len(network.groups)} channel groups"
    if any(not 0 < w <= g.channels for w, g in zip(build.widths, network.groups, strict=False)):
        return f"a row has widths {build.widths}"
    try:
        _ = [Variant.parse(v) for v in build.variants if v]
    except (InvalidInput, TypeError) as error:
        return str(error)
    return ""


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
        ]
    )

"""LatencyTable: raw measurements of whole networks with their provenance, in one Parquet file.

A file may hold several tables of one model on one device, backend and runtime: sections, told apart by their options
(threads, batch, base, load, ...) and input shapes.

Schema history:
  1  builds with their raw samples and executed nodes; header under the Parquet key `hwsearch`.
  2  widths of the channel groups in each build, the grid of widths and the groups in the header.
  3  sections: the header holds one header for each (`sections`), rows their section's number (`section`); energies of
     builds, null where no counter was read. A file of schema 2 is read as one of one section, without energies.
  4  states of the GPU around each build (`states`); older rows have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.design import Candidate
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.measure import DISTURBED, QUIET
from hwsearch.network import Network
from hwsearch.nvidia import State
from hwsearch.sections import Section, matching, only
from hwsearch.tablefile import read_sections, write_sections
from hwsearch.variants import Variant

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 4
OLDER = (3,)
"""Older schemas that are still read."""
WHOLE = (2,)
"""Still older ones, whose files are of one section."""
PARTS = ("alone", "sandwich")
"""Roles of builds of a part of the network: one unit by itself, or some between their neighbours."""
SANDWICHED = "sandwiched"
LAYERED = ("alone", SANDWICHED)
"""Modes of tables made layer by layer."""


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

    role: `reference`, `dense`, `uniform`, `probe`, `design`, `heldout`, `deployed`, or, of a part of the
    network, `alone` or `sandwich`.
    base: base precision it was compiled with. variants: for each unit, in network order; empty where it is no part.
    widths: slots kept of each channel group, in network order.
    ratio, low, high: median time / the reference's, and its 95 % interval; `unstable` if wider than asked.
    samples_ns, reference_ns: every timed inference. executed: for each unit, the precision read back
    (empty where the runtime's record does not name the unit).
    output_error: relative error of the engine's outputs from the simulated ones; `wrong`: too large to be rounding.
    source: always `measured`; estimates never enter a table.
    energy_j, reference_energy_j: joules of an inference of this engine and of the reference, and energy_error the relative
    standard error of their ratio; None where no counter was read.
    states: of the GPU before and after it was timed; empty where it ran on a CPU.
    """

    role: str
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

        own = {**asdict(self), "samples_ns": self.samples_ns, "reference_ns": self.reference_ns}
        return pa.Table.from_pylist([own], schema=_schema())

    @cached_property
    def quiet_ns(self) -> float:
        """Time of the reference while this build was measured, in the quietest moments of it."""
        return float(np.quantile(self.reference_ns, 0.1))

    @property
    def partial(self) -> bool:
        """Whether it is of a part of the network only."""
        return self.role in PARTS

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
        return all(not e or not v or e == Variant.parse(v).executed for v, e in pairs)


@dataclass(frozen=True)
class Evidence:
    """What another table of the same device and regime says of one term of the latency model.

    feature: as `equations` names it: a unit's signature and variant, or a kind of boundary. ns, error_ns: on the scale of
    that table's session. table: the network that it was measured in.
    """

    feature: tuple[Any, ...]
    ns: float
    error_ns: float
    table: str

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Evidence:
        """Raises KeyError, TypeError or ValueError on anything else than `asdict` gives."""
        return Evidence(
            _tuples(data["feature"]), float(data["ns"]), float(data["error_ns"]), str(data["table"])
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Header:
    """What a table was measured on and with.

    mode: `context` (whole networks), `sandwiched` (units between their neighbours) or `alone` (units by themselves; earlier
    versions called it `isolated`, and are read as such).
    reference_ns: the session's time of the reference engine, which in mode `sandwiched` is one sandwich; the absolute time of
    a build is its ratio x this.
    graph_bytes: the most that graph structure and scales add to stored weights in the deployed file.
    dense_file_bytes: size of the dense fp32 ONNX file.
    unsupported: unit -> {variant: reason}; these are never offered.
    grid: for each channel group the widths worth knowing, the whole one first; empty where none were looked for.
    ended: whether a profile came to its end, be it by its time limit. task: what named the task, as `hwsearch.load` takes it;
    of a file that was given by its absolute path the name alone. prior: what other tables of the device contributed.
    design: why the design ended (`stopped`), its builds and seconds, the relative standard error of likely allocations that was
    left (`error`) and how much of it another build would have taken away (`gain`).
    """

    network: Network
    device: dict[str, Any]
    backend: str
    versions: dict[str, str]
    options: dict[str, Any]
    mode: str = "context"
    command: str = ""
    created: str = ""
    reference_ns: float = 0.0
    graph_bytes: int = 0
    dense_file_bytes: int = 0
    unsupported: dict[str, dict[str, str]] = field(default_factory=dict)
    grid: dict[str, list[int]] = field(default_factory=dict)
    ended: bool = False
    task: str = ""
    prior: tuple[Evidence, ...] = ()
    design: dict[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> Section:
        """What tells this table apart from the others in its file."""
        return Section(self.options, self.network.input_shapes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "network": self.network.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Header:
        fields = {k: v for k, v in data.items() if k in Header.__dataclass_fields__}
        prior = tuple(Evidence.from_json(e) for e in data.get("prior", ()))
        mode = _now_called(data.get("mode", "context"))
        return Header(
            **{**fields, "mode": mode, "network": Network.from_json(data["network"]), "prior": prior}
        )


def _now_called(name: str) -> str:
    """A mode or role under its present name."""
    return "alone" if name == "isolated" else name


class LatencyTable:
    """Builds of one network on one device, backend and set of options."""

    def __init__(self, header: Header, builds: tuple[Build, ...] = ()) -> None:
        self.header = header
        self.builds = tuple(builds)

    @property
    def network(self) -> Network:
        return self.header.network

    def __repr__(self) -> str:
        h = self.header
        return (
            f"LatencyTable({h.network.name or 'network'} on {h.device.get('chip', '?')}, {h.backend}, "
            f"{h.options}, {len(self.builds)} builds)"
        )

    def with_build(self, build: Build) -> LatencyTable:
        """The table with one more build."""
        return LatencyTable(self.header, (*self.builds, build))

    def with_header(self, **changes: Any) -> LatencyTable:
        return LatencyTable(replace(self.header, **changes), self.builds)

    def rescaled(self) -> LatencyTable:
        """The table with the median of all samples of the reference as the session's reference time."""
        samples = np.concatenate([b.reference_ns for b in self.builds])
        return self.with_header(reference_ns=float(np.median(samples)))

    def find(self, role: str) -> Build:
        """The first build of a role. Raises InvalidInput where the table has none (it is not finished)."""
        for build in self.builds:
            if build.role == role:
                return build
        if self.header.mode == SANDWICHED:
            raise InvalidInput(
                f"the table was made of sandwiches and has no {role} build; profile with --mode context for one"
            )
        raise InvalidInput(
            f"the table has no {role} build: its profile was interrupted early; run `hwsearch profile` again, it resumes"
        )

    def time_ns(self, build: Build) -> float:
        """Time of a build on the scale of the table's session, in ns."""
        return build.ratio * self.header.reference_ns

    @property
    def dense_ns(self) -> float:
        """Time of the dense fp32 network, in ns."""
        return self.time_ns(self.find("dense"))

    @cached_property
    def quiet_ns(self) -> float:
        """Time of the reference on the quiet machine. Deployed builds do not count: they are of other sessions."""
        times = [b.quiet_ns for b in self.builds if b.role != "deployed"] or [b.quiet_ns for b in self.builds]
        return float(np.quantile(times, QUIET))

    def disturbance(self, build: Build) -> float:
        """By how much slower than on the quiet machine the reference was all the while a build was measured, relatively.

        0 of deployed builds, whose sessions may have been slower as a whole.
        """
        return 0.0 if build.role == "deployed" else max(build.quiet_ns / self.quiet_ns - 1.0, 0.0)

    def disturbed(self, build: Build) -> bool:
        """Whether something else slowed the machine down all the while a build was measured: it counts for less in a fit."""
        return 1.0 + self.disturbance(build) > DISTURBED

    def tail(self, quantile: float) -> float:
        """That quantile of the times of single inferences, relative to their median.

        Pooled over the raw samples of every build of whole networks, each relative to its own median: how far single
        inferences stray is the machine's doing, and no build alone has samples enough for a 99th percentile.
        Raises InvalidInput where no whole network was built.
        """
        samples = [b.samples_ns / np.median(b.samples_ns) for b in self.builds if not b.partial]
        if not samples:
            raise InvalidInput(
                "the table has no build of a whole network, so that nothing is known of the tails of its latency; "
                "bound `latency` instead, or profile with --mode context"
            )
        return float(np.quantile(np.concatenate(samples), quantile))

    def offered(self) -> dict[str, tuple[str, ...]]:
        """Variants of each unit that were measured and ran as asked; layer by layer, units of one signature share them."""
        if self.header.mode in LAYERED:
            return self._offered_by_signature()
        base = str(self.header.options["base"])
        seen: dict[str, dict[str, None]] = {u.name: {} for u in self.network.units}
        for build in self.builds:
            if build.base == base:
                for unit, variant in zip(self.network.units, build.variants, strict=True):
                    seen[unit.name][variant] = None
        return {
            unit: tuple(v for v in variants if v not in self.header.unsupported.get(unit, {}))
            for unit, variants in seen.items()
        }

    def _offered_by_signature(self) -> dict[str, tuple[str, ...]]:
        base = str(self.header.options["base"])
        seen: dict[str, dict[str, None]] = {u.signature: {} for u in self.network.units}
        refused: dict[str, set[str]] = {u.signature: set() for u in self.network.units}
        for i, unit in enumerate(self.network.units):
            refused[unit.signature].update(self.header.unsupported.get(unit.name, {}))
            seen[unit.signature].update(
                {b.variants[i]: None for b in self.builds if b.base == base and b.variants[i]}
            )
        return {
            u.name: tuple(v for v in seen[u.signature] if v not in refused[u.signature])
            for u in self.network.units
        }

    def grid(self) -> dict[str, list[int]]:
        """For each channel group the widths to choose from, the whole one first."""
        return {g: self.header.grid.get(g, [n]) for g, n in self.network.channels.items()}

    def known(self) -> set[tuple[str, str]]:
        """(signature, variant) of units that other tables of the device tell."""
        return {(e.feature[1], e.feature[2]) for e in self.header.prior if e.feature[0] == "unit"}

    def candidate(self, build: Build) -> Candidate:
        """A build's variants by unit, and its widths by group."""
        names = [u.name for u in self.network.units]
        variants = {n: Variant.parse(v) for n, v in zip(names, build.variants, strict=True) if v}
        widths = build.widths or tuple(self.network.channels.values())
        return Candidate(variants, dict(zip(self.network.channels, widths, strict=True)))

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the table and put it in place in one step: a killed writer leaves the old file.

        In a file of other sections it replaces the one of its own options and input shapes, or joins them.
        Raises IncompatibleTables where those are of another model, device, backend or runtime, InvalidInput where the file
        is no latency table.
        """
        import pyarrow as pa

        rows = pa.concat_tables([_schema().empty_table(), *(b.row for b in self.builds)])
        own = self.header.to_json(), rows
        sections = read_sections(path, (SCHEMA, *OLDER), WHOLE) if Path(path).exists() else []
        headers = [_header(header, path) for header, _ in sections]
        for header in headers[:1]:
            LatencyTable(header).require_beside(self.header)
        place = next((i for i, h in enumerate(headers) if h.section == self.header.section), len(sections))
        write_sections(path, [*sections[:place], own, *sections[place + 1 :]], SCHEMA, _schema())

    @staticmethod
    def load(
        path: str | Path, *, network: str | None = None, like: Mapping[str, Any] | None = None, **wanted: Any
    ) -> LatencyTable:
        """The table of a file; where it has several, the one under the options wanted.

        wanted: `threads`, `batch`, `base`, `load`, `residual`, `cpus`, `clocks`, and `shape` (`"1x3x160x160"`, or one for each
        input).
        Of those left, the ones of this network (a fingerprint) are preferred, then the ones that agree with most of the
        options in `like`.
        Raises InvalidInput (absent, truncated, foreign; no table under these options, or several: then it lists them) or
        IncompatibleTables (another schema).
        """
        found = LatencyTable.sections(path, **wanted)
        found = [t for t in found if t.network.fingerprint == network] or found
        if like is not None:
            alike = [t.header.section.agrees(like) for t in found]
            found = [t for t, n in zip(found, alike, strict=True) if n == max(alike)]
        return found[only([t.header.section for t in found], path)]

    @staticmethod
    def sections(path: str | Path, **wanted: Any) -> list[LatencyTable]:
        """Every table of a file, or those under the options wanted, which are at least one. Raises as `load`."""
        tables = [_table(header, rows, path) for header, rows in read_sections(path, (SCHEMA, *OLDER), WHOLE)]
        keys = [t.header.section for t in tables]
        if any(key in keys[:i] for i, key in enumerate(keys)):
            raise InvalidInput(
                f"{path} is damaged: two of its sections have the same options and input shapes"
            )
        try:
            for other in tables[1:]:
                tables[0].require_beside(other.header)
        except IncompatibleTables as error:
            raise InvalidInput(f"{path} is damaged: its sections do not belong together: {error}") from error
        return [tables[i] for i in matching(keys, path, **wanted)]

    def require(
        self, *, device: Mapping[str, Any] | None = None, network: Network | None = None, backend: str | None = None,
        options: Mapping[str, Any] | None = None, versions: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Raises IncompatibleTables, naming what differs, unless the table is of this device, network and regime."""
        h = self.header
        pairs: list[tuple[str, Any, Any]] = []
        if device is not None:
            pairs.append(
                (
                    "device",
                    f"{h.device.get('chip')} ({h.device.get('id')})",
                    f"{device.get('chip')} ({device.get('id')})",
                )
            )
        if backend is not None:
            pairs.append(("backend", h.backend, backend))
        if options is not None:
            keys = dict.fromkeys([*options, *h.options])
            pairs += [(key, h.options.get(key), options.get(key)) for key in keys]
        if network is not None and h.network.fingerprint != network.fingerprint:
            pairs.append(("network", _named(h.network), _named(network)))
        if versions is not None:
            pairs.append(("runtime", dict(h.versions), dict(versions)))
        for what, own, other in pairs:
            if own != other:
                raise IncompatibleTables(
                    f"the table is of another {what}: table={own}, current={other}; "
                    "profile this one into a file of its own with `hwsearch profile`"
                )

    def require_beside(self, header: Header) -> None:
        """Raises IncompatibleTables unless a table of this header may be in one file with this one."""
        self.require(device=header.device, backend=header.backend, versions=header.versions)
        if self.network.model != header.network.model:
            raise IncompatibleTables(
                f"the table is of another network: table={_named(self.network)}, current={_named(header.network)}; "
                "profile this one into a file of its own with `hwsearch profile`"
            )

    def to_frame(self) -> pd.DataFrame:
        """One row a build: role, base, time and interval in ms, stability, counts of variants."""
        import pandas as pd

        scale = self.header.reference_ns / 1e6
        return pd.DataFrame(
            [
                {
                    "role": b.role,
                    "base": b.base,
                    "latency_ms": b.ratio * scale,
                    "low_ms": b.low * scale,
                    "high_ms": b.high * scale,
                    "unstable": b.unstable,
                    "as_asked": b.as_asked(),
                    "samples": len(b.samples_ns),
                    **({"energy_mj": 1e3 * b.energy_j} if b.energy_j else {}),
                    **{v: b.variants.count(v) for v in sorted(set(b.variants) - {""})},
                }
                for b in self.builds
            ]
        ).fillna(0)


def usable(table: LatencyTable) -> list[Build]:
    """Builds a fit may use: whole networks under the table's base that ran as asked."""
    base = table.header.options["base"]
    return [b for b in table.builds if b.base == base and not b.partial and b.as_asked()]


def _named(network: Network) -> str:
    return f"{network.name} ({network.fingerprint})"


def _header(data: Mapping[str, Any], path: str | Path) -> Header:
    """Raises InvalidInput on anything else than `Header.to_json` gives."""
    try:
        header = Header.from_json(data)
        for group, steps in header.grid.items():
            whole = header.network.channels[group]
            if sorted({whole, *map(int, steps)}, reverse=True) != steps or steps[-1] < 1:
                raise ValueError(f"widths {steps} of {group}")
        _ = header.section.key, header.options["base"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} is damaged: {error!r}; profile again or take another copy") from error
    return header


def _table(data: Mapping[str, Any], rows: Any, path: str | Path) -> LatencyTable:
    """A section as it is read from a file. Raises InvalidInput where it is damaged."""
    header = _header(data, path)
    try:
        builds = tuple(
            Build(
                **{
                    **row,
                    "role": _now_called(row["role"]),
                    "variants": tuple(row["variants"]),
                    "executed": tuple(row["executed"]),
                    "widths": tuple(row["widths"]),
                    "samples_ns": np.array(row["samples_ns"], np.int64),
                    "reference_ns": np.array(row["reference_ns"], np.int64),
                    "nodes": tuple(NodeRow(**{**n, "units": tuple(n["units"])}) for n in row["nodes"]),
                    "states": tuple(_state(s) for s in row.get("states") or ()),
                }
            )
            for row in rows.to_pylist()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} is damaged: {error!r}; profile again or take another copy") from error
    for build in builds:
        if why := _damage(build, header.network):
            raise InvalidInput(f"{path} is damaged: {why}")
    return LatencyTable(header, builds)


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


def _schema() -> Any:
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
        ]
    )

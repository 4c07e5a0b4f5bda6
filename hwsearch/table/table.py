"""LatencyTable: raw measurements of whole networks with their provenance, in one Parquet file.

A file may hold several tables of one model on one device, backend and runtime: sections, told apart by their options
(threads, batch, base, load, ...) and input shapes.

Schema history:
  1  builds with their raw samples and executed nodes; header under the Parquet key `hwsearch`.
  2  widths of the channel groups in each build, the grid of widths and the groups in the header.
  3  sections: the header holds one header for each (`sections`), rows their section's number (`section`); energies of
     builds, null where no counter was read. A file of schema 2 is read as one of one section, without energies.
  4  states of the GPU around each build (`states`); older rows have none.
  5  the machine that each build was measured on (`machine`); older rows do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.device.timing import DISTURBED, QUIET
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.network.choices import Candidate
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant
from hwsearch.table.build import TODO, Build, Role, columns, read_builds
from hwsearch.table.header import LAYERED, Header, Mode, read_header
from hwsearch.table.parquet import read_sections, write_sections
from hwsearch.table.section import matching, only

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 5
OLDER = (4, 3)
"""Older schemas that are still read."""
WHOLE = (2,)
"""Still older ones, whose files are of one section."""


class LatencyTable:
    """Builds of one network on one device, backend and set of options.

    Args:
        header: what it was measured on and with.
        builds: the measured rows, in the order in which they were made.
    """

    def __init__(self, header: Header, builds: tuple[Build, ...] = ()) -> None:
        self.header = header
        self.builds = tuple(builds)

    @property
    def network(self) -> Network:
        """The network that was profiled."""
        return self.header.network

    def __repr__(self) -> str:
        h = self.header
        return (
            f"LatencyTable({h.network.name or 'network'} on {h.device.get('chip', '?')}, {h.backend}, "
            f"{h.options}, {len(self.builds)} builds)"
        )

    def with_build(self, build: Build) -> LatencyTable:
        """Add a build.

        Args:
            build: the row to add.

        Returns:
            The table with one more build; this one stays as it is.
        """
        return LatencyTable(self.header, (*self.builds, build))

    def with_header(self, **changes: Any) -> LatencyTable:
        """Change the header.

        Args:
            **changes: fields of the header and their new values.

        Returns:
            The table with another header; this one stays as it is.
        """
        return LatencyTable(replace(self.header, **changes), self.builds)

    @cached_property
    def machines(self) -> list[str]:
        """The machines that the builds were measured on, deployed ones left out: the first is the one that times are of."""
        return list(dict.fromkeys(b.machine for b in self.builds if b.machine and b.role != Role.DEPLOYED)) or [""]

    def machine(self, build: Build) -> str:
        """The machine that a build was measured on.

        Args:
            build: one of the table's.

        Returns:
            One of `machines`: the first where the build does not tell, or was deployed on another one.
        """
        return build.machine if build.machine in self.machines else self.machines[0]

    def of_machine(self, name: str) -> list[Build]:
        """The builds that were measured on one machine.

        Args:
            name: one of `machines`.

        Returns:
            Its builds, in the order in which they were made.
        """
        return [b for b in self.builds if self.machine(b) == name]

    def rescaled(self) -> LatencyTable:
        """Take the median of all samples of the reference, on the first machine, as the session's reference time.

        Returns:
            The table on that scale.
        """
        samples = np.concatenate([b.reference_ns for b in self.of_machine(self.machines[0])])
        return self.with_header(reference_ns=float(np.median(samples)))

    def find(self, role: str) -> Build:
        """The first build of a role.

        Args:
            role: `dense`, `reference`, `uniform` and so on.

        Returns:
            The build.

        Raises:
            InvalidInput: the table has none: it is not finished, or was made of sandwiches.
        """
        for build in self.builds:
            if build.role == role:
                return build
        if self.header.mode == Mode.SANDWICHED:
            raise InvalidInput(
                f"the table was made of sandwiches and has no {role} build; profile with --mode context for one"
            )
        raise InvalidInput(
            f"the table has no {role} build: its profile was interrupted early; run `hwsearch profile` again, it resumes"
        )

    def time_ns(self, build: Build) -> float:
        """Time of a build on the scale of the table's session.

        Args:
            build: one of the table's.

        Returns:
            Time of one inference in ns.
        """
        return build.ratio * self.header.reference_ns

    @property
    def dense_ns(self) -> float:
        """Time of the dense fp32 network, in ns."""
        return self.time_ns(self.find(Role.DENSE))

    @cached_property
    def _quiet(self) -> dict[str, float]:
        found = {}
        for name in self.machines:
            own = self.of_machine(name)
            times = [b.quiet_ns for b in own if b.role != Role.DEPLOYED] or [b.quiet_ns for b in own]
            found[name] = float(np.quantile(times, QUIET))
        return found

    @property
    def quiet_ns(self) -> float:
        """Time of the reference on the quiet (first) machine. Deployed builds do not count: they are of other sessions."""
        return self._quiet[self.machines[0]]

    def quiet_on(self, machine: str) -> float:
        """Time of the reference on a quiet machine of several.

        Args:
            machine: its name.

        Returns:
            Time in ns; `quiet_ns` where it is none of the table's machines.
        """
        return self._quiet.get(machine, self.quiet_ns)

    def slowdown(self, build: Build) -> float:
        """By how much slower than on the quiet machine the reference was all the while a build was measured.

        Args:
            build: one of the table's.

        Returns:
            The relative slowdown; 0 on the quiet machine.
        """
        return build.quiet_ns / self.quiet_on(self.machine(build)) - 1.0

    @cached_property
    def reference_nodes(self) -> int:
        """Nodes that the reference executes, or, in a table without it, the first build that was read back."""
        counts = [len(b.nodes) for b in sorted(self.builds, key=lambda b: b.role != Role.REFERENCE) if b.nodes]
        return counts[0] if counts else 1

    def nodes(self, build: Build) -> float:
        """Executed nodes of a build, relative to the reference.

        Args:
            build: one of the table's.

        Returns:
            Nodes of the build / those of the reference; 1 where they were not read back.
        """
        return len(build.nodes) / self.reference_nodes if build.nodes else 1.0

    def disturbed(self, build: Build) -> bool:
        """Whether something else slowed the machine down all the while a build was measured: it counts for less in a fit.

        Args:
            build: one of the table's.

        Returns:
            True where it was disturbed.
        """
        return 1.0 + self.slowdown(build) > DISTURBED

    def tail(self, quantile: float) -> float:
        """A quantile of the times of single inferences, relative to their median.

        Pooled over the raw samples of every build of whole networks, each relative to its own median: how far single
        inferences stray is the machine's doing, and no build alone has samples enough for a 99th percentile.

        Args:
            quantile: between 0 and 1, for instance 0.99.

        Returns:
            The quantile / the median.

        Raises:
            InvalidInput: no whole network was built.
        """
        samples = [b.inferences for b in self.builds if not b.partial]
        if not samples:
            raise InvalidInput(
                "the table has no build of a whole network, so that nothing is known of the tails of its latency; "
                "bound `latency` instead, or profile with --mode context"
            )
        return float(np.quantile(np.concatenate(samples), quantile))

    def offered(self) -> dict[str, tuple[str, ...]]:
        """Variants of each unit that were measured and ran as asked; layer by layer, units of one signature share them.

        Returns:
            Unit -> variants, as `dense.int8`.
        """
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
        for unit in (u for u in self.network.units if u.stored):
            seen[unit.signature] = {f"dense.{base}": None}
        return {
            u.name: tuple(v for v in seen[u.signature] if v not in refused[u.signature])
            for u in self.network.units
        }

    def grid(self) -> dict[str, list[int]]:
        """The widths to choose from.

        Returns:
            Channel group -> slots kept, the whole width first.
        """
        return {g: self.header.grid.get(g, [n]) for g, n in self.network.channels.items()}

    def known(self) -> set[tuple[str, str]]:
        """Units that other tables of the device tell of.

        Returns:
            Pairs of signature and variant.
        """
        return {(e.feature[1], e.feature[2]) for e in self.header.prior if e.feature[0] == "unit"}

    def candidate(self, build: Build) -> Candidate:
        """What a build was made of.

        Args:
            build: one of the table's.

        Returns:
            Its variants by unit, and its widths by group.
        """
        names = [u.name for u in self.network.units]
        variants = {n: Variant.parse(v) for n, v in zip(names, build.variants, strict=True) if v}
        widths = build.widths or tuple(self.network.channels.values())
        return Candidate(variants, dict(zip(self.network.channels, widths, strict=True)))

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the table and put it in place in one step: a killed writer leaves the old file.

        In a file of other sections it replaces the one of its own options and input shapes, or joins them.

        Args:
            path: file to write.

        Raises:
            IncompatibleTables: the file's sections are of another model, device, backend or runtime.
            InvalidInput: the file is no latency table.
        """
        import pyarrow as pa

        rows = pa.concat_tables([columns().empty_table(), *(b.row for b in self.builds)])
        own = self.header.to_json(), rows
        sections = read_sections(path, (SCHEMA, *OLDER), WHOLE) if Path(path).exists() else []
        headers = [read_header(header, path) for header, _ in sections]
        for header in headers[:1]:
            LatencyTable(header).require_beside(self.header)
        place = next((i for i, h in enumerate(headers) if h.section == self.header.section), len(sections))
        write_sections(path, [*sections[:place], own, *sections[place + 1 :]], SCHEMA, columns())

    @staticmethod
    def load(
        path: str | Path, *, network: str | None = None, like: Mapping[str, Any] | None = None, **wanted: Any
    ) -> LatencyTable:
        """Read the table of a file; where it has several, the one under the options wanted.

        Of those left, the ones of this network are preferred, then the ones that agree with most of the options in `like`.

        Args:
            path: file that `hwsearch profile` or `save` wrote.
            network: fingerprint of the network to prefer.
            like: options to prefer.
            **wanted: `threads`, `batch`, `base`, `load`, `residual`, `cpus`, `clocks`, `mps`, `int8_bits`, `unsigned`, and `shape`
                (`"1x3x160x160"`, or one for each input).

        Returns:
            The table.

        Raises:
            InvalidInput: absent, truncated or foreign; no table under these options, or several: then it lists them.
            IncompatibleTables: another schema.
        """
        found = LatencyTable.sections(path, **wanted)
        found = [t for t in found if t.network.fingerprint == network] or found
        if like is not None:
            alike = [t.header.section.agrees(like) for t in found]
            found = [t for t, n in zip(found, alike, strict=True) if n == max(alike)]
        return found[only([t.header.section for t in found], path)]

    @staticmethod
    def sections(path: str | Path, **wanted: Any) -> list[LatencyTable]:
        """Read every table of a file, or those under the options wanted.

        Args:
            path: file that `hwsearch profile` or `save` wrote.
            **wanted: as for `load`.

        Returns:
            At least one table.

        Raises:
            InvalidInput: absent, truncated, foreign or damaged; no table under these options.
            IncompatibleTables: another schema.
        """
        tables = []
        read = read_sections(path, (SCHEMA, *OLDER), WHOLE)
        for place, (data, rows) in enumerate(read):
            where = f" of section {place + 1}" if len(read) > 1 else ""
            header = read_header(data, path, where)
            tables.append(LatencyTable(header, read_builds(rows, header.network, path, where)))
            _require_scale(tables[-1], path, where)
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
        """Insist that the table is of this device, network and setup; what is None is not compared.

        Args:
            device: what a fingerprint of the device holds.
            network: the network, without its weights.
            backend: name of the backend.
            options: threads, batch, base and the others.
            versions: of the runtime's packages.

        Raises:
            IncompatibleTables: one of them differs; the message names it.
        """
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
        """Insist that a table may be in one file with this one.

        Args:
            header: that of the other table.

        Raises:
            IncompatibleTables: it is of another model, device, backend or runtime.
        """
        self.require(device=header.device, backend=header.backend, versions=header.versions)
        if self.network.model != header.network.model:
            raise IncompatibleTables(
                f"the table is of another network: table={_named(self.network)}, current={_named(header.network)}; "
                "profile this one into a file of its own with `hwsearch profile`"
            )

    def to_frame(self) -> pd.DataFrame:
        """One row a build.

        Returns:
            Role, base, time and interval in ms, stability, number of samples, energy in mJ where it was read, counts of variants.
        """
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


def judged_by(table: LatencyTable) -> list[Build]:
    """The builds on which the error of a fit is reported: test builds, or held-out ones where there are fewer than two."""
    tested, held = ([b for b in usable(table) if b.role == role] for role in (Role.TEST, Role.HELDOUT))
    return tested if len(tested) >= 2 else held + tested


def _require_scale(table: LatencyTable, path: str | Path, where: str) -> None:
    """Raises InvalidInput where the reference's time is none of its samples', as the median of them all is."""
    if not table.builds:
        return
    medians = [float(np.median(b.reference_ns)) for b in table.builds]
    least, most = min(medians), max(medians)
    if not 0.999 * least <= table.header.reference_ns <= 1.001 * most:
        raise InvalidInput(
            f"{path} is damaged: header{where}: reference_ns is {table.header.reference_ns:.6g}, expected {least:.6g} to "
            f"{most:.6g}, as the samples of the reference in its rows say; {TODO}"
        )


def usable(table: LatencyTable) -> list[Build]:
    """Builds a fit may use: whole networks under the table's base that ran as asked."""
    base = table.header.options["base"]
    return [b for b in table.builds if b.base == base and not b.partial and b.as_asked()]


def _named(network: Network) -> str:
    return f"{network.name} ({network.fingerprint})"

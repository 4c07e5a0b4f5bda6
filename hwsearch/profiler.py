"""Which whole networks to build, and what their times say of units and edges."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch import device as devices
from hwsearch.backends.base import Backend, BuildOptions, Engine, NodeTime
from hwsearch.errors import BackendUnavailable, IncompatibleTables, InvalidInput
from hwsearch.lower import Lowering, isolate, tensor_names, unit_of
from hwsearch.measure import Protocol, Timing, paired
from hwsearch.network import Network
from hwsearch.outputs import WRONG, Expected, reason
from hwsearch.progress import Progress
from hwsearch.table import Build, Header, LatencyTable, NodeRow
from hwsearch.variants import Variant, legal, network_bytes, uniform

if TYPE_CHECKING:
    from hwsearch.task import Task

MODES = ("context", "isolated")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")
_MOVES = ("Reorder", "Transpose", "Reshape", "Convert", "Const", "Quantize", "Dequantize")
_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FullyConnected", "QLinearConv", "QGemm",
             "QLinearMatMul", "Deconvolution", "NhwcFusedConv")  # fmt: skip
METADATA_BYTES = 1024
"""The most that the metadata of a deployed file takes."""

HELDOUT_SHARE = 5
"""Every fifth build of the design is kept from the fit, to report its error on."""


@dataclass(frozen=True)
class Regime:
    """One network made ready for one backend under one set of options."""

    lowering: Lowering
    backend: Backend
    options: BuildOptions

    @property
    def network(self) -> Network:
        return self.lowering.network

    @cached_property
    def expected(self) -> Expected:
        """What engines of this network should return."""
        return Expected(self.lowering, self.backend.quantize_outputs)

    @property
    def clock(self) -> Callable[[], int]:
        """Nanoseconds: of a backend that keeps its own time (a simulated one), else of this machine."""
        own: Callable[[], int] = getattr(self.backend, "clock", time.perf_counter_ns)
        return own

    def onnx(self, variants: Mapping[str, Variant], metadata: Mapping[str, str] | None = None) -> Any:
        return self.lowering.onnx(variants, quantize_outputs=self.backend.quantize_outputs, metadata=metadata)

    def build(
        self,
        variants: Mapping[str, Variant],
        base: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Engine, Any]:
        """(engine on the example inputs, ONNX model)."""
        model = self.onnx(variants, metadata)
        engine = self.backend.build(
            model.SerializeToString(), replace(self.options, base=base or self.options.base)
        )
        engine.prepare(*self.lowering.arrays())
        return engine, model


def regime(
    task: Task, backend: Backend, *, threads: int = 1, base: str | None = None, batch: int | None = None
) -> Regime:
    """base None: the one that the backend prefers on this device. Raises InvalidInput on one it lacks."""
    bases = backend.bases()
    if base is not None and base not in bases:
        raise InvalidInput(
            f"{backend.name} does not offer base precision {base!r} here; it offers {', '.join(bases)}"
        )
    if threads < 1:
        raise InvalidInput(f"threads must be at least 1, got {threads}")
    return Regime(Lowering(task, batch), backend, BuildOptions(threads, base or bases[0]))


# ---------------------------------------------------------------- attribution


def attribute(nodes: Sequence[NodeTime], network: Network, names: Mapping[str, str]) -> tuple[NodeRow, ...]:
    """Each executed node as the work of units, a conversion on an edge, or the rest.

    names: for each ONNX tensor the node that makes it, for runtimes which name layers after tensors.
    """
    known = {unit.name: i for i, unit in enumerate(network.units)}
    rows = []
    for node in nodes:
        plain = () if _moves(node.op) else (node.name,)
        sources = [_resolve(s, names) for s in (node.sources or plain)]
        owners = [
            (unit, own, source) for source in sources for unit, own in [unit_of(source)] if unit in known
        ]
        working = _ordered({u for u, own, s in owners if own and not _is_conversion(s)}, known)
        if not working and node.op.startswith(_PRODUCTS):
            working = [u for u, _, _ in owners][-1:]  # named after what was fused behind the product
        if working:
            kind, units = "unit", working
        elif owners:
            converts = [u for u, own, s in owners if own]
            kind = "edge" if converts else "rest"
            units = (converts or [u for u, _, _ in owners])[-1:]
        else:
            mentioned = _mentioned(node.name, known)
            kind, units = ("edge" if _moves(node.op) else "rest"), mentioned[-1:]
        rows.append(NodeRow(node.name, node.op, kind, tuple(units), node.precision, node.time_ns))
    return tuple(rows)


def _resolve(source: str, names: Mapping[str, str]) -> str:
    if "|" in source:
        return source
    while source:
        if source in names:
            return names[source]
        if "_" not in source and "/" not in source:
            return ""
        source = source[: max(source.rfind("_"), source.rfind("/"))]
    return ""


def _is_conversion(source: str) -> bool:
    return source.split("|")[2].startswith(_CONVERSIONS)


def _moves(op: str) -> bool:
    return op.startswith(_MOVES) or "Reorder" in op


def _ordered(units: set[str], known: Mapping[str, int]) -> list[str]:
    return sorted(units, key=known.__getitem__)


def _mentioned(name: str, known: Mapping[str, int]) -> list[str]:
    found = [(name.rfind(f"{unit}|") + len(unit), len(unit), unit) for unit in known if f"{unit}|" in name]
    return [unit for _, _, unit in sorted(found)]


def executed_precisions(rows: Sequence[NodeRow], network: Network) -> tuple[str, ...]:
    """For each unit the precision of the longest node that does its work; empty where no node names it."""
    longest: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row.kind == "unit":
            moved = _moves(row.op)
            for unit in row.units:
                rank = (-1.0 if moved else row.time_ns, row.precision)
                if unit not in longest or rank[0] > longest[unit][0]:
                    longest[unit] = rank
    return tuple(longest[u.name][1] if u.name in longest else "" for u in network.units)


def told_apart(
    executed: Sequence[str], rows: Sequence[NodeRow], allocation: Mapping[str, Variant], network: Network
) -> tuple[str, ...]:
    """Executed precisions, empty for a float unit inside a fused node that reports the int8 of a unit fused with it.

    A runtime gives a fused node one precision. It confirms int8 for whoever asked for it, and says nothing of the rest.
    """
    mixed = {
        unit
        for row in rows
        if row.kind == "unit" and len(row.units) > 1
        for unit in row.units
        if row.precision != allocation[unit].precision
        and not allocation[unit].quantized
        and any(allocation[other].precision == row.precision for other in row.units)
    }
    return tuple("" if u.name in mixed else e for u, e in zip(network.units, executed, strict=True))


# ---------------------------------------------------------------- design


def random_allocation(
    network: Network, offered: Mapping[str, Sequence[Variant]], rng: np.random.Generator
) -> dict[str, Variant]:
    """A Markov run over the units: neighbours keep a variant with a random stickiness, under a random mix."""
    stickiness = rng.uniform(0.0, 0.9)
    weights: dict[Variant, float] = {}
    allocation: dict[str, Variant] = {}
    previous: Variant | None = None
    for unit in network.units:
        choices = list(offered[unit.name])
        for variant in choices:
            weights.setdefault(variant, float(rng.exponential()))
        if previous in choices and rng.random() < stickiness:
            allocation[unit.name] = previous
        else:
            p = np.array([weights[v] for v in choices]) + 1e-9
            allocation[unit.name] = choices[int(rng.choice(len(choices), p=p / p.sum()))]
        previous = allocation[unit.name]
    return allocation


def cover(
    network: Network,
    offered: Mapping[str, Sequence[Variant]],
    done: Sequence[Mapping[str, Variant]],
    rng: np.random.Generator,
    pool: int = 48,
) -> dict[str, Variant]:
    """The allocation, of a random pool, that most covers what was seldom built: (unit, variant) and (edge, pair)."""
    counts: dict[tuple[Any, ...], int] = {}
    for allocation in done:
        for fact in _facts(network, allocation):
            counts[fact] = counts.get(fact, 0) + 1
    candidates = [random_allocation(network, offered, rng) for _ in range(pool)]
    candidates = [a for a in candidates if a not in done] or candidates
    return max(candidates, key=lambda a: sum(1.0 / (1 + counts.get(f, 0)) ** 2 for f in _facts(network, a)))


def _facts(network: Network, allocation: Mapping[str, Variant]) -> list[tuple[Any, ...]]:
    facts: list[tuple[Any, ...]] = [(u.signature, u.name, allocation[u.name]) for u in network.units]
    facts += [(e.name, allocation[e.src].quantized, allocation[e.dst].quantized) for e in network.edges]
    return facts


def default_builds(network: Network) -> int:
    """Builds of the design, held-out ones included, where the time limit allows them."""
    return int(np.clip(len(network.units) // 2 + 10, 16, 40))


# ---------------------------------------------------------------- the profile


def profile(
    at: Regime,
    out: str | Path | None,
    *,
    time_limit_s: float = 600.0,
    mode: str = "context",
    seed: int = 0,
    builds: int | None = None,
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> LatencyTable:
    """Measure a table, or go on with the one at `out`: every finished build is on disk before the next begins.

    Raises DeviceBusy while another profile runs here; IncompatibleTables where `out` is of something else.
    """
    if mode not in MODES:
        raise InvalidInput(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if time_limit_s <= 0:
        raise InvalidInput(f"the time limit must be positive, got {time_limit_s} s")
    fingerprint = devices.fingerprint().to_json()
    with devices.lock(fingerprint["id"]):
        run = _Run(
            at, out, fingerprint, mode, seed, protocol or Protocol(), progress or Progress.silent(), command
        )
        return run.isolated(time_limit_s) if mode == "isolated" else run.context(time_limit_s, builds)


class _Run:
    def __init__(
        self, at: Regime, out: str | Path | None, device: dict[str, Any], mode: str, seed: int, protocol: Protocol,
        progress: Progress, command: str | None,
    ) -> None:  # fmt: skip
        self.at, self.protocol, self.progress, self.seed = at, protocol, progress, seed
        self.out = Path(out) if out is not None else None
        options = {**at.options.to_json(), "batch": at.lowering.batch}
        header = Header(
            network=at.network,
            device=device,
            backend=at.backend.name,
            versions=dict(at.backend.versions()),
            options=options,
            mode=mode,
            command=command
            if command is not None
            else " ".join(sys.argv[:1] and [Path(sys.argv[0]).name, *sys.argv[1:]]),
            created=_now(),
        )
        self.table = LatencyTable(header)
        if self.out is not None and self.out.exists():
            old = LatencyTable.load(self.out)
            old.require(device=device, network=at.network, backend=at.backend.name, options=options)
            if old.header.mode != mode:
                raise IncompatibleTables(
                    f"{out} was made in mode {old.header.mode}, not {mode}; give another file"
                )
            if dict(old.header.versions) != header.versions:
                raise IncompatibleTables(
                    f"{out} was measured with {old.header.versions}, this is {header.versions}; give another file"
                )
            self.table = old
        self.names = [u.name for u in at.network.units]
        self.reference: Engine | None = None

    # ---- whole networks

    def context(self, time_limit_s: float, builds: int | None) -> LatencyTable:
        start = self.at.clock()
        design = builds or default_builds(self.at.network)
        total = 3 + design
        self.progress.start(
            total, f"profile {self.at.network.name} on {self.at.backend.name}", limit_s=time_limit_s
        )
        try:
            self._anchors()
            rng = np.random.default_rng(self.seed)
            while (number := sum(b.role in ("design", "heldout") for b in self.table.builds)) < design:
                offered = self.offered()
                done = [self._as_mapping(b) for b in self.table.builds if b.base == self.at.options.base]
                allocation = cover(self.at.network, offered, done, rng)
                fresh = (
                    allocation not in done
                )  # else the network is so small that all were built: measure one again
                role = "heldout" if fresh and number % HELDOUT_SHARE == HELDOUT_SHARE - 1 else "design"
                if all(len(v) == 1 for v in offered.values()):
                    break  # nothing to choose between: the anchors say it all
                if self.at.clock() - start > time_limit_s * 1e9:
                    self.progress.step(f"time limit of {time_limit_s:.0f} s reached", done=total)
                    break
                self.measure(role, allocation)
        finally:
            self.progress.stop()
        return self.table

    def _anchors(self) -> None:
        base = self.at.options.base
        everything = {u.name: legal(u, self.at.backend.precisions(base)) for u in self.at.network.units}
        plain = uniform(self.at.network, base)
        self.measure("reference", plain)
        self.measure("dense", uniform(self.at.network, "fp32"), base="fp32")
        lowest = {u: max(v, key=lambda x: x.quantized) for u, v in everything.items()}
        largest = self.table.find("reference").file_bytes - network_bytes(self.at.network, plain)
        if any(v.quantized for v in lowest.values()):
            build = self.measure("uniform", lowest)
            largest = max(largest, build.file_bytes - network_bytes(self.at.network, lowest))
        self._store(
            self.table.with_header(
                graph_bytes=max(largest, 0) + METADATA_BYTES,
                dense_file_bytes=self.table.find("dense").file_bytes,
            )
        )

    def offered(self) -> dict[str, tuple[Variant, ...]]:
        precisions = self.at.backend.precisions(self.at.options.base)
        refused = self.table.header.unsupported
        return {
            u.name: tuple(v for v in legal(u, precisions) if str(v) not in refused.get(u.name, {}))
            for u in self.at.network.units
        }

    def measure(self, role: str, allocation: Mapping[str, Variant], base: str | None = None) -> Build:
        """Build, time and read back one allocation, unless the table has it; it is on disk on return."""
        base = base or self.at.options.base
        variants = tuple(str(allocation[name]) for name in self.names)
        for old in self.table.builds:
            if old.key == (base, variants) and old.role == role and role not in ("design", "heldout"):
                self.progress.step(f"{role}: on disk already")
                return old
        reference = self._reference()
        begun = self.at.clock()
        engine, model = self.at.build(allocation, base)
        build_s = (self.at.clock() - begun) / 1e9
        timing = paired(
            reference.run, {role: engine.run}, self.protocol, clock=self.at.clock, seed=self.seed
        )[role]
        build = record(self.at, role, allocation, base, timing, engine, model, build_s)
        self._note_unsupported(build)
        if build.wrong:
            self._note_wrong(allocation, base)
        self._store(self.table.with_build(build))
        self._rescale()
        self.progress.step(
            f"{role}: {build.ratio:.3f} of the reference{' (unstable)' if build.unstable else ''}"
        )
        return build

    def _reference(self) -> Engine:
        if self.reference is None:
            self.reference, _ = self.at.build(uniform(self.at.network, self.at.options.base))
        return self.reference

    def _note_unsupported(self, build: Build) -> None:
        if build.role == "dense":
            return
        refused = {unit: dict(reasons) for unit, reasons in self.table.header.unsupported.items()}
        for name, variant, executed in zip(self.names, build.variants, build.executed, strict=True):
            if not variant:  # an isolated build has one unit only
                continue
            asked = Variant.parse(variant).precision
            if executed and executed != asked and asked != build.base:
                refused.setdefault(name, {})[variant] = f"executed in {executed}"
            elif not executed and asked != build.base:
                refused.setdefault(name, {})[variant] = "the engine's record does not name this layer"
        self.table = self.table.with_header(unsupported=refused)

    def _note_wrong(self, allocation: Mapping[str, Variant], base: str) -> None:
        """Find the units whose variants make the engine return wrong outputs, and offer those no more."""
        found = wrong_variants(self.at, allocation, base)
        refused = {unit: dict(reasons) for unit, reasons in self.table.header.unsupported.items()}
        for name, why in found.items():
            refused.setdefault(name, {})[str(allocation[name])] = why
        self.table = self.table.with_header(unsupported=refused)

    def _rescale(self) -> None:
        """The session's reference time is the median of all its samples."""
        samples = np.concatenate([b.reference_ns for b in self.table.builds])
        self._store(self.table.with_header(reference_ns=float(np.median(samples))))

    def _store(self, table: LatencyTable) -> None:
        self.table = table
        if self.out is not None:
            table.save(self.out)

    def _as_mapping(self, build: Build) -> dict[str, Variant]:
        return {name: Variant.parse(v) for name, v in zip(self.names, build.variants, strict=True)}

    # ---- single layers

    def isolated(self, time_limit_s: float) -> LatencyTable:
        """Each distinct (unit, variant) compiled and timed by itself, beside the whole dense network."""
        start = self.at.clock()
        base = self.at.options.base
        jobs: dict[tuple[str, Variant], str] = {}
        for unit in self.at.network.units:
            for variant in legal(unit, self.at.backend.precisions(base)):
                jobs.setdefault((unit.signature, variant), unit.name)
        self.progress.start(
            3 + len(jobs), f"profile {self.at.network.name} layer by layer on {self.at.backend.name}"
        )
        try:
            self._anchors()
            for (_, variant), name in jobs.items():
                if self.at.clock() - start > time_limit_s * 1e9:
                    raise InvalidInput(
                        f"the time limit of {time_limit_s:.0f} s ended the isolated profile at layer {name}; what was "
                        "measured is kept: run again with a longer --time-limit, it resumes"
                    )
                self._isolated(name, variant)
        finally:
            self.progress.stop()
        return self.table

    def _isolated(self, name: str, variant: Variant) -> None:
        variants = tuple(str(variant) if n == name else "" for n in self.names)
        if any(b.role == "isolated" and b.variants == variants for b in self.table.builds):
            self.progress.step(f"{name} {variant}: on disk already")
            return
        begun = self.at.clock()
        engine, model = self.isolated_engine(name, variant)
        build_s = (self.at.clock() - begun) / 1e9
        timing = paired(
            self._reference().run,
            {name: engine.run},
            replace(self.protocol, width=0.02),
            clock=self.at.clock,
            seed=self.seed,
        )[name]
        build = record(
            self.at, "isolated", {name: variant}, self.at.options.base, timing, engine, model, build_s
        )
        self._note_unsupported(build)
        self._store(self.table.with_build(build))
        self.progress.step(f"{name} {variant}: {build.ratio:.4f} of the reference")

    def isolated_engine(self, name: str, variant: Variant) -> tuple[Engine, Any]:
        marked = isolate(self.at.lowering.marked, self.at.network[name])
        model = self.at.lowering.assemble(
            marked, {name: variant}, quantize_outputs=self.at.backend.quantize_outputs
        )
        engine = self.at.backend.build(model.SerializeToString(), self.at.options)
        rng = np.random.default_rng(0)
        engine.prepare(*(rng.normal(size=s.shape).astype(s.dtype) for s in engine.inputs))
        return engine, model


def wrong_variants(at: Regime, allocation: Mapping[str, Variant], base: str) -> dict[str, str]:
    """Units whose variants make an allocation's engine return wrong outputs, with the reason not to offer them.

    Raises BackendUnavailable where the outputs are wrong with no variant but the base itself.
    """
    plain = Variant(base)
    guilty = at.expected.blame(allocation, plain, lambda variants: at.build(variants, base)[0])
    if not guilty:
        raise BackendUnavailable(
            f"{at.backend.name} returns wrong outputs for this network in {base} on this CPU, with no layer quantized; "
            "use another backend or base precision (--backend, --base), and report it to the runtime's maintainers"
        )
    return {name: reason(error) for name, error in guilty.items()}


def record(
    at: Regime, role: str, allocation: Mapping[str, Variant], base: str, timing: Timing, engine: Engine, model: Any,
    build_s: float,
) -> Build:  # fmt: skip
    """A measured engine as a row of the table."""
    rows = attribute(engine.nodes(), at.network, tensor_names(model))
    executed = executed_precisions(rows, at.network)
    error = at.expected.error(engine, allocation) if role != "isolated" else 0.0
    if role != "isolated":
        executed = told_apart(executed, rows, allocation, at.network)
    if role == "isolated":
        executed = tuple(
            e if u.name in allocation else "" for e, u in zip(executed, at.network.units, strict=True)
        )
    return Build(
        role=role,
        base=base,
        variants=tuple(str(allocation[u.name]) if u.name in allocation else "" for u in at.network.units),
        ratio=timing.ratio,
        low=timing.low,
        high=timing.high,
        unstable=timing.unstable,
        samples_ns=timing.samples_ns,
        reference_ns=timing.reference_ns,
        executed=executed,
        nodes=rows,
        build_s=build_s,
        file_bytes=int(model.ByteSize()),
        measured_at=_now(),
        output_error=error,
        wrong=error > WRONG,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

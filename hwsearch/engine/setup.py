"""One network made ready for one backend under one set of options: building its engines, and what each of them did."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.backends import exactness
from hwsearch.backends.base import Backend, BuildOptions, Engine, qdq_form
from hwsearch.backends.faults import faults
from hwsearch.backends.process import compiler
from hwsearch.compress.widths import Kept, Weights
from hwsearch.device import fingerprint as device
from hwsearch.device import nvidia
from hwsearch.device.clocks import lock_clocks
from hwsearch.device.energy import Meter, find, tick_s
from hwsearch.device.load import cpus
from hwsearch.device.timing import Timing
from hwsearch.engine.attribution import attribute, executed_precisions, told_apart
from hwsearch.engine.outputs import Expected, reason
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.lowering.assemble import bytes_of_units
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import tensor_names
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, STORAGE, Variant, legal, weight_bytes
from hwsearch.table.build import PARTS, Build
from hwsearch.table.table import LatencyTable

if TYPE_CHECKING:
    from hwsearch.task import Task

COUNTED_NS = 1e8
"""How long the pass with the runtime's counters on should last: they count in whole microseconds."""
COUNTED_ON_GPU = 30
"""Inferences of that pass on a GPU, at most: events tell half microseconds, and each inference is launched call by call."""


@dataclass(frozen=True)
class Setup:
    """One network made ready for one backend under one set of options."""

    lowering: Lowering
    backend: Backend
    options: BuildOptions
    load: int = 0
    """Workers that keep the machine busy while it is measured."""
    clocks: int = 0
    """MHz that the GPU's clock is locked to while it is measured; 0: it is not."""
    storage: bool = False
    """Whether weights may also be stored in int8 and computed with in the base precision."""
    energy: bool = False
    """Whether a counter of energy that asks for seconds of each engine (a GPU's) is read as well; see `energy.by_ticks`."""

    @property
    def network(self) -> Network:
        return self.lowering.network

    def variants(self, base: str | None = None) -> tuple[Variant, ...]:
        """What units may ask for under a base (None: the setup's own), `dense.BASE` first."""
        own = self.backend.variants(base or self.options.base)
        return (*own, STORAGE) if self.storage and self.stores else own

    @property
    def stores(self) -> bool:
        """Whether the backend computes right with weights that are stored in int8 alone."""
        return bool(getattr(self.backend, "weight_storage", False))

    @cached_property
    def expected(self) -> Expected:
        """What engines of this network should return."""
        return Expected(self.lowering, self.backend.quantize_outputs)

    @property
    def clock(self) -> Callable[[], int]:
        """Nanoseconds: of a backend that keeps its own time (a simulated one), else of this machine."""
        own: Callable[[], int] = getattr(self.backend, "clock", time.perf_counter_ns)
        return own

    @property
    def meter(self) -> Meter | None:
        """Joules, where what the backend runs on counts them: a simulated one, a GPU, or this machine's CPU."""
        own: Meter | None = getattr(self.backend, "meter", None)
        found = own or find(gpu=device.on_gpu(self.backend)).meter
        return None if tick_s(found) and not self.energy else found

    @cached_property
    def sample(self) -> Callable[[], nvidia.State] | None:
        """Looks at the clocks, power and temperature of the GPU that the backend runs on; None on a CPU."""
        return nvidia.find().state if device.on_gpu(self.backend) else None

    def locked(self) -> AbstractContextManager[None]:
        """The GPU's clock held at `clocks` while the block runs, where that was asked for."""
        return lock_clocks(nvidia.find(), self.clocks) if self.clocks else nullcontext()

    @property
    def described(self) -> dict[str, Any]:
        """Everything that a measurement belongs to beside device and network, for tables and reports."""
        own: dict[str, Any] = {**self.options.to_json(), "batch": self.lowering.batch}
        if self.lowering.int8_bits != INT8_BITS:
            own["int8_bits"] = self.lowering.int8_bits
        if self.lowering.unsigned:
            own["unsigned"] = True
        if self.lowering.residual:
            own["residual"] = True
        if self.load:
            own["load"] = self.load
        if self.clocks:
            own["clocks"] = self.clocks
        if device.on_gpu(self.backend) and (share := nvidia.mps_share()):
            own["mps"] = share
        if restricted := cpus():
            own["cpus"] = restricted
        return own

    def narrow(self, kept: Kept, weights: Weights | None = None, *, calibrate: bool = False) -> Setup:
        """The same with only the kept slots of the channel groups; see `Lowering.narrow`."""
        if all(len(k) == self.network.channels[g] for g, k in kept.items()) and not weights:
            return self
        return replace(self, lowering=self.lowering.narrow(kept, weights, calibrate=calibrate))

    def onnx(self, variants: Mapping[str, Variant], metadata: Mapping[str, str] | None = None) -> Any:
        return self.lowering.onnx(variants, metadata=metadata, **qdq_form(self.backend))

    def build(
        self,
        variants: Mapping[str, Variant],
        base: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Engine, Any]:
        """(engine on the example inputs, ONNX model).

        Raises BackendUnavailable where the backend is known to compute such a graph wrongly (see `faults`).
        """
        build_engine = compiler(self.backend)  # whose process starts while the graph is made
        model = self.onnx(variants, metadata)
        if found := faults(model, self.backend.name):
            raise BackendUnavailable(f"{self.backend.name} computes this network wrongly: {'; '.join(found)}")
        engine = build_engine(
            model.SerializeToString(), replace(self.options, base=base or self.options.base)
        )
        engine.prepare(*self.lowering.arrays())
        return engine, model


def set_up(
    task: Task,
    backend: Backend,
    *,
    threads: int = 1,
    base: str | None = None,
    batch: int | None = None,
    residual: bool = False,
    load: int = 0,
    clocks: int = 0,
    storage: bool = False,
    energy: bool = False,
    int8_bits: int | None = None,
    unsigned: bool | None = None,
) -> Setup:
    """base None: the one that the backend prefers on this device. residual: as for `Lowering`. load: workers beside it.

    clocks: MHz to lock the GPU's clock to. storage: weights may be stored in int8 alone, where the backend has that. energy: see
    `Setup`. int8_bits: of int8 weights; None for as many as the backend sums exactly here. unsigned: see `Lowering`; None
    for what the backend prefers. Raises InvalidInput on a base precision that the backend lacks.
    """
    bases = backend.bases()
    if base is not None and base not in bases:
        raise InvalidInput(
            f"{backend.name} does not offer base precision {base!r} here; it offers {', '.join(bases)}"
        )
    if threads < 1:
        raise InvalidInput(f"threads must be at least 1, got {threads}")
    options = BuildOptions(threads, base or bases[0])
    bits = exactness.int8_bits(backend, options) if int8_bits is None else int8_bits
    if unsigned is None:
        unsigned = bool(getattr(backend, "unsigned_activations", False))
    lowering = Lowering(task, batch, residual=residual, int8_bits=bits, unsigned=unsigned)
    return Setup(lowering, backend, options, load, clocks, storage, energy)


def wrong_variants(setup: Setup, allocation: Mapping[str, Variant], base: str) -> dict[str, str]:
    """Units whose variants make an allocation's engine return wrong outputs, with the reason not to offer them.

    Raises BackendUnavailable where the outputs are wrong with no variant but the base itself.
    """
    plain = Variant(base)
    guilty = setup.expected.blame(allocation, plain, lambda variants: setup.build(variants, base)[0])
    if guilty is None:
        raise BackendUnavailable(
            f"{setup.backend.name} returns wrong outputs for this network in {base} on this CPU, with no layer quantized; "
            "use another backend or base precision (--backend, --base), and report it to the runtime's maintainers"
        )
    return {name: reason(deviation) for name, deviation in guilty.items()}


def graph_bytes(setup: Setup, base: str) -> tuple[int, dict[str, dict[str, int]]]:
    """(bytes of the deployed file that are always there, unit -> {variant: its bytes}) beside what units store.

    From the file of each network that is uniform in one variant; of two units that may share a Q/DQ each counts its own. The first
    is negative where the exporter computed something smaller from the tensors of no unit.
    """
    network, always = setup.network, -setup.network.fixed_bytes
    paths = {unit: path for unit, (path, _) in setup.lowering.traced.paths.items() if path is not None}
    own: dict[str, dict[str, int]] = {u.name: {} for u in network.units}
    for variant in setup.variants(base):
        wherever = {u.name: (*legal(u, [variant]), Variant(base))[0] for u in network.units}
        model = setup.lowering.onnx(wherever, metadata=None, shared=False, **qdq_form(setup.backend))
        found = bytes_of_units(model, paths)
        for unit in network.units:
            chosen = wherever[unit.name]
            beside = found.get(unit.name, 0) - weight_bytes(unit, chosen)
            own[unit.name][str(chosen)] = max(beside, own[unit.name].get(str(chosen), beside))
        units = sum(found.get(u.name, 0) for u in network.units)
        always = max(always, int(model.ByteSize()) - units - network.fixed_bytes)
    if setup.backend.quantize_outputs:
        _add_kept_float(network, model, own)
    return always, own


def _add_kept_float(network: Network, model: Any, own: Mapping[str, dict[str, int]]) -> None:
    """Add to each int8 unit what stands before the layers that read it where these are float (`rewrites.keep_float`)."""
    longest = max((len(name) for node in model.graph.node for name in (*node.input, *node.output)), default=0)
    for edge in network.edges:
        if edge.dst in own and edge.src in own:
            node = 3 * longest + len(edge.dst) + 64  # its names, and what protobuf puts around them
            for variant in own[edge.src]:
                if Variant.parse(variant).quantized:
                    own[edge.src][variant] += node


def refusals(
    table: LatencyTable, build: Build, units: Collection[str] | None = None
) -> dict[str, dict[str, str]]:
    """The table's `unsupported` with what a build's units (None: all) did not execute as asked."""
    refused = {unit: dict(reasons) for unit, reasons in table.header.unsupported.items()}
    for unit, variant, executed in zip(table.network.units, build.variants, build.executed, strict=True):
        if not variant or (units is not None and unit.name not in units):
            continue
        wanted = Variant.parse(variant)
        asked = wanted.executed
        if wanted == STORAGE:
            continue
        if wanted.kept is not None and executed == wanted.precision:
            why = f"eligible, but {table.header.backend} did not pick a sparse kernel"
            refused.setdefault(unit.name, {})[variant] = why
        elif executed and executed != asked and asked != build.base:
            refused.setdefault(unit.name, {})[variant] = f"executed in {executed}"
    return refused


def record(
    setup: Setup, role: str, allocation: Mapping[str, Variant], base: str, timing: Timing, engine: Engine, model: Any,
    build_s: float,
) -> Build:  # fmt: skip
    """A measured engine as a row of the table. Outputs are looked at of whole networks only."""
    counted = COUNTED_ON_GPU if device.on_gpu(setup.backend) else 200
    runs = int(np.clip(COUNTED_NS / timing.median_ns, 20, counted))
    rows = attribute(engine.nodes(runs), setup.network, tensor_names(model))
    executed = executed_precisions(rows, setup.network)
    deviation = None if role in PARTS else setup.expected.deviation(engine, allocation, base)
    if role != "alone":
        executed = told_apart(executed, rows, allocation, setup.network)
    if role in PARTS:
        executed = tuple(
            e if u.name in allocation else "" for e, u in zip(executed, setup.network.units, strict=True)
        )
    energy = timing.energy
    return Build(
        role=role,
        base=base,
        variants=tuple(str(allocation[u.name]) if u.name in allocation else "" for u in setup.network.units),
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
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        output_error=deviation.error if deviation else 0.0,
        wrong=deviation is not None and deviation.wrong,
        energy_j=energy.joules if energy else None,
        reference_energy_j=energy.reference_joules if energy else None,
        energy_error=energy.error if energy else None,
        singles_ns=timing.singles_ns,
        states=timing.states,
    )

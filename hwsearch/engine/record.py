"""What a built engine did: its times by unit, whether its outputs are right, what it did not execute as asked, its bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hwsearch.backends.base import Engine, qdq_form
from hwsearch.device import fingerprint as device
from hwsearch.device.spent import COMPARING, COUNTING
from hwsearch.device.timing import Timing
from hwsearch.engine.attribution import attribute, executed_precisions, without_fused_floats
from hwsearch.engine.outputs import reason
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.assemble import bytes_of_units
from hwsearch.lowering.marked import tensor_names
from hwsearch.network.network import Network
from hwsearch.network.variants import STORAGE, Variant, everywhere, weight_bytes
from hwsearch.table.build import PARTS, Build, Role
from hwsearch.table.table import LatencyTable

COUNTED_NS = 1e8
"""How long the pass with the runtime's counters on should last: they count in whole microseconds."""
COUNTED_ON_GPU = 30
"""Inferences of that pass on a GPU, at most: events tell half microseconds, and each inference is launched call by call."""


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
        variants = everywhere(network, variant, base)
        model = setup.lowering.onnx(variants, metadata=None, shared=False, **qdq_form(setup.backend))
        found = bytes_of_units(model, paths)
        for unit in network.units:
            chosen = variants[unit.name]
            beside = found.get(unit.name, 0) - weight_bytes(unit, chosen)
            own[unit.name][str(chosen)] = max(beside, own[unit.name].get(str(chosen), beside))
        units = sum(found.get(u.name, 0) for u in network.units)
        always = max(always, int(model.ByteSize()) - units - network.fixed_bytes)
    if setup.backend.quantize_outputs:
        _add_kept_float(network, model, own)
    return always, own


def _add_kept_float(network: Network, model: Any, bytes_of: Mapping[str, dict[str, int]]) -> None:
    """Add to each int8 unit what stands before the layers that read it where these are float (`rewrites.keep_float`)."""
    longest = max((len(name) for node in model.graph.node for name in (*node.input, *node.output)), default=0)
    for edge in network.edges:
        if edge.dst in bytes_of and edge.src in bytes_of:
            node = 3 * longest + len(edge.dst) + 64  # its names, and what protobuf puts around them
            for variant in bytes_of[edge.src]:
                if Variant.parse(variant).quantized:
                    bytes_of[edge.src][variant] += node


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
    setup: Setup, role: Role, allocation: Mapping[str, Variant], base: str, timing: Timing, engine: Engine, model: Any,
    build_s: float,
) -> Build:  # fmt: skip
    """A measured engine as a row of the table. Outputs are looked at of whole networks only."""
    counted = COUNTED_ON_GPU if device.on_gpu(setup.backend) else 200
    runs = int(np.clip(COUNTED_NS / timing.median_ns, 20, counted))
    with setup.spent.on(COUNTING):
        rows = attribute(engine.nodes(runs), setup.network, tensor_names(model))
    executed = executed_precisions(rows, setup.network)
    with setup.spent.on(COMPARING):
        deviation = None if role in PARTS else setup.expected.deviation(engine, allocation, base)
    if role != Role.ALONE:
        executed = without_fused_floats(executed, rows, allocation, setup.network)
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
        machine=setup.machine,
    )

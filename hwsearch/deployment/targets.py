"""Engines for GPUs that are not here: built by `tensorrt_rtx` on any machine, and which variants are legal on which GPU.

What is built is what NVIDIA's builder accepts for a target; it cannot run here, and TensorRT-RTX's kernels are not TensorRT's:
a legal network is no fast one.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from hwsearch.backends.tensorrt import legality, standalone
from hwsearch.backends.tensorrt.builder import BuildRequest, Built, serialise
from hwsearch.backends.tensorrt.builder import targets as targets_of
from hwsearch.backends.tensorrt.buildlog import FusedLayer, executed, fused_layers, sparsity
from hwsearch.backends.typed import strongly_typed
from hwsearch.deployment.deploy import lowering_of, metadata_of, parse_variants
from hwsearch.engine.outputs import MULTIPLE, ROUNDING, coarsest_float
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.files import write_bytes
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.network import Network, Unit
from hwsearch.network.variants import PRECISIONS, SPARSE_PRECISIONS, Variant, ineligible, legal
from hwsearch.progress import Progress

if TYPE_CHECKING:
    from hwsearch.allocate.allocation import Allocation
    from hwsearch.task import Task

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backends that leave a serialised engine, with their Python modules."""
NEWEST = legality.target("sm120")
CHOICES = (*map(Variant, PRECISIONS), *(Variant(p, "2:4") for p in SPARSE_PRECISIONS))
"""What a search may choose on some GPU."""


def runtime(backend: str) -> Any:
    """The module of a backend. Raises InvalidInput (none of that name) or BackendUnavailable (not installed)."""
    if backend not in MODULES:
        raise InvalidInput(
            f"no engine file comes from backend {backend!r}; expected one of {', '.join(MODULES)}"
        )
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise BackendUnavailable(
            f"{MODULES[backend]} cannot be imported ({error}); install it with: pip install 'hwsearch[{backend}]'"
        ) from error


def checked_targets(trt: Any, backend: str, names: Sequence[str]) -> list[str]:
    """Targets that a backend builds for, each once. Raises InvalidInput."""
    if not names:
        raise InvalidInput(f"no target given; expected some of {', '.join(legality.TARGETS)}")
    found = [legality.target(name).name for name in names]
    offered = targets_of(trt)
    if not offered:
        raise InvalidInput(
            f"{backend} builds for the GPU that it runs on only; leave the target out, or use --backend tensorrt-rtx"
        )
    for name in found:
        if name not in offered:
            raise InvalidInput(
                f"{backend} does not build for {legality.target(name)}; it builds for {', '.join(offered)}. "
                "TensorRT does, on such a GPU"
            )
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- one allocation


@dataclass(frozen=True)
class EngineFile:
    """A serialised engine on disk.

    executed: for each unit whose product the builder's log names, the precision that it was compiled to.
    not_as_asked: units that were compiled to another one than their variant asks for.
    """

    path: Path
    size_bytes: int
    backend: str
    target: str | None
    base: str
    executed: dict[str, str]
    not_as_asked: dict[str, str]
    layers: tuple[FusedLayer, ...] = field(repr=False, default=())
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def build(
    task: Task,
    allocation: Allocation,
    out: str | Path,
    *,
    target: str | None = None,
    backend: str = "tensorrt-rtx",
    base: str | None = None,
    weights: str | Path | None = None,
) -> EngineFile:
    """Write the serialised engine of an allocation, whichever backend it was searched on.

    Args:
        task: the task that was searched for.
        allocation: the answer of a search.
        out: file to write.
        target: `sm86` and the like, for `tensorrt-rtx`; None for `tensorrt`, which builds for the GPU of this machine
            (never tried: there was none).
        backend: `tensorrt-rtx` or `tensorrt`.
        base: base precision instead of the allocation's own; what was in that one then is in this.
        weights: as for `deploy`.

    Returns:
        The file, its size in bytes, and the precision that each unit was compiled to.

    Raises:
        InvalidInput: unknown target, backend or base precision.
        IncompatibleTables: the allocation is of another network.
        BackendUnavailable: the builder is not installed, or refuses the network, with NVIDIA's reason.
    """
    trt = runtime(backend)
    if target is None and targets_of(trt):
        raise InvalidInput(f"{backend} needs a target; it builds for {', '.join(targets_of(trt))}")
    if target is not None:
        (target,) = checked_targets(trt, backend, [target])
    old = str(allocation.options.get("base", "fp32"))
    base = _base(base or old)
    variants = {u: _rebased(v, old, base) for u, v in parse_variants(allocation).items()}
    low = lowering_of(task, allocation, weights)
    typed = strongly_typed(low.onnx(variants), base).SerializeToString()
    try:
        built = serialise(trt, request_of(typed, base, target, variants))
    except BackendUnavailable as error:
        reasons = objections(low.network, variants, base, target)
        told = f" (NVIDIA's documentation: {'; '.join(reasons)})" if reasons else ""
        raise BackendUnavailable(f"{error}{told}") from error
    path = Path(out)
    write_bytes(path, built.plan)
    layers = fused_layers(built.log)
    ran = executed(layers)
    return EngineFile(
        path,
        len(built.plan),
        backend,
        target,
        base,
        ran,
        otherwise(variants, ran, built.log, target),
        layers,
        built.seconds,
    )


def for_tensorrt(
    task: Task, allocation: Allocation, folder: str | Path, *, target: str, weights: str | Path | None = None
) -> Path:
    """Write an allocation for a machine with TensorRT and a GPU, where hwsearch need not be: a folder that is taken there.

    Leaves model.onnx (strongly typed), example.npz (inputs, and the outputs that they give) and run_tensorrt.py, which builds,
    checks and times it with TensorRT alone. target: the GPU, `sm89` and the like. weights: as for `deploy`. Returns the ONNX
    file. Raises InvalidInput (unknown target; a variant that TensorRT lacks there, with NVIDIA's documented reason),
    IncompatibleTables (of another network).
    """
    gpu = legality.target(target)
    base = _base(str(allocation.options.get("base", "fp32")))
    variants = parse_variants(allocation)
    low = lowering_of(task, allocation, weights)
    reasons = {u: _why_not(low.network[u], v, base, gpu, "tensorrt") for u, v in variants.items()}
    if bad := [f"{u} in {variants[u]}: {why}" for u, why in reasons.items() if why]:
        raise InvalidInput(f"TensorRT has not all of this on {gpu}: {'; '.join(bad)}; search for that GPU")
    model = strongly_typed(low.onnx(variants, metadata=metadata_of(allocation, base)), base)
    example, tolerance = _example(low, variants, base, model)
    settings = {
        "base": base, "sparse": any(v.kept is not None for v in variants.values()), "target": gpu.name,
        "tolerance": tolerance,
    }  # fmt: skip
    out = Path(folder)
    write_bytes(out / "model.onnx", model.SerializeToString())
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **cast("dict[str, Any]", example))
    write_bytes(out / "example.npz", buffer.getvalue())
    lines = Path(standalone.__file__).read_text().splitlines()
    script = [f"SETTINGS: dict[str, Any] = {settings!r}" if li.startswith("SETTINGS") else li for li in lines]
    write_bytes(out / "run_tensorrt.py", ("\n".join(script) + "\n").encode())
    return out / "model.onnx"


def _example(
    low: Lowering, variants: Mapping[str, Variant], base: str, model: Any
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """(arrays of inputs and of the simulated outputs, by name; relative error that each output may have)."""
    simulate = low.simulator(low.traced, low.traced.args, low.traced.kwargs, quantize_outputs=False)
    found, dense = (_tensors(y) for y in (simulate(variants), simulate.dense))
    names = [value.name for value in model.graph.output]
    arrays = {f"input:{v.name}": a for v, a in zip(model.graph.input, low.arrays(), strict=True)}
    arrays |= {f"output:{name}": y.numpy() for name, y in zip(names, found, strict=True)}
    rounding = ROUNDING[coarsest_float({base, *(v.precision for v in variants.values())})]
    tolerance = {}
    for name, y, plain in zip(names, found, dense, strict=True):
        changed = float((y.double() - plain.double()).norm() / max(float(y.double().norm()), 1e-30))
        tolerance[name] = rounding + MULTIPLE * changed
    return arrays, tolerance


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [t.detach() for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def _base(base: str) -> str:
    if base not in legality.BASES:
        raise InvalidInput(f"unknown base precision {base!r}; expected one of {', '.join(legality.BASES)}")
    return base


def _rebased(variant: Variant, old: str, new: str) -> Variant:
    return Variant(new) if variant == Variant(old) else variant


def request_of(onnx: bytes, base: str, target: str | None, variants: Mapping[str, Variant]) -> BuildRequest:
    tf32 = any(v.precision == "tf32" for v in variants.values())
    return BuildRequest(
        onnx, base, target, sparse=any(v.pattern != "dense" for v in variants.values()), tf32=tf32
    )


def otherwise(
    variants: Mapping[str, Variant], ran: Mapping[str, str], log: Sequence[str], target: str | None
) -> dict[str, str]:
    """Units that a builder's log says were compiled to something else than their variants ask for. `ran`: as `executed` tells."""
    found = sparsity(log)
    picked = found.picked_layers if found is not None else ()
    gpu = legality.target(target) if target is not None else None
    tf32 = gpu is None or gpu.capability >= legality.SINCE["tf32"]
    differing = {}
    for unit, v in variants.items():
        if unit not in ran:
            continue
        asked = "fp32" if v.precision == "tf32" else v.precision  # one type, by the flag of the builder
        if ran[unit] != asked:
            differing[unit] = f"asked {v}, compiled to {ran[unit]}"
        elif v.precision == "tf32" and not tf32:
            differing[unit] = f"asked {v}, compiled to fp32: {target} has no tf32"
        elif v.pattern != "dense" and not any(f"{unit}|" in layer for layer in picked):
            lacking = gpu and legality.why_not(
                v.precision, gpu, base=v.precision, pattern=v.pattern, runtime="tensorrt"
            )
            why = lacking or "the builder names no sparse kernel for it"
            differing[unit] = f"asked {v}, compiled to {ran[unit]}: {why}"
    return differing


def objections(network: Network, variants: Mapping[str, Variant], base: str, target: str | None) -> list[str]:
    """What speaks against an allocation on a target by the documentation, each reason once."""
    if target is None:
        return []
    reasons = [_why_not(network[u], v, base, legality.target(target)) for u, v in variants.items()]
    return list(dict.fromkeys(r for r in reasons if r))


def _why_not(
    unit: Unit, variant: Variant, base: str, gpu: legality.Target, backend: str = legality.RTX
) -> str:
    """By the graph alone: tf32 is fp32 in it, and zeros are weights, which any GPU computes as that (see `otherwise`)."""
    plain = {"tf32": "fp32"}
    return ineligible(unit, variant) or legality.why_not(
        plain.get(variant.precision, variant.precision), gpu, base=plain.get(base, base), op=unit.op,
        runtime=backend,
    )  # fmt: skip


# ---------------------------------------------------------------- every variant on several targets


@dataclass(frozen=True)
class Verdict:
    """Whether a network with some units in a variant, and the others in the base, was built for a target.

    units: those in the variant, all of the kinds in `ops`. reason: the builder's own, where it refused. documented: why not
    by NVIDIA's documentation; empty where it should build. executed, layers: as the builder's log tells.
    """

    target: str
    base: str
    variant: str
    units: tuple[str, ...]
    ops: tuple[str, ...]
    legal: bool
    reason: str
    documented: str
    executed: dict[str, str] = field(repr=False, default_factory=dict)
    not_as_asked: dict[str, str] = field(repr=False, default_factory=dict)
    layers: tuple[FusedLayer, ...] = field(repr=False, default=())

    @property
    def explained(self) -> bool:
        """Whether the builder did what the documentation says."""
        return self.legal == (not self.documented)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "explained": self.explained}


def check(
    task: Task,
    targets: Sequence[str],
    *,
    base: str = "fp16",
    backend: str = "tensorrt-rtx",
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Ask NVIDIA's builder, for each target and each variant that a search may choose, whether it takes the network.

    Each network has every unit that may have the variant in it, the others in the base; where only some kinds of units may,
    or the whole is refused, kinds are built apart. Nothing is timed.

    Args:
        task: the network to build.
        targets: GPU architectures, for instance `sm75` and `sm89`.
        base: precision of all that is not quantized: `fp16`, `bf16`, `fp32` or `tf32`.
        backend: `tensorrt-rtx`, or `tensorrt` for the GPU of this machine.
        batch: batch size; None for that of the example inputs.
        progress: where progress is shown; None shows none.

    Returns:
        A verdict for each target, variant and kind of units.

    Raises:
        InvalidInput: unknown target, backend or base precision.
        BackendUnavailable: the builder is not installed.
    """
    trt = runtime(backend)
    names = checked_targets(trt, backend, targets)
    return list(verdicts(trt, Lowering(task, batch), names, _base(base), backend=backend, progress=progress))


def units_offered(network: Network, base: str) -> dict[Variant, list[Unit]]:
    """Variants that a search may choose under a base, the base's own first, and the units that may have them on some GPU."""
    found: dict[Variant, list[Unit]] = {_plain(base): []}
    for unit in network.units:
        for variant in legal(unit, CHOICES):
            if not _why_not(unit, variant, base, NEWEST):
                found.setdefault(variant, []).append(unit)
    return {variant: units for variant, units in found.items() if units}


def verdicts(
    trt: Any, low: Lowering, targets: Sequence[str], base: str, *, backend: str = "tensorrt-rtx",
    progress: Progress | None = None,
) -> Iterator[Verdict]:  # fmt: skip
    """The verdicts of `check`, one after the other."""
    progress = progress or Progress.silent()
    choices = units_offered(low.network, base)
    progress.start(len(choices) * len(targets), "variant and target")
    for variant, units in choices.items():
        networks: dict[tuple[str, ...], bytes] = {}
        for target in targets:
            for group, documented in _groups(low.network, units, variant, base, target, backend):
                yield from _judge(trt, low, group, variant, base, target, documented, networks)
            progress.step(f"{variant} on {target}")
    progress.stop()


def _groups(
    network: Network, units: Sequence[Unit], variant: Variant, base: str, target: str, backend: str
) -> list[tuple[list[Unit], str]]:
    """Units of a variant in parts of which the documentation says the same, each with what it says of the whole network."""
    gpu, found = legality.target(target), dict[str, list[Unit]]()
    for unit in units:
        found.setdefault(_why_not(unit, variant, base, gpu, backend), []).append(unit)
    parts = []
    for reason, group in found.items():
        inside = {u.name for u in group}
        rest = [_why_not(u, _plain(base), base, gpu, backend) for u in network.units if u.name not in inside]
        others = next((f"of the other units: {r}" for r in rest if r), "")
        parts.append((group, reason or others))
    return parts


def _plain(base: str) -> Variant:
    """What a unit is in that nothing was asked for."""
    return Variant(base) if base in PRECISIONS else Variant("fp32")


def _judge(
    trt: Any, low: Lowering, group: Sequence[Unit], variant: Variant, base: str, target: str, documented: str,
    networks: dict[tuple[str, ...], bytes],
) -> Iterator[Verdict]:  # fmt: skip
    ops = tuple(dict.fromkeys(unit.op for unit in group))
    names = tuple(unit.name for unit in group)
    variants = {u.name: variant if u.name in names else _plain(base) for u in low.network.units}
    if names not in networks:
        networks[names] = strongly_typed(low.onnx(variants), base).SerializeToString()
    built: Built | None = None
    reason = ""
    try:
        built = serialise(trt, request_of(networks[names], base, target, variants))
    except BackendUnavailable as error:
        reason = str(error).partition(": ")[2] or str(error)
    if built is None and not documented and len(ops) > 1:  # which kind of unit is it?
        for op in ops:
            part = [unit for unit in group if unit.op == op]
            yield from _judge(trt, low, part, variant, base, target, documented, networks)
        return
    layers = fused_layers(built.log) if built is not None else ()
    ran = {u: p for u, p in executed(layers).items() if u in names}
    yield Verdict(
        target, base, str(variant), names, ops, built is not None, reason, documented, ran,
        otherwise(dict.fromkeys(names, variant), ran, built.log if built is not None else (), target), layers,
    )  # fmt: skip

"""Executed layers of a TensorRT engine: the engine inspector's record joined with the profiler's times.

A layer that skips zeros reads `2:4.fp16`: by the builder's log, which names what it picked, or by the kernel's name.

Sources: TensorRT's documentation of the engine inspector (engine-tools) and of `IProfiler`; its migration guide "IEngineInspector
Usage from TensorRT 10.x to 11.x" (one field `Format/Datatype` became two, `Bindings` became `I/O Tensors`); TensorRT Engine
Explorer (trex), whose example engines are NVIDIA's own recordings. `Metadata` is there since 10.0 and holds one
`[ONNX Layer: NAME]` for each ONNX node that a layer was made from, set apart by control characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hwsearch.backends.base import NodeTime
from hwsearch.backends.tensorrt.buildlog import PRODUCT
from hwsearch.errors import BackendUnavailable

LAYOUT = "Reformat"
"""The op of every layer that only moves or converts a tensor, whatever TensorRT calls it."""

_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")
_COPY = re.compile(r"^Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
_TACTIC = re.compile(r"_(tf32|bf16|f16|f32|i8|e4m3|e5m2)(?:f32|f16|bf16|i32)_(?:f32|f16|bf16|i32)(?:_|$)")
"""Of a kernel's name `..._AB_CX_E_...`: C is what is multiplied, X what is added up in, E what the epilogue computes in."""
_SPARSE_KERNEL = re.compile(r"_sparse_|_sptensor|_spgemm_")
"""As in `sm80_xmma_fprop_sparse_conv_..._sptensor16x8x32`, which users' engines name where the zeros of 2:4 weights are used."""
_COMPUTED = {
    "tf32": "tf32",
    "bf16": "bf16",
    "f16": "fp16",
    "f32": "fp32",
    "i8": "int8",
    "e4m3": "fp8",
    "e5m2": "fp8",
}
_TYPES = (
    ("nvfp4", ("FP4", "E2M1")),
    ("int4", ("INT4",)),
    ("fp8", ("FP8", "E4M3", "E5M2")),
    ("int8", ("INT8",)),
    ("bf16", ("BF16", "BFLOAT16")),
    ("fp16", ("FP16", "HALF", "FLOAT16")),
    ("fp32", ("FP32", "FLOAT", "FLOAT32")),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of an engine. reads, writes: names of its tensors. precision: what it computes in, empty if it is not told.

    sources: the ONNX nodes it was made from; of a layout change those of the layer that reads what it writes.
    """

    name: str
    op: str
    sources: tuple[str, ...]
    precision: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def layers_of(information: str) -> list[Layer]:
    """The layers in what `EngineInspector.get_engine_information(JSON)` returns, of TensorRT 8.6, 10.x or 11.x.

    An engine built without detailed verbosity names its layers only: sources are then read from the names, ops and
    precisions stay empty. Raises BackendUnavailable on anything else.
    """
    try:
        entries = json.loads(information)["Layers"]
        found = [_named(e) if isinstance(e, str) else _detailed(e) for e in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendUnavailable(
            f"the record of TensorRT's engine inspector is not of a known form ({type(error).__name__}: {error}): "
            f"{information[:120]!r}; report it with the output of `hwsearch devices`"
        ) from error
    return _with_readers(found)


def joined(layers: Sequence[Layer], times_ms: Mapping[str, float], runs: int) -> list[NodeTime]:
    """Every layer that the profiler reported, with the mean time of one inference; in the engine's order.

    times_ms: for each layer's name its milliseconds, added up over `runs` inferences. A layer that was made from several
    ONNX nodes keeps its one time: sharing it out is the latency model's work.
    Raises BackendUnavailable where the profiler reported nothing.
    """
    if not times_ms:
        raise BackendUnavailable(
            "TensorRT's profiler reported no layer: the engine was built with profiling verbosity NONE, or its profiler was "
            "never attached; build it again with hwsearch"
        )
    known = {layer.name: layer for layer in layers}
    ordered = [name for name in known if name in times_ms] + [name for name in times_ms if name not in known]
    nodes = []
    for name in ordered:
        layer = known.get(name) or _named(name)
        nodes.append(NodeTime(name, layer.op, layer.sources, layer.precision, times_ms[name] * 1e6 / runs))
    return nodes


def with_picked(layers: Sequence[Layer], picked: Sequence[str]) -> list[Layer]:
    """Layers that the builder's log names as run sparse have that in their precision: `2:4.fp16`.

    The log's names are those of the layers, or of the ONNX nodes that they were made from.
    """
    made_from = {source for name in picked for source in _named(name).sources if PRODUCT.search(source)}
    return [
        replace(layer, precision=_sparse(layer.precision))
        if layer.op != LAYOUT and (layer.name in picked or made_from & set(layer.sources))
        else layer
        for layer in layers
    ]


def _sparse(precision: str) -> str:
    """As `Variant.executed` writes what skipped zeros."""
    return precision if not precision or precision.startswith("2:4.") else f"2:4.{precision}"


def _detailed(entry: Mapping[str, Any]) -> Layer:
    name, kind = str(entry["Name"]), str(entry.get("LayerType", ""))
    moves = kind in (LAYOUT, "NoOp") or bool(_COPY.match(name))
    sources = tuple(dict.fromkeys(_ONNX_LAYER.findall(str(entry.get("Metadata", "")))))
    if moves and not _converts(entry):
        sources = ()  # its metadata, if any, is of the layer that it was put before or behind
    elif not sources:
        sources = _named(name).sources
    return Layer(
        name,
        LAYOUT if moves else kind,
        sources,
        _precision(entry, moves),
        tuple(str(t["Name"]) for t in entry.get("Inputs", ())),
        tuple(str(t["Name"]) for t in entry.get("Outputs", ())),
    )


def _converts(entry: Mapping[str, Any]) -> bool:
    """Whether a layout change stands for nodes of the ONNX graph: Q/DQ, casts, transposes and reshapes."""
    return not _COPY.match(str(entry["Name"])) and str(entry.get("Origin", "")) != "REFORMAT"


def _named(name: str) -> Layer:
    """A layer of which only the name is known: ONNX nodes joined by ` + ` and ` || `, pointwise ones in `PWN(...)`."""
    if _COPY.match(name):
        return Layer(name, LAYOUT, (), "")
    plain = name.replace("PWN(", "").replace("{ForeignNode[", "").replace("]}", "").replace("...", " + ")
    parts = (part.strip(" ()") for part in re.split(r" \+ | \|\| |, ", plain))
    return Layer(name, "", tuple(dict.fromkeys(p for p in parts if p)), "")


def _with_readers(layers: Sequence[Layer]) -> list[Layer]:
    """Layout changes given the sources of the first layer behind them that has any: they lie on the way into it."""
    readers: dict[str, Layer] = {}
    for layer in reversed(layers):
        readers.update((tensor, layer) for tensor in layer.reads)
    told = []
    for layer in layers:
        behind, seen = layer, {layer.name}
        while behind.op == LAYOUT and not behind.sources:
            following = [readers[t] for t in behind.writes if t in readers]
            if not following or following[0].name in seen:
                break
            behind = following[0]
            seen.add(behind.name)
        told.append(replace(layer, sources=behind.sources))
    return told


def _precision(entry: Mapping[str, Any], moves: bool) -> str:
    """What a layer computes in: by its kernel's name, else its weights, else its first input; of a layout change its output."""
    inputs = [_type_of(t) for t in entry.get("Inputs", ())]
    outputs = [_type_of(t) for t in entry.get("Outputs", ())]
    if moves:
        return next((p for p in outputs if p), "")
    tactic = str(entry.get("TacticName", ""))
    found = _TACTIC.search(tactic)
    weights = entry.get("Weights") or entry.get("ConvWeights")
    stored = _word(str(weights.get("Type", ""))) if isinstance(weights, Mapping) else ""
    constants = [_type_of(t) for t in entry.get("Constants", ()) if isinstance(t, Mapping)]
    narrow = next((p for p in (stored, *inputs, *constants) if p in ("int4", "nvfp4")), "")
    computed = _COMPUTED[found[1]] if found else ""
    # weights of four bits are stored so and unpacked inside the kernel, whose name tells what they are unpacked to
    told = narrow or computed or stored or next((p for p in (*inputs, *outputs) if p), "")
    return _sparse(told) if _SPARSE_KERNEL.search(tactic) else told


def _type_of(tensor: Mapping[str, Any]) -> str:
    """`Float`, `Row major linear FP32` or `Int8` under `Format/Datatype` (to 10.x), under `DataType` beside `Format` (11.x)."""
    # the first field there is decides: the `Format` of an int64 tensor says "Row major linear INT8 format"
    keys = ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format")
    return next((_word(str(tensor[key])) for key in keys if key in tensor), "")


def _word(text: str) -> str:
    words = set(re.findall(r"[A-Z0-9]+", text.upper()))
    return next((name for name, spellings in _TYPES if words & set(spellings)), "")

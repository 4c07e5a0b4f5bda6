"""Which unit or edge each executed node of an engine belongs to, and in which precision units ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hwsearch.backends.base import NodeTime
from hwsearch.backends.nodenames import unit_of
from hwsearch.network.network import STORED_OPS, Network
from hwsearch.network.variants import Variant
from hwsearch.table.build import NodeRow

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")
_LAYOUTS = ("Reformat",)
"""What is never a unit's work, whichever ONNX nodes it is said to be made for: TensorRT's changes of layout and type."""
_MOVES = ("Reorder", "Transpose", "Reshape", "Convert", "Const", "Quantize", "Dequantize", *_LAYOUTS)
_GENERATED = ("kgen",)
"""Kernels that TensorRT writes itself: elementwise work, and attention, fused with parts of what stands beside it."""
_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FullyConnected", "QLinearConv", "QGemm",
             "QLinearMatMul", "Deconvolution", "NhwcFusedConv", "CaskConv", "CaskDeconv", "CaskGemm", "MatrixMultiply", "gemm",
             "correlation")  # fmt: skip


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
        if node.op.startswith(_LAYOUTS):
            working = []
        elif not working and node.op.startswith(_PRODUCTS):
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
    return _placed(rows, network)


def _placed(rows: Sequence[NodeRow], network: Network) -> tuple[NodeRow, ...]:
    """Products that no source names as the work of layers that no product names, where their place leaves one choice.

    OpenVINO calls some products after a constant that it made (`Multiply_7169`). Nodes stand in the order of execution: a layer
    runs after all that it reads, and before all that reads it. Of several layers for as many products in a row, in their order.
    """
    where: dict[str, int] = {}
    for i, row in enumerate(rows):
        if row.kind == "unit" and not _moves(row.op):
            for unit in row.units:
                where.setdefault(unit, i)
    layers = [u.name for u in network.units if u.name not in where and u.op not in STORED_OPS]
    nameless = [
        i for i, r in enumerate(rows) if r.kind == "rest" and not r.units and r.op.startswith(_PRODUCTS)
    ]
    if not layers or not nameless:
        return tuple(rows)
    before, after = _reached(network, backwards=True), _reached(network, backwards=False)
    fits = {
        i: frozenset(
            layer
            for layer in layers
            if all(where.get(u, -1) < i for u in before[layer])
            and all(where.get(u, len(rows)) > i for u in after[layer])
        )
        for i in nameless
    }
    new = list(rows)
    for fitting in dict.fromkeys(fits.values()):
        places = [i for i in nameless if fits[i] == fitting]
        others = [i for i in nameless if i not in places and fits[i] & fitting]
        if len(places) == len(fitting) and not others:
            for i, layer in zip(places, (u for u in layers if u in fitting), strict=True):
                new[i] = replace(rows[i], kind="unit", units=(layer,))
    return tuple(new)


def _reached(network: Network, *, backwards: bool) -> dict[str, set[str]]:
    """For each unit the units before it (or after it) along the tensors that flow between them."""
    nearest: dict[str, set[str]] = {u.name: set() for u in network.units}
    for edge in network.edges:
        start, end = (edge.dst, edge.src) if backwards else (edge.src, edge.dst)
        if start in nearest and end in nearest:
            nearest[start].add(end)
    found: dict[str, set[str]] = {}
    for name in nearest:
        reached, todo = set[str](), list(nearest[name])
        while todo:
            unit = todo.pop()
            if unit not in reached:
                reached.add(unit)
                todo += nearest[unit]
        found[name] = reached
    return found


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
    """For each unit the precision of the longest node that does its work; empty where no node names it.

    A generated kernel before or behind a product, which rescales or pads, is asked only where there is no other.
    """
    longest: dict[str, tuple[tuple[int, float], str]] = {}
    for row in rows:
        if row.kind == "unit":
            weight = 0 if _moves(row.op) else 1 if row.op in _GENERATED else 2
            for unit in row.units:
                rank = weight, row.time_ns if weight else 0.0
                if unit not in longest or rank > longest[unit][0]:
                    longest[unit] = rank, row.precision
    return tuple(longest[u.name][1] if u.name in longest else "" for u in network.units)


def without_fused_floats(
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
        if not allocation[unit].runs_as(row.precision)
        and not allocation[unit].quantized
        and any(allocation[other].executed == row.precision for other in row.units)
    }
    return tuple("" if u.name in mixed else e for u, e in zip(network.units, executed, strict=True))

"""What a quantized ONNX graph means, by ONNX's reference evaluator, and whether an engine computes that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]

OWN_NORM, OWN_PEAK = 0.65, 2.1
"""An engine may be off by so much of what quantization itself changes: by the norm of an output, and by its largest error.

The norm stays far below where an engine rounds as it should. What it loses is a tie that falls to the other side: there the value
is a whole step off, where quantization changes half a step. Sums of two values on one grid, quantized by twice its step, are full
of ties (0.62 by the norm was seen).
"""
ROUGH_NORM = 1.0
"""The same for a graph in which a runtime is known to compute something in 8 bits itself (`rough`)."""
LEAST = 1e-4
"""Rounding errors of fp32, relative to the size of an output."""
FLOOR = 1e-6
"""The same, absolute: of an output that should be zero, out of numbers of about one."""


@dataclass(frozen=True)
class Off:
    """The worst output of an engine: its error over what quantization changes, by the norm and by the largest error."""

    norm: float
    peak: float
    relative: float
    """The error's norm over the output's."""

    @property
    def wrong(self) -> bool:
        return self.beyond(OWN_NORM)

    def beyond(self, norm: float) -> bool:
        return not (self.norm <= norm and self.peak <= OWN_PEAK)


class Meaning:
    """What a graph with Q/DQ computes for one input, and what it would without Q/DQ of activations."""

    def __init__(self, model: onnx.ModelProto, feed: Mapping[str, Array]) -> None:
        self.model, self.feed = model, dict(feed)

    @cached_property
    def outputs(self) -> list[Array]:
        """By ONNX's reference evaluator."""
        return evaluate(self.model, self.feed)

    @cached_property
    def unoptimized(self) -> list[Array]:
        """By ONNX Runtime, operator by operator: a second opinion where an engine and the evaluator differ."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, self.feed))

    @cached_property
    def unquantized(self) -> list[Array]:
        return evaluate(without_rounding(self.model), self.feed)

    def off(self, found: Sequence[Array]) -> Off:
        return _off(found, self.outputs, self.unquantized)

    @property
    def agreed(self) -> bool:
        """Whether ONNX Runtime's plain operators say the same as the evaluator."""
        return not _off(self.unoptimized, self.outputs, self.unquantized).wrong


def _off(found: Sequence[Array], wanted: Sequence[Array], unquantized: Sequence[Array]) -> Off:
    if len(found) != len(wanted) or any(f.shape != w.shape for f, w in zip(found, wanted, strict=True)):
        return Off(np.inf, np.inf, np.inf)
    worst = [0.0, 0.0, 0.0]
    for have, want, free in zip(found, wanted, unquantized, strict=True):
        error, own = have.astype(np.float64) - want, want.astype(np.float64) - free
        size = float(np.linalg.norm(want))
        least = LEAST * size + FLOOR * max(want.size, 1) ** 0.5
        peak = LEAST * float(np.abs(want).max(initial=0.0)) + FLOOR
        own_norm, own_peak = float(np.linalg.norm(own)), float(np.abs(own).max(initial=0.0))
        of = [
            float(np.linalg.norm(error)) / max(own_norm, least),
            float(np.abs(error).max(initial=0.0)) / max(own_peak, peak),
            float(np.linalg.norm(error)) / max(size, least),
        ]
        worst = [max(a, b) if np.isfinite(b) else np.inf for a, b in zip(worst, of, strict=True)]
    return Off(*worst)


def rough(model: onnx.ModelProto, runtime: str) -> str:
    """Why a runtime rounds more than a graph says, where that is known; else empty."""
    makers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "Softmax" and runtime == "onnxruntime" else None
        if before is not None and before.op_type == "DequantizeLinear":
            after = [n.op_type for n in model.graph.node if node.output[0] in n.input]
            if after == ["QuantizeLinear"]:
                return "a Softmax between Q/DQ: ONNX Runtime computes it in 8 bits (QLinearSoftmax)"
    return ""


def evaluate(model: onnx.ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    """By onnx.reference, which has Q/DQ from opset 19 on: what it computes is the same in 18."""
    later = onnx.ModelProto()
    later.CopyFrom(model)
    for opset in later.opset_import:
        if opset.domain == "" and opset.version < 19:
            opset.version = 19
    return list(ReferenceEvaluator(later).run(None, dict(feed)))


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with Q/DQ of activations taken out; dequantized constants stay as they are."""
    new = onnx.ModelProto()
    new.CopyFrom(model)
    stored = {t.name for t in new.graph.initializer}
    for node in new.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in stored:
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]
    return new


def with_levels(model: onnx.ModelProto, levels: int) -> onnx.ModelProto:
    """The graph with int8 weights of at most so many levels, rounded anew, and so the second activation of a product.

    A CPU without a dot product sums pairs of u8 x s8 in 16 bits; with 63 levels none can overflow.
    """
    new = onnx.ModelProto()
    new.CopyFrom(model)
    stored = {t.name: t for t in new.graph.initializer}
    makers = {o: n for n in new.graph.node for o in n.output}
    scales: set[str] = set()
    for node in new.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            values = numpy_helper.to_array(stored[node.input[0]])
            if values.dtype == np.int8 and np.abs(values.astype(int)).max(initial=0) > levels:
                rounded = np.round(values * (levels / 127)).clip(-levels, levels).astype(np.int8)
                stored[node.input[0]].CopyFrom(numpy_helper.from_array(rounded, node.input[0]))
                scales.add(node.input[1])
        if node.op_type == "MatMul":
            second = makers.get(node.input[1])
            if second is not None and second.op_type == "DequantizeLinear" and second.input[0] not in stored:
                scales.add(second.input[1])
    for name in scales:
        wider = (numpy_helper.to_array(stored[name]) * (127 / levels)).astype(np.float32)
        stored[name].CopyFrom(numpy_helper.from_array(np.asarray(wider), name))
    _biases_on_grid(new, makers, stored)
    return new


def _biases_on_grid(
    model: onnx.ModelProto, makers: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> None:
    """Biases as multiples of their products' steps, as ONNX Runtime rounds them."""
    added = {name: n for n in model.graph.node if n.op_type == "Add" for name in n.input}
    for node in model.graph.node:
        made = [makers.get(name) for name in node.input[:2]]
        if len(made) < 2 or any(m is None or m.op_type != "DequantizeLinear" for m in made):
            continue
        names = list(node.input[2:])
        if node.op_type == "MatMul" and node.output[0] in added:
            names = list(added[node.output[0]].input)
        scales = [numpy_helper.to_array(stored[m.input[1]]) for m in made if m is not None]
        step = np.asarray(scales[0] * scales[1], np.float32)
        for name in names:
            bias = numpy_helper.to_array(stored[name]) if name in stored else None
            if bias is not None and (step.ndim == 0 or step.shape == bias.shape[-1:]):
                rounded = (np.round(bias / step) * step).astype(np.float32)
                stored[name].CopyFrom(numpy_helper.from_array(rounded, name))

"""A marked ONNX network + an allocation -> the deployable one, with Q/DQ where a unit is int8.

The Q/DQ form is the one that OpenVINO, ONNX Runtime and TensorRT all take: symmetric (zero point 0), int8, weights per
output channel, activations per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from hwsearch.compress.quantize import QuantizedWeight, Ranges
from hwsearch.marking import DOMAIN, MARK, tag_of
from hwsearch.typed import TYPES, float_units
from hwsearch.variants import Variant


def assemble(
    marked: onnx.ModelProto,
    variants: Mapping[str, Variant],
    weights: Mapping[str, QuantizedWeight],
    ranges: Ranges,
    *,
    quantize_outputs: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The network with each unit in its variant.

    weights: quantized weights of the int8 units that have one. ranges: activation ranges of the int8 units.
    quantize_outputs: also quantize what an int8 unit returns, for runtimes which execute in int8 only then.
    """
    builder = _Builder(marked, quantize_outputs)
    for node in marked.graph.node:
        if node.op_type != MARK:
            builder.copy(node)
            continue
        role, unit, call, port = tag_of(node)
        variant = variants[unit]
        if role == "weight" and variant.quantized:
            builder.weight(
                node,
                unit,
                _Stored(variant.precision, weights[unit].values, weights[unit].scales, weights[unit].axis),
            )
        elif role == "weight" and node.input[0] in builder.initializers:
            values = numpy_helper.to_array(builder.initializers[node.input[0]])
            builder.weight(node, unit, _Stored(variant.precision, values))
        elif not variant.quantized or (role == "out" and not quantize_outputs):
            builder.alias(node)
        else:
            key = (unit, call, "out" if role == "out" else f"in{port}")
            builder.activation(node, unit, call, ranges[key], own=role == "in")
    told = {tag_of(n)[1] for n in marked.graph.node if n.op_type == MARK and tag_of(n)[0] == "weight"}
    units = {tag_of(n)[1]: variants[tag_of(n)[1]].precision for n in marked.graph.node if n.op_type == MARK}
    untold = {u: p for u, p in units.items() if p in TYPES and (p == "fp32" or u not in told)}
    return builder.finish({**float_units(untold), **(metadata or {})})


class _Builder:
    """Copies nodes in order, replacing markers; constants of weights are stored at the variant's precision."""

    def __init__(self, marked: onnx.ModelProto, quantize_outputs: bool) -> None:
        self.marked = marked
        self.quantize_outputs = quantize_outputs
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.initializers = {t.name: t for t in marked.graph.initializer}
        self.pending: dict[str, tuple[str, _Stored]] = {}
        self.stored: set[str] = set()
        self.names = {n.name for n in marked.graph.node}
        self.first: dict[Any, str] = {}
        self.dequantized: dict[tuple[str, float], str] = {}

    def copy(self, node: onnx.NodeProto) -> None:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.metadata_props[:]
        inputs = [self.renamed.get(name, name) for name in node.input]
        if node.op_type == "Transpose" and inputs[0] in self.pending:
            unit, stored = self.pending[inputs[0]]
            perm = list(helper.get_node_attr_value(node, "perm"))
            self._pend((inputs[0], *perm), node.output[0], unit, stored.transposed(perm))
            return
        for i, name in enumerate(inputs):
            if name in self.pending:
                self._store(name)
            new.input[i] = name
        self.nodes.append(new)

    def alias(self, node: onnx.NodeProto) -> None:
        source = self.renamed.get(node.input[0], node.input[0])
        self.renamed[node.output[0]] = source

    def weight(self, node: onnx.NodeProto, unit: str, stored: _Stored) -> None:
        self._pend((unit, stored.values.shape), node.output[0], unit, stored)

    def _pend(self, what: Any, name: str, unit: str, stored: _Stored) -> None:
        """A weight that is stored once something reads it; the calls of one unit read one constant."""
        first = self.first.setdefault(what, name)
        if first == name:
            self.pending[name] = unit, stored
        else:
            self.renamed[name] = first

    def _store(self, name: str) -> None:
        """Emit the constant and its conversion to fp32 once, under `name`."""
        if name in self.stored:
            return
        self.stored.add(name)
        unit, stored = self.pending[name]
        if stored.precision == "fp32":
            self._constant(name, stored.values)
        elif stored.scales is None:
            kind = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}[stored.precision]
            self.initializers[f"{name}/{stored.precision}"] = _half(
                f"{name}/{stored.precision}", stored.values, kind
            )
            self._add(
                "Cast",
                [f"{name}/{stored.precision}"],
                name,
                self._unique(f"{unit}|0|Cast.weight"),
                to=TensorProto.FLOAT,
            )
        else:
            values = self._constant(f"{name}/int8", stored.values)
            scale = self._constant(f"{name}/scale", stored.scales)
            zero = self._constant(f"{name}/zero", np.zeros(stored.scales.shape, np.int8))
            own = self._unique(f"{unit}|0|DequantizeLinear.weight")
            self._add("DequantizeLinear", [values, scale, zero], name, own, axis=stored.axis)

    def activation(self, node: onnx.NodeProto, unit: str, call: int, limit: float, *, own: bool) -> None:
        """Quantize and dequantize; two units which read one tensor on one scale share it.

        Not where outputs are quantized too: ONNX Runtime keeps a Q/DQ with two consumers signed, and has no fast
        kernel for that.
        """
        source = self.renamed.get(node.input[0], node.input[0])
        if self.quantize_outputs or (source, limit) not in self.dequantized:
            role = "in" if own else "out"
            base, port = f"{'' if own else '~'}{unit}|{call}", tag_of(node)[3]
            scale = self._constant(f"{node.output[0]}/scale", np.asarray(limit / 127.0, np.float32))
            zero = self._constant(f"{node.output[0]}/zero", np.asarray(0, np.int8))
            quantized, output = f"{node.output[0]}/int8", f"{node.output[0]}/dq"
            self._add(
                "QuantizeLinear",
                [source, scale, zero],
                quantized,
                self._unique(f"{base}|QuantizeLinear.{role}{port}"),
            )
            self._add(
                "DequantizeLinear",
                [quantized, scale, zero],
                output,
                self._unique(f"{base}|DequantizeLinear.{role}{port}"),
            )
            self.dequantized[source, limit] = output
        self.renamed[node.output[0]] = self.dequantized[source, limit]

    def _unique(self, base: str) -> str:
        name, count = base, 1
        while name in self.names:
            name, count = f"{base}.{count}", count + 1
        self.names.add(name)
        return name

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        # a scale of shape [1] means one channel, and TensorRT then runs no convolution in int8: scalars stay scalars
        self.initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def _add(self, op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))

    def finish(self, metadata: dict[str, str]) -> onnx.ModelProto:
        old = self.marked.graph
        self._name_outputs()
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            old.name,
            list(old.input),
            list(old.output),
            [t for name, t in self.initializers.items() if name in used],
        )
        model = helper.make_model(
            graph,
            opset_imports=[o for o in self.marked.opset_import if o.domain != DOMAIN],
            producer_name="hwsearch",
        )
        model.ir_version = self.marked.ir_version
        helper.set_model_props(model, metadata)
        return model

    def _name_outputs(self) -> None:
        """Give the tensors that removed markers stood for the outputs' own names."""
        outputs = [v.name for v in self.marked.graph.output]
        made = {output for n in self.nodes for output in n.output}
        rename: dict[str, str] = {}
        for name in outputs:
            source = self.renamed.get(name, name)
            if source == name:
                continue
            if source not in made or source in outputs or source in rename:
                self._add("Identity", [source], name, self._unique(f"~|0|Identity.{name}"))
            else:
                rename[source] = name
        for node in self.nodes if rename else ():
            for field in (node.input, node.output):
                for i, tensor in enumerate(field):
                    if tensor in rename:
                        field[i] = rename[tensor]


@dataclass(frozen=True)
class _Stored:
    precision: str
    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None = None
    axis: int = 0

    def transposed(self, perm: list[int]) -> _Stored:
        return _Stored(self.precision, self.values.transpose(perm), self.scales, perm.index(self.axis))


def _half(name: str, values: np.ndarray[Any, Any], kind: int) -> onnx.TensorProto:
    tensor = torch.from_numpy(np.array(values))  # a copy: arrays of ONNX tensors are read-only
    if kind == TensorProto.BFLOAT16:
        raw = tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    else:
        raw = tensor.to(torch.float16).numpy().tobytes()
    return helper.make_tensor(name, kind, list(values.shape), raw, raw=True)

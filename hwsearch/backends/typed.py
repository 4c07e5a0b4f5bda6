"""An assembled ONNX network -> the strongly typed one that TensorRT 10 and 11 build: every type in it is a type computed in.

What `assemble` writes runs anywhere: all arithmetic in fp32, weights of half precisions stored small with a Cast. Here
the arithmetic itself is in the base precision, weights, biases and scales of Q/DQ are in the type that reads them, and every
conversion is a Cast with a name that leads back to its unit. Inputs and outputs of the network stay as they were.

Source: TensorRT's documentation of strongly typed networks; the operators' types are those of the ONNX schemas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from hwsearch.backends.nodenames import call_of, unique, unit_of
from hwsearch.errors import BackendUnavailable

TYPES: dict[str, int] = {
    "fp32": TensorProto.FLOAT,
    "tf32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
"""What arithmetic of a precision is stored in; tf32 is fp32 with another flag of the builder."""
PRECISIONS = "hwsearch.float_units"
"""Metadata key: the units of each float precision, for those whose weights do not tell (see `assemble`)."""

_FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_SHORT: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
_FP16_TOP = 65504.0
_FP16_NORMAL, _FP16_LEAST = 2.0**-14, 2.0**-24
_WIDE = frozenset(
    "Pow ReduceSum ReduceSumSquare ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd CumSum Exp".split()
)
"""Squares, sums and exponentials: they leave the range of fp16 and stay in fp32 in an fp16 network."""
_OPSET_HALF_SCALES, _OPSET_BF16 = 19, 22
_CHANGED = {"GroupNormalization": 21, "DFT": 20}
"""Operators whose meaning changed after opset 18, and since when."""
_MADE_BY = {
    "Constant": "value",
    "ConstantOfShape": "value",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
}
"""Operators that make the type that an attribute says, and fp32 without it."""
_CONTROL = frozenset(("If", "Loop", "Scan"))


def strongly_typed(model: onnx.ModelProto, base: str) -> onnx.ModelProto:
    """The network with every tensor in the type that it is computed in: `base` but for units of another float precision.

    Raises BackendUnavailable where it holds control flow, or an operator whose meaning a newer opset changed.
    """
    return _Typer(model, base).run()


def unit_precisions(model: onnx.ModelProto) -> dict[str, str]:
    """The float precision of units that are not in the base: by the metadata, else by how weights are stored."""
    found: dict[str, str] = {}
    stored = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        kind = stored.get(node.input[0]) if node.op_type == "Cast" else None
        if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            found[unit_of(node.name)[0]] = _SHORT[kind]
    told = {p.key: p.value for p in model.metadata_props}.get(PRECISIONS, "{}")
    for precision, units in json.loads(told).items():
        found |= dict.fromkeys(units, precision)
    return found


class _Typer:
    def __init__(self, model: onnx.ModelProto, base: str) -> None:
        self.model, self.base = model, TYPES[base]
        self.units = {u: TYPES[p] for u, p in unit_precisions(model).items()}
        self.opset = _opset(model, {self.base, *self.units.values()})
        self.constants = {t.name: t for t in model.graph.initializer}
        self.was = _types(model)
        self.outputs = {v.name for v in model.graph.output}
        self.now = {v.name: self.was[v.name] for v in model.graph.input}
        self.now |= {t.name: t.data_type for t in model.graph.initializer}
        self.alias: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.names = {n.name for n in model.graph.node}
        self.made: dict[tuple[str, int], str] = {}
        self.makers: dict[str, onnx.NodeProto] = {}

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            if not self._weight_cast(node):
                self._node(node)
        self._cast_outputs()
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input}
        made = helper.make_graph(
            self.nodes,
            graph.name,
            list(graph.input),
            list(graph.output),
            [t for name, t in self.constants.items() if name in used],
        )
        others = [o for o in self.model.opset_import if o.domain]
        new = helper.make_model(
            made, opset_imports=[helper.make_opsetid("", self.opset), *others], producer_name="hwsearch"
        )
        new.ir_version = max(self.model.ir_version, 10)
        helper.set_model_props(new, {p.key: p.value for p in self.model.metadata_props})
        return new

    def _weight_cast(self, node: onnx.NodeProto) -> bool:
        """Whether a node is the Cast of a stored half weight, which is read as it is from now on."""
        if node.op_type != "Cast" or node.input[0] not in self.constants or node.output[0] in self.outputs:
            return False
        if self.now[node.input[0]] not in _FLOATS or self.was.get(node.output[0]) != TensorProto.FLOAT:
            return False
        self.alias[node.output[0]] = node.input[0]
        return True

    def _node(self, node: onnx.NodeProto) -> None:
        kind, schema = self._kind(node), self._schema(node)
        new = onnx.NodeProto()
        new.CopyFrom(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
            self._rounded_anew(new, kind)
        for index, name in enumerate(new.input):
            if self.was.get(name, self.now.get(name)) == TensorProto.FLOAT:
                allowed = _allowed(schema.inputs, index) if schema else {_FLOATS[kind]}
                wanted = kind if _FLOATS[kind] in allowed else TensorProto.FLOAT
                new.input[index] = self._read(name, wanted, new, index)
            else:
                new.input[index] = self.alias.get(name, name)
        _retype(new, kind)
        for index, name in enumerate(node.output):
            own = self.was.get(name)
            if own == TensorProto.FLOAT:
                allowed = _allowed(schema.outputs, index) if schema else {_FLOATS[kind]}
                own = kind if _FLOATS[kind] in allowed else TensorProto.FLOAT
                if own != TensorProto.FLOAT and name in self.outputs:
                    new.output[index] = self.alias[name] = self._tensor(f"{name}/{_SHORT[own]}")
            if own is not None:
                self.now[new.output[index]] = own
            self.makers[new.output[index]] = new
        self.nodes.append(new)

    def _kind(self, node: onnx.NodeProto) -> int:
        """The type that a node computes in."""
        unit, own = unit_of(node.name)
        kind = self.units.get(unit, self.base) if own else self.base
        if kind == TensorProto.FLOAT16 and node.op_type in _WIDE:
            return int(TensorProto.FLOAT)
        told = _MADE_BY.get(node.op_type)
        if told is not None and all(a.name != told for a in node.attribute):
            return int(TensorProto.FLOAT)
        schema = self._schema(node)
        if schema is not None:
            reads = [
                _allowed(schema.inputs, i)
                for i, name in enumerate(node.input)
                if self.was.get(name, self.now.get(name)) == TensorProto.FLOAT
            ]
            if any(_FLOATS[kind] not in types for types in reads if types != {"float"}):
                return int(TensorProto.FLOAT)
            if reads and all(types == {"float"} for types in reads):
                return int(TensorProto.FLOAT)
        return int(kind)

    def _schema(self, node: onnx.NodeProto) -> Any:
        """The operator's schema; None outside of ONNX's own domain."""
        if node.domain not in ("", "ai.onnx"):
            return None
        return defs.get_schema(node.op_type, self.opset, "")

    def _read(self, name: str, kind: int, reader: onnx.NodeProto, index: int) -> str:
        """The tensor in a type: itself, a constant stored so, or what a Cast makes of it."""
        name = self.alias.get(name, name)
        if self.now[name] == kind:
            return name
        key = name, kind
        if key not in self.made:
            if name in self.constants:
                scale = reader.op_type in ("QuantizeLinear", "DequantizeLinear") and index == 1
                made = self._constant(name, _converted(self.constants[name], kind, scale=scale))
            else:
                made = self._tensor(f"{name}/{_SHORT[kind]}")
                self._cast(name, made, kind, self._cast_name(name, reader, index))
            self.made[key], self.now[made] = made, kind
        return self.made[key]

    def _cast_name(self, tensor: str, reader: onnx.NodeProto, index: int) -> str:
        """A conversion belongs to the unit that wants another type than the base, else to whoever reads it."""
        maker = self.makers.get(tensor)
        made_by, own = unit_of(maker.name) if maker is not None else ("", False)
        reads, reads_own = unit_of(reader.name)
        if own and maker is not None and not reads_own and self.units.get(made_by, self.base) != self.base:
            return f"{made_by}|{call_of(maker.name)}|Cast.out"
        return f"{'' if reads_own else '~'}{reads}|{call_of(reader.name)}|Cast.in{index}"

    def _cast(self, source: str, target: str, kind: int, name: str) -> None:
        self.nodes.append(
            helper.make_node("Cast", [source], [target], name=unique(name, self.names), to=kind)
        )
        self.makers[target] = self.nodes[-1]

    def _cast_outputs(self) -> None:
        for value in self.model.graph.output:
            source = self.alias.get(value.name)
            if source is not None:
                unit, _ = unit_of(self.makers[source].name)
                call = call_of(self.makers[source].name)
                self._cast(source, value.name, TensorProto.FLOAT, f"~{unit}|{call}|Cast.out")

    def _rounded_anew(self, node: onnx.NodeProto, kind: int) -> None:
        """int8 weights for scales as fp16 holds them, where those are below its normal range and hence coarse."""
        values, scales = self.constants[node.input[0]], self.constants.get(node.input[1])
        if kind != TensorProto.FLOAT16 or values.data_type != TensorProto.INT8 or scales is None:
            return
        old = numpy_helper.to_array(scales).astype(np.float32)
        if old.ndim != 1 or not ((old > 0) & (old < _FP16_NORMAL)).any():
            return
        new = _up_to_fp16(old)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        integers = numpy_helper.to_array(values)
        shape = [-1 if d == axis % integers.ndim else 1 for d in range(integers.ndim)]
        again = np.clip(np.round(integers * (old / new).reshape(shape)), -127, 127).astype(np.int8)
        node.input[0] = self._constant(node.input[0], numpy_helper.from_array(again))
        node.input[1] = self._constant(node.input[1], numpy_helper.from_array(new))
        self.now[node.input[0]], self.now[node.input[1]] = TensorProto.INT8, TensorProto.FLOAT

    def _constant(self, like: str, tensor: onnx.TensorProto) -> str:
        tensor.name = self._tensor(f"{like}/{_SHORT.get(tensor.data_type, 'again')}")
        self.constants[tensor.name] = tensor
        return str(tensor.name)

    def _tensor(self, base: str) -> str:
        name, count = base, 1
        while name in self.now or name in self.was:
            name, count = f"{base}.{count}", count + 1
        return name


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every input and of every tensor that a node makes."""
    known = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False).graph
    values = [*known.input, *known.value_info, *known.output]
    return {v.name: v.type.tensor_type.elem_type for v in values if v.type.tensor_type.elem_type}


def _opset(model: onnx.ModelProto, kinds: set[int]) -> int:
    """The least opset, from the model's own on, whose operators take these types."""
    own = next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))
    least: dict[int, int] = {TensorProto.FLOAT16: _OPSET_HALF_SCALES, TensorProto.BFLOAT16: _OPSET_BF16}
    wanted = max([own, *(least.get(k, own) for k in kinds)])
    for node in model.graph.node:
        if node.op_type in _CONTROL:
            raise BackendUnavailable(
                f"node {node.name} is {node.op_type}: control flow has no strongly typed form here; use another backend, "
                "or make the model take one path"
            )
        if own < _CHANGED.get(node.op_type, 0) <= wanted:
            raise BackendUnavailable(
                f"node {node.name} is {node.op_type} of opset {own}, which means something else in opset {wanted}; "
                "use base fp32, or another backend"
            )
    return wanted


def _allowed(parameters: Any, index: int) -> set[str]:
    """Float types that an input or output of an operator may have; the last parameter may stand for all that follow."""
    types = parameters[min(index, len(parameters) - 1)].types
    return {t.removeprefix("tensor(").removesuffix(")") for t in types} & set(_FLOATS.values())


def _retype(node: onnx.NodeProto, kind: int) -> None:
    """Attributes that say which type a node makes."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        elif (
            attribute.name == "value"
            and attribute.t.data_type == TensorProto.FLOAT
            and attribute.HasField("t")
        ):
            attribute.t.CopyFrom(_converted(attribute.t, kind))
    if node.op_type == "GridSample":
        renamed = {b"bilinear": b"linear", b"bicubic": b"cubic"}
        for attribute in node.attribute:
            if attribute.name == "mode":
                attribute.s = renamed.get(attribute.s, attribute.s)


def _converted(tensor: onnx.TensorProto, kind: int, *, scale: bool = False) -> onnx.TensorProto:
    """A constant in another float type, at most the largest number of fp16; a scale or a single number never becomes 0."""
    values = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
    if kind == TensorProto.FLOAT16:
        values = np.where(np.isinf(values), values, np.clip(values, -_FP16_TOP, _FP16_TOP))
        if scale or values.size == 1:
            values = np.where(
                (values != 0) & (np.abs(values) < _FP16_LEAST), np.copysign(_FP16_LEAST, values), values
            )
        raw = values.astype(np.float16).tobytes()
    elif kind == TensorProto.BFLOAT16:
        raw = _bf16(values).tobytes()
    else:
        raw = values.astype(np.float32).tobytes()
    return helper.make_tensor(tensor.name, kind, list(tensor.dims), raw, raw=True)


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The upper halves of fp32 numbers rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def _up_to_fp16(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scales that fp16 holds exactly, none smaller than it was where it is below the normal range."""
    steps = np.ceil(scales.astype(np.float64) / _FP16_LEAST) * _FP16_LEAST
    return np.where(scales < _FP16_NORMAL, steps, scales.astype(np.float16)).astype(np.float32)


def float_units(precisions: Mapping[str, str]) -> dict[str, str]:
    """The metadata from which `strongly_typed` knows the float precision of each unit named."""
    kinds = sorted(set(precisions.values()))
    lists = {kind: [u for u, p in precisions.items() if p == kind] for kind in kinds}
    return {PRECISIONS: json.dumps(lists, separators=(",", ":"))} if lists else {}

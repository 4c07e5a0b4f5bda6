"""A marked ONNX network + an allocation -> the deployable one, with Q/DQ where a unit is quantized.

The Q/DQ form of int8 is the one that OpenVINO, ONNX Runtime and TensorRT all take: symmetric (zero point 0), weights per
output channel, activations per tensor. fp8 is the same in E4M3. int4 dequantizes weights in blocks. nvfp4 dequantizes weights
by scales that are dequantized themselves, and quantizes activations by `trt::TRT_FP4DynamicQuantize`, the operator of
NVIDIA's ONNX parser. N:M weights are stored with their zeros. Each raises the file's opset only as far as it needs.

What is only stored in int8 (w8) is made floating by Cast and Mul, not by DequantizeLinear: runtimes fold these two when they
load the file and then run the same kernels as on floating weights. ONNX Runtime computes a DequantizeLinear of a constant in
every inference, or makes the product one of its own 8 bits (MatMulNBits; 5e-3 off). Of a table that rows are looked up in,
the rows are gathered in int8 and then multiplied by their scales.

Two things are written so that runtimes agree. ONNX Runtime rounds the bias of an int8 product to 32-bit integers of the product's
own step (and lets it overflow): it is stored as a multiple of that step (`hwsearch.compress.biases`). And from opset 21 on
(int4) it cannot build a graph in which it moved Q/DQ past a Reshape or the like itself (microsoft/onnxruntime issue 25526):
there is none left to move (`_Builder._moved`, `_Builder._bias`).

OpenVINO loses the scale of what an int8 convolution reads of a Concat on CPUs whose convolutions take unsigned inputs alone (all
x86 but those with AMX or AVX-VNNI-INT8): its passes move the quantizer to the Concat's inputs (MoveFakeQuantize), align these
(AlignQuantizationIntervals, in steps) and make signed quantizers unsigned (FakeQuantizeDecomposition, which takes those intervals
for values), so that one step becomes 1.0. For it the same numbers are written unsigned there, with zero point 128: nothing is left
to be made unsigned, and the same kernels run (`_Builder.unsigned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.nodenames import unique, unit_of
from hwsearch.backends.typed import TYPES, float_units
from hwsearch.compress.biases import fitted, on_steps, steps
from hwsearch.compress.formats import E2M1, FP8_TOP, HALVES, StoredWeight, two_level
from hwsearch.compress.quantize import Ranges, int8_scale
from hwsearch.lowering.marked import DOMAIN, MARK, tag_of
from hwsearch.lowering.rewrites import fold_pads, keep_float, keep_order, spread_factors, turn_products
from hwsearch.network.variants import INT8_BITS, NVFP4_BLOCK, Variant, stored_once

OPSETS = {"fp8": 19, "int4": 21, "nvfp4": 23}
"""The first opset whose Q/DQ takes a precision; what the others need is there in the exporter's."""
IR_VERSIONS = {19: 9, 21: 10, 23: 11}
TRT_DOMAIN = "trt"
_TYPED_Q = 21
"""The opset from which on QuantizeLinear may have its output's type as an attribute."""
_PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul".split())
_MOVING = frozenset("MaxPool Reshape Slice Squeeze Transpose Unsqueeze".split())
"""What ONNX Runtime moves the Q/DQ of a tensor past."""
ZERO_POINT = 128
"""What stands for 0 in uint8, where int8 is written so."""

_CODES = {
    "int8": TensorProto.INT8,
    "w8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int4": TensorProto.INT4,
    "nvfp4": TensorProto.FLOAT4E2M1,
    "bf16": TensorProto.BFLOAT16,
    "fp16": TensorProto.FLOAT16,
}


def assemble(
    marked: onnx.ModelProto,
    variants: Mapping[str, Variant],
    weights: Mapping[tuple[str, Variant], StoredWeight],
    ranges: Ranges,
    *,
    quantize_outputs: bool = False,
    unsigned_concat: bool = False,
    avoid_fusions: bool = False,
    metadata: Mapping[str, str] | None = None,
    shared: bool = True,
    int8_bits: int = INT8_BITS,
) -> onnx.ModelProto:
    """The network with each unit in its variant.

    weights: of the units that are not plain (`Variant.plain`) and have one. ranges: of the activations of quantized units.
    int8_bits: of int8 weights, and of what stands in their place in a product of two activations.
    quantize_outputs: also quantize what an int8 or fp8 unit returns, for runtimes which execute in int8 only then.
    shared: units that read one tensor on one scale share its Q/DQ.
    unsigned_concat: what an int8 convolution reads of a Concat is uint8 with zero point 128, the same numbers: for OpenVINO.
    avoid_fusions: what OpenVINO would fuse wrongly is written otherwise, see `turn_products`, `spread_factors` and `keep_order`.
    """
    opset = max((OPSETS[v.precision] for v in variants.values() if v.precision in OPSETS), default=0)
    builder = _Builder(marked, quantize_outputs, opset, shared)
    builder.quantized = {unit for unit, v in variants.items() if v.quantized}
    for node in marked.graph.node:
        if node.op_type != MARK:
            builder.copy(node)
            continue
        role, unit, call, port = tag_of(node)
        variant = variants.get(unit, Variant("fp32")) if role == "stored" else variants[unit]
        if role == "stored":
            _put_stored(builder, node, unit, variant, weights, ranges)
        elif role == "weight" and not variant.plain:
            builder.weight(node, unit, weights[unit, variant])
        elif role == "weight" and node.input[0] in builder.initializers:
            values = numpy_helper.to_array(builder.initializers[node.input[0]])
            builder.weight(node, unit, StoredWeight(variant.precision, values))
        elif role == "weight" or not variant.quantized:
            builder.alias(node)
        elif variant.precision == "nvfp4":
            if role == "in":
                builder.dynamic(node, unit, call, two_level(ranges[unit, call, f"in{port}"].top))
            else:
                builder.alias(node)
        elif role == "out" and not quantize_outputs:
            builder.alias(node)
        else:
            where = "out" if role == "out" else f"in{port}"
            of = ranges[unit, call, where]
            scale = int8_scale(of, where, int8_bits) if variant.precision == "int8" else of.top / FP8_TOP
            zero = None
            if variant.precision == "int8" and of.unsigned:
                zero = 0
            elif variant.precision == "int8" and unsigned_concat and builder.joined(node):
                zero = ZERO_POINT
            builder.activation(node, unit, call, variant.precision, scale, separate=role == "in", zero_point=zero)
    marks = [tag_of(n)[:2] for n in marked.graph.node if n.op_type == MARK]
    told = {unit for role, unit in marks if role == "weight"}
    units = {unit: variants[unit].precision for role, unit in marks if role != "stored"}
    untold = {u: p for u, p in units.items() if p in TYPES and (p in ("fp32", "tf32") or u not in told)}
    if avoid_fusions:
        builder.nodes = turn_products(builder.nodes, builder.rank, builder.names)
        spread_factors(builder.nodes, builder.initializers, builder.shape)
        keep_order(builder.nodes, builder.initializers, builder.shape)
    return builder.finish({**float_units(untold), **(metadata or {})})


def _put_stored(
    builder: _Builder,
    node: onnx.NodeProto,
    unit: str,
    variant: Variant,
    weights: Mapping[tuple[str, Variant], StoredWeight],
    ranges: Ranges,
) -> None:
    """What others than layers read: a stored tensor in its variant, or a layer's weight where both can read the same."""
    tied = unit in builder.weight_of
    source = builder.initializers.get(node.input[0])
    floating = variant.plain and variant.precision in ("fp32", "tf32")
    if source is None or (tied and not stored_once(variant)) or (floating and not tied):
        builder.alias(node)
        return
    plain = StoredWeight(variant.precision, numpy_helper.to_array(source)) if variant.plain else None
    weight = plain or weights[unit, variant]
    if tied and variant.precision == "int8":
        weight = builder.suited(unit, weight, float(np.float32(int8_scale(ranges[unit, 0, "in0"], "in0"))))
    if tied:
        builder.shared(node, unit, weight)
    else:
        builder.table(node, unit, weight)


class _Builder:
    """Copies nodes in order, replacing markers; constants of weights are stored at the variant's precision."""

    def __init__(self, marked: onnx.ModelProto, quantize_outputs: bool, opset: int, shared: bool) -> None:
        self.marked, self.opset, self.shared_grids = marked, opset, shared
        self.quantize_outputs = quantize_outputs
        self.quantized: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.initializers = {t.name: t for t in marked.graph.initializer}
        self.pending: dict[str, tuple[str, StoredWeight]] = {}
        self.stored: set[str] = set()
        self.looked_up: set[str] = set()
        self.tables: set[str] = set()
        marks = [(n, *tag_of(n)[:2]) for n in marked.graph.node if n.op_type == MARK]
        self.weight_of = {unit: n for n, role, unit in reversed(marks) if role == "weight"}
        """The first marker of each layer's weight."""
        self.names = {n.name for n in marked.graph.node}
        self.first: dict[Any, str] = {}
        self.dequantized: dict[tuple[str, str, float, int | None], str] = {}
        self.known = {v.name: v for v in (*marked.graph.value_info, *marked.graph.input, *marked.graph.output)}
        self.shapes: list[onnx.ValueInfoProto] = []
        self.grids: dict[str, tuple[str, str]] = {}
        self.steps: dict[str, NDArray[np.float32]] = {}
        self.fed: set[str] = set()
        self.turned: dict[str, tuple[str, list[int]]] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.makers = {output: node for node in marked.graph.node for output in node.output}
        self.constant = set(self.initializers)
        """Tensors that depend on no input."""
        for node in marked.graph.node:
            if set(node.input) <= {*self.constant, ""}:
                self.constant.update(node.output)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def copy(self, node: onnx.NodeProto) -> None:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.metadata_props[:]
        inputs = [self.renamed.get(name, name) for name in node.input]
        if node.op_type == "Transpose" and inputs[0] in self.pending and inputs[0] not in self.tables:
            unit, stored = self.pending[inputs[0]]
            perm = list(helper.get_node_attr_value(node, "perm"))
            self._pend((inputs[0], *perm), node.output[0], unit, stored.transposed(perm))
            return
        if (
            node.op_type == "Gather"
            and inputs[0] in (*self.turned, *self.pending)
            and self._lookup(new, inputs)
        ):
            return
        self._step(node, inputs)
        for i, name in enumerate(inputs):
            if name in self.turned:
                name = self._turned_back(name)
            if name in self.pending:
                self._store(name)
            new.input[i] = name
        self._bias(new)
        self.nodes.append(new)
        if node.op_type in _MOVING and inputs[0] in self.grids and self.opset >= _TYPED_Q:
            self._moved(new, self.grids[inputs[0]])

    def _step(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        """Note what one unit of an int8 product is worth, for each output channel, before its weight is stored."""
        if node.op_type not in _PRODUCTS or inputs[0] not in self.grids or inputs[1] not in self.pending:
            return
        unit, stored = self.pending[inputs[1]]
        if stored.precision != "int8" or stored.scales is None:
            return
        activation = float(numpy_helper.to_array(self.initializers[self.grids[inputs[0]][0]]))
        bias = self._bias_of(node)
        fixed = inputs[1] in self.stored or inputs[1] in self.looked_up
        if bias is not None and bias.shape == stored.scales.shape and not fixed:
            stored = fitted(stored, bias, activation)
            self.pending[inputs[1]] = unit, stored
        self.steps[node.output[0]] = steps(stored, activation)

    def _bias_of(self, node: onnx.NodeProto) -> NDArray[np.float32] | None:
        """The constant that is added to a product, by itself or by the one Add that reads it."""
        names = list(node.input[2:])
        if node.op_type == "MatMul":
            after = self.readers.get(node.output[0], [])
            names = list(after[0].input) if len(after) == 1 and after[0].op_type == "Add" else []
        found = [numpy_helper.to_array(self.initializers[n]) for n in names if n in self.initializers]
        return found[0] if found and found[0].ndim == 1 else None

    def _bias(self, node: onnx.NodeProto) -> None:
        """Store the bias of an int8 product on the product's grid.

        From opset 21 on, in an Add after a MatMul of more than two dimensions that reads what was quantized, it has the shape
        [1, n]: ONNX Runtime then leaves the two as they are, instead of putting a Gemm between two Reshapes, and Q/DQ past these.
        """
        if node.op_type == "MatMul" and node.input[0] in self.grids:
            self.fed.add(node.output[0])
        added = node.op_type == "Add"
        product = next((n for n in node.input if n in self.fed), "") if added else node.output[0]
        step = self.steps.get(product)
        deep = (
            added
            and product in self.fed
            and self.opset >= _TYPED_Q
            and max(map(self.rank, (product, node.output[0]))) > 2
        )
        for i in range(0 if added else 2, len(node.input)):
            tensor = self.initializers.get(node.input[i])
            if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 1:
                continue
            bias = numpy_helper.to_array(tensor)
            if step is not None and bias.shape == step.shape:
                bias = on_steps(bias, step)
            elif not deep:
                continue
            node.input[i] = self._constant(f"{node.output[0]}/bias", bias[None] if deep else bias)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an activation of the marked network; () where it has none."""
        value = self.known.get(name)
        return () if value is None else tuple(d.dim_value for d in value.type.tensor_type.shape.dim)

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def _moved(self, node: onnx.NodeProto, grid: tuple[str, str]) -> None:
        """Q/DQ of an operator's input after it as well, where ONNX Runtime would put it: its values are on that grid."""
        name, (scale, zero) = node.output[0], grid
        base = node.name.rpartition("|")[0] or "~|0"
        raw, quantized = f"{name}/moved", f"{name}/moved/int8"
        node.output[0] = raw
        own = unique(f"{base}|QuantizeLinear.moved", self.names)
        self._add("QuantizeLinear", [raw, scale, zero], quantized, own)
        own = unique(f"{base}|DequantizeLinear.moved", self.names)
        self._add("DequantizeLinear", [quantized, scale, zero], name, own)
        self.grids[name] = grid

    def alias(self, node: onnx.NodeProto) -> None:
        source = self.renamed.get(node.input[0], node.input[0])
        self.renamed[node.output[0]] = source

    def weight(self, node: onnx.NodeProto, unit: str, stored: StoredWeight) -> None:
        self._pend((unit, stored.values.shape), node.output[0], unit, stored)

    def table(self, node: onnx.NodeProto, unit: str, stored: StoredWeight) -> None:
        """A stored tensor that no layer reads."""
        self.weight(node, unit, stored)
        self.tables.add(node.output[0])

    def suited(self, unit: str, stored: StoredWeight, activation: float) -> StoredWeight:
        """A tied weight with scales that suit its layer's bias (`fitted`), wherever in the network the layer comes."""
        reader = next(iter(self.readers.get(self.weight_of[unit].output[0], [])), None)
        if reader is not None and reader.op_type == "Transpose":
            reader = next(iter(self.readers.get(reader.output[0], [])), None)
        bias = self._bias_of(reader) if reader is not None else None
        assert stored.scales is not None
        return (
            stored if bias is None or bias.shape != stored.scales.shape else fitted(stored, bias, activation)
        )

    def shared(self, node: onnx.NodeProto, unit: str, stored: StoredWeight) -> None:
        """A weight that something else reads too: as it is stored for its layer, which may be transposed."""
        own = self.weight_of[unit]
        name = own.output[0]
        self.weight(own, unit, stored)
        name = self.renamed.get(name, name)
        turn = next((n for n in self.readers.get(own.output[0], []) if n.op_type == "Transpose"), None)
        perm = list(range(stored.values.ndim))
        if turn is not None:
            perm = list(helper.get_node_attr_value(turn, "perm"))
            self._pend((name, *perm), turn.output[0], unit, stored.transposed(perm))
            name = self.renamed.get(turn.output[0], turn.output[0])
        self.turned[node.output[0]] = name, perm

    def _turned_back(self, name: str) -> str:
        """A shared weight with its axes as the network has them."""
        source, perm = self.turned[name]
        self._store(source)
        if perm == sorted(perm):
            return source
        if name not in self.stored:
            self.stored.add(name)
            unit = self.pending[source][0]
            own = unique(f"{unit}|0|Transpose.stored", self.names)
            self._add("Transpose", [source], name, own, perm=list(np.argsort(perm)))
        return name

    def _lookup(self, node: onnx.NodeProto, inputs: list[str]) -> bool:
        """Gather rows as they are stored, then make them floating; False where a Gather does something else."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        source, perm = self.turned.get(inputs[0], (inputs[0], [0, 1]))
        unit, stored = self.pending[source]
        turned, by_channel = perm != [0, 1], stored.scales is not None and not stored.block
        rank, axis, base = self.rank(node.output[0]) - 1, perm.index(0) if axis == 0 else -1, f"{unit}|0"
        if axis < 0 or stored.values.ndim != 2 or rank < 0 or (by_channel and stored.axis != axis):
            return False

        def gather(table: str, output: str) -> str:
            own = unique(f"{base}|Gather.stored", self.names)
            self._add("Gather", [table, inputs[1]], output, own, axis=axis)
            return output

        self.looked_up.add(source)
        name = node.output[0]
        rows = f"{name}/rows" if turned else name
        if stored.scales is None:
            self._store(source)
            gather(source, rows)
        else:
            codes, scale = self._codes(source)
            taken, factor = gather(codes, f"{name}/codes"), f"{name}/scales"
            if stored.precision == "w8":
                gather(scale, factor)
            else:  # of one dimension, for DequantizeLinear
                self._add("Gather", [scale, inputs[1]], factor, unique(f"{base}|Gather.stored", self.names))
                if not turned:
                    last = self._constant(f"{name}/last", np.array([-1], np.int64))
                    own = unique(f"{base}|Unsqueeze.stored", self.names)
                    self._add("Unsqueeze", [factor, last], f"{factor}/column", own)
                    factor = f"{factor}/column"
            self._floating(unit, taken, factor, rows)
        if turned:
            own = unique(f"{base}|Transpose.stored", self.names)
            self._add("Transpose", [rows], name, own, perm=[*range(1, rank + 1), 0])
        return True

    def _codes(self, name: str) -> tuple[str, str]:
        """The constants of a quantized weight with a scale for each channel or row: (integers, scales)."""
        _, stored = self.pending[name]
        assert stored.scales is not None
        scales = stored.broadcast_scales() if stored.precision == "w8" else stored.scales
        return (
            self._coded(f"{name}/{stored.precision}", stored.precision, stored.values),
            self._constant(f"{name}/scale", scales),
        )

    def _floating(self, unit: str, codes: str, scale: str, output: str) -> None:
        """Integers times their scales, in fp32."""
        cast = f"{output}/cast"
        self._add("Cast", [codes], cast, unique(f"{unit}|0|Cast.stored", self.names), to=TensorProto.FLOAT)
        self._add("Mul", [cast, scale], output, unique(f"{unit}|0|Mul.stored", self.names))

    def _pend(self, what: Any, name: str, unit: str, stored: StoredWeight) -> None:
        """A weight that is stored once something reads it; the calls of one unit read one constant."""
        first = self.first.setdefault(what, name)
        if first == name:
            self.pending.setdefault(name, (unit, stored))  # a tied one may have its layer's scales already
        else:
            self.renamed[name] = first

    def _store(self, name: str) -> None:
        """Emit the constant and its conversion to fp32 once, under `name`."""
        if name in self.stored:
            return
        self.stored.add(name)
        unit, stored = self.pending[name]
        precision = stored.precision
        if precision in ("fp32", "tf32"):
            self._constant(name, stored.values)
            return
        if precision == "w8":
            codes, scale = self._codes(name)
            self._floating(unit, codes, scale, name)
            return
        values = self._coded(f"{name}/{precision}", precision, stored.values)
        if stored.scales is None:
            own = unique(f"{unit}|0|Cast.weight", self.names)
            self._add("Cast", [values], name, own, to=TensorProto.FLOAT)
            return
        own = unique(f"{unit}|0|DequantizeLinear.weight", self.names)
        if not stored.block:
            scale = self._constant(f"{name}/scale", stored.scales)
            zero = self._zero(f"{name}/zero", precision, stored.scales.shape)
            self._add("DequantizeLinear", [values, scale, zero], name, own, axis=stored.axis)
            return
        if precision == "nvfp4":
            coded = self._coded(f"{name}/scale/fp8", "fp8", stored.scales)
            overall = self._constant(f"{name}/overall", np.asarray(stored.overall, np.float32))
            scale, scaled = f"{name}/scale", unique(f"{unit}|0|DequantizeLinear.scale", self.names)
            self._add("DequantizeLinear", [coded, overall], scale, scaled)
        else:
            scale = self._constant(f"{name}/scale", stored.scales)
        self._add("DequantizeLinear", [values, scale], name, own, axis=stored.axis, block_size=stored.block)

    def dynamic(self, node: onnx.NodeProto, unit: str, call: int, overall: float) -> None:
        """Quantize an activation to nvfp4, with scales of its blocks that are found as the network runs, and dequantize it."""
        source = self.renamed.get(node.input[0], node.input[0])
        key = source, "nvfp4", overall, None
        if key not in self.dequantized:
            base, port, name = f"{unit}|{call}", tag_of(node)[3], node.output[0]
            scale = self._constant(f"{name}/overall", np.asarray(overall, np.float32))
            values, scales, output = f"{name}/nvfp4", f"{name}/scale", f"{name}/dq"
            self._add(
                "TRT_FP4DynamicQuantize",
                [source, scale],
                [values, f"{scales}/fp8"],
                unique(f"{base}|QuantizeLinear.in{port}", self.names),
                domain=TRT_DOMAIN,
                axis=-1,
                block_size=NVFP4_BLOCK,
                scale_type=TensorProto.FLOAT8E4M3FN,
            )
            scaled = unique(f"{base}|DequantizeLinear.scale{port}", self.names)
            self._add("DequantizeLinear", [f"{scales}/fp8", scale], scales, scaled)
            own = unique(f"{base}|DequantizeLinear.in{port}", self.names)
            self._add("DequantizeLinear", [values, scales], output, own, axis=-1, block_size=NVFP4_BLOCK)
            if source in self.known:  # nothing infers shapes through an operator of another domain
                shape = onnx.ValueInfoProto()
                shape.CopyFrom(self.known[source])
                shape.name = output
                self.shapes.append(shape)
            self.dequantized[key] = output
        self.renamed[node.output[0]] = self.dequantized[key]

    def joined(self, node: onnx.NodeProto) -> bool:
        """Whether a convolution reads what a marker stands on, and that is a Concat, or made of one by operators of one input."""
        if all(reader.op_type != "Conv" for reader in self.readers.get(node.output[0], ())):
            return False
        maker = self.makers.get(node.input[0])
        while maker is not None and maker.op_type != "Concat":
            reads = {name for name in maker.input if name and name not in self.constant}
            maker = (
                self.makers.get(reads.pop()) if len(reads) == 1 and maker.op_type not in _PRODUCTS else None
            )
        return maker is not None

    def activation(
        self, node: onnx.NodeProto, unit: str, call: int, precision: str, scale_value: float, *, separate: bool,
        zero_point: int | None,
    ) -> None:  # fmt: skip
        """Quantize and dequantize; two units which read one tensor on one scale share it.

        Not where outputs are quantized too: ONNX Runtime keeps a Q/DQ with two consumers signed, and has no fast
        kernel for that. zero_point: of uint8; None for the precision's own signed type.
        """
        source = self.renamed.get(node.input[0], node.input[0])
        key = source, precision, scale_value, zero_point
        if self.quantize_outputs or not self.shared_grids or key not in self.dequantized:
            role = "in" if separate else "out"
            base, port = f"{'' if separate else '~'}{unit}|{call}", tag_of(node)[3]
            scale = self._constant(f"{node.output[0]}/scale", np.asarray(scale_value, np.float32))
            zero = f"{node.output[0]}/zero"
            if zero_point is not None:
                self._constant(zero, np.asarray(zero_point, np.uint8))
            else:
                self._zero(zero, precision, ())
            quantized, output = f"{node.output[0]}/{precision}", f"{node.output[0]}/dq"
            self._add(
                "QuantizeLinear",
                [source, scale, zero],
                quantized,
                unique(f"{base}|QuantizeLinear.{role}{port}", self.names),
            )
            self._add(
                "DequantizeLinear",
                [quantized, scale, zero],
                output,
                unique(f"{base}|DequantizeLinear.{role}{port}", self.names),
            )
            self.dequantized[key] = output
            if precision == "int8":
                self.grids[output] = scale, zero
        self.renamed[node.output[0]] = self.dequantized[key]

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        # a scale of shape [1] means one channel, and TensorRT then runs no convolution in int8: scalars stay scalars
        self.initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def _zero(self, name: str, precision: str, shape: tuple[int, ...]) -> str:
        return self._coded(name, precision, np.zeros(shape, np.float32))

    def _coded(self, name: str, precision: str, values: np.ndarray[Any, Any]) -> str:
        """A constant of the precision's own type."""
        raw = _encoded(np.ascontiguousarray(values), precision)
        self.initializers[name] = helper.make_tensor(
            name, _CODES[precision], list(values.shape), raw, raw=True
        )
        return name

    def _add(self, op: str, inputs: list[str], output: str | list[str], name: str, **attributes: Any) -> None:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))

    def finish(self, metadata: dict[str, str]) -> onnx.ModelProto:
        old = self.marked.graph
        self._name_outputs()
        self.nodes = fold_pads(self.nodes, self.initializers, [v.name for v in old.output])
        if self.quantize_outputs:
            self.nodes = keep_float(self.nodes, self.initializers, self.quantized, self.names)
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            old.name,
            list(old.input),
            list(old.output),
            [t for name, t in self.initializers.items() if name in used],
            value_info=self.shapes,
        )
        model = helper.make_model(graph, opset_imports=self._opsets(), producer_name="hwsearch")
        model.ir_version = max(self.marked.ir_version, IR_VERSIONS.get(self.opset, 0))
        helper.set_model_props(model, metadata)
        return model

    def _opsets(self) -> list[onnx.OperatorSetIdProto]:
        own = {o.domain: o.version for o in self.marked.opset_import if o.domain != DOMAIN}
        own[""] = max(own[""], self.opset)
        if any(n.domain == TRT_DOMAIN for n in self.nodes):
            own[TRT_DOMAIN] = 1
        return [helper.make_opsetid(domain, version) for domain, version in own.items()]

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
                self._add("Identity", [source], name, unique(f"~|0|Identity.{name}", self.names))
            else:
                rename[source] = name
        for node in self.nodes if rename else ():
            for field in (node.input, node.output):
                for i, tensor in enumerate(field):
                    if tensor in rename:
                        field[i] = rename[tensor]


def bytes_of_units(model: onnx.ModelProto, paths: Mapping[str, str]) -> dict[str, int]:
    """Unit -> bytes of an assembled file that are its own or come after it: its nodes, and the constants that they read first.

    paths: unit -> name of its weight in the traced graph, under which a floating one may stand that others read.
    """
    owner = {path: unit for unit, path in paths.items()}
    found: dict[str, int] = {}

    def add(unit: str, message: Any) -> None:
        size = int(message.ByteSize())
        prefix = 1 + max((size.bit_length() + 6) // 7, 1)  # protobuf: a tag and the length, seven bits a byte
        found[unit] = found.get(unit, 0) + prefix + size

    for node in model.graph.node:
        unit, _ = unit_of(node.name)
        add(unit, node)
        for name in node.input:
            owner.setdefault(name, unit)
    for tensor in model.graph.initializer:
        add(owner.get(tensor.name, ""), tensor)
    found.pop("", None)
    return found


def _encoded(values: np.ndarray[Any, Any], precision: str) -> bytes:
    """The raw bytes of numbers on a precision's grid; of four bits, the first of two is the lower half of a byte."""
    if precision in ("int8", "w8"):
        return values.astype(np.int8).tobytes()
    if precision in HALVES or precision == "fp8":
        tensor = torch.from_numpy(
            np.array(values, np.float32)
        )  # a copy: arrays of ONNX tensors are read-only
        kind = torch.float8_e4m3fn if precision == "fp8" else HALVES[precision]
        return tensor.to(kind).view(torch.uint8 if precision == "fp8" else torch.int16).numpy().tobytes()
    if precision == "int4":
        codes = values.astype(np.int8).astype(np.uint8) & 0xF
    else:
        codes = np.searchsorted(np.array(E2M1), np.abs(values)).astype(np.uint8) | (
            np.signbit(values) << 3
        ).astype(np.uint8)
    codes = np.append(codes.ravel(), np.zeros(codes.size % 2, np.uint8))
    return (codes[0::2] | codes[1::2] << 4).astype(np.uint8).tobytes()

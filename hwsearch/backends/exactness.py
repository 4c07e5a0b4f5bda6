"""Does a runtime sum products of int8 exactly on this device? How many bits int8 weights may have where it does not.

x86 CPUs without a dot product of bytes (AVX2 without AVX-VNNI, AVX-512 without VNNI) multiply unsigned by signed bytes and add
each two products in 16 bits, saturating (VPMADDUBSW). Signed activations are shifted by 128 to become unsigned. Two products of
255 and 127 are 64,770, where 32,767 is the most; of 255 and 63 (weights of 7 bits) they are 32,130. NNCF calls the remedy
`overflow_fix`, ONNX Runtime `reduce_range`. Sources: Intel's instruction set reference; oneDNN's developer guide, "Nuances of
int8 computations"; ONNX Runtime's documentation of quantization.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.base import Array, Backend, BuildOptions
from hwsearch.backends.process import compiler
from hwsearch.network.variants import INT8_BITS, Int8, Variant, int8_levels

DEPTH = 64
"""Channels that each output of the probe sums over: a multiple of what any vector instruction takes at once."""
SIDE = 8
OFF = 0.01
"""Relative error that is none: half a step of a quantized output is 0.4 %, and a sum that saturates loses half of itself."""
_TOP = 127
_STEP = 2.0**-7
"""Scale of activations and weights: sums stay within fp16."""

_known: dict[tuple[object, ...], int] = {}


def int8_bits(backend: Backend, options: BuildOptions) -> int:
    """Bits that int8 weights may have for this backend to sum their products exactly under these options: 8, or 7.

    A backend may say so itself, by an attribute `int8_bits`; else one small network is built and run (once a process), and
    another where its sums are off. 8 where the backend offers no int8. Raises what `Backend.build` does.
    """
    stated: int | None = getattr(backend, "int8_bits", None)
    if stated is not None:
        return stated
    if Variant("int8") not in backend.variants(options.base):
        return INT8_BITS
    key = (type(backend), backend.name, *sorted(backend.versions().items()), options)
    if key not in _known:
        _known[key] = next((bits for bits in (INT8_BITS, 7) if sum_error(backend, options, bits) <= OFF), 7)
    return _known[key]


def int8_of(backend: Backend, options: BuildOptions) -> Int8:
    """How a backend takes int8 under these options on this device."""
    return Int8(int8_bits(backend, options), takes_unsigned(backend))


def takes_unsigned(backend: Backend) -> bool:
    """Whether activations that were never negative go into a backend as uint8 (its attribute `unsigned_activations`)."""
    return bool(getattr(backend, "unsigned_activations", False))


def sum_error(backend: Backend, options: BuildOptions, bits: int) -> float:
    """Largest relative error of a convolution, a matrix product with a weight and one of two activations at their extremes.

    Activations are 127 (255, where a runtime shifts them), weights the largest of so many bits.
    """
    levels = int8_levels(bits)
    model, arrays = probe(levels, backend.quantize_outputs)
    engine = compiler(backend)(model.SerializeToString(), replace(options))
    wanted = [_TOP * levels * _STEP**2 * depth for depth in (9 * DEPTH, DEPTH, DEPTH)]
    found = engine(*arrays)
    errors = [np.abs(y.astype(np.float64) / want - 1.0).max() for y, want in zip(found, wanted, strict=True)]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def probe(levels: int, quantize_outputs: bool) -> tuple[onnx.ModelProto, list[Array]]:
    """(a network of one layer of each kind with every weight `levels`, its inputs)."""
    made = _Probe(quantize_outputs)
    shapes = {
        "image": (1, DEPTH, SIDE, SIDE),
        "rows": (SIDE, DEPTH),
        "left": (1, 2, SIDE, DEPTH),
        "right": (1, 2, DEPTH, SIDE),
    }
    image, rows, left, right = (made.activation(name, shape) for name, shape in shapes.items())
    kernel = made.weight("kernel", np.full((DEPTH, DEPTH, 3, 3), levels, np.int8), axis=0)
    matrix = made.weight("matrix", np.full((DEPTH, DEPTH), levels, np.int8), axis=1)
    made.product("Conv", [image, kernel], "conv", _TOP * levels * 9 * DEPTH)
    made.product("MatMul", [rows, matrix], "product", _TOP * levels * DEPTH)
    made.product("MatMul", [left, right], "activations", _TOP * levels * DEPTH)
    arrays = [np.full(s, (levels if n == "right" else _TOP) * _STEP, np.float32) for n, s in shapes.items()]
    return made.model(), arrays


class _Probe:
    """Puts the probe's graph together, in the Q/DQ form of `hwsearch.lowering.assemble`."""

    def __init__(self, quantize_outputs: bool) -> None:
        self.quantize_outputs = quantize_outputs
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def _constant(self, name: str, value: Array) -> str:
        self.stored.append(numpy_helper.from_array(value, name))
        return name

    def _quantized(self, name: str, scale: float) -> str:
        grid = [self._constant(f"{name}/scale", np.array(scale, np.float32)),
                self._constant(f"{name}/zero", np.array(0, np.int8))]  # fmt: skip
        self.nodes += [
            helper.make_node(
                "QuantizeLinear", [name, *grid], [f"{name}/int8"], name=f"{name}/QuantizeLinear"
            ),
            helper.make_node(
                "DequantizeLinear", [f"{name}/int8", *grid], [f"{name}/dq"], name=f"{name}/DequantizeLinear"
            ),
        ]
        return f"{name}/dq"

    def activation(self, name: str, shape: tuple[int, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return self._quantized(name, _STEP)

    def weight(self, name: str, values: Array, axis: int) -> str:
        count = values.shape[axis]
        grid = [self._constant(f"{name}/scale", np.full(count, _STEP, np.float32)),
                self._constant(f"{name}/zero", np.zeros(count, np.int8))]  # fmt: skip
        source = self._constant(f"{name}/int8", values)
        self.nodes.append(
            helper.make_node(
                "DequantizeLinear", [source, *grid], [name], name=f"{name}/DequantizeLinear", axis=axis
            )
        )
        return name

    def product(self, op: str, sources: list[str], name: str, largest: int) -> None:
        self.nodes.append(helper.make_node(op, sources, [name], name=name))
        out = self._quantized(name, largest * _STEP**2 / _TOP) if self.quantize_outputs else name
        self.outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "probe", self.inputs, self.outputs, self.stored)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="hwsearch"
        )
        model.ir_version = 8
        return onnx.shape_inference.infer_shapes(model)

"""An assembled network rewritten where Q/DQ would make a runtime do something else than in a float network.

`fold_pads`: zeros that a Pad puts around what convolutions read become the convolutions' own padding. Runtimes do that themselves
in a float network (OpenVINO's PadFusion, ONNX Runtime's), and not where Q/DQ stands between the two: the Pad then runs by itself,
and the quantizer after it is not fused into the layer before.

`keep_float`: ONNX Runtime 1.32 quantizes the float weight of a layer between Q/DQ by itself, with one scale for all channels
(its optimizer WeightBiasQuantization), and multiplies two dequantized activations in int8 (MatMulIntegerToFloat), of 8 bits, whose
sums not every CPU has exactly. A Max of one input, which it leaves alone, before the layer keeps that float.

`turn_products`: on CPUs with AVX-512 OpenVINO 2026.4 fuses an int8 product of two activations whose second operand comes from a
Softmax, and the product before that, as attention (MHATokenization), and then multiplies in attention's order, in which the Softmax
comes first: results are off by more than their own size. The transposed operands are multiplied in the other order instead,
which no such pass knows.

`spread_factors`: OpenVINO 2026.4 multiplies a constant factor before a convolution into the weight (MultiplyConvolutionFusion). It
does so with a factor that differs from place to place too, where the image is as large as the kernel, and takes places for taps of
the kernel. Such a factor is stored with a value for each element of what the convolution reads, which that pass leaves alone.

`keep_order`: of a Split, convolutions without a bias and a Concat OpenVINO 2026.4 makes one grouped convolution, whichever part
goes to which. Where they do not go one by one in order, convolutions get a bias of next to nothing, which keeps that pass
away; a bias of zeros is taken out before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hwsearch.backends.faults import from_softmax
from hwsearch.backends.nodenames import unique, unit_of

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
NEXT_TO_NOTHING = 1e-30
"""A bias that changes no sum of float32, nor of bf16: of layers that must not be without one."""


def fold_pads(
    nodes: Sequence[onnx.NodeProto], stored: Mapping[str, onnx.TensorProto], outputs: Sequence[str]
) -> list[onnx.NodeProto]:
    """The nodes without each Pad whose zeros only convolutions read, directly or through Q/DQ. The other nodes may be changed.

    stored: the graph's constants. outputs: names of the graph's outputs, which stay.
    """
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in nodes:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    left = []
    for node in nodes:
        widths = _zeros(node, stored)
        layers = _convolutions(node.output[0], readers, outputs) if widths is not None else None
        if widths is None or not layers:
            left.append(node)
            continue
        for layer in layers:
            _pad(layer, widths)
        for reader, position in readers[node.output[0]]:
            reader.input[position] = node.input[0]
            readers.setdefault(node.input[0], []).append((reader, position))
    return left


def _zeros(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> list[int] | None:
    """What a Pad puts before and after each spatial axis (begins, then ends), where that is zeros and nothing else; else None."""
    if node.op_type != "Pad" or (len(node.input) > 3 and node.input[3]):
        return None
    if any(a.name == "mode" and helper.get_attribute_value(a) != b"constant" for a in node.attribute):
        return None
    if len(node.input) > 2 and node.input[2]:
        value = stored.get(node.input[2])
        if value is None or np.any(numpy_helper.to_array(value) != 0):
            return None
    tensor = stored.get(node.input[1])
    if tensor is None:
        return None
    begins, ends = np.split(numpy_helper.to_array(tensor).astype(int), 2)
    if len(begins) < 3 or begins[:2].any() or ends[:2].any() or (begins < 0).any() or (ends < 0).any():
        return None
    return [*begins[2:].tolist(), *ends[2:].tolist()]


def _convolutions(
    name: str, readers: Mapping[str, Sequence[tuple[onnx.NodeProto, int]]], outputs: Sequence[str]
) -> list[onnx.NodeProto]:
    """The convolutions that are all that reads a tensor, directly or through Q/DQ; empty where anything else does."""
    found: list[onnx.NodeProto] = []
    todo = [name]
    while todo:
        current = todo.pop()
        if current in outputs:
            return []
        for node, position in readers.get(current, ()):
            if position:
                return []
            if node.op_type in _QDQ:
                todo.append(node.output[0])
            elif node.op_type == "Conv" and _explicit(node):
                found.append(node)
            else:
                return []
    return found


def _explicit(node: onnx.NodeProto) -> bool:
    return all(a.name != "auto_pad" or helper.get_attribute_value(a) == b"NOTSET" for a in node.attribute)


def _pad(node: onnx.NodeProto, widths: Sequence[int]) -> None:
    own = next((a for a in node.attribute if a.name == "pads"), None)
    if own is None:
        node.attribute.append(helper.make_attribute("pads", list(widths)))
        return
    own.ints[:] = [a + b for a, b in zip(own.ints, widths, strict=True)]


def spread_factors(
    nodes: Sequence[onnx.NodeProto], stored: dict[str, onnx.TensorProto], shape_of: Callable[[str], tuple[int, ...]]
) -> None:
    """Store factors before convolutions that differ over an image as large as the kernel element by element.

    nodes: changed in place. stored: the graph's constants, which new ones join. shape_of: of an activation; () where unknown.
    """
    makers = {output: node for node in nodes for output in node.output}
    for node in nodes:
        maker = makers.get(node.input[0]) if node.op_type == "Conv" else None
        if maker is None or maker.op_type not in ("Mul", "Div"):
            continue
        shape = shape_of(node.input[0])
        kernel = next((tuple(a.ints) for a in node.attribute if a.name == "kernel_shape"), ())
        for position, name in enumerate(maker.input):
            if name not in stored or len(shape) != len(kernel) + 2:
                continue
            own = tuple(stored[name].dims)
            places = (*[1] * (len(shape) - len(own)), *own)[2:]
            over_places = any(d > 1 for d in places) and all(d in (1, k) for d, k in zip(places, kernel, strict=True))
            if over_places and own != shape:
                values = np.broadcast_to(numpy_helper.to_array(stored[name]), shape)
                maker.input[position] = spread = f"{name}/spread/{'x'.join(map(str, shape))}"
                stored[spread] = numpy_helper.from_array(np.ascontiguousarray(values), spread)


def keep_order(
    nodes: Sequence[onnx.NodeProto], stored: dict[str, onnx.TensorProto], shape_of: Callable[[str], tuple[int, ...]]
) -> None:
    """Give a bias to convolutions without one that read parts of one Split, in another order than a Concat joins them.

    nodes: changed in place. stored: the graph's constants, which new ones join. shape_of: of an activation; () where unknown.
    """
    makers = {output: node for node in nodes for output in node.output}
    for node in nodes:
        layers = [makers.get(name) for name in node.input] if node.op_type == "Concat" else []
        plain = [n for n in layers if n is not None and n.op_type == "Conv" and not _biased(n, stored)]
        splits = [makers.get(n.input[0]) for n in plain]
        first = splits[0] if splits else None
        if len(plain) < len(node.input) or first is None or first.op_type != "Split" or any(s is not first for s in splits):
            continue
        if [n.input[0] for n in plain] == list(first.output):
            continue
        for layer in plain:
            name, shape = f"{layer.output[0]}/next_to_nothing", shape_of(layer.output[0])
            if shape:
                stored[name] = numpy_helper.from_array(np.full(shape[1], NEXT_TO_NOTHING, np.float32), name)
                layer.input[2:] = [name]


def _biased(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a convolution has a bias that is not all zeros."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    return node.input[2] not in stored or bool(np.any(numpy_helper.to_array(stored[node.input[2]]) != 0))


def keep_float(
    nodes: Sequence[onnx.NodeProto],
    stored: Mapping[str, onnx.TensorProto],
    quantized: Collection[str],
    names: set[str],
) -> list[onnx.NodeProto]:
    """The nodes with a Max before each float layer that stands between Q/DQ of activations, or multiplies two dequantized ones.

    stored: the graph's constants. quantized: names of the units whose activations are quantized. names: of nodes, which those of
    new ones join.
    """
    makers = {output: node for node in nodes for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    new = []
    for node in nodes:
        floating = node.op_type in _LAYERS and unit_of(node.name)[0] not in quantized
        if floating and _dequantized(node.input[0], makers, stored) and (
            _dequantized(node.input[1], makers, stored)
            if node.input[1] not in stored
            else _quantized(node, readers)
        ):
            kept = f"{node.output[0]}/read"
            new.append(
                helper.make_node("Max", [node.input[0]], [kept], name=unique(f"{_base(node)}|Max.float", names))
            )
            node.input[0] = kept
        new.append(node)
    return new


def _dequantized(
    name: str, makers: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether a tensor is a dequantized activation, or made of one by operators that read nothing else."""
    while (maker := makers.get(name)) is not None:
        reads = [i for i in maker.input if i and i not in stored]
        if len(reads) != 1 or maker.op_type in _LAYERS:
            return False
        if maker.op_type == "DequantizeLinear":
            return True
        name = reads[0]
    return False


def _quantized(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> bool:
    """Whether what a node returns is quantized, at once or behind operators that may be fused with it."""
    todo = list(node.output)
    while todo:
        for reader in readers.get(todo.pop(), ()):
            if reader.op_type == "QuantizeLinear":
                return True
            if reader.op_type not in _LAYERS:
                todo += reader.output
    return False


def turn_products(
    nodes: Sequence[onnx.NodeProto], rank: Callable[[str], int], names: set[str]
) -> list[onnx.NodeProto]:
    """The nodes, with (b^T a^T)^T for each int8 product a b of two activations where b comes from a Softmax.

    rank: of a tensor, 0 where it is not known. names: of nodes, which those of new ones join.
    """
    makers = {output: node for node in nodes for output in node.output}
    new = []
    for node in nodes:
        ranks = [rank(_unquantized(name, makers)) for name in node.input]
        if node.op_type != "MatMul" or min(ranks) < 2 or not from_softmax(node.input[1], makers):
            new.append(node)
            continue
        first, second = node.input
        turned = [f"{node.output[0]}/turned{i}" for i in range(3)]
        for source, target, size in ((first, turned[0], ranks[0]), (second, turned[1], ranks[1])):
            new.append(_transpose(source, target, size, node, names))
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[:], product.output[:] = [turned[1], turned[0]], [turned[2]]
        new += [product, _transpose(turned[2], node.output[0], max(ranks), node, names)]
    return new


def _transpose(source: str, target: str, rank: int, of: onnx.NodeProto, names: set[str]) -> onnx.NodeProto:
    perm = [*range(rank - 2), rank - 1, rank - 2]
    base = _base(of) if _base(of).startswith("~") else f"~{_base(of)}"
    return helper.make_node("Transpose", [source], [target], name=unique(f"{base}|Transpose.turned", names), perm=perm)


def _unquantized(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that a dequantized one was quantized from."""
    while (maker := makers.get(name)) is not None and maker.op_type in _QDQ:
        name = maker.input[0]
    return name


def _base(node: onnx.NodeProto) -> str:
    return node.name.rpartition("|")[0] or "~|0"

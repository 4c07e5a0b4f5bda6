"""Q/DQ graphs that a runtime is known to compute wrongly, found by their patterns.

hwsearch's own lowering makes none of them (`tests/backends/test_qdq_fuzz.py`); an engine of one is not built. Each was found by
comparing engines of random graphs with ONNX's reference evaluator (`scripts/bench/qdq_fuzz.py`), OpenVINO 2026.4.1 and ONNX Runtime
1.32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx
from onnx import TensorProto

_PRODUCTS = frozenset("Conv ConvTranspose Gemm MatMul".split())
_MOVES = frozenset("Transpose Reshape Squeeze Unsqueeze".split())
"""What ONNX Runtime moves Q/DQ past, up to a layer."""
_ONWARDS = _MOVES | frozenset("Split Slice MaxPool Clip".split())
"""What OpenVINO moves a dequantizer past."""
_MEANS = frozenset("AveragePool GlobalAveragePool ReduceMean".split())

SIGNED_CONCAT = "int8 Q/DQ beside a Concat: OpenVINO aligns the branches and loses their scale; uint8 with zero point 128 keeps it"
MIXED_CONCAT = "a Concat of quantizers of several types: OpenVINO computes with the scale of another branch"
ROUNDED_MEAN = "a mean between Q/DQ and a layer: OpenVINO rounds it to whole steps"
TWICE = "one quantizer straight after another, behind a Concat: OpenVINO crashes as it compiles them"
SPLIT = "a part of a dequantized tensor read by a convolution, and the rest by others: OpenVINO loses its scale"
CLIPPED = "a Clip behind Q/DQ: OpenVINO rounds its bounds to whole steps"
REPEATED = "one quantizer behind another, read by a layer through a move and by others: OpenVINO loses a scale"
SECOND_SOFTMAX = "an int8 product whose second operand comes from a Softmax: OpenVINO takes it for attention and computes another"
DYNAMIC = "an int8 weight whose layer reads floats: ONNX Runtime quantizes these as the network runs"


def faults(model: onnx.ModelProto, runtime: str) -> list[str]:
    """Why a runtime (`openvino`, `onnxruntime`) would compute a graph wrongly, each reason once; empty where none is known."""
    graph = _Graph(model)
    known: dict[str, dict[str, Callable[[_Graph], bool]]] = {
        "openvino": {
            TWICE: _twice,
            MIXED_CONCAT: _mixed,
            SIGNED_CONCAT: _signed,
            ROUNDED_MEAN: _mean,
            CLIPPED: _clipped,
            REPEATED: _repeated,
            SPLIT: _split,
            SECOND_SOFTMAX: _second,
        },
        "onnxruntime": {DYNAMIC: _dynamic},
    }
    return [why for why, found in known.get(runtime, {}).items() if found(graph)]


class _Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.stored = {t.name: t for t in model.graph.initializer}
        self.makers = {o: n for n in self.nodes for o in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.constant = {"", *self.stored}
        """Tensors that depend on no input: stored, or made of those (weights stored in int8, by Cast and Mul)."""
        for node in self.nodes:
            if self.constant.issuperset(node.input):
                self.constant.update(node.output)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def quantizers(self) -> Iterator[onnx.NodeProto]:
        return (n for n in self.nodes if n.op_type == "QuantizeLinear")

    def dequantizers(self) -> Iterator[onnx.NodeProto]:
        """Of activations."""
        return (n for n in self.nodes if n.op_type == "DequantizeLinear" and n.input[0] not in self.stored)

    def kind(self, node: onnx.NodeProto) -> int:
        """The integer type of a quantizer or dequantizer, as its zero point has it; uint8 without one."""
        return self.stored[node.input[2]].data_type if len(node.input) > 2 else TensorProto.UINT8

    def quantized(self, node: onnx.NodeProto) -> bool:
        """Whether it is a product whose second operand, a weight or an activation, is dequantized."""
        maker = self.makers.get(node.input[1]) if node.op_type in _PRODUCTS else None
        return maker is not None and maker.op_type == "DequantizeLinear"

    def before(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes that an activation came through, up to one that reads several, a product or another quantizer."""
        maker = self.makers.get(node.input[0])
        while maker is not None:
            yield maker
            reads = {name for name in maker.input if name not in self.constant}
            ends = len(reads) != 1 or maker.op_type in _PRODUCTS or maker.op_type == "DequantizeLinear"
            maker = None if ends else self.makers.get(reads.pop())

    def after(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes that an activation goes through, up to products and the quantizers after them."""
        todo, seen = list(node.output), set[int]()
        while todo:
            for reader in self.readers.get(todo.pop(), ()):
                if id(reader) not in seen:
                    seen.add(id(reader))
                    yield reader
                    if reader.op_type not in _PRODUCTS and reader.op_type != "QuantizeLinear":
                        todo += reader.output


def _has(nodes: Iterator[onnx.NodeProto], *operators: str) -> bool:
    return any(n.op_type in operators for n in nodes)


def _feeds(graph: _Graph, node: onnx.NodeProto, *operators: str) -> bool:
    """Whether a quantized layer of these kinds reads what a dequantizer makes, through whatever stands between."""
    return any(n.op_type in operators and graph.quantized(n) for n in graph.after(node))


def _signed(graph: _Graph) -> bool:
    """int8 Q/DQ behind a Concat, or before one, whose values a convolution reads."""
    for node in graph.dequantizers():
        if graph.kind(node) != TensorProto.INT8 or not _feeds(graph, node, "Conv"):
            continue
        source = graph.makers[node.input[0]]
        if _has(graph.after(node), "Concat") or (
            source.op_type == "QuantizeLinear" and _has(graph.before(source), "Concat")
        ):
            return True
    return False


def _mixed(graph: _Graph) -> bool:
    """A Concat, read by a quantized layer, of branches that were quantized to several types or by several scales."""
    for node in graph.nodes:
        if node.op_type != "Concat" or not _feeds(graph, node, *_PRODUCTS):
            continue
        made = [graph.makers.get(name) for name in node.input]
        found = {graph.kind(m) for m in made if m is not None and m.op_type == "DequantizeLinear"}
        if len(found) > 1:
            return True
    return False


def _mean(graph: _Graph) -> bool:
    starts = [*graph.dequantizers(), *(n for n in graph.nodes if graph.quantized(n))]
    return any(_has(graph.after(n), *_MEANS) and _feeds(graph, n, *_PRODUCTS) for n in starts)


def _clipped(graph: _Graph) -> bool:
    for node in graph.nodes:
        if node.op_type != "Clip":
            continue
        maker = graph.makers.get(node.input[0])
        joined = maker.input if maker is not None and maker.op_type == "Concat" else ()
        branches = [graph.makers.get(name) for name in joined]
        if _from_dequantizer(graph, node) or any(
            b is not None and b.op_type == "DequantizeLinear" for b in branches
        ):
            return True
    return False


def _split(graph: _Graph) -> bool:
    """A convolution that reads a part of what a dequantizer or a quantized product made, with no quantizer of its own."""
    for node in graph.nodes:
        if node.op_type != "Conv" or not graph.quantized(node):
            continue
        way = [n.op_type for n in graph.before(node)]
        if "Split" in way and way[-1] in ("DequantizeLinear", *_PRODUCTS):
            return True
    return False


def _repeated(graph: _Graph) -> bool:
    """Of the second quantizer's values some must reach a layer through a move, and others another way."""
    for node in graph.quantizers():
        if not _from_dequantizer(graph, node):
            continue
        todo = [o for n in graph.readers.get(node.output[0], ()) for o in n.output]
        several = moved = False
        while todo:
            readers = graph.readers.get(todo.pop(), ())
            several |= len(readers) > 1
            for reader in readers:
                if reader.op_type in _ONWARDS:
                    todo += reader.output
                    moved |= any(graph.quantized(r) for o in reader.output for r in graph.readers.get(o, ()))
        if several and moved:
            return True
    return False


def _from_dequantizer(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Whether a node reads what a dequantizer of activations made, with nothing but moves between."""
    *between, first = [*graph.before(node)] or [node]
    return first.op_type == "DequantizeLinear" and all(n.op_type in _ONWARDS for n in between)


def from_softmax(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor was quantized and comes from a Softmax, with no product and no change of axes between."""
    maker = makers.get(name)
    if maker is None or maker.op_type != "DequantizeLinear":
        return False
    todo, seen = [maker.input[0]], set[str]()
    while todo:
        name = todo.pop()
        maker = makers.get(name)
        if maker is not None and maker.op_type == "Softmax":
            return True
        if maker is not None and name not in seen and maker.op_type not in (*_PRODUCTS, "Transpose"):
            todo += maker.input
        seen.add(name)
    return False


def _second(graph: _Graph) -> bool:
    return any(n.op_type == "MatMul" and from_softmax(n.input[1], graph.makers) for n in graph.nodes)


def _twice(graph: _Graph) -> bool:
    for node in graph.quantizers():
        maker = graph.makers.get(node.input[0])
        if maker is not None and maker.op_type == "DequantizeLinear":
            source = graph.makers.get(maker.input[0])
            if source is not None and _has(graph.before(source), "Concat"):
                return True
    return False


def _dynamic(graph: _Graph) -> bool:
    for node in graph.nodes:
        if node.op_type != "MatMul":
            continue
        data, weight = (graph.makers.get(name) for name in node.input)
        while data is not None and data.op_type in _MOVES:
            data = graph.makers.get(data.input[0])
        code = (
            graph.stored.get(weight.input[0])
            if weight is not None and weight.op_type == "DequantizeLinear"
            else None
        )
        stored = code is not None and code.data_type == TensorProto.INT8
        if stored and (data is None or data.op_type != "DequantizeLinear"):
            return True
    return False

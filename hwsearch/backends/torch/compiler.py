"""An ONNX graph -> a `OnnxProgram` on one device. Shapes are fixed, so that all arithmetic with shapes is done here.

What depends on no input is computed once, on the CPU, and stored on the device in the form in which it is read. Dequantization of
a product's operands is left out where the product itself reads the quantized numbers (`products`); everywhere else Q/DQ computes
what ONNX says, in float. Every call is made once while the program is built: that tells shapes, and what only views memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from hwsearch.backends.torch.calls import KNOWN_BY_SHAPE, Call, Run, first_line, made, refused
from hwsearch.backends.torch.fusing import fused
from hwsearch.backends.torch.graph import Graph, Node
from hwsearch.backends.torch.offering import Kernels
from hwsearch.backends.torch.operators import elementwise, layers, moves, recurrent  # noqa: F401  they fill the table
from hwsearch.backends.torch.products import (
    PRODUCTS,
    Weight,
    as_matrix,
    kernels_for,
    linear,
    out_axis,
    product,
)
from hwsearch.backends.torch.program import OnnxProgram, Step, with_frees
from hwsearch.backends.torch.quantizing import quantizer
from hwsearch.errors import BackendUnavailable

Tensor = torch.Tensor

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}  # fmt: skip
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_TENSOR_CORES = (*PRODUCTS, "ConvTranspose", "Einsum", "GRU", "LSTM")
"""Operators that tf32 is about."""
_FAILS = (RuntimeError, TypeError, ValueError, IndexError)


def compiled(graph: Graph, device: torch.device, there: Kernels, base: str = "fp32") -> OnnxProgram:
    """The program of a graph. there: kernels that it may use beside float ones. base: what its floats are, or tf32.

    Images lie channels last but in fp32: tensor cores want them so. Raises BackendUnavailable naming the node that torch
    cannot run.
    """
    with torch.no_grad():
        return _Compiler(fused(graph, base), device, there, base).run()


@dataclass
class _Value:
    """A tensor of the graph: a constant on the CPU, or in a place of the program (which constants get when they are read)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: Tensor | None = None
    place: int | None = None


@dataclass(frozen=True)
class _Coded:
    """What a tensor is dequantized from, symmetrically: quantized numbers, and one scale or one for each index of an axis."""

    values: _Value
    scales: Tensor
    axis: int
    node: Node


@dataclass(frozen=True)
class _Operands:
    """Of a product: what it reads, the weight [out, in], the kernel (`products.RULES`, or '' for floats), its scales and type.

    dequantized: the nodes that are left out, as the kernel reads what they would dequantize.
    """

    activations: _Value
    weight: Tensor
    kernel: str
    scales: Tensor | None
    to: torch.dtype
    dequantized: tuple[str, ...] = ()


@dataclass
class _Compiler:
    graph: Graph
    device: torch.device
    there: Kernels
    base: str
    values: dict[str, _Value] = field(default_factory=dict)
    pending: dict[str, Node] = field(default_factory=dict)
    """Dequantizations that nobody has asked the floats of."""
    coded: dict[str, _Coded] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    live: list[Tensor] = field(default_factory=list)
    """What stands in each place in the run that is made while the program is built."""
    stored: dict[int, Tensor] = field(default_factory=dict)
    bound: list[Tensor] = field(default_factory=list)
    """Constants that belong to a call."""
    declined: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def run(self) -> OnnxProgram:
        convolves = any(n.op in _CONVOLUTIONS for n in self.graph.nodes)
        self.channels_last = convolves and self.base != "fp32"
        for name, constant in self.graph.constants.items():
            self.values[name] = _Value(tuple(constant.shape), constant.dtype, constant)
        inputs = []
        for name, shape, dtype in self.graph.inputs:
            example = torch.zeros(shape, dtype=dtype, device=self.device)
            if self.channels_last and example.dim() == 4:
                example = example.contiguous(memory_format=torch.channels_last)
            inputs.append(self._keep(name, example))
        self.readers = {name: node for node in self.graph.nodes for name in node.inputs}
        for node in self.graph.nodes:
            if node.outputs[0] in self.done or self._deferred(node) or self._product(node):
                continue
            if not self._convolution(node):
                self._node(node)
        outputs = [self._place(self._value(name)) for name in self.graph.outputs]
        steps = with_frees(self.steps, [*self.stored, *outputs, *inputs])
        places = tuple(self.stored.get(i) for i in range(len(self.live)))
        constants = {id(t): t for t in (*self.stored.values(), *self.bound)}
        size = sum(t.nbytes for t in constants.values())
        return OnnxProgram(steps, places, tuple(inputs), tuple(outputs), size, self.channels_last, self.declined)

    # ---- tensors

    def _keep(self, name: str, tensor: Tensor) -> int:
        """A place for a tensor that is made or given at every inference."""
        self.live.append(tensor)
        self.values[name] = _Value(tuple(tensor.shape), tensor.dtype, place=len(self.live) - 1)
        return len(self.live) - 1

    def _value(self, name: str) -> _Value:
        """A tensor, dequantized if it was not yet. Raises BackendUnavailable where no node makes it."""
        if name in self.pending:
            self._node(self.pending.pop(name))
        if name not in self.values:
            raise refused(self.graph.nodes[0], f"nothing makes the tensor {name!r} of its graph")
        return self.values[name]

    def _place(self, value: _Value, *, convolved: bool = False) -> int:
        """Where a tensor stands; a constant is put on the device. convolved: as the weight of a convolution."""
        if value.place is None:
            assert value.constant is not None
            tensor = value.constant.to(self.device)
            last = convolved and self.channels_last and tensor.dim() == 4
            tensor = tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()
            self.live.append(tensor)
            value.place = len(self.live) - 1
            self.stored[value.place] = tensor
        return value.place

    # ---- nodes

    def _node(self, node: Node) -> None:
        """A node by its entry in the table: folded where it reads constants only."""
        values = [self._value(name) if name else None for name in node.inputs]
        known = all(v is None or v.constant is not None for v in values)
        call = Call(
            node,
            [None if v is None else v.shape for v in values],
            [None if v is None else v.dtype for v in values],
            [None if v is None else v.constant for v in values],
            torch.device("cpu") if known else self.device,
        )
        known = known or node.op in KNOWN_BY_SHAPE
        one = node.op == "QuantizeLinear" and not known and self.there.quantizes
        run = (quantizer(call, one) if one else None) or made(call)
        read = [v for i, v in enumerate(values) if v is not None and i not in call.taken]
        if known:
            self._fold(node, run, [] if node.op in KNOWN_BY_SHAPE else read)
            return
        self.bound += call.kept
        weight = 1 if node.op in _CONVOLUTIONS else None
        reads = [self._place(v, convolved=i == weight) for i, v in enumerate(read)]
        self._emit(node, node.sources or (node.name,), run, reads, node.outputs)

    def _fold(self, node: Node, run: Run, read: Sequence[_Value]) -> None:
        results = self._tried(node, run, [v.constant for v in read])
        for name, value in zip(node.outputs, results, strict=False):
            self.values[name] = _Value(tuple(value.shape), value.dtype, value)

    def _emit(
        self, node: Node, sources: Sequence[str], run: Run, reads: Sequence[int], outputs: Sequence[str],
        kernel: str = "",
    ) -> None:  # fmt: skip
        """A step, run once on what is there. kernel: what it executes in, where that is not its float type."""
        given = [self.live[i] for i in reads]
        results = self._tried(node, run, given)
        owned = {t.untyped_storage().data_ptr() for t in given}
        views = all(r.untyped_storage().data_ptr() in owned for r in results)
        writes = [self._keep(name, value) for name, value in zip(outputs, results, strict=False)]
        precision = kernel or self._precision(node, results[0].dtype)
        self.steps.append(
            Step(node.name, node.op, tuple(sources), precision, run, tuple(reads), tuple(writes), views)
        )

    def _precision(self, node: Node, dtype: torch.dtype) -> str:
        if self.base == "tf32" and dtype == torch.float32 and node.op in _TENSOR_CORES:
            return "tf32"
        return _NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def _tried(self, node: Node, run: Run, given: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """What a call returns. Raises BackendUnavailable with torch's own reason."""
        try:
            result = run(*given)
        except torch.OutOfMemoryError:
            raise
        except _FAILS as error:
            raise refused(node, first_line(error)) from error
        return result if isinstance(result, tuple) else (result,)

    def _convolution(self, node: Node) -> bool:
        """Whether a convolution became one call with the ReLU behind it, and with an addition between them."""
        if node.op != "Conv" or node.domain or not self.there.convolutions:
            return False
        behind = self._only_reader(node)
        added, last = None, behind
        if behind is not None and behind.op == "Add":
            added = self.values.get(behind.inputs[1 - behind.inputs.index(node.outputs[0])])
            last = self._only_reader(behind)
        if behind is None or last is None or last.op != "Relu":
            return False
        x, w, *others = (self._value(name) if name else None for name in node.inputs)
        bias = others[0] if others else None
        if x is None or w is None or x.constant is not None or w.constant is None:
            return False
        call = Call(node, [x.shape, w.shape], [x.dtype, w.dtype], [None, w.constant], self.device)
        made_relu = layers.conv_relu(call)
        if made_relu is None or (bias is not None and bias.constant is None):
            return False
        run, shape = made_relu
        between = behind is not last
        if between and (added is None or added.constant is not None or added.shape != shape):
            return False
        reads = [self._place(x), self._place(w, convolved=True)]
        reads += [self._place(bias)] if bias is not None else []
        reads += [self._place(added)] if between and added is not None else []

        def call_it(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
            given = iter(rest)
            b = next(given) if bias is not None else None
            y: Tensor = run(x, w, b, next(given) if between else None)
            return y

        parts = [node, behind, *([last] if between else [])]
        try:
            self._emit(node, [n.name for n in parts], call_it, reads, last.outputs)
        except BackendUnavailable as error:
            self.declined[node.name] = f"convolution with ReLU: {first_line(error.__cause__ or error)}"
            return False
        self.done |= {n.outputs[0] for n in parts[1:]}
        return True

    def _only_reader(self, node: Node) -> Node | None:
        name = node.outputs[0]
        found = self.readers.get(name) if self.graph.readers[name] == 1 else None
        return found if found is not None and not found.domain else None

    # ---- quantized operands and products

    def _deferred(self, node: Node) -> bool:
        """Whether a dequantization waits until somebody wants its floats."""
        if node.op != "DequantizeLinear" or any(name in self.pending for name in node.inputs):
            return False
        source, scales, *zeros = (self._value(name) if name else None for name in node.inputs)
        if source is None or scales is None or scales.constant is None:
            return False
        axis = int(node.attributes.get("axis", 1)) % max(len(source.shape), 1)
        zero = zeros[0] if zeros else None
        symmetric = zero is None or (zero.constant is not None and not bool(zero.constant.float().any()))
        count = scales.constant.numel()
        even = count == 1 or (scales.constant.dim() == 1 and count == source.shape[axis])
        if symmetric and even and not node.attributes.get("block_size", 0):
            self.coded[node.outputs[0]] = _Coded(source, scales.constant, axis, node)
        self.pending[node.outputs[0]] = node
        return True

    def _product(self, node: Node) -> bool:
        """Whether a product with a constant weight became one call, with its bias and perhaps on quantized operands."""
        if node.op not in PRODUCTS or node.domain:
            return False
        return any(self._called(node, way) for way in chain(self._quantized(node), self._floats(node)))

    def _called(self, node: Node, operands: _Operands) -> bool:
        """Whether a product was put into the program; a kernel that torch declines is told in `declined`, and is not."""
        found = self._bias(node, operands.weight.shape[0], len(operands.activations.shape))
        if found is None:
            return False
        bias, last = found
        relu = None if operands.kernel or bias is None or node.op == "Conv" else self._only_reader(last)
        behind = [relu] if relu is not None and relu.op == "Relu" else []
        try:
            if operands.kernel:
                rows = math.prod(operands.activations.shape) // operands.weight.shape[1]
                weight = Weight(operands.weight, conv=node.op == "Conv")
                run, constants = product(
                    operands.kernel, weight, operands.scales, bias, operands.to, rows, self.device,
                    fp8_rows=self.there.fp8_rows,
                )  # fmt: skip
            else:
                run, constants = linear(operands.weight, bias, self.device, relu=bool(behind))
            sources = [*operands.dequantized, node.name, *([last.name] if last is not node else [])]
            sources += [n.name for n in behind]
            place = self._place(operands.activations)
            self._emit(node, sources, run, [place], (behind or [last])[-1].outputs, operands.kernel)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, BackendUnavailable) as error:
            if not operands.kernel:
                raise
            why = f"{operands.kernel}: {first_line(error.__cause__ or error)}"
            self.declined[node.name] = "; ".join(filter(None, (self.declined.get(node.name), why)))
            return False
        self.bound += constants
        self.done |= {last.outputs[0], *(n.outputs[0] for n in behind)}
        return True

    def _quantized(self, node: Node) -> Iterator[_Operands]:
        """Ways to run a product whose quantized numbers a kernel multiplies as they are."""
        x, w = (self.coded.get(name) for name in node.inputs[:2])
        if x is None or w is None or x.values.constant is not None or w.values.constant is None:
            return
        if x.scales.numel() > 1 or (w.scales.numel() > 1 and w.axis != out_axis(node)):
            return
        matrix = as_matrix(node, w.values.constant)
        if matrix is not None:
            scales = x.scales.float().reshape([]) * w.scales.float().reshape(-1)
            for kernel in kernels_for(self.there, x.values.dtype, matrix):
                yield _Operands(x.values, matrix, kernel, scales, x.scales.dtype, (x.node.name, w.node.name))

    def _floats(self, node: Node) -> Iterator[_Operands]:
        """Ways to run a product in floats; a convolution only where its weight is one for a sparse kernel."""
        x, w = (self._value(name) for name in node.inputs[:2])
        matrix = None if x.constant is not None or w.constant is None else as_matrix(node, w.constant)
        if matrix is not None:
            for kernel in (*kernels_for(self.there, x.dtype, matrix), *([""] if node.op != "Conv" else [])):
                yield _Operands(x, matrix, kernel, None, x.dtype)

    def _bias(self, node: Node, out: int, rank: int) -> tuple[Tensor | None, Node] | None:
        """(a product's bias [out], the node whose output has it): its own, or of the addition behind a MatMul; None: not one.

        rank: of what the product returns, which an addition may raise.
        """
        if node.op != "MatMul":
            if len(node.inputs) < 3 or not node.inputs[2]:
                return None, node
            bias = self._value(node.inputs[2]).constant
            return (bias, node) if bias is not None and tuple(bias.shape) in ((out,), (1, out)) else None
        name = node.outputs[0]
        behind = self.readers.get(name) if self.graph.readers[name] == 1 else None
        if behind is None or behind.op != "Add" or behind.domain:
            return None, node
        other = self.values.get(behind.inputs[1 - behind.inputs.index(name)])
        bias = None if other is None else other.constant
        if bias is None or bias.numel() != out or bias.shape[-1:] != (out,) or bias.dim() > rank:
            return None, node
        return bias, behind

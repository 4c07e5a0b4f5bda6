"""Random small ONNX graphs with Q/DQ at random places: also where hwsearch puts none.

`graph(seed)` is a program of some steps on images [1, C, H, W], as `random_networks` makes them in torch, with a quantizer after
any of them: between it and the int8 layer that is meant to profit there may be any operators, on any branches, with any readers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]
OPSET = 19
CHANNELS = (4, 8, 12, 16, 32)
SIZE = 8
MOST_OUTPUTS = 3


class _Writer:
    """Nodes so far, with the value that each tensor has for the example input."""

    def __init__(self, seed: int, levels: int) -> None:
        self.rng, self.levels = np.random.default_rng(seed), levels
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        shape = (1, int(self.rng.choice(CHANNELS)), SIZE, SIZE)
        self.values: dict[str, Array] = {"x": self.rng.standard_normal(shape).astype(np.float32)}
        self.unread, self.inner = {"x"}, set[str]()
        self.count = 0

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        self.count += 1
        self.stored.append(numpy_helper.from_array(np.asarray(value, kind), f"c{self.count}"))
        return f"c{self.count}"

    def node(
        self, op: str, inputs: list[str], outputs: int = 1, *, inner: bool = False, **attributes: Any
    ) -> list[str]:
        """Add a node and evaluate it. inner: what it makes is read by the next node alone."""
        self.count += 1
        names = [f"t{self.count}_{i}" for i in range(outputs)]
        made = helper.make_node(op, inputs, names, name=f"n{self.count}", **attributes)
        known = {t.name: numpy_helper.to_array(t) for t in self.stored}
        given = {n: self.values.get(n, known.get(n)) for n in inputs if n}
        kinds = {n: helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in given.items() if v is not None}
        ends = [helper.make_tensor_value_info(n, k, None) for n, k in kinds.items()]
        results = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in names]
        single = helper.make_model(
            helper.make_graph([made], "one", ends, results), opset_imports=[helper.make_opsetid("", OPSET)]
        )
        found = ReferenceEvaluator(single).run(None, given)
        self.nodes.append(made)
        self.values.update(zip(names, found, strict=True))
        self.unread -= set(inputs)
        if inner:
            self.inner |= set(names)
        else:
            self.unread |= set(names)
        return names

    def pick(self, fits: Callable[[Array], bool] = lambda _: True) -> str:
        """A tensor to read, mostly a late one, and one that nothing reads yet rather than another; "" where none fits."""
        found = [n for n, v in self.values.items() if v.ndim == 4 and n not in self.inner and fits(v)]
        if not found:
            return ""
        weights = np.array([(4.0 if n in self.unread else 1.0) * (1 + i) for i, n in enumerate(found)])
        return str(self.rng.choice(found, p=weights / weights.sum()))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def quantized(self, name: str) -> str:
        """Q/DQ on a tensor: symmetric int8, the same as uint8, or uint8 from zero where nothing is negative."""
        value = self.values[name]
        top = float(np.abs(value).max()) or 1.0
        form = self.one_of("int8", "int8", "int8", "offset", "positive" if value.min() >= 0 else "int8")
        kind, zero, steps = {
            "int8": (np.int8, 0, 127),
            "offset": (np.uint8, 128, 127),
            "positive": (np.uint8, 0, 255),
        }[form]
        scale = self.constant(np.float32(top / steps))
        point = self.constant(zero, kind)
        (code,) = self.node("QuantizeLinear", [name, scale, point], inner=True)
        (made,) = self.node("DequantizeLinear", [code, scale, point])
        return made

    def weight(self, value: Array, axis: int) -> str:
        """An int8 weight of so many levels, with a scale for each output channel."""
        rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        scales = np.maximum(np.abs(rows).max(1), 1e-6).astype(np.float32) / np.float32(self.levels)
        shape = [-1 if d == axis else 1 for d in range(value.ndim)]
        codes = self.constant(
            np.round(value / scales.reshape(shape)).clip(-self.levels, self.levels), np.int8
        )
        inputs = [codes, self.constant(scales), self.constant(np.zeros(len(scales)), np.int8)]
        return self.node("DequantizeLinear", inputs, inner=True, axis=axis)[0]


def _conv(w: _Writer) -> None:
    read = w.pick(lambda v: min(v.shape[2:]) >= 3)
    if not read:
        return
    read = w.quantized(read) if w.chance(0.6) else read
    channels = w.values[read].shape[1]
    kind = w.one_of("1x1", "3x3", "3x3", "depthwise", "strided", "valid", "transposed")
    out = channels if kind == "depthwise" else int(w.rng.choice(CHANNELS))
    size = {"1x1": 1, "transposed": 2}.get(kind, 3)
    groups = channels if kind == "depthwise" else 1
    shape = (channels, out, size, size) if kind == "transposed" else (out, channels // groups, size, size)
    value = w.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    weight = w.weight(value.astype(np.float32), 1 if kind == "transposed" else 0)
    options: dict[str, Any] = {"group": groups, "kernel_shape": [size, size]}
    options["strides"] = [2, 2] if kind in ("strided", "transposed") else [1, 1]
    if kind in ("3x3", "depthwise", "strided"):
        options["pads"] = [1, 1, 1, 1]
    (made,) = w.node("ConvTranspose" if kind == "transposed" else "Conv", [read, weight], **options)
    if w.chance(0.3):
        w.quantized(made)


def _matmul(w: _Writer) -> None:
    """A linear layer over channels, between two transposes, its input quantized before or after the first of them."""
    read = w.pick()
    read = w.quantized(read) if w.chance(0.5) else read
    (rows,) = w.node("Transpose", [read], perm=[0, 2, 3, 1])
    rows = w.quantized(rows) if w.chance(0.5) else rows
    channels, out = w.values[rows].shape[-1], int(w.rng.choice(CHANNELS))
    weight = w.weight((w.rng.standard_normal((channels, out)) / np.sqrt(channels)).astype(np.float32), 1)
    (made,) = w.node("MatMul", [rows, weight])
    w.node("Transpose", [made], perm=[0, 3, 1, 2])


def _quantize(w: _Writer) -> None:
    w.quantized(w.pick())


def _cat(w: _Writer) -> None:
    first = w.pick()
    shape, axis = w.values[first].shape, w.one_of(1, 1, 1, 1, 2, 3)

    def fits(v: Array) -> bool:
        return all(a == b for i, (a, b) in enumerate(zip(v.shape, shape, strict=True)) if i != axis)

    reads = [first, *(w.pick(fits) for _ in range(w.one_of(1, 1, 2)))]
    if w.chance(0.3):
        reads = [w.quantized(r) for r in reads]
    if sum(w.values[r].shape[axis] for r in reads) <= 64:
        w.node("Concat", reads, axis=axis)


def _split(w: _Writer) -> None:
    read = w.pick(lambda v: v.shape[1] >= 8)
    if read:
        half = w.values[read].shape[1] // w.one_of(2, 2, 4)
        w.node("Split", [read, w.constant([half, w.values[read].shape[1] - half], np.int64)], 2, axis=1)


def _merge(w: _Writer) -> None:
    first = w.pick()
    second = w.pick(lambda v: v.shape == w.values[first].shape)
    w.node(w.one_of("Add", "Add", "Add", "Mul", "Sub", "Max"), [first, second])


def _pointwise(w: _Writer) -> None:
    op = w.one_of(
        "Relu", "Relu", "Clip", "Sigmoid", "LeakyRelu", "Tanh", "HardSwish", "Abs", "Neg", "Scale", "Softmax"
    )
    read = w.pick()
    if op == "Clip":
        w.node(op, [read, w.constant(-0.4), w.constant(0.7)])
    elif op == "Scale":
        w.node("Mul", [read, w.constant(w.rng.uniform(0.2, 1.0, (1, w.values[read].shape[1], 1, 1)))])
    else:
        w.node(op, [read], **({"axis": 1} if op == "Softmax" else {}))


def _move(w: _Writer) -> None:
    op = w.one_of("Transpose", "Reshape", "Slice", "Slice", "DepthToSpace", "Squeeze", "Flatten")
    read = w.pick(
        lambda v: (
            v.shape[1] % 4 == 0 and v.shape[2] % 2 == 0 and max(v.shape[2:]) <= SIZE and v.shape[1] <= 32
        )
    )
    if not read:
        return
    _, c, h, width = w.values[read].shape
    if op == "Transpose":
        w.node(op, [read], perm=[0, 1, 3, 2])
    elif op == "Reshape":
        w.node(
            op, [read, w.constant(w.one_of([1, c * 2, h // 2, width], [1, c // 2, h, width * 2]), np.int64)]
        )
    elif op == "Slice":
        axis, end = w.one_of((1, c - 1), (1, c), (2, h), (3, width - 1))
        w.node(op, [read, *(w.constant([v], np.int64) for v in (1, end, axis, 1))])
    elif op == "DepthToSpace":
        w.node(op, [read], blocksize=2)
    elif op == "Squeeze":
        (flat,) = w.node(op, [read, w.constant([0], np.int64)], inner=True)
        w.node("Unsqueeze", [flat, w.constant([0], np.int64)])
    else:
        (flat,) = w.node("Reshape", [read, w.constant([1, c, h * width], np.int64)], inner=True)
        w.node("Reshape", [flat, w.constant([1, c, width, h], np.int64)])


def _spatial(w: _Writer) -> None:
    op = w.one_of("MaxPool", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Pad", "nearest", "linear")
    read = w.pick(lambda v: min(v.shape[2:]) >= 4 and max(v.shape[2:]) <= SIZE and v.shape[1] <= 32)
    if not read:
        return
    if op in ("MaxPool", "AveragePool"):
        size, step, pad = w.one_of((2, 2, 0), (3, 1, 1))
        own = {"count_include_pad": w.one_of(0, 1)} if op == "AveragePool" else {}
        w.node(op, [read], kernel_shape=[size] * 2, strides=[step] * 2, pads=[pad] * 4, **own)
    elif op == "GlobalAveragePool":
        (mean,) = w.node(op, [read])
        w.node("Add", [read, mean])
    elif op == "Pad":
        mode = w.one_of("constant", "constant", "reflect", "edge")
        extra = [w.constant(w.one_of(0.0, 0.0, 1.0))] if mode == "constant" else []
        w.node(op, [read, w.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), *extra], mode=mode)
    else:
        where = "asymmetric" if op == "nearest" else "half_pixel"
        own = {"nearest_mode": "floor"} if op == "nearest" else {}
        scales = w.constant([1, 1, 2, 2])
        w.node("Resize", [read, "", scales], mode=op, coordinate_transformation_mode=where, **own)


_LAYERS = (_conv, _conv, _conv, _matmul)
_GLUE = (
    _cat,
    _cat,
    _cat,
    _split,
    _merge,
    _merge,
    _pointwise,
    _pointwise,
    _move,
    _spatial,
    _spatial,
    _quantize,
    _quantize,
)


def graph(seed: int, levels: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """(a graph whose int8 weights have at most so many levels, its example input). The last step is a layer."""
    w = _Writer(seed, levels)
    for _ in range(int(w.rng.integers(3, 9))):
        w.one_of(*(_LAYERS if w.chance(0.3) else _GLUE))(w)
    _conv(w)
    late = [n for n in w.values if n in w.unread and n != "x"][::-1][:MOST_OUTPUTS]
    nodes = _needed(w.nodes, set(late))
    read = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        f"graph {seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, w.values["x"].shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, w.values[n].shape) for n in late],
        [t for t in w.stored if t.name in read],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 9
    onnx.checker.check_model(model, full_check=True)
    return model, {"x": w.values["x"]}


def _needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]

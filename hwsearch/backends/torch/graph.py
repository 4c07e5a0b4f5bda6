"""An ONNX graph as plain nodes and torch tensors: what is read once, when an engine is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hwsearch.errors import BackendUnavailable

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

DTYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16, 17: torch.float8_e4m3fn,
}  # fmt: skip
"""torch's type of each element type of ONNX (`TensorProto.DataType`) that tensors here may have."""
_BITS = {10: torch.float16, 16: torch.bfloat16, 17: torch.float8_e4m3fn}
_FOUR_BITS = {22: torch.int8, 23: torch.float32}
"""int4 and E2M1 have no type in torch that computes: their values are held in one that has room for them."""


@dataclass(frozen=True)
class Node:
    """One ONNX node. An input that is left out has the name ''. attributes: numbers, strings, lists of them, and tensors.

    sources: names of the nodes that it stands for, where it was put together from several (`fusing`); else empty.
    """

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name or self.outputs[0]} ({f'{self.domain}.' if self.domain else ''}{self.op})"


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run. inputs: (name, shape, type) of each. readers: how often a tensor is read."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    outputs: tuple[str, ...]
    readers: Mapping[str, int]


def read(model: ModelProto) -> Graph:
    """The graph of a model. Raises BackendUnavailable on control flow, on types that torch lacks and on dynamic shapes."""
    graph = model.graph
    constants = {t.name: tensor(t) for t in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant(node)
        else:
            nodes.append(_node(node))
    readers = Counter(name for node in nodes for name in node.inputs)
    readers.update(value.name for value in graph.output)
    return Graph(
        tuple(nodes), constants, _inputs(graph, constants), tuple(v.name for v in graph.output), readers
    )


def _inputs(
    graph: GraphProto, constants: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    found = []
    for value in graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if any(not d.HasField("dim_value") or d.dim_value < 0 for d in dims):
            raise BackendUnavailable(
                f"input {value.name} has a dynamic shape; engines are built for fixed shapes"
            )
        found.append((value.name, tuple(d.dim_value for d in dims), dtype(kind.elem_type, value.name)))
    return tuple(found)


def dtype(kind: int, what: str) -> torch.dtype:
    """torch's type for an element type of ONNX. Raises BackendUnavailable where it has none."""
    if kind not in DTYPES:
        from onnx import TensorProto

        raise BackendUnavailable(
            f"{what} is of type {TensorProto.DataType.Name(kind)}, which torch does not compute with"
        )
    return DTYPES[kind]


def tensor(proto: TensorProto) -> torch.Tensor:
    """A stored tensor, on the CPU. Raises BackendUnavailable on types that torch lacks."""
    from onnx import numpy_helper

    values = np.ascontiguousarray(numpy_helper.to_array(proto)).reshape(tuple(proto.dims))
    kind = proto.data_type
    if kind in _FOUR_BITS:
        return torch.from_numpy(values.astype(np.float32)).to(_FOUR_BITS[kind])
    wanted = dtype(kind, proto.name or "a constant")
    if kind in _BITS:
        bits = np.uint8 if wanted.itemsize == 1 else np.int16
        return torch.from_numpy(values.view(bits).copy()).view(wanted)
    return torch.from_numpy(values.copy())


def _node(node: NodeProto) -> Node:
    from onnx import AttributeProto, helper

    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise BackendUnavailable(
                f"torch cannot run node {node.name} ({node.op_type}): control flow is not supported; make the model take "
                "one path"
            )
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.TENSOR:
            value = tensor(value)
        elif attribute.type == AttributeProto.STRING:
            value = value.decode()
        elif attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
            value = tuple(value)
        elif attribute.type == AttributeProto.STRINGS:
            value = tuple(text.decode() for text in value)
        attributes[attribute.name] = value
    domain = "" if node.domain == "ai.onnx" else node.domain
    return Node(node.name, node.op_type, domain, tuple(node.input), tuple(node.output), attributes)


def _constant(node: NodeProto) -> torch.Tensor:
    (name, value), *_ = _node(node).attributes.items()
    if isinstance(value, torch.Tensor):
        return value
    if name in ("value_int", "value_ints", "value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.int64 if "int" in name else torch.float32)
    raise BackendUnavailable(f"torch cannot run node {node.name} (Constant): its value is of kind {name}")

"""A marked ONNX network made narrower without exporting it again.

The slots of every tensor are known where units begin and end (from the traced graph); in between, operators that move
data are run on slot numbers, all others keep channels where they are. What an operator states as numbers (the sizes of
a Reshape, the parts of a Split) is then stated for the channels that are left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hwsearch.graph.canonical import tensor_attr
from hwsearch.graph.channels import ALWAYS, Axis
from hwsearch.graph.trace import Traced

MOVES = frozenset(
    "Reshape Transpose Slice Split Concat Gather Squeeze Unsqueeze Expand Flatten Tile DepthToSpace SpaceToDepth".split()
)
_LIKE_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OVER_CHANNELS = frozenset("ReduceMean ReduceSum ReduceL1 ReduceL2 ReduceSumSquare".split())
_INDEXED = frozenset(
    "GatherND GatherElements Scatter ScatterND ScatterElements TopK ReverseSequence Compress NonZero Unique Einsum OneHot".split()
)
"""Operators for which the place of an element means something: they do not leave channels where they are."""
_PARAMETERS = frozenset(
    "BatchNormalization InstanceNormalization GroupNormalization PRelu LayerNormalization".split()
)


class NotFollowed(Exception):
    """An operator whose channels are not followed here: export the narrow network instead."""


class OnnxWidths:
    """How channel groups run through a marked ONNX network. Raises NotFollowed."""

    def __init__(self, marked: onnx.ModelProto, traced: Traced) -> None:
        self.marked, self.traced = marked, traced
        self.stored = {t.name: t for t in marked.graph.initializer}
        self.shape = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in (*marked.graph.value_info, *marked.graph.input, *marked.graph.output)
        }
        self.shape |= {name: tuple(t.dims) for name, t in self.stored.items()}
        self.axis: dict[str, Axis] = {}
        self.means: dict[str, Axis] = {}  # nodes that take a mean over channels
        self.sliced: dict[str, Axis] = {}  # stored tensors that the traced graph does not know by name
        for node in marked.graph.node:
            self._follow(node)

    @cached_property
    def paths(self) -> frozenset[str]:
        """Names of stored tensors that are tensors of the traced graph."""
        known = {str(n.target) for n in self.traced.graph.graph.nodes if n.op == "get_attr"}
        for weight, bias in self.traced.paths.values():
            for path in (weight, bias):
                if path is not None and path not in self.stored:
                    raise NotFollowed(f"the exported network does not hold {path} by that name")
        return frozenset(known & set(self.stored))

    def narrow(self, to: Traced, mask: NDArray[np.bool_]) -> onnx.ModelProto:
        """The marked network of `to`, which is `traced` narrowed to the slots of `mask`."""
        model = onnx.ModelProto()
        graph = model.graph
        constants: dict[str, onnx.TensorProto] = {}
        for name, tensor in self.stored.items():
            constants[name] = self._constant(name, tensor, to, mask)
        for node in self.marked.graph.node:
            graph.node.extend(self._of_all(node, self._node(node, mask, constants), mask, constants))
        graph.initializer.extend(constants.values())
        graph.name = self.marked.graph.name
        graph.input.extend(self.marked.graph.input)
        graph.output.extend(self.marked.graph.output)
        model.opset_import.extend(self.marked.opset_import)
        model.functions.extend(self.marked.functions)
        model.ir_version = self.marked.ir_version
        return model

    # ---- stored tensors

    def _constant(
        self, name: str, tensor: onnx.TensorProto, to: Traced, mask: NDArray[np.bool_]
    ) -> onnx.TensorProto:
        if name in self.paths:
            old, new = tensor_attr(self.traced.graph, name), tensor_attr(to.graph, name)
            return tensor if new is old else _as_proto(new, name)
        axis = self.sliced.get(name)
        if axis is None or mask[axis.slots].all():
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).take(axis.kept(mask), axis.axis), name)

    # ---- operators

    def _follow(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Mark":
            role, unit, call, port = json.loads(helper.get_node_attr_value(node, "tag"))
            if role in ("weight", "stored"):
                return
            site = self.traced.sites[unit][call]
            of = site.node if role == "out" else self._nodes[site.node].args[site.activations[port]].name
            self._set(node.output[0], self._traced(of))
            return
        name = node.name.split("|")
        if node.op_type in _LIKE_PRODUCTS and len(name) == 3 and name[0] in self.traced.sites:
            site = self.traced.sites[name[0]][int(name[1])]
            axis = self._traced(site.node)
            if axis is not None and node.output[0] in self.shape:
                behind = axis.axis - len(self.traced.channels.shapes[site.node][0])
                axis = Axis(len(self.shape[node.output[0]]) + behind, axis.slots)
            self._set(node.output[0], axis)
            self._parameters(node, axis, node.input[2:])
            return
        came = [(i, self.axis[i]) for i in node.input if i in self.axis]
        if not came:
            return
        if node.op_type in MOVES:
            self._move(node)
        else:
            self._pass(node, came)

    @cached_property
    def _nodes(self) -> dict[str, Any]:
        return {n.name: n for n in self.traced.graph.graph.nodes}

    def _traced(self, node: str) -> Axis | None:
        own = self.traced.channels.nodes.get(node, [[]])[0]
        return own[0] if own else None

    def _set(self, tensor: str, axis: Axis | None) -> None:
        if axis is None:
            self.axis.pop(tensor, None)
            return
        shape = self.shape.get(tensor)
        if shape is not None and (axis.axis >= len(shape) or shape[axis.axis] != len(axis.slots)):
            raise NotFollowed(
                f"{tensor} has shape {shape}, expected {len(axis.slots)} along axis {axis.axis}"
            )
        self.axis[tensor] = axis

    def _move(self, node: onnx.NodeProto) -> None:
        """The operator itself on slot numbers."""
        feeds: dict[str, NDArray[Any]] = {}
        for name in dict.fromkeys(i for i in node.input if i):
            stated = (
                name in self.stored
                and name not in self.axis
                and self.stored[name].data_type == onnx.TensorProto.INT64
            )
            if stated:
                feeds[name] = numpy_helper.to_array(self.stored[name])
            elif name in self.shape:
                feeds[name] = self._spread(name)
            else:
                raise NotFollowed(f"the shape of {name} is not known")
        inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.INT64, a.shape) for n, a in feeds.items()]
        outputs = [helper.make_tensor_value_info(o, onnx.TensorProto.INT64, None) for o in node.output]
        model = helper.make_model(
            helper.make_graph([node], "move", inputs, outputs),
            opset_imports=[o for o in self.marked.opset_import if not o.domain],
        )
        try:
            results = ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:
            raise NotFollowed(f"{node.op_type} {node.name}: {error}") from error
        for name, labels in zip(node.output, results, strict=True):
            self._set(name, _axis_of(np.asarray(labels), name))

    def _spread(self, name: str) -> NDArray[np.int64]:
        labels = np.zeros(self.shape[name], np.int64)
        axis = self.axis.get(name)
        if axis is not None:
            labels += axis.slots.reshape([-1 if d == axis.axis else 1 for d in range(labels.ndim)])
        return labels

    def _pass(self, node: onnx.NodeProto, came: Sequence[tuple[str, Axis]]) -> None:
        """Channels stay where they are; stored operands along them are cut too."""
        name, axis = came[0]
        if node.op_type in _INDEXED:
            raise NotFollowed(f"{node.op_type} {node.name} picks elements by their places")
        if node.op_type in _OVER_CHANNELS and axis.axis in self._reduced(node, len(self.shape[name])):
            if node.op_type == "ReduceMean":
                self._mean(node, axis)
            return
        for output in node.output:
            if not output:
                continue
            own, into = self.shape.get(name), self.shape.get(output)
            if own is None or into is None:
                raise NotFollowed(f"the shape of {name} or {output} is not known")
            place = axis.axis + (len(into) - len(own))
            if node.op_type.startswith("Reduce") and len(into) < len(own):
                place = axis.axis - sum(d < axis.axis for d in self._reduced(node, len(own)))
            elif len(into) < len(own):
                raise NotFollowed(f"{node.op_type} {node.name} drops an axis")
            if place < 0 or into[place] != len(axis.slots):
                if node.op_type in _PARAMETERS or output != node.output[0]:
                    continue  # statistics
                raise NotFollowed(f"{node.op_type} {node.name} changes the number of channels")
            self._set(output, Axis(place, axis.slots))
        if node.op_type in _PARAMETERS:
            self._parameters(node, axis, node.input[1:])
            return
        into = self.shape[node.output[0]]
        place = self.axis[node.output[0]].axis
        for other in node.input:
            shape = self.shape.get(other, ())
            position = place - (len(into) - len(shape))
            if (
                other in self.stored
                and other not in self.paths
                and position >= 0
                and shape[position] == len(axis.slots) > 1
            ):
                self._slice(other, Axis(position, axis.slots))
            elif (
                other not in self.stored
                and other not in self.axis
                and position >= 0
                and shape[position] == len(axis.slots) > 1
            ):
                raise NotFollowed(f"{node.op_type} {node.name} reads {other}, whose channels are not known")

    def _mean(self, node: onnx.NodeProto, axis: Axis) -> None:
        """A mean that goes on dividing by all channels; that of a norm whose width changes is not followed."""
        rescaled = [self.traced.channels.groups[g] for g in self.traced.channels.rescaled]
        if rescaled and np.isin(axis.slots, np.concatenate(rescaled)).any():
            raise NotFollowed(f"{node.op_type} {node.name} is of a norm")
        self.means[node.name] = axis

    def _of_all(
        self,
        node: onnx.NodeProto,
        new: onnx.NodeProto,
        mask: NDArray[np.bool_],
        constants: dict[str, onnx.TensorProto],
    ) -> list[onnx.NodeProto]:
        """A mean over the channels that are left, as that over all of them."""
        axis = self.means.get(node.name)
        if axis is None or mask[axis.slots].all():
            return [new]
        share, mean = f"{node.name}/share", f"{node.output[0]}/left"
        value = np.asarray(len(axis.kept(mask)) / len(axis.slots), np.float32)
        constants[share] = numpy_helper.from_array(value, share)
        new.output[0] = mean
        base, _, op = node.name.rpartition("|")
        return [new, helper.make_node("Mul", [mean, share], [node.output[0]], name=f"{base}|Mul.{op}")]

    def _reduced(self, node: onnx.NodeProto, rank: int) -> list[int]:
        for attribute in node.attribute:
            if attribute.name == "axes":
                return [d % rank for d in attribute.ints]
        if len(node.input) > 1 and node.input[1] in self.stored:
            return [int(d) % rank for d in numpy_helper.to_array(self.stored[node.input[1]])]
        raise NotFollowed(f"{node.op_type} {node.name} reduces over all axes")

    def _parameters(self, node: onnx.NodeProto, axis: Axis | None, names: Sequence[str]) -> None:
        for name in names:
            shape = self.shape.get(name, ())
            if (
                axis is not None
                and name in self.stored
                and name not in self.paths
                and len(axis.slots) in shape
            ):
                self._slice(name, Axis(shape.index(len(axis.slots)), axis.slots))

    def _slice(self, name: str, axis: Axis) -> None:
        known = self.sliced.setdefault(name, axis)
        if known.axis != axis.axis or not np.array_equal(known.slots, axis.slots):
            raise NotFollowed(f"{name} is read along two channel groups")

    # ---- the numbers that operators state

    def _node(
        self, node: onnx.NodeProto, mask: NDArray[np.bool_], constants: dict[str, onnx.TensorProto]
    ) -> onnx.NodeProto:
        if node.op_type == "Mark":
            return node
        new = onnx.NodeProto()
        new.CopyFrom(node)
        own = self.axis.get(node.output[0])
        came = self.axis.get(node.input[0]) if node.input else None

        def state(position: int, values: Sequence[int]) -> None:
            name = f"{node.name}/stated{position}"
            constants[name] = numpy_helper.from_array(np.asarray(values, np.int64), name)
            new.input[position] = name

        def stated(position: int) -> list[int]:
            name = node.input[position]
            if name not in self.stored:
                raise NotFollowed(f"{node.op_type} {node.name} computes its sizes")
            return [int(v) for v in numpy_helper.to_array(self.stored[name]).ravel()]

        if node.op_type in ("Reshape", "Expand") and own is not None:
            sizes = stated(1)
            place = own.axis - (len(self.shape[node.output[0]]) - len(sizes))
            if place >= 0 and sizes[place] not in (-1, 1):
                sizes[place] = len(own.kept(mask))
            state(1, sizes)
        elif node.op_type == "Resize" and own is not None and len(node.input) > 3 and node.input[3]:
            sizes = stated(3)
            if len(sizes) == len(self.shape[node.output[0]]):
                sizes[own.axis] = len(own.kept(mask))
                state(3, sizes)
        elif node.op_type == "Split" and came is not None:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if axis % len(self.shape[node.input[0]]) == came.axis:
                parts = [self._left(o, came.axis, mask) for o in node.output]
                del new.input[1:]
                new.input.append("")
                state(1, parts)
                kept = [a for a in new.attribute if a.name != "num_outputs"]
                del new.attribute[:]
                new.attribute.extend(kept)
        elif node.op_type == "Slice" and came is not None:
            self._slice_node(node, came, mask, state, stated)
        elif node.op_type == "Gather" and came is not None:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if axis % len(self.shape[node.input[0]]) == came.axis:
                number = np.cumsum(mask[came.slots]) - 1
                values = numpy_helper.to_array(self.stored[node.input[1]])
                left = values[mask[came.slots[values]]] if values.ndim else values
                name = f"{node.name}/stated1"
                constants[name] = numpy_helper.from_array(np.asarray(number[left], np.int64), name)
                new.input[1] = name
        elif node.op_type in ("Conv", "ConvTranspose"):
            self._groups(new, node.name.split("|")[0], mask)
        elif node.op_type == "GroupNormalization" and came is not None:
            for attribute in new.attribute:
                if attribute.name == "num_groups":
                    attribute.i = attribute.i * len(came.kept(mask)) // len(came.slots)
        return new

    def _left(self, tensor: str, axis: int, mask: NDArray[np.bool_]) -> int:
        own = self.axis.get(tensor)
        return self.shape[tensor][axis] if own is None else len(own.kept(mask))

    def _slice_node(
        self, node: onnx.NodeProto, came: Axis, mask: NDArray[np.bool_], state: Any, stated: Any
    ) -> None:
        rank = len(self.shape[node.input[0]])
        starts, ends = stated(1), stated(2)
        axes = stated(3) if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
        steps = stated(4) if len(node.input) > 4 and node.input[4] else [1] * len(starts)
        for i, axis in enumerate(axes):
            if axis % rank == came.axis:
                if steps[i] != 1:
                    raise NotFollowed(f"Slice {node.name} takes channels in steps")
                size = len(came.slots)
                first, last = (int(np.clip(v + size if v < 0 else v, 0, size)) for v in (starts[i], ends[i]))
                starts[i], ends[i] = int(mask[came.slots[:first]].sum()), int(mask[came.slots[:last]].sum())
        state(1, starts)
        state(2, ends)

    def _groups(self, node: onnx.NodeProto, unit: str, mask: NDArray[np.bool_]) -> None:
        """A depthwise convolution has as many groups as channels; any other keeps the number of its groups."""
        if unit not in self.traced.sites:
            return
        axis = self._traced(self._nodes[self.traced.sites[unit][0].node].args[0].name)
        for attribute in node.attribute:
            if attribute.name == "group" and axis is not None and attribute.i == len(axis.slots) > 1:
                attribute.i = len(axis.kept(mask))


def _axis_of(labels: NDArray[np.int64], name: str) -> Axis | None:
    if not (labels != ALWAYS).any():
        return None
    for axis in range(labels.ndim):
        first = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
        if (first == first[:, :1]).all():
            if labels.shape[axis] == 1 and labels.ndim > 1 and not (labels == labels.flat[0]).all():
                continue
            return Axis(axis, first[:, 0])
    raise NotFollowed(f"channels of {name} do not lie along one axis")


def _as_proto(value: torch.Tensor, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value.detach().numpy()), name)

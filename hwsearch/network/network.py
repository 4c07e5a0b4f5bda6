"""The traced model as plain data: units, the edges between them, channel groups. No torch here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

STORED_OPS = ("embedding", "recurrent", "constant")
"""Units that are stored tensors: read by a look-up, by an LSTM or GRU, or by any other operator that is no product of a unit."""


@dataclass(frozen=True)
class Way:
    """Where a channel group runs through a unit: `each` indices of `axis` of `tensor` belong to each of its slots.

    tensor: `weight`, `output`, `input0` or `input1`.
    """

    group: str
    tensor: str
    axis: int
    each: int


@dataclass(frozen=True)
class Unit:
    """One compressible layer with the operators that a runtime fuses into it.

    name: module path of its weight (`layer1.0.conv1`), or of the module around a MatMul of two activations.
    op: `conv1d`, `conv2d`, `conv3d`, `conv_transpose1d`, `conv_transpose2d`, `linear` or `matmul`; one of `STORED_OPS` where it
        is a stored tensor, of which nothing may change but how it is stored.
    input_shapes, output_shape: of its first call, batch included; empty of a stored tensor.
    weight_shape: as stored; empty for a MatMul of two activations.
    out_axis: the axis of the weight that holds output channels (the axis of per-channel scales).
    attributes: stride, padding, dilation, groups, as the operator states them.
    fused: the elementwise operators that follow it and that it owns, in order.
    calls: how often the network runs it (tied weights make one unit).
    macs: multiply-accumulates of all calls together.
    other_bytes: bytes stored beside the weight at every precision (the bias, in fp32).
    ways: the channel groups that its shapes depend on.
    tied: whether something else than its calls reads its weight as well (an embedding), which is then stored once for both
        where both can read it.
    float_only: why its activations cannot be quantized on the task's data; empty where they can.
    """

    name: str
    op: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...] = ()
    out_axis: int = 0
    attributes: tuple[tuple[str, str], ...] = ()
    fused: tuple[str, ...] = ()
    calls: int = 1
    macs: int = 0
    other_bytes: int = 0
    ways: tuple[Way, ...] = ()
    tied: bool = False
    float_only: str = field(default="", compare=False)

    @property
    def stored(self) -> bool:
        """Whether it is a stored tensor and not a layer."""
        return self.op in STORED_OPS

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Channel groups whose widths its work depends on: on its input side first, then on its output side."""
        sides = [[w.group for w in self.ways if (w.tensor == "output") == out] for out in (False, True)]
        return tuple(dict.fromkeys(sides[0] + sides[1]))

    def narrow(self, widths: Mapping[str, int], channels: Mapping[str, int]) -> Unit:
        """The unit where only `widths[g]` of the `channels[g]` slots of each group are left.

        Shapes, weights, bias and multiply-accumulates are exact.
        """
        cut = [w for w in self.ways if widths.get(w.group, channels[w.group]) != channels[w.group]]
        if not cut:
            return self
        shapes = {"weight": list(self.weight_shape), "output": list(self.output_shape)}
        shapes |= {f"input{i}": list(s) for i, s in enumerate(self.input_shapes)}
        for way in cut:
            shapes[way.tensor][way.axis] -= way.each * (channels[way.group] - widths[way.group])
        attributes = dict(self.attributes)
        if self.op.startswith("conv"):
            before, left = self.input_shapes[0][self.channel_axis], shapes["input0"][self.channel_axis]
            if attributes.get("groups", "1") == str(before) != "1":  # depthwise
                attributes["groups"] = str(left)
        inputs = tuple(tuple(shapes[f"input{i}"]) for i in range(len(self.input_shapes)))
        output, weight = tuple(shapes["output"]), tuple(shapes["weight"])
        whole = macs(self.op, self.input_shapes, self.output_shape, self.weight_shape)
        own = macs(self.op, inputs, output, weight)
        axis = self.channel_axis if self.op.startswith("conv") else -1
        bias = self.other_bytes * output[axis] // self.output_shape[axis] if self.other_bytes else 0
        return replace(
            self,
            input_shapes=inputs,
            output_shape=output,
            weight_shape=weight,
            attributes=tuple(sorted(attributes.items())),
            macs=self.macs * own // whole if whole else 0,
            other_bytes=bias,
        )

    @property
    def channel_axis(self) -> int:
        """The axis of a convolution's input that holds channels."""
        return len(self.input_shapes[0]) - len(self.weight_shape) + 1

    @property
    def in_axis(self) -> int:
        """The axis of the weight that holds what the unit reads; of each group, where a convolution has several."""
        return 0 if self.op == "matmul" or "transpose" in self.op else 1

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        count = 1 if self.weight_shape else 0
        for size in self.weight_shape:
            count *= size
        return count

    @property
    def out_channels(self) -> int:
        """Number of scales of an int8 weight: one an output channel, or a row of a stored tensor (0 where there is no weight)."""
        if self.stored:
            return math.prod(self.weight_shape[:-1])
        return self.weight_shape[self.out_axis] if self.weight_shape else 0

    @cached_property
    def signature(self) -> str:
        """Units of one signature are the same work for a runtime, and share evidence."""
        parts = (self.op, self.input_shapes, self.output_shape, self.weight_shape, self.attributes, self.fused,
                 self.calls, *(["tied"] if self.tied else []))  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Edge:
    """A tensor that flows from unit `src` into unit `dst`; converting its precision or layout costs time.

    tensor_bytes: its size in fp32.
    via: the operators of neither unit that it passes (pools, concats, reshapes, norms).
    fused: it enters an operator fused into `dst` (a residual add), not `dst`'s own input.
    """

    src: str
    dst: str
    tensor_bytes: int
    via: tuple[str, ...] = ()
    fused: bool = False

    @property
    def name(self) -> str:
        return f"{self.src}->{self.dst}"


def macs(
    op: str, inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...], weight: tuple[int, ...]
) -> int:
    """Multiply-accumulates of one call of a unit."""
    if op in STORED_OPS:
        return 0
    if op.startswith("conv_transpose"):
        return math.prod(inputs[0]) * math.prod(weight[1:])
    if op.startswith("conv"):
        return math.prod(output) * math.prod(weight[1:])
    return math.prod(output) * inputs[0][-1]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be pruned together.

    name: that of the first unit that produces them. channels: how many slots it has; a slot is what is kept or removed as
    one: a channel of everything tied to it, or an attention head. producers: units whose output channels they are.
    consumers: units whose weights read them. fixed_bytes: stored for each slot outside of units (norms).
    """

    name: str
    channels: int
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    fixed_bytes: int = 0


@dataclass(frozen=True)
class Network:
    """Units in the order in which they run, the edges between them, and what is stored beside them.

    groups: the channel groups that may be made narrower. blocked: why other channels may not, by module.
    fixed_bytes: parameters and buffers of no unit (norms, integers), as they are. fixed: the largest of them, each with its
    bytes and why it stays.
    weights_digest: hash of all parameters; two networks of one structure may differ in it.
    """

    units: tuple[Unit, ...]
    edges: tuple[Edge, ...] = ()
    groups: tuple[ChannelGroup, ...] = ()
    fixed_bytes: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    weights_digest: str = ""
    name: str = field(default="", compare=False)
    blocked: tuple[str, ...] = field(default=(), compare=False)
    fixed: tuple[tuple[str, int, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        names = [unit.name for unit in self.units]
        if len(set(names)) != len(names):
            raise ValueError(f"unit names are not unique: {names}")

    @cached_property
    def by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(unit.macs for unit in self.units)

    def __getitem__(self, name: str) -> Unit:
        return self.by_name[name]

    @cached_property
    def channels(self) -> dict[str, int]:
        """Slots of each channel group: the width of the dense network."""
        return {g.name: g.channels for g in self.groups}

    @cached_property
    def between(self) -> dict[tuple[str, str], tuple[Edge, ...]]:
        """(source, destination) -> the edges from one to the other."""
        found: dict[tuple[str, str], tuple[Edge, ...]] = {}
        for edge in self.edges:
            found[edge.src, edge.dst] = (*found.get((edge.src, edge.dst), ()), edge)
        return found

    @cached_property
    def _narrowed(self) -> dict[Any, Unit]:
        return {}

    def unit_at(self, name: str, widths: Mapping[str, int]) -> Unit:
        """A unit as it is where only `widths[g]` slots are left of each group named."""
        unit = self.by_name[name]
        key = name, *(widths.get(g, self.channels[g]) for g in unit.groups)
        if key not in self._narrowed:
            self._narrowed[key] = unit.narrow(widths, self.channels)
        return self._narrowed[key]

    def share(self, unit: str, widths: Mapping[str, int]) -> float:
        """Of its whole size how much a unit's output has at some widths."""
        own, dense = self.unit_at(unit, widths).output_shape, self.by_name[unit].output_shape
        return math.prod(own) / (math.prod(dense) or 1)

    def edges_at(self, widths: Mapping[str, int]) -> tuple[Edge, ...]:
        """The edges with the tensors that their sources put out at some widths."""
        share = {e.src: self.share(e.src, widths) for e in self.edges}
        return tuple(replace(e, tensor_bytes=round(e.tensor_bytes * share[e.src])) for e in self.edges)

    def narrow(self, widths: Mapping[str, int]) -> Network:
        """The network with `widths[g]` slots left of each group named; its groups have that many."""
        removed = {g.name: g.channels - widths.get(g.name, g.channels) for g in self.groups}
        if not any(removed.values()):
            return self
        return replace(
            self,
            units=tuple(self.unit_at(u.name, widths) for u in self.units),
            edges=self.edges_at(widths),
            groups=tuple(replace(g, channels=g.channels - removed[g.name]) for g in self.groups),
            fixed_bytes=self.fixed_bytes - sum(g.fixed_bytes * removed[g.name] for g in self.groups),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the structure (not of the weights): what a latency table belongs to."""
        parts = (
            [(u.name, u.signature) for u in self.units],
            [asdict(e) for e in self.edges],
            self.input_shapes,
            [asdict(g) for g in self.groups],
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def model(self) -> str:
        """Hash of what stays of the structure at any input shape: names, operators, weights' shapes and strides of units."""
        kept = ("stride", "dilation", "groups")
        parts = [
            (u.name, u.op, u.weight_shape, [(k, v) for k, v in u.attributes if k in kept]) for u in self.units
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form; `from_json` is its inverse."""
        data = asdict(self)
        for unit in data["units"]:
            if not unit["float_only"]:
                del unit["float_only"]  # as versions without it wrote
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Network:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError on anything else."""
        return Network(
            units=tuple(
                Unit(**{**u, "input_shapes": tuple(map(tuple, u["input_shapes"])),
                        "output_shape": tuple(u["output_shape"]), "weight_shape": tuple(u["weight_shape"]),
                        "attributes": tuple((k, v) for k, v in u["attributes"]), "fused": tuple(u["fused"]),
                        "ways": tuple(Way(**w) for w in u.get("ways", ()))})
                for u in data["units"]
            ),
            edges=tuple(Edge(**{**e, "via": tuple(e["via"])}) for e in data["edges"]),
            groups=tuple(
                ChannelGroup(**{**g, "producers": tuple(g["producers"]), "consumers": tuple(g["consumers"])})
                for g in data["groups"]
            ),
            fixed_bytes=int(data["fixed_bytes"]),
            input_shapes=tuple(map(tuple, data["input_shapes"])),
            weights_digest=data["weights_digest"],
            name=data["name"],
            blocked=tuple(data.get("blocked", ())),
            fixed=tuple((str(p), int(n), str(why)) for p, n, why in data.get("fixed", ())),
        )  # fmt: skip

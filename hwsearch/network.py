"""The traced model as plain data: units, the edges between them, channel groups. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Unit:
    """One compressible layer with the operators that a runtime fuses into it.

    name: module path of its weight (`layer1.0.conv1`), or of the module around a MatMul of two activations.
    op: `conv1d`, `conv2d`, `conv3d`, `conv_transpose1d`, `conv_transpose2d`, `linear` or `matmul`.
    input_shapes, output_shape: of its first call, batch included.
    weight_shape: as stored; empty for a MatMul of two activations.
    out_axis: the axis of the weight that holds output channels (the axis of per-channel scales).
    attributes: stride, padding, dilation, groups, as the operator states them.
    fused: the elementwise operators that follow it and that it owns, in order.
    calls: how often the network runs it (tied weights make one unit).
    macs: multiply-accumulates of all calls together.
    other_bytes: bytes stored beside the weight at every precision (the bias, in fp32).
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

    @property
    def weight_count(self) -> int:
        """Number of weights."""
        count = 1 if self.weight_shape else 0
        for size in self.weight_shape:
            count *= size
        return count

    @property
    def out_channels(self) -> int:
        """Number of per-channel scales of the weight (0 where there is no weight)."""
        return self.weight_shape[self.out_axis] if self.weight_shape else 0

    @cached_property
    def signature(self) -> str:
        """Units of one signature are the same work for a runtime, and share evidence."""
        parts = (self.op, self.input_shapes, self.output_shape, self.weight_shape, self.attributes, self.fused,
                 self.calls)  # fmt: skip
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


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be pruned together."""

    name: str
    units: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class Network:
    """Units in the order in which they run, the edges between them, and what is stored beside them.

    fixed_bytes: parameters and buffers of no unit (norms, embeddings), in fp32.
    weights_digest: hash of all parameters; two networks of one structure may differ in it.
    """

    units: tuple[Unit, ...]
    edges: tuple[Edge, ...] = ()
    groups: tuple[ChannelGroup, ...] = ()
    fixed_bytes: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    weights_digest: str = ""
    name: str = field(default="", compare=False)

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
    def fingerprint(self) -> str:
        """Hash of the structure (not of the weights): what a latency table belongs to."""
        parts = (
            [(u.name, u.signature) for u in self.units],
            [asdict(e) for e in self.edges],
            self.input_shapes,
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Network:
        """Inverse of `to_json`. Raises KeyError, TypeError or ValueError on anything else."""
        return Network(
            units=tuple(
                Unit(**{**u, "input_shapes": tuple(map(tuple, u["input_shapes"])),
                        "output_shape": tuple(u["output_shape"]), "weight_shape": tuple(u["weight_shape"]),
                        "attributes": tuple((k, v) for k, v in u["attributes"]), "fused": tuple(u["fused"])})
                for u in data["units"]
            ),
            edges=tuple(Edge(**{**e, "via": tuple(e["via"])}) for e in data["edges"]),
            groups=tuple(ChannelGroup(**{**g, "units": tuple(g["units"])}) for g in data["groups"]),
            fixed_bytes=int(data["fixed_bytes"]),
            input_shapes=tuple(map(tuple, data["input_shapes"])),
            weights_digest=data["weights_digest"],
            name=data["name"],
        )  # fmt: skip

"""A device with a known latency law and a clock of its own: what it measures can be compared with the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypedDict, Unpack

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.base import Array, BuildOptions, NodeTime, TensorSpec, check_arrays, example_arrays
from hwsearch.backends.nodenames import unit_of
from hwsearch.errors import BackendUnavailable
from hwsearch.network.network import Edge, Network
from hwsearch.network.variants import INT8_BITS, Variant, executes_quantized
from hwsearch.testing.reference import dynamic_quantize

Pair = tuple[bool, bool]
"""Whether the producer and the consumer of an edge quantize their activations."""

GRAIN = 8
"""Channels that the simulated kernels work on at once."""

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")


@dataclass(frozen=True)
class Size:
    """What the law sees of a unit: its input and output channels in either order, and elements of its output."""

    channels: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class LatencyLaw:
    """T(a) = rest + sum over units t[u, precision] * stairs[u] + sum over edges (fixed + per_byte * bytes)[class pair].

    All in ns. A narrower unit takes the share that is left of its input channels times that of its output channels, both rounded up
    to GRAIN: a staircase.

    Args:
        units: unit -> {`Variant.executed`: time of all its calls at whole widths}.
        edges: those of the network.
        boundaries: class pair -> (ns, ns for each byte of the edge's fp32 tensor); a pair that is not there costs nothing.
        rest_ns: paid by the whole network only.
        end_ns: paid by a unit for each of its edges that leads out of a part of the network (layout changes), hidden in its node.
        dispatch_ns: paid by every inference, in no node.
        node_ns: paid by every node, as where threads wait for each other after each.
        whole: of each unit, the size that `units` is the time of.
    """

    units: Mapping[str, Mapping[str, float]]
    edges: Sequence[Edge] = ()
    boundaries: Mapping[Pair, tuple[float, float]] = field(default_factory=dict)
    rest_ns: float = 0.0
    end_ns: float = 0.0
    dispatch_ns: float = 0.0
    node_ns: float = 0.0
    whole: Mapping[str, Size] = field(default_factory=dict)

    @staticmethod
    def random(
        network: Network,
        seed: int = 0,
        *,
        precisions: Sequence[str] = ("fp32", "int8"),
        unit_ns: float = 50_000.0,
    ) -> LatencyLaw:
        """Draw a law: units equal where their signatures are, boundaries that cost a large part of a unit.

        Args:
            network: the network to have a law for.
            seed: of the draw.
            precisions: those that units execute in.
            unit_ns: about the time of a unit in fp32.

        Returns:
            The law.
        """
        rng = np.random.default_rng(seed)
        speed = dict.fromkeys(precisions, (0.4, 0.7)) | {"fp32": (1.0, 1.0), "int8": (0.25, 0.8)}
        of_signature: dict[str, dict[str, float]] = {}
        for unit in network.units:
            if unit.signature not in of_signature:
                dense = unit_ns * float(rng.lognormal(0.0, 0.6))
                of_signature[unit.signature] = {p: dense * float(rng.uniform(*speed[p])) for p in precisions}
        sizes = [edge.tensor_bytes for edge in network.edges] or [1]
        per_byte = 0.15 * unit_ns / float(np.mean(sizes))
        return LatencyLaw(
            units={unit.name: of_signature[unit.signature] for unit in network.units},
            edges=network.edges,
            boundaries={
                (False, True): (0.10 * unit_ns, per_byte),
                (True, False): (0.15 * unit_ns, 1.5 * per_byte),
                (True, True): (0.0, 0.1 * per_byte),
            },
            rest_ns=0.5 * unit_ns,
            whole=sizes_of(network),
        )

    def stairs(self, unit: str, sizes: Mapping[str, Size]) -> float:
        """The share of its time at whole widths that a unit takes.

        Args:
            unit: its name.
            sizes: sizes of the units that may be narrower.

        Returns:
            1 where the unit is not in `sizes`.
        """
        if unit not in sizes:
            return 1.0
        own, dense = (math.prod(-(-n // GRAIN) for n in s.channels) for s in (sizes[unit], self.whole[unit]))
        return own / dense

    def boundary_ns(self, edge: Edge, pair: Pair) -> float:
        """What one edge costs between units of two classes.

        Args:
            edge: the edge.
            pair: whether its producer and its consumer quantize.

        Returns:
            Time in ns.
        """
        fixed, per_byte = self.boundaries.get(pair, (0.0, 0.0))
        return fixed + per_byte * edge.tensor_bytes

    def time_ns(self, precisions: Mapping[str, str], sizes: Mapping[str, Size] | None = None) -> float:
        """Time of a network of some units; of the whole one if all are there.

        Args:
            precisions: unit -> what it executes in.
            sizes: of the units that are narrower.

        Returns:
            Time of one inference in ns.
        """
        return self.dispatch_ns + sum(node.time_ns for node in self.nodes(precisions, sizes=sizes))

    def nodes(
        self,
        precisions: Mapping[str, str],
        sources: Mapping[str, tuple[str, ...]] | None = None,
        sizes: Mapping[str, Size] | None = None,
    ) -> list[NodeTime]:
        """What a runtime would record: a node for each unit, and a conversion node for every other edge.

        The boundaries of the edges between are folded into the unit that consumes them, as runtimes do at will.

        Args:
            precisions: unit -> what it executes in.
            sources: for each unit the names of its ONNX nodes.
            sizes: of the units that are narrower.

        Returns:
            The nodes with their times.
        """
        sizes = sizes or {}
        times = {u: self.units[u][precision] * self.stairs(u, sizes) for u, precision in precisions.items()}
        conversions = []
        for index, edge in enumerate(self.edges):
            inside = [unit for unit in (edge.src, edge.dst) if unit in precisions]
            if len(inside) < 2:
                times.update({unit: times[unit] + self.end_ns for unit in inside})
                continue
            if edge.src in sizes:
                left = sizes[edge.src].output / self.whole[edge.src].output
                edge = replace(edge, tensor_bytes=round(edge.tensor_bytes * left))
            pair = executes_quantized(precisions[edge.src]), executes_quantized(precisions[edge.dst])
            cost = self.boundary_ns(edge, pair)
            if cost and index % 2 == 0:
                name = f"{edge.src}|0|out_{edge.dst}|0|in_Reorder_{index}"
                conversions.append(NodeTime(name, "Reorder", (), precisions[edge.dst], cost))
            else:
                times[edge.dst] += cost
        nodes = [
            NodeTime(
                f"simulated_{i}",
                "Layer",
                (sources or {}).get(unit, (f"{unit}|0|Layer",)),
                precisions[unit],
                time,
            )
            for i, (unit, time) in enumerate(times.items())
        ]
        if self.rest_ns and set(precisions) == set(self.units):
            conversions.append(NodeTime("simulated_rest", "Rest", (), "fp32", self.rest_ns))
        return [replace(node, time_ns=node.time_ns + self.node_ns) for node in nodes + conversions]


def sizes_of(network: Network, widths: Mapping[str, int] | None = None) -> dict[str, Size]:
    """The size of each unit at some widths.

    Args:
        network: the network.
        widths: slots kept of each channel group; whole where a group is not there.

    Returns:
        Unit -> size.
    """
    units = [network.unit_at(u.name, widths or {}) for u in network.units]
    return {u.name: Size(u.weight_shape[:2], math.prod(u.output_shape)) for u in units}


class Behaviour(TypedDict, total=False):
    """How a simulated device behaves; all of it may be left out.

    Attributes:
        bases: Base precisions, the preferred one first. ("fp32",)
        int8: Whether int8 is offered. (True)
        more: Variants offered beside the base and int8, N:M ones in the base precision or int8 or fp8.
        noise: Relative standard deviation of each inference. `build_noise`: of each engine, the same in all its inferences.
            `node_noise`: of each node's counter.
        drift: The machine's slowness after so many simulated seconds (1.0 is none).
        wander: Slowness of one network after so many simulated seconds, by a key of what it is (1.0 is none): ratios drift.
        failing: Numbers of the builds, from 0, that raise BackendUnavailable.
        refused: Units that execute in the base precision whatever is asked.
        build_ns: Simulated time of a build.
        quantize_outputs: As for a backend.
        watts: Power drawn while a node of each precision runs; without it nothing is counted.
        seed: Of all noise.
        int8_bits: Of int8 weights, as if it summed products of more bits inexactly.
    """

    bases: tuple[str, ...]
    int8: bool
    more: Sequence[str]
    noise: float
    build_noise: float
    node_noise: float
    drift: Callable[[float], float] | None
    wander: Callable[[float, str], float] | None
    failing: Collection[int]
    refused: Collection[str]
    build_ns: int
    quantize_outputs: bool
    watts: Mapping[str, float] | None
    seed: int
    int8_bits: int


class SimulatedBackend:
    """Keeps `hwsearch.backends.base.Backend` without a runtime; its engines advance `clock` instead of taking time.

    Outputs are computed by `onnx.reference`, in fp32 whatever the base.

    Args:
        law: the time of every network.
        behaviour: what differs from a quiet device with fp32 and int8; see `Behaviour`.

    Raises:
        TypeError: an argument that `Behaviour` does not have.
    """

    name = "simulated"
    weight_storage = True

    def __init__(self, law: LatencyLaw, **behaviour: Unpack[Behaviour]) -> None:
        self.law, self.quantize_outputs = law, behaviour.get("quantize_outputs", False)
        self.int8_bits = behaviour.get("int8_bits", INT8_BITS)
        self.noise, self.build_noise = behaviour.get("noise", 0.0), behaviour.get("build_noise", 0.0)
        self.node_noise, self.drift = behaviour.get("node_noise", 0.0), behaviour.get("drift")
        self.wander = behaviour.get("wander")
        self.failing, self.refused = behaviour.get("failing", ()), behaviour.get("refused", ())
        self.build_ns = behaviour.get("build_ns", 0)
        self.builds = 0
        """How many builds were asked for."""
        self._bases = behaviour.get("bases", ("fp32",))
        self._more = [Variant("int8")] * behaviour.get("int8", True) + [Variant.parse(v) for v in behaviour.get("more", ())]
        self._now_ns = 0.0
        self.watts = dict(behaviour.get("watts") or {})
        self.joules = 0.0
        self.meter: Callable[[], float] | None = (lambda: self.joules) if self.watts else None
        """Joules used since the backend was made, where it counts them."""
        self._rng = np.random.default_rng(behaviour.get("seed", 0))
        if unknown := set(behaviour) - set(Behaviour.__annotations__):
            raise TypeError(f"a simulated backend has no {', '.join(sorted(unknown))}")

    def clock(self) -> int:
        """Simulated time since the backend was made.

        Returns:
            Time in ns.
        """
        return round(self._now_ns)

    def advance(self, time_ns: float) -> None:
        """Let simulated time pass.

        Args:
            time_ns: how much, in ns.
        """
        self._now_ns += time_ns

    def jitter(self, deviation: float) -> float:
        """A random factor with median 1.

        Args:
            deviation: about its relative standard deviation.

        Returns:
            1 where the deviation is 0.
        """
        return float(np.exp(deviation * self._rng.standard_normal())) if deviation else 1.0

    def versions(self) -> Mapping[str, str]:
        """Versions of what it runs on.

        Returns:
            A version that never changes.
        """
        return {"simulated": "1"}

    def bases(self) -> tuple[str, ...]:
        """Base precisions, as it was made with.

        Returns:
            Their names, the one to prefer first.
        """
        return self._bases

    def variants(self, base: str) -> tuple[Variant, ...]:
        """What units may ask for under a base.

        Args:
            base: the base precision.

        Returns:
            The base, int8 where it is offered, then what else was given.
        """
        return Variant(base), *self._more

    def build(self, onnx: bytes, options: BuildOptions) -> SimulatedEngine:
        """Compile a network; simulated time passes.

        Args:
            onnx: a serialised ONNX model.
            options: its base has to be one of `bases`.

        Returns:
            The compiled network.

        Raises:
            BackendUnavailable: this build was to fail, the base is not offered, or the network is not of the law.
        """
        number, self.builds = self.builds, self.builds + 1
        self.advance(self.build_ns)
        if number in self.failing:
            raise BackendUnavailable(f"the simulated device fails on build {number}, as it was told to")
        if options.base not in self._bases:
            raise BackendUnavailable(
                f"the simulated device does not execute {options.base}; it offers {', '.join(self._bases)}"
            )
        return SimulatedEngine(self, onnx, options)


class SimulatedEngine:
    """A network whose units are in the precisions that its Q/DQ says, on a SimulatedBackend's clock.

    Args:
        backend: the device.
        data: a serialised ONNX model.
        options: how to compile it.

    Raises:
        BackendUnavailable: the network cannot be read, or has units that are not of the law.
    """

    def __init__(self, backend: SimulatedBackend, data: bytes, options: BuildOptions) -> None:
        self._backend, self._data = backend, data
        try:
            self._model = onnx.load_model_from_string(data)
            onnx.checker.check_model(self._model)
        except Exception as error:
            raise BackendUnavailable(f"the simulated device cannot read the network: {error}") from error
        asked = asked_precisions(
            self._model, options.base, [v.kept for v in backend.variants(options.base) if v.kept]
        )
        unknown = sorted(set(asked) - set(backend.law.units))
        if unknown:
            raise BackendUnavailable(f"the simulated device's law has no units {', '.join(unknown)}")
        self.executed = {unit: options.base if unit in backend.refused else p for unit, p in asked.items()}
        """What each unit executes in, as `Variant.executed` writes it."""
        self.sizes = _sizes(self._model) if backend.law.whole else {}
        """The size of each unit, as its weights and output say."""
        self.time_ns = backend.law.time_ns(self.executed, self.sizes) * backend.jitter(backend.build_noise)
        """Time of one inference without noise or drift."""
        self.key = repr((sorted(self.executed.items()), sorted(self.sizes.items())))
        """What network it is of: the same for another engine of it."""
        stored = {tensor.name for tensor in self._model.graph.initializer}
        self.inputs = [_spec(value) for value in self._model.graph.input if value.name not in stored]
        self.outputs = [_spec(value) for value in self._model.graph.output]
        self.prepare(*example_arrays(self.inputs))

    @property
    def size_bytes(self) -> int:
        """Size of the ONNX model."""
        return len(self._data)

    @cached_property
    def power(self) -> float:
        """Mean watts while it runs."""
        nodes = self._backend.law.nodes(self.executed, sizes=self.sizes)
        return sum(n.time_ns * self._backend.watts[n.precision] for n in nodes) / sum(
            n.time_ns for n in nodes
        )

    @cached_property
    def _reference(self) -> onnx.reference.ReferenceEvaluator:
        from onnx.reference import ReferenceEvaluator

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for opset in model.opset_import:  # onnx.reference knows DequantizeLinear from 19 on
            opset.version = max(opset.version, 19) if not opset.domain else opset.version
        return ReferenceEvaluator(model, new_ops=[dynamic_quantize()])

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run one inference; simulated time passes.

        Args:
            *arrays: inputs of exactly the shapes of `inputs`.

        Returns:
            Outputs, in fp32 whatever the base.

        Raises:
            InvalidInput: another count or other shapes.
        """
        checked = check_arrays(arrays, self.inputs)
        self.run()
        feed = {spec.name: array for spec, array in zip(self.inputs, checked, strict=True)}
        return [np.array(value) for value in self._reference.run(None, feed)]

    def prepare(self, *arrays: Array) -> None:
        """Set the inputs that `run` uses.

        Args:
            *arrays: as for a call.

        Raises:
            InvalidInput: another count or other shapes.
        """
        self._prepared = check_arrays(arrays, self.inputs)

    def run(self) -> None:
        """One inference: simulated time passes, nothing is computed."""
        seconds = self._backend.clock() / 1e9
        drift = self._backend.drift(seconds) if self._backend.drift else 1.0
        drift *= self._backend.wander(seconds, self.key) if self._backend.wander else 1.0
        time_ns = self.time_ns * drift * self._backend.jitter(self._backend.noise)
        self._backend.advance(time_ns)
        if self._backend.watts:
            self._backend.joules += time_ns * 1e-9 * self.power

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        """What a runtime would record.

        Args:
            runs: ignored: the clock needs no mean.

        Returns:
            Nodes with their times, in ns.
        """
        sources: dict[str, tuple[str, ...]] = {}
        for node in self._model.graph.node:
            unit, own = unit_of(node.name)
            if own and not node.op_type.startswith(_CONVERSIONS):
                sources[unit] = (*sources.get(unit, ()), node.name)
        exact = self._backend.law.nodes(self.executed, sources, self.sizes)
        deviation = self._backend.node_noise
        return [
            NodeTime(n.name, n.op, n.sources, n.precision, n.time_ns * self._backend.jitter(deviation))
            for n in exact
        ]


_STORED: dict[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT4E2M1: "nvfp4",
}


def asked_precisions(
    model: onnx.ModelProto, base: str, patterns: Sequence[tuple[int, int]]
) -> dict[str, str]:
    """Unit -> what the types and zeros of what its products read make of it; the base where its calls differ.

    A product is quantized where both of its inputs are dequantized, weight-only where its int4 weight is.
    """
    maker = {output: node for node in model.graph.node for output in node.output}
    stored = {t.name: t for t in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        unit, own = unit_of(node.name)
        if not own or node.op_type not in _PRODUCTS:
            continue
        weight, _ = _source(node.input[1], maker)
        kind = _STORED.get(stored[weight].data_type, "") if weight in stored else ""
        if kind != "int4":
            dequantized = [
                _source(tensor, maker, _MOVES)[1] == "DequantizeLinear" for tensor in node.input[:2]
            ]
            kind = (kind or _activation_kind(node.input[1], maker, stored)) if all(dequantized) else ""
        executed = kind or base
        for n, m in patterns:
            if weight in stored and _follows(numpy_helper.to_array(stored[weight]), node, maker, n, m):
                executed = f"{n}:{m}.{executed}"
                break
        if found.get(unit, executed) != executed:
            executed = base
        found[unit] = executed
    return found


def _source(tensor: str, maker: Mapping[str, onnx.NodeProto], through: Sequence[str] = ()) -> tuple[str, str]:
    """(the tensor that one is made of by moves and conversions, the operator that made it)."""
    through = through or (*_MOVES, *_CONVERSIONS)
    while tensor in maker and maker[tensor].op_type in through:
        tensor = maker[tensor].input[0]
    return tensor, maker[tensor].op_type if tensor in maker else ""


def _activation_kind(
    tensor: str, maker: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> str:
    """What the second activation of a product is quantized to, by the zero point of its DequantizeLinear."""
    node = maker[_source(tensor, maker, _MOVES)[0]]
    return _STORED.get(stored[node.input[2]].data_type, "") if len(node.input) > 2 else ""


def _follows(
    weight: Array, product: onnx.NodeProto, maker: Mapping[str, onnx.NodeProto], n: int, m: int
) -> bool:
    """Whether at most n of every m input channels of a product's weight are not zero."""
    turned = {a.name: a.i for a in product.attribute}.get("transB", 0)
    axis = 1 if product.op_type == "Conv" or turned else 0
    tensor = product.input[1]
    while tensor in maker:
        axis = 1 - axis if maker[tensor].op_type == "Transpose" else axis
        tensor = maker[tensor].input[0]
    moved = np.moveaxis(weight.astype(np.float32), axis, -1)
    if moved.shape[-1] % m:
        return False
    return bool(((moved.reshape(*moved.shape[:-1], -1, m) != 0).sum(-1) <= n).all())


def _sizes(model: onnx.ModelProto) -> dict[str, Size]:
    """Unit -> its size, of the first product that does its work."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.output}
    stored = {t.name: tuple(t.dims) for t in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    sizes: dict[str, Size] = {}
    for node in model.graph.node:
        unit, own = unit_of(node.name)
        if own and node.op_type in _PRODUCTS and unit not in sizes:
            weight = node.input[1]
            while weight in maker and maker[weight].op_type in (*_MOVES, *_CONVERSIONS):
                weight = maker[weight].input[0]
            sizes[unit] = Size(stored.get(weight, ())[:2], math.prod(shapes[node.output[0]]))
    return sizes


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(int(d.dim_value) for d in kind.shape.dim)
    return TensorSpec(value.name, shape, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name)

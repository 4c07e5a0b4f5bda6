"""Traced network + allocation -> ONNX, with Q/DQ where a unit is int8.

The network is exported once with a marker on every tensor that an allocation may change; an allocation then
replaces the markers. The Q/DQ form is the one that OpenVINO, ONNX Runtime and TensorRT all take: symmetric
(zero point 0), int8, weights per output channel, activations per tensor.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils import _pytree as pytree

from hwsearch.canonical import copy_graph, module_path, op_name
from hwsearch.compress.quantize import QuantizedWeight, Ranges, activation_ranges, quantize_weight
from hwsearch.compress.widths import Kept, Weights, narrow
from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.exporting import first_line
from hwsearch.network import Network, Unit
from hwsearch.onnx_widths import NotFollowed, OnnxWidths
from hwsearch.task import Inputs, Task
from hwsearch.trace import Site, Traced, as_call, flat_inputs, trace
from hwsearch.variants import Variant

OPSET = 18
ACTIVATION_BYTES = 2e9
"""What the activations of one calibration batch may take; larger batches are cut."""
MARK = "Mark"
DOMAIN = "hwsearch"


def mark(x: torch.Tensor, role: str, unit: str, call: int, port: int) -> torch.Tensor:
    """A named identity that survives the ONNX exporter."""
    tag = json.dumps([role, unit, call, port])
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARK}", (x,), {"tag": tag}, dtype=x.dtype, shape=x.shape, version=1
    )


def export(traced: Traced) -> onnx.ModelProto:
    """The fp32 network with markers. Raises UntraceableModel naming the module and the operator."""
    graph = copy_graph(traced.graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    for unit, calls in traced.sites.items():
        for index, site in enumerate(calls):
            _mark_site(graph, nodes[site.node], site, unit, index)
    graph.recompile()
    for logger in ("torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._core"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(),
                traced.args,
                kwargs=traced.kwargs or None,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        raise UntraceableModel(_explain(error, traced)) from error
    assert program is not None
    model = program.model_proto
    _name_nodes(model)
    return model


def _mark_site(graph: torch.fx.GraphModule, node: torch.fx.Node, site: Site, unit: str, index: int) -> None:
    ports = [("in", p, a) for p, a in enumerate(site.activations)]
    if site.weight is not None:
        ports.append(("weight", 0, site.weight))
    for role, port, position in ports:
        with graph.graph.inserting_before(node):
            marked = graph.graph.call_function(mark, (node.args[position], role, unit, index, port))
        node.update_arg(position, marked)
    with graph.graph.inserting_after(node):
        marked = graph.graph.call_function(mark, (node, "out", unit, index, 0))
    node.replace_all_uses_with(marked, delete_user_cb=lambda user: user is not marked)


def _explain(error: BaseException, traced: Traced) -> str:
    chain: BaseException | None = error
    texts = []
    while chain is not None:
        texts.append(str(chain))
        chain = chain.__cause__
    why = first_line(RuntimeError(texts[-1]))
    operators = [n for n in traced.graph.graph.nodes if n.op == "call_function"]
    named = {m.rpartition(".")[2] for text in texts for m in re.findall(r"op='([\w.]+)'", text)}
    found = [n for n in operators if any(f"%{n.name} " in text for text in texts)]
    # What the exporter names may be a part of the model's own operator: linalg_eig of linalg_eigvals.
    found = found or [n for n in operators if any(op_name(n).startswith(name) for name in named)]
    if found:
        return (
            f"module {module_path(found[0]) or '(the model itself)'} uses operator {found[0].target}, "
            f"which has no ONNX form: {why}. Replace that operator in the model."
        )
    return f"the traced model has no ONNX form: {why}"


def _tag(node: onnx.NodeProto) -> tuple[str, str, int, int]:
    role, unit, call, port = json.loads(helper.get_node_attr_value(node, "tag"))
    return role, unit, call, port


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name each node after the unit that owns it, so that a runtime's own records lead back to units.

    `UNIT|CALL|op` is a unit's own work; `~UNIT|CALL|op` comes after it; `~|0|op` precedes every unit.
    """
    owner: dict[str, tuple[str, int, bool]] = {}
    order: dict[str, int] = {}
    names: set[str] = set()
    for node in model.graph.node:
        inside = [owner[i] for i in node.input if i in owner and owner[i][2]]
        sources = [owner[i] for i in node.input if i in owner]
        if node.op_type == MARK:
            role, unit, call, _ = _tag(node)
            order.setdefault(unit, len(order))
            state = (unit, call, role != "out")
        elif inside:
            state = inside[0]
        elif sources:
            state = max(sources, key=lambda s: order.get(s[0], -1))
        else:
            state = ("", 0, False)
        unit, call, own = state
        base = f"{'' if own else '~'}{unit}|{call}|{node.op_type}"
        name, count = base, 1
        while name in names:
            name, count = f"{base}.{count}", count + 1
        names.add(name)
        node.name = name
        for output in node.output:
            owner[output] = state


def tensor_names(model: onnx.ModelProto) -> dict[str, str]:
    """The name of the node that makes each tensor: some runtimes name a layer after its output."""
    return {output: node.name for node in model.graph.node for output in node.output}


def unit_of(node_name: str) -> tuple[str, bool]:
    """(unit, whether it is the unit's own work) of an ONNX node's name; ("", False) for anything else."""
    parts = node_name.split("|")
    if len(parts) < 3:
        return "", False
    return parts[0].removeprefix("~"), not parts[0].startswith("~")


def assemble(
    marked: onnx.ModelProto,
    variants: Mapping[str, Variant],
    weights: Mapping[str, QuantizedWeight],
    ranges: Ranges,
    *,
    quantize_outputs: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The network with each unit in its variant.

    weights: quantized weights of the int8 units that have one. ranges: activation ranges of the int8 units.
    quantize_outputs: also quantize what an int8 unit returns, for runtimes which execute in int8 only then.
    """
    builder = _Builder(marked, quantize_outputs)
    for node in marked.graph.node:
        if node.op_type != MARK:
            builder.copy(node)
            continue
        role, unit, call, port = _tag(node)
        variant = variants[unit]
        if role == "weight" and variant.quantized:
            builder.weight(
                node,
                unit,
                _Stored(variant.precision, weights[unit].values, weights[unit].scales, weights[unit].axis),
            )
        elif role == "weight" and node.input[0] in builder.initializers:
            values = numpy_helper.to_array(builder.initializers[node.input[0]])
            builder.weight(node, unit, _Stored(variant.precision, values))
        elif not variant.quantized or (role == "out" and not quantize_outputs):
            builder.alias(node)
        else:
            key = (unit, call, "out" if role == "out" else f"in{port}")
            builder.activation(node, unit, call, ranges[key], own=role == "in")
    return builder.finish(dict(metadata or {}))


class _Builder:
    """Copies nodes in order, replacing markers; constants of weights are stored at the variant's precision."""

    def __init__(self, marked: onnx.ModelProto, quantize_outputs: bool) -> None:
        self.marked = marked
        self.quantize_outputs = quantize_outputs
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.initializers = {t.name: t for t in marked.graph.initializer}
        self.pending: dict[str, tuple[str, _Stored]] = {}
        self.stored: set[str] = set()
        self.names = {n.name for n in marked.graph.node}
        self.first: dict[Any, str] = {}
        self.dequantized: dict[tuple[str, float], str] = {}

    def copy(self, node: onnx.NodeProto) -> None:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.metadata_props[:]
        inputs = [self.renamed.get(name, name) for name in node.input]
        if node.op_type == "Transpose" and inputs[0] in self.pending:
            unit, stored = self.pending[inputs[0]]
            perm = list(helper.get_node_attr_value(node, "perm"))
            self._pend((inputs[0], *perm), node.output[0], unit, stored.transposed(perm))
            return
        for i, name in enumerate(inputs):
            if name in self.pending:
                self._store(name)
            new.input[i] = name
        self.nodes.append(new)

    def alias(self, node: onnx.NodeProto) -> None:
        source = self.renamed.get(node.input[0], node.input[0])
        self.renamed[node.output[0]] = source

    def weight(self, node: onnx.NodeProto, unit: str, stored: _Stored) -> None:
        self._pend((unit, stored.values.shape), node.output[0], unit, stored)

    def _pend(self, what: Any, name: str, unit: str, stored: _Stored) -> None:
        """A weight that is stored once something reads it; the calls of one unit read one constant."""
        first = self.first.setdefault(what, name)
        if first == name:
            self.pending[name] = unit, stored
        else:
            self.renamed[name] = first

    def _store(self, name: str) -> None:
        """Emit the constant and its conversion to fp32 once, under `name`."""
        if name in self.stored:
            return
        self.stored.add(name)
        unit, stored = self.pending[name]
        if stored.precision == "fp32":
            self._constant(name, stored.values)
        elif stored.scales is None:
            kind = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16}[stored.precision]
            self.initializers[f"{name}/{stored.precision}"] = _half(
                f"{name}/{stored.precision}", stored.values, kind
            )
            self._add(
                "Cast",
                [f"{name}/{stored.precision}"],
                name,
                self._unique(f"{unit}|0|Cast.weight"),
                to=TensorProto.FLOAT,
            )
        else:
            values = self._constant(f"{name}/int8", stored.values)
            scale = self._constant(f"{name}/scale", stored.scales)
            zero = self._constant(f"{name}/zero", np.zeros(stored.scales.shape, np.int8))
            own = self._unique(f"{unit}|0|DequantizeLinear.weight")
            self._add("DequantizeLinear", [values, scale, zero], name, own, axis=stored.axis)

    def activation(self, node: onnx.NodeProto, unit: str, call: int, limit: float, *, own: bool) -> None:
        """Quantize and dequantize; two units which read one tensor on one scale share it.

        Not where outputs are quantized too: ONNX Runtime keeps a Q/DQ with two consumers signed, and has no fast
        kernel for that.
        """
        source = self.renamed.get(node.input[0], node.input[0])
        if self.quantize_outputs or (source, limit) not in self.dequantized:
            role = "in" if own else "out"
            base, port = f"{'' if own else '~'}{unit}|{call}", _tag(node)[3]
            scale = self._constant(f"{node.output[0]}/scale", np.asarray(limit / 127.0, np.float32))
            zero = self._constant(f"{node.output[0]}/zero", np.asarray(0, np.int8))
            quantized, output = f"{node.output[0]}/int8", f"{node.output[0]}/dq"
            self._add(
                "QuantizeLinear",
                [source, scale, zero],
                quantized,
                self._unique(f"{base}|QuantizeLinear.{role}{port}"),
            )
            self._add(
                "DequantizeLinear",
                [quantized, scale, zero],
                output,
                self._unique(f"{base}|DequantizeLinear.{role}{port}"),
            )
            self.dequantized[source, limit] = output
        self.renamed[node.output[0]] = self.dequantized[source, limit]

    def _unique(self, base: str) -> str:
        name, count = base, 1
        while name in self.names:
            name, count = f"{base}.{count}", count + 1
        self.names.add(name)
        return name

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _add(self, op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))

    def finish(self, metadata: dict[str, str]) -> onnx.ModelProto:
        old = self.marked.graph
        self._name_outputs()
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            old.name,
            list(old.input),
            list(old.output),
            [t for name, t in self.initializers.items() if name in used],
        )
        model = helper.make_model(
            graph,
            opset_imports=[o for o in self.marked.opset_import if o.domain != DOMAIN],
            producer_name="hwsearch",
        )
        model.ir_version = self.marked.ir_version
        helper.set_model_props(model, metadata)
        return model

    def _name_outputs(self) -> None:
        """Give the tensors that removed markers stood for the outputs' own names."""
        outputs = [v.name for v in self.marked.graph.output]
        made = {output for n in self.nodes for output in n.output}
        rename: dict[str, str] = {}
        for name in outputs:
            source = self.renamed.get(name, name)
            if source == name:
                continue
            if source not in made or source in outputs or source in rename:
                self._add("Identity", [source], name, self._unique(f"~|0|Identity.{name}"))
            else:
                rename[source] = name
        for node in self.nodes if rename else ():
            for field in (node.input, node.output):
                for i, tensor in enumerate(field):
                    if tensor in rename:
                        field[i] = rename[tensor]


def isolate(marked: onnx.ModelProto, unit: Unit) -> onnx.ModelProto:
    """The first call of one unit as a network of its own, markers kept; its inputs are the unit's activations."""
    nodes = [
        n for n in marked.graph.node if unit_of(n.name) == (unit.name, True) and n.name.split("|")[1] == "0"
    ]
    nodes += [n for n in marked.graph.node if n.op_type == MARK and _tag(n)[:3] == ("out", unit.name, 0)]
    made = {output for n in nodes for output in n.output}
    outer = [n for n in nodes if n.op_type == MARK and _tag(n)[0] == "in"]
    stored = {t.name: t for t in marked.graph.initializer}
    inputs = [
        helper.make_tensor_value_info(n.input[0], TensorProto.FLOAT, shape)
        for n, shape in zip(outer, unit.input_shapes, strict=True)
    ]
    inputs = list({v.name: v for v in inputs}.values())
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, unit.output_shape)
    read = {i for n in nodes for i in n.input} - made
    graph = helper.make_graph(
        nodes, unit.name, inputs, [result], [stored[name] for name in sorted(read & set(stored))]
    )
    model = helper.make_model(graph, opset_imports=list(marked.opset_import))
    model.ir_version = marked.ir_version
    return model


@dataclass(frozen=True)
class _Stored:
    precision: str
    values: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any] | None = None
    axis: int = 0

    def transposed(self, perm: list[int]) -> _Stored:
        return _Stored(self.precision, self.values.transpose(perm), self.scales, perm.index(self.axis))


def _half(name: str, values: np.ndarray[Any, Any], kind: int) -> onnx.TensorProto:
    tensor = torch.from_numpy(np.array(values))  # a copy: arrays of ONNX tensors are read-only
    if kind == TensorProto.BFLOAT16:
        raw = tensor.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    else:
        raw = tensor.to(torch.float16).numpy().tobytes()
    return helper.make_tensor(name, kind, list(values.shape), raw, raw=True)


class Lowering:
    """A task made ready to become ONNX in any allocation: traced, exported and calibrated once.

    batch: batch size of the deployed network; that of the example inputs where it is None.
    """

    def __init__(self, task: Task, batch: int | None = None, method: str = "mse") -> None:
        self.task, self.method = task, method
        self.inputs = with_batch(task.example_inputs, batch)
        self.traced = trace(task.model, self.inputs, task.name)
        check_calibration(task)
        self.whole: Lowering | None = None
        self.kept: Kept = {}
        self.replaced: Weights | None = None
        self.calibrate = True

    @property
    def network(self) -> Network:
        return self.traced.network

    @cached_property
    def marked(self) -> onnx.ModelProto:
        """The network with markers."""
        if self.whole is None:
            return export(self.traced)
        follow = self.whole.follow
        if follow is None:
            return export(self.traced)
        return follow.narrow(self.traced, self.whole.traced.channels.mask(self.kept))

    @cached_property
    def follow(self) -> OnnxWidths | None:
        """How to make the exported network narrower; None where it has to be exported anew for each width."""
        try:
            found = OnnxWidths(self.marked, self.traced)
            half = {g: range(0, n, 2) for g, n in self.network.channels.items()}
            narrow = self.narrow(half)
            model = found.narrow(narrow.traced, self.traced.channels.mask(half))
            plain = {u.name: Variant("fp32") for u in self.network.units}
            onnx.shape_inference.infer_shapes(assemble(model, plain, {}, {}), strict_mode=True)
        except (NotFollowed, onnx.shape_inference.InferenceError):
            return None
        return found

    def narrow(self, kept: Kept, weights: Weights | None = None, *, calibrate: bool = False) -> Lowering:
        """The same task with only the kept slots of its channel groups.

        weights: of units, instead of the whole ones cut. calibrate: take the ranges of activations from the narrow
        network; else those of the whole one stand in for them.
        """
        new = copy.copy(self)
        for name in ("marked", "follow", "ranges", "weights", "calibration", "network"):
            new.__dict__.pop(name, None)
        new.whole, new.kept, new.replaced, new.calibrate = self, kept, weights, calibrate
        new.traced = narrow(self.traced, kept, weights)
        return new

    @cached_property
    def calibration(self) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        """Each calibration batch with a trace for its shape."""
        if self.whole is not None:
            whole = {id(t): t for t, _, _ in self.whole.calibration}
            own = {key: narrow(t, self.kept, self.replaced) for key, t in whole.items()}
            return [(own[id(t)], args, kwargs) for t, args, kwargs in self.whole.calibration]
        traces: dict[str, Traced] = {}
        batches = []
        for inputs in in_pieces(self.task.calibration, self._piece()):
            args, kwargs = as_call(inputs)
            key = str(
                [tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            )
            if key not in traces:
                traces[key] = trace(self.task.model, inputs, self.task.name)
                same = list(traces[key].sites) == list(self.traced.sites)
                if not same or traces[key].network.channels != self.network.channels:
                    raise InvalidInput(
                        "the model runs other layers on calibration batches than on example_inputs; "
                        "make both take the same path"
                    )
            batches.append((traces[key], args, kwargs))
        return batches

    def _piece(self) -> int:
        """The largest batch whose activations may all be held."""
        each = sum(4 * u.calls * math.prod(u.output_shape) for u in self.network.units) / self.batch
        return max(1, int(ACTIVATION_BYTES / (3 * each)))

    @cached_property
    def ranges(self) -> dict[tuple[str, int, str], float]:
        if self.whole is not None and not self.calibrate:
            return self.whole.ranges
        return activation_ranges(self.calibration, self.method)

    @cached_property
    def weights(self) -> dict[str, QuantizedWeight]:
        """int8 weights of every unit that has any."""
        found = {}
        for unit in self.network.units:
            weight = self.traced.weight(unit.name)
            if weight is not None:
                found[unit.name] = quantize_weight(weight, unit.out_axis)
        return found

    @property
    def batch(self) -> int:
        """Batch size of the deployed network."""
        return (
            self.network.input_shapes[0][0]
            if self.network.input_shapes and self.network.input_shapes[0]
            else 1
        )

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """The example inputs in the order of the ONNX inputs."""
        values = flat_inputs(self.traced.graph, self.traced.args, self.traced.kwargs)
        return [v.detach().cpu().numpy() for v in values if isinstance(v, torch.Tensor)]

    def assemble(
        self, marked: onnx.ModelProto, variants: Mapping[str, Variant], **options: Any
    ) -> onnx.ModelProto:
        """`assemble` with this task's int8 weights and ranges, which are computed at their first use."""
        int8 = any(v.quantized for v in variants.values())
        return assemble(
            marked, variants, self.weights if int8 else {}, self.ranges if int8 else {}, **options
        )

    def onnx(
        self,
        variants: Mapping[str, Variant],
        *,
        quantize_outputs: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> onnx.ModelProto:
        """The deployable network in one allocation."""
        return self.assemble(self.marked, variants, quantize_outputs=quantize_outputs, metadata=metadata)


def in_pieces(batches: Iterable[Inputs], largest: int) -> Iterator[Inputs]:
    """The same samples in batches of at most `largest`; what is left over of a batch is dropped."""
    for inputs in batches:
        tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim()]
        count = min((t.shape[0] for t in tensors), default=0)
        if count <= largest or any(t.shape[0] != count for t in tensors):
            yield inputs
            continue
        for start in range(0, count - largest + 1, largest):

            def piece(leaf: Any, start: int = start) -> Any:
                return (
                    leaf[start : start + largest] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf
                )

            yield cast(Inputs, pytree.tree_map(piece, inputs))


def with_batch(inputs: Inputs, batch: int | None) -> Inputs:
    """The same inputs repeated or cut along dimension 0 to a batch size."""
    if batch is None:
        return inputs
    if batch < 1:
        raise InvalidInput(f"batch must be at least 1, got {batch}")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        return leaf.repeat(-(-batch // leaf.shape[0]), *([1] * (leaf.dim() - 1)))[:batch].contiguous()

    return cast(Inputs, pytree.tree_map(resize, inputs))


def _sorted(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    return call[0], dict(sorted(call[1].items()))


def check_calibration(task: Task) -> None:
    """Raises InvalidInput where a calibration batch is not of the form of example_inputs."""
    if not task.calibration:
        raise InvalidInput(
            "the task has no calibration batches; give at least one, of the form of example_inputs"
        )
    want, spec = pytree.tree_flatten(_sorted(as_call(task.example_inputs)))
    for index, inputs in enumerate(task.calibration):
        have, own = pytree.tree_flatten(_sorted(as_call(inputs)))
        if own != spec:
            raise InvalidInput(
                f"calibration batch {index} has another structure than example_inputs: {own} against {spec}"
            )
        for a, b in zip(have, want, strict=True):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                continue
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise InvalidInput(
                    f"calibration batch {index} has a tensor of shape {tuple(a.shape)}, {a.dtype}; example_inputs has "
                    f"{tuple(b.shape)}, {b.dtype}: every dimension but the first, and the type, must agree"
                )
            if a.is_floating_point() and not bool(torch.isfinite(a).all()):
                raise InvalidInput(f"calibration batch {index} holds NaN or infinity")

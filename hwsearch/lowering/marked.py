"""A traced network as ONNX with a marker on every tensor that an allocation may change, and node names that lead back to units."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from hwsearch.backends.nodenames import call_of, unique, unit_of
from hwsearch.errors import UntraceableModel
from hwsearch.graph.aliases import definition
from hwsearch.graph.canonical import module_path, op_name, tensor_attr
from hwsearch.graph.export import first_line
from hwsearch.graph.narrow import share_graph
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site, other_readers
from hwsearch.network.network import Unit

OPSET = 18
MARK = "Mark"
DOMAIN = "hwsearch"
WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
"""ONNX operators of which the bias is an input that may be left out."""
_REGISTRIES: dict[str, Any] = {}
"""Tables of ONNX operators, by how torch asked for them."""


def mark(x: torch.Tensor, role: str, unit: str, call: int, port: int) -> torch.Tensor:
    """A named identity that survives the ONNX exporter."""
    tag = json.dumps([role, unit, call, port])
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARK}", (x,), {"tag": tag}, dtype=x.dtype, shape=x.shape, version=1
    )


def export(traced: Traced) -> onnx.ModelProto:
    """The fp32 network with markers. Raises UntraceableModel naming the module and the operator."""
    graph = share_graph(traced.graph)
    nodes = {n.name: n for n in graph.graph.nodes}
    site_of = {site.node: site for calls in traced.sites.values() for site in calls}
    for unit, held in traced.stored.items():
        for index, name in enumerate(held):
            _mark_stored(graph, nodes[name], unit, index, other_readers(nodes[name], site_of))
    for unit, calls in traced.sites.items():
        for index, site in enumerate(calls):
            _mark_site(graph, nodes[site.node], site, unit, index)
    graph.recompile()
    exporter = "torch.onnx._internal.exporter"
    for logger in (
        f"{exporter}._registration",
        f"{exporter}._core",
        "onnxscript.optimizer._constant_folding",
    ):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _one_registry(), _equal_kept_apart():
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
    _put_back_biases(model, traced)
    return model


def _put_back_biases(model: onnx.ModelProto, traced: Traced) -> None:
    """Biases of zeros, which torch's optimizer drops: refitting and a narrower width need their place."""
    stored = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        unit, own = unit_of(node.name)
        path = traced.paths[unit][1] if own and node.op_type in WITH_BIAS and unit in traced.paths else None
        if path is None or len(node.input) > 2:
            continue
        node.input.append(path)
        if path not in stored:
            stored.add(path)
            bias = tensor_attr(traced.graph, path).detach().cpu().numpy()
            model.graph.initializer.append(numpy_helper.from_array(bias, path))


@contextmanager
def _one_registry() -> Iterator[None]:
    """Exports in this block share torch's table of ONNX operators, which torch builds anew for each: about a second.

    Nothing here registers operators, so that the table stays as it is. A torch that keeps it elsewhere builds its own.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return

    def kept(cls: Any, /, **options: Any) -> Any:
        key = json.dumps(options, sort_keys=True)
        if key not in _REGISTRIES:
            _REGISTRIES[key] = original.__get__(None, cls)(**options)
        return _REGISTRIES[key]

    type.__setattr__(ONNXRegistry, "from_torchlib", classmethod(kept))
    try:
        yield
    finally:
        type.__setattr__(ONNXRegistry, "from_torchlib", original)


@contextmanager
def _equal_kept_apart() -> Iterator[None]:
    """Exports in this block store two equal floating tensors twice, each under its own name.

    torch's optimizer stores one for both, which then cannot be cut for two widths; shapes and single numbers it may share.
    """
    try:
        from onnx_ir.passes.common import initializer_deduplication as merging

        original = merging._should_skip_initializer
    except (ImportError, AttributeError):  # a version that merges elsewhere, or not at all
        yield
        return

    def skipped(initializer: Any, *limits: Any, **options: Any) -> bool:
        value = initializer.const_value
        apart = value is not None and value.dtype.is_floating_point() and value.size > 1
        return bool(apart or original(initializer, *limits, **options))

    merging._should_skip_initializer = skipped
    try:
        yield
    finally:
        merging._should_skip_initializer = original


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


def _mark_stored(
    graph: torch.fx.GraphModule, node: torch.fx.Node, unit: str, index: int, readers: list[torch.fx.Node]
) -> None:
    with graph.graph.inserting_before(min(readers)):
        marked = graph.graph.call_function(mark, (node, "stored", unit, index, 0))
    for reader in readers:
        reader.replace_input_with(node, marked)


def _explain(error: BaseException, traced: Traced) -> str:
    chain: BaseException | None = error
    texts = []
    while chain is not None:
        texts.append(str(chain))
        chain = chain.__cause__
    why = first_line(RuntimeError(texts[-1]))
    operators = [n for n in traced.graph.graph.nodes if n.op == "call_function"]
    named = {m for text in texts for m in re.findall(r"op='([\w.]+)'", text)}
    found = [n for n in operators if str(getattr(n.target, "overloadpacket", "")) in named]
    # What the exporter names may be a part of the model's own operator: linalg_eig of linalg_eigvals, prims.prod of cumprod.
    found = found or _made_of(named, operators)
    found = found or [n for n in operators if any(f"%{n.name} " in text for text in texts)]
    parts = {name.rpartition(".")[2] for name in named}
    found = found or [n for n in operators if any(op_name(n).startswith(name) for name in parts)]
    if found:
        return (
            f"module {module_path(found[0]) or '(the model itself)'} uses operator {found[0].target}, "
            f"which has no ONNX form: {why}. Replace that operator in the model."
        )
    return f"the traced model has no ONNX form: {why}"


def _made_of(named: Collection[str], operators: Sequence[torch.fx.Node]) -> list[torch.fx.Node]:
    """The calls of which the exporter makes one of these operators, `prims.prod` for instance."""
    table = _decompositions()
    found = []
    for node in operators:
        body = definition(node, table) if node.target in table else None
        parts = body.graph.nodes if body is not None else ()
        if any(str(getattr(n.target, "overloadpacket", "")) in named for n in parts):
            found.append(node)
    return found


def _decompositions() -> dict[Any, Any]:
    """How the exporter computes operators that it has no ONNX form of by others."""
    registry: Any = next(iter(_REGISTRIES.values()), None)
    try:
        from torch.onnx._internal.exporter import _decomp

        known = set(_decomp.get_onnx_implemented_overloads(registry))
        return dict(_decomp.create_onnx_friendly_decomposition_table(known))
    except (ImportError, AttributeError):  # a version that keeps them elsewhere
        return dict(torch._decomp.decomposition_table)


def tag_of(node: onnx.NodeProto) -> tuple[str, str, int, int]:
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
        if node.op_type == MARK and tag_of(node)[0] == "stored":
            state = ("", 0, False)  # as any other constant
        elif node.op_type == MARK:
            role, unit, call, _ = tag_of(node)
            order.setdefault(unit, len(order))
            state = (unit, call, role != "out")
        elif inside:
            state = inside[0]
        elif sources:
            state = max(sources, key=lambda s: order.get(s[0], -1))
        else:
            state = ("", 0, False)
        unit, call, own = state
        node.name = unique(f"{'' if own else '~'}{unit}|{call}|{node.op_type}", names)
        for output in node.output if state[0] else ():
            owner[output] = state


def tensor_names(model: onnx.ModelProto) -> dict[str, str]:
    """The name of the node that makes each tensor: some runtimes name a layer after its output."""
    return {output: node.name for node in model.graph.node for output in node.output}


def isolate(marked: onnx.ModelProto, unit: Unit) -> onnx.ModelProto:
    """The first call of one unit as a network of its own, markers kept; its inputs are the unit's activations."""
    nodes = [
        n for n in marked.graph.node if unit_of(n.name) == (unit.name, True) and call_of(n.name) == "0"
    ]
    nodes += [n for n in marked.graph.node if n.op_type == MARK and tag_of(n)[:3] == ("out", unit.name, 0)]
    made = {output for n in nodes for output in n.output}
    outer = [n for n in nodes if n.op_type == MARK and tag_of(n)[0] == "in"]
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

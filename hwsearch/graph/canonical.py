"""The canonical form of an exported graph: the one way in which each computation is written.

Operators in place are pure, aliases and attention are spelled out (`aliases.py`; MatMul, Softmax, MatMul), BatchNorm is folded
into the layer before it, and what is computed from parameters alone is stored.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hwsearch.errors import UntraceableModel
from hwsearch.graph.aliases import aten as aten
from hwsearch.graph.aliases import inline, spell_out, spelling
from hwsearch.graph.aliases import op_name as op_name

CONVOLUTIONS: dict[Any, str] = {
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv3d.padding: "conv3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
MATMULS: frozenset[Any] = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
ATTENTION = aten.scaled_dot_product_attention.default

NORMS = "norms"
"""In the `meta` of a canonical graph: the path of a weight -> the BatchNorm that was folded into it."""


class Norm(NamedTuple):
    """A BatchNorm as the module has it; mean: of what the layer puts out without its bias."""

    gamma: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    momentum: float
    eps: float


# Operators whose result shares no memory with anything else: changing it in place is as good as a new tensor.
_FRESH = frozenset("add sub mul div batch_norm layer_norm group_norm matmul linear addmm cat mean".split())


def functional_graph(program: ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program without operators that write into a tensor.

    Raises UntraceableModel where a call changes a buffer that its outputs depend on.
    """
    graph = program.module(check_guards=False)
    if not _without_mutation(graph):
        program = program.run_decompositions({})
        _refuse_state(program)
        graph = program.module(check_guards=False)
        _drop_updates(graph)
    return graph


def canonicalize(graph: fx.GraphModule) -> None:
    """Bring a functional graph into canonical form, in place."""
    spell_out(graph)
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = (
                aten.reshape.default
            )  # a view asks for strides that rewritten operators need not give
    _expand_circular_padding(graph)
    _expand_attention(graph)
    _fold_constants(graph)
    _split_computed_addmm(graph)
    _fold_batch_norm(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for path in [p for p, _ in [*graph.named_parameters(), *graph.named_buffers()]]:
        if path not in used:
            parent, _, leaf = path.rpartition(".")
            delattr(graph.get_submodule(parent), leaf)
    graph.recompile()


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module that a node comes from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [value[0] for value in stack.values() if value[0]]
    return paths[-1].removeprefix("L['self'].") if paths else ""


def place(node: fx.Node) -> str:
    """Where a node stands in the user's code: its operator, its module, and the line where the trace knows it."""
    where = f"{op_name(node)} in {module_path(node) or 'the model itself'}"
    frames = re.findall(
        r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or ""
    )
    own = [f for f in frames if not f[0].startswith(str(Path(torch.__file__).parent))]
    if not own:
        return where
    file, line, code = own[-1]
    return f"{where}, at {Path(file).name}:{line}: `{code.strip()}`"


def is_get_attr(node: Any) -> TypeGuard[fx.Node]:
    """Whether an argument is a tensor that the graph stores."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def bound(node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """A call's arguments in the order of the operator's parameters, whether given by position, by name or not at all."""
    values = [*node.args, *defaults[len(node.args) :]]
    return [node.kwargs.get(name, value) for name, value in zip(names, values, strict=True)]


def tensor_attr(graph: fx.GraphModule, path: str) -> torch.Tensor:
    """The tensor that is stored under a dotted path."""
    value = operator.attrgetter(path)(graph)
    assert isinstance(value, torch.Tensor)
    return value


def set_attr(graph: fx.GraphModule, path: str, value: torch.Tensor) -> None:
    """Put a new tensor under a (possibly new) dotted path without touching the user's module."""
    *parents, leaf = path.split(".")
    module: torch.nn.Module = graph
    for part in parents:
        if not isinstance(getattr(module, part, None), torch.nn.Module):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module._parameters.pop(leaf, None)
    module._buffers.pop(leaf, None)
    module.register_buffer(leaf, value.detach())


def _free_path(graph: fx.GraphModule, path: str) -> str:
    """The path, or one like it that holds no tensor yet."""
    used = {p for p, _ in [*graph.named_parameters(), *graph.named_buffers()]}
    used |= {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    base, dot, leaf = path.rpartition(".")
    while path in used:
        base, path = f"{base}_", f"{base}_{dot or '.'}{leaf}"
    return path


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _without_mutation(graph: fx.GraphModule) -> bool:
    """Turn in-place operators on fresh tensors that nothing else reads into pure ones; False where others remain."""
    whole = True
    for node in [n for n in graph.graph.nodes if _mutates(n)]:
        name = op_name(node)
        pure = getattr(getattr(aten, name.rstrip("_"), None), node.target._overloadname, None)
        source = node.args[0] if node.args else None
        alone = isinstance(source, fx.Node) and set(source.users) == {node}
        fresh = isinstance(source, fx.Node) and (source.target in CONVOLUTIONS or op_name(source) in _FRESH)
        if alone and fresh and pure is not None and name.endswith("_"):
            node.target = pure
        else:
            whole = False
    return whole


def _refuse_state(program: ExportedProgram) -> None:
    """A deployed network starts every call from what its file stores, so that state would be lost in silence."""
    signature = program.graph_signature
    own = signature.inputs_to_buffers | signature.inputs_to_parameters
    written = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    nodes = {node.name: node for node in program.graph.nodes}
    needed: set[fx.Node] = set()
    left = [nodes[name] for name in signature.user_outputs if name in nodes]
    while left:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    read = {own[node.name] for node in needed if node.op == "placeholder" and node.name in own}
    refuse_state([name for name in dict.fromkeys(own.values()) if name in read & written])


def refuse_state(names: Sequence[str]) -> None:
    """Raises UntraceableModel where outputs depend on what earlier calls left in these buffers or attributes."""
    if names:
        raise UntraceableModel(
            f"the network keeps state: its outputs depend on {', '.join(names)}, which every call changes, and a deployed network "
            "starts each call from the same values. Make it an input and an output: forward(x, state) that returns (y, new state)"
        )


def _drop_updates(graph: fx.GraphModule) -> None:
    """What a call writes into buffers that no output depends on, or into its inputs, is not part of its outputs."""
    for node in reversed(list(graph.graph.nodes)):
        target = node.args[0] if node.args else None
        if _mutates(node) and (is_get_attr(target) or getattr(target, "op", "") == "placeholder"):
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)


def _expand_circular_padding(graph: fx.GraphModule) -> None:
    """Circular padding as slices and concatenations: not every runtime has it."""
    for node in [n for n in graph.graph.nodes if n.op == "call_function" and n.target is aten.pad.default]:
        x, pads, *rest = node.args
        if (rest[0] if rest else node.kwargs.get("mode", "constant")) != "circular" or min(pads) < 0:
            continue
        shape = x.meta["val"].shape
        with graph.graph.inserting_before(node):
            for index in range(len(pads) // 2):
                before, after = pads[2 * index : 2 * index + 2]
                axis = len(shape) - 1 - index
                size = int(shape[axis])
                parts = [x]
                if before:
                    parts.insert(
                        0, graph.graph.call_function(aten.slice.Tensor, (x, axis, size - before, size))
                    )
                if after:
                    parts.append(graph.graph.call_function(aten.slice.Tensor, (x, axis, 0, after)))
                if len(parts) > 1:
                    x = graph.graph.call_function(aten.cat.default, (parts, axis))
                for part in [*parts, x]:
                    part.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)


def _expand_attention(graph: fx.GraphModule) -> None:
    """scaled_dot_product_attention as MatMul, Softmax, MatMul, so that both products are units."""
    opened: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}  # layers share a mask
    for node in [n for n in graph.graph.nodes if n.op == "call_function" and n.target is ATTENTION]:
        q, k, v, mask, _, causal, scale, gqa = bound(
            node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
            (None, None, None, None, 0.0, False, None, False),
        )  # fmt: skip
        q_shape, k_shape = q.meta["val"].shape, k.meta["val"].shape
        if scale is None:
            scale = 1.0 / math.sqrt(q_shape[-1])

        def call(target: Any, *args: Any, like: fx.Node = node) -> fx.Node:
            new = graph.graph.call_function(target, args)
            new.meta |= {k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta}
            return new

        some = None
        with graph.graph.inserting_before(node):
            if gqa and k_shape[-3] != q_shape[-3]:
                k, v = (_repeat_heads(call, t, q_shape[-3]) for t in (k, v))
            scores = call(
                aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.transpose.int, k, -2, -1)
            )
            if causal:
                path = f"_causal_{q_shape[-2]}_{k_shape[-2]}"
                allowed = torch.ones(q_shape[-2], k_shape[-2], dtype=torch.bool).tril()
                set_attr(graph, path, torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")))
                scores = call(aten.add.Tensor, scores, graph.graph.get_attr(path))
            if mask is not None:
                if mask not in opened:
                    opened[mask] = _open_rows(call, graph, mask)
                mask, some = opened[mask]
                if mask.meta["val"].dtype == torch.bool:
                    scores = call(aten.where.ScalarOther, mask, scores, float("-inf"))
                else:
                    scores = call(aten.add.Tensor, scores, mask)
            new = call(aten.matmul.default, call(aten.softmax.int, scores, -1), v)
            if some is not None:
                new = call(aten.mul.Tensor, new, some)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _open_rows(
    call: Callable[..., fx.Node], graph: fx.GraphModule, mask: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """(a mask without rows that allow nothing, for each row 1 or, where it allowed nothing, 0; None if no row can be such).

    Of a row that may attend to nothing `scaled_dot_product_attention` returns zeros; softmax over it is NaN. Such a row
    attends to everything here, and its result is multiplied by zero: finite in every runtime and in any precision.
    """
    boolean = mask.meta["val"].dtype == torch.bool
    value = _constant(graph, mask)
    if value is not None and bool((value if boolean else value > float("-inf")).any(-1).all()):
        return mask, None
    allowed = mask if boolean else call(aten.gt.Scalar, mask, float("-inf"))
    some = call(aten.amax.default, call(aten.to.dtype, allowed, torch.float32), [-1], True)
    if boolean:
        open_ = call(aten.logical_or.default, mask, call(aten.eq.Scalar, some, 0.0))
    else:
        open_ = call(aten.where.ScalarOther, call(aten.gt.Scalar, some, 0.0), mask, 0.0)
    open_.meta["val"] = mask.meta["val"]
    return open_, some


def _constant(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on no input; None of any other."""
    needed, left = {node}, [node]
    while left:
        sources = left.pop().all_input_nodes
        left += [s for s in sources if s not in needed]
        needed.update(sources)
    if any(n.op not in ("get_attr", "call_function") for n in needed):
        return None
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in (n for n in graph.graph.nodes if n in needed):
            if is_get_attr(n):
                values[n] = operator.attrgetter(str(n.target))(graph)
            else:
                args, kwargs = fx.map_arg((n.args, n.kwargs), values.__getitem__)
                values[n] = n.target(*args, **kwargs)
    found: torch.Tensor = values[node]
    return found


def _repeat_heads(call: Callable[..., fx.Node], tensor: fx.Node, heads: int) -> fx.Node:
    *batch, own, length, size = tensor.meta["val"].shape
    wide = call(aten.unsqueeze.default, tensor, -3)
    wide = call(aten.expand.default, wide, [*batch, own, heads // own, length, size])
    return call(aten.reshape.default, wide, [*batch, heads, length, size])


def _fold_constants(graph: fx.GraphModule) -> None:
    """Weights computed from parameters alone (parametrizations, transposes) become stored tensors."""
    constant: dict[fx.Node, Any] = {}
    consumers = set(CONVOLUTIONS) | MATMULS | {aten.linear.default, aten.addmm.default}
    for node in graph.graph.nodes:
        if is_get_attr(node):
            value = operator.attrgetter(str(node.target))(graph)
            if isinstance(value, torch.Tensor):
                constant[node] = value
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and all(i in constant for i in node.all_input_nodes)
        ):
            with torch.no_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constant[n])
                constant[node] = node.target(*args, **kwargs)
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in consumers:
            for arg in node.all_input_nodes:
                if arg in constant and not is_get_attr(arg):
                    path = _free_path(graph, f"{module_path(node) or arg.name}.weight")
                    value = constant[arg]
                    if (
                        node.target in MATMULS
                        and arg is node.args[1]
                        and value.dim() == 3
                        and len(value) == 1
                    ):
                        value, node.target = value[0], aten.matmul.default
                    set_attr(graph, path, value.clone())
                    with graph.graph.inserting_before(node):
                        stored = graph.graph.get_attr(path)
                    stored.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                    node.replace_input_with(arg, stored)


def _split_computed_addmm(graph: fx.GraphModule) -> None:
    """A sum and a product of two activations, or a scaled one, are two operators: the product is a unit."""
    for node in [n for n in graph.graph.nodes if n.op == "call_function" and n.target is aten.addmm.default]:
        if node.kwargs or not is_get_attr(node.args[2]):
            inline(graph, node, spelling("addmm"))


def _fold_batch_norm(graph: fx.GraphModule) -> None:
    for norm in [
        n for n in graph.graph.nodes if n.op == "call_function" and n.target is aten.batch_norm.default
    ]:
        source = norm.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
            continue
        kind = CONVOLUTIONS.get(source.target, "linear" if source.target is aten.linear.default else "")
        weight_node = source.args[1] if len(source.args) > 1 else None
        if not kind or kind == "conv3d" or not is_get_attr(weight_node) or norm.args[5]:
            continue
        uses = [
            u for n in graph.graph.nodes if is_get_attr(n) and n.target == weight_node.target for u in n.users
        ]
        gamma, beta, mean, variance = norm.args[1:5]
        if len(uses) != 1 or not is_get_attr(mean) or not is_get_attr(variance):
            continue
        bias_node = source.args[2] if len(source.args) > 2 else source.kwargs.get("bias")
        if bias_node is not None and not is_get_attr(bias_node):
            continue

        def tensor(node: Any) -> Any:
            return None if node is None else tensor_attr(graph, str(node.target)).detach()

        stats = (tensor(mean), tensor(variance), float(norm.args[7]), tensor(gamma), tensor(beta))
        if kind == "linear":
            if norm.meta["val"].dim() != 2:
                continue  # channels of BatchNorm are not the features of the linear layer
            weight, bias = _linear_batch_norm(tensor(weight_node), tensor(bias_node), *stats)
        else:
            transpose = kind.startswith("conv_transpose")
            if transpose and _groups(source) != 1:
                continue
            weight, bias = fuse_conv_bn_weights(
                tensor(weight_node), tensor(bias_node), *stats, transpose=transpose
            )
        path = str(weight_node.target)
        base = path.rpartition(".")[0]
        scale = torch.ones_like(stats[1]) if gamma is None else stats[3]
        mean_of = stats[0] if bias_node is None else stats[0] - tensor(bias_node)
        graph.meta.setdefault(NORMS, {})[path] = Norm(scale, mean_of, stats[1], float(norm.args[6]), stats[2])
        set_attr(graph, path, weight)
        bias_path = _free_path(graph, f"{base}.bias" if base else f"{path}.bias")
        set_attr(graph, bias_path, bias)
        with graph.graph.inserting_before(source):
            new_bias = graph.graph.get_attr(bias_path)
        source.args = (source.args[0], weight_node, new_bias, *source.args[3:])
        source.kwargs = {k: v for k, v in source.kwargs.items() if k != "bias"}
        norm.replace_all_uses_with(source)
        graph.graph.erase_node(norm)


def _linear_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(variance + eps) * (1.0 if gamma is None else gamma)
    shifted = (0.0 if bias is None else bias) - mean
    return weight * scale[:, None], shifted * scale + (0.0 if beta is None else beta)


def _groups(node: fx.Node) -> int:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return int(bound(node, names, (None, None, None, 1, 0, 0, 1, 1))[6])

"""nn.Module -> Network, and the graph that computes it with every unit addressable."""

from __future__ import annotations

import hashlib
import inspect
import math
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx._pytree import tree_flatten_spec
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.network import Edge, Network, Unit
from hwsearch.task import Inputs

aten = torch.ops.aten

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

# Elementwise operators that runtimes fuse into the layer before them.
FUSIBLE = frozenset(
    "relu relu_ relu6 relu6_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardswish_ "
    "hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ prelu mish mish_ clamp clamp_ clamp_min clamp_min_ "
    "add add_ sub sub_ mul mul_ div div_ batch_norm dropout dropout_ alias clone contiguous detach_ "
    "softplus neg abs sqrt rsqrt exp pow erf to _to_copy".split()
)
# Operators that move or keep data without computing: they pass a tensor on.
_CLAMPS = frozenset("relu relu_ relu6 relu6_ hardtanh hardtanh_ clamp clamp_min".split())
_NOT_FUSED = frozenset("dropout dropout_ alias clone contiguous detach_ to _to_copy".split())
# Operators whose result shares no memory with anything else: changing it in place is as good as a new tensor.
_FRESH = frozenset("add sub mul div batch_norm layer_norm group_norm matmul linear addmm cat mean".split())


@dataclass(frozen=True)
class Site:
    """One call of a unit in the graph: its node, its activation arguments and its weight argument."""

    node: str
    activations: tuple[int, ...]
    weight: int | None


@dataclass
class Traced:
    """A network with the graph that computes it.

    graph: takes the model's own arguments and returns the model's own outputs; BatchNorm is folded into
        the units, attention is spelled out as MatMul, Softmax, MatMul.
    sites: for each unit, its calls in order.
    args, kwargs: the example inputs it was traced with.
    """

    network: Network
    graph: fx.GraphModule
    sites: dict[str, list[Site]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    """What the model returns on the example: the structure that an engine's flat outputs are put back into."""

    def weight(self, unit: str) -> torch.Tensor | None:
        """The unit's weight with BatchNorm folded in, or None for a MatMul of two activations."""
        site = self.sites[unit][0]
        if site.weight is None:
            return None
        nodes = {n.name: n for n in self.graph.graph.nodes}
        return _tensor_attr(self.graph, str(nodes[site.node].args[site.weight].target)).detach()


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in any of the forms that a Task takes, as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode; afterwards its submodules' modes and its buffers are what they were."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before) and not (
                torch.isnan(before).any() and buffer.is_floating_point()
            ):
                buffer.detach().copy_(before)


def trace(model: torch.nn.Module, inputs: Inputs, name: str = "") -> Traced:
    """Trace a module with `torch.export` and find its units and edges.

    inputs: one example; its batch size is the one the network is built for.
    Raises UntraceableModel naming the submodule and operator; InvalidInput if the model fails on `inputs`.
    """
    args, kwargs = as_call(inputs)
    signature = _signature(model)
    kwargs = {**{k: kwargs[k] for k in signature if k in kwargs}, **kwargs}
    _check_types(model)
    with evaluating(model), torch.no_grad():
        try:
            outputs = model(*args, **kwargs)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidInput(f"the model fails on example_inputs: {why}") from error
        _check_finite(outputs)
        exported = _export(model, args, kwargs)
        graph = exported.module(check_guards=False)
        if not _without_mutation(graph):
            graph = exported.run_decompositions({}).module(check_guards=False)
            _restore_batch_norm(graph)
            _drop_state_updates(graph)
    assert isinstance(graph, fx.GraphModule)
    graph.meta["signature"] = signature
    _canonicalize(graph)
    shapes = _Shapes(graph, args, kwargs)
    sites, units = _find_units(graph, shapes)
    if not units:
        raise UntraceableModel(
            f"{type(model).__name__} has no layer to compress: no convolution, linear layer or matrix product was found"
        )
    owned, edges = _find_edges(graph, sites, shapes)
    units = [replace(unit, fused=tuple(owned[unit.name])) for unit in units]
    others = _outside_units(graph, sites)
    network = Network(
        units=tuple(units),
        edges=edges,
        fixed_bytes=sum(t.numel() * t.element_size() for t in others),
        input_shapes=tuple(
            tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ),
        weights_digest=_digest([*model.named_parameters(), *model.named_buffers()]),
        name=name,
    )
    return Traced(network, graph, sites, args, kwargs, outputs)


def _signature(model: torch.nn.Module) -> list[str]:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _check_types(model: torch.nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidInput(f"{name} is not initialised; run the model once before it is traced")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype is not torch.float32):
            raise InvalidInput(
                f"{name} of the model is {str(tensor.dtype).removeprefix('torch.')}; expected float32: "
                "call model.float() and give float32 inputs, precisions are hwsearch's to choose"
            )


def _check_finite(outputs: Any) -> None:
    for leaf in pytree.tree_leaves(outputs):
        if (
            isinstance(leaf, torch.Tensor)
            and leaf.is_floating_point()
            and not bool(torch.isfinite(leaf).all())
        ):
            raise InvalidInput(
                "the model returns NaN or infinity on example_inputs; expected finite outputs. "
                "Check the weights and the preprocessing of example_inputs."
            )


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs)
    except Exception as error:
        path, cls = _culprit(model, args, kwargs)
        raise UntraceableModel(
            f"torch.export cannot trace module {path or '(the model itself)'} ({cls}): {first_line(error)}"
            f"{_user_frame(error)}. Rewrite that operator without data-dependent Python (torch.where, torch.cond), "
            "or leave the module out of the model that is searched."
        ) from error


def _culprit(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    """The innermost submodule that cannot be exported by itself, with the inputs it gets in a real run."""
    seen: dict[str, tuple[torch.nn.Module, Any, Any]] = {}
    handles = []
    for path, module in model.named_modules():

        def hook(mod: torch.nn.Module, a: Any, k: Any, path: str = path) -> None:
            seen.setdefault(path, (mod, a, k))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = ""
    while True:
        inside = [p for p in seen if p and (not found or p.startswith(f"{found}.")) and p != found]
        children = [p for p in inside if not any(p.startswith(f"{q}.") for q in inside)]
        failing = next((p for p in children if not _exports(*seen[p])), None)
        if failing is None:
            return found, type(seen[found][0] if found else model).__name__
        found = failing


def _exports(module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.export(module, args, kwargs)
    except Exception:
        return False
    return True


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(". ")


def _user_frame(error: BaseException) -> str:
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(own) and frame.line and Path(frame.filename).exists():
            return f", at {Path(frame.filename).name}:{frame.lineno}: `{frame.line}`"
    return ""


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- canonical form


def _tensor_attr(graph: fx.GraphModule, path: str) -> torch.Tensor:
    value = operator.attrgetter(path)(graph)
    assert isinstance(value, torch.Tensor)
    return value


def _set_attr(graph: fx.GraphModule, path: str, value: torch.Tensor) -> None:
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


def _restore_batch_norm(graph: fx.GraphModule) -> None:
    """The operator that `run_decompositions` makes of BatchNorm, as BatchNorm."""
    for node in [
        n for n in graph.graph.nodes if n.target is aten._native_batch_norm_legit_no_training.default
    ]:
        x, weight, bias, mean, variance, momentum, eps = node.args
        with graph.graph.inserting_before(node):
            norm = graph.graph.call_function(
                aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, eps, False)
            )
        norm.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(norm)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)


def _drop_state_updates(graph: fx.GraphModule) -> None:
    """What a model writes into its buffers is for its next call, and a deployed network keeps no state."""
    for node in reversed(list(graph.graph.nodes)):
        if _mutates(node) and _is_get_attr(node.args[0]):
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)


def _canonicalize(graph: fx.GraphModule) -> None:
    _inline(graph, aten.einsum.default)
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = (
                aten.reshape.default
            )  # a view asks for strides that rewritten operators need not give
    _expand_circular_padding(graph)
    _expand_attention(graph)
    _fold_constants(graph)
    _fold_batch_norm(graph)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for path in [p for p, _ in [*graph.named_parameters(), *graph.named_buffers()]]:
        if path not in used:
            parent, _, leaf = path.rpartition(".")
            delattr(graph.get_submodule(parent), leaf)
    graph.recompile()


def _inline(graph: fx.GraphModule, target: Any) -> None:
    """Replace each call of an operator by the operators that it is made of."""
    for node in [n for n in graph.graph.nodes if n.op == "call_function" and n.target is target]:
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        sources = [v for v in flat if isinstance(v, fx.Node)]

        def call(
            *tensors: torch.Tensor, flat: list[Any] = flat, spec: Any = spec, target: Any = node.target
        ) -> torch.Tensor:
            rest = iter(tensors)
            args, kwargs = pytree.tree_unflatten(
                [next(rest) if isinstance(v, fx.Node) else v for v in flat], spec
            )
            result: torch.Tensor = target(*args, **kwargs)
            return result

        examples = [torch.zeros(v.meta["val"].shape, dtype=v.meta["val"].dtype) for v in sources]
        body = make_fx(call)(*examples)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(inputs, sources, strict=True))
        with graph.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "call_function":
                    values[inner] = graph.graph.node_copy(inner, values.__getitem__)
                    values[inner].meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                elif inner.op == "output":
                    node.replace_all_uses_with(values[inner.args[0]])
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


def _free_path(graph: fx.GraphModule, path: str) -> str:
    """The path, or one like it that holds no tensor yet."""
    used = {p for p, _ in [*graph.named_parameters(), *graph.named_buffers()]}
    used |= {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    base, dot, leaf = path.rpartition(".")
    while path in used:
        base, path = f"{base}_", f"{base}_{dot or '.'}{leaf}"
    return path


def _is_get_attr(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _expand_attention(graph: fx.GraphModule) -> None:
    """scaled_dot_product_attention as MatMul, Softmax, MatMul, so that both products are units."""
    for node in [n for n in graph.graph.nodes if n.op == "call_function" and n.target is ATTENTION]:
        q, k, v, mask, _, causal, scale, gqa = _bound(
            node, ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
            (None, None, None, None, 0.0, False, None, False),
        )  # fmt: skip
        q_shape, k_shape = q.meta["val"].shape, k.meta["val"].shape
        if scale is None:
            scale = 1.0 / math.sqrt(q_shape[-1])

        def call(target: Any, *args: Any, like: fx.Node = node) -> fx.Node:
            new = graph.graph.call_function(target, args)
            new.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
            return new

        with graph.graph.inserting_before(node):
            if gqa and k_shape[-3] != q_shape[-3]:
                k, v = (_repeat_heads(call, t, q_shape[-3]) for t in (k, v))
            scores = call(
                aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.transpose.int, k, -2, -1)
            )
            if causal:
                path = f"_causal_{q_shape[-2]}_{k_shape[-2]}"
                allowed = torch.ones(q_shape[-2], k_shape[-2], dtype=torch.bool).tril()
                _set_attr(graph, path, torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")))
                scores = call(aten.add.Tensor, scores, graph.graph.get_attr(path))
            if mask is not None:
                if mask.meta["val"].dtype == torch.bool:
                    scores = call(aten.where.ScalarOther, mask, scores, float("-inf"))
                else:
                    scores = call(aten.add.Tensor, scores, mask)
            new = call(aten.matmul.default, call(aten.softmax.int, scores, -1), v)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)


def _repeat_heads(call: Callable[..., fx.Node], tensor: fx.Node, heads: int) -> fx.Node:
    *batch, own, length, size = tensor.meta["val"].shape
    wide = call(aten.unsqueeze.default, tensor, -3)
    wide = call(aten.expand.default, wide, [*batch, own, heads // own, length, size])
    return call(aten.reshape.default, wide, [*batch, heads, length, size])


def _bound(node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    values = [*node.args, *defaults[len(node.args) :]]
    return [node.kwargs.get(name, value) for name, value in zip(names, values, strict=True)]


def _fold_constants(graph: fx.GraphModule) -> None:
    """Weights computed from parameters alone (parametrizations, transposes) become stored tensors."""
    constant: dict[fx.Node, Any] = {}
    consumers = set(CONVOLUTIONS) | MATMULS | {aten.linear.default, aten.addmm.default}
    for node in graph.graph.nodes:
        if _is_get_attr(node):
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
                if arg in constant and not _is_get_attr(arg):
                    path = _free_path(graph, f"{module_path(node) or arg.name}.weight")
                    value = constant[arg]
                    if (
                        node.target in MATMULS
                        and arg is node.args[1]
                        and value.dim() == 3
                        and len(value) == 1
                    ):
                        value, node.target = value[0], aten.matmul.default
                    _set_attr(graph, path, value.clone())
                    with graph.graph.inserting_before(node):
                        stored = graph.graph.get_attr(path)
                    stored.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
                    node.replace_input_with(arg, stored)


def _fold_batch_norm(graph: fx.GraphModule) -> None:
    for norm in [
        n for n in graph.graph.nodes if n.op == "call_function" and n.target is aten.batch_norm.default
    ]:
        source = norm.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
            continue
        kind = CONVOLUTIONS.get(source.target, "linear" if source.target is aten.linear.default else "")
        weight_node = source.args[1] if len(source.args) > 1 else None
        if not kind or kind == "conv3d" or not _is_get_attr(weight_node) or norm.args[5]:
            continue
        uses = [
            u
            for n in graph.graph.nodes
            if _is_get_attr(n) and n.target == weight_node.target
            for u in n.users
        ]
        gamma, beta, mean, variance = norm.args[1:5]
        if len(uses) != 1 or not _is_get_attr(mean) or not _is_get_attr(variance):
            continue
        bias_node = source.args[2] if len(source.args) > 2 else source.kwargs.get("bias")
        if bias_node is not None and not _is_get_attr(bias_node):
            continue

        def tensor(node: Any) -> Any:
            return None if node is None else _tensor_attr(graph, str(node.target)).detach()

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
        _set_attr(graph, path, weight)
        bias_path = _free_path(graph, f"{base}.bias" if base else f"{path}.bias")
        _set_attr(graph, bias_path, bias)
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
    return int(_bound(node, names, (None, None, None, 1, 0, 0, 1, 1))[6])


# ---------------------------------------------------------------- shapes, units, edges


class _Shapes(fx.Interpreter):
    """Shape and dtype of every tensor, from one real run."""

    def __init__(self, graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(graph)
        self.shape: dict[str, tuple[int, ...]] = {}
        self.bytes: dict[str, int] = {}
        with torch.no_grad():
            self.run(*flat_inputs(graph, args, kwargs), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shape[n.name] = tuple(value.shape)
            self.bytes[n.name] = value.numel() * value.element_size()
        return value


def flat_inputs(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The placeholders' values, in order, for a call with the model's signature.

    Arguments may be positional or by name, whichever way the example was. Raises InvalidInput on any others.
    """
    codegen: Any = graph.graph._codegen
    spec = codegen.pytree_info.in_spec
    positional, named = spec.children()
    count, names = positional.num_children, list(named.context or ())
    if len(args) != count or set(kwargs) != set(names):
        signature = list(graph.meta.get("signature", ()))
        given = {**dict(zip(signature, args, strict=False)), **kwargs}
        wanted = [*signature[:count], *names]
        extra = [k for k, v in given.items() if k not in wanted and v is not None]
        missing = [k for k in wanted if k not in given]
        if extra or missing or len(args) > len(signature):
            raise InvalidInput(
                f"the model was traced with inputs {', '.join(wanted)}; got {len(args)} by position"
                + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            )
        args, kwargs = tuple(given[k] for k in signature[:count]), {k: given[k] for k in names}
    try:
        return list(tree_flatten_spec((tuple(args), {k: kwargs[k] for k in names}), spec))
    except Exception as error:
        raise InvalidInput(
            f"the inputs have another structure than example_inputs: {first_line(error)}"
        ) from error


def op_name(node: fx.Node) -> str:
    """`relu` for torch.ops.aten.relu.default."""
    name = getattr(node.target, "overloadpacket", None)
    return str(getattr(name, "__name__", getattr(node.target, "__name__", node.target)))


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [value[0] for value in stack.values() if value[0]]
    return paths[-1].removeprefix("L['self'].") if paths else ""


def _call_site(node: fx.Node) -> tuple[Site, str, Any] | None:
    """(site, operator, weight node or None) where the node is a unit's call."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        op = CONVOLUTIONS[node.target]
        return (Site(node.name, (0,), 1), op, node.args[1]) if _is_get_attr(node.args[1]) else None
    if node.target is aten.linear.default:
        return (Site(node.name, (0,), 1), "linear", node.args[1]) if _is_get_attr(node.args[1]) else None
    if node.target is aten.addmm.default and not node.kwargs and _is_get_attr(node.args[2]):
        return Site(node.name, (1,), 2), "matmul", node.args[2]
    if node.target in MATMULS:
        left, right = node.args
        if _is_get_attr(left) and _is_get_attr(right):
            return None
        if _is_get_attr(right):
            return Site(node.name, (0,), 1), "matmul", right
        if _is_get_attr(left):
            return None  # a constant on the left is no weight that runtimes quantize per channel
        return Site(node.name, (0, 1), None), "matmul", None
    return None


def _find_units(graph: fx.GraphModule, shapes: _Shapes) -> tuple[dict[str, list[Site]], list[Unit]]:
    sites: dict[str, list[Site]] = {}
    units: dict[str, Unit] = {}
    of_weight: dict[Any, str] = {}
    biases: set[Any] = set()
    for node in graph.graph.nodes:
        found = _call_site(node)
        if found is None or node.name not in shapes.shape:
            continue
        site, op, weight_node = found
        weight = _tensor_attr(graph, str(weight_node.target)) if weight_node is not None else None
        if weight is not None and (weight.dim() < 2 or not weight.is_floating_point()):
            continue
        if weight is not None and op == "matmul" and weight.dim() > 2:
            continue  # a stack of weights: runtimes take per-channel scales for one matrix
        inputs = tuple(shapes.shape[node.args[i].name] for i in site.activations)
        output = shapes.shape[node.name]
        macs = _macs(op, inputs, output, weight, node)
        bias = _bias_of(node)
        bias_bytes = 0
        if bias is not None:
            tensor = _tensor_attr(graph, str(bias.target))
            bias_bytes = 0 if _same(tensor) in biases else tensor.numel() * tensor.element_size()
            biases.add(_same(tensor))
        if weight is not None and _same(weight) in of_weight:
            name = of_weight[_same(weight)]
            old = units[name]
            if old.op == op:
                sites[name].append(site)
                units[name] = replace(
                    old, calls=old.calls + 1, macs=old.macs + macs, other_bytes=old.other_bytes + bias_bytes
                )
                continue
        name = _unit_name(node, weight_node, units)
        if weight is not None:
            of_weight.setdefault(_same(weight), name)
        out_axis = 0
        if op == "matmul":
            out_axis = (weight.dim() - 1) if weight is not None else 0
        elif op.startswith("conv_transpose"):
            out_axis = 1
        units[name] = Unit(
            name=name,
            op=op,
            input_shapes=inputs,
            output_shape=output,
            weight_shape=tuple(weight.shape) if weight is not None else (),
            out_axis=out_axis,
            attributes=_attributes(node, op),
            macs=macs,
            other_bytes=bias_bytes,
        )
        sites[name] = [site]
    return sites, list(units.values())


def _bias_of(node: fx.Node) -> Any:
    if node.target is aten.addmm.default:
        bias = node.args[0]
    elif node.target in MATMULS:
        return None
    else:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if _is_get_attr(bias) else None


def _same(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Equal for tensors that are one parameter."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _outside_units(graph: fx.GraphModule, sites: dict[str, list[Site]]) -> list[torch.Tensor]:
    """Stored tensors that something else than a unit reads.

    A tied weight that an embedding reads as well is among them: it is stored for the embedding, and once more
    for the unit at its own precision.
    """
    site_of = {site.node: site for calls in sites.values() for site in calls}
    found: dict[Any, torch.Tensor] = {}
    for node in graph.graph.nodes:
        value = operator.attrgetter(str(node.target))(graph) if _is_get_attr(node) else None
        if not isinstance(value, torch.Tensor):
            continue
        for user in node.users:
            site = site_of.get(user.name)
            weight = user.args[site.weight] if site is not None and site.weight is not None else None
            if site is None or (node is not weight and node is not _bias_of(user)):
                found[_same(value)] = value
    return list(found.values())


def _unit_name(node: fx.Node, weight_node: Any, taken: Mapping[str, Unit]) -> str:
    if weight_node is not None:
        base = str(weight_node.target)
        base = base.removesuffix(".weight") if base.endswith(".weight") else base
    else:
        base = ".".join(filter(None, (module_path(node), "matmul")))
    base = re.sub(
        r"[|,~\s\x00-\x1f]", "_", base
    )  # names stand in node names, which runtimes list with commas
    name, count = base, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name


def _attributes(node: fx.Node, op: str) -> tuple[tuple[str, str], ...]:
    if not op.startswith("conv"):
        return ()
    names = ["stride", "padding", "dilation", "groups"]
    if op.startswith("conv_transpose"):
        names = ["stride", "padding", "output_padding", "groups", "dilation"]
    values = {
        **dict(zip(names, node.args[3:], strict=False)),
        **{k: v for k, v in node.kwargs.items() if k in names},
    }
    return tuple(sorted((k, str(v)) for k, v in values.items()))


def _macs(
    op: str, inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...], weight: Any, node: fx.Node
) -> int:
    if op.startswith("conv_transpose"):
        return math.prod(inputs[0]) * math.prod(int(n) for n in weight.shape[1:])
    if op.startswith("conv"):
        return math.prod(output) * math.prod(int(n) for n in weight.shape[1:])
    return math.prod(output) * inputs[0][-1]


def _find_edges(
    graph: fx.GraphModule, sites: dict[str, list[Site]], shapes: _Shapes
) -> tuple[dict[str, list[str]], tuple[Edge, ...]]:
    """Operators owned by each unit, and the edges between units.

    A fusible elementwise operator belongs to the unit that ran last before it (a residual add is fused into the
    later convolution); what else it reads arrives over a fused edge. Any other operator passes on its sources.
    """
    unit_of = {site.node: name for name, calls in sites.items() for site in calls}
    site_of = {site.node: site for calls in sites.values() for site in calls}
    order = {name: i for i, name in enumerate(sites)}
    owned: dict[str, list[str]] = {name: [] for name in sites}
    # For each node: the units whose outputs it carries, each with the operators passed on the way.
    carried: dict[str, dict[str, tuple[str, ...]]] = {}
    edges: dict[tuple[str, str, bool], Edge] = {}

    def connect(source: fx.Node, dst: str, fused: bool) -> None:
        for src, via in carried.get(source.name, {}).items():
            if src != dst and (src, dst, fused) not in edges:
                edges[src, dst, fused] = Edge(src, dst, shapes.bytes.get(source.name, 0), via, fused)

    for node in graph.graph.nodes:
        if node.name in unit_of:
            for position in site_of[node.name].activations:
                connect(node.args[position], unit_of[node.name], fused=False)
            carried[node.name] = {unit_of[node.name]: ()}
            continue
        if node.op != "call_function":
            continue
        name = op_name(node)
        sources = [i for i in node.all_input_nodes if carried.get(i.name)]
        if not sources:
            continue
        if name in FUSIBLE:
            fresh = [(s, u) for s in sources for u, via in carried[s.name].items() if not via]
            if fresh:
                main, owner = max(fresh, key=lambda pair: order[pair[1]])
                for source in sources:
                    if source is not main:
                        connect(source, owner, fused=True)
                if name not in _NOT_FUSED:
                    owned[owner].append(name.rstrip("_"))
                carried[node.name] = {owner: ()}
                continue
        carried[node.name] = {
            u: via if name in _NOT_FUSED else (*via, name)[-8:]
            for s in sources
            for u, via in carried[s.name].items()
        }
    return owned, tuple(edges.values())


def output_node(node: fx.Node) -> fx.Node:
    """Where the range of a unit's output is observed: after the clamp that follows it alone, if one does.

    Its Q/DQ stands before the clamp, so that runtimes fuse it into the unit: what it cuts off, the clamp would.
    """
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) in _CLAMPS else node

"""Operators that are others by another name, or that are made of others: spelled out once, at the trace.

What torch defines by other operators (CompositeImplicitAutograd: `concat`, `hsplit`, `multiply`, `special_expit`, ...) is
replaced by what its own definition runs, unless it is among `WHOLE`. Writing into a part of a tensor, which is what operators
in place become, is a concatenation of parts; what does nothing in evaluation mode is left out. So is what torch's exporter has no
ONNX form of, though what it is made of has one (`fmax`, `hypot`, `bilinear`, ...), or a wrong one (`squeeze` of an axis that is
not 1 long, `signbit` of -0).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

WHOLE = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul scaled_dot_product_attention "
    "batch_norm layer_norm group_norm instance_norm rms_norm prelu relu6 selu log_sigmoid softmax log_softmax dropout "
    "feature_dropout to contiguous reshape flatten unflatten chunk split unsafe_chunk repeat_interleave pad where max min std var "
    "max_pool1d max_pool2d max_pool3d avg_pool1d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa lstm gru rnn_tanh rnn_relu".split()
)
"""Composite operators that stay: units, those with a channel rule of their own, and recurrent layers."""

SPELLED = frozenset(
    "mv dot vdot addmv addr baddbmm linalg_cross rot90 floor_divide nansum dist trace".split()
)
"""Operators of their own that torch also tells how to compute by others."""

_DEPENDENT = (
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.nondeterministic_seeded,
)
"""A definition with an operator of these depends on values: it is not spelled out from an example."""


def op_name(node: fx.Node) -> str:
    """`relu` for torch.ops.aten.relu.default."""
    name = getattr(node.target, "overloadpacket", None)
    return str(getattr(name, "__name__", getattr(node.target, "__name__", node.target)))


def is_composite(target: Any) -> bool:
    """Whether torch defines an operator by others, and it is not among those that stay."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    name = target._schema.name.removeprefix("aten::")
    return name not in WHOLE and target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def spell_out(graph: fx.GraphModule) -> None:
    """Replace every alias and every composite operator in a functional graph, in place."""
    for node in list(graph.graph.nodes):
        if node._erased or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.view_copy in node.target.tags:
            node.target = _without_copy(node.target)
        name = op_name(node)
        if name in REWRITTEN:
            _replace(graph, node, REWRITTEN[name])
        elif name in SPELLED:
            inline(graph, node, spelling(*SPELLED))
        elif is_composite(node.target):
            inline(graph, node)
    graph.graph.eliminate_dead_code()


def spelling(*names: str) -> dict[Any, Callable[..., Any]]:
    """How torch computes operators by others."""
    packets = [getattr(aten, name) for name in names]
    return dict(get_decompositions([getattr(p, o) for p in packets for o in p.overloads()]))


def definition(
    node: fx.Node, table: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule | None:
    """What a call runs, on its tensors in the order of its arguments; None where that takes their values.

    table: how to compute operators that torch does not define by others.
    """
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = [v for v in flat if isinstance(v, fx.Node)]
    if not all(isinstance(v.meta.get("val"), torch.Tensor) for v in sources):
        return None

    def call(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(rest) if isinstance(v, fx.Node) else v for v in flat], spec
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    examples = [torch.zeros(v.meta["val"].shape, dtype=v.meta["val"].dtype) for v in sources]
    try:
        with torch.no_grad():
            return make_fx(call, decomposition_table=dict(table or {}))(*examples)
    except Exception:
        return None  # it asks for a value


def inline(
    graph: fx.GraphModule, node: fx.Node, table: Mapping[Any, Callable[..., Any]] | None = None
) -> bool:
    """Replace a call by the operators of its `definition`; False, and nothing done, where it has none."""
    sources = [v for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, fx.Node)]
    body = definition(node, table)
    if body is None:
        return False
    inner = list(body.graph.nodes)
    calls = [n for n in inner if n.op == "call_function"]
    if any(n.op == "get_attr" for n in inner) or any(
        t in getattr(n.target, "tags", ()) for n in calls for t in _DEPENDENT
    ):
        return False
    inputs = [n for n in inner if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(inputs, sources, strict=True))
    with graph.graph.inserting_before(node):
        for n in calls:
            values[n] = graph.graph.node_copy(n, values.__getitem__)
            values[n].meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    _take_over(graph, node, fx.map_arg(inner[-1].args[0], values.__getitem__))
    for new in (values[n] for n in calls):
        if op_name(new) in REWRITTEN:
            _replace(graph, new, REWRITTEN[op_name(new)])
    return True


def _take_over(graph: fx.GraphModule, node: fx.Node, result: Any) -> None:
    """Let all that reads a node read a result in its place: a node, or one for each of its results."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user} reads all results of {node} at once"
            if not user.users:
                graph.graph.erase_node(user)
                continue
            user.replace_all_uses_with(result[user.args[1]])
            graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _without_copy(target: Any) -> Any:
    """`slice` for `slice_copy`: in a graph without writes both are the same."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_copy"), None)
    return getattr(packet, target._overloadname, target)


# ---------------------------------------------------------------- operators that torch does not define by others

Call = Callable[..., fx.Node]


def _replace(graph: fx.GraphModule, node: fx.Node, rewritten: Callable[[fx.Node, Call], Any]) -> None:
    """Replace a node by what a function makes of it, unless that is None."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.graph.call_function(target, args, kwargs)
        values, options = fx.map_arg((args, kwargs), _empty)
        new.meta = {
            "nn_module_stack": node.meta.get("nn_module_stack", {}),
            "val": target(*values, **options),
        }
        return new

    with graph.graph.inserting_before(node):
        result = rewritten(node, call)
    if result is not None:
        _take_over(graph, node, result)


def _empty(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def given(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema)
    }


def _like(value: fx.Node, of: fx.Node, call: Call) -> fx.Node:
    """A tensor in the shape and type of another."""
    value, want = _of_type(value, of, call), of.meta["val"].shape
    return value if value.meta["val"].shape == want else call(aten.expand.default, value, list(want))


def _of_type(value: fx.Node, of: fx.Node, call: Call) -> fx.Node:
    want = of.meta["val"].dtype
    return value if value.meta["val"].dtype == want else call(aten._to_copy.default, value, dtype=want)


def _copy(node: fx.Node, call: Call) -> Any:
    return _like(given(node)["src"], node, call)


def _fill(node: fx.Node, call: Call) -> Any:
    own = given(node)
    if isinstance(own["value"], fx.Node):
        return _like(own["value"], node, call)
    return call(aten.full_like.default, own["self"], own["value"])


def _of_constant(node: fx.Node, call: Call) -> Any:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _zero(node: fx.Node, call: Call) -> Any:
    return call(aten.zeros_like.default, node.args[0])


def _slice_scatter(node: fx.Node, call: Call) -> Any:
    own = given(node)
    x, source, dim = own["self"], own["src"], int(own["dim"])
    size = x.meta["val"].shape[dim]
    taken = range(size)[slice(own["start"], own["end"], own["step"])]
    if taken.step != 1:
        return None
    return _written(x, source, dim, taken.start, taken.start + len(taken), call)


def _select_scatter(node: fx.Node, call: Call) -> Any:
    own = given(node)
    x, dim = own["self"], int(own["dim"])
    place = int(own["index"]) % x.meta["val"].shape[dim]
    source = call(aten.unsqueeze.default, own["src"], dim % x.meta["val"].dim())
    return _written(x, source, dim, place, place + 1, call)


def _written(x: fx.Node, source: fx.Node, dim: int, start: int, end: int, call: Call) -> fx.Node:
    """A tensor with [start, end) along a dimension replaced."""
    size = x.meta["val"].shape[dim]
    if source.meta["val"].dtype != x.meta["val"].dtype:
        source = call(aten._to_copy.default, source, dtype=x.meta["val"].dtype)
    parts = [source] if end > start else []
    if start > 0:
        parts.insert(0, call(aten.slice.Tensor, x, dim, 0, start))
    if end < size:
        parts.append(call(aten.slice.Tensor, x, dim, end, size))
    return parts[0] if len(parts) == 1 else call(aten.cat.default, parts, dim)


def _roll(node: fx.Node, call: Call) -> Any:
    own = given(node)
    x, dims = own["self"], own["dims"]
    if not dims:
        return None
    for dim, shift in zip(dims, own["shifts"], strict=True):
        size = x.meta["val"].shape[dim]
        first = -shift % size if size else 0
        if first:
            parts = [call(aten.slice.Tensor, x, dim, first, size), call(aten.slice.Tensor, x, dim, 0, first)]
            x = call(aten.cat.default, parts, dim)
    return x


def _rrelu(node: fx.Node, call: Call) -> Any:
    own = given(node)
    if own["training"]:
        return None
    slope = (float(own["lower"]) + float(own["upper"])) / 2
    result = call(aten.leaky_relu.default, own["self"], slope)
    return [result] if isinstance(node.meta["val"], list | tuple) else result


def _only_in_training(node: fx.Node, call: Call) -> Any:
    own = given(node)
    return None if own["train"] else own["input"]


def _squeeze(node: fx.Node, call: Call) -> Any:
    """One `squeeze` for each axis that is 1 long: of others the exporter makes a Squeeze that no runtime takes, or nothing.

    An axis of channels that becomes 1 long as they go stays as well.
    """
    x = node.args[0]
    assert isinstance(x, fx.Node)
    shape = x.meta["val"].shape
    asked = given(node).get("dim", range(len(shape)))
    for axis in sorted({d % len(shape) for d in ([asked] if isinstance(asked, int) else asked) if shape}, reverse=True):
        if shape[axis] == 1:
            x = call(aten.squeeze.dim, x, axis)
    return x


def _but_nan(target: Any) -> Callable[[fx.Node, Call], Any]:
    """The larger or the smaller of two numbers, or the one that is a number."""

    def rewritten(node: fx.Node, call: Call) -> Any:
        a, b = (_of_type(given(node)[k], node, call) for k in ("self", "other"))
        chosen = call(target, a, b)
        if not node.meta["val"].is_floating_point():
            return chosen
        chosen = call(aten.where.self, call(aten.isnan.default, b), a, chosen)
        return call(aten.where.self, call(aten.isnan.default, a), b, chosen)

    return rewritten


def _hypot(node: fx.Node, call: Call) -> Any:
    """The larger times a root that is from 1 to 1.5: squares of the numbers themselves may be too large or small for fp16."""
    a, b = (call(aten.abs.default, _of_type(x, node, call)) for x in (given(node)["self"], given(node)["other"]))
    larger = call(aten.maximum.default, a, b)
    some = call(aten.where.ScalarSelf, call(aten.eq.Scalar, larger, 0.0), 1.0, larger)
    ratio = call(aten.div.Tensor, call(aten.minimum.default, a, b), some)
    root = call(aten.sqrt.default, call(aten.add.Scalar, call(aten.mul.Tensor, ratio, ratio), 1.0))
    return call(aten.mul.Tensor, larger, root)


def _negative(x: fx.Node, call: Call) -> fx.Node:
    """Where a number has a sign, which zero may have."""
    below = call(aten.lt.Scalar, x, 0)
    if not x.meta["val"].is_floating_point():
        return below
    return call(aten.logical_or.default, below, call(aten.lt.Scalar, call(aten.reciprocal.default, x), 0))


def _signbit(node: fx.Node, call: Call) -> Any:
    x = given(node)["self"]
    return None if x.meta["val"].dtype == torch.bool else _negative(x, call)


def _copysign(node: fx.Node, call: Call) -> Any:
    own = given(node)
    size, other = call(aten.abs.default, _of_type(own["self"], node, call)), own["other"]
    if not isinstance(other, fx.Node):
        return call(aten.neg.default, size) if math.copysign(1.0, other) < 0 else size
    other = _of_type(other, node, call)
    return call(aten.where.self, _negative(other, call), call(aten.neg.default, size), size)


def _bilinear(node: fx.Node, call: Call) -> Any:
    """A linear layer, and so a unit, on the products of each number of one input with each of the other."""
    own = given(node)
    return _on_pairs(own["input1"], own["input2"], own["weight"], own["bias"], call)


def _trilinear(node: fx.Node, call: Call) -> Any:
    """What decompositions make of `bilinear`."""
    x1, weight, x2, *axes = (given(node)[k] for k in ("i1", "i2", "i3", "expand1", "expand2", "expand3", "sumdim"))
    return _on_pairs(x1, x2, weight, None, call) if axes == [[1, 3], [0], [1, 2], [2, 3]] else None


def _on_pairs(x1: fx.Node, x2: fx.Node, weight: fx.Node, bias: fx.Node | None, call: Call) -> fx.Node:
    """x1: [..., i]. x2: [..., j]. weight: [o, i, j]. Returns [..., o]."""
    pairs = call(aten.mul.Tensor, call(aten.unsqueeze.default, x1, -1), call(aten.unsqueeze.default, x2, -2))
    out, first, second = weight.meta["val"].shape
    rows = call(aten.reshape.default, weight, [out, first * second])
    return call(aten.linear.default, call(aten.flatten.using_ints, pairs, -2, -1), rows, bias)


def _native_layer_norm(node: fx.Node, call: Call) -> Any:
    x, shape, weight, bias, eps = node.args
    return _without_statistics(node, lambda: call(aten.layer_norm.default, x, shape, weight, bias, eps))


def _native_batch_norm(node: fx.Node, call: Call) -> Any:
    """The operator that decompositions make of BatchNorm in evaluation mode, as BatchNorm."""
    x, weight, bias, mean, variance, momentum, eps = node.args
    args = (x, weight, bias, mean, variance, False, momentum, eps, False)
    return _without_statistics(node, lambda: call(aten.batch_norm.default, *args))


def _convolution(node: fx.Node, call: Call) -> Any:
    own = given(node)
    rank = own["weight"].meta["val"].dim() - 2
    args: list[Any] = [own[k] for k in ("input", "weight", "bias", "stride", "padding")]
    if own["transposed"]:
        packet = getattr(aten, f"conv_transpose{rank}d")
        target = packet.default if rank == 1 else packet.input
        args += [own["output_padding"], own["groups"], own["dilation"]]
    else:
        target = getattr(aten, f"conv{rank}d").default
        args += [own["dilation"], own["groups"]]
    return call(target, *args) if 1 <= rank <= 3 else None


def _native_group_norm(node: fx.Node, call: Call) -> Any:
    x, weight, bias, _, _, _, groups, eps = node.args
    return _without_statistics(node, lambda: call(aten.group_norm.default, x, groups, weight, bias, eps))


def _without_statistics(node: fx.Node, made: Callable[[], fx.Node]) -> Any:
    """A norm whose mean and variance nothing reads."""
    return None if any(u.args[1] != 0 for u in node.users if u.users) else [made()]


REWRITTEN: Mapping[str, Callable[[fx.Node, Call], Any]] = {
    **dict.fromkeys(("lift", "lift_fresh", "lift_fresh_copy", "alias", "clone", "detach"), _of_constant),
    "copy": _copy,
    "fill": _fill,
    "zero": _zero,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "roll": _roll,
    "squeeze": _squeeze,
    "fmax": _but_nan(aten.maximum.default),
    "fmin": _but_nan(aten.minimum.default),
    "hypot": _hypot,
    "signbit": _signbit,
    "copysign": _copysign,
    "bilinear": _bilinear,
    "_trilinear": _trilinear,
    "native_layer_norm": _native_layer_norm,
    "_native_batch_norm_legit_no_training": _native_batch_norm,
    "convolution": _convolution,
    "native_group_norm": _native_group_norm,
    **dict.fromkeys(("rrelu", "rrelu_with_noise_functional"), _rrelu),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout", "dropout", "feature_dropout"), _only_in_training),
}  # fmt: skip
"""Operators that writing in place, and evaluation mode, make others of, and those that torch's exporter has no right ONNX form of;
nothing writes into a constant any more.
"""

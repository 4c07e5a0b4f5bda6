"""What units do to labels: linear layers, convolutions, matrix products."""

from __future__ import annotations

import numpy as np
from torch import fx

from hwsearch.graph.canonical import MATMULS, aten, bound, is_get_attr, tensor_attr
from hwsearch.graph.channels.atoms import Ints, Label, along, same, varied
from hwsearch.graph.channels.labels import Labels, arguments


def unit(run: Labels, n: fx.Node) -> Label:
    """The label of what a unit puts out."""
    op, position = run.units[n.name]
    if position is None:
        return product(run, n)
    if op.startswith("conv"):
        return _convolution(run, n, "transpose" in op)
    return _linear(run, n, position)


def _linear(run: Labels, n: fx.Node, position: int) -> Label:
    x, weight = arguments(n)[position - 1], arguments(n)[position]
    in_axis, out_axis = (1, 0) if n.target is aten.linear.default else (0, 1)
    size, rank = run.shape(weight)[out_axis], run.rank(n)
    came: Label = run.get(x)
    if (
        came is not None and came.shape[-1] == 1
    ):  # a layer inside of each head: heads pass, its own features stay
        out, label = np.zeros(size, np.int64), came
        run.weight_axes(
            str(weight.target),
            {0: np.zeros(run.shape(weight)[0], np.int64), 1: np.zeros(run.shape(weight)[1], np.int64)},
        )
    else:
        out = _outputs(run, weight, out_axis, size)
        label = along(out, -1, rank)
        run.weight_axes(str(weight.target), {in_axis: run.vector(x, -1), out_axis: out})
    _bias(run, n, out)
    return label


def _outputs(run: Labels, weight: fx.Node, axis: int, size: int) -> Ints:
    """Atoms of a layer's own output channels: new ones, or those of its other calls."""
    known = run.axes.get(same(run.value[weight]))
    if known is not None:
        return known[axis]
    return run.atoms.fresh((size,)) if size > 1 else np.zeros(size, np.int64)


def _bias(run: Labels, n: fx.Node, out: Ints) -> None:
    if n.target in MATMULS:
        return
    if n.target is aten.addmm.default:
        node = arguments(n)[0]
    else:
        node = arguments(n)[2] if len(arguments(n)) > 2 else n.kwargs.get("bias")
    if node is None:
        return
    tensor = tensor_attr(run.graph, str(node.target)) if is_get_attr(node) else None
    if tensor is None or tuple(tensor.shape) != out.shape:
        run.atoms.pin(out)  # a bias that is computed, or broadcast
        if tensor is not None:
            run.pin(run.stored(node))
        return
    run.weight_axes(str(node.target), {0: out})


def _convolution(run: Labels, n: fx.Node, transpose: bool) -> Label:
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if transpose:
        names[5:] = ["output_padding", "groups", "dilation"]
    x, weight, *_ = given = bound(n, names, [None, None, None, 1, 0, *[1] * (len(names) - 5)])
    groups = given[6]
    rank = run.rank(n)
    channel = rank - (run.rank(weight) - 1)
    came = run.vector(x, channel)
    each_in, each_out = len(came) // groups, run.shape(n)[channel] // groups
    reads, makes = (0, 1) if transpose else (1, 0)
    if groups == 1:
        out = _outputs(run, weight, makes, each_out)
        axes = {reads: came, makes: out}
    elif each_in == 1:  # depthwise: each output belongs to one input
        out = np.repeat(came, each_out)
        axes = {0: came if transpose else out}
    else:  # the same positions of every group go together
        parts = came.reshape(groups, each_in)
        run.atoms.union(parts, parts[:1])
        each = _outputs(run, weight, makes, each_out)[:each_out]
        out = np.tile(each, groups)
        axes = {0: came, 1: each} if transpose else {0: out, 1: came[:each_in]}
    run.weight_axes(str(weight.target), axes)
    _bias(run, n, out)
    return along(out, channel, rank)


def product(run: Labels, n: fx.Node) -> Label:
    """A matrix product of two activations, or with a tensor that is no unit's weight."""
    a, b = arguments(n)[:2]
    if run.rank(a) < 2 or run.rank(b) < 2:
        run.stop(n, "channels are not followed through the product with a vector", run.read(a), run.read(b))
        return None
    rank = run.rank(n)
    (la, sa), (lb, sb) = run.operand(a, rank), run.operand(b, rank)
    if any(d < rank - 2 for x in (la, lb) for d in varied(x)):
        return _by_head(run, la, sa, lb, sb)
    for x, axis in ((la, rank - 1), (lb, rank - 2)):
        if x is not None and x.shape[axis] > 1:
            run.pin(x)  # features that no unit reads: masking them would change nothing
    left, right = (None if x is None else run.atoms.squeezed(x) for x in (la, lb))
    if left is not None and right is not None:
        run.pin(left)
        return right
    return right if left is None else left


def _by_head(run: Labels, la: Label, sa: tuple[int, ...], lb: Label, sb: tuple[int, ...]) -> Label:
    """Products inside of each head: all that a head reads is one slot."""
    rank = len(sa)
    heads = [d for d in range(rank - 2) if any(x is not None and x.shape[d] > 1 for x in (la, lb))]
    tied: list[Ints] = []
    for x, shape, axis in ((la, sa, -1), (lb, sb, -2)):
        if any(shape[d] == 1 for d in heads):
            run.pin(x)  # all heads read it
        elif x is None:
            tied.append(np.zeros((1,) * rank, np.int64))
        else:
            tied.append(run.atoms.tied(x, axis))
    if not tied:
        return None
    run.atoms.union(*tied)
    shape = np.broadcast_shapes(*(x.shape for x in tied))
    found: Ints = run.atoms.find(np.broadcast_to(max(tied, key=np.size), shape))
    return found

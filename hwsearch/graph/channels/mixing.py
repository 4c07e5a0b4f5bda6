"""What operators do to labels that compute over axes: reductions, scans, pools, norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from hwsearch.graph.aliases import given
from hwsearch.graph.canonical import op_name
from hwsearch.graph.channels.atoms import Label, along, varied
from hwsearch.graph.channels.labels import Labels, arguments
from hwsearch.graph.channels.moving import elementwise, unknown

SPATIAL: Mapping[str, int] = {
    **{f"{kind}_pool{d}d": d for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    **{f"_adaptive_avg_pool{d}d": d for d in (2, 3)}, **{f"max_pool{d}d_with_indices": d for d in (2, 3)},
    **{f"upsample_nearest{d}d": d for d in (1, 2, 3)}, **{f"_upsample_nearest_exact{d}d": d for d in (1, 2, 3)},
    **{f"{kind}_pad{d}d": d for kind in ("reflection", "replication") for d in (1, 2, 3)},
    "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_linear1d": 1, "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2, "_upsample_lanczos2d_aa": 2, "upsample_trilinear3d": 3,
}  # fmt: skip

ZERO_IS_NOTHING = frozenset("sum mean linalg_vector_norm norm linalg__powsum count_nonzero".split())
"""Reductions to which a channel that is zero adds nothing."""


def reduced(run: Labels, n: fx.Node) -> Any:
    """Over axes: channels along others stay what they are; to a sum over channels those removed are zero."""
    x, out = arguments(n)[0], run.value[n]
    label: Label = run.read(x)
    if label is None:
        return None
    name, own = op_name(n), given(n)
    axes = own.get("dim")
    axes = range(label.ndim) if axes is None or axes == [] else axes
    dims = [d % label.ndim for d in ([axes] if isinstance(axes, int) else axes)]
    over = set(varied(label)) <= set(dims)
    normalises = name == "mean" and _divides(n)
    if run.residual and normalises and over:
        run.rescaled.append(label)
        return None
    counted = run.value[x].is_floating_point() and not run.is_stored(x)
    if over and counted and name in ZERO_IS_NOTHING and not normalises and _positive_order(own):
        run.summed.add(n)
        return None
    label = run.whole(n, label, dims, "" if normalises else f"{name} over channels mixes them")
    first = out[0] if isinstance(out, list) else out
    if label is not None and first.dim() != label.ndim:
        label = label.reshape([s for d, s in enumerate(label.shape) if d not in dims])
    return [label] * len(out) if isinstance(out, list) else label


def _positive_order(arguments: Mapping[str, Any]) -> bool:
    """Whether a norm, if it is one, is of an order to which zeros add nothing."""
    order = arguments.get("ord", arguments.get("p", 2))
    return order is None or float(order) > 0


def largest(run: Labels, n: fx.Node) -> Any:
    """max and min: of two tensors, of all elements, or along an axis, with positions."""
    return elementwise(run, n) if len(n.all_input_nodes) > 1 else reduced(run, n)


def _divides(n: fx.Node) -> bool:
    """Whether a mean is that of RMSNorm or LayerNorm: its root goes into a quotient."""
    passed = ("add", "sub", "mul", "pow", "rsqrt", "sqrt", "to", "_to_copy", "mean")
    behind = [n]
    for _ in range(
        5
    ):  # of LayerNorm: the mean, the difference, its square, the mean of that, epsilon, the root
        behind = [u for b in behind for u in b.users if op_name(u) in passed]
        if any(op_name(u) in ("rsqrt", "sqrt") for u in behind):
            return True
    return False


def scanned(run: Labels, n: fx.Node) -> Any:
    """Along one axis: softmax, running sums, sorting."""
    out = run.value[n]
    label: Label = run.read(arguments(n)[0])
    if label is not None:
        axis = int(given(n)["dim"]) % label.ndim
        axes = [axis] if op_name(n) != "renorm" else [d for d in range(label.ndim) if d != axis]
        label = run.whole(n, label, axes, f"{op_name(n)} over channels mixes them")
    return [label] * len(out) if isinstance(out, list) else label


def spatial(run: Labels, n: fx.Node) -> Any:
    """Pools and resizing: each channel by itself."""
    x, out, name = arguments(n)[0], run.value[n], op_name(n)
    rank = run.rank(x)
    label = run.whole(n, run.get(x), range(rank - SPATIAL[name], rank), f"{name} over channels mixes them")
    return [label] * len(out) if isinstance(out, list) else label


def unpooled(run: Labels, n: fx.Node) -> Label:
    """Each channel by itself, at the positions that max pooling found in it."""
    rank = run.rank(n)
    label = run.joined([run.operand(i, rank) for i in n.args[:2]])
    return run.whole(
        n, label, range(rank - (3 if "3d" in op_name(n) else 2), rank), "positions are taken over channels"
    )


def sampled(run: Labels, n: fx.Node) -> Label:
    """grid_sampler: each channel at the same coordinates, all of which are read."""
    x, grid = arguments(n)[:2]
    run.stop(n, "coordinates are read as a whole", run.read(grid))
    return run.whole(n, run.read(x), range(2, run.rank(x)), "coordinates are taken over channels")


def patches(run: Labels, n: fx.Node) -> Label:
    """im2col: for each channel the elements of its window side by side."""
    x = arguments(n)[0]
    label: Label = run.get(x)
    if label is None:
        return None
    channel = run.rank(x) - 3
    atoms = run.vector(x, channel)
    return along(np.repeat(atoms, run.shape(n)[channel] // len(atoms)), channel, run.rank(n))


def unpatched(run: Labels, n: fx.Node) -> Label:
    """col2im: the elements of each channel's window are summed back."""
    x = arguments(n)[0]
    label: Label = run.get(x)
    if label is None:
        return None
    channel = run.rank(x) - 2
    atoms = run.vector(x, channel).reshape(run.shape(n)[channel], -1)
    run.atoms.union(atoms, atoms[:, :1])
    return along(run.atoms.find(atoms[:, 0]), channel, run.rank(n))


def per_channel(run: Labels, n: fx.Node) -> Label:
    """BatchNorm, InstanceNorm, PReLU: with tensors of one value for each channel."""
    x = arguments(n)[0]
    label: Label = run.get(x)
    rank = run.rank(x)
    own = [i for i in arguments(n)[1:] if isinstance(i, fx.Node)]
    if not all(run.is_stored(i) for i in own):
        return unknown(run, n)
    if label is None:
        return None
    axis = 1 if rank > 1 else 0
    if op_name(n) == "instance_norm":
        label = run.whole(n, label, range(2, rank))
    if label is None or label.shape[axis] == 1:
        return label
    for other in varied(label):
        if other != axis:
            label = run.atoms.tied(label, other)
    for i in own:
        if run.value[i].numel() == label.size:
            run.atoms.union(run.stored(i).ravel(), label.ravel())
    return run.atoms.find(label)


def layer_norm(run: Labels, n: fx.Node) -> Label:
    """LayerNorm and RMSNorm: they read all features at once."""
    x, shape = arguments(n)[:2]
    label: Label = run.get(x)
    rank = run.rank(x)
    if run.residual and len(shape) == 1 and varied(label) == [rank - 1]:
        assert label is not None
        for i in arguments(n)[2:4]:
            if run.is_stored(i):
                run.atoms.union(run.stored(i), label.ravel())
        run.rescaled.append(label)
        return run.atoms.find(label)
    return run.whole(n, label, range(rank - len(shape), rank))


def group_norm(run: Labels, n: fx.Node) -> Label:
    """A group of a GroupNorm is one slot."""
    x, groups = arguments(n)[:2]
    label = run.whole(n, run.get(x), range(2, run.rank(x)))
    if label is None or label.shape[1] == 1:
        return label
    atoms = run.line(label, 1, run.shape(x)[1])
    parts = atoms.reshape(int(groups), -1)
    run.atoms.union(parts, parts[:, :1])
    for i in arguments(n)[2:4]:
        if run.is_stored(i):
            run.atoms.union(run.stored(i), atoms)
    return along(run.atoms.find(atoms), 1, run.rank(x))

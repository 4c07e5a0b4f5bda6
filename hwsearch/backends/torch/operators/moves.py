"""Operators that move, pick, repeat or make elements. Source: the ONNX operator schemas."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from hwsearch.backends.torch.calls import Call, Run, op, torch_pads

Tensor = torch.Tensor

_ROUNDED: dict[str, Run] = {
    "floor": torch.floor, "ceil": torch.ceil, "round_prefer_ceil": lambda v: torch.floor(v + 0.5),
    "round_prefer_floor": lambda v: torch.ceil(v - 0.5),
}  # fmt: skip
"""`nearest_mode` of Resize."""


@op("Shape")
def shape(call: Call) -> Run:
    """Known at build time: see `calls.KNOWN_BY_SHAPE`."""
    start, end = call.attr("start", 0), call.attr("end")
    return lambda *_: torch.tensor(call.shape()[start:end], dtype=torch.int64)


@op("Size")
def size(call: Call) -> Run:
    return lambda *_: torch.tensor(torch.Size(call.shape()).numel(), dtype=torch.int64)


@op("Reshape")
def reshape(call: Call) -> Run:
    wanted, own = call.ints(1), call.shape()
    if not call.attr("allowzero", 0):
        wanted = [own[i] if n == 0 else n for i, n in enumerate(wanted)]
    return lambda x: x.reshape(wanted)


@op("Flatten")
def flatten(call: Call) -> Run:
    axis, own = call.attr("axis", 1), call.shape()
    rows = torch.Size(own[: axis % len(own) if axis < 0 else axis]).numel()
    return lambda x: x.reshape(rows, -1)


@op("Transpose")
def transpose(call: Call) -> Run:
    perm = call.attr("perm", tuple(reversed(range(len(call.shape())))))
    return lambda x: x.permute(perm)


@op("Squeeze")
def squeeze(call: Call) -> Run:
    axes = call.axes(1)
    kept = [n for i, n in enumerate(call.shape()) if (i not in axes if axes is not None else n != 1)]
    return lambda x: x.reshape(kept)


@op("Unsqueeze")
def unsqueeze(call: Call) -> Run:
    given = call.ints(1) if call.has(1) else list(call.attr("axes", ()))
    rank = len(call.shape()) + len(given)
    axes, own = {a % rank for a in given}, iter(call.shape())
    wanted = [1 if i in axes else next(own) for i in range(rank)]
    return lambda x: x.reshape(wanted)


@op("Expand")
def expand(call: Call) -> Run:
    wanted = np.broadcast_shapes(call.shape(), tuple(call.ints(1)))
    return lambda x: x.expand(wanted)


@op("Tile")
def tile(call: Call) -> Run:
    times = call.ints(1)
    return lambda x: x.repeat(times)


@op("Concat")
def concat(call: Call) -> Run:
    axis = call.axis(0)
    return lambda *x: torch.cat(x, axis)


@op("Split")
def split(call: Call) -> Run:
    axis, outputs = call.axis(0), len(call.node.outputs)
    whole = call.shape()[axis]
    given = call.ints(1) if call.has(1) else call.attr("split")
    if given is None:
        each = -(-whole // call.attr("num_outputs", outputs))
        given = [min(each, whole - start) for start in range(0, whole, each)]
    return lambda x: torch.split(x, list(given), axis)


@op("Slice")
def slice_(call: Call) -> Run:
    starts, ends, own = call.ints(1), call.ints(2), call.shape()
    axes = [a % len(own) for a in call.ints(3)] if call.has(3) else list(range(len(starts)))
    steps = call.ints(4) if call.has(4) else [1] * len(starts)
    cuts, backwards = [slice(None)] * len(own), dict[int, Tensor]()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step > 0:
            cuts[axis] = slice(start, min(end, own[axis]), step)
        else:
            taken = range(*slice(start, end if end >= -own[axis] else None, step).indices(own[axis]))
            backwards[axis] = torch.tensor(list(taken), dtype=torch.int64)
    if backwards:
        forwards = tuple(cuts)
        return _picked(call, backwards, lambda x: x[forwards])
    return lambda x, cuts=tuple(cuts): x[cuts]


def _picked(call: Call, indices: dict[int, Tensor], first: Run = lambda x: x) -> Run:
    """Picks elements along some axes, each by its indices."""
    kept = {axis: call.keep(index) for axis, index in indices.items()}

    def run(x: Tensor) -> Tensor:
        y: Tensor = first(x)
        for axis, index in kept.items():
            y = y.index_select(axis, index)
        return y

    return run


@op("Gather")
def gather(call: Call) -> Run:
    axis, own, index = call.axis(0), call.shape(), call.maybe(1)
    if index is not None and index.dim() == 0:
        return lambda x, place=int(index) % own[axis]: x.select(axis, place)
    if index is not None:
        flat = index.reshape(-1).long() % max(own[axis], 1)
        wanted = (*own[:axis], *index.shape, *own[axis + 1 :])
        picked = _picked(call, {axis: flat})
        return lambda x: picked(x).reshape(wanted)
    count, shape = own[axis], call.shape(1)
    wanted = (*own[:axis], *shape, *own[axis + 1 :])
    # a negative index counts from the end, and torch would read beside the tensor
    return lambda x, i: x.index_select(axis, torch.remainder(i.reshape(-1), count)).reshape(wanted)


@op("GatherElements")
def gather_elements(call: Call) -> Run:
    axis, own = call.axis(0), call.shape()
    return lambda x, i: torch.gather(x, axis, torch.remainder(i, own[axis]).long())


@op("GatherND")
def gather_nd(call: Call) -> Run:
    if call.attr("batch_dims", 0):
        raise call.refuse("batch_dims are not supported")
    return lambda x, i: x[tuple(i.long().unbind(-1))]


@op("ScatterElements")
def scatter_elements(call: Call) -> Run:
    axis, own, how = call.axis(0), call.shape(), call.attr("reduction", "none")
    reduce = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(how)

    def run(x: Tensor, i: Tensor, values: Tensor) -> Tensor:
        index = torch.remainder(i, own[axis]).long()
        return (
            x.scatter(axis, index, values)
            if reduce is None
            else x.scatter_reduce(axis, index, values, reduce)
        )

    return run


@op("ScatterND")
def scatter_nd(call: Call) -> Run:
    how = call.attr("reduction", "none")
    if how not in ("none", "add"):
        raise call.refuse(f"reduction {how} is not supported")
    return lambda x, i, v: x.index_put(tuple(i.long().unbind(-1)), v, accumulate=how == "add")


@op("Pad")
def pad(call: Call) -> Run:
    own, mode, amounts = call.shape(), call.attr("mode", "constant"), call.ints(1)
    axes = [a % len(own) for a in call.ints(3)] if call.has(3) else list(range(len(own)))
    begins, ends = [0] * len(own), [0] * len(own)
    for place, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[place], amounts[len(axes) + place]
    if mode == "constant":
        value = call.const(2).item() if call.has(2) else 0
        widths = torch_pads(begins + ends)
        return lambda x: F.pad(x, widths, value=value)
    return _picked(call, {
        axis: _padded(own[axis], begins[axis], ends[axis], mode)
        for axis in range(len(own)) if begins[axis] or ends[axis]
    })  # fmt: skip


def _padded(count: int, begin: int, end: int, mode: str) -> Tensor:
    """Which elements of an axis stand in it once it is padded by `reflect`, `edge` or `wrap`."""
    index = torch.arange(-begin, count + end)
    if mode == "edge":
        return index.clamp(0, count - 1)
    if mode == "wrap":
        return index % count
    turn = max(2 * (count - 1), 1)
    index = index % turn
    return torch.where(index < count, index, turn - index)


@op("ConstantOfShape")
def constant_of_shape(call: Call) -> Run:
    wanted, value = call.ints(0), call.attr("value", torch.zeros(1))
    return lambda: torch.full(wanted, value.item(), dtype=value.dtype)


@op("Range")
def range_(call: Call) -> Run:
    start, limit, step = (call.const(i) for i in range(3))
    return lambda: torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


@op("Trilu")
def trilu(call: Call) -> Run:
    (k,) = call.ints(1) if call.has(1) else (0,)
    run = torch.triu if call.attr("upper", 1) else torch.tril
    return lambda x: run(x, k)


@op("OneHot")
def one_hot(call: Call) -> Run:
    (depth,), values = call.ints(1), call.const(2)
    off, on = (
        call.keep(v) for v in values
    )  # on the device: numbers would be copied there at every inference
    axis = call.attr("axis", -1) % (len(call.shape()) + 1)
    places = call.keep(torch.arange(depth))

    def run(index: Tensor) -> Tensor:
        hit = torch.remainder(index, depth).unsqueeze(-1) == places
        inside = ((index >= -depth) & (index < depth)).unsqueeze(-1)
        return torch.where(hit & inside, on, off).movedim(-1, axis)

    return run


@op("DepthToSpace")
def depth_to_space(call: Call) -> Run:
    b, (n, c, h, w) = call.attr("blocksize"), call.shape()
    if call.attr("mode", "DCR") == "CRD":
        return lambda x: F.pixel_shuffle(x, b)
    return lambda x: (
        x.reshape(n, b, b, c // (b * b), h, w)
        .permute(0, 3, 4, 1, 5, 2)
        .reshape(n, c // (b * b), h * b, w * b)
    )


@op("SpaceToDepth")
def space_to_depth(call: Call) -> Run:
    b, (n, c, h, w) = call.attr("blocksize"), call.shape()
    return lambda x: (
        x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)
    )


@op("Resize")
def resize(call: Call) -> Run:
    """Nearest by picking elements, exactly as ONNX counts them; linear and cubic where torch counts as ONNX does."""
    own, mode = call.shape(), call.attr("mode", "nearest")
    where = call.attr("coordinate_transformation_mode", "half_pixel")
    axes = [a % len(own) for a in call.attr("axes", range(len(own)))]
    scales, sizes = dict.fromkeys(range(len(own)), 1.0), dict(enumerate(own))
    if call.has(3):
        if call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise call.refuse("keep_aspect_ratio_policy is not supported")
        sizes |= zip(axes, call.ints(3), strict=True)
        scales = {a: sizes[a] / own[a] for a in sizes}
    else:
        scales |= zip(axes, (float(s) for s in call.const(2).tolist()), strict=True)
        sizes = {a: int(own[a] * scales[a]) for a in scales}
    for unread in (1, 2):
        call.maybe(unread)
    if where not in ("asymmetric", "align_corners", "half_pixel", "pytorch_half_pixel"):
        raise call.refuse(f"{where} coordinates are not supported")
    changed = [a for a in range(len(own)) if sizes[a] != own[a] or scales[a] != 1.0]
    if not changed:
        return lambda x: x
    if mode == "nearest":
        how = call.attr("nearest_mode", "round_prefer_floor")
        asymmetric = where == "asymmetric" and how == "floor" and len(own) in (3, 4, 5) and min(changed) > 1
        if asymmetric and all(sizes[a] % own[a] == 0 for a in changed):
            wanted = [sizes[a] for a in range(2, len(own))]
            return lambda x: F.interpolate(x, wanted)
        return _picked(call, {a: _nearest(own[a], sizes[a], scales[a], where, how) for a in changed})
    kinds = {
        ("linear", 3): "linear",
        ("linear", 4): "bilinear",
        ("linear", 5): "trilinear",
        ("cubic", 4): "bicubic",
    }
    kind = kinds.get((mode, len(own)))
    aligned = where == "align_corners"
    same = (
        aligned
        or where == "half_pixel"
        or (where == "pytorch_half_pixel" and min(sizes[a] for a in changed) > 1)
    )
    if kind is None or not same or min(changed) < 2 or call.attr("exclude_outside", 0):
        raise call.refuse(f"torch has no {mode} interpolation of {len(own)} axes with {where} coordinates")
    if mode == "cubic" and abs(call.attr("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        raise call.refuse("torch's cubic coefficient is -0.75")
    smooth = bool(call.attr("antialias", 0))
    options = {"mode": kind, "align_corners": aligned, "antialias": smooth}
    if call.has(3) or aligned:
        wanted = [sizes[a] for a in range(2, len(own))]
        return lambda x: F.interpolate(x, wanted, **options)
    factors = [scales[a] for a in range(2, len(own))]
    return lambda x: F.interpolate(x, scale_factor=factors, recompute_scale_factor=False, **options)


def _nearest(count: int, size: int, scale: float, where: str, how: str) -> Tensor:
    """Which element each place of a resized axis takes (ONNX Resize: coordinate_transformation_mode, nearest_mode)."""
    place = torch.arange(size, dtype=torch.float64)
    if where == "asymmetric":
        x = place / scale
    elif where == "align_corners":
        x = place * (count - 1) / max(size - 1, 1)
    elif where == "half_pixel" or size > 1:
        x = (place + 0.5) / scale - 0.5
    else:
        x = place * 0.0
    index: Tensor = _ROUNDED[how](x).long()
    return index.clamp(0, count - 1)

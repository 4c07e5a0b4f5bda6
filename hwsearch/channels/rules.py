"""What operators outside of units do to labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from hwsearch.canonical import MATMULS, op_name
from hwsearch.channels.atoms import Ints, Label, along, varied
from hwsearch.channels.labels import Labels, arguments
from hwsearch.channels.weights import product

ELEMENTWISE = (
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish clamp clamp_min clamp_max "
    "add sub mul div rsub neg abs sqrt rsqrt exp log log1p expm1 pow erf softplus softsign square reciprocal sin cos where "
    "maximum minimum masked_fill logical_not logical_and logical_or bitwise_not eq ne lt le gt ge floor ceil round sign "
    "true_divide addcmul addcdiv lerp threshold hardshrink softshrink log_sigmoid tanhshrink nan_to_num isnan isinf zeros_like "
    "ones_like full_like"
)
KEPT = "to _to_copy dropout feature_dropout alias detach clone contiguous lift_fresh_copy type_as"
MOVED = (
    "reshape view _unsafe_view permute transpose t numpy_T narrow split split_with_sizes chunk unbind expand_as mT "
    "unsqueeze squeeze flatten unflatten flip movedim swapaxes swapdims pixel_shuffle pixel_unshuffle "
    "unsafe_split unsafe_chunk tile select"
)
REPEATED = "expand repeat repeat_interleave"
REDUCED = "mean sum amax amin std var prod logsumexp linalg_vector_norm norm any all"
SCANNED = "softmax log_softmax _softmax _log_softmax cumsum"
SPATIAL: Mapping[str, int] = {
    **{f"{kind}_pool{d}d": d for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)},
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "upsample_nearest1d": 1, "upsample_nearest2d": 2,
    "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_linear1d": 1,
    "upsample_bicubic2d": 2, "_upsample_bicubic2d_aa": 2, "upsample_trilinear3d": 3,
}  # fmt: skip


def operator_label(run: Labels, n: fx.Node) -> Any:
    """The label of an operator's result: a list where it has several."""
    if n.target in MATMULS:
        return product(run, n)
    return RULES.get(op_name(n).rstrip("_"), unknown)(run, n)


def unknown(run: Labels, n: fx.Node, why: str = "") -> Label:
    """All that it reads stays whole."""
    if not n.users:
        return None  # an assertion
    why = why or f"channels are not followed through operator {n.target}"
    sources = n.all_input_nodes
    if n not in run.constant and any(
        run.is_stored(i) and run.rank(i) > 1 and run.value[i].is_floating_point() for i in sources
    ):
        run.report(n, why)  # a layer of its own
    run.stop(n, why, *(run.get(i) for i in sources))
    for i in sources:
        if run.is_stored(i):
            run.pin(run.stored(i))
    return None


def elementwise(run: Labels, n: fx.Node) -> Label:
    return run.joined([run.operand(i, run.rank(n)) for i in n.all_input_nodes])


def kept(run: Labels, n: fx.Node) -> Label:
    found: Label = run.read(arguments(n)[0])
    return found


# ---------------------------------------------------------------- operators that move


def moved(run: Labels, n: fx.Node) -> Any:
    """The operator itself on the labels, spread out to the tensors' shapes."""

    def spread(i: fx.Node) -> Any:
        value = run.value[i]
        return _spread(run.read(i), run.shape(i)) if isinstance(value, torch.Tensor) else value

    args, kwargs = fx.map_arg((n.args, n.kwargs), spread)
    try:
        result = _function(n)(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):
        return unknown(run, n)
    return [_atoms(r) for r in result] if isinstance(result, list | tuple) else _atoms(result)


def _function(n: fx.Node) -> Callable[..., Any]:
    assert callable(n.target)
    return n.target


def _spread(label: Label, shape: tuple[int, ...]) -> torch.Tensor:
    """A label as float64, which every operator takes and which is exact below 2**53."""
    if label is None:
        return torch.zeros(shape, dtype=torch.float64)
    return torch.from_numpy(np.broadcast_to(label, shape).astype(np.float64))


def _atoms(labels: torch.Tensor) -> Ints:
    found: Ints = labels.numpy().astype(np.int64)
    return found


def sliced(run: Labels, n: fx.Node) -> Any:
    x, *rest = arguments(n)
    axis, step = rest[0] if rest else 0, rest[3] if len(rest) > 3 else 1
    if step != 1 and axis % run.rank(x) in varied(run.get(x)):
        return unknown(run, n, "every other channel is taken by its number")
    return moved(run, n)


def rolled(run: Labels, n: fx.Node) -> Any:
    x, _, axes = (*arguments(n), ())[:3]
    if not axes or any(d % run.rank(x) in varied(run.get(x)) for d in axes):
        return unknown(run, n)
    return moved(run, n)


def indexed(run: Labels, n: fx.Node) -> Any:
    """Taken by tensors of positions: along other axes than those of channels."""
    x = arguments(n)[0]
    if op_name(n) == "index":
        axes = [d for d, i in enumerate(arguments(n)[1]) if i is not None]
        positions = [i for i in arguments(n)[1] if i is not None]
    else:
        axes, positions = [int(arguments(n)[1]) % run.rank(x)], [arguments(n)[2]]
    if any(run.value[i].dtype == torch.bool for i in positions):
        return unknown(run, n)
    label = run.read(x)
    if label is None:
        return None
    along_others = [d for d in varied(label) if d not in axes]
    if varied(label) and not along_others:
        return unknown(run, n, "channels are taken by their numbers")
    for axis in axes:
        label = run.atoms.tied(label, axis)
    args = fx.map_arg(arguments(n), lambda i: _spread(label, run.shape(i)) if i is x else run.value[i])
    return _atoms(_function(n)(*args))


def concatenated(run: Labels, n: fx.Node) -> Any:
    """cat and stack: along an axis without channels (tokens), those of all parts are tied."""
    axis = int(arguments(n)[1]) % run.rank(n) if len(arguments(n)) > 1 else 0
    sources = n.all_input_nodes
    parts = [run.read(i) for i in sources]
    if op_name(n) == "stack" or not any(axis in varied(p) for p in parts):
        nothing = np.zeros((1,) * run.rank(sources[0]), np.int64)
        run.atoms.union(*(nothing if p is None else p for p in parts))
    return moved(run, n)


def repeated(run: Labels, n: fx.Node) -> Any:
    """Copies of a tensor without channels may be any number, for instance those of a mask for all heads.

    So may copies of the keys and values of a single head, for the heads of the queries: they themselves stay whole.
    """
    x = arguments(n)[0]
    rank, shape = run.rank(n), run.shape(n)
    before, label = (1,) * (rank - run.rank(x)) + run.shape(x), run.read(x)
    free = [d for d in range(1, rank) if before[d] == 1 < shape[d]]
    if label is not None:
        single = rank >= 4 and free == [rank - 3] and varied(label) == [label.ndim - 1] and label.ndim > 2
        if not single or before[-2] == 1:
            return moved(run, n)
        run.pin(label)
    return run.atoms.fresh(tuple(shape[d] if d in free else 1 for d in range(rank))) if free else None


def shuffled(run: Labels, n: fx.Node) -> Label:
    """channel_shuffle: the same channels of every group go together."""
    x, groups = arguments(n)[:2]
    label: Label = run.get(x)
    if label is None:
        return None
    parts = run.vector(x, 1).reshape(int(groups), -1)
    run.atoms.union(parts, parts[:1])
    return along(run.atoms.find(parts.T.ravel()), 1, run.rank(x))


def padded(run: Labels, n: fx.Node) -> Label:
    x, pads = arguments(n)[:2]
    mode = arguments(n)[2] if op_name(n) == "pad" and len(arguments(n)) > 2 else "constant"
    label: Label = run.get(x)
    if label is None:
        return None
    axes = [(run.rank(x) - 1 - index // 2, index % 2, amount) for index, amount in enumerate(pads)]
    axes = [(d, after, amount) for d, after, amount in axes if amount and label.shape[d] > 1]
    if any(amount < 0 for _, _, amount in axes) or (axes and mode != "constant"):
        return unknown(run, n)
    for axis, after, amount in axes:
        stays = np.zeros([amount if d == axis else s for d, s in enumerate(label.shape)], np.int64)
        label = np.concatenate([label, stays] if after else [stays, label], axis)
    return label


def embedding(run: Labels, n: fx.Node) -> Label:
    weight = arguments(n)[0]
    if not run.is_stored(weight):
        return unknown(run, n)
    return along(run.columns(weight), -1, run.rank(n))


def glu(run: Labels, n: fx.Node) -> Label:
    label: Label = run.get(arguments(n)[0])
    axis = int(arguments(n)[1]) if len(arguments(n)) > 1 else -1
    if label is None or label.shape[axis] == 1:
        return label
    a, b = np.split(label, 2, axis)
    run.atoms.union(a, b)
    return run.atoms.find(a)


# ---------------------------------------------------------------- operators that mix


def reduced(run: Labels, n: fx.Node) -> Label:
    x, out = arguments(n)[0], run.value[n]
    out = out[0] if isinstance(out, list) else out
    label: Label = run.get(x)
    if label is None:
        return None
    name = op_name(n)
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    given: Any = arguments(n)[position] if len(arguments(n)) > position else n.kwargs.get("dim")
    given = range(label.ndim) if given is None or given == [] else given
    dims = [d % label.ndim for d in ([given] if isinstance(given, int) else given)]
    normalises = name == "mean" and _divides(n)
    if run.residual and normalises and set(varied(label)) <= set(dims):
        run.rescaled.append(label)
        return None
    label = run.whole(n, label, dims, "" if normalises else f"{name} over channels mixes them")
    if label is None or out.dim() == label.ndim:
        return label
    return label.reshape([s for d, s in enumerate(label.shape) if d not in dims])


def largest(run: Labels, n: fx.Node) -> Any:
    """max and min: of two tensors, of all elements, or along an axis, with positions."""
    if len(n.all_input_nodes) > 1:
        return elementwise(run, n)
    label = reduced(run, n)
    return [label] * len(run.value[n]) if isinstance(run.value[n], list) else label


def _divides(n: fx.Node) -> bool:
    """Whether a mean is that of RMSNorm or LayerNorm: its root goes into a quotient."""
    passed = ("add", "sub", "mul", "pow", "square", "rsqrt", "sqrt", "to", "mean")
    behind = [n]
    for _ in range(3):
        behind = [u for b in behind for u in b.users if op_name(u) in passed]
        if any(op_name(u) in ("rsqrt", "sqrt") for u in behind):
            return True
    return False


def scanned(run: Labels, n: fx.Node) -> Label:
    label: Label = run.get(arguments(n)[0])
    if label is None:
        return None
    axis = int(arguments(n)[1]) % label.ndim
    return run.whole(n, label, [axis], f"{op_name(n)} over channels mixes them")


def spatial(run: Labels, n: fx.Node) -> Any:
    """Pools and resizing: each channel by itself."""
    x, out, name = arguments(n)[0], run.value[n], op_name(n)
    rank = run.rank(x)
    label = run.whole(n, run.get(x), range(rank - SPATIAL[name], rank), f"{name} over channels mixes them")
    return [label] * len(out) if isinstance(out, list) else label


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


RULES: dict[str, Callable[[Labels, fx.Node], Any]] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(KEPT.split(), kept),
    **dict.fromkeys(MOVED.split(), moved),
    **dict.fromkeys(REDUCED.split(), reduced),
    **dict.fromkeys(SCANNED.split(), scanned),
    **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), per_channel),
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), padded),
    **dict.fromkeys(REPEATED.split(), repeated),
    **dict.fromkeys(("index", "index_select"), indexed),
    **dict.fromkeys(("max", "min"), largest),
    **dict.fromkeys(("cat", "stack"), concatenated),
    "slice": sliced,
    "roll": rolled,
    "channel_shuffle": shuffled,
    "embedding": embedding,
    "group_norm": group_norm,
    "glu": glu,
}

"""What operators do to labels that keep values, move them or combine them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from hwsearch.graph.aliases import given
from hwsearch.graph.canonical import op_name
from hwsearch.graph.channels.atoms import Ints, Label, along, varied
from hwsearch.graph.channels.labels import LARGEST, Labels, arguments
from hwsearch.graph.channels.reasons import reason_of


def unknown(run: Labels, n: fx.Node, why: str = "") -> Label:
    """All that it reads stays whole."""
    if not n.users:
        return None  # an assertion
    if not why:
        why = f"channels are not followed through operator {n.target}"
        why += f": {reason}" if (reason := reason_of(n.target)) else ""
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


def elementwise(run: Labels, n: fx.Node) -> Any:
    several = isinstance(run.value[n], list)
    rank = run.value[n][0].dim() if several else run.rank(n)
    label = run.joined([run.operand(i, rank) for i in n.all_input_nodes])
    return [label] * len(run.value[n]) if several else label


def kept(run: Labels, n: fx.Node) -> Label:
    found: Label = run.read(arguments(n)[0])
    return found


def moved(run: Labels, n: fx.Node) -> Any:
    """The operator itself on the labels, spread out to the tensors' shapes."""

    def whole(i: fx.Node) -> Any:
        value = run.value[i]
        return as_tensor(run.read(i), run.shape(i)) if isinstance(value, torch.Tensor) else value

    args, kwargs = fx.map_arg((n.args, n.kwargs), whole)
    try:
        result = function_of(n)(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):
        return unknown(run, n)
    return [as_atoms(r) for r in result] if isinstance(result, list | tuple) else as_atoms(result)


def function_of(n: fx.Node) -> Callable[..., Any]:
    assert callable(n.target)
    return n.target


def as_tensor(label: Label, shape: tuple[int, ...]) -> torch.Tensor:
    """A label as float64, which every operator takes and which is exact below 2**53."""
    if label is None:
        return torch.zeros(shape, dtype=torch.float64)
    return torch.from_numpy(np.broadcast_to(label, shape).astype(np.float64))


def as_atoms(labels: torch.Tensor) -> Ints:
    found: Ints = labels.numpy().astype(np.int64)
    return found


def unfolded(run: Labels, n: fx.Node) -> Any:
    """Windows along an axis without channels."""
    x, axis = arguments(n)[:2]
    if int(axis) % run.rank(x) in varied(run.get(x)):
        return unknown(run, n, "windows over channels mix them")
    return moved(run, n)


def triangular(run: Labels, n: fx.Node) -> Label:
    """tril and triu: zeros on one side of a diagonal, which is where it is only if both axes stay whole."""
    x = arguments(n)[0]
    return run.whole(
        n, run.read(x), range(run.rank(x) - 2, run.rank(x)), "a diagonal over channels is not followed"
    )


def diagonal(run: Labels, n: fx.Node) -> Any:
    """diagonal and diag_embed: of axes, or along one, without channels."""
    x, own = arguments(n)[0], given(n)
    rank = run.rank(x)
    dims = [rank - 1] if op_name(n) == "diag_embed" else [own["dim1"] % rank, own["dim2"] % rank]
    if not set(dims).isdisjoint(varied(run.read(x))):
        return unknown(run, n, "a diagonal over channels is not followed")
    return moved(run, n)


def looked_up(run: Labels, n: fx.Node) -> Label:
    """bucketize and isin: each element by itself, in a list that is read as a whole."""
    x, *others = n.all_input_nodes
    run.stop(n, "a list is read as a whole", *(run.read(i) for i in others))
    found: Label = run.read(x)
    return found


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
    if varied(label):
        single = rank >= 4 and free == [rank - 3] and varied(label) == [label.ndim - 1] and label.ndim > 2
        if not single or before[-2] == 1:
            return moved(run, n)
        run.pin(label)
    return run.atoms.fresh(tuple(shape[d] if d in free else 1 for d in range(rank))) if free else None


def filled(run: Labels, n: fx.Node) -> Label:
    """A tensor of one value may have any number of channels."""
    shape = run.shape(n)
    if n.op != "call_function" or np.prod(shape, dtype=np.int64) > LARGEST:
        return None
    free = [d for d in range(min(1, len(shape) - 1), len(shape)) if shape[d] > 1] if shape else []
    return run.atoms.fresh(tuple(shape[d] if d in free else 1 for d in range(len(shape)))) if free else None


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

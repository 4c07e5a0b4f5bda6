"""What operators do to labels that take or write elements by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hwsearch.graph.aliases import given
from hwsearch.graph.canonical import op_name
from hwsearch.graph.channels.atoms import Ints, Label, same, varied
from hwsearch.graph.channels.labels import Labels, arguments
from hwsearch.graph.channels.moving import as_atoms, as_tensor, function_of, moved, unknown

AT_POSITIONS = (
    "gather scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce".split()
)
BY_NUMBER = ("index", "_unsafe_index", "index_select")
BY_VALUE = "channels are taken by numbers that are not constants of one reader"


def sliced(run: Labels, n: fx.Node) -> Any:
    x, *rest = arguments(n)
    axis, step = rest[0] if rest else 0, rest[3] if len(rest) > 3 else 1
    if step != 1 and axis % run.rank(x) in varied(run.get(x)):
        return unknown(run, n, "every other channel is taken by its number")
    return moved(run, n)


def rolled(run: Labels, n: fx.Node) -> Any:
    """All elements as one line: along axes it is slices and a concatenation."""
    return unknown(run, n, "all elements are rolled as one line") if varied(run.get(n.args[0])) else None


def _by_number(run: Labels, n: fx.Node, x: fx.Node, axis: int, positions: fx.Node) -> Label:
    """Channels taken by numbers that the graph stores, and that nothing else reads: the numbers of those left are known."""
    path = str(positions.target)
    readers = [
        u for i in run.graph.graph.nodes if i.op == "get_attr" and str(i.target) == path for u in i.users
    ]
    tensor, label = run.value[positions], run.read(x)
    if tensor.dim() != 1 or label is None or any(rule not in BY_NUMBER for rule in map(op_name, readers)):
        return unknown(run, n, BY_VALUE)
    for other in varied(label):
        if other != axis:
            label = run.atoms.tied(label, other)
    found: Ints = label.take(tensor.numpy() % run.shape(x)[axis], axis)
    key = run.path[path] = same(tensor)
    run.atoms.union(run.elements.setdefault(key, found.ravel()), found.ravel())
    run.numbers[path] = x
    return run.atoms.find(found)


def indexed(run: Labels, n: fx.Node) -> Any:
    """Taken by tensors of positions."""
    x = arguments(n)[0]
    if op_name(n) == "index_select":
        axes, positions = [int(arguments(n)[1]) % run.rank(x)], [arguments(n)[2]]
    else:
        axes = [d for d, i in enumerate(arguments(n)[1]) if i is not None]
        positions = [i for i in arguments(n)[1] if i is not None]
    label = run.read(x)
    if label is None:
        return None
    if any(run.value[i].dtype == torch.bool for i in positions):
        return unknown(run, n, "how many are taken depends on values")
    along = [d for d in varied(label) if d in axes]
    if along and len(axes) == 1 and run.is_stored(positions[0]) and not run.is_stored(x):
        return _by_number(run, n, x, axes[0], positions[0])
    if along and len(along) == len(varied(label)):
        return unknown(run, n, BY_VALUE)
    for axis in axes:
        label = run.atoms.tied(label, axis)
    args = fx.map_arg(arguments(n), lambda i: as_tensor(label, run.shape(i)) if i is x else run.value[i])
    return as_atoms(function_of(n)(*args))


def at_positions(run: Labels, n: fx.Node) -> Any:
    """gather, scatter, index_add and their like: at positions along one axis, which is not that of channels."""
    own = given(n)
    x = own["self"]
    axis = int(own["dim"]) % run.rank(x)
    whole = 1 if op_name(n).startswith("index") else None  # positions are then one vector for all channels
    tensors = [x, *(own[k] for k in ("src", "source", "index") if isinstance(own.get(k), fx.Node))]
    tensors = [t for t in tensors if whole is None or t is not own["index"]]
    operands = []
    for t in tensors:
        label: Any = run.read(t)
        if axis in varied(label):
            label = run.whole(n, label, [axis], BY_VALUE)
        operands.append((label, _without(run.shape(t), axis)))
    return _joined(run, n, operands)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(1 if d == axis else size for d, size in enumerate(shape))


def _joined(run: Labels, n: fx.Node, operands: Sequence[tuple[Any, tuple[int, ...]]]) -> Any:
    """Element by element along the other axes, if all tensors are as large there as the result."""
    vary = {d for label, _ in operands for d in varied(label)}
    sizes = [{shape[d] for _, shape in operands} for d in vary]
    if any(len(s) > 1 for s in sizes):
        return unknown(run, n, "some channels are taken by their position")
    ranks = {len(shape) for _, shape in operands}
    if len(ranks) > 1:
        return unknown(run, n)
    return run.joined([(None if x is None else x, shape) for x, shape in operands])

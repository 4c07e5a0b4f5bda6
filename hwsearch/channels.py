"""Which channels of a traced network must stay or go together.

Every index along a prunable axis (a channel, a feature, an attention head's column) is an atom. Running the graph
once on labels instead of values, each operator says which atoms are the same (a residual add), which it moves (a
reshape, a concatenation, a channel shuffle: the operator itself, applied to the labels), and which may not go at
all (the network's outputs). What is left connected is a slot; slots that run through the same tensors form a group.
The idea is that of dependency graphs (Fang et al., DepGraph, 2023), with the reshapes of attention and shuffles
followed index by index.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from hwsearch.canonical import MATMULS, aten, bound, is_get_attr, module_path, op_name, tensor_attr
from hwsearch.network import ChannelGroup, Network, Way

Ints = NDArray[np.int64]

ALWAYS = 0
"""The atom, and the slot, of what can never be removed."""

LARGEST = 1 << 20
"""Stored tensors of more elements, outside of units, stay whole (embeddings are looked at as columns)."""

MOVES = frozenset(
    "reshape view _unsafe_view permute transpose t numpy_T slice select narrow split split_with_sizes chunk unbind cat stack "
    "expand expand_as unsqueeze squeeze flatten unflatten contiguous clone alias detach to _to_copy flip roll repeat tile "
    "movedim swapaxes swapdims dropout lift_fresh_copy pixel_shuffle pixel_unshuffle channel_shuffle repeat_interleave "
    "index_select unsafe_split unsafe_chunk feature_dropout".split()
)
ELEMENTWISE = frozenset(
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish clamp clamp_min clamp_max "
    "add sub mul div rsub neg abs sqrt rsqrt exp log log1p expm1 pow erf softplus softsign square reciprocal sin cos where "
    "maximum minimum masked_fill logical_not logical_and logical_or bitwise_not eq ne lt le gt ge floor ceil round sign "
    "true_divide addcmul addcdiv lerp threshold hardshrink softshrink log_sigmoid tanhshrink nan_to_num isnan isinf".split()
)
REDUCTIONS = frozenset("mean sum amax amin std var prod logsumexp linalg_vector_norm norm any all".split())
ALONG = frozenset("softmax log_softmax _softmax _log_softmax cumsum".split())
SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d".split()
)


@dataclass(frozen=True)
class Axis:
    """The slot of each index along one axis of a tensor; `ALWAYS` where the index stays."""

    axis: int
    slots: Ints

    def kept(self, mask: NDArray[np.bool_]) -> Ints:
        """Indices that stay, where `mask` says which slots do."""
        return np.flatnonzero(mask[self.slots])


@dataclass
class Channels:
    """Channel groups of a traced graph, and how they run through its tensors.

    groups: by name; each with its slots' numbers, which are unique over all groups (slot 0 always stays).
    nodes: for each node of the graph the axes of its tensor that groups run along (a list for several tensors).
    tensors: for each stored tensor, by its path, the same.
    shapes: of the tensors of each node that a group runs along. producers, consumers: units, by group.
    blocked: `module: why`, for channels that are not in any group although they are no output.
    """

    groups: dict[str, Ints] = field(default_factory=dict)
    nodes: dict[str, list[list[Axis]]] = field(default_factory=dict)
    tensors: dict[str, list[Axis]] = field(default_factory=dict)
    producers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    consumers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    blocked: tuple[str, ...] = ()

    def mask(self, kept: Mapping[str, Iterable[int]]) -> NDArray[np.bool_]:
        """For each slot number whether it stays; kept: positions (0 .. channels - 1) that stay, by group."""
        mask = np.ones(1 + sum(len(s) for s in self.groups.values()), bool)
        for name, positions in kept.items():
            slots = self.groups[name]
            mask[slots] = False
            mask[slots[np.asarray(list(positions), np.int64)]] = True
        return mask


    def without(self, names: Iterable[str], why: Iterable[str]) -> Channels:
        """The channels where some groups stay whole after all."""
        names = set(names)
        gone = np.concatenate([[], *(self.groups[g] for g in names)]).astype(np.int64)
        left = {g: s for g, s in self.groups.items() if g not in names}
        number = np.zeros(1 + sum(map(len, self.groups.values())), np.int64)
        kept = np.concatenate([np.zeros(0, np.int64), *left.values()])
        number[kept] = np.arange(1, len(kept) + 1)
        assert not number[gone].any()

        def axes(own: Sequence[Axis]) -> list[Axis]:
            return [a for a in (Axis(a.axis, number[a.slots]) for a in own) if a.slots.any()]

        nodes = {n: [axes(a) for a in several] for n, several in self.nodes.items()}
        return replace(
            self,
            groups={g: number[s] for g, s in left.items()},
            nodes={n: several for n, several in nodes.items() if any(several)},
            tensors={p: own for p, own in ((p, axes(a)) for p, a in self.tensors.items()) if own},
            producers={g: p for g, p in self.producers.items() if g in left},
            consumers={g: p for g, p in self.consumers.items() if g in left},
            blocked=(*self.blocked, *why),
        )


class _Atoms:
    """Union-find over atoms, on arrays of them."""

    def __init__(self) -> None:
        self.root = np.zeros(1, np.int64)

    def fresh(self, shape: tuple[int, ...]) -> Ints:
        count = math.prod(shape)
        start = len(self.root)
        self.root = np.concatenate([self.root, np.arange(start, start + count)])
        return np.arange(start, start + count).reshape(shape)

    def find(self, atoms: Ints) -> Ints:
        found: Ints = self.root[atoms]
        return found

    def union(self, *arrays: Ints) -> None:
        """Make atoms at equal positions of broadcast arrays the same."""
        if len(arrays) < 2:
            return
        first, *others = (np.ravel(a) for a in np.broadcast_arrays(*arrays))
        a = self.find(np.tile(first, len(others)))
        b = self.find(np.concatenate(others))
        differ = a != b
        if not differ.any():
            return
        n = len(self.root)
        graph = coo_array((np.ones(int(differ.sum()), np.int8), (a[differ], b[differ])), shape=(n, n))
        _, component = connected_components(graph, directed=False)
        least = np.full(component.max() + 1, n)
        np.minimum.at(least, component, np.arange(n))  # so that ALWAYS stays the root of its own
        self.root = least[component][self.root]

    def pin(self, atoms: Ints) -> None:
        self.union(np.unique(self.find(atoms)), np.zeros(1, np.int64))


Label = Ints | None
"""Atoms of a tensor: an array of its rank with size 1 along axes on which they do not vary; None where it has none."""


class _Labels:
    """Runs a graph on labels beside values."""

    def __init__(
        self, graph: fx.GraphModule, units: Mapping[str, tuple[str, int | None]], residual: bool
    ) -> None:
        self.graph, self.units, self.residual = graph, units, residual
        self.atoms = _Atoms()
        self.label: dict[fx.Node, Any] = {}
        self.value: dict[fx.Node, Any] = {}
        self.axes: dict[Any, dict[int, Ints]] = {}  # of stored tensors that units read, by identity
        self.elements: dict[Any, Ints] = {}  # of other stored tensors
        self.path: dict[str, Any] = {}
        self.stopped: dict[str, None] = {}

    # ---- the run

    def run(self, inputs: Sequence[Any]) -> None:
        """Fill `label` for every node."""
        values = _Values(self.graph, self)
        with torch.no_grad():
            values.run(*inputs, enable_io_processing=False)

    def node(self, n: fx.Node, value: Any) -> None:
        self.value[n] = value
        if n.op == "output":
            for source in n.all_input_nodes:
                self.pin_all(self.label.get(source))
        if n.op != "call_function":
            self.label[n] = None
            return
        labels = [self.get(i) for i in n.all_input_nodes]
        if n.target is operator.getitem:
            several = self.get(n.args[0])
            self.label[n] = several[n.args[1]] if isinstance(several, list) else None
        elif n.name in self.units:
            self.label[n] = self.unit(n)
        elif all(not _has(x) for x in labels) and not any(is_get_attr(i) for i in n.all_input_nodes):
            self.label[n] = None
        else:
            self.label[n] = self.compact(self.operator(n), n)

    def get(self, n: Any) -> Any:
        """The current label of a node."""
        if not isinstance(n, fx.Node):
            return None
        return _map(self.label.get(n), self.squeezed)

    def squeezed(self, label: Ints) -> Label:
        """Collapse the axes on which a label does not vary; None where nothing of it can go."""
        label = self.atoms.find(label)
        for axis in range(label.ndim):
            if label.shape[axis] > 1:
                first = label.take([0], axis)
                if (label == first).all():
                    label = first
        return None if label.size == 1 and label.flat[0] == ALWAYS else label

    def compact(self, label: Any, n: fx.Node) -> Any:
        def one(x: Ints) -> Label:
            found = self.squeezed(x)
            if found is not None and found.size == 1:
                self.atoms.pin(found)  # a single channel taken out by its number
                return None
            return found

        return _map(label, one)

    def stored(self, n: fx.Node) -> Ints:
        """Fresh atoms for every element of a tensor that an operator outside of units reads."""
        tensor = tensor_attr(self.graph, str(n.target))
        key = same(tensor)
        self.path[str(n.target)] = key
        if key in self.axes:  # a unit's weight too: it stays whole
            for atoms in self.axes[key].values():
                self.atoms.pin(atoms)
            self.elements.setdefault(key, np.zeros((1,) * tensor.dim(), np.int64))
        if key not in self.elements:
            small = tensor.numel() <= LARGEST
            self.elements[key] = (
                self.atoms.fresh(tuple(tensor.shape)) if small else np.zeros((1,) * tensor.dim(), np.int64)
            )
        return self.elements[key]

    def operand(self, n: Any, rank: int) -> tuple[Label, tuple[int, ...]]:
        """(label, shape), both padded in front to a rank."""
        if not isinstance(n, fx.Node) or not isinstance(self.value.get(n), torch.Tensor):
            return None, (1,) * rank
        shape = tuple(self.value[n].shape)
        label = self.stored(n) if is_get_attr(n) else self.get(n)
        if label is not None:
            label = label.reshape((1,) * (rank - label.ndim) + label.shape)
        return label, (1,) * (rank - len(shape)) + shape

    def pin_all(self, label: Any) -> None:
        _map(label, lambda x: self.atoms.pin(x))

    def stop(self, n: fx.Node, why: str) -> None:
        self.stopped.setdefault(f"{module_path(n) or '(the model itself)'}: {why}")

    # ---- operators

    def operator(self, n: fx.Node) -> Any:
        name = op_name(n).rstrip("_")
        if name in ELEMENTWISE:
            return self.joined([self.operand(i, self.value[n].dim()) for i in n.all_input_nodes])
        if name in MOVES:
            return self.moved(n)
        if n.target in MATMULS:
            return self.product(n)
        if name in REDUCTIONS:
            return self.reduced(n)
        if name in ALONG:
            return self.along(n, int(n.args[1]))  # type: ignore[arg-type]
        if name in SPATIAL:
            return self.spatial(n)
        special: dict[str, Callable[[fx.Node], Any]] = {
            "batch_norm": self.per_channel, "instance_norm": self.per_channel, "prelu": self.per_channel,
            "layer_norm": self.layer_norm, "group_norm": self.group_norm, "pad": self.padded,
            "constant_pad_nd": self.padded, "embedding": self.embedding, "glu": self.glu,
        }  # fmt: skip
        if name in special:
            return special[name](n)
        return self.unknown(n)

    def unknown(self, n: fx.Node) -> Any:
        if any(_has(self.get(i)) for i in n.all_input_nodes):
            self.stop(n, f"channels are not followed through operator {n.target}")
        for i in n.all_input_nodes:
            self.pin_all(self.stored(i) if self.is_stored(i) else self.get(i))
        return None

    def is_stored(self, n: fx.Node) -> bool:
        return is_get_attr(n) and isinstance(self.value.get(n), torch.Tensor)

    def joined(self, operands: Sequence[tuple[Label, tuple[int, ...]]]) -> Label:
        """Tensors combined element by element: what is not broadcast is tied.

        What is broadcast along an axis that varies stays whole, and so do the others along the axes that it spans.
        """
        labels = [x for x, _ in operands if x is not None]
        if not labels:
            return None
        rank = labels[0].ndim
        varied = [d for d in range(rank) if any(x.shape[d] > 1 for x in labels)]
        size = [max(shape[d] for _, shape in operands) for d in range(rank)]
        tied: list[Ints] = []
        spanned: set[int] = set()
        for x, shape in operands:
            broadcast = [d for d in varied if shape[d] == 1 < size[d]]
            if broadcast:
                self.pin_all(x)
                spanned.update(d for d in varied if shape[d] > 1)
            elif x is not None:
                tied.append(x)
            elif varied:
                tied.append(np.zeros((1,) * rank, np.int64))
        if not tied:
            return None
        self.atoms.union(*tied)
        for x in tied:
            for axis in spanned:
                self.atoms.union(x, x.take([0], axis))
        shape = np.broadcast_shapes(*(x.shape for x in tied))
        found: Ints = self.atoms.find(np.broadcast_to(max(tied, key=np.size), shape))
        return found

    def moved(self, n: fx.Node) -> Any:
        """The operator itself on the labels, spread out to the tensors' shapes."""

        def spread(i: fx.Node) -> Any:
            value = self.value[i]
            if not isinstance(value, torch.Tensor):
                return value
            if not value.is_floating_point() and value.dim() == 1 and op_name(n).startswith("index"):
                return value
            label = self.stored(i) if is_get_attr(i) else self.get(i)
            if label is None:
                return torch.zeros(value.shape, dtype=torch.float64)
            return torch.from_numpy(np.broadcast_to(label, tuple(value.shape)).astype(np.float64))

        args, kwargs = fx.map_arg((n.args, n.kwargs), spread)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "device", "memory_format")}
        name = op_name(n).rstrip("_")
        if name in ("to", "_to_copy", "dropout", "feature_dropout", "alias", "detach", "clone", "contiguous", "lift_fresh_copy"):
            result = args[0]
        else:
            try:
                result = n.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, NotImplementedError, TypeError):
                return self.unknown(n)
        return [as_atoms(r) for r in result] if isinstance(result, list | tuple) else as_atoms(result)

    def vector(self, label: Ints, axis: int) -> Ints:
        """Atoms along one axis; those that differ along the others are tied."""
        flat = np.moveaxis(label, axis, 0).reshape(label.shape[axis], -1)
        if flat.shape[1] > 1:
            self.atoms.union(flat, flat[:, :1])
        return self.atoms.find(flat[:, 0])

    def vector_of(self, n: fx.Node, axis: int) -> Ints:
        """As `vector`, of full length, for a node's tensor; zeros where it has no label."""
        size = self.value[n].shape[axis]
        label = self.get(n)
        if label is None:
            return np.zeros(size, np.int64)
        axis = axis % label.ndim
        if label.shape[axis] == 1:  # it varies elsewhere
            self.atoms.pin(label)
            return np.zeros(size, np.int64)
        return self.vector(label, axis)

    def along_axis(self, atoms: Ints, axis: int, rank: int) -> Ints:
        return atoms.reshape([-1 if d == axis % rank else 1 for d in range(rank)])

    # ---- units

    def unit(self, n: fx.Node) -> Any:
        op, position = self.units[n.name]
        if position is None:
            return self.compact(self.product(n), n)
        weight_node = n.args[position]
        assert isinstance(weight_node, fx.Node)
        weight = self.value[weight_node]
        key = same(weight)
        self.path[str(weight_node.target)] = key
        known = self.axes.get(key)
        x = n.args[1] if n.target is aten.addmm.default else n.args[0]
        assert isinstance(x, fx.Node)
        rank = self.value[n].dim()
        if op.startswith("conv"):
            own, label = self.convolution(n, op, x, weight, known)
        else:
            in_axis, out_axis = (1, 0) if op == "linear" else (0, 1)
            found = self.get(x)
            before = None
            if found is not None and found.shape[-1] == 1:
                before = found  # heads of a layer that works inside of each: they pass, its own features stay
                own = {in_axis: np.zeros(weight.shape[in_axis], np.int64)}
            else:
                own = {in_axis: self.vector_of(x, -1)}
            wide = before is None and weight.shape[out_axis] > 1
            if known is not None:
                out = known[out_axis]
                if not wide:
                    self.atoms.pin(out)
            else:
                size = weight.shape[out_axis]
                out = self.atoms.fresh((size,)) if wide else np.zeros(size, np.int64)
            own[out_axis] = out
            label = self.along_axis(out, -1, rank) if wide else before
        if known is not None:
            for axis, atoms in own.items():
                self.atoms.union(known[axis], atoms)
        self.axes[key] = {axis: self.atoms.find(atoms) for axis, atoms in own.items()}
        if key in self.elements:  # an embedding's weight too: it stays whole
            for atoms in (*self.axes[key].values(), self.elements[key]):
                self.atoms.pin(atoms)
        out_axis = 0 if op == "linear" or (op.startswith("conv") and "transpose" not in op) else 1
        self.bias(n, own[out_axis] if not op.startswith("conv_transpose") else label_vector(label, rank, op))
        return None if label is None else self.compact(label, n)

    def bias(self, n: fx.Node, out: Ints | None) -> None:
        node = n.args[0] if n.target is aten.addmm.default else (n.args[2] if len(n.args) > 2 else n.kwargs.get("bias"))
        if n.target in MATMULS or not isinstance(node, fx.Node) or not is_get_attr(node):
            if isinstance(node, fx.Node) and n.target not in MATMULS and out is not None:
                self.atoms.pin(out)  # a bias that is computed
            return
        tensor = tensor_attr(self.graph, str(node.target))
        key = same(tensor)
        self.path[str(node.target)] = key
        if out is None or tensor.dim() != 1 or len(tensor) != len(out):
            if out is not None:
                self.atoms.pin(out)
            return
        if key in self.axes:
            self.atoms.union(self.axes[key][0], out)
        self.axes[key] = {0: out}

    def convolution(
        self, n: fx.Node, op: str, x: fx.Node, weight: torch.Tensor, known: Mapping[int, Ints] | None
    ) -> tuple[dict[int, Ints], Label]:
        transpose = op.startswith("conv_transpose")
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        if transpose:
            names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        groups = int(bound(n, names, (None, None, None, 1, 0, 1, 1) if not transpose else (None, None, None, 1, 0, 0, 1, 1))[6])
        rank = self.value[n].dim()
        channel = rank - (weight.dim() - 1)
        came = self.vector_of(x, channel)
        outs = self.value[n].shape[channel]
        each_in, each_out = len(came) // groups, outs // groups
        if groups == 1:
            out = known[1 if transpose else 0] if known else (self.atoms.fresh((outs,)) if outs > 1 else np.zeros(1, np.int64))
            own = {0: came, 1: out} if transpose else {0: out, 1: came}
        elif each_in == 1:  # depthwise: each output belongs to one input
            out = np.repeat(came, each_out)
            own = {0: came} if transpose else {0: out}
            if transpose and each_out > 1:
                self.atoms.pin(came)
        else:  # the same positions of every group go together
            parts = came.reshape(groups, each_in)
            self.atoms.union(parts, parts[:1])
            fresh = known[1 if transpose else 0] if known else None
            if fresh is None:
                fresh = self.atoms.fresh((each_out,)) if each_out > 1 else np.zeros(1, np.int64)
                fresh = fresh if transpose else np.tile(fresh, groups)
            out = np.tile(fresh, groups) if transpose else fresh
            own = {0: came, 1: fresh} if transpose else {0: out, 1: came[:each_in]}
        return own, self.along_axis(out, channel, rank)

    # ---- products of activations

    def product(self, n: fx.Node) -> Label:
        if n.target is aten.addmm.default or not all(isinstance(a, fx.Node) for a in n.args[:2]):
            return self.unknown(n)
        a, b = n.args[:2]
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        rank = self.value[n].dim()
        if self.value[a].dim() < 2 or self.value[b].dim() < 2:
            return self.unknown(n)
        (la, sa), (lb, sb) = self.operand(a, rank), self.operand(b, rank)
        if la is None and lb is None:
            return None
        batch = range(rank - 2)
        if any(x is not None and any(x.shape[d] > 1 for d in batch) for x in (la, lb)):
            return self.by_head(la, sa, lb, sb)
        left = None if la is None or la.shape[-2] == 1 else la
        right = None if lb is None or lb.shape[-1] == 1 else lb
        inner = [x for x, axis in ((la, -1), (lb, -2)) if x is not None and x.shape[axis] > 1]
        if inner:  # the contracted features go together
            one = self.vector(la, rank - 1) if la is not None and la.shape[-1] > 1 else np.zeros(1, np.int64)
            two = self.vector(lb, rank - 2) if lb is not None and lb.shape[-2] > 1 else np.zeros(1, np.int64)
            self.atoms.union(one, two)
        if left is not None and right is not None:
            self.atoms.pin(left)
            left = None
        if left is not None:
            return self.along_axis(self.vector(left, rank - 2), -2, rank)
        if right is not None:
            return self.along_axis(self.vector(right, rank - 1), -1, rank)
        return None

    def by_head(self, la: Label, sa: tuple[int, ...], lb: Label, sb: tuple[int, ...]) -> Label:
        """Products inside of each head: all that a head reads is one slot."""
        rank = len(sa)
        varied = [d for d in range(rank - 2) if any(x is not None and x.shape[d] > 1 for x in (la, lb))]
        tied: list[Ints] = []
        for x, shape, axis in ((la, sa, -1), (lb, sb, -2)):
            if any(shape[d] == 1 for d in varied):
                self.pin_all(x)  # all heads read it
            elif x is None:
                tied.append(np.zeros((1,) * rank, np.int64))
            else:
                self.atoms.union(x, x.take([0], axis))
                tied.append(self.atoms.find(x.take([0], axis)))
        self.atoms.union(*tied)
        shape = np.broadcast_shapes(*(x.shape for x in tied))
        found: Ints = self.atoms.find(np.broadcast_to(max(tied, key=np.size), shape))
        return found

    # ---- the rest

    def reduced(self, n: fx.Node) -> Label:
        x = n.args[0]
        label = self.get(x)
        if label is None or not isinstance(x, fx.Node):
            return self.unknown(n)
        out = self.value[n]
        if not isinstance(out, torch.Tensor):
            return self.unknown(n)
        name = op_name(n)
        position = 2 if name in ("linalg_vector_norm", "norm") else 1
        dims = n.args[position] if len(n.args) > position else n.kwargs.get("dim")
        dims = list(range(label.ndim)) if dims is None or dims == [] else ([dims] if isinstance(dims, int) else list(dims))  # type: ignore[call-overload]
        dims = [d % label.ndim for d in dims]
        if any(label.shape[d] > 1 for d in dims):
            self.stop(n, f"{name} over channels mixes them")
            self.atoms.pin(label)
            return None
        return label if out.dim() == label.ndim else label.reshape([s for d, s in enumerate(label.shape) if d not in dims])

    def along(self, n: fx.Node, axis: int) -> Label:
        label = self.get(n.args[0])
        if label is not None and label.shape[axis] > 1:
            self.stop(n, f"{op_name(n)} over channels mixes them")
            self.atoms.pin(label)
            return None
        return label  # type: ignore[no-any-return]

    def spatial(self, n: fx.Node) -> Any:
        """Pools and resizing: each channel by itself."""
        x = n.args[0]
        assert isinstance(x, fx.Node)
        out = self.value[n]
        first = out[0] if isinstance(out, tuple | list) else out
        spatial = {"1": 1, "2": 2, "3": 3}.get(op_name(n).replace("_with_indices", "").rstrip("d")[-1:], 2)
        rank = self.value[x].dim()
        label = self.along_axis(self.vector_of(x, rank - spatial - 1), rank - spatial - 1, first.dim())
        return [label] * len(out) if isinstance(out, tuple | list) else label

    def per_channel(self, n: fx.Node) -> Label:
        x = n.args[0]
        assert isinstance(x, fx.Node)
        label = self.get(x)
        axis = 1 if self.value[x].dim() > 1 else 0
        atoms = self.vector_of(x, axis)
        for i in n.args[1:]:
            if isinstance(i, fx.Node) and self.is_stored(i) and self.value[i].numel() == len(atoms) > 1:
                self.atoms.union(self.stored(i).ravel(), atoms)
            elif isinstance(i, fx.Node) and not self.is_stored(i):
                return self.unknown(n)
        if label is None:
            return None
        return self.along_axis(self.atoms.find(atoms), axis, self.value[x].dim())

    def layer_norm(self, n: fx.Node) -> Label:
        x, shape = n.args[:2]
        label = self.get(x)
        if label is None:
            return None
        dims = range(label.ndim - len(shape), label.ndim)  # type: ignore[arg-type]
        if any(label.shape[d] > 1 for d in dims):
            if not self.residual or len(shape) > 1:  # type: ignore[arg-type]
                self.atoms.pin(label)
                return None
            atoms = self.vector(label, label.ndim - 1)
            for i in n.args[2:4]:
                if isinstance(i, fx.Node) and self.is_stored(i):
                    self.atoms.union(self.stored(i), atoms)
            return self.along_axis(self.atoms.find(atoms), -1, label.ndim)
        return label  # type: ignore[no-any-return]

    def group_norm(self, n: fx.Node) -> Label:
        x, groups = n.args[:2]
        assert isinstance(x, fx.Node)
        atoms = self.vector_of(x, 1)
        parts = atoms.reshape(int(groups), -1)  # type: ignore[arg-type]
        self.atoms.union(parts, parts[:, :1])
        for i in n.args[2:4]:
            if isinstance(i, fx.Node) and self.is_stored(i):
                self.atoms.union(self.stored(i), atoms)
        return self.along_axis(self.atoms.find(atoms), 1, self.value[x].dim())

    def padded(self, n: fx.Node) -> Label:
        x, pads = n.args[:2]
        label = self.get(x)
        if label is None:
            return None
        for index, amount in enumerate(pads):  # type: ignore[arg-type, var-annotated]
            if amount and label.shape[label.ndim - 1 - index // 2] > 1:
                return self.unknown(n)
        return label  # type: ignore[no-any-return]

    def embedding(self, n: fx.Node) -> Label:
        weight = n.args[0]
        assert isinstance(weight, fx.Node)
        if not self.is_stored(weight):
            return self.unknown(n)
        key = same(self.value[weight])
        if key not in self.axes and key not in self.elements:
            self.path[str(weight.target)] = key
            self.elements[key] = self.atoms.fresh((1, self.value[weight].shape[1]))
        atoms = self.stored(weight)
        self.atoms.union(atoms, atoms[:1])
        return self.along_axis(self.atoms.find(atoms[0]), -1, self.value[n].dim())

    def glu(self, n: fx.Node) -> Label:
        label = self.get(n.args[0])
        axis = int(n.args[1]) if len(n.args) > 1 else -1  # type: ignore[arg-type]
        if label is None or label.shape[axis] == 1:
            return label  # type: ignore[no-any-return]
        a, b = np.split(label, 2, axis)
        self.atoms.union(a, b)
        return self.atoms.find(a)


class _Values(fx.Interpreter):
    """Real values, so that every label has a shape; freed when the labels are done with them."""

    def __init__(self, graph: fx.GraphModule, labels: _Labels) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.labels = labels

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.labels.node(n, value)
        return value


def same(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Equal for tensors that are one parameter."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def label_vector(label: Label, rank: int, op: str) -> Ints | None:
    """Atoms of a convolution's output channels."""
    return None if label is None else label.ravel()


def _map(label: Any, function: Callable[[Ints], Any]) -> Any:
    if label is None:
        return None
    if isinstance(label, list):
        return [None if x is None else function(x) for x in label]
    return function(label)


def _has(label: Any) -> bool:
    return any(x is not None for x in label) if isinstance(label, list) else label is not None


def as_atoms(labels: torch.Tensor) -> Ints:
    """Labels that went through an operator as floats (which all operators take; exact below 2**53)."""
    found: Ints = labels.numpy().astype(np.int64)
    return found


# ---------------------------------------------------------------- groups


def find(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    units: Mapping[str, tuple[str, str, int | None]],
    *,
    residual: bool = False,
) -> Channels:
    """The channel groups of a canonical graph.

    inputs: values of its placeholders. units: node -> (unit, operator, position of the weight among its arguments).
    residual: also the width that LayerNorm normalises over; narrowing it changes the statistics, so that the narrow
    network does not compute what the masked one would.
    """
    run = _Labels(graph, {n: (op, w) for n, (_, op, w) in units.items()}, residual)
    run.run(inputs)
    atoms = run.atoms
    _rectangular(run)
    while True:
        slots, signature = _slots(run)
        clash = _clashes(run, signature)
        if not clash:
            break
        for axis in clash:
            _tie(atoms, axis, signature)
    return _channels(run, units, slots, signature)


def _rectangular(run: _Labels) -> None:
    """Let every tensor vary along one axis only, the one that leaves most slots: else removing one leaves a hole."""
    changed = True
    while changed:
        changed = False
        labels = [x for own in run.label.values() for x in (own if isinstance(own, list) else [own]) if x is not None]
        for label in [*labels, *run.elements.values()]:
            label = run.squeezed(label)
            varied = [d for d in range(label.ndim) if label.shape[d] > 1] if label is not None else []
            if label is None or len(varied) < 2:
                continue
            changed = True
            best = max(varied, key=lambda d: _classes(label, d))
            for axis in varied:
                if axis != best:
                    run.atoms.union(label, label.take([0], axis))


def _classes(label: Ints, axis: int) -> int:
    """How many slots would be left along an axis if the others were tied."""
    flat = np.moveaxis(label, axis, 0).reshape(label.shape[axis], -1)
    n, m = flat.shape
    _, atoms = np.unique(flat, return_inverse=True)
    atoms = atoms.reshape(n, m)
    graph = coo_array((np.ones(n * m, np.int8), (np.repeat(np.arange(n), m), n + atoms.ravel())),
                      shape=(n + atoms.max() + 1,) * 2)  # fmt: skip
    return int(connected_components(graph, directed=False)[0])


def _stored_axes(run: _Labels) -> dict[tuple[Any, int], Ints]:
    """Atoms along each axis of each stored tensor that may be narrowed."""
    found: dict[tuple[Any, int], Ints] = {}
    for key, own in run.axes.items():
        for axis, atoms in own.items():
            found[key, axis] = run.atoms.find(atoms)
    for key, elements in run.elements.items():
        label = run.squeezed(elements) if key not in run.axes else None
        if label is not None and label.size > 1:
            axis = int(np.argmax(label.shape))
            found[key, axis] = label.ravel()
    return found


def _slots(run: _Labels) -> tuple[Ints, dict[int, tuple[Any, ...]]]:
    """(roots of the slots in order of appearance, for each the tensors it runs through and how often)."""
    places: dict[int, list[Any]] = {}
    for place, atoms in _stored_axes(run).items():
        for root, count in Counter(atoms.tolist()).items():
            if root != ALWAYS:
                places.setdefault(root, []).append((place, count))
    signature = {root: tuple(own) for root, own in places.items()}
    return np.array(list(signature), np.int64), signature


def _clashes(run: _Labels, signature: Mapping[int, tuple[Any, ...]]) -> list[Ints]:
    """Axes of units' weights that more than one group runs along: those groups are made one."""
    return [
        atoms
        for key, own in run.axes.items()
        for atoms in (run.atoms.find(a) for a in own.values())
        if len({signature[r] for r in atoms.tolist() if r != ALWAYS}) > 1
    ]


def _tie(atoms: _Atoms, axis: Ints, signature: Mapping[int, tuple[Any, ...]]) -> None:
    """Make the groups along an axis one of proportional parts: as many slots as the greatest common divisor."""
    parts: dict[Any, list[int]] = {}
    for root in dict.fromkeys(atoms.find(axis).tolist()):
        if root != ALWAYS and root in signature:
            parts.setdefault(signature[root], []).append(root)
    if len(parts) < 2:
        return
    count = math.gcd(*(len(p) for p in parts.values()))
    first = None
    for part in parts.values():
        rows = np.array(part).reshape(count, -1)
        atoms.union(rows, rows[:, :1])
        if first is not None:
            atoms.union(rows[:, 0], first)
        first = rows[:, 0]
    if count == 1:
        atoms.pin(axis)


def _channels(
    run: _Labels, units: Mapping[str, tuple[str, str, int | None]], slots: Ints, signature: Mapping[int, tuple[Any, ...]]
) -> Channels:
    members: dict[tuple[Any, ...], list[int]] = {}
    for root in slots.tolist():
        members.setdefault(signature[root], []).append(root)
    reads, makes = _ends(run, units)
    number = {ALWAYS: ALWAYS}
    found = Channels(blocked=tuple(run.stopped))
    for roots in members.values():
        own = set(roots)
        producers = tuple(u for u, atoms in makes.items() if own & atoms)
        consumers = tuple(u for u, atoms in reads.items() if own & atoms)
        if len(roots) < 2 or not producers or not consumers:
            continue
        name = producers[0]
        while name in found.groups:
            name += "'"
        start = len(number)
        number |= {root: start + i for i, root in enumerate(roots)}
        found.groups[name] = np.arange(start, start + len(roots))
        found.producers[name], found.consumers[name] = producers, consumers

    def numbers(atoms: Ints) -> Ints:
        return np.array([number.get(r, ALWAYS) for r in run.atoms.find(atoms).tolist()], np.int64)

    for n, label in run.label.items():
        several = label if isinstance(label, list) else [label]
        axes = []
        for x in several:
            x = None if x is None else run.squeezed(x)
            ids = numbers(x.ravel()) if x is not None and x.size > 1 else np.zeros(0, np.int64)
            axes.append([Axis(int(np.argmax(x.shape)), ids)] if ids.any() and x is not None else [])
        if any(axes):
            found.nodes[n.name] = axes
            value = run.value[n]
            found.shapes[n.name] = [tuple(v.shape) for v in (value if isinstance(value, list | tuple) else [value])]
    stored = _stored_axes(run)
    for path, key in run.path.items():
        own = [Axis(a, numbers(atoms)) for (k, a), atoms in stored.items() if k == key]
        own = [axis for axis in own if axis.slots.any()]
        if own:
            found.tensors[path] = own
    return found


def _ends(
    run: _Labels, units: Mapping[str, tuple[str, str, int | None]]
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """For each unit the roots that its weight reads, and those that it puts out."""
    reads: dict[str, set[int]] = {}
    makes: dict[str, set[int]] = {}
    for n in run.graph.graph.nodes:
        if n.name not in units:
            continue
        unit, op, position = units[n.name]
        label = run.get(n)
        out = set() if label is None else set(label.ravel().tolist())
        if position is None:
            continue
        own = run.axes[same(run.value[n.args[position]])]
        came = own.get(0 if op in ("matmul",) or "transpose" in op else 1)
        inside = set() if came is None else set(run.atoms.find(came).tolist())
        if len(own) == 1:
            continue  # depthwise: it passes channels on
        makes.setdefault(unit, set()).update(out - inside - {ALWAYS})
        reads.setdefault(unit, set()).update(inside - {ALWAYS})
    return reads, makes


def describe(found: Channels, network: Network, sites: Mapping[str, tuple[str, Sequence[str]]],
             weights: Mapping[str, str], stored_bytes: Mapping[str, int]) -> Network:  # fmt: skip
    """The network with its groups, and each unit with the ways that they run through it.

    sites: unit -> (node, nodes of its activations) of its first call. weights: unit -> path of its weight. stored_bytes: of
    each stored tensor that belongs to no unit.
    """
    of_slot = {int(s): name for name, slots in found.groups.items() for s in slots}

    def ways(tensor: str, axes: Sequence[Axis]) -> list[Way]:
        return [
            Way(group, tensor, axis.axis, int(count) // len(found.groups[group]))
            for axis in axes
            for group, count in Counter(of_slot[s] for s in axis.slots.tolist() if s != ALWAYS).items()
        ]

    units = []
    for unit in network.units:
        node, inputs = sites[unit.name]
        own = ways("output", found.nodes.get(node, [[]])[0])
        for port, source in enumerate(inputs):
            own += ways(f"input{port}", found.nodes.get(source, [[]])[0])
        if unit.name in weights:
            own += ways("weight", found.tensors.get(weights[unit.name], []))
        units.append(replace(unit, ways=tuple(own)))
    fixed: Counter[str] = Counter()
    for path, size in stored_bytes.items():
        for axis in found.tensors.get(path, []):
            for group, count in Counter(of_slot[s] for s in axis.slots.tolist() if s != ALWAYS).items():
                fixed[group] += size * count // len(axis.slots) // len(found.groups[group])
    groups = tuple(
        ChannelGroup(name, len(slots), found.producers[name], found.consumers[name], fixed[name])
        for name, slots in found.groups.items()
    )
    return replace(network, units=tuple(units), groups=groups, blocked=found.blocked)

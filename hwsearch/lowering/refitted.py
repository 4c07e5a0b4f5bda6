"""A task with fewer channels: which ones go, refitted weights for what is left, and the module that holds them."""

from __future__ import annotations

import json
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from hwsearch.compress.bank import WeightBank
from hwsearch.compress.gram import Grams
from hwsearch.compress.importance import order_slots
from hwsearch.compress.sequential import refit_sequential
from hwsearch.compress.widths import Kept, Weights
from hwsearch.errors import HwsearchError
from hwsearch.files import write_bytes
from hwsearch.graph.canonical import aten, is_get_attr, set_attr, tensor_attr
from hwsearch.graph.narrow import share_graph
from hwsearch.graph.trace import trace
from hwsearch.lowering.lowering import Lowering, with_batch
from hwsearch.network.variants import STORAGE, Variant

SAMPLES = 512
"""Calibration samples that the last refitting sees at most."""
MEMORY = 4e9
"""Bytes that it may take: it holds activations of all samples in both networks."""


def weight_bank(
    lowering: Lowering,
    folder: str | Path | None = None,
    order: Mapping[str, Sequence[int]] | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> WeightBank:
    """Refitted weights of a task for any widths; kept in `folder` for the next process where it is given.

    order: of the slots of each channel group, the most important first; found on calibration data where it is None, and kept in the
    folder too. say: is told what has changed, where that is why the weights in the folder are not used.
    """
    batches = lowering.fitting
    path, grams = None, None
    if order is None and folder is not None:
        key = WeightBank(None, lowering.traced, batches, {}, int8_bits=lowering.int8_bits).key
        path = Path(folder) / f"order.{key}.json"
        order = _kept_order(path, lowering.network.channels)
    if order is None:
        grams = Grams(batches, [u.name for u in lowering.network.units])
        order = {g: own.tolist() for g, own in order_slots(batches, grams=grams).items()}
        if path is not None:
            write_bytes(path, json.dumps(order).encode())
    found = {g: np.asarray(slots, np.int64) for g, slots in order.items()}
    bank = WeightBank(folder, lowering.traced, batches, found, grams=grams, int8_bits=lowering.int8_bits)
    if why := bank.outdated:
        say(f"the weights in {folder} are of other {why}: refitted anew")
    return bank


def _kept_order(path: Path, channels: Mapping[str, int]) -> Mapping[str, Sequence[int]] | None:
    """The order that an earlier process found; None where there is none, or it is damaged: it is found anew then."""
    try:
        kept = json.loads(path.read_bytes())
        right = {g: sorted(own) for g, own in kept.items()} == {g: list(range(n)) for g, n in channels.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return dict(kept) if right else None


def refitted(
    lowering: Lowering,
    variants: Mapping[str, Variant],
    widths: Mapping[str, int] | None = None,
    bank: WeightBank | None = None,
) -> Lowering:
    """The task as it is deployed in these variants and at these widths: refitted in order on what really arrives.

    Units are rounded on the way, so that later ones make up for it. bank: holds the weights that this starts from; needed where
    a channel goes. Where neither width nor rounding changes anything, the task as it is; so it is with weights only stored in int8.
    """
    narrow = {g: w for g, w in (widths or {}).items() if w < lowering.network.channels[g]}
    if not narrow and all(v.plain or v == STORAGE for v in variants.values()):
        return lowering
    kept: Kept = {}
    weights: Weights = {}
    if narrow:
        assert bank is not None, "narrower widths need a weight bank"
        kept, weights = bank.kept(widths or {}), dict(bank.assemble(widths or {}))

    def refit() -> Weights:
        batches = _limited(lowering)
        return refit_sequential(batches, kept, weights, variants, int8_bits=lowering.int8_bits)

    new = bank.allocation(variants, narrow, refit) if bank is not None else refit()
    return lowering.narrow(kept, new, calibrate=True)


def _limited(lowering: Lowering) -> list[Any]:
    """As many calibration batches as `SAMPLES` and `MEMORY` allow, evenly drawn."""
    largest = max(4 * math.prod(u.output_shape) for u in lowering.network.units) / lowering.batch
    most = min(SAMPLES, MEMORY / (8 * largest))
    every = lowering.fitting
    samples = sum(
        next((t.shape[0] for t in pytree.tree_leaves(b[1:]) if isinstance(t, torch.Tensor)), 1) for b in every
    )
    count = max(1, min(len(every), int(len(every) * most / samples)))
    return [every[round(i)] for i in np.linspace(0, len(every) - 1, count)]


def as_module(lowering: Lowering) -> torch.nn.Module:
    """A plain module that computes the (narrow) network in fp32: parameters under their old names, BatchNorm folded.

    It takes any batch size where the model does, and can be fine-tuned as any other module; the user's model keeps its weights.
    """
    graph = share_graph(lowering.traced.graph)
    _free_batch(graph, lowering)
    own: dict[int, torch.nn.Parameter] = {}
    for node in graph.graph.nodes:
        if is_get_attr(node):
            value = tensor_attr(graph, str(node.target))
            if value.is_floating_point() and id(value) not in {id(p) for p in own.values()}:
                copied = own.setdefault(id(value), torch.nn.Parameter(value.detach().clone()))
                _put_parameter(graph, str(node.target), copied)
    graph.recompile()
    return graph


def _put_parameter(graph: fx.GraphModule, path: str, parameter: torch.nn.Parameter) -> None:
    """A parameter in place of the tensor at a path, which stays what it was for whoever shares it: the user's model."""
    set_attr(graph, path, parameter.detach())  # a place of its own
    parent, _, leaf = path.rpartition(".")
    module = graph.get_submodule(parent)
    module._buffers.pop(leaf, None)
    module._parameters.pop(leaf, None)
    module.register_parameter(leaf, parameter)


def _free_batch(graph: fx.GraphModule, lowering: Lowering) -> None:
    """Replace numbers that are multiples of the batch size by multiples of the input's own."""
    batch = lowering.batch
    model = lowering.task.model
    try:
        other = trace(model, with_batch(lowering.task.example_inputs, batch + 1), lowering.task.name).graph
    except HwsearchError:
        return  # the model takes this batch size only
    if lowering.whole is not None:
        original = lowering.whole.traced.graph
    else:
        original = lowering.traced.graph
    ours, theirs, own = list(original.graph.nodes), list(other.graph.nodes), list(graph.graph.nodes)
    if [n.name for n in ours] != [n.name for n in theirs]:
        return  # the model does something else for another batch
    scaled: dict[tuple[str, int], int] = {}
    for a, b in zip(ours, theirs, strict=True):
        if (
            is_get_attr(a)
            and tensor_attr(original, str(a.target)).shape != tensor_attr(other, str(b.target)).shape
        ):
            return
        x, _ = pytree.tree_flatten((a.args, a.kwargs), is_leaf=lambda v: isinstance(v, fx.Node))
        y, _ = pytree.tree_flatten((b.args, b.kwargs), is_leaf=lambda v: isinstance(v, fx.Node))
        for position, (u, v) in enumerate(zip(x, y, strict=True)):
            if isinstance(u, int) and not isinstance(u, bool) and u != v:
                if u % batch or u // batch * (batch + 1) != v:
                    return
                scaled[a.name, position] = u // batch
    if not scaled:
        return
    first = next(n for n in own if n.op == "placeholder" and n.users)
    with graph.graph.inserting_after([n for n in own if n.op == "placeholder"][-1]):
        size = graph.graph.call_function(aten.sym_size.int, (first, 0))
    for node in own:
        flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda v: isinstance(v, fx.Node))
        changed: list[Any] = []
        for position, value in enumerate(flat):
            times = scaled.get((node.name, position))
            if times is None:
                changed.append(value)
            elif times == 1:
                changed.append(size)
            else:
                with graph.graph.inserting_before(node):
                    changed.append(graph.graph.call_function(operator.mul, (size, times)))
        node.args, node.kwargs = pytree.tree_unflatten(changed, spec)

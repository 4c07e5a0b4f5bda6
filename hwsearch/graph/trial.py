"""The trial of channel groups: each is made narrower on the example, and stays whole where the result is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from hwsearch.graph.canonical import module_path
from hwsearch.graph.channels import Channels
from hwsearch.graph.export import first_line
from hwsearch.graph.narrow import masked_graph, narrow_graph


def tried(
    channels: Channels, graph: fx.GraphModule, inputs: list[Any], reads: list[tuple[str, int]]
) -> Channels:
    """The channels without the groups that cannot be made narrower with the right result; `blocked` says why.

    inputs: the example, flat. reads: (path of its weight, the axis of it that holds what the unit reads) of each unit.
    """
    wrong = partial(_wrong, graph, inputs, reads)
    bad = _bad(partial(wrong, channels), [g for g in channels.groups if g not in channels.rescaled])
    bad |= _bad(partial(wrong, channels), [g for g in channels.groups if g in channels.rescaled])
    channels = channels.without(bad, [f"channels of {g} stay whole: {why}" for g, why in bad.items()])
    if bad and channels.groups and (why := wrong(channels, list(channels.groups))):
        channels = channels.without(list(channels.groups), [f"all channels stay whole: {why}"])
    return channels


def _bad(wrong: Callable[[list[str]], str], groups: list[str]) -> dict[str, str]:
    """Groups that fail the trial, and why: halved until each is found."""
    why = wrong(groups) if groups else ""
    if not why or len(groups) == 1:
        return dict.fromkeys(groups, why) if why else {}
    half = len(groups) // 2
    bad = _bad(wrong, groups[:half]) | _bad(wrong, groups[half:])
    return bad or dict.fromkeys(groups, why)


def _wrong(
    graph: fx.GraphModule,
    inputs: list[Any],
    reads: list[tuple[str, int]],
    channels: Channels,
    groups: list[str],
) -> str:
    """What is wrong with the network with every other slot of some groups gone, or nothing."""
    mask = channels.mask({g: range(0, len(channels.groups[g]), 2) for g in groups})
    run = _Run(narrow_graph(graph, channels, mask))
    with torch.no_grad():
        try:
            have = run.run(*inputs, enable_io_processing=False)
        except Exception as error:
            node = run.last
            where = (
                f"{module_path(node) or 'the model itself'} ({node.target})" if node is not None else "the model"
            )
            return f"{where} does not run with fewer: {first_line(error)}"
        if not channels.rescaled.isdisjoint(groups):
            return ""
        want = _Run(masked_graph(graph, channels, mask, reads)).run(*inputs, enable_io_processing=False)
    for a, b in zip(pytree.tree_leaves(have), pytree.tree_leaves(want), strict=True):
        if not isinstance(b, torch.Tensor) or not b.is_floating_point():
            continue
        if a.shape != b.shape or not float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6:  # nor NaN
            return "the narrow network computes something else than the masked one"
    return ""


class _Run(fx.Interpreter):
    """Remembers the node that ran last."""

    last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        return super().run_node(n)

"""Make a traced network really narrower: fewer channels, heads and neurons in every tensor that they run through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from hwsearch.graph.canonical import set_attr
from hwsearch.graph.channels import Axis
from hwsearch.graph.narrow import left_channels, narrow_graph
from hwsearch.graph.trace import Traced

Kept = Mapping[str, Sequence[int]]
"""For each channel group the positions (0 .. channels - 1) of the slots that stay; groups left out stay whole."""

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
"""(weight, bias) of units, in the shapes of the narrow network."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors by where a graph holds them, in the shapes of the narrow network."""


def narrow(traced: Traced, kept: Kept, weights: Weights | None = None, tensors: Tensors | None = None) -> Traced:
    """The network with only the kept slots of each group; `weights` replace those of units, for instance refitted ones.

    tensors: put in place of what the graph holds, after `weights`, for instance trained ones.
    The traced graph is not changed. What it computes is what the whole one computes with the removed channels masked
    wherever a unit reads them (groups through LayerNorm excepted).
    """
    kept = {g: tuple(k) for g, k in kept.items() if len(k) != traced.network.channels[g]}
    mask = traced.channels.mask(kept)
    found = replace(
        traced,
        graph=narrow_graph(traced.graph, traced.channels, mask),
        network=traced.network.narrow({g: len(k) for g, k in kept.items()}),
        channels=left_channels(traced.channels, mask),
    )
    put_weights(found, weights or {})
    for path, value in (tensors or {}).items():
        set_attr(found.graph, path, value)
    return found


def put_weights(traced: Traced, weights: Weights) -> None:
    """Set weights and biases of units in a graph of one's own. A unit without a bias gets none."""
    for unit, (weight, bias) in weights.items():
        path, bias_path = traced.paths[unit]
        assert path is not None, f"{unit} has no weight"
        set_attr(traced.graph, path, weight)
        if bias is not None and bias_path is not None:
            set_attr(traced.graph, bias_path, bias)


def in_slots(traced: Traced, unit: str) -> Axis | None:
    """The slots along the axis of a unit's weight that it reads, or None where no group runs along it."""
    path = traced.paths[unit][0]
    for axis in traced.channels.tensors.get(path or "", []):
        if axis.axis == traced.network[unit].in_axis:
            return axis
    return None


def out_slots(traced: Traced, unit: str) -> Axis | None:
    """The slots along the axis of a unit's weight that it puts out."""
    path = traced.paths[unit][0]
    for axis in traced.channels.tensors.get(path or "", []):
        if axis.axis != traced.network[unit].in_axis:
            return axis
    return None

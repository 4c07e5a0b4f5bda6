from __future__ import annotations

import numpy as np
import torch
from networks import NETWORKS

from hwsearch.graph.channels import Axis
from hwsearch.graph.narrow import cut, left_channels, narrow_graph, share_graph
from hwsearch.graph.trace import trace


def test_the_whole_graph_stays_as_it_was() -> None:
    traced = trace(*NETWORKS["channel_shuffle"]())
    before = {k: v.clone() for k, v in traced.graph.state_dict().items()}
    code = traced.graph.code
    mask = traced.channels.mask({g: [0] for g in traced.channels.groups})
    narrow = narrow_graph(traced.graph, traced.channels, mask)
    assert narrow.code != code
    assert traced.graph.code == code
    after = traced.graph.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert share_graph(traced.graph).code == code


def test_cut_takes_the_indices_of_slots_that_go() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    axes = [Axis(1, np.array([0, 1, 2, 1])), Axis(0, np.array([3, 4, 0]))]
    mask = np.array([True, False, True, True, False])
    assert cut(value, axes, mask).tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert cut(value, axes, np.ones(5, bool)) is value


def test_left_channels_are_numbered_anew() -> None:
    traced = trace(*NETWORKS["transformer_encoder"]())
    found = traced.channels
    left = left_channels(found, found.mask({g: range(len(s) // 2) for g, s in found.groups.items()}))
    assert sorted(np.concatenate(list(left.groups.values()))) == list(
        range(1, 1 + sum(map(len, left.groups.values())))
    )
    for name, several in left.nodes.items():
        for axes, shape in zip(several, left.shapes[name], strict=True):
            assert all(len(a.slots) == shape[a.axis] for a in axes)

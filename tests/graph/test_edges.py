"""Edges of drawn graphs: the paths on which no unit stands between."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwsearch.graph.trace import trace

OPS = ("conv", "relu", "add", "cat", "pool")


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...]]]:
    """Nodes (operator, indices of earlier nodes); node 0 is the input."""
    steps: list[tuple[str, tuple[int, ...]]] = [("input", ()), ("conv", (0,))]
    for _ in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(OPS))
        count = 2 if op in ("add", "cat") else 1
        steps.append((op, tuple(draw(st.integers(0, len(steps) - 1)) for _ in range(count))))
    return steps


class Drawn(nn.Module):
    def __init__(self, steps: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.steps = steps
        width: list[int] = []
        for index, (op, reads) in enumerate(steps):
            if op == "conv":
                self.add_module(f"c{index}", nn.Conv2d(width[reads[0]], 2, 1))
            width.append(
                {"input": 2, "conv": 2, "cat": sum(width[r] for r in reads)}.get(
                    op, width[reads[0]] if reads else 2
                )
            )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for index, (op, reads) in enumerate(self.steps[1:], 1):
            a = [values[r] for r in reads]
            values.append(
                self.get_submodule(f"c{index}")(a[0]) if op == "conv"
                else a[0].relu() if op == "relu"
                else a[0] + a[1].mean(1, keepdim=True) if op == "add"
                else torch.cat(a, 1) if op == "cat"
                else torch.nn.functional.max_pool2d(a[0], 3, 1, 1)
            )  # fmt: skip
        return values[1:]


@settings(max_examples=15, deadline=None)
@given(graphs())
def test_edges_are_the_paths_without_a_unit_between(steps: list[tuple[str, tuple[int, ...]]]) -> None:
    network = trace(Drawn(steps), torch.randn(1, 2, 4, 4)).network
    edges = {(e.src, e.dst) for e in network.edges}
    reach: list[set[str]] = []
    paths: set[tuple[str, str]] = set()
    meet: set[tuple[str, str]] = set()  # units whose outputs come together in an add
    for index, (op, reads) in enumerate(steps):
        sources = set().union(*(reach[r] for r in reads)) if reads else set()
        if op == "conv":
            paths |= {(s, f"c{index}") for s in sources}
            sources = {f"c{index}"}
        if op == "add":
            meet |= set(itertools.permutations(sources, 2))
        reach.append(sources)
    assert edges <= paths | meet
    after = {u: {v for s, v in edges if s == u} for u in network.by_name}
    for src, dst in paths:
        found, todo = {src}, [src]
        while todo:
            new = after[todo.pop()] - found
            found |= new
            todo += new
        assert dst in found
    if not any(op == "add" for op, _ in steps):
        assert edges == paths

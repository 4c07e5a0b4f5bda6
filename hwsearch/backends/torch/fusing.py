"""Nodes of an ONNX graph that one torch kernel computes together: GELU written out, and attention in half precision.

torch's exporter writes both as the operators that they are made of, each of which would be a kernel that reads and writes all of
its activations. Every pattern is an equality of what is computed, up to rounding; nodes whose results somebody else reads stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch

from hwsearch.backends.torch.graph import Graph, Node

OWN = "hwsearch"
"""Domain of the nodes that stand for several."""
HALVES = ("fp16", "bf16")


def fused(graph: Graph, base: str) -> Graph:
    """The graph with such nodes in the places of what they stand for. base: precision of its floats.

    Attention is fused in halves only: of fp32 torch's kernels round products, or are none.
    """
    finder = _Finder(graph)
    patterns = [*finder.gelus(), *(finder.attentions() if base in HALVES else ())]
    if not patterns:
        return graph
    found = {node.outputs[0]: node for node, _ in patterns}
    gone = {part.outputs[0] for _, parts in patterns for part in parts}
    nodes: list[Node] = []
    for node in graph.nodes:  # what stands for several stands where the last of them stood
        own = node.outputs[0]
        nodes += [found[own]] if own in found else [] if own in gone else [node]
    readers = Counter(name for node in nodes for name in node.inputs)
    readers.update(graph.outputs)
    return replace(graph, nodes=tuple(nodes), readers=readers)


Pattern = tuple[Node, tuple[Node, ...]]
"""A node, and those that it stands for."""


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made_by = {name: node for node in graph.nodes for name in node.outputs}

    @cached_property
    def _read_by(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self._graph.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def gelus(self) -> Iterator[Pattern]:
        """x / 2 * (1 + erf(x / sqrt(2))), with the factors in any order."""
        for erf in self._graph.nodes:
            if erf.op != "Erf" or erf.domain:
                continue
            before = self._made_by.get(erf.inputs[0])
            plus = self._next(erf, "Add")
            if before is None or plus is None or self._readers(erf.inputs[0]) != 1:
                continue
            x = self._scaled(before, 1.0 / math.sqrt(2.0))
            if x is None or not _near(self._other(plus, erf.outputs[0]), 1.0):
                continue
            last = self._halved(plus, x)
            if last is not None:
                nodes, end = last
                parts = (before, erf, plus, *nodes)
                yield Node(end.name, "Gelu", "", (x,), end.outputs, {}, tuple(n.name for n in parts)), parts

    def _halved(self, plus: Node, x: str) -> tuple[tuple[Node, ...], Node] | None:
        """(nodes, the last of them) of `plus` times x times a half; None where that is not what becomes of it."""
        first = self._next(plus, "Mul")
        if first is None:
            return None
        if self._is(first, plus.outputs[0], x):
            second = self._next(first, "Mul")
            good = second is not None and _near(self._other(second, first.outputs[0]), 0.5)
            return ((first, second), second) if good and second is not None else None
        if _near(self._other(first, plus.outputs[0]), 0.5):
            second = self._next(first, "Mul")
            good = second is not None and self._is(second, first.outputs[0], x)
            return ((first, second), second) if good and second is not None else None
        half = self._made_by.get(self._name(first, plus.outputs[0]))
        if half is not None and self._readers(half.outputs[0]) == 1 and self._scaled(half, 0.5) == x:
            return (half, first), first
        return None

    def attentions(self) -> Iterator[Pattern]:
        """softmax(q k^T + mask) v, the last two axes being positions and features; scales of q and k go into the kernel."""
        for softmax in self._graph.nodes:
            if softmax.op != "Softmax" or softmax.domain or softmax.attributes.get("axis", -1) != -1:
                continue
            scores = self._made_by.get(softmax.inputs[0])
            mixed = self._next(softmax, "MatMul")
            if scores is None or mixed is None or mixed.inputs[0] != softmax.outputs[0]:
                continue
            nodes, mask = [softmax, mixed], ""
            if self._readers(softmax.inputs[0]) != 1:
                continue
            if scores.op == "Add" and not scores.domain:
                product = next(
                    (m for m in map(self._made_by.get, scores.inputs) if m is not None and m.op == "MatMul"),
                    None,
                )
                if product is None or self._readers(product.outputs[0]) != 1:
                    continue
                mask = self._name(scores, product.outputs[0])
                nodes.append(scores)
                scores = product
            if scores.op != "MatMul" or scores.domain:
                continue
            nodes.append(scores)
            scale, operands = 1.0, []
            for name in scores.inputs:
                factor, inner, node = self._unscaled(name)
                scale *= factor
                operands.append(inner)
                nodes += [node] if node is not None else []
            inputs = (*operands, mixed.inputs[1], *([mask] if mask else []))
            if any(n in self._graph.constants for n in inputs[:3]):
                continue
            names = tuple(n.name for n in nodes)
            made = Node(mixed.name, "Attention", OWN, inputs, mixed.outputs, {"scale": scale}, names)
            yield made, tuple(nodes)

    # ---- what stands around a node

    def _next(self, node: Node, op: str) -> Node | None:
        """The only reader of a node's output, where it is of that operator."""
        readers = self._read_by.get(node.outputs[0], [])
        alone = len(readers) == 1 and self._readers(node.outputs[0]) == 1
        return readers[0] if alone and readers[0].op == op and not readers[0].domain else None

    def _readers(self, name: str) -> int:
        return self._graph.readers[name]

    def _name(self, node: Node, one: str) -> str:
        """The other of two inputs."""
        return node.inputs[1 - node.inputs.index(one)]

    def _other(self, node: Node, one: str) -> torch.Tensor | None:
        """The other of two inputs, where it is a constant."""
        return self._graph.constants.get(self._name(node, one))

    def _is(self, node: Node, one: str, other: str) -> bool:
        return sorted(node.inputs) == sorted((one, other))

    def _scaled(self, node: Node, factor: float) -> str | None:
        """What a node multiplies by a factor, or divides by its reciprocal; None where it does not."""
        if node.domain or node.op not in ("Mul", "Div"):
            return None
        known = self._graph.constants
        if node.op == "Div":
            return node.inputs[0] if _near(known.get(node.inputs[1]), 1.0 / factor) else None
        for one, other in (node.inputs, node.inputs[::-1]):
            if _near(known.get(other), factor):
                return one
        return None

    def _unscaled(self, name: str) -> tuple[float, str, Node | None]:
        """(factor, what is multiplied by it, the node that does it), where nobody else reads the product; else (1, name, None)."""
        node = self._made_by.get(name)
        if node is not None and node.op == "Mul" and not node.domain and self._readers(name) == 1:
            for one, other in (node.inputs, node.inputs[::-1]):
                constant = self._graph.constants.get(other)
                if constant is not None and constant.numel() == 1 and constant.is_floating_point():
                    return float(constant), one, node
        return 1.0, name, None


def _near(constant: torch.Tensor | None, number: float) -> bool:
    """Whether a constant is that number, in its own precision."""
    if constant is None or constant.numel() != 1 or not constant.is_floating_point():
        return False
    return float(constant) == float(torch.tensor(number, dtype=constant.dtype)) or math.isclose(
        float(constant), number, rel_tol=4 * torch.finfo(constant.dtype).eps
    )

"""ONNX operators as torch calls: the table that `elementwise`, `moves` and `layers` fill, and what its entries are given.

An entry is asked once, when an engine is built, and returns what is called at every inference: a function of those inputs of the
node that it did not take as constants. All that can be known before (axes, shapes, paddings) is worked out then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hwsearch.backends.torch.graph import Node
from hwsearch.errors import BackendUnavailable

Run = Callable[..., Any]
"""Tensors in, a tensor (or a tuple of them, for a node of several outputs) out."""

TABLE: dict[str, Callable[[Call], Run]] = {}
"""What makes the torch call of each operator: of ONNX's own domain by its name, of another behind that."""
KNOWN_BY_SHAPE = ("Shape", "Size")
"""Operators whose result is known when shapes are, whatever they read."""


def op(*names: str) -> Callable[[Callable[[Call], Run]], Callable[[Call], Run]]:
    """Enters a function into the table, under the operators that it makes calls of."""

    def enter(make: Callable[[Call], Run]) -> Callable[[Call], Run]:
        TABLE.update(dict.fromkeys(names, make))
        return make

    return enter


def refused(node: Node, why: str) -> BackendUnavailable:
    """The error for a node that cannot be run, with what to do."""
    return BackendUnavailable(
        f"torch cannot run node {node}: {why}; replace it in the model, or use another backend"
    )


def first_line(error: BaseException) -> str:
    """What torch says, without the stack that it adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Call:
    """One node at build time. shapes, dtypes: of its inputs, None for those left out.

    taken: inputs that became constants of the call. kept: tensors that belong to it, on the device that it runs on.
    """

    def __init__(
        self, node: Node, shapes: Sequence[tuple[int, ...] | None], dtypes: Sequence[torch.dtype | None],
        constants: Sequence[torch.Tensor | None], device: torch.device,
    ) -> None:  # fmt: skip
        self.node, self.shapes, self.dtypes, self._constants = node, shapes, dtypes, constants
        self.device = device
        self.taken: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the call's own, on the device."""
        self.kept.append(tensor.contiguous().to(self.device))
        return self.kept[-1]

    def has(self, index: int) -> bool:
        """Whether the node has such an input."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def shape(self, index: int = 0) -> tuple[int, ...]:
        found = self.shapes[index]
        assert found is not None
        return found

    def dtype(self, index: int = 0) -> torch.dtype:
        found = self.dtypes[index]
        assert found is not None
        return found

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def maybe(self, index: int) -> torch.Tensor | None:
        """An input on the host if it is a constant, which the call then does not get; None if it is none or left out."""
        if not self.has(index) or self._constants[index] is None:
            return None
        self.taken.add(index)
        return self._constants[index]

    def const(self, index: int) -> torch.Tensor:
        """A constant input, which the call then does not get. Raises BackendUnavailable where it depends on the data."""
        found = self.maybe(index)
        if found is None:
            raise refused(
                self.node, f"its input {index} depends on the data, so that no shape of what follows is known"
            )
        return found

    def ints(self, index: int) -> list[int]:
        """A constant input as integers; see `const`."""
        return [int(v) for v in self.const(index).reshape(-1).tolist()]

    def axes(self, index: int, name: str = "axes") -> list[int] | None:
        """Axes from an input or, of older opsets, from an attribute, none of them negative; None where they are not given."""
        given = self.ints(index) if self.has(index) else self.attr(name)
        return None if given is None else [int(a) % max(len(self.shape()), 1) for a in given]

    def axis(self, default: int, rank: int | None = None) -> int:
        """The attribute `axis`, not negative."""
        return int(self.attr("axis", default)) % max(len(self.shape()) if rank is None else rank, 1)

    def refuse(self, why: str) -> BackendUnavailable:
        return refused(self.node, why)

    def single_output(self) -> None:
        """Raises BackendUnavailable where outputs behind the first are read, which torch does not give."""
        if any(self.node.outputs[1:]):
            raise self.refuse("torch computes its first output only")


def made(call: Call) -> Run:
    """What the node's call is. Raises BackendUnavailable where the table has no entry for it."""
    node = call.node
    make = TABLE.get(f"{node.domain}.{node.op}" if node.domain else node.op)
    if make is None:
        raise refused(node, "there is no torch call for this operator here")
    return make(call)


def paddings(
    call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """`pads` of a window operator [begins, ends], worked out of `auto_pad` where that is given."""
    spatial = len(kernel)
    auto = call.attr("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return list(call.attr("pads", (0,) * (2 * spatial)))
    if auto == "VALID":
        return [0] * (2 * spatial)
    begins, ends = [], []
    for size, k, stride, dilation in zip(call.shape()[2:], kernel, strides, dilations, strict=True):
        whole = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small = whole // 2
        begins.append(small if auto == "SAME_UPPER" else whole - small)
        ends.append(whole - begins[-1])
    return begins + ends


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's [begins, ends] of the last axes -> what `torch.nn.functional.pad` takes, from the last axis on."""
    half = len(pads) // 2
    return [amount for axis in reversed(range(half)) for amount in (pads[axis], pads[half + axis])]

"""Peak activation memory: the most bytes of tensors that are alive at once while a network runs.

A tensor lives from the unit that makes it to the last unit that reads it, both included; the peak is the largest sum over
the units in the order in which they run. It is an estimate, computed from the network and never measured. A process takes
more: not in it are weights, workspaces of kernels, what operators between units need while they run, alignment, and whatever
the runtime's allocator keeps or cannot put into the same place. A runtime that computes in place takes less, and where the
network does not tell whether two tensors are one, or whether one becomes int8, the larger figure counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hwsearch.network.network import Edge, Network
from hwsearch.network.variants import WEIGHT_BITS, Variant

_FP32 = 4
_VIA = 8
"""Edges remember so many operators; one with as many may have passed others."""

MOVERS = frozenset(
    "cat stack view _unsafe_view reshape flatten unflatten permute transpose t squeeze unsqueeze slice select unbind getitem "
    "split split_with_sizes chunk expand max_pool1d max_pool2d max_pool3d max_pool2d_with_indices pixel_shuffle "
    "channel_shuffle pad constant_pad_nd dropout alias clone contiguous".split()
)
"""Operators between units that runtimes execute on int8 as they are: values move, none is computed."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that stays in memory while the units from position `first` to position `last` run.

    sources: units whose outputs it holds (none of a network's input). readers: units that read it, or what is made of it.
    fp32_bytes: its size in fp32 at whole widths. sized: the unit that decides its size at other widths, by its output or,
    with `by_input`, by what it reads; empty where it is always the same. floating: it never becomes int8.
    external: the caller's own, in fp32 whatever the base precision is.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    first: int
    last: int
    fp32_bytes: int
    sized: str = ""
    by_input: bool = False
    floating: bool = False
    external: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """The units that must all be quantized for it to be int8."""
        return tuple(dict.fromkeys((*self.sources, *self.readers)))

    def elements(self, network: Network, widths: Mapping[str, int]) -> int:
        """How many values it has at some widths (of a type that is not of four bytes, as many as take its place in fp32)."""
        size = self.fp32_bytes
        if self.sized and self.by_input:
            own, whole = _read(network, self.sized, widths), _read(network, self.sized, {})
            size = -(-size * own // whole) if whole else size
        elif self.sized:
            size = round(size * network.share(self.sized, widths))
        return -(-size // _FP32)


def tensors(network: Network, *, quantize_outputs: bool = False) -> tuple[Tensor, ...]:
    """The tensors that the edges of a network, its inputs and its outputs tell of.

    quantize_outputs: what an int8 unit returns is quantized too (`Backend.quantize_outputs`); else what enters an operator
    fused into a unit, as a residual sum, stays floating.

    - What a unit returns lives up to the last unit that reads it. Edges of one size from one unit are one tensor.
    - What operators between units make of it (a pool, a concatenation) takes its place when the next unit begins.
      All that a unit reads through them as its one input is one tensor, whichever units it comes from.
    - A unit that no edge leaves returns an output of the network, which lives to the end in fp32; so do inputs up to the
      last unit that no edge leads into. Which other units return outputs, and which read inputs as well, is not known.
    - A unit that runs several times counts where it runs first; what an edge takes back to an earlier unit lives to the end.
    """
    return _Lives(network, quantize_outputs).tensors()


class _Lives:
    """What is known of each tensor while the edges are gone through."""

    def __init__(self, network: Network, quantize_outputs: bool) -> None:
        self.network, self.quantize_outputs = network, quantize_outputs
        self.position = {u.name: i for i, u in enumerate(network.units)}
        self.end = len(network.units) - 1

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self._inputs(), *self._derived(), *(t for u in self.position for t in self._returned(u)))

    def _inputs(self) -> list[Tensor]:
        fed = {e.dst for e in self.network.edges} | {u.name for u in self.network.units if u.stored}
        last = max((i for name, i in self.position.items() if name not in fed), default=0)
        sizes = (_FP32 * math.prod(shape) for shape in self.network.input_shapes)
        return [Tensor((), (), 0, last, size, floating=True, external=True) for size in sizes]

    def _until(self, source: str, readers: Sequence[str]) -> int:
        back = any(self.position[r] <= self.position[source] for r in readers)
        return self.end if back else max(self.position[r] for r in readers)

    def _floating(self, edges: Sequence[Edge]) -> bool:
        return any(
            (e.fused and not self.quantize_outputs) or len(e.via) >= _VIA
            or not all(op.rstrip("_") in MOVERS for op in e.via)
            for e in edges
        )  # fmt: skip

    def _derived(self) -> list[Tensor]:
        """Tensors that operators between units make."""
        groups: dict[tuple[frozenset[tuple[str, tuple[str, ...]]], int, str, bool], list[Edge]] = {}
        for unit in self.network.units:
            into = [e for e in self.network.edges if e.dst == unit.name]
            own = [e for e in into if not e.fused]
            whole = _FP32 * _read(self.network, unit.name, {})
            one = unit.calls == 1 and all(e.via for e in own)
            if (
                one
                and len(own) > 1
                and len(unit.input_shapes) == 1
                and all(e.tensor_bytes == whole for e in own)
            ):
                groups.setdefault((_origin(own), whole, "", True), []).extend(own)
            elif one and len(own) == 1 and len(unit.input_shapes) > 1:  # queries, keys of one projection
                groups.setdefault((_origin(own), whole, unit.name, True), []).extend(own)
            else:
                for edge in filter(lambda e: e.via, own):
                    groups.setdefault((_origin([edge]), edge.tensor_bytes, "", False), []).append(edge)
            for edge in into:
                if edge.fused and edge.via:
                    groups.setdefault((_origin([edge]), edge.tensor_bytes, "", False), []).append(edge)
        found = []
        for (_, size, _, by_input), edges in groups.items():
            sources = tuple(sorted({e.src for e in edges}, key=self.position.__getitem__))
            readers = tuple(dict.fromkeys(e.dst for e in edges))
            newest = sources[-1]
            last = self._until(newest, readers)
            first = min(self.position[newest] + 1, last)
            sized = readers[0] if by_input else newest
            found.append(Tensor(sources, readers, first, last, size, sized, by_input, self._floating(edges)))
        return found

    def _returned(self, unit: str) -> list[Tensor]:
        """What a unit returns itself."""
        network, place = self.network, self.position[unit]
        if network[unit].stored:
            return []
        leaving = [e for e in network.edges if e.src == unit]
        whole = _FP32 * math.prod(network[unit].output_shape)
        if not leaving:
            return [Tensor((unit,), (), place, self.end, whole, unit, floating=True, external=True)]
        direct = [e for e in leaving if not e.via]
        passed = [e for e in leaving if e.via]
        sizes = sorted({e.tensor_bytes for e in direct}, reverse=True) or [whole]
        found = []
        for number, size in enumerate(sizes):
            own = [e for e in direct if e.tensor_bytes == size]
            onward = passed if number == 0 else []  # of several, operators are taken to read the largest
            last = max([place, *(self._until(unit, [e.dst]) for e in own), *map(self._joined, onward)])
            readers = tuple(dict.fromkeys(e.dst for e in (*own, *onward)))
            floating = self._floating([*own, *onward])
            found.append(Tensor((unit,), readers, place, last, size, unit, floating=floating))
        return found

    def _joined(self, edge: Edge) -> int:
        """Where the operators that an edge passes have run: after the last unit whose output they put together."""
        others = [
            e for e in self.network.edges
            if e.dst == edge.dst and e.via and not (e.fused or edge.fused) and e.tensor_bytes == edge.tensor_bytes
        ]  # fmt: skip
        return max(self.position[e.src] for e in (edge, *others))


def _origin(edges: Sequence[Edge]) -> frozenset[tuple[str, tuple[str, ...]]]:
    return frozenset((e.src, e.via) for e in edges)


def _read(network: Network, unit: str, widths: Mapping[str, int]) -> int:
    return sum(map(math.prod, network.unit_at(unit, widths).input_shapes))


def steps(tensors: Sequence[Tensor], units: int) -> tuple[tuple[int, ...], ...]:
    """Which tensors (by number) are alive together: the sets that no other contains, in the order of the units."""
    alive = [frozenset(n for n, t in enumerate(tensors) if t.first <= i <= t.last) for i in range(units)]
    distinct = list(dict.fromkeys(alive))
    return tuple(tuple(sorted(a)) for a in distinct if a and not any(a < other for other in distinct))


def element_bytes(base: str) -> int:
    """Bytes of one value of a floating tensor under a base precision."""
    return WEIGHT_BITS[base] // 8


def tensor_bytes(
    tensor: Tensor, network: Network, variants: Mapping[str, Variant], widths: Mapping[str, int], base: str
) -> int:
    """Bytes of one tensor under an allocation.

    One a value where the runtime really carries int8: every unit that makes or reads the tensor is quantized, and nothing
    is computed on the way. Else those of the base precision: a float consumer needs the float tensor.
    """
    count = tensor.elements(network, widths)
    if tensor.external:
        return _FP32 * count
    if not tensor.floating and all(variants[m].quantized for m in tensor.members):
        return count
    return element_bytes(base) * count


def peak_bytes(
    network: Network,
    variants: Mapping[str, Variant],
    widths: Mapping[str, int] | None = None,
    *,
    base: str,
    quantize_outputs: bool = False,
) -> int:
    """Peak activation memory of an allocation in bytes, as the module says.

    network: at whole widths. widths: slots kept, of the channel groups that are not whole. base: the precision of what is
    not int8. quantize_outputs: as for `tensors`.
    """
    found = tensors(network, quantize_outputs=quantize_outputs)
    sizes = [tensor_bytes(t, network, variants, widths or {}, base) for t in found]
    return max((sum(sizes[n] for n in alive) for alive in steps(found, len(network.units))), default=0)

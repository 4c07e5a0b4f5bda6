"""Random programs of units, pools and concatenations: as networks, and run tensor by tensor to see what memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from hwsearch.network.network import Edge, Network, Unit
from hwsearch.network.variants import Variant

OPERATORS = {"max_pool1d": True, "avg_pool1d": False, "cat": True}
"""Operators between units, and whether int8 passes them as it is."""


@dataclass(frozen=True)
class Step:
    """A unit: it reads the unit `reads` (-1: the input), or what `operator` makes of one or two; `adds` is fused into it."""

    reads: tuple[int, ...]
    operator: str
    channels: int
    adds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]
    input_channels: int

    def width(self, i: int) -> int:
        return self.input_channels if i < 0 else self.steps[i].channels

    def arriving(self, step: Step) -> int:
        """Channels that a unit reads."""
        total = sum(self.width(i) for i in step.reads)
        return max(1, total // 2) if "pool" in step.operator else total

    @property
    def network(self) -> Network:
        units, edges = [], []
        for i, step in enumerate(self.steps):
            into, out = self.arriving(step), step.channels
            units.append(Unit(f"u{i}", "linear", ((1, into),), (1, out), (out, into)))
            via = (step.operator,) if step.operator else ()
            edges += [Edge(f"u{s}", f"u{i}", 4 * into, via) for s in step.reads if s >= 0]
            edges += [Edge(f"u{s}", f"u{i}", 4 * self.width(s), (), fused=True) for s in step.adds]
        return Network(tuple(units), tuple(edges), input_shapes=((1, self.input_channels),))

    def peak(self, variants: Mapping[str, Variant], floating: int, quantize_outputs: bool) -> int:
        """Bytes of what is held at most, by running the program with counts of references."""
        int8 = {i: variants[f"u{i}"].quantized for i in range(len(self.steps))}
        made = {s.reads: s.operator for s in self.steps if s.operator and -1 not in s.reads}
        users: dict[object, list[object]] = {}
        for i, step in enumerate(self.steps):
            value = (step.operator, step.reads) if step.operator and -1 not in step.reads else step.reads[0]
            users.setdefault(value, []).append(i)
            for s in step.adds:
                users.setdefault(s, []).append(i)
        for key in dict.fromkeys((o, r) for r, o in made.items()):
            for s in key[1]:
                users.setdefault(s, []).append(key)
        readers = {
            v: [u for own in found for u in (users[own] if isinstance(own, tuple) else [own])]
            for v, found in users.items()
        }

        def held(value: object) -> int:
            if value == -1:
                return 4 * self.input_channels
            sources = value[1] if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple):
                operators = [value[0]]
            else:
                operators = [u[0] for u in users.get(value, ()) if isinstance(u, tuple)]
            count = (
                self.width(value) if isinstance(value, int) else self.arriving(Step(value[1], value[0], 0))
            )
            if value not in readers:
                return 4 * count
            added = any(value in self.steps[u].adds for u in users[value] if isinstance(u, int))
            whole = all(int8[s] for s in sources) and all(int8[u] for u in readers[value])
            passes = all(OPERATORS[o] for o in operators) and (quantize_outputs or not added)
            return count * (1 if whole and passes else floating)

        open_ = {v: len(u) for v, u in users.items()}
        first = max(
            (i for i, s in enumerate(self.steps) if not [r for r in (*s.reads, *s.adds) if r >= 0]), default=0
        )
        alive: set[object] = {-1}
        most = 0
        for i, step in enumerate(self.steps):
            alive.add(i)
            most = max(most, sum(map(held, alive)))
            if i == first:
                alive.discard(-1)
            value = (step.operator, step.reads) if step.operator and -1 not in step.reads else step.reads[0]
            for used in (value, *step.adds):
                if used == -1:
                    continue
                open_[used] -= 1
                if not open_[used]:
                    alive.discard(used)
            for key in [k for k in open_ if isinstance(k, tuple) and max(k[1]) == i]:
                alive.add(key)
                for s in key[1]:
                    open_[s] -= 1
                    if not open_[s]:
                        alive.discard(s)
        return most


@st.composite
def programs(draw: st.DrawFn, most: int = 7) -> Program:
    """Up to `most` units; every second one reads the unit before it, others anything earlier."""
    input_channels = draw(st.integers(1, 9))
    steps: list[Step] = []
    operator_of: dict[tuple[int, ...], str] = {}
    for i in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(["", "", "max_pool1d", "avg_pool1d", "cat"])) if i else ""
        source = draw(st.one_of(st.just(i - 1), st.integers(-1, i - 1)))
        reads: tuple[int, ...] = (source,)
        if kind == "cat" and i > 1:
            reads = tuple(sorted(draw(st.sets(st.integers(0, i - 1), min_size=2, max_size=3))))
        elif kind == "cat" or source < 0:
            kind = ""
        kind = operator_of.setdefault(reads, kind) if kind else ""
        channels = draw(st.integers(1, 9))
        equal = [s for s in range(i) if s not in reads and s != i - 1]
        adds = (
            tuple(draw(st.sets(st.sampled_from(equal), max_size=2))) if equal and draw(st.booleans()) else ()
        )
        steps.append(Step(reads, kind, channels, adds))
    return Program(tuple(steps), input_channels)

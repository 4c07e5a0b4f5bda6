"""What tells the tables in one file apart (options and input shapes), and how one of them is chosen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hwsearch.errors import InvalidInput

Shape = tuple[int, ...]
Shapes = str | Sequence[str | Sequence[int]]
"""Input shapes as a user gives them: `"1x3x160x160"`, or a sequence of such texts or of sequences of sizes."""

ABSENT: dict[str, Any] = {
    "load": 0,
    "residual": False,
    "cpus": "",
    "clocks": 0,
    "mps": 0.0,
    "int8_bits": 8,
    "unsigned": False,
}
"""Options that a table has only where they are not this."""
ALWAYS = ("threads", "batch", "base")


@dataclass(frozen=True, eq=False)
class Section:
    """The options that a table was measured under, and the shapes of the network's inputs, batch included."""

    options: Mapping[str, Any]
    shapes: tuple[Shape, ...]

    @cached_property
    def key(self) -> str:
        """Equal for sections that are the same."""
        return json.dumps([{**ABSENT, **self.options}, self.shapes], sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Section) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __getitem__(self, option: str) -> Any:
        return self.shapes if option == "shape" else self.options.get(option, ABSENT.get(option))

    def __str__(self) -> str:
        own = [f"{k} {v}" for k, v in self.options.items() if v is not True]
        own += [k for k, v in self.options.items() if v is True]
        return ", ".join([*own, f"shape {' and '.join(map(written, self.shapes))}"])

    def agrees(self, options: Mapping[str, Any]) -> int:
        """In how many options it agrees with others."""
        return sum(self[k] == v for k, v in {**ABSENT, **options}.items())

    def has(self, shapes: Sequence[Shape]) -> bool:
        """Whether the inputs have these shapes, in this order; of fewer than there are inputs, in any."""
        if len(shapes) == len(self.shapes):
            return tuple(shapes) == self.shapes
        return all(list(self.shapes).count(s) >= list(shapes).count(s) for s in shapes)


def written(shape: Sequence[int]) -> str:
    """`1x3x160x160`."""
    return "x".join(map(str, shape))


def parse_shapes(shapes: Shapes) -> list[tuple[str | None, Shape]]:
    """(name of the input or None, sizes) of `1x3x160x160`, `NAME=1x64`, or a sequence of either. Raises InvalidInput."""
    found: list[tuple[str | None, Shape]] = []
    for one in [shapes] if isinstance(shapes, str) else shapes:
        name, _, text = one.rpartition("=") if isinstance(one, str) else ("", "", written(one))
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text.strip()):
            raise InvalidInput(
                f"shape {one!r} is not understood; expected sizes, the batch first, for instance 1x3x160x160 or NAME=1x64"
            )
        found.append((name.strip() or None, tuple(map(int, text.strip().split("x")))))
    return found


def matching(
    sections: Sequence[Section], path: str | Path, *, shape: Shapes | None = None, **options: Any
) -> list[int]:
    """Places of the sections under these options (None: any) and with inputs of these shapes: at least one.

    Raises InvalidInput where there is none, listing what the file holds.
    """
    known = {*ALWAYS, *ABSENT, *(key for s in sections for key in s.options)}
    if unknown := [key for key in options if key not in known]:
        raise InvalidInput(
            f"no table has an option {unknown[0]!r}; expected shape or {', '.join(sorted(known))}"
        )
    shapes = [sizes for _, sizes in parse_shapes(shape)] if shape else []
    wanted = {k: v for k, v in options.items() if v is not None}
    found = [i for i, s in enumerate(sections) if s.has(shapes) and all(s[k] == v for k, v in wanted.items())]
    if not found:
        asked = [f"{k} {v}" for k, v in wanted.items()] + [f"shape {written(s)}" for s in shapes]
        raise InvalidInput(f"{path} has no section of {', '.join(asked)}; it holds {listed(sections)}")
    return found


def only(sections: Sequence[Section], path: str | Path) -> int:
    """The place of the only section. Raises InvalidInput on several, naming the options that choose."""
    if len(sections) == 1:
        return 0
    keys = dict.fromkeys([*ALWAYS, "shape", *ABSENT, *(key for s in sections for key in s.options)])
    differ = [k for k in keys if any(s[k] != sections[0][k] for s in sections)]
    raise InvalidInput(
        f"{path} holds {len(sections)} sections to choose from: {listed(sections)}; choose one with "
        f"{' and '.join('--' + k.replace('_', '-') for k in differ)} (in Python: `LatencyTable.load(path, {differ[0]}=...)`)"
    )


def listed(sections: Sequence[Section]) -> str:
    """All of them in a line."""
    return "; ".join(f"({i}) {s}" for i, s in enumerate(sections, 1))

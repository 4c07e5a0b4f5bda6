"""Whether a file says what an honest one can say: columns and headers looked at as a whole, lies refused by row and field."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import InvalidInput
from hwsearch.network.network import Network
from hwsearch.network.variants import PRECISIONS, Variant


class Rows:
    """The rows of a file (a pyarrow table), counted from 0. Every method raises InvalidInput.

    where: the section of the file that they are of, in words; empty where it has only one. todo: what to do about damage.
    """

    def __init__(self, rows: Any, path: str | Path, todo: str, where: str = "") -> None:
        self.rows, self.path, self.todo, self.where = rows.combine_chunks(), path, todo, where

    def refuse(self, row: int, field: str, value: Any, expected: str) -> None:
        """Say what is wrong with a field of a row."""
        raise InvalidInput(
            f"{self.path} is damaged: row {row}{self.where}: {field} is {value!r}, expected {expected}; {self.todo}"
        )

    def typed(self, schema: Any, optional: Collection[str] = ()) -> None:
        """Every column of a schema is there, of its type, and no other; all values but the optional ones are there."""
        for column in schema:
            if column.name not in self.rows.schema.names:
                if column.name in optional:
                    continue
                raise InvalidInput(f"{self.path} is damaged: it has no column {column.name}; {self.todo}")
            have = self.rows.schema.field(column.name).type
            if have != column.type:
                raise InvalidInput(
                    f"{self.path} is damaged: column {column.name} holds {have}, expected {column.type}; {self.todo}"
                )
            nulls = np.asarray(self.rows[column.name].is_null())
            if column.name not in optional and nulls.any():
                self.refuse(int(nulls.argmax()), column.name, None, "a value")
        if others := [n for n in self.rows.schema.names if n not in schema.names]:
            raise InvalidInput(f"{self.path} is damaged: it has a column {others[0]}, which none has; {self.todo}")

    def array(self, field: str) -> NDArray[Any]:
        """A column; what is null is NaN."""
        return np.asarray(self.rows[field].to_numpy())

    def numbers(self, field: str, expected: str, right: Any) -> None:
        """right: for an array of the column's values whether each is; null ones are not looked at."""
        values = self.array(field)
        known = ~np.asarray(self.rows[field].is_null())
        with np.errstate(invalid="ignore"):
            wrong = known & ~np.asarray(right(values))
        if wrong.any():
            row = int(wrong.argmax())
            self.refuse(row, field, values[row].item(), expected)

    def flat(self, field: str) -> tuple[Any, NDArray[np.int64]]:
        """(all elements of a column of lists, which row each is of)."""
        import pyarrow.compute as pc

        column = self.rows[field]
        return pc.list_flatten(column).combine_chunks(), np.asarray(pc.list_parent_indices(column).to_numpy())

    def elements(self, field: str, expected: str, right: Any, least: int = 0) -> None:
        """The same for the elements of a column of lists, of which there are at least so many in each row."""
        values, rows = self.flat(field)
        if values.null_count:
            self.refuse(int(rows[np.asarray(values.is_null()).argmax()]), field, None, expected)
        found = np.asarray(values)
        wrong = ~np.asarray(right(found), bool)
        if wrong.any():
            place = int(wrong.argmax())
            self.refuse(int(rows[place]), field, values[place].as_py(), expected)
        if least:
            few = np.bincount(rows, minlength=len(self.rows)) < least
            if few.any():
                self.refuse(int(few.argmax()), field, [], expected)

    def lengths(self, field: str, length: int, of: str, *, or_none: bool = False) -> None:
        """Every list of a column has an element for each of something."""
        _, rows = self.flat(field)
        counts = np.bincount(rows, minlength=len(self.rows))
        wrong = (counts != length) & ~(or_none & (counts == 0))
        if wrong.any():
            row = int(wrong.argmax())
            self.refuse(row, field, f"{counts[row]} values", f"one for each of {length} {of}")

    def words(self, field: str, known: Collection[str], expected: str) -> None:
        """Every text of a column is one of these."""
        values = self.rows[field].to_pylist()
        for row, value in enumerate(values if set(values) - set(known) else ()):
            if value not in known:
                self.refuse(row, field, value, expected)

    def variants(self, field: str, *, or_none: bool = False) -> None:
        """Every text in the lists of a column is a variant, or empty where that may be."""
        values, rows = self.flat(field)
        bad = {v for v in values.unique().to_pylist() if not (is_variant(v) or (or_none and v == ""))}
        for value, row in zip(values.to_pylist() if bad else (), rows, strict=False):
            if value in bad:
                self.refuse(int(row), field, value, "variants such as dense.int8")

    def once(self, *fields: str, whole: bool = True) -> None:
        """No two rows are the same in these columns; whole: and in all others."""
        seen: dict[Any, list[int]] = {}
        for row, key in enumerate(zip(*(self.rows[f].to_pylist() for f in fields), strict=True)):
            for before in seen.setdefault(key, []):
                if not whole or self.rows.slice(before, 1).equals(self.rows.slice(row, 1)):
                    self.refuse(row, fields[0], key[0], f"each row once: row {before} is the same")
            seen[key].append(row)


def is_variant(text: Any) -> bool:
    """Whether a text is a variant."""
    try:
        Variant.parse(text)
    except (InvalidInput, TypeError):
        return False
    return True


def number(value: Any, least: float = 0.0, *, above: bool = False, whole: bool = False) -> bool:
    """Whether something is a finite number, at least (or above) another."""
    kinds = int if whole else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    return right and (value > least if above else value >= least)


def first_wrong(checks: Sequence[tuple[str, Any, bool, str]]) -> str:
    """Of (field, value, whether it is right, what is expected) what the first wrong one says; empty for none."""
    for field, value, right, expected in checks:
        if not right:
            return f"{field} is {value!r}, expected {expected}"
    return ""


_OPTIONS: dict[str, tuple[Any, str]] = {
    "threads": (lambda v: number(v, 1, whole=True), "a whole number from 1 on"),
    "batch": (lambda v: number(v, 1, whole=True), "a whole number from 1 on"),
    "base": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "load": (lambda v: number(v, whole=True), "a whole number"),
    "clocks": (lambda v: number(v, whole=True), "a whole number of MHz"),
    "mps": (lambda v: number(v) and v <= 100, "a share from 0 to 100"),
    "int8_bits": (lambda v: v in (7, 8) and number(v, whole=True), "7 or 8"),
    "unsigned": (lambda v: isinstance(v, bool), "true or false"),
    "residual": (lambda v: isinstance(v, bool), "true or false"),
    "cpus": (lambda v: isinstance(v, str), "a text"),
}


def wrong_options(options: Mapping[str, Any]) -> str:
    """What is wrong with the options that something was measured under; empty where nothing is."""
    known = [(f"options.{k}", v, bool(_OPTIONS[k][0](v)), _OPTIONS[k][1]) for k, v in options.items() if k in _OPTIONS]
    others = [
        (f"options.{k}", v, isinstance(v, str | int | float | bool | None), "a number or a text")
        for k, v in options.items() if k not in _OPTIONS
    ]  # fmt: skip
    return first_wrong(known + others)


def wrong_network(network: Network) -> str:
    """What contradicts itself in a network, as a field and its value; empty where nothing does."""
    names, groups = set(network.by_name), set(network.channels)
    checks: list[tuple[str, Any, bool, str]] = []
    for unit in network.units:
        own = f"network.units[{unit.name}]"
        shapes = [*unit.input_shapes, unit.output_shape, unit.weight_shape]
        checks += [
            (f"{own}.macs", unit.macs, number(unit.macs, whole=True), "a whole number from 0 on"),
            (f"{own}.calls", unit.calls, number(unit.calls, 1, whole=True), "a whole number from 1 on"),
            (f"{own}.other_bytes", unit.other_bytes, number(unit.other_bytes, whole=True), "a whole number from 0 on"),
            (f"{own} shapes", shapes, all(number(n, whole=True) for s in shapes for n in s), "whole numbers from 0 on"),
            (f"{own}.ways", unit.groups, set(unit.groups) <= groups, "groups of the network"),
        ]
    for edge in network.edges:
        ends = {edge.src, edge.dst}
        checks += [
            (f"network.edges[{edge.name}]", edge.name, ends <= names, "units of the network"),
            (f"network.edges[{edge.name}].tensor_bytes", edge.tensor_bytes, number(edge.tensor_bytes), "a number from 0 on"),
        ]
    for group in network.groups:
        own, units = f"network.groups[{group.name}]", {*group.producers, *group.consumers}
        checks += [
            (f"{own}.channels", group.channels, number(group.channels, 1, whole=True), "a whole number from 1 on"),
            (f"{own}.fixed_bytes", group.fixed_bytes, number(group.fixed_bytes), "a number from 0 on"),
            (f"{own} units", sorted(units - names), units <= names, "units of the network"),
        ]
    checks.append(("network.fixed_bytes", network.fixed_bytes, number(network.fixed_bytes), "a number from 0 on"))
    return first_wrong(checks)

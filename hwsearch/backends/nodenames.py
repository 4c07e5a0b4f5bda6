"""The names of ONNX nodes: `UNIT|CALL|op` is a unit's own work, `~UNIT|CALL|op` comes after it, `~|0|op` precedes every unit."""

from __future__ import annotations


def unit_of(node_name: str) -> tuple[str, bool]:
    """(unit, whether it is the unit's own work) of an ONNX node's name; ("", False) for anything else."""
    parts = node_name.split("|")
    if len(parts) < 3:
        return "", False
    return parts[0].removeprefix("~"), not parts[0].startswith("~")


def call_of(node_name: str) -> str:
    """Which call of its unit a node belongs to; "0" for anything else."""
    parts = node_name.split("|")
    return parts[1] if len(parts) > 2 else "0"


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number after it where it is taken; from then on it is taken too."""
    found, count = name, 1
    while found in taken:
        found, count = f"{name}.{count}", count + 1
    taken.add(found)
    return found

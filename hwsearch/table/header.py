"""The header of a latency table: what it was measured on and with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hwsearch.errors import InvalidInput
from hwsearch.network.network import Network
from hwsearch.network.variants import Int8
from hwsearch.table.build import TODO, now_called
from hwsearch.table.checking import first_wrong, is_variant, number, wrong_network, wrong_options
from hwsearch.table.section import Section


class Mode(StrEnum):
    """How a table was made: of whole networks, of units between their neighbours, or of each unit by itself."""

    CONTEXT = "context"
    SANDWICHED = "sandwiched"
    ALONE = "alone"


LAYERED = (Mode.ALONE, Mode.SANDWICHED)
"""Modes of tables made layer by layer."""


@dataclass(frozen=True)
class Evidence:
    """What another table of the same device and setup says of one term of the latency model.

    feature: as `regression` names it: a unit's signature and variant, or a kind of boundary. ns, error_ns: on the scale of
    that table's session. table: the network that it was measured in.
    """

    feature: tuple[Any, ...]
    ns: float
    error_ns: float
    table: str

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Evidence:
        """Raises KeyError, TypeError or ValueError on anything else than `asdict` gives."""
        return Evidence(
            _tuples(data["feature"]), float(data["ns"]), float(data["error_ns"]), str(data["table"])
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Header:
    """What a table was measured on and with.

    mode: `context` (whole networks), `sandwiched` (units between their neighbours) or `alone` (units by themselves; earlier
    versions called it `isolated`, and are read as such).
    reference_ns: the session's time of the reference engine, which in mode `sandwiched` is one sandwich; the absolute time of
    a build is its ratio x this.
    graph_bytes: what the deployed file holds beside stored tensors, whatever the allocation is. unit_bytes: unit -> {variant: what
    its nodes and their constants add}; where it is empty, as in earlier versions, graph_bytes is the most for all together.
    dense_file_bytes: size of the dense fp32 ONNX file.
    unsupported: unit -> {variant: reason}; these are never offered.
    grid: for each channel group the widths to choose from, the whole one first; empty where all stay whole.
    ended: whether a profile came to its end, be it by its time limit. task: what named the task, as `hwsearch.load` takes it;
    of a file that was given by its absolute path the name alone. prior: what other tables of the device contributed.
    design: why the design ended (`stopped`), its builds and seconds, and the relative standard error of likely allocations that was
    left (`error`). spent: seconds of the profile by what was done
    (`device.spent`); empty in tables of before.
    """

    network: Network
    device: dict[str, Any]
    backend: str
    versions: dict[str, str]
    options: dict[str, Any]
    mode: Mode = Mode.CONTEXT
    command: str = ""
    created: str = ""
    reference_ns: float = 0.0
    graph_bytes: int = 0
    unit_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    dense_file_bytes: int = 0
    unsupported: dict[str, dict[str, str]] = field(default_factory=dict)
    grid: dict[str, list[int]] = field(default_factory=dict)
    ended: bool = False
    task: str = ""
    prior: tuple[Evidence, ...] = ()
    design: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def section(self) -> Section:
        """What tells this table apart from the others in its file."""
        return Section(self.options, self.network.input_shapes)

    @property
    def int8_bits(self) -> int:
        """Bits of int8 weights: 7 where the device sums products of 8 inexactly."""
        return int(self.section["int8_bits"])

    @property
    def unsigned(self) -> bool:
        """Whether int8 activations that were never negative on calibration data are unsigned."""
        return bool(self.section["unsigned"])

    @property
    def cut_short(self) -> bool:
        """Whether the time limit ended the design before it was content: widths and errors may be missing."""
        return not self.design.get("enough", True)

    @property
    def int8(self) -> Int8:
        """How the device and runtime took int8."""
        return Int8(self.int8_bits, self.unsigned)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "network": self.network.to_json()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Header:
        fields = {k: v for k, v in data.items() if k in Header.__dataclass_fields__}
        prior = tuple(Evidence.from_json(e) for e in data.get("prior", ()))
        mode = Mode(now_called(data.get("mode", "context")))
        return Header(
            **{**fields, "mode": mode, "network": Network.from_json(data["network"]), "prior": prior}
        )


def read_header(data: Mapping[str, Any], path: str | Path, where: str = "") -> Header:
    """Raises InvalidInput, which names the field, on what no profile writes. where: the section, in words."""
    try:
        header = Header.from_json(data)
        _ = header.section.key, header.options["base"]
        why = wrong_network(header.network) or wrong_options(header.options) or first_wrong(_checks(header))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} is damaged: header{where}: {error!r}; {TODO}") from error
    if why:
        raise InvalidInput(f"{path} is damaged: header{where}: {why}; {TODO}")
    return header


def _checks(header: Header) -> list[tuple[str, Any, bool, str]]:
    """(field, value, whether it is right, what is expected) of a header."""
    channels, units = header.network.channels, set(header.network.by_name)
    whole, texts = "a whole number from 0 on", "texts"
    checks: list[tuple[str, Any, bool, str]] = [
        ("reference_ns", header.reference_ns, number(header.reference_ns), "a finite time from 0 ns on"),
        ("graph_bytes", header.graph_bytes, number(header.graph_bytes, -header.network.fixed_bytes, whole=True),
         "a whole number, not below what the network stores in no unit"),
        ("dense_file_bytes", header.dense_file_bytes, number(header.dense_file_bytes, whole=True), whole),
        ("device", header.device, isinstance(header.device, dict), "what a device says of itself"),
        ("backend", header.backend, isinstance(header.backend, str), "the name of a backend"),
        ("versions", header.versions, all(isinstance(v, str) for v in header.versions.values()), texts),
        ("ended", header.ended, isinstance(header.ended, bool), "true or false"),
        ("design", header.design, isinstance(header.design, dict), "how the design ended"),
        ("spent", header.spent, all(number(v) for v in header.spent.values()), "seconds by what was done"),
    ]
    for group, steps in header.grid.items():
        most = channels.get(group, 0)
        right = steps and all(number(w, 1, whole=True) for w in steps) and steps == sorted({most, *steps}, reverse=True)
        checks.append((f"grid of {group}", steps, bool(right), f"widths of a channel group, {most} of it first, falling"))
    for unit, reasons in header.unsupported.items():
        known = unit in units and all(is_variant(v) and isinstance(why, str) for v, why in reasons.items())
        checks.append((f"unsupported of {unit}", reasons, known, "reasons by variant of a unit of the network"))
    for unit, added in header.unit_bytes.items():
        known = unit in units and all(is_variant(v) and number(n, -math.inf, whole=True) for v, n in added.items())
        checks.append((f"unit_bytes of {unit}", added, known, "bytes by variant of a unit of the network"))
    for evidence in header.prior:
        right = number(evidence.ns, -math.inf) and number(evidence.error_ns)
        checks.append((f"prior of {evidence.feature}", (evidence.ns, evidence.error_ns), right, "a finite time and its error"))
    return checks

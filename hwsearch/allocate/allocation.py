"""Allocation: the answer. One variant for each unit, with predicted costs, the proof, and what it belongs to; JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hwsearch.allocate.budget import COMPUTED, LOSS, TAILS, Budget
from hwsearch.allocate.costs import Costs
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.files import write_bytes
from hwsearch.table.checking import first_wrong, is_variant, number, wrong_options

SCHEMA = 2

_MAKE = "expected an allocation from `hwsearch search`"
_KEYS = {
    "predicted": ("latency_ns", "sigma_ns", "size_bytes", "loss"),
    "dense": ("latency_ns", "size_bytes"),
    "solver": ("status", "gap"),
}
_MEASURED = ("latency_ns", "sigma_ns")
"""Not there where budgets are on what is computed alone, and nothing was measured."""


@dataclass(frozen=True)
class Allocation:
    """One variant for each unit and one width for each channel group, in network order.

    Args:
        variants: unit -> its variant, as `dense.int8`.
        predicted: `latency_ns`, `sigma_ns`, `size_bytes`, `memory_bytes` (peak of the activations: estimated, and never
            measured), `macs`, `loss`. Without the first two where nothing bounds latency and a layer was not measured as it is.
        dense: `latency_ns`, `size_bytes`, `memory_bytes` of the dense fp32 network, and `estimated` where its latency is a sum
            over layers and not measured; without a latency where no table was measured.
        budgets: each with its `text`, `column` and integer `limit` (ns, bytes, nJ or MACs); of `loss` in divergence per sample.
        solver: `status`, `gap` and `bound` (no allocation in the space has less loss than that); where something else than the loss
            was minimised, its column as `minimized`, and gap and bound of that.
        network: fingerprint of the network that it is for.
        weights_digest: hash of the weights that it is for.
        device: what it was profiled on.
        backend: name of the backend that it was searched on.
        options: threads, batch, base and what else its table was measured under.
        widths: group -> slots kept.
        order: where any group is narrower, group -> its slots, the most important first, apart by spaces; a group keeps as many
            from the front.
        network_name: name of the task.
        created: when it was found.
        schema: version of the file format.
    """

    variants: dict[str, str]
    predicted: dict[str, int | float]
    dense: dict[str, int | float]
    budgets: list[dict[str, Any]]
    solver: dict[str, Any]
    network: str
    weights_digest: str
    device: dict[str, Any]
    backend: str
    options: dict[str, Any]
    widths: dict[str, int] = field(default_factory=dict)
    order: dict[str, str] = field(default_factory=dict)
    network_name: str = ""
    created: str = ""
    schema: int = field(default=SCHEMA)

    @property
    def costs(self) -> Costs:
        """What is predicted to be the cost of each kind."""
        of = self.predicted
        return Costs(
            latency=of.get("latency_ns"),
            **{tail: of.get(f"{tail}_ns") for tail in TAILS},
            size=of["size_bytes"],
            memory=of.get("memory_bytes"),
            macs=of.get("macs"),
            energy=of.get("energy_nj"),
        )

    @property
    def uniform(self) -> str | None:
        """The variant that every unit has, or None where they differ."""
        kinds = set(self.variants.values())
        return kinds.pop() if len(kinds) == 1 and not self.narrow else None

    @property
    def narrow(self) -> bool:
        """Whether any channel goes."""
        return any(self.widths[g] < len(slots) for g, slots in self.slots.items())

    @property
    def slots(self) -> dict[str, list[int]]:
        """`order` as numbers."""
        return {group: [int(i) for i in text.split()] for group, text in self.order.items()}

    def counts(self) -> dict[str, int]:
        """How many units have each variant.

        Returns:
            Variant -> units, the most frequent first.
        """
        names = list(self.variants.values())
        return {v: names.count(v) for v in sorted(set(names), key=lambda v: (-names.count(v), v))}

    def to_json(self) -> dict[str, Any]:
        """As plain data.

        Returns:
            What the file holds.
        """
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write JSON, in place in one step.

        Args:
            path: file to write.
        """
        write_bytes(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> Allocation:
        """Read an allocation.

        Args:
            path: file that `save` or `hwsearch search` wrote.

        Returns:
            The allocation, checked.

        Raises:
            InvalidInput: the file is absent or malformed, or says what no search says; the message names the field.
            IncompatibleTables: it has another schema.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}; {_MAKE}") from error
        try:
            data = json.loads(text, parse_constant=_refuse)
        except ValueError as error:
            raise InvalidInput(f"{path} is not JSON ({error}); {_MAKE}") from error
        if not isinstance(data, dict) or "schema" not in data:
            raise InvalidInput(f"{path} is not an allocation: it has no schema; {_MAKE}")
        if data["schema"] != SCHEMA:
            raise IncompatibleTables(
                f"{path} has schema {data['schema']}, this hwsearch reads {SCHEMA}; search again"
            )
        try:
            allocation = TypeAdapter(Allocation).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InvalidInput(
                f"{path} is not an allocation: {where}: {first['msg']}; search again"
            ) from error
        if not allocation.variants:
            raise InvalidInput(f"{path} allocates no unit; search again")
        if why := _lacking(allocation) or first_wrong(_checks(allocation)) or wrong_options(allocation.options):
            raise InvalidInput(f"{path} is not an allocation: {why}; search again")
        return allocation


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _lacking(allocation: Allocation) -> str:
    """Which key is not there."""
    computed = {b.get("column") for b in allocation.budgets} <= set(COMPUTED) and bool(allocation.budgets)
    optional = _MEASURED if computed else ()
    parts: list[tuple[str, Any, tuple[str, ...]]] = [
        (key, getattr(allocation, key), tuple(name for name in wanted if name not in optional)) for key, wanted in _KEYS.items()
    ]
    parts += [("a budget", budget, ("text", "column", "limit")) for budget in allocation.budgets]
    for key, part, wanted in parts:
        if missing := [name for name in wanted if name not in part]:
            return f"{key} lacks {', '.join(missing)}"
    return ""


def _checks(of: Allocation) -> list[tuple[str, Any, bool, str]]:
    """(field, value, whether it is right, what is expected) of an allocation."""
    variant = "a variant such as dense.int8"
    checks: list[tuple[str, Any, bool, str]] = [
        (f"variants.{u}", v, is_variant(v), variant) for u, v in of.variants.items()
    ]
    for part, values in (("predicted", of.predicted), ("dense", of.dense), ("solver", {"gap": of.solver["gap"]})):
        for key, value in values.items():
            above = key in ("latency_ns", "size_bytes")
            expected = f"a finite number {'above 0' if above else 'from 0 on'}"
            checks.append((f"{part}.{key}", value, number(value, above=above), expected))
    for group, width in of.widths.items():
        slots = of.order.get(group)
        most = width if slots is None else _slots(slots)
        checks.append((f"widths.{group}", width, 0 < width <= most, f"1 to {most}, as its order says"))
    for group, slots in of.order.items():
        right = group in of.widths and _slots(slots) > 0
        checks.append((f"order.{group}", slots, right, "each slot of a group that has a width, once"))
    for place, budget in enumerate(of.budgets):
        checks += _of_budget(of, f"budgets.{place}", budget)
    return checks


def _slots(order: str) -> int:
    """How many slots are in an order; 0 where it is none."""
    try:
        found = sorted(map(int, order.split()))
    except ValueError:
        return 0
    return len(found) if found == list(range(len(found))) else 0


def _of_budget(of: Allocation, where: str, budget: Mapping[str, Any]) -> list[tuple[str, Any, bool, str]]:
    """Whether text, column and limit of a budget say the same, as far as the dense network's cost is known."""
    text, column, limit = (budget[k] for k in ("text", "column", "limit"))
    try:
        parsed = Budget.parse(text)
    except (InvalidInput, TypeError):
        return [(f"{where}.text", text, False, "a budget such as latency=4ms")]
    said = f"as its text {text!r} says"
    unit = {"size": "bytes", "memory": "bytes", "energy": "nj"}.get(parsed.column, "ns")
    dense = of.dense.get(f"{parsed.column}_{unit}")
    known = parsed.kind == "absolute" or number(dense, above=True)
    wanted = parsed.resolve(dense or 1) if known else limit
    whole = parsed.column != LOSS
    return [
        (f"{where}.column", column, column == parsed.column, f"{parsed.column}, {said}"),
        (f"{where}.limit", limit, number(limit, whole=whole), f"a {'whole ' * whole}number from 0 on"),
        (f"{where}.limit", limit, number(limit) and abs(limit - wanted) <= whole, f"{wanted}, {said}"),
    ]

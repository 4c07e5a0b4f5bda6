"""One number, a share of the dense network's cost, and the exact search decides every layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from hwsearch.allocate.budget import Budget
from hwsearch.allocate.search import search
from hwsearch.deployment.deploy import lowering_of, parse_variants
from hwsearch.errors import InvalidInput
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.refitted import as_module
from hwsearch.network.variants import WEIGHT_BITS
from hwsearch.schemes.scheme import Number, Scheme, given, within
from hwsearch.schemes.subject import Format, Subject
from hwsearch.table.table import LatencyTable

COSTS = ("latency", "size", "memory", "macs", "energy")


@dataclass(frozen=True)
class Allocate(Scheme):
    """The allocation of least loss at a share of the dense network's cost, found exactly, with refitted weights.

    It comes first in a `Compose`, as tables are of the dense network.

    Args:
        table: latency table of the task, or its file.
        sensitivity: sensitivities of the task, or their file.
        latency: the share of the dense network's predicted latency that is allowed, `Free("latency")` for instance.
        size: the same of its bytes.
        memory: the same of the peak of its activations.
        macs: the same of its multiply-accumulates.
        energy: the same of its energy.

    Raises:
        InvalidInput: no share is given, or one is not above 0 and at most 1.
    """

    table: LatencyTable | str | Path = field(repr=False)
    sensitivity: SensitivityTable | str | Path = field(repr=False)
    latency: Number | None = None
    size: Number | None = None
    memory: Number | None = None
    macs: Number | None = None
    energy: Number | None = None

    def __post_init__(self) -> None:
        shares = {cost: share for cost in COSTS if (share := getattr(self, cost)) is not None}
        if not shares:
            raise InvalidInput(f"Allocate bounds nothing; give a share of one of {', '.join(COSTS)}, e.g. latency=Free('latency')")
        for cost, share in shares.items():
            within(cost, share, 0.0, 1.0)
            if share == 0:
                raise InvalidInput(f"{cost} is 0; expected a share above 0, as no network costs nothing")

    def _apply(self, subject: Subject) -> Subject:
        if subject.task is None:
            raise InvalidInput("Allocate makes a network narrower and refits it on calibration data; apply the scheme to a Task")
        if subject.changed:
            raise InvalidInput("Allocate is not the first of its Compose; its table is of the dense network: let it come first")
        table = self.table if isinstance(self.table, LatencyTable) else LatencyTable.load(self.table)
        losses = self.sensitivity if isinstance(self.sensitivity, SensitivityTable) else SensitivityTable.load(self.sensitivity)
        shares = {cost: getattr(self, cost) for cost in COSTS}
        budgets = [Budget(cost, "fraction", given(share)) for cost, share in shares.items() if share is not None]
        allocation = search(table, losses, budgets)
        module = as_module(lowering_of(subject.task, allocation))
        found = Subject(module, subject.task.example_inputs, replace(subject.task, model=module, spec=""))
        found.dense, found.allocation, found.changed = subject.dense, allocation, True
        for unit, variant in parse_variants(allocation).items():
            found.formats[unit] = Format(WEIGHT_BITS[variant.precision], variant)
        return found

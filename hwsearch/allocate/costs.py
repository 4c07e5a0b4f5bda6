"""Costs: what a network takes of everything that a budget may bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hwsearch.allocate.budget import LOSS, Budget
from hwsearch.errors import InvalidInput


@dataclass(frozen=True)
class Costs:
    """What a network takes, as measured or predicted, or what it may take at most. Fields bear the names of budgets.

    Attributes:
        latency: Median time of an inference, in ns. `latency_p90`, `latency_p95`, `latency_p99`: quantiles of it.
        size: Bytes of the ONNX file.
        memory: Peak of the activations in bytes: computed from the network, never measured.
        macs: Multiply-accumulates.
        energy: Energy of an inference, in nJ.

    None stands for what is not known, or not bounded.
    """

    latency: float | None = None
    latency_p90: float | None = None
    latency_p95: float | None = None
    latency_p99: float | None = None
    size: float | None = None
    memory: float | None = None
    macs: float | None = None
    energy: float | None = None

    def __getitem__(self, column: str) -> float:
        """The cost that a budget on `column` bounds. Raises InvalidInput where it is not known."""
        value: float | None = getattr(self, column)
        if value is None:
            raise InvalidInput(f"{column} is not known of this network, so that no budget on it can be checked")
        return value

    def known(self) -> dict[str, float]:
        """Those that are not None."""
        return {column: value for column, value in asdict(self).items() if value is not None}

    def within(self, bound: Costs) -> bool:
        """Whether no bound is exceeded.

        Times and energies have a nanosecond or nanojoule of slack, as a share of 100 % is rounded down to whole ones.
        """
        slack = {column: float(column.startswith("latency") or column == "energy") for column in bound.known()}
        return all(self[column] <= most + slack[column] for column, most in bound.known().items())

    def excess(self, bound: Costs) -> float:
        """How far the worst of the bounded costs is over its bound, relatively; at most 0 where all are within."""
        return max((self[column] / most - 1.0 for column, most in bound.known().items()), default=0.0)


def bounds(budgets: Sequence[Budget], dense: Costs) -> Costs:
    """Budgets in whole ns, bytes, MACs and nJ; relative ones are of the dense fp32 network. Raises InvalidInput.

    A budget on the loss bounds no cost: the search alone holds it, as predicted.
    """
    return Costs(**{b.column: b.resolve(dense[b.column]) for b in budgets if b.column != LOSS})

"""Budgets as a user writes them: `latency=4ms`, `latency=40%`, `latency=2.5x`, `latency_p99=6ms`, `size=800KB`, `loss=0.01`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from types import MappingProxyType

from hwsearch.errors import InvalidInput

_JOULES = {"nJ": 1, "uJ": 10**3, "mJ": 10**6, "J": 10**9}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
TAILS = MappingProxyType({"latency_p90": 0.9, "latency_p95": 0.95, "latency_p99": 0.99})
"""Budgets on a quantile of the times of single inferences; `latency` is on their median."""

UNITS = MappingProxyType(
    {
        "latency": _TIMES,
        **dict.fromkeys(TAILS, _TIMES),
        "size": dict(_BYTES),
        "memory": dict(_BYTES),
        "energy": _JOULES,
        "macs": {"MAC": 1, "KMAC": 10**3, "MMAC": 10**6, "GMAC": 10**9},
    }
)
"""For each column its units, in integer ns, bytes, nJ and MACs; the first is the base unit."""

LOSS = "loss"
"""Predicted divergence per sample: what a search minimises by default, and may bound instead."""

COLUMNS = (*UNITS, LOSS)
"""What a budget may bound."""

COMPUTED = ("size", "memory", "macs", LOSS)
"""Budgets on what is known of a network without its latency: no measurement on a device bounds what may be chosen under them."""

LIMIT = 10**15
"""Beyond it (11 days, a petabyte) floats no longer hold every decimal."""

_EXAMPLES = {
    "latency": "latency=4ms, latency=40% (of dense fp32) or latency=2.5x (speed-up)",
    "size": "size=800KB, size=25% (of dense fp32) or size=4x (smaller)",
    "memory": "memory=800KB, memory=50% (of dense fp32) or memory=2x (less)",
    "energy": "energy=5mJ, energy=40% (of dense fp32) or energy=2.5x (less)",
    "macs": "macs=300MMAC, macs=50% (of dense) or macs=2x (fewer)",
    LOSS: "loss=0.01 (divergence per sample)",
}
_EXAMPLES |= {tail: f"{tail}=6ms, {tail}=40% (of dense fp32's) or {tail}=2.5x (speed-up)" for tail in TAILS}
_FOUR = Context(prec=4, rounding=ROUND_CEILING)
_PLAIN = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.I)
_TEXT = re.compile(r"\s*(?P<column>\w+)\s*=\s*(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>%|[a-zµμ]*)\s*", re.I)


@dataclass(frozen=True)
class Budget:
    """An upper bound on one cost, or on the loss.

    column: `latency`, `latency_p90`, `latency_p95`, `latency_p99`, `size`, `memory` (peak of the activations, computed),
    `energy` (of an inference), `macs` or `loss`. kind: `absolute` (value in ns, bytes, nJ or MACs, a whole number; a loss is in
    divergence per sample, always absolute), `fraction` (of the dense fp32 network) or `speedup` (dense / value). Raises
    InvalidInput on anything else.
    """

    column: str
    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.column not in COLUMNS:
            raise InvalidInput(f"unknown budget {self.column!r}; expected one of {', '.join(COLUMNS)}")
        if self.kind not in ("absolute", "fraction", "speedup"):
            raise InvalidInput(
                f"unknown kind of budget {self.kind!r}; expected absolute, fraction or speedup"
            )
        if not (math.isfinite(self.value) and 0 < self.value <= LIMIT):
            raise InvalidInput(f"{self.column} budget is {self.value}; expected above 0, at most {LIMIT:.0e}")
        if self.column == LOSS and self.kind != "absolute":
            raise InvalidInput(f"a budget on loss is no share, as the dense network loses nothing; expected e.g. {_EXAMPLES[LOSS]}")
        if self.kind == "absolute" and self.column != LOSS and self.value != int(self.value):
            raise InvalidInput(
                f"{self.column} budget is {self.value}; expected a whole number of {_base(self.column)}"
            )

    @staticmethod
    def parse(text: str) -> Budget:
        """Inverse of `str`; digits beyond the 15th are rounded so that the budget is never loosened.

        Raises InvalidInput saying what was got and what is wanted.
        """
        match = _TEXT.fullmatch(text)
        column = text.partition("=")[0].strip()
        if column not in COLUMNS:
            raise InvalidInput(f"budget {text!r} bounds none of {', '.join(COLUMNS)}; write e.g. latency=4ms")
        if column == LOSS:
            return Budget(LOSS, "absolute", _loss(text))
        if match is None:
            raise InvalidInput(
                f"budget {text!r} is malformed; expected a number and a unit: {_EXAMPLES[column]}"
            )
        unit = match["unit"].casefold().replace("µ", "u").replace("μ", "u")
        scales = {name.casefold(): scale for name, scale in UNITS[column].items()}
        kind = {"%": "fraction", "x": "speedup"}.get(unit, "absolute")
        if kind == "absolute" and unit not in scales:
            got = f"unit {match['unit']!r}" if unit else "no unit"
            raise InvalidInput(
                f"budget {text!r} has {got}; expected {', '.join(UNITS[column])}, % or x: {_EXAMPLES[column]}"
            )
        rounding = ROUND_CEILING if kind == "speedup" else ROUND_FLOOR
        number = Context(prec=15, rounding=rounding).create_decimal(match["number"])
        value = number / 100 if kind == "fraction" else number * scales.get(unit, 1)
        if kind == "absolute":
            value = value.to_integral_value(ROUND_FLOOR)
        if not 0 < value <= LIMIT:
            least = f"at least 1 {_base(column)}" if kind == "absolute" else "above 0"
            raise InvalidInput(f"budget {text!r} is out of range; expected {least}, e.g. {_EXAMPLES[column]}")
        return Budget(column, kind, float(value))

    def __str__(self) -> str:
        value = Decimal(repr(self.value))
        if self.kind == "absolute":
            return f"{self.column}={quantity(self.column, self.resolve(0))}"
        return (
            f"{self.column}={_plain(value * 100)}%"
            if self.kind == "fraction"
            else f"{self.column}={_plain(value)}x"
        )

    def resolve(self, dense: float) -> float:
        """The bound in whole ns, bytes or MACs, rounded down, or a loss; `dense` is the cost of the dense fp32 network.

        Raises InvalidInput where a relative budget meets a `dense` that is not positive and finite.
        """
        if self.column == LOSS:
            return self.value
        if self.kind == "absolute":
            return int(self.value)
        if not (math.isfinite(dense) and dense > 0):
            raise InvalidInput(
                f"budget {self} is relative to the dense network, whose {self.column} is {dense}"
            )
        share = Fraction(repr(self.value))  # the decimal that was written, not the float next to it
        return math.floor(Fraction(dense) * share if self.kind == "fraction" else Fraction(dense) / share)

    def nearest(self, least: float, dense: float) -> Budget:
        """The tightest budget of this kind, which is relative, of three digits, that a cost of `least` is within.

        dense: the cost of the dense fp32 network; both are above 0.
        """
        part, whole = Decimal(least), Decimal(dense)
        if self.kind == "fraction":
            numerator, denominator, rounding = part, whole, ROUND_CEILING
        else:
            assert self.kind == "speedup"
            numerator, denominator, rounding = whole, part, ROUND_FLOOR
        value = Context(prec=3, rounding=rounding).divide(numerator, denominator)
        return Budget(self.column, self.kind, float(value))


def parse_budgets(wanted: Sequence[str | Budget]) -> tuple[Budget, ...]:
    """At least one budget, at most one for each column. Raises InvalidInput."""
    budgets = tuple(b if isinstance(b, Budget) else Budget.parse(b) for b in wanted)
    if not budgets:
        raise InvalidInput(f"no budget was given; write e.g. {_EXAMPLES['latency']}")
    columns = [b.column for b in budgets]
    for column in columns:
        if columns.count(column) > 1:
            both = ", ".join(str(b) for b in budgets if b.column == column)
            raise InvalidInput(f"{column} is bounded more than once ({both}); keep the tightest")
    return budgets


def quantity(column: str, value: float) -> str:
    """An exact amount in the largest decimal unit not above it: 4500000 ns is `4.5ms`."""
    if column == LOSS:
        return _plain(Decimal(repr(float(value))))
    units = UNITS.get(column, {"": 1})
    fits = [(scale, name) for name, scale in units.items() if scale <= abs(value) and "i" not in name]
    scale, name = max(fits, default=(1, next(iter(units))))
    return _plain(Decimal(value) / scale) + name


def attainable(column: str, value: float) -> str:
    """The least of a column as a budget that it is within: exact, but a loss is rounded up to four digits."""
    return quantity(column, float(_FOUR.create_decimal(Decimal(value))) if column == LOSS else value)


def _loss(text: str) -> float:
    written = text.partition("=")[2].strip()
    if written.endswith(("%", "x")):
        raise InvalidInput(
            f"budget {text!r} is a share, which a loss has not, as the dense network loses nothing; write e.g. {_EXAMPLES[LOSS]}"
        )
    if not _PLAIN.fullmatch(written):
        raise InvalidInput(f"budget {text!r} is malformed; expected a number without a unit: {_EXAMPLES[LOSS]}")
    return float(written)


def _base(column: str) -> str:
    return next(iter(UNITS[column]))


def _plain(number: Decimal) -> str:
    return f"{number.normalize():f}"

"""What a unit may become: pattern x density x precision, and what that costs to store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hwsearch.errors import InvalidInput
from hwsearch.network import Network, Unit

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""Precisions that a variant may ask for; `int8` is Q/DQ, symmetric, weights per channel."""

WEIGHT_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8}
SCALE_BYTES = 4

_NAME = re.compile(r"^(?P<pattern>dense)\.(?P<precision>fp32|bf16|fp16|int8)$")


@dataclass(frozen=True, order=True)
class Variant:
    """A pattern of kept weights and a precision, written `dense.int8`."""

    precision: str
    pattern: str = "dense"

    def __str__(self) -> str:
        return f"{self.pattern}.{self.precision}"

    @staticmethod
    def parse(text: str) -> Variant:
        """Inverse of `str`. Raises InvalidInput."""
        match = _NAME.match(text)
        if match is None:
            known = ", ".join(f"dense.{p}" for p in PRECISIONS)
            raise InvalidInput(f"unknown variant {text!r}; expected one of {known}")
        return Variant(match["precision"], match["pattern"])

    @property
    def quantized(self) -> bool:
        """Whether it needs Q/DQ: the class that decides what a boundary costs."""
        return self.precision == "int8"


def weight_bytes(unit: Unit, variant: Variant) -> int:
    """Bytes that a deployed network stores for one unit: weights, scales and bias.

    Exact for packed storage at the variant's precision; a runtime's own file may pad or repack it.
    """
    size = (unit.weight_count * WEIGHT_BITS[variant.precision] + 7) // 8 + unit.other_bytes
    return size + (SCALE_BYTES * unit.out_channels if variant.quantized else 0)


def network_bytes(network: Network, variants: Mapping[str, Variant]) -> int:
    """Bytes of a whole allocation, with what belongs to no unit."""
    return network.fixed_bytes + sum(weight_bytes(u, variants[u.name]) for u in network.units)


def uniform(network: Network, precision: str) -> dict[str, Variant]:
    """Every unit dense at one precision."""
    return {unit.name: Variant(precision) for unit in network.units}


def legal(unit: Unit, precisions: Iterable[str]) -> tuple[Variant, ...]:
    """Variants that may be tried for a unit where the backend takes these precisions.

    Whether the backend then *executes* them is read back from each engine (`hwsearch.profiler`).
    """
    return tuple(Variant(p) for p in precisions if p in PRECISIONS)

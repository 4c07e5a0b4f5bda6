"""Weights rounded to fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hwsearch.compress.formats import HALVES, rounded
from hwsearch.compress.quantize import quantize_weight
from hwsearch.errors import InvalidInput
from hwsearch.network.network import Unit
from hwsearch.network.variants import STORAGE, Variant
from hwsearch.schemes.scheme import Free, Step, given, within
from hwsearch.schemes.subject import Format, Subject

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))


@dataclass(frozen=True)
class Quantize(Step):
    """Round the weights of layers; zeros stay zeros. The module still computes in fp32, with rounded values.

    Integers are symmetric, with a scale for each output channel, the grid that int8 is deployed on. Fewer than eight bits are a
    way to store weights, not to compute with them. What activations are rounded to is for the allocation that is deployed.

    Args:
        dtype: `fp16`, `bf16` or `int2` to `int8`; or the bits of integers, 2 to 8, which may be free:
            `Quantize(Free("bits", 2, 8, whole=True))`.
        skip: patterns of names of layers that stay as they are.
    """

    rounds: ClassVar[bool] = True
    dtype: str | int | Free = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.dtype, str):
            within("dtype", self.dtype, 2, 8, whole=True)
        elif self.dtype not in (*HALVES, *INTEGERS):
            raise InvalidInput(f"dtype is {self.dtype!r}; expected {', '.join(HALVES)}, int2 to int8, or a number of bits")

    def _apply(self, subject: Subject) -> Subject:
        layers = list(subject.layers(self.skipped))
        if not layers:
            raise InvalidInput(f"the network has no layer for {self}; leave the step out, or change what it skips")
        for unit, weight in layers:
            new = self._rounded(unit, weight)
            if not bool(torch.isfinite(new).all()):
                raise InvalidInput(f"a weight of {unit.name} is larger than {self.dtype} holds; take bf16, or skip the layer")
            subject.put(unit.name, new)
            half = Variant(self.dtype) if isinstance(self.dtype, str) and self.dtype in HALVES else None
            subject.formats[unit.name] = Format(16, half) if half is not None else Format(self._bits, STORAGE)
        return subject

    @property
    def _bits(self) -> int:
        return int(self.dtype.removeprefix("int")) if isinstance(self.dtype, str) else int(given(self.dtype))

    def _rounded(self, unit: Unit, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(self.dtype, str) and self.dtype in HALVES:
            return rounded(weight, self.dtype)
        return torch.from_numpy(quantize_weight(weight, unit.out_axis, 2 ** (self._bits - 1) - 1).dequantized())

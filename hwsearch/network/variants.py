"""What a unit may become: a pattern of kept weights and a precision, and what that costs to store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from hwsearch.errors import InvalidInput
from hwsearch.network.network import Network, Unit

WEIGHT_BITS = {
    "fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "int8": 8, "w8": 8, "fp8": 8, "int4": 4, "nvfp4": 4,
}  # fmt: skip
PRECISIONS = tuple(WEIGHT_BITS)
"""Precisions that a variant may ask for.

tf32: fp32 that is multiplied with 10 bits of mantissa. int8, fp8 (E4M3): Q/DQ, symmetric, weights per output channel,
activations per tensor. w8: weights stored in int8, a scale for each output channel or row, and computed with in the base
precision. int4: of the weights only, in blocks along the input channels. nvfp4: weights and activations as E2M1, in blocks
of 16 along the input channels.
"""

QUANTIZED = ("int8", "fp8", "nvfp4")
"""Precisions that quantize activations."""
SPARSE_PRECISIONS = ("bf16", "fp16", "int8", "fp8")
"""What sparse tensor cores multiply N:M weights in (NVIDIA's documentation of cuSPARSELt: tf32 there is 1:2 only)."""
INT4_BLOCKS = (128, 64)
"""Input channels that share a scale: TensorRT's documentation of INT4 weight-only quantization. The larger is stored smaller."""
NVFP4_BLOCK = 16
SCALE_BYTES = 4
_READ_BY_ALL = ("fp32", "tf32", "int8", "w8")
"""Precisions of a tied weight in which what else reads it can read it too: it is stored once."""
INT8_BITS = 8
"""Bits of int8 weights. Where a device sums products of 8 bits inexactly they have 7, stored in a byte all the same
(`hwsearch.backends.exactness`)."""

@dataclass(frozen=True)
class Int8:
    """How a runtime on a device takes int8.

    Attributes:
        bits: Of int8 weights: 8, or 7 where products of 8 bits are summed inexactly; stored in a byte all the same.
        unsigned: Activations that were never negative on calibration data are uint8.
    """

    bits: int = INT8_BITS
    unsigned: bool = False


_NAME = re.compile(rf"^(?P<pattern>dense|[1-9]\d*:[1-9]\d*)\.(?P<precision>{'|'.join(PRECISIONS)})$")


@dataclass(frozen=True, order=True)
class Variant:
    """A pattern of kept weights and a precision, written `dense.int8` or `2:4.fp16`.

    pattern: `dense`, or `N:M`: N of every M consecutive input channels are kept, 0 < N < M.
    """

    precision: str
    pattern: str = "dense"

    def __str__(self) -> str:
        return f"{self.pattern}.{self.precision}"

    @staticmethod
    def parse(text: str) -> Variant:
        """Inverse of `str`. Raises InvalidInput."""
        return _parsed(text)

    @property
    def kept(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern; None where all weights are kept."""
        if self.pattern == "dense":
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def quantized(self) -> bool:
        """Whether activations are quantized: the class that decides what a boundary costs."""
        return self.precision in QUANTIZED

    @property
    def weight_only(self) -> bool:
        """Whether weights are quantized and activations are not."""
        return self.precision in ("int4", "w8")

    @property
    def plain(self) -> bool:
        """Whether it is dense in a float type, so that it changes a network by no more than rounding."""
        return self.kept is None and not self.quantized and not self.weight_only

    @property
    def executed(self) -> str:
        """What an engine's record says of a unit that ran as asked: `fp16`, and `2:4.fp16` where it used the zeros."""
        return self.precision if self.kept is None else str(self)

    def runs_as(self, executed: str) -> bool:
        """Whether a unit that executed so ran as asked. Of `w8` alone nothing is asked but how it is stored."""
        return executed == self.executed or self.precision == "w8"


@cache
def _parsed(text: str) -> Variant:
    match = _NAME.match(text)
    if match is None:
        raise InvalidInput(
            f"unknown variant {text!r}; expected PATTERN.PRECISION with dense or N:M (2:4) and one of {', '.join(PRECISIONS)}"
        )
    found = Variant(match["precision"], match["pattern"])
    if found.kept is not None and not found.kept[0] < found.kept[1]:
        raise InvalidInput(
            f"variant {text!r} keeps {found.kept[0]} of {found.kept[1]} weights; N must be below M"
        )
    return found


STORAGE = Variant("w8")
"""What every weight may become that takes bytes: for budgets on size."""


def int8_levels(bits: int) -> int:
    """The largest integer of symmetric int8 weights of so many bits: 127 of 8, 63 of 7. Raises InvalidInput on others."""
    if bits not in (INT8_BITS, 7):
        raise InvalidInput(f"int8 weights have {INT8_BITS} bits, or 7, got {bits}")
    return int(2 ** (bits - 1)) - 1


def executes_quantized(executed: str) -> bool:
    """Whether a record of what was executed (`Variant.executed`) is of quantized activations."""
    return executed.rpartition(".")[2] in QUANTIZED


def block_of(unit: Unit, precision: str) -> int:
    """Input channels of a unit's weight that share a scale; 0 where the precision has no blocks or none divides them."""
    channels = unit.weight_shape[unit.in_axis] if unit.weight_shape else 0
    blocks = {"int4": INT4_BLOCKS, "nvfp4": (NVFP4_BLOCK,)}.get(precision, ())
    return next((b for b in blocks if channels and channels % b == 0), 0)


def weight_bytes(unit: Unit, variant: Variant) -> int:
    """Bytes that a deployed network stores for one unit: weights, scales and bias.

    Exact for what the ONNX file holds; a runtime's own file may pad or repack it. N:M weights are stored with their zeros.
    int8, w8 and fp8: one byte, and an fp32 scale for each output channel (row, of a stored tensor). int4: two weights a byte,
    and an fp32 scale for each block. nvfp4: two weights a byte, an fp8 scale for each block of 16 and one fp32 scale for all.
    A tied weight is there once more in fp32, where what else reads it cannot read the variant's.
    """
    size = (unit.weight_count * WEIGHT_BITS[variant.precision] + 7) // 8 + unit.other_bytes
    if unit.tied and not stored_once(variant):
        size += unit.weight_count * WEIGHT_BITS["fp32"] // 8
    if variant.precision in ("int8", "w8", "fp8"):
        return size + SCALE_BYTES * unit.out_channels
    block = block_of(unit, variant.precision)
    if not block:
        return size
    blocks = unit.weight_count // block
    return size + (blocks + SCALE_BYTES if variant.precision == "nvfp4" else SCALE_BYTES * blocks)


def stored_once(variant: Variant) -> bool:
    """Whether a tied weight in a variant serves whatever else reads it."""
    return variant.kept is None and variant.precision in _READ_BY_ALL


def network_bytes(network: Network, variants: Mapping[str, Variant]) -> int:
    """Bytes of a whole allocation, with what belongs to no unit."""
    return network.fixed_bytes + sum(weight_bytes(u, variants[u.name]) for u in network.units)


def uniform(network: Network, precision: str) -> dict[str, Variant]:
    """Every layer dense at one precision; stored tensors too, where they can be, else in fp32."""
    variant = Variant(precision)
    return {
        unit.name: variant if not unit.stored or not ineligible(unit, variant) else Variant("fp32")
        for unit in network.units
    }


def ineligible(unit: Unit, variant: Variant) -> str:
    """Why a unit cannot become a variant on any device, on its task's data; empty where it can.

    N:M, as TensorRT documents it: N of M consecutive input channels for each output channel and kernel position. int4 and
    nvfp4 are blocks along the input channels of matrices. What a device or a runtime does not execute is for backends to say.
    """
    if unit.stored and not variant.plain and variant != STORAGE:
        return f"it is a stored tensor, which no kernel multiplies in {variant}; it can become {STORAGE}"
    if variant == STORAGE and not unit.weight_shape:
        return "it has no weight: both of its inputs are activations"
    if variant.quantized and unit.float_only:
        return unit.float_only
    if variant.kept is None and variant.precision not in ("int4", "nvfp4"):
        return ""
    if not unit.weight_shape:
        return "it has no weight: both of its inputs are activations"
    if "transpose" in unit.op:
        return f"it is a transposed convolution, and {variant} is for convolutions and matrix products"
    channels = unit.weight_shape[unit.in_axis]
    if variant.kept is not None:
        if variant.precision not in SPARSE_PRECISIONS:
            return f"sparse kernels multiply in {', '.join(SPARSE_PRECISIONS)}, not in {variant.precision}"
        if channels % variant.kept[1]:
            each = "each output channel reads" if unit.op.startswith("conv") else "it reads"
            return f"{each} {channels} input channels, which is no multiple of {variant.kept[1]}"
        return ""
    if unit.op.startswith("conv"):
        return f"{variant.precision} is for matrix products, and it is a convolution"  # tensorrt_rtx 1.7.1 crashes
    if not block_of(unit, variant.precision):
        blocks = f"{min(INT4_BLOCKS)} (or {max(INT4_BLOCKS)})" if variant.weight_only else f"{NVFP4_BLOCK}"
        return f"it reads {channels} features, which is no multiple of the block of {blocks}"
    if variant.precision == "nvfp4" and len(unit.input_shapes[0]) not in (2, 3):
        return (
            f"its input has {len(unit.input_shapes[0])} dimensions, and nvfp4 quantizes activations of 2 or 3"
        )
    return ""


def legal(unit: Unit, variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Those of a backend's variants that a unit can become.

    Whether the backend then *executes* them is read back from each engine (`hwsearch.profiler.recorder`).
    """
    return tuple(v for v in variants if not ineligible(unit, v))


def everywhere(
    network: Network, variant: Variant, base: str, refused: Mapping[str, Mapping[str, str]] = MappingProxyType({})
) -> dict[str, Variant]:
    """Every unit that can become a variant in it, the others in the base precision.

    refused: unit -> variants that it is not offered in, as in a table's header.
    """
    return {
        u.name: variant if legal(u, [variant]) and str(variant) not in refused.get(u.name, {}) else Variant(base)
        for u in network.units
    }


def settled(
    network: Network, variants: Mapping[str, Variant], widths: Mapping[str, int], base: str
) -> dict[str, Variant]:
    """The variants, in the base precision wherever a unit at these widths cannot become its own."""
    return {
        unit: variant if not ineligible(network.unit_at(unit, widths), variant) else Variant(base)
        for unit, variant in variants.items()
    }

"""Weights and activations in every precision: what a variant stores, and the fp32 values that it stands for.

int8 and integers of four bits are symmetric and rounded to nearest. fp8 is E4M3 without infinities (OCP 8-bit floating point
specification); the largest magnitude becomes its largest number, 448. nvfp4 is NVIDIA's two-level scheme: E2M1 values, for each
block of 16 a scale in fp8, and one fp32 scale for the tensor, largest magnitude / (448 x 6). bf16, fp16 and tf32 round
to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.compress.patterns import prune
from hwsearch.compress.quantize import Range, int8_scale, on_grid, quantize_weight
from hwsearch.errors import UnsupportedVariant
from hwsearch.graph.trace import Traced
from hwsearch.network.network import Unit
from hwsearch.network.variants import INT8_BITS, NVFP4_BLOCK, Variant, block_of, ineligible, int8_levels

FP8_TOP = 448.0
INT4_TOP = 7
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a float of one sign, two exponent and one mantissa bits, in the order of their codes."""
E2M1_TOP = E2M1[-1]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half-way between neighbours of E2M1; a tie goes to the one with an even code."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight as a variant stores it.

    values [shape of the weight]: numbers of the precision's own grid, in int8 for int8 and w8 and else in fp32. scales: None for
    float types; one for each output channel along `axis`, or with `block` [shape with `axis` divided by it], one for each
    block of so many weights along `axis`. overall: multiplies all scales (nvfp4).
    """

    precision: str
    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    axis: int = 0
    block: int = 0
    overall: float = 1.0

    def dequantized(self) -> NDArray[np.float32]:
        """What DequantizeLinear returns, in fp32."""
        if self.scales is None:
            return self.values.astype(np.float32)
        if self.block:
            scales = np.repeat(self.scales * np.float32(self.overall), self.block, self.axis)
        else:
            scales = self.broadcast_scales()
        return np.asarray(self.values.astype(np.float32) * scales, np.float32)

    def broadcast_scales(self) -> NDArray[np.float32]:
        """The scales of whole output channels or rows, in a shape that multiplies `values`."""
        assert self.scales is not None
        if self.block:
            return self.scales
        return self.scales.reshape([-1 if d == self.axis else 1 for d in range(self.values.ndim)])

    def transposed(self, perm: list[int]) -> StoredWeight:
        """The same with its axes in another order."""
        scales = self.scales.transpose(perm) if self.scales is not None and self.block else self.scales
        return replace(self, values=self.values.transpose(perm), scales=scales, axis=perm.index(self.axis))


class StoredWeights(dict[tuple[str, Variant], StoredWeight]):
    """(unit, variant) -> the weight of a traced network's unit, made at its first use. int8_bits: of int8 weights."""

    def __init__(self, traced: Traced, int8_bits: int = INT8_BITS) -> None:
        super().__init__()
        self.traced, self.int8_bits = traced, int8_bits

    def __missing__(self, key: tuple[str, Variant]) -> StoredWeight:
        unit, variant = key
        weight = self.traced.weight(unit)
        assert weight is not None, f"{unit} has no weight"
        self[key] = stored(weight, self.traced.network[unit], variant, self.int8_bits)
        return self[key]


def stored(weight: torch.Tensor, unit: Unit, variant: Variant, int8_bits: int = INT8_BITS) -> StoredWeight:
    """A unit's weight in a variant: masked, then rounded, so that zeros stay zeros. int8_bits: of int8 weights.

    Raises UnsupportedVariant where the unit cannot become that.
    """
    if why := ineligible(unit, variant):
        raise UnsupportedVariant(f"unit {unit.name} cannot become {variant}: {why}")
    weight = weight.detach().float().cpu()
    precision = variant.precision
    if variant.kept is not None:
        weight = prune(weight, unit.in_axis, *variant.kept)
    if precision == "int8":
        made = quantize_weight(weight, unit.out_axis, int8_levels(int8_bits))
        return StoredWeight(precision, made.values, made.scales, unit.out_axis)
    if precision == "fp8":
        scales = _scales(weight.movedim(unit.out_axis, 0).flatten(1).abs().amax(1), FP8_TOP)
        shape = [-1 if d == unit.out_axis else 1 for d in range(weight.dim())]
        return StoredWeight(
            precision, _fp8(weight / scales.reshape(shape)).numpy(), scales.numpy(), unit.out_axis
        )
    if precision == "w8" and unit.stored:
        return _in_rows(weight)
    if precision == "w8":
        made = quantize_weight(weight, unit.out_axis)
        return StoredWeight(precision, made.values, made.scales, unit.out_axis)
    if precision in ("int4", "nvfp4"):
        return _in_blocks(weight, unit, precision)
    return StoredWeight(precision, weight.numpy())


def _in_rows(tensor: torch.Tensor) -> StoredWeight:
    """int8 with a scale for each row, whatever the number of dimensions: a row is one block along the last."""
    shape = tuple(tensor.shape)
    made = quantize_weight(tensor.reshape(-1, shape[-1]), 0)
    scales = made.scales.reshape(*shape[:-1], 1)
    return StoredWeight("w8", made.values.reshape(shape), scales, len(shape) - 1, shape[-1])


def _in_blocks(weight: torch.Tensor, unit: Unit, precision: str) -> StoredWeight:
    block, axis = block_of(unit, precision), unit.in_axis
    rows = weight.movedim(axis, -1)
    overall = 1.0
    if precision == "int4":
        blocks = rows.reshape(*rows.shape[:-1], -1, block)
        scales = _scales(blocks.abs().amax(-1, keepdim=True), INT4_TOP)
        values = (blocks / scales).round().clamp(-INT4_TOP, INT4_TOP)
    else:
        overall = two_level(float(rows.abs().max()))
        values, scales = nvfp4_blocks(rows, overall, block)
    return StoredWeight(
        precision,
        values.flatten(-2).movedim(-1, axis).contiguous().numpy(),
        scales.squeeze(-1).movedim(-1, axis).contiguous().numpy(),
        axis,
        block,
        overall,
    )


def rounded_weight(weight: torch.Tensor, kept: StoredWeight) -> torch.Tensor:
    """What a stored weight computes with, in fp32; `weight` gives its type and device."""
    values = torch.from_numpy(np.ascontiguousarray(kept.dequantized()))
    return rounded(values, kept.precision).to(weight)


def rounded(x: torch.Tensor, precision: str) -> torch.Tensor:
    """x rounded to a float precision, in its own type; unchanged for fp32 and where only quantization rounds."""
    if precision in HALVES:
        return x.to(HALVES[precision]).to(x.dtype)
    if precision == "tf32":
        bits = x.float().contiguous().view(torch.int32)
        half = 0x0FFF + ((bits >> 13) & 1)
        kept = ((bits + half) & ~0x1FFF).view(torch.float32)
        return torch.where(torch.isfinite(x), kept, x).to(x.dtype)
    return x


def quantized_activation(
    x: torch.Tensor, precision: str, of: Range | None, port: str = "in0", int8_bits: int = INT8_BITS
) -> torch.Tensor:
    """What the Q/DQ of an activation returns. of: its range on calibration data. port, int8_bits: as for `int8_scale`."""
    assert of is not None
    if precision == "int8":
        return on_grid(x, int8_scale(of, port, int8_bits), unsigned=of.unsigned)
    if precision == "fp8":
        scale = float(np.float32(of.top / FP8_TOP))
        return _fp8(x / scale) * scale
    overall = two_level(of.top)
    values, scales = nvfp4_blocks(x, overall)
    return (values * (scales * overall)).flatten(-2)


def nvfp4_blocks(
    x: torch.Tensor, overall: float, block: int = NVFP4_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(E2M1 values [..., blocks, block], fp8 scales [..., blocks, 1]) of blocks along the last axis."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = _fp8(blocks.abs().amax(-1, keepdim=True) / E2M1_TOP / overall)
    return e2m1(_divided(blocks, scales * overall)), scales


def two_level(top: float) -> float:
    """nvfp4's scale of a whole tensor from its largest magnitude."""
    return float(np.float32((top or 1.0) / (FP8_TOP * E2M1_TOP)))


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 numbers, at most 6 in magnitude."""
    ties = torch.tensor(_TIES, dtype=x.dtype, device=x.device)
    magnitude = x.abs().contiguous()
    code = torch.bucketize(magnitude, ties)  # a tie stays below
    odd_tie = (code < len(_TIES)) & (code % 2 == 1) & (magnitude == ties[code.clamp_max(len(_TIES) - 1)])
    table = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
    return table[code + odd_tie.long()] * torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn).to(x.dtype)


def _scales(top: torch.Tensor, levels: float) -> torch.Tensor:
    return torch.where(top > 0, top, torch.ones_like(top) * levels) / levels


def _divided(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x / scales; 0 in a block so small that its scale is 0."""
    return torch.where(
        scales > 0, x / torch.where(scales > 0, scales, torch.ones_like(scales)), torch.zeros_like(x)
    )

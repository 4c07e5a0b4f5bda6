from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import follows

from hwsearch.compress.formats import E2M1, StoredWeight, e2m1, quantized_activation, rounded, stored
from hwsearch.compress.quantize import Range
from hwsearch.errors import UnsupportedVariant
from hwsearch.network.network import Unit
from hwsearch.network.variants import Variant, ineligible

finite = st.floats(-100, 100, width=32)


def unit(op: str, *shape: int) -> Unit:
    out_axis = {"matmul": 1, "conv_transpose2d": 1}.get(op, 0)
    return Unit("u", op, ((2, 8),), (2, 8), shape, out_axis)


LAYERS = [
    unit("linear", 8, 128),
    unit("matmul", 192, 8),
    unit("conv2d", 4, 16, 3, 3),
    unit("conv1d", 4, 8, 3),
    unit("conv_transpose2d", 8, 4, 2, 2),
]
VARIANTS = [
    Variant.parse(v)
    for v in "dense.bf16 dense.tf32 dense.int8 dense.fp8 dense.int4 dense.nvfp4 2:4.fp16 2:4.int8 2:4.fp8 1:4.bf16".split()
]


@given(hnp.arrays(np.float32, 20, elements=st.floats(-9, 9, width=32)))
def test_e2m1_rounds_as_ml_dtypes_does(values: np.ndarray) -> None:
    want = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(e2m1(torch.from_numpy(values)).numpy(), want)


def test_e2m1_ties_go_to_the_even_code() -> None:
    middles = [(a + b) / 2 for a, b in pairwise(E2M1)]
    values = np.array([*middles, *(-m for m in middles)], np.float32)
    want = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(e2m1(torch.from_numpy(values)).numpy(), want)


@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_tf32_has_ten_bits_of_mantissa_and_is_nearest(values: np.ndarray) -> None:
    found = rounded(torch.from_numpy(values), "tf32").numpy()
    assert not np.any(found.view(np.int32) & 0x1FFF)
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126))) - 10.0)
    assert np.all(np.abs(found.astype(np.float64) - values) <= 0.5 * step + 1e-44)
    assert rounded(torch.tensor([float("inf")]), "tf32").tolist() == [float("inf")]


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 40), elements=finite))
def test_fp8_activations_are_the_nearest_e4m3(values: np.ndarray) -> None:
    top = float(np.abs(values).max()) or 1.0
    scale = np.float32(top / 448.0)
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        want = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    found = quantized_activation(torch.from_numpy(values), "fp8", Range(1.0, top)).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("of", "variant"),
    [pytest.param(u, v, id=f"{u.op} {v}") for u in LAYERS for v in VARIANTS if not ineligible(u, v)],
)
def test_a_stored_weight_is_near_the_weight_and_keeps_its_zeros(of: Unit, variant: Variant) -> None:
    weight = torch.randn(of.weight_shape, generator=torch.Generator().manual_seed(0))
    own = stored(weight, of, variant)
    values = torch.from_numpy(own.dequantized())
    assert values.shape == weight.shape
    if variant.kept:
        assert follows(values, of.in_axis, *variant.kept)
        weight = torch.where(values != 0, weight, 0.0)
    # half a step of the format relative to the largest magnitude of a channel or block
    step = {"int8": 0.5 / 127, "fp8": 16 / 448, "int4": 0.5 / 7, "nvfp4": 1.2 / 6}.get(
        variant.precision, 1e-7
    )
    assert float((values - weight).abs().max()) <= step * float(weight.abs().max()) * 1.01
    perm = list(reversed(range(weight.dim())))
    assert np.array_equal(own.transposed(perm).dequantized(), own.dequantized().transpose(perm))


@pytest.mark.parametrize(
    ("of", "variant"),
    [pytest.param(u, v, id=f"{u.op} {v}") for u in LAYERS for v in VARIANTS if ineligible(u, v)],
)
def test_what_a_unit_cannot_become_is_refused_with_the_reason(of: Unit, variant: Variant) -> None:
    with pytest.raises(UnsupportedVariant, match="unit u cannot become"):
        stored(torch.randn(of.weight_shape), of, variant)


def test_blocks_of_zeros_and_of_tiny_weights() -> None:
    weight = torch.zeros(2, 128)
    weight[0, :16] = 1e-12
    weight[1] = torch.randn(128)
    for precision in ("int4", "nvfp4", "fp8", "int8"):
        values = stored(weight, LAYERS[0], Variant(precision)).dequantized()
        assert np.isfinite(values).all()
        assert not values[0, 16:].any()
    assert not stored(torch.zeros(2, 128), LAYERS[0], Variant("nvfp4")).dequantized().any()


def test_int4_takes_the_largest_block_that_divides() -> None:
    for channels, block in ((256, 128), (192, 64)):
        of = unit("linear", 4, channels)
        own = stored(torch.randn(4, channels), of, Variant("int4"))
        assert isinstance(own, StoredWeight)
        assert own.block == block
        assert own.scales is not None
        assert own.scales.shape == (4, channels // block)

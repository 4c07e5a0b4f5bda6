from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.errors import InvalidInput
from hwsearch.network.network import ChannelGroup, Network, Unit, Way
from hwsearch.network.variants import PRECISIONS, Variant, ineligible, legal, settled, weight_bytes

NAMES = [
    "2:4.fp16",
    "2:4.int8",
    "dense.fp8",
    "dense.int4",
    "dense.nvfp4",
    "dense.tf32",
    "dense.fp32",
    "1:8.bf16",
]
LINEAR = Unit("fc", "linear", ((4, 128),), (4, 64), (64, 128), 0, other_bytes=256)
CONV = Unit("conv", "conv2d", ((1, 64, 8, 8),), (1, 32, 8, 8), (32, 64, 3, 3), 0, (("groups", "1"),))
PRODUCT = Unit("attention", "matmul", ((1, 4, 8, 16), (1, 4, 16, 8)), (1, 4, 8, 8))


def changed(unit: Unit, **changes: object) -> Unit:
    from dataclasses import replace

    return replace(unit, **changes)  # type: ignore[arg-type]


patterns = st.one_of(
    st.just("dense"),
    st.integers(2, 32).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: f"{n}:{m}")),
)


@given(patterns, st.sampled_from(PRECISIONS))
def test_parse_is_the_inverse_of_str(pattern: str, precision: str) -> None:
    variant = Variant(precision, pattern)
    assert Variant.parse(str(variant)) == variant
    assert variant.plain == (pattern == "dense" and precision in ("fp32", "tf32", "bf16", "fp16"))


@pytest.mark.parametrize("text", NAMES)
def test_names(text: str) -> None:
    assert str(Variant.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "dense", "fp16", "dense.fp7", "2:4", "4:2.fp16", "4:4.int8", "0:4.fp16", "2:4.fp16 ", "dense.int8.x", "02:4.int8"]
)  # fmt: skip
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Variant.parse(text)


def test_classes_and_what_a_record_says() -> None:
    told = {name: Variant.parse(name) for name in NAMES}
    assert [n for n, v in told.items() if v.quantized] == ["2:4.int8", "dense.fp8", "dense.nvfp4"]
    assert [n for n, v in told.items() if v.weight_only] == ["dense.int4"]
    assert told["2:4.fp16"].executed == "2:4.fp16"
    assert told["dense.fp8"].executed == "fp8"


@pytest.mark.parametrize(
    ("variant", "size"),
    [("dense.fp32", 4 * 8192), ("dense.tf32", 4 * 8192), ("dense.fp16", 2 * 8192), ("dense.int8", 8192 + 4 * 64),
     ("dense.fp8", 8192 + 4 * 64), ("dense.int4", 4096 + 4 * 64), ("dense.nvfp4", 4096 + 8192 // 16 + 4),
     ("2:4.fp16", 2 * 8192), ("2:4.int8", 8192 + 4 * 64)],
)  # fmt: skip
def test_bytes(variant: str, size: int) -> None:
    assert weight_bytes(LINEAR, Variant.parse(variant)) == size + 256


@pytest.mark.parametrize(
    ("unit", "variant", "reason"),
    [
        (LINEAR, "2:4.fp16", ""),
        (LINEAR, "dense.int4", ""),
        (LINEAR, "dense.nvfp4", ""),
        (CONV, "2:4.int8", ""),
        (CONV, "dense.fp8", ""),
        (PRODUCT, "dense.int8", ""),
        (PRODUCT, "dense.fp8", ""),
        (PRODUCT, "2:4.fp16", "no weight"),
        (PRODUCT, "dense.int4", "no weight"),
        (PRODUCT, "dense.nvfp4", "no weight"),
        (LINEAR, "2:4.fp32", "not in fp32"),
        (LINEAR, "2:4.int4", "not in int4"),
        (CONV, "dense.int4", "it is a convolution"),
        (CONV, "dense.nvfp4", "it is a convolution"),
        (changed(CONV, weight_shape=(64, 1, 3, 3)), "2:4.fp16", "reads 1 input channels"),
        (changed(CONV, weight_shape=(64, 16, 3, 3)), "2:4.fp16", ""),
        (changed(CONV, weight_shape=(64, 3, 3, 3)), "2:4.fp16", "no multiple of 4"),
        (changed(CONV, op="conv_transpose2d", out_axis=1), "2:4.fp16", "transposed"),
        (changed(LINEAR, weight_shape=(64, 96)), "dense.int4", "no multiple of the block"),
        (changed(LINEAR, weight_shape=(64, 96)), "dense.nvfp4", ""),
        (changed(LINEAR, weight_shape=(64, 100)), "dense.nvfp4", "no multiple of the block of 16"),
        (changed(LINEAR, input_shapes=((1, 2, 4, 128),)), "dense.nvfp4", "4 dimensions"),
        (changed(LINEAR, op="matmul", weight_shape=(128, 6), out_axis=1), "2:4.fp16", ""),
    ],
)  # fmt: skip
def test_what_a_unit_can_become(unit: Unit, variant: str, reason: str) -> None:
    found = ineligible(unit, Variant.parse(variant))
    assert (reason in found) if reason else found == ""
    assert legal(unit, [Variant("fp32"), Variant.parse(variant)]) == (
        (Variant("fp32"),) if reason else (Variant("fp32"), Variant.parse(variant))
    )


def test_a_narrow_unit_falls_back_to_the_base() -> None:
    reads = changed(CONV, ways=(Way("g", "weight", 1, 1), Way("g", "input0", 1, 1)))
    network = Network((reads,), groups=(ChannelGroup("g", 64),))
    asked = {"conv": Variant("fp16", "2:4")}
    assert settled(network, asked, {"g": 48}, "fp16") == asked
    assert settled(network, asked, {"g": 46}, "fp16") == {"conv": Variant("fp16")}

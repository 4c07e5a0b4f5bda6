from __future__ import annotations

import pytest

from hwsearch.backends.tensorrt.legality import BASES, TARGETS, target, why_not
from hwsearch.errors import InvalidInput


def legal(precision: str, base: str = "fp16", **options: str) -> list[str]:
    """On which targets TensorRT (not RTX) takes a precision."""
    return [
        t for t, gpu in TARGETS.items() if not why_not(precision, gpu, base=base, runtime="tensorrt", **options)
    ]  # type: ignore[arg-type]


def test_precisions_by_compute_capability() -> None:
    """As NVIDIA's support matrices have them."""
    everywhere = list(TARGETS)
    ampere, ada = everywhere[1:], everywhere[everywhere.index("sm89") :]
    for precision in ("fp32", "fp16", "int8"):
        assert legal(precision) == everywhere
    for precision in ("bf16", "tf32", "int4"):
        assert legal(precision) == ampere
    assert legal("fp8") == ada
    assert legal("nvfp4") == ["sm100", "sm120", "sm121"]
    assert legal("fp16", pattern="2:4") == legal("int8", pattern="2:4") == ampere
    for base in ("bf16", "tf32"):
        assert legal("int8", base) == ampere


def test_a_legal_base_is_legal_in_itself() -> None:
    for base in BASES:
        assert legal(base, base) == legal("int8", base)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (why_not("fp8", target("sm86"), base="fp16"), "fp8 needs compute capability 8.9 (Ada Lovelace), sm86 has 8.6"),
        (why_not("int8", target("sm75"), base="bf16"), "base bf16 needs compute capability 8.0 (Ampere), sm75 has 7.5"),
        (why_not("fp16", target("sm75"), base="fp16", pattern="2:4"), "2:4 needs compute capability 8.0 (Ampere), sm75 has 7.5"),
        (why_not("int8", target("sm75"), base="fp32", op="linear"), "TensorRT-RTX compiles no fp32 matrix product for Turing"),
        (why_not("int8", target("sm75"), base="fp32", op="linear", runtime="tensorrt"), ""),
        (why_not("int8", target("sm75"), base="fp32", op="conv2d"), ""),
        (why_not("int3", target("sm86"), base="fp16"), "int3 is no precision of TensorRT's that is known here"),
    ],
)  # fmt: skip
def test_reasons(found: str, reason: str) -> None:
    assert found == reason


def test_names_of_targets() -> None:
    assert target(" SM_86 ").capability == (8, 6)
    assert str(target("sm89")) == "sm89 (Ada Lovelace, RTX 4090)"
    with pytest.raises(InvalidInput, match=r"unknown target 'sm99'; expected one of sm75, sm80"):
        target("sm99")

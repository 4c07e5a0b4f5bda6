"""What torch's kernels execute on a GPU, and what the backend therefore offers there.

Sources: torch's own checks (`aten/src/ATen/native/cuda/Blas.cpp`, `ScaledBlas.cpp`, `torch/sparse/semi_structured.py`) and
NVIDIA's table of what each compute capability multiplies. torch has no convolution in int8 or fp8 on CUDA and none that uses the
zeros of 2:4 weights; only one of 1x1 is run, as the matrix product that it is. Products of two activations are float as well.
int4 and nvfp4 are not offered: torch's kernels for them take layouts of their own and bf16 only.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwsearch.network.variants import Variant

BASES = ("fp16", "bf16", "fp32", "tf32")
"""Base precisions of a network, the one to prefer first."""
SINCE = {"fp32": (5, 0), "fp16": (7, 0), "int8": (7, 5), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
"""The least compute capability with tensor cores for a precision (fp32 has none)."""
_SPARSE_SINCE = (8, 0)
_FP8_ROWS_SINCE = (9, 0)


@dataclass(frozen=True)
class Kernels:
    """Which kernels there are beside those of one float operator.

    int8: `torch._int_mm`. fp8: `torch._scaled_mm`. sparse: `torch._cslt_sparse_mm` (cuSPARSELt), in fp16, bf16 and int8.
    fp8_rows: `torch._scaled_mm` takes a scale for each row and column, and returns bf16.
    convolutions: `torch.cudnn_convolution_relu` and `torch.cudnn_convolution_add_relu`.
    quantizes: precisions to which activations are quantized by one kernel (`quantizing`), and not by torch's four.
    """

    int8: bool = False
    fp8: bool = False
    sparse: bool = False
    fp8_rows: bool = False
    convolutions: bool = False
    quantizes: tuple[str, ...] = ()


def kernels(
    capability: tuple[int, int], *, cusparselt: bool, cudnn: bool = False, quantizes: tuple[str, ...] = ()
) -> Kernels:
    """Those of a GPU. cusparselt, cudnn: whether torch was built with them, which its builds for Linux are."""
    return Kernels(
        int8=capability >= SINCE["int8"],
        fp8=capability >= SINCE["fp8"],
        sparse=cusparselt and capability >= _SPARSE_SINCE,
        fp8_rows=capability >= _FP8_ROWS_SINCE,
        convolutions=cudnn,
        quantizes=quantizes,
    )


def bases(capability: tuple[int, int]) -> tuple[str, ...]:
    """Base precisions, the one to prefer first."""
    return tuple(b for b in BASES if capability >= SINCE[b])


def variants(there: Kernels, base: str) -> tuple[Variant, ...]:
    """What units may ask for under a base: the base, dense quantized ones, and 2:4 in the base and in int8."""
    asked = [Variant(p) for p in ("int8", "fp8") if getattr(there, p)]
    sparse = [p for p in (base, "int8") if p in ("fp16", "bf16", "int8")] if there.sparse else []
    return Variant(base), *asked, *(Variant(p, "2:4") for p in sparse)

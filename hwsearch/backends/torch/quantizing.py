"""Quantization of activations in one Triton kernel: torch has none, and its four read and write the activations four times.

Triton comes with a torch for CUDA, and compiles with the machine's C compiler; `unavailable` says where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from hwsearch.backends.torch.calls import Call, Run

Tensor = torch.Tensor

_BLOCK = 1024
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_RANGES = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}


def quantizer(call: Call, precisions: Sequence[str]) -> Run | None:
    """(x, scale) -> x / scale, rounded and saturated, of a QuantizeLinear per tensor without a zero point; None of others.

    precisions: names of TYPES that the kernel is there for.
    """
    from hwsearch.backends.torch.graph import dtype

    zero = call.maybe(2)
    to = call.dtype(2) if call.has(2) else dtype(call.attr("output_dtype", 2), str(call.node))
    plain = not call.attr("block_size", 0) and torch.Size(call.shape(1)).numel() == 1
    offset = zero is not None and bool(zero.to(torch.float32).any())
    if not plain or offset or to not in {TYPES[p] for p in precisions} or not call.dtype().is_floating_point:
        call.taken.discard(2)
        return None
    return lambda x, scale, *_: quantize(x, scale, to)


def quantize(x: Tensor, scale: Tensor, to: torch.dtype) -> Tensor:
    """x / scale in int8 or fp8, in the layout of x, by one launch."""
    import triton

    y = torch.empty_like(x, dtype=to)
    if y.stride() != x.stride():  # x has gaps, or lies on itself
        x = x.contiguous()
        y = torch.empty_like(x, dtype=to)
    low, high = _RANGES[to]
    kernel = _kernel()
    kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, scale, y, x.numel(), low, high, to == torch.int8, _BLOCK)
    return y


@cache
def unavailable(device: torch.device, to: torch.dtype) -> str:
    """Why there is no such kernel on a device; empty where it computes what it should."""
    if device.type != "cuda":
        return "Triton compiles for GPUs"
    low, high = _RANGES[to]
    try:
        for kind in (torch.float16, torch.float32):
            x = torch.linspace(-1.2 * high, 1.2 * high, 4097, device=device).mul(0.02).to(kind)
            scale = torch.tensor(0.02, device=device, dtype=kind)
            exact = x.float() / scale.float()
            wanted = (exact.round() if to == torch.int8 else exact).clamp(low, high).to(to)
            if not torch.equal(quantize(x, scale, to).float(), wanted.float()):
                return f"Triton's kernel quantizes {kind} to {to} wrongly here"
    except Exception as error:  # a compiler may fail in any way
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


@cache
def _kernel() -> Any:
    """Triton's function; made when it is first called, as only a torch for CUDA brings Triton."""
    import triton
    from triton import language as tl

    def quantize_kernel(x, scale, y, count, low, high, WHOLE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < count
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        value = tl.div_rn(value, tl.load(scale).to(tl.float32))
        value = tl.minimum(tl.maximum(value, low), high)
        if WHOLE:  # 1.5 * 2**23 added and taken off rounds to the nearest whole, ties to even
            value = (value + 12582912.0) - 12582912.0
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)

    return triton.jit(quantize_kernel)

"""Products with a constant weight as one call, with their bias: in float, in int8, in fp8, and with the zeros of 2:4 weights used.

The pattern is (DQ(x), DQ(w)) -> MatMul, Gemm or Conv of 1x1, or a half-precision weight that is 2:4. What a weight's and its
input's shapes rule out stays float, and says so by its precision. torch's own limits, of version 2.13: `_int_mm` takes features in
multiples of 8 and more than 16 rows; `_scaled_mm` features in multiples of 16; cuSPARSELt (`SparseSemiStructuredTensorCUSPARSELT`)
weights in multiples of 16 (halves) or 32 (int8), and rows in multiples of 8 or 16. Too few rows are made up with zeros.

Accumulators are rescaled and converted, and get their bias, in one more call: int32 and fp32 hold what fp16 would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hwsearch.backends.torch.calls import Call, Run, paddings
from hwsearch.backends.torch.graph import Node
from hwsearch.backends.torch.offering import Kernels

Tensor = torch.Tensor

PRODUCTS = ("MatMul", "Gemm", "Conv")
_HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Weight:
    """A constant weight as a matrix [out features, in features]. conv: it is of a convolution, whose channels stand second."""

    values: Tensor
    conv: bool


@dataclass(frozen=True)
class Rule:
    """What a kernel asks for: weights in multiples of (out, in), rows at least so many and in multiples of."""

    out: int
    features: int
    least_rows: int
    rows: int


RULES = {
    "int8": Rule(8, 8, 32, 1),
    "fp8": Rule(16, 16, 1, 1),
    "2:4.int8": Rule(32, 32, 16, 16),
    "2:4.fp16": Rule(16, 16, 8, 8),
    "2:4.bf16": Rule(16, 16, 8, 8),
}
"""`_int_mm` refuses 16 rows and fewer; 32 is what later versions of torch make them up to themselves."""


def out_axis(node: Node) -> int:
    """Which axis of a product's weight is that of its output features."""
    return 1 if node.op == "MatMul" or (node.op == "Gemm" and not node.attributes.get("transB", 0)) else 0


def as_matrix(node: Node, weight: Tensor) -> Tensor | None:
    """A product's weight as [out features, in features]; None where the product is not one with a matrix."""
    if node.op == "MatMul":
        return weight.t() if weight.dim() == 2 else None
    if node.op == "Gemm":
        plain = not node.attributes.get("transA", 0) and node.attributes.get("alpha", 1.0) == 1.0
        plain = plain and node.attributes.get("beta", 1.0) == 1.0
        return (weight if node.attributes.get("transB", 0) else weight.t()) if plain else None
    return weight.flatten(1) if set(weight.shape[2:]) == {1} and _pointwise(node, weight) else None


def _pointwise(node: Node, weight: Tensor) -> bool:
    """Whether a convolution of 1x1 reads every position once, and all channels."""
    n = weight.dim() - 2
    call = Call(node, [(1,) * (n + 2)], [None], [None], weight.device)
    ones = [1] * n
    moved = any(s != 1 for s in node.attributes.get("strides", ())) or any(paddings(call, ones, ones, ones))
    return not moved and node.attributes.get("group", 1) == 1


def is_2_4(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights of an output are not zero."""
    rows, features = weight.shape
    if features % 4:
        return False
    kept = (weight.float() != 0).reshape(rows, features // 4, 4).sum(-1)
    return bool((kept <= 2).all())


def kernels_for(there: Kernels, activations: torch.dtype, weight: Tensor) -> list[str]:
    """What a product may execute in, beside its float type: keys of RULES, best first. weight: [out, in], as it is stored."""
    if activations != weight.dtype:
        return []
    half = _HALVES.get(activations, "")
    wanted = []
    if there.sparse and (activations == torch.int8 or half) and is_2_4(weight):
        wanted.append(f"2:4.{half or 'int8'}")
    if there.int8 and activations == torch.int8:
        wanted.append("int8")
    if there.fp8 and activations == torch.float8_e4m3fn:
        wanted.append("fp8")
    out, features = weight.shape
    return [k for k in wanted if out % RULES[k].out == 0 and features % RULES[k].features == 0]


def linear(
    weight: Tensor, bias: Tensor | None, device: torch.device, *, relu: bool = False
) -> tuple[Run, list[Tensor]]:
    """(x [..., in] -> [..., out] in float, the constants of it on the device). relu: of the sum with a bias, in the same call."""
    stored = weight.contiguous().to(device)
    added = None if bias is None else bias.reshape(-1).to(device)
    if relu and added is not None:
        out, features = stored.shape

        def rectified(x: Tensor) -> Tensor:
            y = torch._addmm_activation(added, x.reshape(-1, features), stored.t())
            return y.reshape(*x.shape[:-1], out)

        return rectified, [stored, added]
    return lambda x: F.linear(x, stored, added), [stored, *([] if added is None else [added])]


def product(
    kernel: str, weight: Weight, scales: Tensor | None, bias: Tensor | None, to: torch.dtype, rows: int,
    device: torch.device, *, fp8_rows: bool = False,
) -> tuple[Run, list[Tensor]]:  # fmt: skip
    """(the call on quantized or half-precision activations, the constants of it on the device).

    kernel: a key of RULES. scales: of the product [out] or one for all, in fp32; None of halves. bias: [out]. rows: how many
    the activations have as a matrix. to: the type of the result. fp8_rows: whether `_scaled_mm` takes a scale for each column,
    and so returns the product itself, in bf16.
    """
    values = weight.values.contiguous().to(device)
    least, multiple = RULES[kernel].least_rows, RULES[kernel].rows
    padded = max(-(-rows // multiple) * multiple, least if rows < least else 0)
    features = values.shape[1]
    if kernel.endswith(("fp16", "bf16")):
        added = None if bias is None else bias.reshape(-1).to(device, to)
        packed = torch._cslt_compress(values)

        def multiply(x: Tensor) -> Tensor:
            return torch._cslt_sparse_mm(packed, x.t(), bias=added, transpose_result=True)

        constants, finish = [packed, *([] if added is None else [added])], None
    elif kernel == "fp8" and fp8_rows and to in _HALVES:
        assert scales is not None
        multiply, constants, finish = _scaled(values, scales, bias, to, padded)
    else:
        assert scales is not None
        multiply, stored = _accumulated(kernel, values)
        finish, others = _rescaled(scales, bias, to, device)
        constants = [*stored, *others]

    def run(x: Tensor) -> Tensor:
        spatial = x.movedim(1, -1) if weight.conv else x
        lead = spatial.shape[:-1]
        matrix = spatial.reshape(-1, features).contiguous()
        if padded != rows:
            matrix = F.pad(matrix, (0, 0, 0, padded - rows))
        y = multiply(matrix)[:rows] if padded != rows else multiply(matrix)
        y = (y if finish is None else finish(y)).reshape(*lead, -1)
        return y.movedim(-1, 1) if weight.conv else y

    return run, constants


def _scaled(
    values: Tensor, scales: Tensor, bias: Tensor | None, to: torch.dtype, rows: int
) -> tuple[Run, list[Tensor], Run | None]:
    """(matrix [rows, in] of fp8 -> [rows, out] in bf16, constants, what becomes of that where another type or a bias is wanted).

    Of bf16 the bias is added by the product itself. Rounding to bf16 is a fifteenth of a step of fp8.
    """
    device = values.device
    ones = torch.ones((rows, 1), dtype=torch.float32, device=device)
    columns = scales.float().expand(values.shape[0]).reshape(1, -1).contiguous().to(device)
    added = None if bias is None else bias.reshape(-1).to(device, to)
    within = added if to == torch.bfloat16 else None
    constants = [values, ones, columns, *([] if added is None else [added])]

    def multiply(x: Tensor) -> Tensor:
        return torch._scaled_mm(
            x,
            values.t(),
            scale_a=ones,
            scale_b=columns,
            bias=within,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    if to == torch.bfloat16:
        return multiply, constants, None
    if added is None:
        return multiply, constants, lambda y: y.to(to)
    return (
        multiply,
        constants,
        lambda y: torch.add(y, added, out=torch.empty(y.shape, dtype=to, device=y.device)),
    )


def _accumulated(kernel: str, values: Tensor) -> tuple[Run, Sequence[Tensor]]:
    """(matrix [rows, in] -> accumulators [rows, out], constants)."""
    if kernel == "int8":
        return lambda x: torch._int_mm(x, values.t()), [values]
    if kernel == "fp8":
        one = torch.ones((), dtype=torch.float32, device=values.device)
        return lambda x: torch._scaled_mm(
            x, values.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
        ), [values, one]
    packed = torch._cslt_compress(values)

    def multiply(x: Tensor) -> Tensor:
        return torch._cslt_sparse_mm(packed, x.t(), out_dtype=torch.int32, transpose_result=True)

    return multiply, [packed]


def _rescaled(
    scales: Tensor, bias: Tensor | None, to: torch.dtype, device: torch.device
) -> tuple[Run, list[Tensor]]:
    """(accumulators -> scales * accumulators + bias in another type, constants), in one call."""
    factor = scales.to(device, torch.float32)

    def space(y: Tensor) -> Tensor:
        return torch.empty(y.shape, dtype=to, device=y.device)

    if bias is None:
        return lambda y: torch.mul(y, factor, out=space(y)), [factor]
    added = bias.reshape(-1).to(device, torch.float32)
    return lambda y: torch.addcmul(added, y, factor, out=space(y)), [factor, added]

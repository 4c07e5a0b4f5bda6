"""Operators that compute each element by itself, reductions, and the ways between types. Source: the ONNX operator schemas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce

import torch
from torch.nn import functional as F

from hwsearch.backends.torch.calls import TABLE, Call, Run, op
from hwsearch.backends.torch.graph import dtype

Tensor = torch.Tensor

_UNARY: dict[str, Run] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish,
    "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Run] = {
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or, "Sub": torch.sub,
    "Where": torch.where, "Xor": torch.logical_xor,
}  # fmt: skip
_VARIADIC: dict[str, Run] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}


def _plain(run: Run) -> Callable[[Call], Run]:
    return lambda call: run


TABLE.update({name: _plain(run) for name, run in (_UNARY | _BINARY).items()})
TABLE.update({name: _plain(lambda *x, run=run: reduce(run, x)) for name, run in _VARIADIC.items()})


@op("Identity", "Dropout")
def identity(call: Call) -> Run:
    call.single_output()
    return lambda x, *_: x


@op("Mean")
def mean(call: Call) -> Run:
    return lambda *x: reduce(torch.add, x) / len(x)


@op("Div")
def div(call: Call) -> Run:
    """Integers are divided towards zero."""
    return torch.div if call.dtype().is_floating_point else partial(torch.div, rounding_mode="trunc")


@op("Mod")
def mod(call: Call) -> Run:
    return torch.fmod if call.attr("fmod", 0) else torch.remainder


@op("Pow")
def power(call: Call) -> Run:
    """A constant exponent is a number: torch has kernels of their own for squares and roots."""
    exponent, kind = call.maybe(1), call.dtype()
    if exponent is None:
        return lambda x, y: torch.pow(x, y).to(kind)
    if exponent.numel() == 1:
        number, shape = float(exponent.item()), tuple(exponent.shape)
        if len(shape) <= len(call.shape()):
            return lambda x: torch.pow(x, number).to(kind)
    call.taken.discard(1)
    return lambda x, y: torch.pow(x, y).to(kind)


@op("Clip")
def clip(call: Call) -> Run:
    low = call.const(1).item() if call.has(1) else call.attr("min")
    high = call.const(2).item() if call.has(2) else call.attr("max")
    if low is None and high is None:
        return lambda x: x
    return partial(torch.clamp, min=low, max=high)


@op("Gelu")
def gelu(call: Call) -> Run:
    return partial(F.gelu, approximate=call.attr("approximate", "none"))


@op("Elu")
def elu(call: Call) -> Run:
    return partial(F.elu, alpha=call.attr("alpha", 1.0))


@op("Celu")
def celu(call: Call) -> Run:
    return partial(F.celu, alpha=call.attr("alpha", 1.0))


@op("Selu")
def selu(call: Call) -> Run:
    alpha, gamma = call.attr("alpha", 1.6732631921768188), call.attr("gamma", 1.0507010221481323)
    return lambda x: gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@op("LeakyRelu")
def leaky_relu(call: Call) -> Run:
    return partial(F.leaky_relu, negative_slope=call.attr("alpha", 0.01))


@op("ThresholdedRelu")
def thresholded_relu(call: Call) -> Run:
    return partial(F.threshold, threshold=call.attr("alpha", 1.0), value=0.0)


@op("HardSigmoid")
def hard_sigmoid(call: Call) -> Run:
    alpha, beta = call.attr("alpha", 0.2), call.attr("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5:
        return F.hardsigmoid
    return lambda x: (alpha * x + beta).clamp(0.0, 1.0)


@op("PRelu")
def prelu(call: Call) -> Run:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@op("IsInf")
def is_inf(call: Call) -> Run:
    positive, negative = call.attr("detect_positive", 1), call.attr("detect_negative", 1)
    if positive and negative:
        return torch.isinf
    return torch.isposinf if positive else torch.isneginf


@op("Softmax")
def softmax(call: Call) -> Run:
    return partial(torch.softmax, dim=call.axis(-1))


@op("LogSoftmax")
def log_softmax(call: Call) -> Run:
    return partial(torch.log_softmax, dim=call.axis(-1))


@op("LpNormalization")
def lp_normalization(call: Call) -> Run:
    return partial(F.normalize, p=float(call.attr("p", 2)), dim=call.axis(-1), eps=0.0)


@op("Cast", "CastLike")
def cast(call: Call) -> Run:
    """fp8 is saturated, as ONNX asks for; torch's own conversion makes NaN of what is too large."""
    to = call.dtype(1) if call.node.op == "CastLike" else dtype(call.attr("to"), str(call.node))
    if call.node.op == "CastLike":
        call.taken.add(1)
    if to == torch.float8_e4m3fn and call.attr("saturate", 1):
        return lambda x: x.clamp(-448.0, 448.0).to(to)
    return lambda x: x.to(to)


@op("CumSum")
def cumsum(call: Call) -> Run:
    (axis,) = call.ints(1)
    reverse, exclusive = call.attr("reverse", 0), call.attr("exclusive", 0)

    def run(x: Tensor) -> Tensor:
        y = x.flip(axis) if reverse else x
        added = y.cumsum(axis, dtype=x.dtype)
        added = added - y if exclusive else added
        return added.flip(axis) if reverse else added

    return run


def _log_sum(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return x.sum(dim, keepdim).log()


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted(dim, reverse=True):
        x = x.prod(axis, keepdim)
    return x


_REDUCTIONS: dict[str, Run] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
    "ReduceProd": _product, "ReduceLogSum": _log_sum, "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": lambda x, dim, keepdim: x.abs().sum(dim, keepdim),
    "ReduceL2": lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt(),
    "ReduceSumSquare": lambda x, dim, keepdim: x.square().sum(dim, keepdim),
}  # fmt: skip


@op(*_REDUCTIONS)
def reduction(call: Call) -> Run:
    axes, run = call.axes(1), _REDUCTIONS[call.node.op]
    if not axes:
        if call.attr("noop_with_empty_axes", 0):
            return lambda x: x
        axes = list(range(len(call.shape())))
    if not axes:
        return lambda x: run(x.reshape(1), [0], False)
    kind, keep = call.dtype(), bool(call.attr("keepdims", 1))
    return lambda x: run(x, axes, keep).to(kind)


@op("ArgMax", "ArgMin")
def arg_extreme(call: Call) -> Run:
    axis, keep = call.axis(0), bool(call.attr("keepdims", 1))
    run = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    if call.attr("select_last_index", 0):
        last = call.shape()[axis] - 1
        return lambda x: last - run(x.flip(axis), axis, keepdim=keep)
    return partial(run, dim=axis, keepdim=keep)


@op("TopK")
def top_k(call: Call) -> Run:
    (k,) = call.ints(1)
    axis, largest, ordered = call.axis(-1), bool(call.attr("largest", 1)), bool(call.attr("sorted", 1))
    return lambda x: tuple(torch.topk(x, k, axis, largest, ordered))


@op("QuantizeLinear")
def quantize(call: Call) -> Run:
    """To the nearest number of the type, ties to even, saturated. torch has no kernel that does it in one."""
    to = call.dtype(2) if call.has(2) else dtype(call.attr("output_dtype", 2), str(call.node))
    if call.attr("block_size", 0):
        raise call.refuse("activations are not quantized in blocks here")
    axis, zero = call.attr("axis", 1), call.maybe(2)
    rank, wide = len(call.shape()), len(call.shape(1)) == 1 and call.shape(1)[0] > 1
    shape = [-1 if d == axis % rank else 1 for d in range(rank)] if wide else []
    offset = None if zero is None or not zero.to(torch.float32).any() else zero.to(torch.float32)
    if offset is not None and offset.numel() > 1:
        raise call.refuse("zero points are one number here, and quantization is symmetric everywhere else")
    shift = 0.0 if offset is None else float(offset.item())
    if to == torch.float8_e4m3fn:
        return lambda x, s, *_: (x / s.reshape(shape)).clamp(-448.0, 448.0).to(to)
    low, high = torch.iinfo(to).min, torch.iinfo(to).max
    if shift:
        return lambda x, s, *_: (x / s.reshape(shape)).round_().add_(shift).clamp_(low, high).to(to)
    return lambda x, s, *_: (x / s.reshape(shape)).round_().clamp_(low, high).to(to)


@op("DequantizeLinear")
def dequantize(call: Call) -> Run:
    """In the type of the scales, per tensor, per axis, or in blocks along it."""
    kind, rank = call.dtype(1), len(call.shape())
    axis, block = call.attr("axis", 1), call.attr("block_size", 0)
    scales = call.shape(1)

    def spread(values: Tensor) -> Tensor:
        if block:
            return values.repeat_interleave(block, axis % rank).narrow(
                axis % rank, 0, call.shape()[axis % rank]
            )
        if len(scales) == 1 and scales[0] > 1:
            return values.reshape([-1 if d == axis % rank else 1 for d in range(rank)])
        return values.reshape([])

    zero = call.maybe(2)
    if zero is None or not zero.to(torch.float32).any():
        call.taken.update({2} if call.has(2) else ())
        return lambda x, s: x.to(kind) * spread(s)
    call.taken.discard(2)
    return lambda x, s, z: (x.to(kind) - spread(z).to(kind)) * spread(s)

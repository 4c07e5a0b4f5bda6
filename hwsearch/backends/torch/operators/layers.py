"""Products, convolutions, pooling, normalisation and recurrent layers in float. Source: the ONNX operator schemas."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from hwsearch.backends.torch.calls import Call, Run, op, paddings, torch_pads
from hwsearch.backends.torch.fusing import OWN

Tensor = torch.Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@op("MatMul")
def matmul(call: Call) -> Run:
    return torch.matmul


@op("Gemm")
def gemm(call: Call) -> Run:
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    left, right = bool(call.attr("transA", 0)), bool(call.attr("transB", 0))

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = (a.t() if left else a), (b.t() if right else b)
        if c is None:
            return torch.mm(a, b) if alpha == 1.0 else torch.mm(a, b) * alpha
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return run


@op("Einsum")
def einsum(call: Call) -> Run:
    equation = call.attr("equation")
    return lambda *x: torch.einsum(equation, *x)


@op(f"{OWN}.Attention")
def attention(call: Call) -> Run:
    """softmax(scale * q k^T + mask) v of q [.., t, d], k^T [.., d, s], v [.., s, e] and a mask that broadcasts to [.., t, s]."""
    q, kt, v = (call.shape(i) for i in range(3))
    lead = np.broadcast_shapes(q[:-2], kt[:-2], v[:-2])
    scale = call.attr("scale")

    def run(q: Tensor, kt: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in (q, kt.transpose(-1, -2), v))
        if mask is not None:
            mask = mask.expand(*lead, q.shape[-2], k.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    return run


@op("Conv")
def conv(call: Call) -> Run:
    kernel = list(call.attr("kernel_shape", call.shape(1)[2:]))
    n = len(kernel)
    if n not in _CONV:
        raise call.refuse(f"torch has no convolution of {n} dimensions")
    strides, dilations = list(call.attr("strides", [1] * n)), list(call.attr("dilations", [1] * n))
    pads, groups, run = paddings(call, kernel, strides, dilations), call.attr("group", 1), _CONV[n]
    even = pads[:n] == pads[n:]
    widths, inside = ([], pads[:n]) if even else (torch_pads(pads), [0] * n)

    def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        x = x if even else F.pad(x, widths)
        y: Tensor = run(x, w, b, strides, inside, dilations, groups)
        return y

    return convolve


def conv_relu(call: Call) -> tuple[Run, tuple[int, ...]] | None:
    """(a convolution, perhaps an addition, and a ReLU as one call of cuDNN, its shape); None where there is no such call.

    The node is a convolution of images in halves; the run is given activations, weight, bias and what is added, None for none.
    """
    rank = len(call.shape(1)) - 2
    kernel = list(call.attr("kernel_shape", call.shape(1)[2:]))
    strides, dilations = list(call.attr("strides", [1] * rank)), list(call.attr("dilations", [1] * rank))
    if rank != 2 or call.dtype() not in (torch.float16, torch.bfloat16):
        return None
    pads, groups = paddings(call, kernel, strides, dilations), call.attr("group", 1)
    if pads[:rank] != pads[rank:]:
        return None
    inside = pads[:rank]

    def convolve(x: Tensor, w: Tensor, b: Tensor | None, z: Tensor | None) -> Tensor:
        if z is None:
            return torch.cudnn_convolution_relu(x, w, b, strides, inside, dilations, groups)
        return torch.cudnn_convolution_add_relu(x, w, z, 1.0, b, strides, inside, dilations, groups)

    x, w = (torch.empty(call.shape(i), device="meta") for i in range(2))
    return convolve, tuple(F.conv2d(x, w, None, strides, inside, dilations, groups).shape)


@op("ConvTranspose")
def conv_transpose(call: Call) -> Run:
    kernel = list(call.attr("kernel_shape", call.shape(1)[2:]))
    n = len(kernel)
    if n not in _CONV_TRANSPOSE:
        raise call.refuse(f"torch has no transposed convolution of {n} dimensions")
    if call.attr("output_shape") or call.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise call.refuse("output_shape and auto_pad of a transposed convolution are not supported")
    strides, dilations = list(call.attr("strides", [1] * n)), list(call.attr("dilations", [1] * n))
    pads, extra = list(call.attr("pads", [0] * (2 * n))), list(call.attr("output_padding", [0] * n))
    groups, run = call.attr("group", 1), _CONV_TRANSPOSE[n]
    even = pads[:n] == pads[n:]
    inside = pads[:n] if even else [0] * n

    def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = run(x, w, b, strides, inside, extra, groups, dilations)
        for axis in () if even else range(n):
            y = y.narrow(axis + 2, pads[axis], y.shape[axis + 2] - pads[axis] - pads[n + axis])
        return y

    return convolve


@op("MaxPool")
def max_pool(call: Call) -> Run:
    call.single_output()
    kernel = list(call.attr("kernel_shape"))
    n = len(kernel)
    strides, dilations = list(call.attr("strides", [1] * n)), list(call.attr("dilations", [1] * n))
    pads, run, up = paddings(call, kernel, strides, dilations), _MAX_POOL[n], bool(call.attr("ceil_mode", 0))
    if pads[:n] == pads[n:] and all(2 * p <= k for p, k in zip(pads[:n], kernel, strict=True)):
        return lambda x: run(x, kernel, strides, pads[:n], dilations, up)
    widths, low = torch_pads(pads), torch.finfo(call.dtype()).min
    return lambda x: run(F.pad(x, widths, value=low), kernel, strides, 0, dilations, up)


@op("AveragePool")
def average_pool(call: Call) -> Run:
    kernel = list(call.attr("kernel_shape"))
    n = len(kernel)
    strides, inside = list(call.attr("strides", [1] * n)), bool(call.attr("count_include_pad", 0))
    if any(d != 1 for d in call.attr("dilations", ())):
        raise call.refuse("torch has no average pool with dilations")
    pads, run, up = paddings(call, kernel, strides, [1] * n), _AVG_POOL[n], bool(call.attr("ceil_mode", 0))
    if pads[:n] == pads[n:] and all(2 * p <= k for p, k in zip(pads[:n], kernel, strict=True)):
        return lambda x: run(x, kernel, strides, pads[:n], up, inside)
    if not inside or up:
        raise call.refuse(f"torch has no average pool that leaves out the uneven paddings {pads}")
    widths = torch_pads(pads)
    return lambda x: run(F.pad(x, widths), kernel, strides)


@op("GlobalAveragePool")
def global_average_pool(call: Call) -> Run:
    axes = list(range(2, len(call.shape())))
    return lambda x: x.mean(axes, keepdim=True)


@op("GlobalMaxPool")
def global_max_pool(call: Call) -> Run:
    axes = list(range(2, len(call.shape())))
    return lambda x: x.amax(axes, keepdim=True)


@op("BatchNormalization")
def batch_norm(call: Call) -> Run:
    call.single_output()
    if call.attr("training_mode", 0):
        raise call.refuse("it is in training mode; export the model in eval mode")
    epsilon = call.attr("epsilon", 1e-5)
    return lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, False, 0.0, epsilon)


@op("InstanceNormalization")
def instance_norm(call: Call) -> Run:
    epsilon = call.attr("epsilon", 1e-5)
    return lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=epsilon)


@op("GroupNormalization")
def group_norm(call: Call) -> Run:
    """Scales of groups (opset 18) or of channels (21)."""
    groups, epsilon = call.attr("num_groups"), call.attr("epsilon", 1e-5)
    each = call.shape()[1] // call.shape(1)[0]
    return lambda x, w, b: F.group_norm(
        x,
        groups,
        w.repeat_interleave(each) if each > 1 else w,
        b.repeat_interleave(each) if each > 1 else b,
        epsilon,
    )


@op("LayerNormalization", "RMSNormalization")
def layer_norm(call: Call) -> Run:
    call.single_output()
    normalised = list(call.shape()[call.axis(-1) :])
    epsilon, rms = call.attr("epsilon", 1e-5), call.node.op == "RMSNormalization"
    own = list(call.shape(1)) == normalised and (not call.has(2) or list(call.shape(2)) == normalised)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if rms:
            return (
                F.rms_norm(x, normalised, w, epsilon) if own else F.rms_norm(x, normalised, None, epsilon) * w
            )
        if own:
            return F.layer_norm(x, normalised, w, b, epsilon)
        y = F.layer_norm(x, normalised, None, None, epsilon) * w
        return y if b is None else y + b

    return run


@op("GridSample")
def grid_sample(call: Call) -> Run:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(
        call.attr("mode", "bilinear"), call.attr("mode", "bilinear")
    )
    return partial(
        F.grid_sample, mode=mode, padding_mode=call.attr("padding_mode", "zeros"),
        align_corners=bool(call.attr("align_corners", 0)),
    )  # fmt: skip

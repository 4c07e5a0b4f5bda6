"""One small network for each of many operators: two convolutions with the operator between them.

`FOLLOWED` and `MIXED` map a name to what is computed from an activation [n, 8, 6, 6] that is positive; channels of the result
lie along axis 1. What is `MIXED` needs all channels at once, and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
Operator = Callable[[Tensor], Tensor]

UNARY = (
    "abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan sinh cosh "
    "tanh asinh arcsinh atan arctan erf erfc sigmoid sign sgn ceil floor round trunc fix frac relu clone "
    "deg2rad rad2deg digamma lgamma logit nan_to_num selu isfinite isnan signbit"
).split()
SPECIAL = "expit exp2 expm1 log1p erf erfc digamma gammaln psi sinc round i0 ndtr entr".split()
ACTIVATIONS = (
    "relu6 elu celu gelu silu mish hardtanh hardswish hardsigmoid leaky_relu softplus softsign tanhshrink hardshrink "
    "softshrink logsigmoid rrelu alpha_dropout feature_alpha_dropout dropout dropout2d"
).split()
BINARY = (
    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod maximum minimum fmax fmin atan2 arctan2 "
    "hypot logaddexp copysign greater less eq not_equal xlogy float_power"
).split()
POOLS = "max_pool2d avg_pool2d".split()


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :4], x[:, 4:]


def _shift_in_place(x: Tensor) -> Tensor:
    """A temporal shift as it is often written: parts of a tensor of zeros are filled."""
    y = torch.zeros_like(x)
    y[:, :2, :, :-1] = x[:, :2, :, 1:]
    y[:, 2:4, :, 1:] = x[:, 2:4, :, :-1]
    y[:, 4:] = x[:, 4:]
    return y


def _fill_in_place(x: Tensor) -> Tensor:
    y = x * 1
    y[:, :, 0].fill_(0.5)
    y[:, :, :, 1] = 2.0
    return y


def _unpool(x: Tensor) -> Tensor:
    y, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y * 2, where, 2)


def _grid(x: Tensor) -> Tensor:
    theta = torch.tensor([[[0.9, 0.1, 0.0], [-0.1, 0.8, 0.1]]]).expand(x.shape[0], 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _fold(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1)


def _response_norm(x: Tensor) -> Tensor:
    """ConvNeXt V2's global response normalization, channels first."""
    size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return x + x * (size / (size.mean(1, keepdim=True) + 1e-6))


def _gathered(x: Tensor) -> Tensor:
    where = torch.argsort(x.mean(1, keepdim=True), -1).expand_as(x)
    return torch.gather(x, 3, where)


def _or_nan(x: Tensor) -> Tensor:
    return torch.where(x > 0.5, x, float("nan"))


def _zeros_of_both_signs(x: Tensor) -> Tensor:
    return torch.round(0.5 * (x - 0.6))


def _positions(*values: int) -> Tensor:
    return torch.tensor(values)


ONE_BY_ONE: dict[str, Operator] = {
    **{n: lambda x, n=n: getattr(torch, n)(x * 0.5 + 0.2) * 1.0 for n in UNARY},
    **{f"special.{n}": lambda x, n=n: getattr(torch.special, n)(x * 0.5 + 0.2) for n in SPECIAL},
    **{f"F.{n}": lambda x, n=n: getattr(F, n)(x - 1, **({"training": False} if "drop" in n else {})) for n in ACTIVATIONS},
    **{n: lambda x, n=n: getattr(torch, n)(x + 0.5, x.flip(3) + 0.3).float() for n in BINARY},
    **{n: lambda x, n=n: getattr(F, n)(x, 2) for n in POOLS},
    "clamp": lambda x: torch.clamp(x, 0.1, 0.8), "clip": lambda x: torch.clip(x, 0.1, 0.8),
    "lerp": lambda x: torch.lerp(x, x.flip(2), 0.3), "addcmul": lambda x: torch.addcmul(x, x, x.flip(2)),
    "where": lambda x: torch.where(x > 0.5, x, 0.1 * x), "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.2),
    "isclose": lambda x: torch.isclose(x, x.flip(2), atol=0.3) * 1.0,
}  # fmt: skip
"""Element by element."""

FOLLOWED: dict[str, Operator] = {
    **ONE_BY_ONE,
    # concatenations and splits
    "cat": lambda x: torch.cat([x, x * 2], 1), "concat": lambda x: torch.concat([x, x * 2], 1),
    "concatenate": lambda x: torch.concatenate([x, x * 2], 1), "hstack": lambda x: torch.hstack([x, x.exp()]),
    "vstack": lambda x: torch.vstack([x, x * 2]), "stack": lambda x: torch.stack([x, x * 2], 4).sum(4),
    "dstack": lambda x: torch.dstack([x, x * 2]), "column_stack": lambda x: torch.column_stack([x, x * 2]),
    "chunk": lambda x: torch.cat(torch.chunk(x, 2, 1)[::-1], 1), "split": lambda x: torch.cat(x.split([2, 6], 1)[::-1], 1),
    "tensor_split": lambda x: torch.cat(torch.tensor_split(x, 2, 1)[::-1], 1),
    "hsplit": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1), "vsplit": lambda x: torch.cat(torch.vsplit(x, 2)[::-1], 0),
    "dsplit": lambda x: torch.cat(torch.dsplit(x, 2)[::-1], 2), "unbind": lambda x: torch.stack(x.unbind(2)[::-1], 2),
    "narrow": lambda x: torch.cat([x.narrow(1, 4, 4), x.narrow(1, 0, 4)], 1), "select": lambda x: x.select(2, 1).unsqueeze(2),
    "slice": lambda x: x[:, 2:7], "glu": lambda x: F.glu(x, 1), "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "two branches": lambda x: torch.cat(_halves(x * 1)[::-1], 1),
    # numbers that another way of computing the same would get wrong
    "fmax of NaN": lambda x: torch.fmax(_or_nan(x), x.flip(3)), "fmin of NaN": lambda x: torch.fmin(x.flip(3), _or_nan(x)),
    "hypot of large": lambda x: torch.hypot(x * 1e25, x.flip(3) * 1e25) * 1e-25,
    "hypot of zeros": lambda x: torch.hypot(F.relu(x - 0.6), F.relu(x.flip(3) - 0.6)),
    "copysign of -0": lambda x: torch.copysign(x, _zeros_of_both_signs(x)),
    "copysign of a number": lambda x: torch.copysign(x, -0.0),
    "signbit of -0": lambda x: torch.signbit(_zeros_of_both_signs(x)) * 1.0,
    # moves
    "squeeze of nothing": lambda x: x.squeeze(1).squeeze((1, 2)).squeeze(),
    "squeeze of some": lambda x: x[:, :, :1].squeeze((1, 2, 3)).unsqueeze(2),
    "moveaxis": lambda x: x.moveaxis(1, 3).contiguous().moveaxis(3, 1), "movedim": lambda x: x.movedim(1, 2).movedim(2, 1),
    "swapaxes": lambda x: x.swapaxes(1, 3).swapaxes(1, 3), "swapdims": lambda x: x.swapdims(2, 3),
    "permute": lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), "mT": lambda x: x.mT,
    "adjoint": lambda x: x.adjoint(),
    "view_as": lambda x: x.flatten(2).view_as(x), "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "ravel": lambda x: x.ravel().view(x.shape), "flatten": lambda x: x.flatten(2).unflatten(2, (6, 6)),
    "expand_as": lambda x: x + x.mean((2, 3), keepdim=True).expand_as(x), "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "broadcast_to": lambda x: x + torch.broadcast_to(x.mean((2, 3), keepdim=True), x.shape),
    "tile": lambda x: x.tile(1, 1, 2, 1), "repeat": lambda x: x.repeat(1, 1, 1, 2), "flip": lambda x: x.flip(1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 3), "fliplr": lambda x: x.fliplr(), "flipud": lambda x: x.flipud(),
    "rot90": lambda x: x.rot90(1, (2, 3)), "roll": lambda x: x.roll(2, 3), "roll channels": lambda x: x.roll(3, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2), "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "tril": lambda x: x.tril(), "unfold": lambda x: x.unfold(3, 2, 2).sum(-1),
    "diagonal": lambda x: x.diagonal(0, 2, 3).unsqueeze(3),
    "pad": lambda x: F.pad(x, (1, 1)), "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), "replicate": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    # by number
    "index": lambda x: x[:, :, _positions(2, 0, 1)], "index channels": lambda x: x[:, _positions(7, 3, 1, 0, 2, 5)],
    "index_select": lambda x: x.index_select(1, _positions(6, 5, 4, 3, 2, 1, 0)), "gather": _gathered,
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(3), 3),
    "index_add": lambda x: x.index_add(2, _positions(1, 1), x[:, :, 3:5]),
    "scatter": lambda x: x.scatter(3, x.argsort(3), x * 2), "index_fill": lambda x: x.index_fill(2, _positions(1), 0.5),
    # written in place
    "copy": _shift_in_place, "fill": _fill_in_place, "zeros": lambda x: x + torch.zeros(1, 8, 6, 6) * 2,
    "new_full": lambda x: torch.cat([x, x.new_full((x.shape[0], 8, 6, 2), 0.7)], 3),
    # over axes without channels
    "softmax": lambda x: torch.softmax(x, 2), "special.softmax": lambda x: torch.special.softmax(x, 3),
    "cumsum": lambda x: x.cumsum(3),
    "cumprod": lambda x: x.cumprod(3), "cummax": lambda x: x.cummax(3)[0], "logcumsumexp": lambda x: x.logcumsumexp(3),
    "sort": lambda x: x.sort(3)[0], "topk": lambda x: x.topk(3, 3)[0], "kthvalue": lambda x: x.kthvalue(2, 3, True)[0],
    "median": lambda x: x.median(3, True)[0], "msort": lambda x: x.msort(), "diff": lambda x: x.diff(dim=3),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, (2, 3), keepdim=True), 2), "var": lambda x: x.var((2, 3), keepdim=True),
    "argmax": lambda x: x.argmax(3, keepdim=True) * 1.0,
    "aminmax": lambda x: torch.cat(torch.aminmax(x, dim=3, keepdim=True), 2),
    "logsumexp": lambda x: x.logsumexp(3, True), "nansum": lambda x: x.nansum(3, True), "prod": lambda x: x.prod(3, True),
    "norm": lambda x: x.norm(dim=3, keepdim=True), "count_nonzero": lambda x: x.count_nonzero(3).unsqueeze(3) * 1.0,
    "trapezoid": lambda x: torch.trapezoid(x, dim=3).unsqueeze(3), "instance_norm": lambda x: F.instance_norm(x),
    "interpolate nearest": lambda x: F.interpolate(x, scale_factor=2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 3),
    "interpolate nearest-exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "interpolate bilinear": lambda x: F.interpolate(x, size=9, mode="bilinear"), "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "interpolate bicubic": lambda x: F.interpolate(x, size=9, mode="bicubic", antialias=True),
    "max_unpool2d": _unpool, "grid_sample": _grid, "unfold and fold": _fold,
    "im2col": lambda x: F.unfold(x, 2).unflatten(2, (5, 5)),
    # sums over channels: what is removed is zero there
    "response norm": _response_norm, "mean of channels": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "sum of channels": lambda x: x - 0.1 * x.sum(1, keepdim=True), "normalize": lambda x: F.normalize(x, dim=1),
    "cosine_similarity": lambda x: x * F.cosine_similarity(x, x.flip(2), 1).unsqueeze(1),
}  # fmt: skip

MIXED: dict[str, Operator] = {
    "softmax over channels": lambda x: torch.softmax(x, 1),
    "sort of channels": lambda x: x.sort(1)[0],
    "max over channels": lambda x: x * x.amax(1, keepdim=True),
    "every other channel": lambda x: x[:, ::2],
    "cumsum over channels": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "gather of channels": lambda x: x.gather(1, x.argsort(1)),
    "quantile over channels": lambda x: x * x.quantile(0.5, 1, keepdim=True),
    "fft over channels": lambda x: torch.fft.fft(x, dim=1).real,
}


class Between(nn.Module):
    """Two convolutions with an operator between them."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator, self.a = operator, nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            channels = operator(torch.rand(2, 8, 6, 6)).shape[1]
        self.b = nn.Conv2d(channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operator(torch.sigmoid(self.a(x)) + 0.1))


def between(operator: Operator) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Between(operator).eval(), torch.randn(2, 3, 6, 6)

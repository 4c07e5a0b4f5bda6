"""Random small torch networks of layers and of what may stand between a quantizer and a layer.

`network(seed)` is a program of some steps on images [1, C, H, W]: each step reads tensors that are there and adds what it makes.
Whatever nothing reads is an output, so that some tensors have several readers, some of them the network's caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Tensors = list[torch.Tensor]
Step = Callable[["Network", Tensors], Tensors]

CHANNELS = (4, 8, 12, 16, 32)
SIZE = 8
MOST_OUTPUTS = 3


class Network(nn.Module):
    """Runs its steps: each takes some of the tensors so far, by index, and appends its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[int, ...], Step]] = []
        self.layers = nn.ModuleList()
        self.outputs: tuple[int, ...] = ()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for _, reads, step in self.steps:
            values += step(self, [values[i] for i in reads])
        return tuple(values[i] for i in self.outputs)

    def __repr__(self) -> str:
        lines, count = [], 1
        for name, reads, _ in self.steps:
            lines.append(f"t{count} = {name}({', '.join(f't{i}' for i in reads)})")
            count += 2 if name.startswith("split") else 1
        return "; ".join([*lines, f"return {', '.join(f't{i}' for i in self.outputs)}"])


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.net = Network()
        self.values: Tensors = [torch.randn(1, int(self.rng.choice(CHANNELS)), SIZE, SIZE)]
        self.unread = {0}

    def pick(self, fits: Callable[[torch.Tensor], bool] = lambda _: True) -> int:
        """A tensor to read, mostly a late one, and one that nothing reads yet rather than another; -1 where none fits."""
        found = [i for i, v in enumerate(self.values) if v.dim() == 4 and fits(v)]
        if not found:
            return -1
        weights = np.array([(4.0 if i in self.unread else 1.0) * (1 + i) for i in found])
        return int(self.rng.choice(found, p=weights / weights.sum()))

    def add(self, name: str, reads: tuple[int, ...], step: Step) -> None:
        made = step(self.net, [self.values[i] for i in reads])
        self.net.steps.append((name, reads, step))
        self.unread -= set(reads)
        self.unread |= set(range(len(self.values), len(self.values) + len(made)))
        self.values += made

    def layer(
        self, module: nn.Module, name: str, read: int, wrap: Callable[..., torch.Tensor] | None = None
    ) -> None:
        index = len(self.net.layers)
        self.net.layers.append(module.eval())

        def step(net: Network, values: Tensors) -> Tensors:
            own = net.layers[index]
            return [wrap(own, values[0]) if wrap else own(values[0])]

        self.add(name, (read,), step)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]


def _conv(w: _Writer) -> None:
    read = w.pick(lambda v: v.shape[2] >= 3 and v.shape[3] >= 3)
    if read < 0:
        return
    channels = w.values[read].shape[1]
    kind = w.one_of("1x1", "3x3", "3x3", "depthwise", "grouped", "strided", "dilated", "valid")
    out = int(w.rng.choice(CHANNELS))
    options: dict[str, Any] = {"kernel_size": 1 if kind == "1x1" else 3, "bias": w.chance(0.6)}
    if kind not in ("1x1", "valid"):
        options["padding"] = 2 if kind == "dilated" else 1
    if kind == "dilated":
        options["dilation"] = 2
    if kind == "strided":
        options["stride"] = 2
    if kind == "depthwise":
        options["groups"] = out = channels
    if kind == "grouped" and channels % 2 == 0:
        options["groups"], out = 2, out + out % 2
    conv: nn.Module = nn.Conv2d(channels, out, **options)
    if w.chance(0.3):
        norm = nn.BatchNorm2d(out)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2.0)
        conv = nn.Sequential(conv, norm)
    w.layer(conv, f"conv_{kind}", read)


def _conv_transpose(w: _Writer) -> None:
    read = w.pick(lambda v: v.shape[2] <= SIZE and v.shape[3] <= SIZE)
    if read >= 0:
        out = int(w.rng.choice(CHANNELS))
        w.layer(nn.ConvTranspose2d(w.values[read].shape[1], out, 2, stride=2), "conv_transpose", read)


def _linear(w: _Writer) -> None:
    read = w.pick()
    linear = nn.Linear(w.values[read].shape[1], int(w.rng.choice(CHANNELS)), bias=w.chance(0.7))
    if w.chance(0.5):

        def rows(own: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return own(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

        w.layer(linear, "linear_last", read, rows)
    else:

        def sequence(own: nn.Module, x: torch.Tensor) -> torch.Tensor:
            rows = own(x.flatten(2).transpose(1, 2))
            return rows.transpose(1, 2).reshape(1, -1, *x.shape[2:])  # type: ignore[no-any-return]

        w.layer(linear, "linear_sequence", read, sequence)


def _pooled_linear(w: _Writer) -> None:
    """Squeeze and excitation: a layer on the mean of an image scales the image."""
    read = w.pick()
    channels = w.values[read].shape[1]
    if w.chance(0.5):
        w.layer(
            nn.Conv2d(channels, channels, 1),
            "excite_conv",
            read,
            lambda own, x: x * own(x.mean((2, 3), keepdim=True)).sigmoid(),
        )
    else:
        w.layer(
            nn.Linear(channels, channels),
            "excite_linear",
            read,
            lambda own, x: x * own(F.adaptive_avg_pool2d(x, 1).flatten(1)).sigmoid()[:, :, None, None],
        )


def _product(w: _Writer) -> None:
    """A product of two activations, as in attention."""
    read = w.pick(lambda v: v.shape[2] * v.shape[3] <= 64)
    if read >= 0:

        def attend(_: Network, values: Tensors) -> Tensors:
            rows = values[0].flatten(2)
            weights = (rows.transpose(1, 2) @ rows * 0.1).softmax(-1)
            return [(rows @ weights).reshape(values[0].shape)]

        w.add("attention", (read,), attend)


def _cat(w: _Writer) -> None:
    first = w.pick()
    shape = w.values[first].shape
    dim = w.one_of(1, 1, 1, 1, 2, 3)

    def fits(v: torch.Tensor) -> bool:
        return all(a == b for i, (a, b) in enumerate(zip(v.shape, shape, strict=True)) if i != dim)

    reads = [first, *(w.pick(fits) for _ in range(w.one_of(1, 1, 2)))]
    if w.chance(0.1):
        w.add(
            f"cat{dim}_constant", (first,), lambda _, v: [torch.cat([v[0], torch.full_like(v[0], 0.5)], dim)]
        )
    elif sum(w.values[i].shape[dim] for i in reads) <= 64:
        w.add(f"cat{dim}", tuple(reads), lambda _, v: [torch.cat(v, dim)])


def _split(w: _Writer) -> None:
    read = w.pick(lambda v: v.shape[1] >= 8)
    if read >= 0:
        place = w.values[read].shape[1] // w.one_of(2, 2, 4)
        w.add("split", (read,), lambda _, v: list(v[0].split([place, v[0].shape[1] - place], 1)))


def _merge(w: _Writer) -> None:
    first = w.pick()
    second = w.pick(lambda v: v.shape == w.values[first].shape)
    name = w.one_of("add", "add", "add", "mul", "sub", "maximum")
    merge: Callable[..., torch.Tensor] = getattr(torch, name)
    w.add(name, (first, second), lambda _, v: [merge(v[0], v[1] * 0.5 if first == second else v[1])])


_POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.4, 0.7),
    "abs": torch.abs,
    "neg": torch.neg,
    "scale": lambda x: x * 0.37,
    "shift": lambda x: x + 0.21,
    "softmax": lambda x: x.softmax(1),
}


def _pointwise(w: _Writer) -> None:
    name = w.one_of("relu", "relu", "relu", *_POINTWISE)
    w.add(name, (w.pick(),), lambda _, v: [_POINTWISE[name](v[0])])


_MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transpose": lambda x: x.transpose(2, 3),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "slice_channels": lambda x: x[:, 1 : x.shape[1] - 1],
    "slice_half": lambda x: x[:, : x.shape[1] // 2],
    "slice_space": lambda x: x[:, :, 1:, :-1],
    "every_other": lambda x: x[:, :, ::2, ::2],
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "reshape": lambda x: x.reshape(1, x.shape[1] * 2, x.shape[2] // 2, x.shape[3]),
    "squeeze": lambda x: x.squeeze(0).unsqueeze(0),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
}
_EVEN_SPACE = ("pixel_unshuffle", "reshape", "every_other")


def _move(w: _Writer) -> None:
    name = w.one_of(*_MOVES)

    def fits(v: torch.Tensor) -> bool:
        if name in _EVEN_SPACE and (v.shape[2] % 2 or v.shape[3] % 2 or min(v.shape[2:]) < 4):
            return False
        if name == "pixel_shuffle":
            return v.shape[1] % 4 == 0 and v.shape[2] <= SIZE
        if name == "slice_space":
            return min(v.shape[2:]) >= 4
        if name in ("pixel_unshuffle", "repeat", "reshape"):
            return v.shape[1] <= 16
        return v.shape[1] >= 4 and v.shape[1] % 2 == 0

    read = w.pick(fits)
    if read >= 0:
        w.add(name, (read,), lambda _, v: [_MOVES[name](v[0])])


_SPATIAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_padded": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool_counted": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool_uncounted": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "mean": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad_one": lambda x: F.pad(x, (0, 1, 0, 1), value=1.0),
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False),
}


def _spatial(w: _Writer) -> None:
    name = w.one_of(*_SPATIAL)
    read = w.pick(lambda v: 4 <= v.shape[2] <= SIZE and 4 <= v.shape[3] <= SIZE and v.shape[1] <= 32)
    if read >= 0:
        w.add(name, (read,), lambda _, v: [_SPATIAL[name](v[0])])


_LAYERS = (_conv, _conv, _conv, _conv, _conv_transpose, _linear, _pooled_linear, _product)
_GLUE = (_cat, _cat, _cat, _split, _merge, _merge, _pointwise, _pointwise, _move, _move, _spatial, _spatial)


def network(seed: int) -> tuple[Network, torch.Tensor]:
    """(a network in evaluation mode, an example input). The last step is a layer, and so is a third of the others."""
    torch.manual_seed(seed)
    w = _Writer(seed)
    with torch.no_grad():
        for _ in range(int(w.rng.integers(4, 10))):
            w.one_of(*(_LAYERS if w.chance(0.35) else _GLUE))(w)
        _conv(w)
    late = sorted(w.unread - {0}, reverse=True)
    w.net.outputs = tuple(late[:MOST_OUTPUTS])
    return w.net.eval(), w.values[0]

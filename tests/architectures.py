"""Random networks from small blocks: `convolutional(...)` and `transformer(...)`, with random weights and statistics."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from networks import Apply
from torch import nn
from torch.nn import functional as F

Block = Callable[[int, int, random.Random], tuple[nn.Module, int]]
"""(channels, another width, choices) -> (module, channels that it puts out)"""
BLOCKS: dict[str, Block] = {}


def block(build: Block) -> Block:
    BLOCKS[build.__name__] = build
    return build


def conv(c: int, out: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, out, size, padding=size // 2, **options)


@block
def plain(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    act = rng.choice([nn.ReLU(), nn.Hardswish(), nn.PReLU(), nn.PReLU(w), nn.Sigmoid(), nn.Softplus()])
    return nn.Sequential(conv(c, w, bias=rng.random() < 0.5), nn.BatchNorm2d(w), act), w


@block
def residual(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.short(x) + self.b(F.relu(self.a(x))))

    out = rng.choice([c, w])
    short = nn.Identity() if out == c else conv(c, out, 1)
    return Apply(run, a=conv(c, w), b=conv(w, out), short=short), out


@block
def preactivation(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """BatchNorm on a sum: it cannot be folded."""
    inner = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, w), nn.BatchNorm2d(w), nn.ReLU(), conv(w, c))
    return Apply(lambda self, x: x + self.inner(x), inner=inner), c


@block
def concat(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x).relu(), self.c(F.avg_pool2d(x, 3, 1, 1))], 1)

    return Apply(run, a=conv(c, w), c=conv(c, 4, 1)), w + 4


@block
def dense(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """DenseNet: the input goes on beside what was made of it."""
    norm = nn.BatchNorm2d(c)
    return Apply(
        lambda self, x: torch.cat([x, self.a(F.relu(self.norm(x)))], 1), norm=norm, a=conv(c, 4)
    ), c + 4


@block
def split(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = self.expand(x).chunk(2, 1)
        return torch.cat([self.a(left), right.tanh()], 1)

    return Apply(run, expand=conv(c, 2 * w, 1), a=conv(w, 4)), w + 4


@block
def uneven_split(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = self.expand(x).split([w, 4], 1)
        return self.a(left.relu()) + self.b(right)

    return Apply(run, expand=conv(c, w + 4, 1), a=conv(w, c), b=conv(4, c, 1)), c


@block
def depthwise(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    times = rng.choice([1, 2])
    depth = nn.Conv2d(w, times * w, 3, padding=1, groups=w, bias=rng.random() < 0.5)
    return nn.Sequential(
        conv(c, w, 1), nn.ReLU6(), depth, nn.BatchNorm2d(times * w), conv(times * w, c, 1)
    ), c


@block
def grouped(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(
        conv(c, w, 1), nn.ReLU(), conv(w, 2 * w, groups=2), nn.BatchNorm2d(2 * w), nn.ReLU()
    ), 2 * w


@block
def transposed_grouped(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    groups = rng.choice([2, w])
    up = nn.ConvTranspose2d(w, 2 * w, 3, padding=1, groups=groups)
    return nn.Sequential(conv(c, w, 1), nn.ReLU(), up, nn.ReLU(), conv(2 * w, c, 1)), c


@block
def squeeze_excite(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))
        return x * gate

    return Apply(run, a=conv(c, 4, 1), b=conv(4, c, 1)), c


@block
def linear_gate(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self.b(F.silu(self.a(F.adaptive_avg_pool2d(x, 1).flatten(1))))
        return x * torch.sigmoid(gate).view(x.shape[0], x.shape[1], 1, 1)

    return Apply(run, a=nn.Linear(c, 4), b=nn.Linear(4, c)), c


@block
def glu(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(conv(c, 2 * w), nn.GLU(1)), w


@block
def group_norm(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(conv(c, w), nn.GroupNorm(2, w), nn.SiLU()), w


@block
def instance_norm(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(conv(c, w), nn.InstanceNorm2d(w, affine=rng.random() < 0.5), nn.LeakyReLU()), w


@block
def layer_norm(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """ConvNeXt's block: LayerNorm over channels, which stay whole; the hidden ones may go."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)

    return Apply(run, depth=conv(c, c, groups=c), norm=nn.LayerNorm(c), up=nn.Linear(c, w), down=nn.Linear(w, c),
                 scale=nn.Parameter(torch.randn(c))), c  # fmt: skip


@block
def unet(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        below = self.mid(F.max_pool2d(x, 2)).relu()
        up = self.up(below) if self.up is not None else F.interpolate(below, scale_factor=2, mode="bilinear")
        return self.out(torch.cat([x, up], 1)).relu()

    up = nn.ConvTranspose2d(w, 4, 2, 2) if rng.random() < 0.5 else None
    return Apply(run, mid=conv(c, w), up=up, out=conv(c + (4 if up is not None else w), c)), c


@block
def shuffle(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """ShuffleNet: half of the channels pass, then both halves are interleaved."""
    native = rng.random() < 0.3

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        left, right = self.expand(x).chunk(2, dim=1)
        y = torch.cat([left, self.b(self.a(right).relu())], 1)
        if native:
            return F.channel_shuffle(y, 2)
        n, k, h, v = y.shape
        return y.view(n, 2, k // 2, h, v).transpose(1, 2).reshape(n, k, h, v)

    return Apply(run, expand=conv(c, 2 * w, 1), a=conv(w, w, 1), b=conv(w, w, groups=w)), 2 * w


@block
def pixel_shuffle(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(
        conv(c, 4 * w, 1), nn.PixelShuffle(2), nn.ReLU(), conv(w, 4), nn.PixelUnshuffle(2)
    ), 16


@block
def tied(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """One layer run twice."""
    return Apply(
        lambda self, x: self.b(self.s(self.s(self.a(x)).relu()).relu()),
        a=conv(c, w),
        s=conv(w, w),
        b=conv(w, c),
    ), c


@block
def padded_shortcut(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """ResNet's shortcut without parameters: zeros for the new channels."""
    return Apply(
        lambda self, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + self.b(self.a(x).relu()),
        a=conv(c, w),
        b=conv(w, c + 4),
    ), c + 4


@block
def spatial_attention(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """A non-local block: one head over all positions."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q.transpose(1, 2) @ k, -1) @ v.transpose(1, 2)
        return x + self.o(y.transpose(1, 2).unflatten(2, x.shape[2:]))

    return Apply(run, q=conv(c, 4, 1), k=conv(c, 4, 1), v=conv(c, w, 1), o=conv(w, c, 1)), c


@block
def pools(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return nn.Sequential(
        nn.MaxPool2d(3, 1, 1), nn.ZeroPad2d(1), conv(c, w), nn.AvgPool2d(3, 1), nn.Dropout(0.1)
    ), w


@block
def shift_in_place(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """A shift of some channels, written into a tensor of zeros."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        out = torch.zeros_like(y)
        out[:, :2, :, :-1] = y[:, :2, :, 1:]
        out[:, 2:] = y[:, 2:]
        return x + self.b(out)

    return Apply(run, a=conv(c, w), b=conv(w, c, 1)), c


@block
def response_norm(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """ConvNeXt V2's block: of global response normalization, a mean over channels."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.up(self.depth(x).permute(0, 2, 3, 1)))
        size = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
        y = self.scale * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.shift + y
        return x + self.down(y).permute(0, 3, 1, 2)

    own = {n: nn.Parameter(torch.randn(w)) for n in ("scale", "shift")}
    return Apply(run, depth=conv(c, c, groups=c), up=nn.Linear(c, w), down=nn.Linear(w, c), **own), c


@block
def unpool(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """SegNet: maxima go back to where they were found."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        y, where = F.max_pool2d(self.a(x).relu(), 2, return_indices=True)
        return self.b(F.max_unpool2d(self.m(y), where, 2, output_size=x.shape[2:]))

    return Apply(run, a=conv(c, w), m=conv(w, w), b=conv(w, c)), c


@block
def permuted(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    """Channels taken by a constant list of numbers."""

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()[:, self.order])

    return Apply(run, a=conv(c, w), b=conv(w, c, 1), order=nn.Buffer(torch.randperm(w))), c


@block
def uneven_branches(c: int, w: int, rng: random.Random) -> tuple[nn.Module, int]:
    return Apply(lambda self, x: self.c(torch.concat([self.a(x), self.b(x).relu()], 1)),
                 a=conv(c, w), b=conv(c, w + 1, 1), c=conv(2 * w + 1, c)), c  # fmt: skip


def randomize(model: nn.Module) -> nn.Module:
    """Random statistics and affine parameters, so that each shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
        if (
            isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d)
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.9)
    return model.eval()


def convolutional(
    kinds: list[str], widths: list[int], head: str, seed: int
) -> tuple[nn.Module, torch.Tensor]:
    """A stem, blocks of these kinds, a head (`flatten`, `pool`, `image`, `two`), and an example input."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    layers: list[nn.Module] = [conv(3, widths[0]), nn.ReLU()]
    channels = widths[0]
    for kind, width in zip(kinds, widths[1:], strict=True):
        layer, channels = BLOCKS[kind](channels, width, rng)
        layers.append(layer)
    body = nn.Sequential(*layers)
    batch = rng.choice([1, 2])
    if head == "flatten":
        model: nn.Module = nn.Sequential(body, nn.Flatten(), nn.Linear(channels * 36, 3))
    elif head == "pool":
        model = nn.Sequential(
            body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(channels, 3)
        )
    elif head == "image":
        model = nn.Sequential(body, conv(channels, 2, 1))
    else:
        outs = {"a": conv(channels, 2, 1), "b": nn.Linear(channels, 3)}
        model = Apply(
            lambda self, x: (self.a(y := self.body(x)), {"b": self.b(y.mean((2, 3)))}), body=body, **outs
        )
    return randomize(model), torch.randn(batch, 3, 6, 6)


class Attention(nn.Module):
    """Attention with `heads` heads of queries and `kv` of keys and values, in many spellings."""

    def __init__(self, width: int, heads: int, kv: int, kind: str, size: int = 4) -> None:
        super().__init__()
        self.heads, self.kv, self.size, self.kind = heads, kv, size, kind
        self.parts = (heads * size, kv * size, kv * size)
        if "fused" in kind:
            self.qkv = nn.Linear(width, sum(self.parts))
        else:
            self.q, self.k, self.v = (nn.Linear(width, p, bias="bias" in kind) for p in self.parts)
        if "norm" in kind:
            self.q_norm, self.k_norm = nn.LayerNorm(size), nn.RMSNorm(size)
        if "table" in kind:
            self.table = nn.Parameter(torch.randn(50, heads))
            self.register_buffer("index", torch.randint(0, 50, (20, 20)))
        self.o = nn.Linear(heads * size, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        b, t, _ = x.shape
        if "fused" in self.kind and self.heads == self.kv:
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = (
                self.qkv(x).split(self.parts, -1)
                if "fused" in self.kind
                else (self.q(x), self.k(x), self.v(x))
            )
            q, k, v = (p.view(b, t, -1, self.size).transpose(1, 2) for p in parts)
        if "norm" in self.kind:
            q, k = self.q_norm(q), self.k_norm(k)
        if "rope" in self.kind:
            angle = torch.arange(t)[:, None] / 10 ** torch.arange(0, 1, 2 / self.size)
            cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
            q, k = (
                u * cos + torch.cat((-u[..., self.size // 2 :], u[..., : self.size // 2]), -1) * sin
                for u in (q, k)
            )
        if "repeat" in self.kind:
            k, v = (u.repeat_interleave(self.heads // self.kv, 1) for u in (k, v))
        if "table" in self.kind:
            bias = self.table[self.index[:t, :t].reshape(-1)].view(t, t, -1).permute(2, 0, 1)
            scores = q @ k.transpose(-2, -1) / 2 + bias.unsqueeze(0)
            y = torch.softmax(scores if mask is None else scores + mask, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.o(y.transpose(1, 2).reshape(b, t, self.heads * self.size))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = (
            nn.Linear(width, hidden * (2 if kind == "swiglu" else 1)),
            nn.Linear(hidden, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.kind == "swiglu":
            a, b = y.chunk(2, -1)
            return self.down(F.silu(a) * b)
        return self.down(F.gelu(y))


class Transformer(nn.Module):
    """An encoder on tokens (`ids`) or on the patches of an image, with a class token."""

    def __init__(self, heads: int, kv: int, kind: str, hidden: int, mlp: str, stem: str, norm: Any) -> None:
        super().__init__()
        width = 12
        self.stem, self.kind = stem, kind
        if stem == "image":
            self.patch, self.cls = nn.Conv2d(3, width, 3, 3), nn.Parameter(torch.randn(1, 1, width))
            self.position = nn.Parameter(torch.randn(1, 5, width))
        else:
            self.token, self.position_embedding = nn.Embedding(20, width), nn.Embedding(8, width)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention, self.mlp = Attention(width, heads, kv, kind), MLP(width, hidden, mlp)
        self.scale = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        if self.stem == "image":
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        else:
            x = self.token(x) + self.position_embedding(torch.arange(x.shape[1]))
        mask = None if keep is None else torch.where(keep[:, None, None, :] > 0, 0.0, -1e4)
        x = x + self.scale * self.attention(self.norm1(x), mask)
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


def transformer(
    heads: int, kv: int, kind: str, hidden: int, mlp: str, stem: str, norm: str, seed: int
) -> tuple[nn.Module, Any]:
    """A transformer of one block, and example inputs."""
    torch.manual_seed(seed)
    model = Transformer(heads, kv, kind, hidden, mlp, stem, {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm])
    if stem == "image":
        return randomize(model), torch.randn(2, 3, 6, 6)
    keep = torch.ones(2, 5)
    keep[1, 3:] = 0
    return randomize(model), {
        "x": torch.randint(0, 20, (2, 5)),
        **({"keep": keep} if stem == "masked" else {}),
    }

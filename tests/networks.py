# ruff: noqa: E501
"""Small networks of many kinds, with an example input each: `NETWORKS[name]() -> (model, inputs)`.

Random, seeded weights; BatchNorm statistics and affine parameters are random too, so that folding them shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

Case = tuple[nn.Module, Any]
NETWORKS: dict[str, Callable[[], Case]] = {}


def network(build: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(0)
        model, inputs = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.3)
        return model, inputs

    NETWORKS[build.__name__] = seeded
    return seeded


class Apply(nn.Module):
    """Submodules by keyword, and a forward given as a function of (self, *args)."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def image(channels: int = 3, size: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


@network
def mlp() -> Case:
    return nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)
    ), torch.randn(3, 10)


@network
def mlp_batchnorm() -> Case:
    return nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4, bias=False),
                         nn.BatchNorm1d(4, affine=False)), torch.randn(3, 10)  # fmt: skip


@network
def mlp_3d_batchnorm() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Linear(10, 16), nn.BatchNorm1d(5), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.bn(self.a(x)).relu())

    return M(), torch.randn(2, 5, 10)


@network
def one_dimensional() -> Case:
    return nn.Sequential(nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
                         nn.Conv1d(8, 8, 3, groups=8, dilation=2), nn.SiLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                         nn.Linear(8, 3)), torch.randn(2, 4, 40)  # fmt: skip


@network
def grouped() -> Case:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),
                         nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1), nn.AvgPool2d(2)), image(4)  # fmt: skip


@network
def residual() -> Case:
    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
            self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), inplace=True)

    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), Block(8),
                         Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5)), image()  # fmt: skip


@network
def preactivation() -> Case:
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 4, 3)), image()  # fmt: skip


@network
def inception() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b1 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
            self.b2, self.c, self.head = (
                nn.Conv2d(4, 6, 3, padding=1),
                nn.Conv2d(8, 4, 1),
                nn.Conv2d(14, 5, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            parts = [
                self.a(x).relu(),
                self.b2(self.b1(x).relu()).relu(),
                self.c(F.avg_pool2d(x, 3, 1, 1)).relu(),
            ]
            return self.head(torch.cat(parts, 1)).mean((2, 3))

    return M(), image()


@network
def densenet() -> Case:
    class Layer(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, 4, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)

    return nn.Sequential(nn.Conv2d(3, 8, 3), Layer(8), Layer(12), Layer(16), nn.BatchNorm2d(20), nn.ReLU(),
                         nn.AvgPool2d(2), nn.Flatten(), nn.Linear(500, 4)), image()  # fmt: skip


@network
def unet() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.mid = (
                nn.Conv2d(3, 8, 3, padding=1),
                nn.Conv2d(8, 12, 3, padding=1),
                nn.Conv2d(12, 12, 1),
            )
            self.up1, self.bn, self.dec1 = (
                nn.ConvTranspose2d(12, 8, 2, 2),
                nn.BatchNorm2d(8),
                nn.Conv2d(20, 8, 3, padding=1),
            )
            self.up2, self.dec2 = nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(16, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.down1(x).relu()
            b = self.down2(F.max_pool2d(a, 2)).relu()
            m = self.mid(F.max_pool2d(b, 2)).relu()
            y = self.dec1(torch.cat([b, self.bn(self.up1(m))], 1)).relu()
            y = self.dec2(torch.cat([a, self.up2(y)], 1)).relu()
            return F.interpolate(self.head(y), size=(20, 20), mode="bilinear", align_corners=False)

    return M(), image(size=16)


@network
def transposed_grouped() -> Case:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(4),
                         nn.ReLU(), nn.Conv2d(4, 2, 1)), image()  # fmt: skip


@network
def transposed_1d() -> Case:
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 4, 2, 1), nn.BatchNorm1d(4),
                         nn.Tanh(), nn.Conv1d(4, 2, 1)), torch.randn(2, 3, 20)  # fmt: skip


@network
def transposed_3d() -> Case:
    return nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 4, 2, 2), nn.Conv3d(4, 2, 1)
    ), torch.randn(1, 3, 6, 6, 6)


@network
def squeeze_excite() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.reduce, self.expand, self.head = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 2, 1),
                nn.Conv2d(2, 8, 1),
                nn.Linear(8, 4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.silu(self.stem(x))
            gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
            return self.head(F.adaptive_avg_pool2d(x * gate, 1).flatten(1))

    return M(), image()


@network
def mobilenet_v3() -> Case:
    class Block(nn.Module):
        def __init__(self, c: int, wide: int) -> None:
            super().__init__()
            self.expand, self.bn1 = nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide)
            self.depth, self.bn2 = (
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
            )
            self.fc1, self.fc2 = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
            self.project, self.bn3 = nn.Conv2d(wide, c, 1, bias=False), nn.BatchNorm2d(c)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.hardswish(self.bn1(self.expand(x)))
            y = F.hardswish(self.bn2(self.depth(y)))
            y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
            return x + self.bn3(self.project(y))

    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Hardswish(), Block(8, 16), Block(8, 16),
                         nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), image(size=16)  # fmt: skip


@network
def activations() -> Case:
    kinds = [nn.PReLU(), nn.PReLU(6), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.Softplus(), nn.Mish(), nn.Hardsigmoid(), nn.CELU(),
             nn.Softsign(), nn.LogSigmoid(), nn.Hardtanh(-0.5, 0.7), nn.GELU(approximate="tanh"), nn.GLU(1)]  # fmt: skip
    layers: list[nn.Module] = []
    for index, kind in enumerate(kinds):
        layers += [nn.Conv2d(3 if not index else 6, 6, 1), kind]
    return nn.Sequential(*layers), image(size=6)


@network
def channel_shuffle() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 4, 3, padding=1, groups=4),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            left, right = x.chunk(2, dim=1)
            y = torch.cat([left, self.b(self.a(right).relu())], 1)
            n, c, h, w = y.shape
            return self.head(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    return M(), image()


@network
def convnext() -> Case:
    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.dw, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
            self.up, self.down, self.scale = (
                nn.Linear(c, 4 * c),
                nn.Linear(4 * c, c),
                nn.Parameter(torch.full((c,), 0.3)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
            return x + (self.scale * y).permute(0, 3, 1, 2)

    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8),
                         nn.Linear(8, 4)), image(size=16)  # fmt: skip


@network
def multihead_attention() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.attention(x, x, x, need_weights=False)
            return self.head(x + y)

    return M(), torch.randn(2, 5, 16)


@network
def multihead_attention_weights() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, kdim=8, vdim=12)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return self.attention(q, k, v)

    return M(), (torch.randn(5, 2, 16), torch.randn(6, 2, 8), torch.randn(6, 2, 12))


@network
def transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)


@network
def transformer_masked() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True),
                1,
                enable_nested_tensor=False,
            )
            self.head = nn.Linear(16, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)[:, 0])

    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return M(), {"ids": torch.randint(0, 20, (2, 6)), "mask": mask}


@network
def transformer_decoder() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.decoder(
                x, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True
            )

    return M(), (torch.randn(2, 5, 16), torch.randn(2, 7, 16))


@network
def vit() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
            self.position = nn.Parameter(torch.randn(1, 10, 16))
            self.layer, self.norm, self.head = (
                nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True),
                nn.LayerNorm(16),
                nn.Linear(16, 4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
            return self.head(self.norm(self.layer(x))[:, 0])

    return M(), image()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kv, self.size, self.kind = heads, kv_heads, width // heads, kind
        self.q, self.k = (
            nn.Linear(width, width, bias=False),
            nn.Linear(width, kv_heads * self.size, bias=False),
        )
        self.v, self.o = nn.Linear(width, kv_heads * self.size, bias=False), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.kind == "rope":
            angle = torch.arange(t)[:, None] / 10 ** torch.arange(0, 1, 2 / self.size)
            cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
            q, k = (u * cos + torch.cat(torch.chunk(u, 2, -1)[::-1], -1) * sin for u in (q, k))
        if self.kind == "einsum":
            p = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(self.size), -1)
            y = torch.einsum("bhqk,bhkd->bhqd", p, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


@network
def gpt_block() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(20, 16), nn.Embedding(8, 16)
            self.norm, self.attention = nn.LayerNorm(16), Attention(16, 4, 2, "rope")
            self.up, self.down, self.head = (
                nn.Linear(16, 32),
                nn.Linear(32, 16),
                nn.Linear(16, 20, bias=False),
            )
            self.head.weight = self.token.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
            x = x + self.attention(self.norm(x))
            return self.head(x + self.down(F.gelu(self.up(x), approximate="tanh")))

    return M(), torch.randint(0, 20, (2, 6))


@network
def einsum_attention() -> Case:
    return nn.Sequential(Attention(16, 4, 4, "einsum"), nn.LayerNorm(16), nn.Linear(16, 3)), torch.randn(
        2, 6, 16
    )


@network
def einsum_weight() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 4, 5)), nn.Parameter(torch.randn(6, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.einsum("bd,dhk->bhk", x, self.w)
            return y.flatten(1) @ self.v.t() + (self.v.mean() * 0.1)

    return M(), torch.randn(3, 8)


@network
def bool_mask() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=keep))

    keep = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    return M(), (torch.randn(2, 5, 12), keep)


@network
def shared_linear() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            return self.b(self.shared(self.shared(x).relu()) + x)

    return M(), torch.randn(3, 6)


@network
def pyramid() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down, self.shared, self.bn = (
                nn.Conv2d(3, 8, 3, padding=1),
                nn.Conv2d(8, 8, 3, 2, 1),
                nn.Conv2d(8, 4, 3),
                nn.BatchNorm2d(4),
            )

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            a = self.stem(x).relu()
            b = self.down(a).relu()
            return [self.bn(self.shared(level)).relu() for level in (a, b)]

    return M(), image()


@network
def tied_transposed() -> Case:
    """An autoencoder whose decoder uses the encoder's weight transposed."""

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(torch.relu(self.encode(x)), self.encode.weight.t())

    return M(), torch.randn(3, 10)


@network
def sliced_weight() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.w.chunk(2)
            return F.linear(F.linear(x, a).relu(), b)

    return M(), torch.randn(3, 6)


@network
def weight_norm() -> Case:
    from torch.nn.utils import parametrizations

    return nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 6, 3)), nn.ReLU(), parametrizations.spectral_norm(nn.Conv1d(6, 4, 3)),
                         nn.Flatten(), parametrizations.orthogonal(nn.Linear(24, 4))), torch.randn(2, 3, 10)  # fmt: skip


@network
def functional() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b, self.m = (
                nn.Parameter(torch.randn(6, 3, 3, 3)),
                nn.Parameter(torch.randn(6)),
                nn.Parameter(torch.randn(6, 4)),
            )
            self.register_buffer("fixed", torch.randn(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.conv2d(x, self.w, self.b, stride=(2, 1), padding=(1, 0)).relu().mean((2, 3))
            return torch.addmm(torch.ones(5), y @ self.m, self.fixed)

    return M(), image()


@network
def padding_modes() -> Case:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
                         nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                         nn.Conv2d(4, 2, 4, padding="same"), nn.Conv2d(2, 2, 3, padding="valid")), image()  # fmt: skip


@network
def three_dimensional() -> Case:
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 1), nn.Flatten(),
                         nn.Linear(108, 3)), torch.randn(2, 2, 6, 6, 6)  # fmt: skip


@network
def nested_names() -> Case:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict(
                {"a|b,c": nn.Linear(6, 6), "a b:c/d": nn.Linear(6, 6), "~ü": nn.Linear(6, 6)}
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers.values():
                x = layer(x).relu()
            return x

    deep: nn.Module = nn.Linear(6, 6)
    for _ in range(30):
        deep = nn.Sequential(deep)
    return nn.Sequential(nn.Sequential(nn.Sequential(Odd()), Odd()), deep, nn.Linear(6, 2)), torch.randn(2, 6)


@network
def dict_in_dict_out() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)

        def forward(self, left: torch.Tensor, right: dict[str, torch.Tensor]) -> dict[str, Any]:
            y = self.a(left) + self.b(right["x"]) * right["y"]
            return {"sum": y, "both": (y, left), "nothing": None, "relu": [y.relu()]}

    return M(), {"left": torch.randn(2, 6), "right": {"x": torch.randn(2, 5), "y": torch.randn(2, 1)}}


@network
def kwargs_out_of_order() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) - 2 * self.b(y)

    return M(), {"y": torch.randn(2, 5), "x": torch.randn(2, 6)}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="tests.networks.Output")


@network
def dataclass_out() -> Case:
    return Apply(lambda self, x: Output(self.a(x)), a=nn.Linear(4, 3)), torch.randn(2, 4)


@network
def unit_is_output() -> Case:
    """One tensor returned twice and read by another unit; an input returned; a view of it returned."""

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            z = self.b(y)
            return y, y, x, z, x.view(-1, 2), y

    return M(), torch.randn(2, 4)


@network
def same_input_for_many() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) * self.k(x) + self.v(x.relu())

    return M(), torch.randn(3, 6)


@network
def matmul_with_itself() -> Case:
    return Apply(
        lambda self, x: self.a(x) @ self.a(x).transpose(1, 2) @ x + torch.bmm(x, x.mT) @ x, a=nn.Linear(6, 6)
    ), torch.randn(2, 4, 6)


@network
def unused_and_buffers() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.unused, self.frozen = (
                nn.Linear(4, 4),
                nn.Linear(9, 9),
                nn.Parameter(torch.randn(4), requires_grad=False),
            )
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("count", torch.tensor(3))
            self.register_buffer("temporary", torch.randn(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a((x - self.mean) / self.count) * self.frozen + self.temporary

    return M(), torch.randn(2, 4)


@network
def norms() -> Case:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True),
                         nn.Conv2d(8, 4, 1), nn.LocalResponseNorm(2), nn.Flatten(2), nn.RMSNorm(64), nn.Linear(64, 2)), image()  # fmt: skip


@network
def wide_reshapes() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shuffle, self.out = (
                nn.Conv2d(3, 16, 3, padding=1),
                nn.PixelShuffle(2),
                nn.Conv2d(4, 3, 3),
            )
            self.unfold = nn.Linear(36, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.out(F.pad(self.shuffle(self.conv(x)), (1, 1, 0, 2)))
            z = self.unfold(y[:, :, ::2, ::2].flatten(2)[..., :36].roll(1, -1))
            top, index = z.topk(2)
            return (
                top,
                index,
                z.argmax(-1),
                torch.where(z > 0, z, -z).amax(1).cumsum(-1),
                y.flip(-1).split([1, 2], 1),
            )

    return M(), image()


@network
def in_place() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y.clamp_(min=0).mul_(2)
            y[:, 0] = 0
            z = self.b(y)
            z += y
            return z

    return M(), image()


@network
def gru() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    return M(), torch.randn(2, 5, 6)


@network
def lstm() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = (
                nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True),
                nn.Linear(16, 3),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0].mean(1))

    return M(), torch.randn(2, 5, 6)


@network
def gru_cell() -> Case:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(x.shape[0], 8)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.head(h)

    return M(), torch.randn(2, 3, 6)


@network
def bilinear() -> Case:
    return Apply(lambda self, x, y: self.c(self.b(x, y)), b=nn.Bilinear(4, 5, 6), c=nn.Linear(6, 2)), (
        torch.randn(2, 4),
        torch.randn(2, 5),
    )


@network
def constant_inputs() -> Case:
    """Dead channels, an all-zero activation, and a Python number among the inputs."""

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            with torch.no_grad():
                self.a.weight.zero_()
                self.a.bias.fill_(-1)
                self.b.weight[1] = 0

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return self.b(self.a(x).relu()) * scale

    return M(), (image(), 2.0)


def _hf(name: str, config: str, inputs: Any, **options: Any) -> Case:
    import transformers

    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    return model, inputs


def ids(batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, 5:] = 0
    return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}


@network
def hf_bert() -> Case:
    return _hf("BertModel", "BertConfig", ids(), vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
               intermediate_size=32, max_position_embeddings=16)  # fmt: skip


@network
def hf_bert_eager() -> Case:
    return _hf("BertForSequenceClassification", "BertConfig", ids(), vocab_size=50, hidden_size=16, num_hidden_layers=1,
               num_attention_heads=2, intermediate_size=32, max_position_embeddings=16, attn_implementation="eager")  # fmt: skip


@network
def hf_distilbert() -> Case:
    return _hf("DistilBertForSequenceClassification", "DistilBertConfig", ids(), vocab_size=50, dim=16, n_layers=1, n_heads=2,
               hidden_dim=32, max_position_embeddings=16)  # fmt: skip


@network
def hf_gpt2() -> Case:
    return _hf("GPT2LMHeadModel", "GPT2Config", ids(), vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
               use_cache=False)  # fmt: skip


@network
def hf_llama() -> Case:
    return _hf("LlamaForCausalLM", "LlamaConfig", ids(), vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
               num_key_value_heads=2, intermediate_size=32, max_position_embeddings=16, use_cache=False)  # fmt: skip


@network
def hf_vit() -> Case:
    return _hf("ViTForImageClassification", "ViTConfig", {"pixel_values": image()}, image_size=12, patch_size=4, hidden_size=16,
               num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)  # fmt: skip


@network
def hf_mobilenet_v2() -> Case:
    return _hf("MobileNetV2ForImageClassification", "MobileNetV2Config", {"pixel_values": image(size=32)}, image_size=32,
               depth_multiplier=0.1, min_depth=4, depth_divisible_by=4)  # fmt: skip


@network
def hf_convnext() -> Case:
    return _hf("ConvNextForImageClassification", "ConvNextConfig", {"pixel_values": image(size=32)}, hidden_sizes=[8, 8, 12, 12],
               depths=[1, 1, 1, 1])  # fmt: skip


@network
def hf_t5_encoder() -> Case:
    return _hf(
        "T5EncoderModel",
        "T5Config",
        ids(),
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        use_cache=False,
    )


def leaves(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]

"""Seconds and memory of finding the channel order, refitting weights and scoring, on networks of random weights.

    python scripts/bench/refitting.py resnet:1,1,1,1 resnet:3,4,23,3 bert:3 bert:12

`resnet:A,B,C,D` has that many bottleneck blocks of the usual widths (3,4,23,3 is like ResNet-101), `bert:N` N encoder layers as
wide as BERT-base's. Widths are half and three quarters of every channel group, variants fp32 and int8.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hwsearch.compress.bank import WeightBank
from hwsearch.compress.gram import Grams
from hwsearch.compress.importance import order_slots
from hwsearch.loss.measure import measure_sensitivity
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.task import Task


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, and what was there before."""

    def __init__(self, c: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        layers: list[nn.Module] = []
        for a, b, size, step in ((c, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)):
            layers += [nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        same = c == out and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet(blocks: list[int], size: int, classes: int = 1000) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for i in range(count):
            layers.append(Bottleneck(channels, width, 2 if i == 0 and stage else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Encoder(nn.Module):
    """A layer of BERT-base."""

    def __init__(self, wide: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(wide, wide) for _ in range(4))
        self.up, self.down = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)
        self.norm1, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).reshape(n, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = ((q @ k.transpose(2, 3)) * (c // self.heads) ** -0.5).softmax(-1) @ v
        x = self.norm1(x + self.o(mixed.transpose(1, 2).reshape(n, t, c)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Bert(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, 768)
        self.layers = nn.Sequential(*(Encoder() for _ in range(layers)))
        self.head = nn.Linear(768, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(self.words(ids)).mean(1))
        return found


def task(name: str, samples: int, size: int) -> Task:
    torch.manual_seed(0)
    kind, _, shape = name.partition(":")
    model: nn.Module
    if kind == "resnet":
        model = resnet([int(n) for n in shape.split(",")], size)
        batches = [torch.randn(8, 3, size, size) for _ in range(samples // 8)]
    else:
        model = Bert(int(shape))
        batches = [torch.randint(0, 30522, (8, 128)) for _ in range(samples // 8)]
    return Task(model.eval(), batches[0][:1].clone(), batches, lambda predict: 0.0, name)


@contextmanager
def stage(name: str) -> Iterator[None]:
    begun, cpu = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {name}: {time.perf_counter() - begun:.1f} s, CPU {time.process_time() - cpu:.1f} s, peak {peak:.2f} GB", flush=True)


def measure(name: str, samples: int, size: int) -> None:
    begun = time.perf_counter()
    print(f"{name}, {samples} samples", flush=True)
    with stage("tracing and ranges"):
        low = Lowering(task(name, samples, size))
        network = low.network
    grid = {g: [n, -(-3 * n // 4), -(-n // 2)] for g, n in network.channels.items()}
    with stage("Gram matrices"):
        grams = Grams(low.fitting, [u.name for u in network.units])
    with stage("order of slots"):
        order = order_slots(low.fitting, grams=grams)
    with tempfile.TemporaryDirectory() as folder:
        bank = WeightBank(Path(folder) / "weights", low.traced, low.fitting, order, grams=grams)
        with stage("refitting for widths"):
            bank.build(grid)
        with stage("refitting for int8"):
            bank.build({}, ["int8"])
        with stage("sensitivities"):
            measure_sensitivity(low, Path(folder) / "s.json", variants=[Variant("int8")], grid=grid, bank=bank)
    print(f"  {len(network.units)} units, {len(network.channels)} groups, in all {time.perf_counter() - begun:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="of images")
    args = parser.parse_args()
    for name in args.networks:
        measure(name, args.samples, args.size)


if __name__ == "__main__":
    main()

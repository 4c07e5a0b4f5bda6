"""A small trained task on which cutting channels hurts, for recovery; and its allocations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from networks import leaves
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.compress.widths import Kept
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.variants import Variant, uniform
from hwsearch.recovery.processes import Processes
from hwsearch.recovery.recovery import Options, Recovered, Recovery

CLASSES = 8
RATE = 2e-3


class Net(nn.Module):
    """A residual CNN of a few thousand weights for images of 2 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 24, 3, stride=2)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        logits: torch.Tensor = self.head(F.relu(self.last(x)).mean((2, 3)))
        return logits


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes of one of four directions, and which."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angle = labels.view(-1, 1, 1, 1) * torch.pi / CLASSES
    down, across = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    shift = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=random)
    stripes = torch.sin(1.2 * (across * angle.cos() + down * angle.sin()) + shift)
    return stripes + 2 * torch.randn(count, 2, 8, 8, generator=random), labels


def train(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sixteen batches of 64."""
    x, y = images(1024, seed=0)
    for batch in torch.randperm(1024, generator=torch.Generator().manual_seed(epoch)).split(64):
        yield x[batch], y[batch]


@cache
def trained() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for epoch in range(6):
            for x, y in train(epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    return model.eval()


def task(**changes: Any) -> hs.Task:
    """Without training data unless they are given."""
    calibration, _ = images(512, seed=1)
    x, y = images(256, seed=2)

    def evaluate(predict: hs.task.Predict) -> float:
        return float((predict(x).argmax(1) == y).float().mean())

    fields: dict[str, Any] = {
        "model": trained(), "example_inputs": calibration[:1], "calibration": list(calibration.split(64)), "evaluate": evaluate,
        "name": "stripes",
    }  # fmt: skip
    return hs.Task(**{**fields, **changes})


def with_data() -> hs.Task:
    """For the command line: with training data."""
    return task(train=train, loss=F.cross_entropy)


@cache
def lowering(data: bool = False) -> Lowering:
    return Lowering(with_data() if data else task())


@cache
def start(precision: str = "int8", share: float = 0.25, data: bool = False) -> tuple[Lowering, Kept, dict[str, Variant]]:
    """(the network with refitted weights, the slots that stay, the variants) at a share of all widths."""
    whole = lowering(data)
    widths = {g: max(1, round(share * n)) for g, n in whole.network.channels.items()}
    variants = uniform(whole.network, precision)
    if share == 1.0:
        return refitted(whole, variants), {}, variants
    bank = weight_bank(whole)
    return refitted(whole, variants, widths, bank), bank.kept(widths), variants


def recover(
    data: bool = False, precision: str = "int8", out: Path | None = None, processes: Processes | None = None, **options: Any
) -> Recovered:
    first, kept, variants = start(precision, data=data)
    fields = {"epochs": 4, "rate": RATE, **options}
    return Recovery(lowering(data), first, kept, variants, Options(**fields), out=out, processes=processes).run()


def off(low: Lowering, variants: Mapping[str, Variant], samples: Iterable[torch.Tensor] | None = None) -> float:
    """How far the engine is from the simulation, relatively (root mean square over samples and outputs); by default over images."""
    engine = ONNXRuntimeBackend().build(low.onnx(variants).SerializeToString(), BuildOptions(1, "fp32"))
    distance = whole = 0.0
    for sample in images(64, seed=3)[0].split(1) if samples is None else samples:
        simulated = leaves(low.simulator(low.traced, (sample,), {}, quantize_outputs=False)(variants))
        for have, want in zip(engine(sample.numpy()), simulated, strict=True):
            distance += float((torch.from_numpy(have) - want).square().sum())
            whole += float(want.square().sum())
    return (distance / whole) ** 0.5

"""Two networks of a few thousand weights whose channels, heads and neurons may go, as tasks and made ready."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.lowering.lowering import Lowering

CLASSES = 5


class CNN(nn.Module):
    """A residual block between a stem and a head; groups of 24 (stem and conv2), 20 (conv1) and 16 channels (conv3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.conv1 = nn.Conv2d(24, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(20, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


class Transformer(nn.Module):
    """One block on 6 tokens of 16 features: groups of 4 heads and of 32 hidden neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def inputs(name: str, batch: int) -> torch.Tensor:
    if name == "cnn":
        return torch.randn(batch, 3, 8, 8)
    return torch.randint(0, 11, (batch, 6))


@cache
def lowering(name: str) -> Lowering:
    """`cnn` or `transformer`, with random weights, traced and calibrated; one sample a batch is deployed."""
    return Lowering(task(name))


@cache
def task(name: str) -> hs.Task:
    """The same as a task."""
    torch.manual_seed(0)
    model = {"cnn": CNN, "transformer": Transformer}[name]().eval()
    if isinstance(model, CNN):
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
        assert model.norm.running_var is not None
        model.norm.running_var.uniform_(0.5, 2.0)
    x, y = inputs(name, 64), inputs(name, 32)
    with torch.no_grad():
        wanted = model(y).argmax(1)

    def evaluate(predict: hs.task.Predict) -> float:
        """How often the answer is that of the dense network."""
        return float((predict(y).argmax(1) == wanted).float().mean())

    return hs.Task(model, inputs(name, 1), [x, y], evaluate, name)


@cache
def cnn_at(size: int) -> hs.Task:
    """The same network on images of another height and width."""
    generator = torch.Generator().manual_seed(size)
    x, y = (torch.randn(n, 3, size, size, generator=generator) for n in (64, 32))
    old = task("cnn")
    with torch.no_grad():
        wanted = old.model(y).argmax(1)

    def evaluate(predict: hs.task.Predict) -> float:
        return float((predict(y).argmax(1) == wanted).float().mean())

    return hs.Task(old.model, x[:1], [x, y], evaluate, "cnn")


def larger() -> hs.Task:
    """For the command line: `tests/tiny.py:larger`, on images of 12 by 12."""
    return cnn_at(12)


def cnn() -> hs.Task:
    """For the command line: `tests/tiny.py:cnn`."""
    return task("cnn")

"""A task for hwsearch: a trained network with all that is needed to compress and score it.

It runs as it is:

    hwsearch run task.py:make_task --budget latency=50% --out out

Put your own network and data in the place of `Net` and `images`; the fields of `hs.Task` below stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import hwsearch as hs

WEIGHTS = Path(__file__).with_name("task_weights.pt")
CLASSES = 4


class Net(nn.Module):
    """A small residual CNN for images of 3 x 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.conv2(self.conv1(x).relu())).relu()
        logits: torch.Tensor = self.head(self.last(x).relu().mean((2, 3)))
        return logits


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes in one of four directions [count, 3, 32, 32], and which direction it is [count]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    angle = labels.view(-1, 1, 1, 1) * torch.pi / CLASSES
    shift = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=random)
    down, across = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    stripes = torch.sin(0.8 * (across * angle.cos() + down * angle.sin()) + shift)
    return stripes + 2.5 * torch.randn(count, 3, 32, 32, generator=random), labels


def trained() -> Net:
    """The network with its weights, which are trained once and then read from the file beside this one."""
    torch.manual_seed(0)
    model = Net()
    if not WEIGHTS.exists():
        x, y = images(1024, seed=0)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(60):
            batch = slice(32 * (step % 32), 32 * (step % 32) + 32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        torch.save(model.state_dict(), WEIGHTS)
    model.load_state_dict(torch.load(WEIGHTS))
    return model


def make_task() -> hs.Task:
    """What `task.py:make_task` names: called without arguments, it returns the task."""
    calibration, _ = images(256, seed=1)
    test, labels = images(512, seed=2)
    others, their_labels = images(512, seed=3)

    def accuracy(predict: hs.task.Predict, x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(int((predict(x[i : i + 64]).argmax(1) == y[i : i + 64]).sum()) for i in range(0, len(x), 64)) / len(x)

    def train(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, shuffled anew: the same ones whenever the same epoch is asked for."""
        x, y = images(1024, seed=0)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64):
            yield x[batch], y[batch]

    return hs.Task(
        # The trained module. It is put in eval mode, and its weights are never changed.
        model=trained(),
        # One input: a tensor, a tuple (positional) or a dict (keyword arguments) of tensors. Dimension 0 is the batch;
        # its size here is the batch that is profiled and deployed.
        example_inputs=calibration[:1],
        # Batches of the same form, of any batch size, without labels. A few hundred samples or more: weights are refitted
        # on the first three quarters of them, losses measured on the last.
        calibration=list(calibration.split(64)),
        # The score, higher is better. It is called with the module and with compiled networks, which take the same inputs.
        evaluate=lambda predict: accuracy(predict, test, labels),
        # Shown in reports and stored in tables.
        name="stripes",
        # How outputs are compared with those of the dense network: "kl" for logits, "mse" for numbers, "auto" takes "kl"
        # where the last dimension has two classes or more.
        divergence="auto",
        # What named the task. `hs.load`, and so every command, writes it here: leave it empty.
        spec="",
        # For `hwsearch recover`, which trains what the search chose: called with the number of an epoch, it gives batches of
        # (inputs, target).
        train=train,
        # What training makes small, of outputs and target. Leave train and loss out where there are no labels: recovery then
        # trains towards the outputs of the dense network.
        loss=nn.functional.cross_entropy,
        # The same score on other data, by which `hwsearch run --floor` scores its samples, so that `evaluate` chooses nothing.
        # Leave it out where there are no more labels: samples are then scored by agreement with the dense network.
        validate=lambda predict: accuracy(predict, others, their_labels),
        # How many samples `evaluate` scores, where the score is a share of them: its noise is known then.
        scored=len(test),
        # How many samples `validate` scores.
        validated=len(others),
    )

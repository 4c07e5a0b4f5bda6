#!/usr/bin/env python
"""Condensa's two headlines on Fashion-MNIST: memory by `Compose(Prune, Quantize)`, throughput by `FilterPrune`, both trained.

A VGG-like network (six 3x3 convolutions in three stages, two linear layers, BatchNorm) is trained on the training images but the
last 5,000, which samples are scored on (`validate`); the answer is scored on the 10,000 test images, which chose nothing. Then
`hs.bayes` finds, in at most ten samples, each trained by `--recover`, what is smallest or fastest at a floor of one point below the
dense score. Printed: bytes of the values that are not zero and packed bytes, times fewer than dense, and the measured speed-up
beside what Condensa reports (188x and 2.59x: Joseph et al., IEEE Micro 2020, on other networks and data). With --methods also the
couplings at equal minibatches, at single densities: `mask` is the rival of `lc`.

What was measured is kept in `--out`: the same command goes on where it was stopped.

    scripts/fetch_zoo fashion_resnet
    python scripts/bench/condensa.py --recover lc:time=4m
    python scripts/bench/condensa.py --methods --densities 0.05 0.02 0.01 --epochs 1 --seeds 0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import common
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hwsearch as hs
from hwsearch.errors import BudgetMissed
from hwsearch.lowering.lowering import Lowering
from hwsearch.pipeline.tuning import Tuned
from hwsearch.progress import Progress
from hwsearch.recovery.recovery import Options, SchemeRecovery
from hwsearch.schemes import Compose, FilterPrune, Free, Prune, Quantize
from hwsearch.zoo import fashion_resnet as zoo

KEPT_APART, BATCH, SMOOTHING = 5_000, 128, 0.1
MEMORY, SPEED = 188.0, 2.59
"""Condensa's."""
SCHEMES = {
    "memory": (Compose(Prune(Free("density", 0.002, 0.2)), Quantize("int8")), "size"),
    "throughput": (FilterPrune(Free("filters", 0.1, 1.0), align=8, normalise=True), "latency"),
}


class VGG(nn.Module):
    """[n, 1, 28, 28] -> [n, 10] logits; 1.5 M parameters, most of them in the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in (32, 64, 128):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(9 * channels, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x))
        return logits


def split() -> tuple[torch.Tensor, torch.Tensor]:
    """All training images as bytes, and their labels."""
    images, labels = zoo._fetched(*zoo.TRAINING)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def task(out: Path, epochs: int) -> hs.Task:
    """The network, trained, or with the weights that are there."""
    pixels, labels = split()
    own, own_labels = pixels[:-KEPT_APART], labels[:-KEPT_APART]
    last, last_labels = zoo.normalise(pixels[-KEPT_APART:]), labels[-KEPT_APART:]
    images, classes = zoo._fetched(*zoo.TEST)
    test, test_labels = zoo.normalise(images.copy()), torch.from_numpy(classes.astype(np.int64))

    def train(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(own), generator=random)[: len(own) // BATCH * BATCH]
        for batch in order.split(BATCH):
            yield zoo.augment(zoo.normalise(own[batch]), random), own_labels[batch]

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target, label_smoothing=SMOOTHING)

    model, weights = VGG(), out / "vgg.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        fit(model, train, loss, epochs, len(own) // BATCH)
        out.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), weights)
    model.load_state_dict(load_file(weights))
    return hs.Task(
        model=model.eval(), example_inputs=test[:1].clone(), calibration=list(zoo.normalise(own[:1024]).split(128)),
        evaluate=lambda predict: zoo.accuracy(predict, test, test_labels), scored=len(test), name="vgg", train=train, loss=loss,
        validate=lambda predict: zoo.accuracy(predict, last, last_labels), validated=KEPT_APART,
    )  # fmt: skip


def fit(model: nn.Module, train: hs.task.Train, loss: hs.task.Loss, epochs: int, steps: int) -> None:
    """AdamW under a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * steps)
    model.train()
    for epoch in range(epochs):
        began, total = time.perf_counter(), 0.0
        for x, y in train(epoch):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        took = time.perf_counter() - began
        print(f"dense network, epoch {epoch + 1} of {epochs}: loss {total / steps:.4f}, {took:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-condensa"))
    parser.add_argument("--dense-epochs", type=int, default=6)
    parser.add_argument("--floor", default="-1pt")
    parser.add_argument("--recover", default="lc:epochs=2", help="as of `hwsearch bayes`")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="*", help="the couplings at equal minibatches instead; by default mask and lc")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.02, 0.01])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    common.say_machine()
    own = task(args.out, args.dense_epochs)
    assert own.validate is not None
    scores = own.evaluate(own.model), own.validate(own.model)
    print(f"dense: {scores[0]:.4f} on 10,000 test images, {scores[1]:.4f} on 5,000 kept apart", flush=True)
    if args.methods is not None:
        compare(own, args)
        return
    for name in args.schemes:
        scheme, objective = SCHEMES[name]
        folder = args.out / f"{name}-{args.floor}-{args.recover.replace(':', '-')}"
        try:
            found = hs.bayes(
                own, scheme, folder, floor=args.floor, minimize=objective, samples=args.samples, recover=args.recover,
                progress=Progress(),
            )  # fmt: skip
        except BudgetMissed as error:
            found = error.nearest
        tell(name, found)


def tell(name: str, found: Tuned) -> None:
    """What the headline is of."""
    print(found)
    answer = next((s for s in found.floor["samples"] if s["answer"]), None)
    if answer is None:
        print(f"{name}: the dense network")
        return
    dense = found.dense["size"]
    print(
        f"{name}: values that are not zero {answer['bytes']['nonzero']:,} bytes, {dense / answer['bytes']['nonzero']:.0f}x fewer "
        f"(Condensa {MEMORY:g}x); packed {answer['bytes']['packed']:,} bytes, {dense / answer['bytes']['packed']:.0f}x fewer; "
        f"{found.dense['latency'] / found.measured['latency']:.2f}x as fast, measured (Condensa {SPEED:g}x)",
        flush=True,
    )


def compare(own: hs.Task, args: argparse.Namespace) -> None:
    """`mask` and `lc` at equal minibatches: scores on the test images."""
    whole = Lowering(own)
    for density in args.densities:
        made = SCHEMES["memory"][0](own, density=density)
        way, start = made.trainable(), own.evaluate(made.task.model)
        for method in args.methods or ("mask", "lc"):
            scores, losses = [], []
            for seed in args.seeds:
                options = Options(epochs=args.epochs, method=method, seed=seed, scored=False)
                done = SchemeRecovery(whole, way, options, progress=Progress()).run()
                scores.append(own.evaluate(made.trained(done.lowering).task.model))
                losses.append(done.course.least)
            each = ", ".join(f"{s:.4f}" for s in scores)
            print(
                f"density {density:g}, int8, {args.epochs} epoch(s), {method}: {each} (mean {np.mean(scores):.4f}; untrained "
                f"{start:.4f}); held-out loss {np.mean(losses):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

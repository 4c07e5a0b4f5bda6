#!/usr/bin/env python3
"""Train zoo:fashion_resnet and write its weights and data slice into hwsearch/zoo/data.

    scripts/train_fashion_resnet.py [--epochs 10] [--seed 0] [--processes 2]

Takes 20-25 minutes on two idle cores with AMX (bfloat16 autocast). AdamW under a one-cycle schedule, shifts,
flips and erased rectangles, label smoothing; what is saved is an exponential moving average of the weights at
the end of the last epoch, so the test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hwsearch.zoo import fashion_resnet as zoo  # noqa: E402
from hwsearch.zoo._cache import cache_dir  # noqa: E402

BATCH = 256
CALIBRATION, EVALUATION = 1024, 5000


def idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped idx file of unsigned bytes (LeCun's MNIST format): two zeros, type 8, rank, sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\0\0\x08", path
    shape = np.frombuffer(raw, ">u4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()


def dataset() -> dict[str, NDArray[np.uint8]]:
    """The four arrays of Fashion-MNIST, fetched into the cache if they are not there."""
    folder = cache_dir("fashion_resnet")
    names = {
        f"{split}_{kind}": f"{'t10k' if split == 'test' else 'train'}-{kind}-idx{rank}-ubyte.gz"
        for split in ("train", "test")
        for kind, rank in (("images", 3), ("labels", 1))
    }
    if not all((folder / file).is_file() for file in names.values()):
        subprocess.run([sys.executable, ROOT / "scripts" / "fetch_zoo", "fashion_resnet"], check=True)
    return {name: idx(folder / file) for name, file in names.items()}


def save(model: zoo.FashionResNet, output: Path) -> None:
    """Matrices in float16; vectors (BatchNorm, biases) as they are."""
    state = {k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in model.state_dict().items()}
    partial = output / "fashion_resnet.safetensors.partial"
    partial.write_bytes(serialise(state))
    partial.replace(output / "fashion_resnet.safetensors")


def train(rank: int, args: argparse.Namespace, data: dict[str, NDArray[np.uint8]]) -> None:
    """One of `args.processes` workers, each on its share of every batch, gradients averaged.

    Two processes of one thread each are faster than one of two, and much faster where others use the machine.
    The first prints the time and the test accuracy of every epoch and saves the averaged network after it.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{args.store}", rank=rank, world_size=args.processes)
    torch.manual_seed(args.seed)
    order_of = torch.Generator().manual_seed(args.seed)
    generator = torch.Generator().manual_seed(1000 * args.seed + rank)
    images, labels = normalised(data, "train")
    test = normalised(data, "test")
    model = zoo.FashionResNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = copy.deepcopy(model).eval()
    steps = len(images) // BATCH
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors}], weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs=args.epochs, steps_per_epoch=steps)
    begin = time.monotonic()
    for epoch in range(args.epochs):
        order = torch.randperm(len(images), generator=order_of)
        total = 0.0
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH][rank :: args.processes]
            x = zoo.augment(images[rows], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for g, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(mean.view(g.shape) / args.processes)
            optimizer.step()
            schedule.step()
            total += loss.item()
            done = epoch * steps + step
            keep = min(0.998, (1 + done) / (10 + done))
            with torch.no_grad():
                for mean, now in zip(
                    averaged.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    if mean.is_floating_point():
                        mean.lerp_(now, 1 - keep)
        if rank == 0:
            save(averaged, args.output)
            score = zoo.accuracy(averaged, *test)
            seconds = time.monotonic() - begin
            print(
                f"epoch {epoch + 1}  loss {total / steps:.4f}  test {score:.4f}  {seconds:.0f} s", flush=True
            )
    dist.destroy_process_group()


def normalised(data: dict[str, NDArray[np.uint8]], split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28] and labels [n] of a split."""
    return zoo.normalise(data[f"{split}_images"]), torch.from_numpy(data[f"{split}_labels"]).long()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="workers of one thread each")
    parser.add_argument(
        "--output", type=Path, default=zoo.DATA, help="folder for the weights and the data slice"
    )
    args = parser.parse_args()
    data = dataset()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(args.seed).choice(60_000, CALIBRATION, replace=False)
    np.savez_compressed(
        args.output / "fashion_mnist.npz",
        calibration_images=data["train_images"][rows],
        calibration_labels=data["train_labels"][rows],
        evaluation_images=data["test_images"][:EVALUATION],
        evaluation_labels=data["test_labels"][:EVALUATION],
    )
    with tempfile.TemporaryDirectory() as folder:
        args.store = f"{folder}/store"
        mp.spawn(train, (args, data), args.processes)
    model = zoo.FashionResNet().eval()
    model.load_state_dict(load_file(args.output / "fashion_resnet.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    score = zoo.accuracy(model, *normalised(data, "test"))
    print(f"{parameters:,} parameters; accuracy as stored, on all 10,000 test images: {score:.4f}")


if __name__ == "__main__":
    main()

"""How torch multiplies fp32 and chooses convolutions, set while something is launched and put back after.

Source: torch's notes on CUDA semantics ("TensorFloat-32", from 2.9 on by `fp32_precision`; reading or setting `allow_tf32`
beside it is an error there) and on `torch.backends.cudnn.benchmark`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TRIED = 4
"""Algorithms that cuDNN times for each new shape, in the order of its own guess. Ten, torch's default, take 50 to 60 ms a shape
on an H100 (`scripts/gpu_trial.py kernels`), and every width is a new shape."""


@contextmanager
def arithmetic(base: str) -> Iterator[None]:
    """fp32 products in tf32 for that base and in full else; convolutions by the fastest algorithm, which cuDNN finds by timing.

    The flags are the process's own: other threads would see them.
    """
    backends: Any = torch.backends
    multiplied = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [flag.fp32_precision for flag in multiplied]
    timed, limit = backends.cudnn.benchmark, backends.cudnn.benchmark_limit
    try:
        for flag in multiplied:
            flag.fp32_precision = "tf32" if base == "tf32" else "ieee"
        backends.cudnn.benchmark = True
        backends.cudnn.benchmark_limit = TRIED
        yield
    finally:
        for flag, value in zip(multiplied, before, strict=True):
            flag.fp32_precision = value
        backends.cudnn.benchmark, backends.cudnn.benchmark_limit = timed, limit

#!/usr/bin/env python
"""Issue 5's bars on builds without a GPU: every variant and ten mixed allocations of the zoo networks on five targets.

Each is built by tensorrt_rtx or refused, and compared with what NVIDIA documents (`legality.py`); the bar is zero unexplained.
The ONNX file of each mixed allocation that holds only what OpenVINO and ONNX Runtime execute as well (no fp8, no nvfp4) is also run
by both, and their scores compared. Beside them stands on how many of 500 examples both predict the same class, how far their
outputs are apart (root mean square, relative), and the same of ONNX Runtime against itself without its optimizations, which
executes the file node by node as ONNX says: sums in float32 in another order put values next to a tie of the rounding to int8
on its other side, so that two runtimes cannot be closer to each other than one is to itself. As many allocations again hold
everything that some GPU executes, and are only built.

    python scripts/bench/targets.py                            # about an hour on one core, most of it scores of minilm
    python scripts/bench/targets.py zoo:fashion_resnet --allocations 3
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import common
import numpy as np
import onnxruntime
import torch
from torch.utils import _pytree as pytree

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import Array, BuildOptions, Engine
from hwsearch.backends.tensorrt.builder import serialise
from hwsearch.backends.tensorrt.buildlog import executed, fused_layers
from hwsearch.backends.typed import strongly_typed
from hwsearch.cli.printing import plainly
from hwsearch.deployment.evaluate import predictor, score
from hwsearch.deployment.targets import objections, otherwise, request_of, runtime, units_offered, verdicts
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.zoo import NAMES

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
BASES = ("fp16", "bf16", "fp32", "tf32")
RUNTIMES = ("openvino", "onnxruntime")
GPU_ONLY = ("fp8", "nvfp4")
"""Precisions that neither of them takes on a CPU."""
COMPARED = 500
"""Examples whose outputs are compared."""
Outputs = np.ndarray[Any, Any]


def main() -> None:
    parser = common.parser(__doc__, tasks=[f"zoo:{name}" for name in NAMES])
    parser.add_argument("--only", choices=("uniform", "mixed"), help="one of the two parts; both take long")
    parser.add_argument("--allocations", type=int, default=10)
    parser.add_argument(
        "--scored", type=int, default=10, help="score only so many of the allocations in both runtimes"
    )
    parser.add_argument("--targets", type=lambda text: text.split(","), default=TARGETS)
    parser.add_argument("--bases", type=lambda text: text.split(","), default=BASES)
    args = parser.parse_args()
    trt = runtime("tensorrt-rtx")
    print(f"tensorrt_rtx {trt.__version__}, targets {', '.join(args.targets)}")
    unexplained = apart = 0
    for spec in args.tasks:
        low = Lowering(hs.load(spec))
        print(f"\n{spec}: {len(low.network.units)} units")
        for base in args.bases if args.only != "mixed" else ():
            unexplained += uniform(trt, low, args.targets, base)
        if args.only != "uniform":
            off, worst = mixed(trt, low, args)
            unexplained, apart = unexplained + off, max(apart, worst)
    print(
        f"\nunexplained: {unexplained} (bar 0); scores of one file in two runtimes at most {100 * apart:.2f} points apart"
    )


def uniform(trt: object, low: Lowering, targets: Sequence[str], base: str) -> int:
    """Each variant wherever it may be; returns how many builds were not as documented."""
    start, unexplained, lines = time.perf_counter(), 0, Counter[str]()
    for v in verdicts(trt, low, targets, base):
        unexplained += not v.explained
        what = "built" if v.legal else f"refused ({v.documented or 'UNEXPLAINED'}): {plainly(v.reason)}"
        if v.legal and v.documented:
            what = f"built, UNEXPLAINED: {v.documented}"
        differing = Counter(text.partition("compiled to ")[2] for text in v.not_as_asked.values())
        also = ", ".join(f"{n} compiled to {p}" for p, n in differing.items())
        lines[
            f"{v.variant:12} {len(v.units):3} {'+'.join(v.ops):14} {what}{f' ({also})' if also else ''}\0{v.target}"
        ] += 1
    grouped: dict[str, list[str]] = {}
    for line in lines:
        text, _, target = line.partition("\0")
        grouped.setdefault(text, []).append(target)
    print(f" base {base} ({time.perf_counter() - start:.0f} s)")
    for text, where in grouped.items():
        print(f"  {','.join(where):28} {text}")
    return unexplained


def mixed(trt: object, low: Lowering, args: argparse.Namespace) -> tuple[int, float]:
    """Random allocations, the first half of them portable.

    Returns (builds not as documented, the largest difference of scores between two runtimes).
    """
    rng, unexplained, apart = random.Random(0), 0, 0.0
    targets, bases = args.targets, args.bases
    for number in range(2 * args.allocations):
        portable = number < args.allocations
        base = bases[number % len(bases)]
        plain = Variant("fp32" if base == "tf32" else base)
        choices = units_offered(low.network, base)
        if number // len(bases) % 2:  # one float precision, as a search on one GPU would have it
            choices = {v: units for v, units in choices.items() if v == plain or v.precision not in BASES}
        if portable:
            choices = {v: units for v, units in choices.items() if v.precision not in GPU_ONLY}
        variants = {
            u.name: rng.choice([v for v, units in choices.items() if u in units] or [plain])
            for u in low.network.units
        }
        typed = strongly_typed(low.onnx(variants), base).SerializeToString()
        said: dict[str, list[str]] = {}
        for target in targets:
            documented = objections(low.network, variants, base, target)
            try:
                built = serialise(trt, request_of(typed, base, target, variants))
                other = otherwise(variants, executed(fused_layers(built.log)), built.log, target)
                what = f"built, {len(other)} units compiled to another precision"
                right = not documented
            except BackendUnavailable as error:
                what, right = f"refused: {plainly(str(error).partition(': ')[2])}", bool(documented)
            unexplained += not right
            said.setdefault(what if right else f"UNEXPLAINED {what}", []).append(target)
        scores, told = in_runtimes(low, variants) if number < min(args.scored, args.allocations) else ({}, "")
        apart = max(apart, max(scores.values()) - min(scores.values())) if scores else apart
        kinds = Counter(map(str, variants.values()))
        print(
            f" mixed {number}, base {base}: {dict(kinds)}{f'; scores {scores}; {told}' if scores else ''}",
            flush=True,
        )
        for what, where in said.items():
            print(f"  {','.join(where):28} {what}")
    return unexplained, apart


class AsWritten:
    """ONNX Runtime without optimizations: each node by itself, Q/DQ in float32."""

    def __init__(self, data: bytes, like: Engine) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.inputs = like.inputs
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def __call__(self, *arrays: Array) -> list[Array]:
        names = (spec.name for spec in self.inputs)
        return list(self._session.run(None, dict(zip(names, arrays, strict=True))))


class Recorded:
    """A predictor that keeps its first inputs and outputs."""

    def __init__(self, predict: Callable[..., Any]) -> None:
        self.predict, self.calls, self.kept = predict, list[tuple[Any, Any]](), list[Outputs]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.predict(*args, **kwargs)
        if sum(map(len, self.kept)) < COMPARED:
            self.calls.append((args, kwargs))
            self.kept.append(first(result))
        return result

    @property
    def outputs(self) -> Outputs:
        return np.concatenate(self.kept)[:COMPARED]


def first(result: Any) -> Outputs:
    tensor = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return tensor.numpy()


def in_runtimes(low: Lowering, variants: dict[str, Variant]) -> tuple[dict[str, float], str]:
    """The deployed file's score in each runtime, both computing its float units in fp32, and how far they are apart."""
    data = low.onnx(variants).SerializeToString()
    scores, found = dict[str, float](), dict[str, Recorded]()
    for name in RUNTIMES:
        engine = backends.get(name).build(data, BuildOptions(1, "fp32"))
        found[name] = Recorded(predictor(low, engine))
        scores[name] = round(score(low.task, found[name], name), 5)
    control = predictor(low, AsWritten(data, engine))  # type: ignore[arg-type]
    with torch.no_grad():
        written = np.concatenate([first(control(*a, **k)) for a, k in found["onnxruntime"].calls])[:COMPARED]
    openvino, onnxruntime_ = found["openvino"].outputs, found["onnxruntime"].outputs
    return scores, (
        f"{apart_by(openvino, onnxruntime_)}; ONNX Runtime and itself as written: {apart_by(onnxruntime_, written)}; "
        f"OpenVINO and that: {apart_by(openvino, written)}"
    )


def apart_by(a: Outputs, b: Outputs) -> str:
    """How many examples have the same class, the largest margin of the top two among those that do not, and the distance."""
    other = a.argmax(1) != b.argmax(1)
    two = np.sort(b[other], 1)[:, -2:]
    margin = float((two[:, 1] - two[:, 0]).max() / b.std()) if other.any() else 0.0
    rms = math.sqrt(float(np.square(a - b).sum() / np.square(b).sum()))
    return f"{(~other).sum()}/{len(a)} same{f' (margin {margin:.2g})' if other.any() else ''}, rms {rms:.1e}"


if __name__ == "__main__":
    main()

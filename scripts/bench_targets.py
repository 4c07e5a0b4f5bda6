#!/usr/bin/env python
"""Issue 5's bars on builds without a GPU: every variant and ten mixed allocations of the zoo networks on five targets.

Each is built by tensorrt_rtx or refused, and compared with what NVIDIA documents (`legality.py`); the bar is zero unexplained.
The ONNX file of each mixed allocation that holds only what OpenVINO and ONNX Runtime execute as well (no fp8, no nvfp4) is also run
by both, and their scores compared. As many again hold everything that some GPU executes, and are only built.

    python scripts/bench_targets.py                            # about an hour on one core, most of it scores of minilm
    python scripts/bench_targets.py zoo:fashion_resnet --allocations 3
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.tensorrt.building import serialise
from hwsearch.backends.tensorrt.buildlog import executed, fused_layers
from hwsearch.errors import BackendUnavailable
from hwsearch.evaluation import predictor, score
from hwsearch.lower import Lowering
from hwsearch.show import plainly
from hwsearch.targets import objections, offered, otherwise, request_of, runtime, verdicts
from hwsearch.typed import strongly_typed
from hwsearch.variants import Variant
from hwsearch.zoo import NAMES

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
BASES = ("fp16", "bf16", "fp32", "tf32")
RUNTIMES = ("openvino", "onnxruntime")
GPU_ONLY = ("fp8", "nvfp4")
"""Precisions that neither of them takes on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[f"zoo:{name}" for name in NAMES])
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
        choices = offered(low.network, base)
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
        scores = in_runtimes(low, variants) if number < min(args.scored, args.allocations) else {}
        apart = max(apart, max(scores.values()) - min(scores.values())) if scores else apart
        kinds = Counter(map(str, variants.values()))
        print(
            f" mixed {number}, base {base}: {dict(kinds)}{f'; scores {scores}' if scores else ''}", flush=True
        )
        for what, where in said.items():
            print(f"  {','.join(where):28} {what}")
    return unexplained, apart


def in_runtimes(low: Lowering, variants: dict[str, Variant]) -> dict[str, float]:
    """The deployed file's score in each runtime, both computing its float units in fp32."""
    data = low.onnx(variants).SerializeToString()
    return {
        name: round(
            score(low.task, predictor(low, backends.get(name).build(data, BuildOptions(1, "fp32"))), name), 5
        )
        for name in RUNTIMES
    }


if __name__ == "__main__":
    main()

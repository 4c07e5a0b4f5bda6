#!/usr/bin/env python
"""Does each runtime compute what a graph with Q/DQ means? Random graphs against ONNX's reference evaluator.

Networks are random torch modules, lowered by hwsearch as it lowers a user's, all layers int8 and some of them; graphs are random
ONNX with Q/DQ anywhere. An engine is wrong where it differs from the evaluator by more than quantization itself explains
(`judging`). What `hwsearch.backends.faults` says of a graph beforehand is refused, and built all the same to see how often it is
right. A graph that is wrong and was not refused is *unseen*, and there should be none.

    python scripts/bench/qdq_fuzz.py --count 500 --levels 63
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parent))

import random_graphs
import random_networks
from judging import Array, Meaning, Off, with_levels

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.apart import compiler
from hwsearch.backends.base import Backend, BuildOptions, qdq_form
from hwsearch.backends.faults import TWICE, faults
from hwsearch.errors import BackendUnavailable
from hwsearch.lower import Lowering
from hwsearch.variants import Variant

ALLOCATIONS = 3
"""Of one random network: all layers int8, then random ones."""
FULL = 127


@dataclass(frozen=True)
class Case:
    """One graph for one runtime."""

    name: str
    model: onnx.ModelProto
    feed: Mapping[str, Array]
    about: str = ""


@dataclass
class Counts:
    """What became of the graphs of one kind in one runtime."""

    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By reason; those that turned out wrong, and those that did not."""
    wrong_refused: Counter[str] = field(default_factory=Counter)
    unseen: list[str] = field(default_factory=list)
    not_built: list[str] = field(default_factory=list)
    disputed: list[str] = field(default_factory=list)
    """ONNX Runtime's plain operators differ from the evaluator, so that nobody knows."""

    @property
    def graphs(self) -> int:
        return self.right + self.refused.total() + len(self.unseen) + len(self.not_built) + len(self.disputed)

    def __str__(self) -> str:
        lines = [
            f"{self.graphs} graphs: {self.right} right, {self.refused.total()} refused, {len(self.unseen)} wrong unseen, "
            f"{len(self.not_built)} not built, {len(self.disputed)} disputed"
        ]
        lines += [
            f"  refused {n} (wrong {self.wrong_refused[why]}): {why}" for why, n in self.refused.most_common()
        ]
        for what in ("unseen", "not_built", "disputed"):
            lines += [f"  {what}: {text}" for text in getattr(self, what)]
        return "\n".join(lines)


def networks(backend: Backend, seeds: Sequence[int], levels: int) -> Iterator[Case]:
    """Random torch modules in random allocations, as hwsearch lowers them for a runtime."""
    for seed in seeds:
        model, inputs = random_networks.network(seed)
        task = hs.Task(model, inputs, [inputs], lambda predict: 0.0, f"network {seed}")
        low = Lowering(task, method="minmax")
        rng, seen = np.random.default_rng(seed), set[str]()
        for number in range(ALLOCATIONS):
            variants = {
                u.name: Variant("int8" if not number or rng.random() < 0.6 else "fp32")
                for u in low.network.units
            }
            made = low.onnx(variants, **qdq_form(backend))
            digest = hashlib.sha256(made.SerializeToString()).hexdigest()
            if any(v.quantized for v in variants.values()) and digest not in seen:
                seen.add(digest)
                made = with_levels(made, levels) if levels < FULL else made
                feed = dict(zip((v.name for v in made.graph.input), low.arrays(), strict=True))
                chosen = ", ".join(u for u, v in variants.items() if v.quantized)
                yield Case(f"network {seed}.{number}", made, feed, f"{model} with int8 in {chosen}")


def graphs(seeds: Sequence[int], levels: int) -> Iterator[Case]:
    """Random ONNX with Q/DQ anywhere."""
    for seed in seeds:
        model, feed = random_graphs.graph(seed, levels)
        yield Case(f"graph {seed}", model, feed)


def judge(case: Case, backend: Backend, counts: Counts) -> None:
    """Build one graph, run it and count it."""
    reasons = faults(case.model, backend.name)
    meaning = Meaning(case.model, case.feed)
    build = compiler(backend) if TWICE in reasons else backend.build  # which ends the process that builds it
    try:
        engine = build(case.model.SerializeToString(), BuildOptions(1, "fp32"))
        off = meaning.off(engine(*case.feed.values()))
    except BackendUnavailable as error:
        if reasons:
            counts.refused.update(reasons[:1])
            counts.wrong_refused.update(reasons[:1])
        else:
            counts.not_built.append(f"{case.name}: {str(error)[:200]} {case.about}")
        return
    wrong = off.wrong and meaning.agreed
    if reasons:
        counts.refused.update(reasons[:1])
        counts.wrong_refused.update(reasons[:1] if wrong else [])
    elif wrong:
        counts.unseen.append(f"{case.name}: {_said(off)} {case.about}")
    elif off.wrong:
        counts.disputed.append(f"{case.name}: {_said(off)} {case.about}")
    else:
        counts.right += 1


def _said(off: Off) -> str:
    return f"off by {off.norm:.3g} of what quantization changes ({off.peak:.3g} at most, {off.relative:.2g} of the output)"


def fuzz(kind: str, runtime: str, count: int, *, first: int = 0, levels: int = 63) -> Counts:
    """Graphs of a kind (`networks` or `graphs`) until so many are counted, from a first seed on."""
    backend, counts, seed = backends.get(runtime), Counts(), first
    faulthandler.enable()
    while counts.graphs < count:
        cases = networks(backend, [seed], levels) if kind == "networks" else graphs([seed], levels)
        for case in cases:
            print(f"{kind} in {runtime}: {counts.graphs} of {count}, {case.name}", end="\r", file=sys.stderr)
            judge(case, backend, counts)
        seed += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="graphs of each kind for each runtime")
    parser.add_argument(
        "--levels", type=int, default=63, help="largest integer of int8 weights: 127, or 63 for 7 bits"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kind", choices=("networks", "graphs"), action="append")
    parser.add_argument("--runtime", choices=("openvino", "onnxruntime"), action="append")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    unseen = 0
    for kind in args.kind or ("networks", "graphs"):
        for runtime in args.runtime or ("openvino", "onnxruntime"):
            counts = fuzz(kind, runtime, args.count, first=args.first, levels=args.levels)
            print(f"{kind} in {runtime}, weights of at most {args.levels}: {counts}", flush=True)
            unseen += len(counts.unseen)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())

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
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import random_graphs
import random_networks
from judging import OWN_NORM, ROUGH_NORM, Meaning, Off, rough, with_levels

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import Backend, BuildOptions, qdq_form
from hwsearch.backends.faults import TWICE, faults
from hwsearch.backends.process import compiler
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant

ALLOCATIONS = 6
"""Of one random network: all layers int8, then random ones."""
FULL = 127


@dataclass(frozen=True)
class Case:
    """One graph for one runtime."""

    name: str
    backend: Backend
    meaning: Meaning
    about: str = ""


@dataclass
class Counts:
    """What became of the graphs of one kind in one runtime."""

    right: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By reason; those that turned out wrong, and those that did not."""
    wrong_refused: Counter[str] = field(default_factory=Counter)
    rough: Counter[str] = field(default_factory=Counter)
    """Right but for what a runtime is known to round itself, by reason."""
    unseen: list[str] = field(default_factory=list)
    not_built: list[str] = field(default_factory=list)
    disputed: list[str] = field(default_factory=list)
    """ONNX Runtime's plain operators differ from the evaluator, so that nobody knows."""

    @property
    def graphs(self) -> int:
        return self.right + self.rough.total() + self.refused.total() + len(self.unseen) + len(self.not_built) + len(self.disputed)

    def __str__(self) -> str:
        lines = [
            f"{self.graphs} graphs: {self.right} right, {self.refused.total()} refused, {len(self.unseen)} wrong unseen, "
            f"{len(self.not_built)} not built, {len(self.disputed)} disputed"
        ]
        lines += [
            f"  refused {n} (wrong {self.wrong_refused[why]}): {why}" for why, n in self.refused.most_common()
        ]
        lines += [f"  rounded by itself {n}: {why}" for why, n in self.rough.most_common()]
        for what in ("unseen", "not_built", "disputed"):
            lines += [f"  {what}: {text}" for text in getattr(self, what)]
        return "\n".join(lines)


def networks(runtimes: Sequence[Backend], seed: int, levels: int) -> Iterator[Case]:
    """A random torch module in random allocations, as hwsearch lowers them for each runtime."""
    model, inputs = random_networks.network(seed)
    task = hs.Task(model, inputs, [inputs], lambda predict: 0.0, f"network {seed}")
    forms = {b.name: Lowering(task, method="minmax", unsigned=getattr(b, "unsigned_activations", False)) for b in runtimes}
    low = next(iter(forms.values()))
    rng, seen = np.random.default_rng(seed), set[frozenset[str]]()
    for number in range(ALLOCATIONS):
        chosen = frozenset(u.name for u in low.network.units if not number or rng.random() < 0.6)
        if not chosen or chosen in seen:
            continue
        seen.add(chosen)
        variants = {u.name: Variant("int8" if u.name in chosen else "fp32") for u in low.network.units}
        for backend in runtimes:
            made = forms[backend.name].onnx(variants, **qdq_form(backend))
            made = with_levels(made, levels) if levels < FULL else made
            feed = dict(zip((v.name for v in made.graph.input), low.arrays(), strict=True))
            about = f"{model} with int8 in {', '.join(sorted(chosen))}"
            yield Case(f"network {seed}.{number}", backend, Meaning(made, feed), about)


def graphs(runtimes: Sequence[Backend], seed: int, levels: int) -> Iterator[Case]:
    """Random ONNX with Q/DQ anywhere."""
    meaning = Meaning(*random_graphs.graph(seed, levels))
    return (Case(f"graph {seed}", backend, meaning) for backend in runtimes)


def judge(case: Case, counts: Counts) -> None:
    """Build one graph, run it and count it."""
    backend, meaning = case.backend, case.meaning
    reasons = faults(meaning.model, backend.name)
    build = compiler(backend) if TWICE in reasons else backend.build  # which ends the process that builds it
    try:
        engine = build(meaning.model.SerializeToString(), BuildOptions(1, "fp32"))
        off = meaning.off(engine(*meaning.feed.values()))
    except BackendUnavailable as error:
        if reasons:
            counts.refused.update(reasons[:1])
            counts.wrong_refused.update(reasons[:1])
        else:
            counts.not_built.append(f"{case.name}: {str(error)[:200]} {case.about}")
        return
    why = rough(meaning.model, backend.name)
    beyond = off.beyond(ROUGH_NORM if why else OWN_NORM)
    wrong = beyond and meaning.agreed
    if reasons:
        counts.refused.update(reasons[:1])
        counts.wrong_refused.update(reasons[:1] if wrong else [])
    elif wrong:
        counts.unseen.append(f"{case.name}: {_said(off)} {case.about}")
        print(f"{backend.name}: {counts.unseen[-1]}", file=sys.stderr)
    elif beyond:
        counts.disputed.append(f"{case.name}: {_said(off)} {case.about}")
    elif off.wrong:
        counts.rough[why] += 1
    else:
        counts.right += 1


def _said(off: Off) -> str:
    return f"off by {off.norm:.3g} of what quantization changes ({off.peak:.3g} at most, {off.relative:.2g} of the output)"


def fuzz(
    kind: str, runtimes: Sequence[str], count: int, *, first: int = 0, levels: int = 63
) -> dict[str, Counts]:
    """At least so many graphs of a kind (`networks` or `graphs`) in each runtime, from a first seed on."""
    faulthandler.enable()
    counts, seed = {name: Counts() for name in runtimes}, first
    makers = {"networks": networks, "graphs": graphs}
    try:
        while min(c.graphs for c in counts.values()) < count:
            for case in makers[kind]([backends.get(name) for name in runtimes], seed, levels):
                own = counts[case.backend.name]
                progress = f"{case.backend.name}: {own.graphs} of {count}, {case.name}"
                if sys.stderr.isatty():
                    print(progress, end="\r", file=sys.stderr)
                judge(case, own)
            seed += 1
    except KeyboardInterrupt:
        print("\ninterrupted: what was counted so far", file=sys.stderr)
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
        runtimes = args.runtime or ("openvino", "onnxruntime")
        found = fuzz(kind, runtimes, args.count, first=args.first, levels=args.levels)
        for runtime, counts in found.items():
            print(f"{kind} in {runtime}, weights of at most {args.levels}: {counts}", flush=True)
            unseen += len(counts.unseen)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())

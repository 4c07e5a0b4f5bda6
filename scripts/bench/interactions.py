#!/usr/bin/env python
"""Predicted against simulated loss on random allocations over widths and precisions, before and after learning interactions.

Allocations are drawn as `hwsearch.loss.stitched` draws those to learn from, with other random numbers, and simulated on data that
chose nothing: samples of what the task's `evaluate` is called on. Beside what `hwsearch sensitivity` learns, parts of it
alone, and with terms of pairs: neighbours (units joined by an edge, groups that share a unit, units with their groups) and
the pairs among the ten that lose most. Widths are those of the table in `--tables`, where there is one of the task.

    python scripts/bench/interactions.py zoo:fashion_resnet --allocations 40
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils import _pytree as pytree

import hwsearch as hs
from hwsearch import backends
from hwsearch.engine.setup import Setup, set_up
from hwsearch.graph.calls import as_call
from hwsearch.loss import measure
from hwsearch.loss.interactions import Agreement, Fitted, fitted, learn
from hwsearch.loss.measure import Choice, Scorer
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.stitched import stitched
from hwsearch.loss.table import GROUP, UNIT, SensitivityTable
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.choices import candidate_widths
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant
from hwsearch.progress import Progress

SEED = 2
"""Of the allocations; those that are learnt from have another."""
PAIR = 0.1
"""What a pair's term is multiplied with before its coefficient, which is shrunk to 1."""

Vector = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    parser = common.parser(__doc__, tasks=["zoo:fashion_resnet", "zoo:minilm", "zoo:efficientnet_lite0"], backend=True)
    parser.add_argument("--allocations", type=int, default=40)
    parser.add_argument("--samples", type=int, default=128, help="on which allocations are simulated")
    parser.add_argument("--tables", type=Path, default=Path("profiles"))
    parser.add_argument("--out", type=Path, default=Path("bench-interactions"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.say_machine()
    for spec in args.tasks:
        bench(spec, args)


def bench(spec: str, args: argparse.Namespace) -> None:
    task = hs.load(spec)
    folder = args.out / task.name
    setup = set_up(task, backends.get(args.backend))
    begun = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    scores, seen = scored(setup, grid(setup, args.tables / f"{task.name}.{args.backend}.1t.parquet"), folder)
    print(f"\n{spec}: {len(setup.network.units)} units, {len(scores.width_loss)} channel groups, losses of {scores.samples} "
          f"samples, {scores.passes} passes of stitched networks; {time.perf_counter() - begun:.0f} s")  # fmt: skip
    for what, own in zip(("the sum", "learnt"), scores.agreement, strict=True):
        print(f"  hwsearch sensitivity, {what}: {own}")
    print(f"  factor {scores.correction.factor:.3g}, exponent {scores.correction.exponent:.3g}, "
          f"coefficients of units {ends(scores.correction.units)}, of groups {ends(scores.correction.groups)}")  # fmt: skip
    simulated = Simulated(setup, scores, folder)
    choices = stitched(scores.loss, scores.width_loss, args.allocations, SEED)
    held = simulated.of("held", choices, lambda: unseen(setup, args.samples))
    print(f"  on {len(held)} allocations, {args.samples} samples that chose nothing, by what {len(seen)} others taught:")
    truth = np.array([loss for _, loss in held])
    said("hwsearch sensitivity", np.array([scores.total(*choice) for choice, _ in held]), truth)
    for name, law in laws(seen, scores).items():
        said(name, law([choice for choice, _ in held]), truth)


def ends(coefficients: Mapping[str, float]) -> str:
    own = list(coefficients.values())
    return f"{min(own):.2f} to {max(own):.2f}" if own else "1"


def grid(setup: Setup, path: Path) -> dict[str, list[int]]:
    """The widths that a profile found worth choosing from, or all that it would try."""
    if path.exists():
        table = hs.LatencyTable.load(path)
        if set(table.network.channels.items()) == set(setup.network.channels.items()):
            return table.grid()
    return {g: candidate_widths(n) for g, n in setup.network.channels.items()}


def scored(setup: Setup, widths: Mapping[str, Sequence[int]], folder: Path) -> tuple[SensitivityTable, list[tuple[Choice, float]]]:
    """The sensitivities, and the stitched networks that they were learnt from with their losses."""
    path, corrected = folder / "seen.json", measure._corrected

    def record(table: SensitivityTable, whole: Sequence[Choice], simulated: Sequence[float]) -> SensitivityTable:
        told = [({u: str(v) for u, v in a.items()}, b, loss) for (a, b), loss in zip(whole, simulated, strict=False)]
        path.write_text(json.dumps(told))
        return corrected(table, whole, simulated)

    measure._corrected = record
    scores = sensitivity_for(setup, folder / "sens.parquet", grid=widths, weights=folder / "weights", progress=Progress())
    measure._corrected = corrected
    told = [(({u: Variant.parse(v) for u, v in a.items()}, b), loss) for a, b, loss in json.loads(path.read_text())]
    return scores, [(choice, loss) for choice, loss in told if loss > 0 and scores.offers(*choice)]


def unseen(setup: Setup, samples: int) -> list[Any]:
    """Samples of what the task is evaluated on, evenly spread, in batches as large as those of the calibration data."""
    task, found, outputs = setup.lowering.task, list[Any](), dict[int, Any]()

    def record(*args: Any, **kwargs: Any) -> Any:
        """What it returns has only to look like outputs."""
        found.append(kwargs or (args[0] if len(args) == 1 else args))
        if count(found[-1]) not in outputs:
            with torch.no_grad():
                outputs[count(found[-1])] = task.model(*args, **kwargs)
        return outputs[count(found[-1])]

    task.evaluate(record)
    whole = pytree.tree_map(lambda *parts: torch.cat(parts), *found)
    rows = torch.from_numpy(np.linspace(0, count(whole) - 1, samples).round().astype(int))
    size = count(setup.lowering.calibration[0][1:])
    pieces = [pytree.tree_map(lambda x, own=own: x[own], whole) for own in torch.split(rows, size) if len(own) == size]
    return [(setup.lowering.traced_for(own, "evaluated data"), *as_call(own)) for own in pieces]


def count(inputs: Any) -> int:
    return int(next(x.shape[0] for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim()))


class Simulated:
    """Allocations simulated on batches; kept in a folder for another call."""

    def __init__(self, setup: Setup, scores: SensitivityTable, folder: Path) -> None:
        self.setup, self.scores, self.folder = setup, scores, folder
        order = scores.order or {g: range(n) for g, n in setup.network.channels.items()}
        self.bank = weight_bank(setup.lowering, folder / "weights", order)

    def of(self, name: str, choices: Sequence[Choice], batches: Callable[[], Sequence[Any]]) -> list[tuple[Choice, float]]:
        path = self.folder / f"{name}.json"
        key = repr([({u: str(v) for u, v in variants.items()}, widths) for variants, widths in choices])
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("choices") != key:
            kept = {"choices": key, "losses": self._losses(choices, batches())}
            path.write_text(json.dumps(kept))
        return [(choice, loss) for choice, loss in zip(choices, kept["losses"], strict=True) if loss > 0]

    def _losses(self, choices: Sequence[Choice], batches: Sequence[Any]) -> list[float]:
        low = self.setup.lowering
        scorer = Scorer(low.task.divergence, self.setup.backend.quantize_outputs, self.bank, Progress.silent())
        found = [scorer.of_batch(low, number, batch)(choices) for number, batch in enumerate(batches)]
        total = sum(samples for _, samples in found)
        return [float(x) / total for x in np.sum([losses for losses, _ in found], axis=0)]


def said(name: str, predicted: Vector, truth: Vector) -> None:
    away = np.exp(np.abs(np.log(predicted / truth)))
    print(f"    {name:42s} {Agreement.of(predicted, truth)}, 80 % within {np.percentile(away, 80):.2f}", flush=True)


Law = Callable[[Sequence[Choice]], Vector]


def laws(seen: Sequence[tuple[Choice, float]], scores: SensitivityTable) -> dict[str, Law]:
    """What is predicted by parts of what is learnt, each fitted to the same networks."""
    columns = Columns(scores, [choice for choice, _ in seen])
    losses, truth = columns([choice for choice, _ in seen]), np.array([loss for _, loss in seen])
    factor = float(np.median(truth / losses.sum(1)))

    def of(law: Fitted, pairs: bool = False) -> Law:
        return lambda choices: law.predict(columns.with_pairs(choices) if pairs else columns(choices))

    wider = columns.with_pairs([choice for choice, _ in seen])
    found = {"none: the sum": of(fitted(losses, truth, None)), "one factor": lambda choices: factor * columns(choices).sum(1)}
    found["factor and exponent"] = of(fitted(losses, truth, 0.0))
    for spread in (0.3, 1.0):
        found[f"... and coefficients, spread {spread:g}"] = of(fitted(losses, truth, spread))
        found[f"... and pairs, spread {spread:g}"] = of(fitted(wider, truth, spread), pairs=True)
    found["pairs, spread chosen by cross-validation"] = of(learn(wider, truth)[0], pairs=True)
    return found


class Columns:
    """The losses of what allocations change, a column for each unit and group; and those of pairs."""

    def __init__(self, scores: SensitivityTable, choices: Sequence[Choice]) -> None:
        self.scores = scores
        self.names = [(UNIT, u) for u in scores.loss] + [(GROUP, g) for g in scores.width_loss]
        weights = self(choices).mean(0)
        place = {name: i for i, name in enumerate(self.names)}
        near = {tuple(sorted((place[a], place[b]))) for a, b in neighbours(scores.network) if a in place and b in place}
        top = np.argsort(-weights)[:10].tolist()
        self.pairs = sorted(near | {tuple(sorted(pair)) for pair in combinations(top, 2)})

    def __call__(self, choices: Sequence[Choice]) -> Vector:
        parts = [self.scores.parts(*choice) for choice in choices]
        return np.array([[own.get(name, 0.0) for name in self.names] for own in parts])

    def with_pairs(self, choices: Sequence[Choice]) -> Vector:
        own = self(choices)
        both = [PAIR * np.sqrt(own[:, i] * own[:, j]) for i, j in self.pairs]
        return np.column_stack([own, *both])


def neighbours(network: Network) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for edge in network.edges:
        yield (UNIT, edge.src), (UNIT, edge.dst)
    for unit in network.units:
        for group in unit.groups:
            yield (UNIT, unit.name), (GROUP, group)
        for a, b in combinations(unit.groups, 2):
            yield (GROUP, a), (GROUP, b)


if __name__ == "__main__":
    main()

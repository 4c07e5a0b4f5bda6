"""What each term of the latency model wins, on tables that are there: the model is fitted with and without it.

Builds are predicted by fits that have not seen them: those of the design fold by fold (only builds whose every cell, a unit at its
widths in its variant, another build holds too; the others are always part of the fit), and those of role `heldout` by one fit
on all the others. Errors are |predicted / measured - 1| on the table's scale. Allocations that `latency_model.py` held out of a
table of its own, and left beside it, have a row of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import Errors

from hwsearch.latency import model as latency_model
from hwsearch.latency import regression
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.latency.overhead import beside
from hwsearch.network.variants import Variant
from hwsearch.table.build import Build
from hwsearch.table.header import LAYERED
from hwsearch.table.table import LatencyTable, usable

FOLDS = 5
RESAMPLED = 2000
"""Resamples of the paired bootstrap."""

Patch = tuple[Any, str, Any]


TERMS: dict[str, list[Patch]] = {
    "drift": [(regression, "_session_times", lambda builds: [0.0] * len(builds))],
    "pooling": [(regression.Equations, "prior", regression.Equations.weak_prior)],
    "dispatch": [(regression, "beside", lambda *given: replace(beside(*given), dispatch_ns=0.0))],
    "counters": [(regression, "beside", lambda *given: replace(beside(*given), counter_ns=0.0))],
    "per-node": [(m, "slowed", lambda slowdown, nodes, ratio: 0.0) for m in (regression, latency_model)],
    "boundaries": [],
}
"""What is put in place of a part of the model to leave it out. `boundaries` is an option of `fit`."""


@contextmanager
def without(term: str | None) -> Iterator[Callable[..., LatencyModel]]:
    """`fit` as it is without a term of the model; None leaves nothing out."""
    with ExitStack() as stack:
        for home, name, other in TERMS.get(term or "", []):
            stack.enter_context(patch.object(home, name, other))

        def fitted(table: LatencyTable, **options: Any) -> LatencyModel:
            return fit(table, **options, boundaries=term != "boundaries")

        yield fitted


@dataclass(frozen=True)
class Part:
    """Builds to predict, and those to fit on."""

    builds: Sequence[Build]
    known: Sequence[Build]


def parts_of(table: LatencyTable, folds: int = FOLDS, seed: int = 0) -> list[Part]:
    """The folds, then the held-out builds."""
    builds = [b for b in usable(table) if b.role not in ("heldout", "deployed")]
    cells = [table.candidate(b).cells(table.network) for b in builds]
    count: dict[tuple[str, str], int] = {}
    for cell in (c for own in cells for c in set(own)):
        count[cell] = count.get(cell, 0) + 1
    removable = [i for i, own in enumerate(cells) if all(count[c] > 1 for c in own) and builds[i].role != "reference"]
    order = np.random.default_rng(seed).permutation(removable)
    found = []
    for part in np.array_split(order, min(folds, len(order))) if len(order) else []:
        out = set(map(int, part))
        found.append(Part([builds[i] for i in sorted(out)], [b for i, b in enumerate(builds) if i not in out]))
    held = [b for b in usable(table) if b.role == "heldout"]
    return [*found, Part(held, builds)]


def predicted(table: LatencyTable, parts: Sequence[Part], term: str | None) -> list[float]:
    """Time in ns of every build to predict; NaN where it holds what no build of its fit does."""
    times: list[float] = []
    with without(term) as fitted:
        for part in parts:
            model = fitted(table, builds=part.known)
            times += [
                model.predict_build(b).time_ns if model.predicts(b) else float("nan") for b in part.builds
            ]
    return times


@dataclass(frozen=True)
class Tested:
    """Measured times and those predicted with and without each term, of the builds that every fit predicts."""

    measured: np.ndarray
    full: np.ndarray
    less: dict[str, np.ndarray]


def tested(table: LatencyTable, terms: Sequence[str]) -> Tested:
    parts = parts_of(table)
    measured = np.array([table.time_ns(b) for part in parts for b in part.builds])
    full = np.array(predicted(table, parts, None))
    own = np.isfinite(full)
    less = {term: np.array(predicted(table, parts, term))[own] for term in terms}
    return Tested(measured[own], full[own], less)


def heldout_beside(path: Path) -> Path:
    """Where the allocations lie that were held out of the table of a file of `latency_model.py`."""
    return path.with_name(path.name.replace(".context.parquet", ".heldout.json"))


def held_out(table: LatencyTable, path: Path, terms: Sequence[str]) -> Tested:
    """The same of allocations that no build of the table was made for."""
    kept = json.loads(path.read_text())
    candidates = [({u: Variant.parse(v) for u, v in k["variants"].items()}, k["widths"]) for k in kept]
    times: dict[str | None, np.ndarray] = {}
    for term in (None, *terms):
        with without(term) as fitted:
            model = fitted(table)
        times[term] = np.array([model.predict(*c).time_ns for c in candidates])
        if term is None:
            measured = on_quiet_machine(table, model, kept)
    return Tested(measured, times[None], {term: times[term] for term in terms})


def on_quiet_machine(table: LatencyTable, model: LatencyModel, kept: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Measured times in ns, as `verify` converts them on a machine that is slower than the table's."""
    return np.array([
        model.on_quiet_machine(k["measured_ns"] / table.header.reference_ns, k.get("nodes", 1.0), k.get("slowdown", 0.0)).time_ns
        for k in kept
    ])  # fmt: skip


def tables(paths: Sequence[Path]) -> Iterator[tuple[str, LatencyTable, Path]]:
    """Every table of whole networks in some files, with a name and its file."""
    for path in paths:
        for table in LatencyTable.sections(path):
            if table.header.mode not in LAYERED:
                yield f"{table.network.name}, {table.header.backend}, {table.header.options['threads']}t", table, path


def ablate(paths: Sequence[Path], terms: Sequence[str]) -> None:
    """A row for each table and term, then one over all tables."""
    print("differences are without the term minus with it, in percentage points: above zero the term wins\n")
    print("| table | builds | without | median | 90th percentile | tau | median worse by | 90th percentile worse by |")
    print("|---|---|---|---|---|---|---|---|")
    every: list[Tested] = []
    for name, table, path in tables(paths):
        every.append(tested(table, terms))
        rows(name, every[-1])
        beside = heldout_beside(path)
        if beside != path and beside.exists():
            every.append(held_out(table, beside, terms))
            rows(f"{name}, held out", every[-1])
    rows("all", Tested(*(np.concatenate([getattr(t, f) for t in every]) for f in ("measured", "full")),
                       {term: np.concatenate([t.less[term] for t in every]) for term in terms}))  # fmt: skip


def rows(name: str, found: Tested) -> None:
    def line(term: str, times: np.ndarray, differences: str) -> None:
        e = Errors.of(times, found.measured)
        print(f"| {name} | {len(times)} | {term} | {e.median:.2%} | {e.p90:.2%} | {e.tau:.3f} | {differences} |", flush=True)

    line("-", found.full, "| ")
    for term, times in found.less.items():
        line(term, times, " | ".join(differences(found.full, times, found.measured)))


def differences(full: np.ndarray, less: np.ndarray, measured: np.ndarray) -> list[str]:
    """By how many points median and 90th percentile rise, with 95 % intervals over builds (paired bootstrap)."""
    a, b = (np.abs(x / measured - 1.0) for x in (full, less))
    drawn = np.random.default_rng(0).integers(len(a), size=(RESAMPLED, len(a)))
    found = []
    for q in (50, 90):
        change = 100 * (np.percentile(b, q) - np.percentile(a, q))
        low, high = np.percentile(
            100 * (np.percentile(b[drawn], q, axis=1) - np.percentile(a[drawn], q, axis=1)), (2.5, 97.5)
        )
        found.append(f"{change:+.2f} ({low:+.2f} to {high:+.2f})")
    return found

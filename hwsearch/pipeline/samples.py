"""Samples of a search for a floor: each allocation that was measured, with its score, kept in a folder of JSON files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.costs import Costs
from hwsearch.errors import HwsearchError
from hwsearch.files import write_bytes
from hwsearch.pipeline.bracket import Tried
from hwsearch.pipeline.scorer import Scorer

SCHEMA = 1


@dataclass(frozen=True)
class Sample:
    """One allocation, measured.

    Attributes:
        allocation: What was measured.
        family: What was minimised, and within which budgets: bounds on the loss of one family are of one curve.
        bound: On the predicted loss, under which it was the answer.
        score: By the scorer of the search; None where it failed. `error`: its standard error, where that is known.
        costs: As measured.
        seconds: It took.
        failed: Why it could not be scored.
        reused: It was measured by an earlier run.
    """

    allocation: Allocation
    family: str
    bound: float
    score: float | None
    error: float | None
    costs: Costs
    seconds: float
    failed: str = ""
    reused: bool = False

    @property
    def loss(self) -> float:
        """As predicted."""
        return float(self.allocation.predicted["loss"])

    def spare(self, scorer: Scorer) -> float:
        """By how much its score, less a standard error, is above the floor; minus infinity where it has none."""
        return -math.inf if self.score is None else self.score - (self.error or 0.0) - scorer.floor

    def tried(self, scorer: Scorer, bound: float) -> Tried:
        """As the answer under a bound (its logarithm)."""
        drop = math.inf if self.score is None else scorer.dense - self.score
        return Tried(bound, min(bound, logarithm(self.loss)), drop, self.spare(scorer))

    def to_json(self) -> dict[str, Any]:
        """For its file, and for reports."""
        return {
            "family": self.family, "loss_bound": self.bound, "loss": self.loss, "score": self.score, "error": self.error,
            "costs": self.costs.known(), "seconds": self.seconds, "failed": self.failed,
        }  # fmt: skip


class Samples:
    """The samples in a folder that were made of the same: `KEY.json` for each, beside its allocation, `KEY.alloc.json`.

    of: what made them (network, calibration data, device, how they are scored, ...); others are left alone. say: is told of files
    that cannot be read, whose samples are measured again, as failed ones are.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.folder = folder
        self.of = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.known: dict[str, Sample] = {}
        for path in sorted(folder.glob("*.json")):
            if path.name.endswith(".alloc.json"):
                continue
            try:
                sample = self._load(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, HwsearchError) as error:
                say(f"the sample {path} cannot be read ({error}): it is measured again")
                continue
            if sample is not None and not sample.failed:
                self.known[path.stem] = sample

    def _load(self, path: Path) -> Sample | None:
        own = json.loads(path.read_bytes())
        if own["of"] != self.of:
            return None
        allocation = Allocation.load(path.with_suffix(".alloc.json"))
        return Sample(
            allocation, own["family"], float(own["loss_bound"]), own["score"], own["error"], Costs(**own["costs"]),
            float(own["seconds"]), own["failed"], reused=True,
        )  # fmt: skip

    def key(self, allocation: Allocation) -> str:
        """16 hex digits of what is measured and what it is made of."""
        own = [self.of, allocation.options["base"], allocation.variants, allocation.widths]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def get(self, allocation: Allocation) -> Sample | None:
        """The sample of an allocation, where it was measured."""
        return self.known.get(self.key(allocation))

    def add(self, sample: Sample) -> None:
        """Keep a sample, in memory and on disk."""
        key = self.key(sample.allocation)
        self.known[key] = sample
        sample.allocation.save(self.folder / f"{key}.alloc.json")
        told = {"schema": SCHEMA, "kind": "sample", "of": self.of, **sample.to_json()}
        write_bytes(self.folder / f"{key}.json", (json.dumps(told, indent=1) + "\n").encode())


def logarithm(loss: float) -> float:
    """Of a loss, which may be 0."""
    return math.log(max(loss, 1e-12))

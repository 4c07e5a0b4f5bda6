"""Samples of a search: each network that was measured, with its score, kept in a folder, so that no run measures it again."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.costs import Costs
from hwsearch.errors import HwsearchError
from hwsearch.files import write_bytes
from hwsearch.pipeline.bracket import Tried
from hwsearch.pipeline.scorer import Scorer

SCHEMA = 1
FOLDER = "samples"
"""Of the folder of a run."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A network that was measured.

    Attributes:
        score: By the scorer of the search; None where it failed. `error`: its standard error, where that is known.
        costs: As measured.
        seconds: It took.
        failed: Why it could not be scored.
        reused: It was measured by an earlier run.
    """

    score: float | None
    error: float | None
    costs: Costs
    seconds: float
    failed: str = ""
    reused: bool = False

    def spare(self, scorer: Scorer) -> float:
        """By how much its score, less a standard error, is above the floor; minus infinity where it has none."""
        return -math.inf if self.score is None else self.score - (self.error or 0.0) - scorer.floor

    def to_json(self) -> dict[str, Any]:
        """For its file, and for reports."""
        return {
            "score": self.score, "error": self.error, "costs": self.costs.known(), "seconds": self.seconds, "failed": self.failed,
        }  # fmt: skip

    @staticmethod
    def fields(content: Mapping[str, Any]) -> dict[str, Any]:
        """What its file holds, as the fields of one that is used again."""
        return {
            "score": content["score"], "error": content["error"], "costs": Costs(**content["costs"]),
            "seconds": float(content["seconds"]), "failed": content["failed"], "reused": True,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample(Scored):
    """One allocation, measured.

    Attributes:
        allocation: What was measured.
        family: What was minimised, and within which budgets: bounds on the loss of one family are of one curve.
        bound: On the predicted loss, under which it was the answer.
    """

    allocation: Allocation
    family: str
    bound: float

    @property
    def loss(self) -> float:
        """As predicted."""
        return float(self.allocation.predicted["loss"])

    def tried(self, scorer: Scorer, bound: float) -> Tried:
        """As the answer under a bound (its logarithm)."""
        drop = math.inf if self.score is None else scorer.dense - self.score
        return Tried(bound, min(bound, logarithm(self.loss)), drop, self.spare(scorer))

    def to_json(self) -> dict[str, Any]:
        """For its file, and for reports."""
        return {"family": self.family, "loss_bound": self.bound, "loss": self.loss, **super().to_json()}


S = TypeVar("S", bound=Scored)


class Kept(ABC, Generic[S]):
    """The samples in a folder that were made of the same.

    of: what made them (network, calibration data, device, how they are scored, ...); others are left alone. say: is told of files
    that cannot be read, whose samples are measured again, as failed ones are.
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.folder = folder
        self.of = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.known: dict[str, S] = {}
        for key, path in self._files():
            try:
                own = json.loads(path.read_bytes())
                if own["of"] != self.of:
                    continue
                sample = self._load(own, path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, HwsearchError) as error:
                say(f"the sample {path} cannot be read ({error}): it is measured again")
                continue
            if not sample.failed:
                self.known[key] = sample

    @abstractmethod
    def _files(self) -> Iterator[tuple[str, Path]]:
        """Key and file of each sample that is there."""

    @abstractmethod
    def _load(self, content: Mapping[str, Any], path: Path) -> S:
        """A sample, from what its file holds."""

    def _key(self, *own: Any) -> str:
        """16 hex digits of what is measured and what it is made of."""
        return hashlib.sha256(json.dumps([self.of, *own], sort_keys=True).encode()).hexdigest()[:16]

    def _keep(self, key: str, sample: S, path: Path) -> None:
        """In memory and on disk: the file comes last, so that what belongs to it is there where it is."""
        self.known[key] = sample
        told = {"schema": SCHEMA, "kind": "sample", "of": self.of, **sample.to_json()}
        write_bytes(path, (json.dumps(told, indent=1) + "\n").encode())


class Samples(Kept[Sample]):
    """Those of allocations: `KEY.json` for each, beside its allocation, `KEY.alloc.json`."""

    def _files(self) -> Iterator[tuple[str, Path]]:
        return ((p.stem, p) for p in sorted(self.folder.glob("*.json")) if not p.name.endswith(".alloc.json"))

    def _load(self, content: Mapping[str, Any], path: Path) -> Sample:
        allocation = Allocation.load(path.with_suffix(".alloc.json"))
        return Sample(allocation=allocation, family=content["family"], bound=float(content["loss_bound"]), **Scored.fields(content))

    def key(self, allocation: Allocation) -> str:
        """16 hex digits of what is measured and what it is made of."""
        return self._key(allocation.options["base"], allocation.variants, allocation.widths)

    def get(self, allocation: Allocation) -> Sample | None:
        """The sample of an allocation, where it was measured."""
        return self.known.get(self.key(allocation))

    def add(self, sample: Sample) -> None:
        """Keep a sample, in memory and on disk."""
        key = self.key(sample.allocation)
        sample.allocation.save(self.folder / f"{key}.alloc.json")
        self._keep(key, sample, self.folder / f"{key}.json")


@dataclass(frozen=True, kw_only=True)
class KnobSample(Scored):
    """One network of a scheme, measured.

    Attributes:
        number: In the order in which they were measured.
        goal: The floor and the cost that it was measured for.
        values: Of the free numbers.
        weights: Digest of its weights: of a scheme that has changed it is another.
        bytes: `nonzero`, `packed`, and of the ONNX `file`.
        reference_ns: Time of the dense network that times are on the scale of.
        training: Of a sample that was trained, how: steps, rate, seconds, and held-out losses.
    """

    number: int
    goal: str
    values: Mapping[str, float]
    weights: str
    bytes: Mapping[str, int]
    reference_ns: float
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For its file, and for reports."""
        training = {"training": dict(self.training)} if self.training else {}
        return {
            "number": self.number, "goal": self.goal, "values": dict(self.values), **super().to_json(), "bytes": dict(self.bytes),
            "weights": self.weights, "reference_ns": self.reference_ns, **training,
        }  # fmt: skip


class KnobSamples(Kept[KnobSample]):
    """A folder for each: `KEY/sample.json`, and `KEY/weights.safetensors`, the state of the compressed module.

    Of one that was trained also `KEY/trained.safetensors`, which training leaves, and keeps its state beside until it is done.
    """

    def _files(self) -> Iterator[tuple[str, Path]]:
        return ((p.parent.name, p) for p in sorted(self.folder.glob("*/sample.json")))

    def _load(self, content: Mapping[str, Any], path: Path) -> KnobSample:
        return KnobSample(
            number=int(content["number"]), goal=content["goal"], values=content["values"], weights=content["weights"],
            bytes=content["bytes"], reference_ns=float(content["reference_ns"]), training=content.get("training", {}),
            **Scored.fields(content),
        )  # fmt: skip

    def trained(self, values: Mapping[str, float], weights: str) -> Path:
        """File of the trained weights. weights: digest of the untrained ones."""
        return self.folder / self._key(values, weights) / "trained.safetensors"

    def add(self, sample: KnobSample, model: torch.nn.Module | None) -> None:
        """Keep a sample with the weights of its module, None where it has none."""
        key = self._key(sample.values, sample.weights)
        if model is not None:
            tensors = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
            write_bytes(self.folder / key / "weights.safetensors", save(tensors))
        self._keep(key, sample, self.folder / key / "sample.json")


def logarithm(loss: float) -> float:
    """Of a loss, which may be 0."""
    return math.log(max(loss, 1e-12))

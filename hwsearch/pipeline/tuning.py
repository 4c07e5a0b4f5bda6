"""The numbers of a scheme, by measurement: of the networks that hold a floor the one of least cost, in at most ten samples.

`knobs` says what to measure next; this module compresses, builds, times and scores it, and keeps each sample in a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.costs import Costs
from hwsearch.deployment.deploy import kept_of, metadata_of, of_allocation, parse_variants, with_weights
from hwsearch.deployment.session import Job, Measured, Session
from hwsearch.device import fingerprint as devices
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, BudgetMissed, HwsearchError, InvalidInput
from hwsearch.files import write_bytes
from hwsearch.graph.calls import evaluating
from hwsearch.graph.export import weights_digest
from hwsearch.loss.divergence import closeness
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform
from hwsearch.pipeline.goal import Goal
from hwsearch.pipeline.knobs import (
    LEAST_MARGIN,
    MOST_KNOBS,
    Knob,
    KnobSearch,
    Point,
    Prior,
    by_ratio,
    place_of,
    value_of,
)
from hwsearch.pipeline.samples import FOLDER, KnobSample, KnobSamples
from hwsearch.pipeline.scorer import scorer_for
from hwsearch.plot import plot_bayes
from hwsearch.progress import Progress, spoken
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.recovery import Options, Recovery, SchemeRecovery, Trainable
from hwsearch.recovery.trained import Trained, put
from hwsearch.recovery.training import Diverged
from hwsearch.task import Task

OBJECTIVES = ("size", "latency", "macs")
COMPUTED = ("size", "macs")
BASE, PICTURE, SEARCHING = "fp32", "bayes.png", "search for the numbers of the scheme"
DRAWN = 41
"""Places of each knob that the posterior is reported at."""


class Footprint(Protocol):
    """What is left, as `schemes.Footprint` counts it."""

    @property
    def dense_bytes(self) -> int:
        """Of the dense network."""
    @property
    def nonzero_bytes(self) -> int:
        """Of the values that are not zero."""
    @property
    def packed_bytes(self) -> int:
        """With positions and scales."""
    @property
    def widths(self) -> Mapping[str, int]:
        """Channels left of each group."""


class Compressed(Protocol):
    """What a scheme made of a task."""

    @property
    def task(self) -> Task:
        """With a compressed module."""
    @property
    def footprint(self) -> Footprint:
        """The bytes that are left."""
    @property
    def allocation(self) -> Allocation | None:
        """By which the task is deployed, where a search chose it."""

    def trainable(self) -> Trainable:
        """For training. Raises InvalidInput where the scheme cannot be trained."""

    def trained(self, lowering: Lowering) -> Compressed:
        """The same with the weights that training left."""


class Scheme(Protocol):
    """How to compress a task, with free numbers."""

    @property
    def parameters(self) -> Sequence[Knob]:
        """The free numbers."""

    def __call__(self, task: Task, /, **values: float) -> Compressed:
        """The task compressed. Raises HwsearchError where these numbers cannot be."""


@dataclass(frozen=True)
class Quick:
    """What is known of a network without building it: how often it agrees with the dense one, or is that, and what is computed."""

    agreement: float
    costs: Costs
    weights: str
    dense_bytes: int
    dense: bool


@dataclass(frozen=True)
class Tuned:
    """What a search over the numbers of a scheme found.

    Attributes:
        task: Its name. `backend`: what it was measured on. `device`: that.
        values: The free numbers of the answer; None where it is the dense network.
        score: `dense`, of the module; `deployed`, of the answer's engine, by `evaluate`.
        dense: Costs of the dense network in fp32.
        measured: Costs of the answer; the size is that of `Footprint.packed_bytes`, which is computed, and no file's.
        floor: As in the report of a run with a floor: `text`, `least`, `held`, `standard_errors`, the `search` and its `samples`.
        posterior: For pictures: `places` of each knob, and on their grid `mean` and `deviation` of the score; None for three knobs.
        training: How each sample was trained, as it was asked for; empty where nothing was.
    """

    task: str
    backend: str
    device: dict[str, Any]
    values: dict[str, float] | None
    score: dict[str, float]
    dense: Costs
    measured: Costs
    floor: dict[str, Any]
    posterior: dict[str, Any] | None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the final score holds the floor."""
        return bool(self.floor["held"])

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        own = {"schema": 1, "kind": "scheme report", "met": self.met, **vars(self)}
        return own | {"dense": self.dense.known(), "measured": self.measured.known()}

    def save(self, path: str | Path) -> None:
        """Write report.json."""
        write_bytes(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def __str__(self) -> str:
        own, dense, cost = self.floor, self.dense, self.measured
        search, errors = own["search"], own["standard_errors"]
        noise = "its noise is not known, as the task does not say how many samples are `scored`"
        if errors is not None:
            noise = f"by {errors:+.1f} standard errors of {own['error']:.4f}"
        chosen = "the dense network: nothing cheaper that was measured holds the floor"
        if self.values is not None:
            chosen = named(self.values)
        held = "held" if self.met else "MISSED"
        return "\n".join([
            f"{self.task} on {self.backend}: {chosen}",
            f"floor    {held}: {self.score['deployed']:.4f} for {own['least']:.4f} ({own['text']}), {noise}",
            f"size     {cost['size']:,.0f} bytes packed (computed), dense {dense['size']:,.0f} "
            f"({dense['size'] / cost['size']:.2f}x)",
            f"latency  {cost['latency'] / 1e6:.4g} ms measured, dense {dense['latency'] / 1e6:.4g} ms "
            f"({dense['latency'] / cost['latency']:.2f}x)",
            f"macs     {cost['macs']:,.0f}, dense {dense['macs']:,.0f}",
            f"search   least {own['minimized']}, {len(own['samples'])} sample(s) scored {search['says']}; there at least "
            f"{search['least']:.4f}, dense {search['dense']:.4f}",
            *([f"trained  each sample, by {self.training['method']}"] if self.training else []),
            *map(_line, own["samples"]),
        ])  # fmt: skip


def named(values: Mapping[str, float]) -> str:
    """Numbers to read."""
    return ", ".join(f"{name}={value:.4g}" for name, value in values.items())


def _line(sample: Mapping[str, Any]) -> str:
    """Of the report."""
    return f"sample   {sample['number']}: {_told(sample)}"


def _told(sample: Mapping[str, Any]) -> str:
    if sample["score"] is None:
        return f"{named(sample['values'])}: failed: {sample['failed']}"
    error = "" if sample["error"] is None else f" ± {sample['error']:.4f}"
    notes = ["holds" if sample["holds"] else "does not hold", *["the answer"] * sample["answer"], *["reused"] * sample["reused"]]
    if own := sample.get("training"):
        before, after = own["held_out"]["refitted"], own["held_out"]["recovered"]
        notes.insert(0, f"trained in {spoken(own['seconds'])}, held-out loss {before:.3g} to {after:.3g}")
    costs = sample["costs"]
    return (
        f"{named(sample['values'])}: score {sample['score']:.4f}{error}, {costs['latency'] / 1e6:.4g} ms, "
        f"{costs['size']:,.0f} bytes, {spoken(sample['seconds'])}; {', '.join(notes)}"
    )


def tune(
    session: Session, scheme: Scheme, goal: Goal, folder: Path, *, training: Options | None = None, seed: int = 0,
    progress: Progress,
) -> Tuned:  # fmt: skip
    """Find, measure and leave in a folder the network of a scheme that costs least of those whose score holds a floor.

    Leaves model.onnx, report.json, bayes.png and the folder samples. training: of each sample; None trains nothing.

    Raises:
        BudgetMissed: The final score does not hold the floor; all is left in the folder.
        InvalidInput: The scheme has no free number, or too many; or the dense network does not hold the floor.
        BackendUnavailable: The runtime does not build the dense network, or scikit-optimize is not installed.
    """
    knobs = scheme.parameters
    if not 1 <= len(knobs) <= MOST_KNOBS:
        names = f" ({', '.join(k.name for k in knobs)})" if knobs else ""
        raise InvalidInput(
            f"the scheme has {len(knobs)} free parameters{names}; a search is over one to {MOST_KNOBS}: leave as many as that free "
            "(`Free`), and bind the others"
        )
    progress.start(None, SEARCHING)
    try:
        search = _Search(session, scheme, goal, folder, training, seed, progress)
        search.run()
        found = search.answer()
    finally:
        progress.stop()
    found.save(folder / "report.json")
    plot_bayes(found, folder / PICTURE)
    progress.record(str(found))
    if not found.met:
        own = found.floor
        raise BudgetMissed(
            f"the floor breaks: the score is {found.score['deployed']:.4f}, and {own['text']} is {own['least']:.4f}; what held on "
            f"the data of the search does not on those of `evaluate`. It is in {folder}; ask for a higher floor, or give "
            "`validate` more samples",
            nearest=found,
        )
    return found


class _Search:
    """Places of the knobs, what these networks cost, and what they score."""

    def __init__(
        self, session: Session, scheme: Scheme, goal: Goal, folder: Path, training: Options | None, seed: int, progress: Progress
    ) -> None:
        self.training = None if training is None else replace(training, seed=seed)
        self.session, self.setup, self.scheme, self.goal = session, session.setup, scheme, goal
        self.folder, self.progress, self.knobs = folder, progress, tuple(scheme.parameters)
        self.scorer = scorer_for(session, goal.floor)
        self.scale = max(self.scorer.allowed, 1e-3 * abs(self.scorer.dense), 1e-9)
        self.quick: dict[tuple[float, ...], Quick | None] = {}
        self._dense_outputs = [self._run(traced.graph, args, kwargs) for traced, args, kwargs in self.setup.lowering.comparable]
        highest = {k.name: k.high for k in self.knobs}
        at_most = self._quick(highest, must=True)
        assert at_most is not None
        if training is not None and (made := scheme(self.setup.lowering.task, **highest)).allocation is None:
            made.trainable()  # raises where it cannot be trained
        self.dense = Costs(size=at_most.dense_bytes, macs=self.setup.network.macs)
        self.search = KnobSearch(
            self.knobs, self._prior(), free=at_most.dense, measured_cost=goal.minimize not in COMPUTED, seed=seed
        )
        self.samples = KnobSamples(folder / FOLDER, self._made_of(), progress.say)
        same = [s for s in self.samples.known.values() if (q := self._quick(s.values)) is not None and q.weights == s.weights]
        self.done = sorted(same, key=lambda s: s.number)
        if same:
            session.scale_ns = same[0].reference_ns  # all times are on one scale
            progress.say(f"{len(same)} sample(s) of before are used again")
        self.asked = f"least {goal.minimize} at {goal.floor.text}"
        self.measured = sum(s.goal == self.asked for s in same)  # a search that was killed goes on with what it had left

    def _made_of(self) -> dict[str, Any]:
        """What has to be the same for a sample to be used again, beside its weights."""
        own = {**self.scorer.made_of(), "knobs": [[k.name, k.low, k.high, k.whole] for k in self.knobs]}
        if self.training is not None:
            own |= {"training": vars(self.training), "training data": Objective(self.setup.lowering).data_digest}
        return own

    # ---- what needs no engine

    def _run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    def _quick(self, values: Mapping[str, float], *, must: bool = False) -> Quick | None:
        """What is known without an engine; None where the scheme cannot be applied. must: raises then."""
        key = tuple(values[k.name] for k in self.knobs)
        if key not in self.quick:
            try:
                self.quick[key] = self._as_quick(self.scheme(self.setup.lowering.task, **values))
            except HwsearchError:
                if must:
                    raise
                self.quick[key] = None
        return self.quick[key]

    def _as_quick(self, made: Compressed) -> Quick:
        left, lowering, near = made.footprint, self.setup.lowering, list[float]()
        with evaluating(made.task.model) as model:
            for dense, (_, args, kwargs) in zip(self._dense_outputs, lowering.comparable, strict=True):
                found = self._run(model, args, kwargs)
                near += closeness(found, dense, lowering.task.divergence, lowering.batch_axes)[0].tolist()
        return Quick(
            float(np.mean(near)), self._computed(left), weights_digest(made.task.model.state_dict().items()),
            left.dense_bytes, left.packed_bytes >= left.dense_bytes and self._computed(left).macs == self.setup.network.macs,
        )  # fmt: skip

    def _computed(self, left: Footprint) -> Costs:
        network = self.setup.network
        widths = {g: w for g, w in left.widths.items() if g in network.channels}
        return Costs(size=left.packed_bytes, macs=network.narrow(widths).macs)

    def _prior(self) -> Prior:
        """From how often networks agree with the dense one on calibration data, and from what of their cost is computed.

        Where samples are trained nothing is known of scores before: untrained ones fall far earlier, and by far more.
        """
        share = self.scale / max(abs(self.scorer.dense), 1e-9)
        column = self.goal.minimize if self.goal.minimize in COMPUTED else "macs"
        whole = self.dense[column]

        def at(x: Sequence[float]) -> tuple[float, float]:
            found = self._quick({k.name: value_of(k, own) for k, own in zip(self.knobs, x, strict=True)})
            if found is None:
                return LEAST_MARGIN, 1.0
            return 1.0 - (1.0 - found.agreement) / share, found.costs[column] / whole

        self.progress.say("comparing a few networks of the scheme with the dense one, without building them")
        prior = Prior.of(self.knobs, at)
        return prior if self.training is None else replace(prior, margin=Prior.none(self.knobs).margin)

    # ---- samples

    def run(self) -> None:
        """Measure samples until nothing more is worth one, or none is left."""
        while (x := self.search.next(self._points(), self.goal.samples - self.measured)) is not None:
            values = {k.name: value_of(k, own) for k, own in zip(self.knobs, x, strict=True)}
            self.measured += 1
            sample = self._measure(values)
            self.done.append(sample)
            self.progress.step(f"sample {self.measured} of at most {self.goal.samples}: {_told(self._json(sample, None))}")

    def _points(self) -> list[Point]:
        return [
            Point(
                tuple(place_of(k, s.values[k.name]) for k in self.knobs), s.spare(self.scorer) / self.scale,
                (s.error or 0.0) / self.scale, None if s.score is None else math.log(self._share(s)),
            )
            for s in self.done
        ]  # fmt: skip

    def _share(self, sample: KnobSample) -> float:
        """Of the dense network's cost."""
        whole = sample.reference_ns if self.goal.minimize == "latency" else self.dense[self.goal.minimize]
        return max(sample.costs[self.goal.minimize] / whole, 1e-9)

    def _measure(self, values: Mapping[str, float]) -> KnobSample:
        """One sample: compressed, built, timed and scored; a failure is one too."""
        begun_s = self.session.limit.used_s
        made, lowering, own = None, None, dict[str, Any]()
        try:
            made = self.scheme(self.setup.lowering.task, **values)
        except HwsearchError as problem:
            own = {"failed": str(problem)}
        if made is not None:
            own["weights"] = weights_digest(made.task.model.state_dict().items())
            if self.training is not None:
                try:
                    made, lowering, own["training"] = self._trained(made, self.samples.trained(values, own["weights"]))
                except Diverged as problem:
                    own["failed"] = str(problem)
            if "failed" not in own:
                own |= self._engine(made, lowering)
        fields: dict[str, Any] = {
            "number": 1 + max((s.number for s in self.done), default=0), "goal": self.asked, "values": dict(values),
            "weights": "", "bytes": {}, "training": {},
            "score": None, "error": None, "costs": Costs(), "reference_ns": self.session.scale_ns,
            "seconds": self.session.limit.used_s - begun_s,
        }  # fmt: skip
        sample = KnobSample(**{**fields, **own})
        self.samples.add(sample, None if made is None else made.task.model)
        return sample

    def _trained(self, made: Compressed, path: Path) -> tuple[Compressed, Lowering, dict[str, Any]]:
        """A network of the scheme, trained: (what it is then, the lowering with its weights, how it went).

        path: of the file of weights; where it is there, training had come to its end.
        """
        recovery = self._recovery(made, path)
        if not path.is_file():
            try:
                recovery.run()
            except Diverged as problem:
                if not path.is_file():
                    raise
                self.progress.say(str(problem))  # what was best until then is there
            self.progress.start(None, SEARCHING)
        known = Trained.load(path)
        lowering, told = put(recovery.whole, recovery.kept, recovery.variants, known, path), known.report
        how = {k: told[k] for k in ("method", "rate", "steps", "seconds", "held_out", "best_step", "stopped")}
        return made if made.allocation is not None else made.trained(lowering), lowering, how

    def _recovery(self, made: Compressed, path: Path) -> Recovery:
        assert self.training is not None
        if made.allocation is not None:
            setup = self._chosen(made.allocation)
            refitted = with_weights(setup, made.allocation, None).lowering
            return Recovery(
                setup.lowering, refitted, kept_of(made.allocation, setup.network), parse_variants(made.allocation), self.training,
                quantize_outputs=setup.backend.quantize_outputs, out=path, progress=self.progress,
            )  # fmt: skip
        return SchemeRecovery(self.setup.lowering, made.trainable(), self.training, out=path, progress=self.progress)

    def _engine(self, made: Compressed, lowering: Lowering | None) -> dict[str, Any]:
        """What an engine of a compressed network costs and scores, as fields of its sample. lowering: of trained weights."""
        left, job = made.footprint, self._job(made, lowering)
        own: dict[str, Any] = {"bytes": {"nonzero": left.nonzero_bytes, "packed": left.packed_bytes}}
        try:
            measured = self.session.measure({"sample": job})["sample"]
        except BackendUnavailable as problem:
            return {**own, "failed": str(problem)}
        own["bytes"] |= {"file": measured.file_bytes}
        if measured.build.wrong:
            return {**own, "failed": "the runtime computes wrong outputs"}
        score, error = self.scorer(measured)
        return {**own, "score": score, "error": error, "costs": self._costs(made, measured)}

    def _costs(self, made: Compressed, measured: Measured) -> Costs:
        return replace(self._computed(made.footprint), latency=self.session.time_ns(measured))

    def _job(self, made: Compressed, trained: Lowering | None) -> Job:
        """The network as it is deployed: in fp32, or by the allocation that a search chose. trained: with weights of training."""
        own = self.setup.lowering
        if made.allocation is None:
            lowering = Lowering(made.task, own.batch, int8_bits=own.int8_bits, unsigned=own.unsigned)
            return self._in_fp32(replace(self.setup, lowering=lowering))
        chosen = made.allocation
        setup, base = self._chosen(chosen), str(chosen.options["base"])
        setup = with_weights(setup, chosen, None) if trained is None else replace(setup, lowering=trained)
        return Job(parse_variants(chosen), base, metadata_of(chosen, base), setup)

    def _chosen(self, allocation: Allocation) -> Setup:
        """The setup that an allocation was searched for. Raises InvalidInput where it is of another batch size."""
        own = self.setup.lowering
        setup = of_allocation(own.task, allocation, self.setup.backend, self.setup.options.threads)
        if setup.lowering.batch != own.batch:
            raise InvalidInput(
                f"the tables of Allocate are of batch {setup.lowering.batch}, and this search is of batch {own.batch}: give "
                f"--batch {setup.lowering.batch}"
            )
        return setup

    def _in_fp32(self, setup: Setup) -> Job:
        metadata = {
            "hwsearch.base_precision": BASE, "hwsearch.backend": setup.backend.name,
            "hwsearch.options": json.dumps(setup.described, sort_keys=True),
        }  # fmt: skip
        return Job(uniform(setup.network, BASE), BASE, metadata, setup)

    # ---- the answer

    def answer(self) -> Tuned:
        """The cheapest that holds the floor, built anew, left as model.onnx, and scored by `evaluate`."""
        holding = [s for s in self.done if s.spare(self.scorer) >= 0 and self._share(s) < 1.0]
        best = min(holding, key=self._share, default=None)
        made, lowering = (None, None) if best is None else self._made(best)
        job = self._in_fp32(self.setup) if made is None else self._job(made, lowering)
        assert job.setup is not None
        measured = self.session.measure({"answer": job})["answer"]
        if measured.build.wrong:
            raise BackendUnavailable("the runtime computes wrong outputs for the answer, and did not for its sample: run again")
        write_bytes(self.folder / "model.onnx", job.setup.onnx(job.variants, job.metadata).SerializeToString())
        dense = replace(self.dense, latency=self.session.scale_ns)
        costs = replace(dense, latency=self.session.time_ns(measured)) if made is None else self._costs(made, measured)
        score = {"dense": self.session.dense_score, "deployed": self.session.score(measured, "the answer")}
        floor = self.scorer.judged(self.goal, score["dense"], score["deployed"])
        return Tuned(
            task=self.setup.lowering.task.name, backend=self.setup.backend.name,
            device=devices.fingerprint_for(self.setup.backend).to_json(), values=None if best is None else dict(best.values),
            score=score, dense=dense, measured=costs, floor={**floor, "samples": [self._json(s, best) for s in self.done]},
            posterior=self._posterior(), training={} if self.training is None else vars(self.training),
        )  # fmt: skip

    def _made(self, sample: KnobSample) -> tuple[Compressed, Lowering | None]:
        """The network of a sample again, with the weights that training left."""
        made = self.scheme(self.setup.lowering.task, **sample.values)
        if self.training is None:
            return made, None
        return self._trained(made, self.samples.trained(sample.values, sample.weights))[:2]

    def _json(self, sample: KnobSample, answer: KnobSample | None) -> dict[str, Any]:
        return {
            **sample.to_json(), "holds": sample.spare(self.scorer) >= 0, "reused": sample.reused, "answer": sample is answer,
        }  # fmt: skip

    def _posterior(self) -> dict[str, Any] | None:
        if len(self.knobs) == MOST_KNOBS:
            return None
        values = [[value_of(k, x) for x in np.linspace(0.0, 1.0, DRAWN)] for k in self.knobs]
        places = [sorted(set(own)) for own in values]
        x = np.array([[place_of(k, v) for k, v in zip(self.knobs, own, strict=True)] for own in product(*places)])
        scored = [replace(p, margin=p.margin + p.noise) for p in self._points()]  # margins are less a standard error
        mean, deviation = self.search.margin(scored, x)
        shape = tuple(map(len, places))
        score = self.scorer.floor + self.scale * mean
        return {
            "knobs": [k.name for k in self.knobs], "log": [by_ratio(k) for k in self.knobs], "places": places,
            "mean": score.reshape(shape).tolist(),
            "deviation": (self.scale * deviation).reshape(shape).tolist(),
        }  # fmt: skip

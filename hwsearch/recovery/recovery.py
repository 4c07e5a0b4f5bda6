"""A whole recovery: rate, steps, the training, and what is left of it: never worse on held-out data than what it began with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from hwsearch.compress.widths import Kept
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.files import changed
from hwsearch.graph.calls import evaluating
from hwsearch.graph.export import weights_digest
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, uniform
from hwsearch.progress import Progress, seconds_of, spoken
from hwsearch.recovery.checkpoint import Checkpoint
from hwsearch.recovery.coupling import METHODS, PASSES, Coupling, Projection, coupling
from hwsearch.recovery.gradients import DENSE, Pruning, rule
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.processes import Processes, launched
from hwsearch.recovery.student import FLOAT, Student, has_norms
from hwsearch.recovery.trained import Trained, made_of, put
from hwsearch.recovery.training import Course, Diverged, Point, Schedule, Training

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""That `auto` chooses from."""
ALIKE = 1.02
"""Of trials whose held-out losses are no further apart the one of the largest rate is the best: low rates change little."""
TRIAL, LEAST_TRIAL, MOST_TRIAL = 0.04, 30, 100
"""Share of the steps that each rate is tried for, and the least and most of them: trials that are too short favour low rates."""
LIFT = 1 / 3
"""The rate of a training is that of the best trial times this power of how many times longer it is: low rates win short trials."""
WORSE = 1.25
"""But no larger than where trials end at so many times the best held-out loss: above, longer trainings are worse as well."""
TIMING_STEPS = 2
"""Steps by which it is found how many a time limit allows."""
EPOCHS, CALIBRATION_EPOCHS = 2, 30
"""Of a training without another word: with `Task.train`, and on calibration data alone."""
LED = ("shrink", "halfspace")
"""Methods that lead the whole network to fewer channels in the first half of the steps."""
FREE = ("mask", "lc")
"""Methods that multiply with weights that are not rounded."""
SCALES = ("fixed", "learned")
BATCHNORM = ("folded", "unfolded")
UNFOLDED = ("ste", "mask", "srste")
"""Methods that can train with BatchNorm unfolded."""
SCHEMES = ("mask", "lc")
"""Methods that train what a scheme allows; the first where none is named."""
TIMED = 0.9
"""Of a time limit, the share that steps are planned for."""


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        epochs: None for `EPOCHS` with `Task.train` and `CALIBRATION_EPOCHS` without, or as many as `time_limit_s` allows.
        time_limit_s: Seconds of the whole recovery; None for no limit.
        method: One of `METHODS`.
        rate: The largest learning rate; None to find it.
        seed: Of every random choice.
        scored: Whether the task's score is taken before and after.
        gradients: What enters the backward products of layers: `dense`, or one of `gradients.WORDS`.
        scales: Of int8 weights: one of `SCALES`.
        batchnorm: One of `BATCHNORM`: folded into layers, or in training mode after them.
        passes: C steps of `lc`.
    """

    epochs: int | None = None
    time_limit_s: float | None = None
    method: str = "ste"
    rate: float | None = None
    seed: int = 0
    scored: bool = True
    gradients: str = DENSE
    scales: str = "fixed"
    batchnorm: str = "folded"
    passes: int = PASSES

    @staticmethod
    def parse(text: str, method: str) -> Options:
        """Of `lc:steps=12,epochs=2`, `mask:5m`, `3` (epochs) or `10m`: a method, numbers, or both. method: where none is named.

        Nothing is scored in such a training. Raises InvalidInput.
        """
        name, colon, items = text.strip().partition(":")
        if not colon and name not in METHODS:
            name, items = "", name
        own: dict[str, Any] = {"method": name or method, "scored": False}
        for item in (i.strip() for i in items.split(",") if i.strip()):
            key, equals, value = item.partition("=")
            try:
                if key == "steps" and own["method"] != "lc":
                    raise ValueError(f"steps are of lc, and {own['method']} has none")
                if not equals:
                    own |= {"epochs": int(item)} if item.isdecimal() else {"time_limit_s": seconds_of(item)}
                elif key in ("steps", "epochs"):
                    own["passes" if key == "steps" else key] = int(value)
                elif key in ("time", "lr"):
                    own |= {"time_limit_s": seconds_of(value)} if key == "time" else {"rate": float(value)}
                else:
                    raise ValueError(f"nothing of a training is called {key!r}")
            except ValueError as error:
                raise InvalidInput(
                    f"--recover {text}: {item} is not understood ({error}); expected a method, e.g. lc:steps=12, with epochs=2, "
                    "time=5m or lr=1e-3 after a comma, or a number of epochs (2) or a duration (5m) alone"
                ) from error
        return Options(**own)

    def __post_init__(self) -> None:
        rule(self.gradients)
        if self.scales not in SCALES:
            raise InvalidInput(f"unknown scales {self.scales!r}; expected one of {', '.join(SCALES)}")
        if self.scales == "learned" and self.method in FREE:
            raise InvalidInput(f"{self.method} multiplies with weights that are not rounded, and learns no scales; take `ste`")
        if self.method not in METHODS:
            raise InvalidInput(f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.passes < 1:
            raise InvalidInput(f"lc takes at least one step, got {self.passes}")
        if self.batchnorm not in BATCHNORM:
            raise InvalidInput(f"unknown batchnorm {self.batchnorm!r}; expected one of {', '.join(BATCHNORM)}")
        if self.batchnorm == "unfolded" and self.method not in UNFOLDED:
            raise InvalidInput(f"{self.method} trains with BatchNorm folded; unfolded it is trained by {', '.join(UNFOLDED)}")
        if self.epochs is not None and self.epochs < 1:
            raise InvalidInput(f"epochs must be at least 1, got {self.epochs}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise InvalidInput(f"the time limit must be positive, got {self.time_limit_s} s")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise InvalidInput(f"the learning rate must be positive, got {self.rate}")


@dataclass(frozen=True)
class Recovered:
    """What a recovery left.

    Attributes:
        trained: The weights, as they are deployed.
        course: Held-out losses on the way.
        schedule: Steps and learning rate.
        options: How it was trained.
        seconds: It took, over all processes that worked on it.
        score: The task's score, simulated in torch: `dense`, `refitted`, `recovered`; empty where it was not taken.
        objective: What was made small, in words.
        lowering: The network with these weights.
        pruned: Where gradients were pruned, what was measured of that (see `Pruning.measured`).
    """

    trained: Trained
    course: Course
    schedule: Schedule
    options: Options
    seconds: float
    score: dict[str, float]
    objective: str
    lowering: Lowering = field(repr=False)
    pruned: dict[str, float] = field(default_factory=dict)

    @property
    def better(self) -> bool:
        """Whether anything better than the start was found."""
        return self.course.best > 0

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {
            "method": self.options.method, "rate": self.schedule.rate, "steps": self.schedule.steps, "seed": self.options.seed,
            "objective": self.objective, "seconds": self.seconds, "score": self.score,
            "held_out": {"refitted": self.course.start, "recovered": self.course.least}, "best_step": self.course.best,
            "stopped": self.course.stopped, "curve": [vars(p) for p in self.course.points],
            "gradients": {"rule": self.options.gradients, **self.pruned}, "scales": self.options.scales,
            "batchnorm": self.options.batchnorm,
        }  # fmt: skip

    def __str__(self) -> str:
        course = self.course
        lines = [
            f"recovered by {self.options.method} in {self.course.points[-1].step} steps, {spoken(self.seconds)}, at a learning "
            f"rate of up to {self.schedule.rate:.2g}; made small: {self.objective}",
            f"held-out loss {course.least:.4g}, {course.start:.4g} refitted"
            + (f"; the best weights are those of step {course.best}" if self.better else ": nothing better was found, and kept"),
        ]
        if self.score:
            lines.append("score " + ", ".join(f"{value:.4f} {what}" for what, value in self.score.items()))
        if course.stopped:
            lines.append(f"ended early: {course.stopped}")
        if flips := [p.flips for p in course.points if p.flips is not None]:
            lines.append(
                f"{flips[0]:.2%} of the weights of N:M patterns entered or left them in a step at first, {flips[-1]:.2%} at last"
            )
        if own := self.pruned:
            lines.append(
                f"gradients {self.options.gradients}: measured, {own['zeros']:.0%} zeros in what backward products read "
                f"({own['zeros_dense']:.0%} unpruned), and {own['backward_share']:.0%} of the time of layers' products is theirs; "
                f"estimated, hardware that skips zeros would save {own['estimated_saving']:.0%} of that time; here nothing is saved"
            )
        return "\n".join(lines)


class Recovery:
    """One recovery of one allocation.

    Args:
        whole: The dense network.
        start: The network of the allocation with refitted weights.
        kept: The slots of channel groups that the allocation keeps; empty where all stay.
        variants: Unit -> variant.
        out: File for the weights, beside which the state of the training is kept; None keeps everything in memory.
        processes: That train together; None for those that were launched so.
    """

    projection: Projection | None = None
    """What a scheme allows, beside the channels that are kept."""

    def __init__(
        self,
        whole: Lowering,
        start: Lowering,
        kept: Kept,
        variants: Mapping[str, Variant],
        options: Options,
        *,
        quantize_outputs: bool = False,
        out: str | Path | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
        processes: Processes | None = None,
    ) -> None:
        self.whole, self.start, self.kept, self.variants, self.options = whole, start, dict(kept), dict(variants), options
        self.quantize_outputs, self.out, self.clock = quantize_outputs, None if out is None else Path(out), clock
        self.progress = progress or Progress.silent()
        self.begun, self.processes = clock(), processes or launched()
        if self.processes.count > 1:
            if options.batchnorm == "unfolded":
                raise InvalidInput("BatchNorm normalises over the batch of one process; train it folded, or in a single process")
            self._begin_alike()
        self.objective = Objective(self.start, options.seed, self.processes)
        self.leads = options.method in LED and start.network.channels != whole.network.channels

    def run(self) -> Recovered:
        """Train. Raises InvalidInput (data or options), and HwsearchError where training cannot go on; see `Training.run`."""
        score = self._scored("dense", "refitted")
        student = self._student(self.start)
        begun = self._checkpoint("begun")
        schedule = self._schedule(student, [c for c in (begun, self._checkpoint("led")) if c is not None])
        if self.leads:
            first = max(1, schedule.whole // 2)
            student = self._student(self._led(replace(schedule, steps=first)))
            schedule = replace(schedule, steps=max(1, schedule.whole - first))
        training = Training(
            student, self.objective_of(student), self._coupling(self.options.method, student), schedule,
            checkpoint=begun, progress=self.progress, late=self._late, clock=self.clock,
        )  # fmt: skip
        try:
            course = training.run()
        except Diverged as error:
            if training.course.best:
                self._finish(training, score)
                where = f"; the best weights until then, of step {training.course.best}, are in {self.out}" if self.out else ""
                raise Diverged(f"{error}{where}") from error
            raise
        if self.leads:
            course = self._against_the_start(course, training)
        found = self._finish(training, score)
        for checkpoint in (begun, self._checkpoint("led")):
            if checkpoint is not None:
                checkpoint.remove()
        return found

    def _coupling(self, method: str, student: Student) -> Coupling:
        return coupling(method, student, projection=self.projection, passes=self.options.passes)

    def objective_of(self, student: Student) -> Objective:
        """For a student: the same data, through its own graph."""
        if student.lowering is self.start:
            return self.objective
        return Objective(student.lowering, self.options.seed, self.processes)

    def _begin_alike(self) -> None:
        """Every process begins with the refitted weights of the main one: other processors may round them differently."""
        own = made_of(self.whole, self.kept, self.variants) | {"calibration data": self.whole.calibration_digest}
        main = self.processes.of_main(lambda: own)
        differs = changed(main, own)
        if self.processes.total(float(bool(differs)))[0]:
            what = f": other {differs}" if differs else ""
            raise IncompatibleTables(
                f"the processes that train together were given different things{what}; start all with the same task and allocation"
            )
        student = self._student(self.start)
        tensors = {p: t.detach().cpu() for p, t in student.tensors.items() if p in student.home}
        tensors, ranges = self.processes.of_main(lambda: (tensors, student.ranges or None))
        self.start = self.whole.narrow(self.kept, calibrate=True, tensors=student.everywhere(tensors), ranges=ranges)

    def _student(self, lowering: Lowering) -> Student:
        same = lowering.network.channels == self.start.network.channels
        variants = self.variants if same else dict.fromkeys(self.variants, FLOAT)
        pruned = rule(self.options.gradients)
        pruning = None if pruned is None else Pruning(pruned)
        return Student(
            lowering, variants, quantize_outputs=self.quantize_outputs, pruning=pruning, learned=self.options.scales == "learned",
            device=self.processes.device, unfolded=self._unfolds(lowering),
        )  # fmt: skip

    def _unfolds(self, lowering: Lowering) -> bool:
        """Whether BatchNorm is trained on its own: schemes are of the module's weights, before it is folded."""
        return self.options.batchnorm == "unfolded" or (self.projection is not None and has_norms(lowering))

    def _late(self) -> bool:
        """Whether time is up, in any process."""
        limit = self.options.time_limit_s
        return limit is not None and self.processes.total(float(self.clock() - self.begun >= limit))[0] > 0

    def _checkpoint(self, what: str) -> Checkpoint | None:
        """The state beside the file of weights."""
        if self.out is None:
            return None
        return Checkpoint(self.out.with_name(f"{self.out.name}.{what}"), self._made_of, self.processes)

    @cached_property
    def _made_of(self) -> dict[str, str]:
        """All that the steps of a training depend on, but for `Task.loss` and all batches of `Task.train` but the first."""
        own = self.options
        return {
            **made_of(self.whole, self.kept, self.variants),
            "start": weights_digest(self._student(self.start).tensors.items()),
            "calibration data": self.whole.calibration_digest,
            "training data": self.objective.data_digest,
            "chosen on": "the last quarter",  # before 29 November 2026 on others, whose losses are not comparable
            "method": own.method,
            "epochs": str(own.epochs),
            "time limit": str(own.time_limit_s),
            "learning rate": str(own.rate),
            "seed": str(own.seed),
            **({} if own.gradients == DENSE else {"gradients": own.gradients}),  # as in files of before
            **({} if own.scales == SCALES[0] else {"scales": own.scales}),
            **({} if own.batchnorm == BATCHNORM[0] else {"batchnorm": own.batchnorm}),
            **({} if own.passes == PASSES else {"steps of lc": str(own.passes)}),
        }

    # ---- rate and steps

    def _schedule(self, student: Student, begun: Sequence[Checkpoint]) -> Schedule:
        """Steps and rate: those of a training that was begun, or found by trials."""
        for checkpoint in begun:
            if (state := checkpoint.load()) is not None:
                known = Schedule(**state.numbers["schedule"])
                return replace(known, steps=known.whole)
            if checkpoint.differs:
                self.progress.say(f"{checkpoint.path} is not gone on with: {checkpoint.differs}")
        steps, rate = self._planned(student)
        return Schedule(steps, rate, self.options.seed, steps)

    def _planned(self, student: Student) -> tuple[int, float]:
        """(steps, rate)."""
        own = self.options
        epochs = own.epochs or (EPOCHS if self.objective.task.train is not None else CALIBRATION_EPOCHS)
        steps, step_s = self.objective.steps * epochs, 0.0
        if own.time_limit_s is not None:
            step_s = self._tried(student, RATES[0], TIMING_STEPS)[1] / TIMING_STEPS
            left_s = TIMED * own.time_limit_s - (self.clock() - self.begun)
            fit = self.processes.of_main(lambda: max(1, int(left_s / max(step_s, 1e-9))))
            steps = fit if own.epochs is None else min(steps, fit)
        if own.rate is not None:
            return steps, own.rate
        each = min(max(LEAST_TRIAL, math.ceil(TRIAL * steps)), MOST_TRIAL, max(1, steps // (2 * len(RATES))))
        rate = lifted(self._trials(student, each), (steps / each) ** LIFT)
        return (steps if step_s == 0.0 else max(1, steps - len(RATES) * each)), rate

    def _trials(self, student: Student, steps: int) -> dict[float, float]:
        """Rate -> held-out loss at which a trial of so many steps ends, infinite where it diverges. Raises Diverged if all do."""
        found: dict[float, float] = {}
        self.progress.start(len(RATES), "finding the learning rate")
        for rate in RATES:
            held_out, _ = self._tried(student, rate, steps)
            found[rate] = held_out if math.isfinite(held_out) else math.inf
            self.progress.step(f"{rate:.0e}: held-out {held_out:.4g}" if math.isfinite(held_out) else f"{rate:.0e}: diverged")
        self.progress.stop()
        if min(found.values()) == math.inf:
            raise Diverged(
                f"the loss diverges at every learning rate from {RATES[0]:.0e} on; look at what `loss` returns for the first "
                "batches"
            )
        return found

    def _tried(self, student: Student, rate: float, steps: int) -> tuple[float, float]:
        """(held-out loss after so many steps, infinite where the loss diverges; seconds); the student is as it was afterwards."""
        start = {path: t.detach().clone() for path, t in student.tensors.items()}
        objective = _First(self.objective, steps)
        schedule = Schedule(steps, rate, self.options.seed)
        trial = Training(student, objective, self._coupling(self._plain, student), schedule, clock=self.clock)
        try:
            seconds = trial.trial()
            return trial.held_out(self.objective), seconds
        except Diverged:
            return math.inf, 0.0
        finally:
            student.put(start)

    @property
    def _plain(self) -> str:
        """The method that rates are tried with."""
        if self.projection is not None:
            return SCHEMES[0]  # what is projected changes at the C steps of `lc` alone, of which a trial has too few
        return "ste" if self.options.method in LED else self.options.method

    # ---- leading the whole network

    def _led(self, schedule: Schedule) -> Lowering:
        """The network of the allocation, cut from the whole one once nothing reads the channels that go."""
        student = self._student(self.whole)
        training = Training(
            student, self.objective_of(student), coupling(self.options.method, student, self.kept), schedule,
            checkpoint=self._checkpoint("led"), progress=self.progress, late=self._late, clock=self.clock,
        )  # fmt: skip
        training.run_to_the_end()
        done = self.whole.narrow({}, tensors=student.everywhere({p: t.detach().cpu() for p, t in student.tensors.items()}))
        return done.narrow(self.kept, calibrate=True)

    def _against_the_start(self, course: Course, training: Training) -> Course:
        """A course that begins with the refitted weights, which are kept where nothing better was found."""
        refitted = self._student(self.start)
        held_out = self.objective.held_out_loss(refitted)
        after = [replace(p, step=p.step + 1) for p in course.points]
        if course.least >= held_out:
            training.best, training.student = refitted.answer(), refitted
            course.best = -1
        course.points[:] = [Point(0, 0.0, None, held_out), *after]
        course.best += 1
        return course

    # ---- the end

    def _scored(self, *what: str, recovered: Student | None = None) -> dict[str, float]:
        if not self.options.scored:
            return {}
        task, found = self.whole.task, {}
        for name in what:
            self.progress.start(None, f"scoring the {name} network")
            if name == "dense":
                with evaluating(task.model) as model:
                    found[name] = _score(task.evaluate, model)
            else:
                found[name] = _score(task.evaluate, (recovered or self._student(self.start)).predict)
            self.progress.stop()
        return found

    def _finish(self, training: Training, score: dict[str, float]) -> Recovered:
        """The best weights, written and scored."""
        student, course = training.student, training.course
        ranges = student.ranges or None
        own = made_of(self.whole, self.kept, self.variants)
        trained = Trained({path: t.cpu() for path, t in training.best.items() if path in student.home}, ranges, own)
        lowering = put(self.whole, self.kept, self.variants, trained, self.out or "memory")
        student.put(training.best, folded=True)
        if score:
            known = {"recovered": score["refitted"]} if not course.best else self._scored("recovered", recovered=student)
            score = {**score, **known}
        found = Recovered(
            trained, course, training.schedule, self.options, training.used_s + self.clock() - self.begun, score,
            self.objective.described, lowering, {} if training.pruning is None else training.pruning.measured(),
        )  # fmt: skip
        if self.out is not None:
            trained = replace(trained, report=found.to_json())
            if self.processes.main:
                trained.save(self.out)
            found = replace(found, trained=trained)
        return found


class Trainable(Projection, Protocol):
    """What training leads the weights of a scheme to."""

    @property
    def kept(self) -> Kept:
        """The slots of channel groups that stay; empty where all do."""


class SchemeRecovery(Recovery):
    """One recovery of one network of a scheme, from the weights of the dense one in the channels that stay.

    Args:
        whole: The dense network.
        way: What the scheme makes of it.
        options: As for an allocation; the method is one of `SCHEMES`.
        out: As for an allocation.
        progress: As for an allocation.
        processes: As for an allocation.
    """

    def __init__(
        self, whole: Lowering, way: Trainable, options: Options, *, out: str | Path | None = None, progress: Progress | None = None,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        if options.method not in SCHEMES:
            raise InvalidInput(f"{options.method} does not train schemes; expected one of {', '.join(SCHEMES)}")
        self.projection = way
        start = whole.narrow(way.kept) if way.kept else whole
        variants = uniform(whole.network, FLOAT.precision)
        super().__init__(whole, start, way.kept, variants, options, out=out, progress=progress, processes=processes)


class _First(Objective):
    """The first batches of the data, for a trial."""

    def __init__(self, of: Objective, count: int) -> None:
        self.__dict__.update(of.__dict__)
        self._given = of.first(count)
        if not self._given:
            raise InvalidInput("train(0) gave no batches; it is called with the number of an epoch and returns its batches")

    def batches(self, epoch: int) -> Any:
        return iter(self._given)

    @property
    def steps(self) -> int:
        return len(self._given)


def _score(evaluate: Callable[..., float], predict: Callable[..., Any]) -> float:
    import torch

    with torch.no_grad():
        return float(evaluate(predict))


def lifted(trials: Mapping[float, float], factor: float) -> float:
    """The learning rate of a training that is longer than its trials.

    Args:
        trials: Rate, rising -> held-out loss at the end of a trial, infinite where it diverged.
        factor: By which the best trial's rate is raised, as far as trials of larger ones allow (`WORSE`).
    """
    least = max(min(trials.values()), 1e-12)
    best = max(rate for rate, held_out in trials.items() if held_out <= ALIKE * least)
    above = [rate for rate in trials if rate > best]
    for low, high in pairwise([best, *above]):
        a, b = (math.log(max(trials[rate], 1e-12) / least / WORSE) for rate in (low, high))
        if b > 0:  # a is not: trials cross what is allowed between these two
            return min(best * factor, low * math.exp(math.log(high / low) * a / (a - b)))
    return best * factor

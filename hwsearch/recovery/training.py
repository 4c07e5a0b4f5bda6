"""The loop: Adam under a cosine, judged on held-out data as it is deployed, the best kept; it goes on where it was killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch

from hwsearch.errors import HwsearchError
from hwsearch.progress import Progress
from hwsearch.recovery.checkpoint import Checkpoint, State
from hwsearch.recovery.coupling import Coupling
from hwsearch.recovery.objective import Batch, Objective, digest_seed
from hwsearch.recovery.student import Student, moved

EVALUATIONS = 20
"""How often the weights are judged in a training."""
PATIENCE = 5
"""Judgements in a row, each worse than the one before, after which a training ends in the second half of its steps.

In the first half the rate is high, and losses may rise before they fall.
"""
WARMUP, MOST_WARMUP = 0.05, 100
"""Share of the steps, and number of them at most, in which the rate rises to its own."""
EXPLODED = 1e3
"""Times the first losses, or 1 where these are smaller: a loss above that is not going to fall again."""
CHECKPOINT_S = 60.0
MOMENTS = ("exp_avg", "exp_avg_sq")
DRAWS = 1
"""That the random numbers of pruned gradients are seeded with, beside seed and step: they are no others'."""


class Diverged(HwsearchError):
    """The loss is not a number any more, or exploded."""


@dataclass(frozen=True)
class Point:
    """The training judged once: after `step` steps and `seconds`, the mean loss of the steps since the last, and `held_out`.

    flips: with `srste`, the mean share of weights that entered or left their supports in one of these steps.
    """

    step: int
    seconds: float
    loss: float | None
    held_out: float
    flips: float | None = None


@dataclass
class Course:
    """How a training went. best: step of the weights that are kept; 0 for those of the start."""

    points: list[Point] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def start(self) -> float:
        """Held-out loss of the start."""
        return self.points[0].held_out

    @property
    def least(self) -> float:
        """Held-out loss of what is kept."""
        return min(p.held_out for p in self.points)


@dataclass(frozen=True)
class Schedule:
    """steps: of this part of a training; rate: the largest learning rate; whole: steps of all parts."""

    steps: int
    rate: float
    seed: int = 0
    whole: int = 0

    def rate_at(self, step: int) -> float:
        """The rate of a step: a short rise, then half a cosine down to 0 (Loshchilov and Hutter 2017)."""
        warm = min(max(1, math.ceil(WARMUP * self.steps)), MOST_WARMUP)
        return self.rate * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Training:
    """A student on its way. late: whether time is up; clock: of seconds used, for the record."""

    def __init__(
        self,
        student: Student,
        objective: Objective,
        coupling: Coupling,
        schedule: Schedule,
        *,
        checkpoint: Checkpoint | None = None,
        progress: Progress | None = None,
        late: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.student, self.objective, self.coupling, self.schedule = student, objective, coupling, schedule
        self.checkpoint, self.progress, self.late, self.clock = checkpoint, progress or Progress.silent(), late, clock
        self.processes, self.pruning = objective.processes, student.pruning
        self.optimizer = torch.optim.Adam(student.tensors.values(), schedule.rate)
        self.course = Course()
        self.best = coupling.answer()
        self.step = 0
        self.used_s = 0.0
        self._losses: list[float] = []
        self._first = 0.0
        self._random: torch.Tensor | None = None
        self._begun = self._saved = clock()

    def run(self) -> Course:
        """Train to the end; the best weights are in `best` then.

        Raises Diverged where the loss does, and HwsearchError where memory is short; `best` is right then as well.
        """
        if self.pruning is not None:
            self.pruning.restart()
        if self.checkpoint is not None and (state := self.checkpoint.load()) is not None:
            self._restore(state)
        if not self.course.points:
            self.course.points.append(Point(0, 0.0, None, self.held_out(self.objective)))
        self.student.rounds = self.coupling.rounds
        every = max(1, self.schedule.steps // EVALUATIONS)
        self.progress.start(self.schedule.steps, "recovering", self.step)
        try:
            for batch in self._batches():
                self._one(batch)
                if self.step % every == 0 or self.step == self.schedule.steps:
                    self._look()
                else:
                    self.progress.advance()
                if self._over():
                    break
                if self.clock() - self._saved >= CHECKPOINT_S:
                    self.save()
        finally:
            self.progress.stop()
        if self._losses:
            self._look()
        return self.course

    def trial(self) -> float:
        """Train to the end without a look at held-out data; returns the seconds that it took. Raises as `run`."""
        begun = self.clock()
        self.student.rounds = self.coupling.rounds
        for batch in self._batches():
            self._one(batch)
        return self.clock() - begun

    def run_to_the_end(self) -> None:
        """Train for what the last step leaves: nothing is judged. Where time is up, the last step comes at once."""
        if self.checkpoint is not None and (state := self.checkpoint.load()) is not None:
            self._restore(state)
        self.student.rounds = self.coupling.rounds
        self.progress.start(self.schedule.steps, "leading to fewer channels", self.step)
        for batch in self._batches():
            self._one(batch)
            self.progress.advance()
            if self.late() and self.step < self.schedule.steps:
                self.coupling.stepped(self.schedule.steps - 1, self.schedule.steps, 0.0)
                break
            if self.clock() - self._saved >= CHECKPOINT_S:
                self.save()
        self.progress.stop()
        self.save()

    def _over(self) -> bool:
        if self.step == self.schedule.steps:
            return False
        last = [p.held_out for p in self.course.points if 2 * p.step >= self.schedule.steps][-PATIENCE - 1 :]
        if len(last) > PATIENCE and all(a < b for a, b in pairwise(last)):
            self.course.stopped = f"{PATIENCE} judgements in a row were each worse than the one before"
        elif self.late():
            self.course.stopped = "the time limit was reached"
        return bool(self.course.stopped)

    def _batches(self) -> Iterator[Batch]:
        """Those of the steps that are left. Each epoch has random numbers of its own; a restored run goes on with its own."""
        each = self.objective.steps
        while self.step < self.schedule.steps:
            epoch, skip = divmod(self.step, each)
            torch.manual_seed(digest_seed(self.schedule.seed, epoch))
            batches = islice(self.objective.batches(epoch), skip, None)
            before = self.step
            for batch in batches:
                if self._random is not None:
                    torch.set_rng_state(self._random)
                    self._random = None
                yield batch
                if self.step == self.schedule.steps or self.step == (epoch + 1) * each:
                    break
            if self.step == before:
                raise HwsearchError(
                    f"train({epoch}) gave {skip} batches and train(0) gave {each}; expected as many in every epoch"
                )

    def _one(self, batch: Batch) -> None:
        rate = self.schedule.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.pruning is not None:
            others = () if self.processes.main else (self.processes.index,)
            self.pruning.start(digest_seed(self.schedule.seed, self.step, DRAWS, *others))
        self.optimizer.zero_grad()
        try:
            loss = self.objective.loss(self.student, batch)
            value = self.processes.total(float(loss.detach()) * batch.share)[0]
            self._check(value)
            (loss * batch.share).backward()  # type: ignore[no-untyped-call]
            self.processes.add_up([t.grad for t in self.student.tensors.values() if t.grad is not None])
            self.coupling.gradients(batch.samples)
            self.optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise HwsearchError(
                    f"memory is too short for a step on a batch of {batch.samples} samples; give smaller batches in `train`, or "
                    "close what else uses memory. The same command goes on from the last checkpoint"
                ) from error
            raise
        self.coupling.stepped(self.step, self.schedule.steps, rate)
        self.step += 1
        self._losses.append(value)

    def _check(self, value: float) -> None:
        if self.step < 10:
            self._first = max(self._first, abs(value))
        if math.isfinite(value) and abs(value) <= EXPLODED * max(self._first, 1.0):
            return
        what = f"exploded to {value:.3g}" if math.isfinite(value) else f"became {value}"
        raise Diverged(
            f"the loss {what} at step {self.step + 1} of {self.schedule.steps}, at a learning rate of "
            f"{self.schedule.rate_at(self.step):.2g}; train at a lower one (--lr {self.schedule.rate / 10:.1g}), or look at what "
            "`loss` returns for this batch"
        )

    # ---- judging

    def held_out(self, objective: Objective) -> float:
        """Held-out loss of what the weights of now are deployed as. objective: of whose data."""
        own = {path: t.detach().clone() for path, t in self.student.tensors.items()}
        self.student.put(self.coupling.answer(), folded=True)
        try:
            return objective.held_out_loss(self.student)
        finally:
            self.student.put(own)

    def _look(self) -> None:
        """Judge the weights; the best are kept."""
        held_out = self.held_out(self.objective)
        loss = sum(self._losses) / max(1, len(self._losses))
        self._losses = []
        seconds = self.used_s + self.clock() - self._begun
        if held_out < self.course.least:
            self.course.best, self.best = self.step, self.coupling.answer()
        flips = self.coupling.flips[self.course.points[-1].step - self.step :]
        mean = sum(flips) / len(flips) if flips else None
        self.course.points.append(Point(self.step, seconds, loss, held_out, mean))
        self.progress.step(f"loss {loss:.4g}, held-out {held_out:.4g} (start {self.course.start:.4g})", self.step)

    # ---- checkpoints

    def save(self) -> None:
        """Leave all that the next step depends on."""
        self._saved = self.clock()
        if self.checkpoint is None:
            return
        tensors: dict[str, torch.Tensor] = {"random|": torch.get_rng_state()}
        for path, tensor in self.student.tensors.items():
            tensors[f"weight|{path}"], tensors[f"best|{path}"] = tensor, self.best[path]
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"{name}|{path}"] = value
        numbers = {
            "schedule": vars(self.schedule),
            "points": [vars(p) for p in self.course.points],
            "best": self.course.best,
            "losses": self._losses,
            "first": self._first,
            "used_s": self.used_s + self.clock() - self._begun,
            "pruning": {} if self.pruning is None else self.pruning.counts,
        }
        own = {f"coupling|{k}": t for k, t in self.coupling.state().items()}
        self.checkpoint.save(State(self.step, numbers, {**tensors, **own}))

    def _restore(self, state: State) -> None:
        self.step, numbers = state.step, state.numbers
        self.course = Course([Point(**p) for p in numbers["points"]], numbers["best"])
        self._losses, self._first, self.used_s = numbers["losses"], numbers["first"], numbers["used_s"]
        if self.pruning is not None:
            self.pruning.restart(numbers["pruning"])
        self._random = state.tensors["random|"]
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.tensors.items():
            kind, _, path = name.partition("|")
            parts.setdefault(kind, {})[path] = tensor
        self.student.put(parts["weight"])
        self.best = parts["best"]
        for path, tensor in self.student.tensors.items():
            own: dict[str, Any] = {k: moved(parts[k][path], tensor.device) for k in MOMENTS if path in parts.get(k, {})}
            if own:
                self.optimizer.state[tensor] = {**own, "step": parts["step"][path]}
        self.coupling.load(moved(parts.get("coupling", {}), self.student.device))

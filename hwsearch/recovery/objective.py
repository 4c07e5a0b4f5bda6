"""What recovery makes small, on which data, and on which data it is judged.

With `Task.train` and `Task.loss`: the loss, plus the divergence from the dense network's outputs (knowledge distillation at
temperature 1, Hinton et al. 2015; the two are added without a weight, as NNCF does). Without them: that divergence alone, on the
calibration batches that weights were refitted on. The weights to keep are chosen by the divergence on the last quarter of the
calibration data, which nothing is fitted on: where weights were refitted, their divergence is far smaller than elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hwsearch.errors import HwsearchError, InvalidInput
from hwsearch.graph.calls import as_call
from hwsearch.graph.export import first_line, weights_digest
from hwsearch.graph.trace import Traced
from hwsearch.loss.divergence import mean_divergence
from hwsearch.lowering.lowering import Lowering, in_pieces
from hwsearch.recovery.processes import Processes
from hwsearch.recovery.student import CPU, OnDevice, Student, moved
from hwsearch.task import Inputs

PIECE = 32
"""Calibration batches are trained on in pieces of at most so many samples."""
SEED_EPOCHS = 1000
"""Numbers of epochs between those of one seed and of the next: `Task.train` shuffles by them."""
HELD_OUT = 512
"""Samples that weights are chosen by, at most."""
TRAINING = "training data"


@dataclass
class Batch:
    """One step's data, or the part of it that this process takes.

    Attributes:
        traced: Of the narrow network.
        dense: Outputs of the dense network.
        samples: Of the whole minibatch.
        share: Of these, how much is here.
        squares: Of each output of the dense network its mean square over the whole minibatch; None where it is all here.
        target: None for calibration data.
    """

    traced: Traced
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dense: Any
    samples: int
    share: float = 1.0
    squares: list[float] | None = None
    target: Any = field(default=None, repr=False)


class Objective:
    """What is made small. lowering: the network that is trained, narrow or not; seed: of the order of calibration batches."""

    def __init__(self, lowering: Lowering, seed: int = 0, processes: Processes | None = None) -> None:
        self.lowering, self.seed, self.processes = lowering, seed, processes or Processes(device=CPU)
        self.task = lowering.task
        self.whole = lowering if lowering.whole is None else lowering.whole
        while self.whole.whole is not None:
            self.whole = self.whole.whole
        self.axes = self.whole.batch_axes
        self._dense: dict[int, OnDevice] = {}

    @property
    def described(self) -> str:
        """What is made small, in words."""
        divergence = "the divergence from the dense network's outputs"
        return f"the task's loss and {divergence}" if self.task.train else f"{divergence} on calibration data"

    # ---- data

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Those of an epoch, in its own order. Raises InvalidInput on what `Task.train` should not give."""
        if self.task.train is None:
            order = torch.randperm(len(self._calibration), generator=torch.Generator().manual_seed(self.seed + 7919 * epoch))
            yield from (self._calibration[i] for i in order.tolist())
            return
        pair: Any
        epoch += SEED_EPOCHS * self.seed
        for number, pair in enumerate(self.task.train(epoch)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                kind = f"{len(pair)} things" if isinstance(pair, tuple | list) else type(pair).__name__
                raise InvalidInput(f"train({epoch}) gave {kind} as batch {number}; expected pairs of (inputs, target)")
            yield self._batch(pair[0], TRAINING, pair[1])

    @cached_property
    def steps(self) -> int:
        """Batches of an epoch; counted where `Task.train` has no length. Raises InvalidInput where there are none."""
        if self.task.train is None:
            return len(self._calibration)
        given: Any = self.task.train(0)
        count = len(given) if hasattr(given, "__len__") else sum(1 for _ in given)
        if not count:
            raise InvalidInput("train(0) gave no batches; it is called with the number of an epoch and returns its batches")
        return count

    @property
    def data_digest(self) -> str:
        """16 hex digits that change with the first batch of `Task.train`; empty without it."""
        first = None if self.task.train is None else next(iter(self.task.train(0)), None)
        return weights_digest(("", x) for x in pytree.tree_leaves(first) if isinstance(x, torch.Tensor)) if first else ""

    @cached_property
    def _calibration(self) -> list[Batch]:
        """Pieces of the calibration batches to train on."""
        inputs = [_inputs(args, kwargs) for _, args, kwargs in self.lowering.fitting]
        try:
            return [self._batch(piece, "calibration data") for piece in in_pieces(inputs, PIECE)]
        except HwsearchError:  # a model that takes batches of one size only
            return [self._batch(i, "calibration data") for i in inputs]

    @cached_property
    def held_out(self) -> list[Batch]:
        """What weights are chosen by."""
        found: list[Batch] = []
        for _, args, kwargs in self.lowering.scoring:
            if sum(b.samples for b in found) < HELD_OUT:
                found.append(self._batch(_inputs(args, kwargs), "calibration data"))
        return found

    def _batch(self, inputs: Inputs, what: str, target: Any = None) -> Batch:
        samples = _samples(inputs)
        args, kwargs = moved(self.processes.share(as_call(inputs), samples, what), self.processes.device)
        inputs = _inputs(args, kwargs)
        target = moved(self.processes.share(target, samples, f"the target in {what}"), self.processes.device)
        whole = self.whole.traced_for(inputs, what)
        runner = self._dense.setdefault(id(whole), OnDevice(whole, self.processes.device))
        with torch.no_grad():
            dense = runner.outputs(args, kwargs)
        share, squares = _samples(inputs) / samples, self._squares(dense)
        return Batch(self.lowering.traced_for(inputs, what), args, kwargs, dense, samples, share, squares, target)

    def _squares(self, dense: Any) -> list[float] | None:
        """Of each output its mean square over the parts of all processes; None where there is one process."""
        if self.processes.count == 1:
            return None
        if any(where.axis is None for where in self.axes):
            raise InvalidInput(
                "the model has an output without a batch dimension, which is of the whole minibatch: it cannot be shared among "
                f"{self.processes.count} processes; start a single one"
            )
        outputs = [y for y in pytree.tree_leaves(dense) if isinstance(y, torch.Tensor)]
        parts = (self.processes.total(float(y.double().square().sum()), y.numel()) for y in outputs)
        return [square / count for square, count in parts]

    # ---- what is made small

    def loss(self, student: Student, batch: Batch) -> torch.Tensor:
        """A scalar with a gradient, a mean over what of the batch is here. Raises InvalidInput where the task's own loss fails."""
        outputs = student(batch.traced, batch.args, batch.kwargs)
        mean, _ = mean_divergence(outputs, batch.dense, self.task.divergence, self.axes, batch.squares)
        if self.task.loss is None:
            return mean
        try:
            own = self.task.loss(outputs, batch.target)
        except Exception as error:
            raise InvalidInput(
                f"loss(outputs, target) failed: {type(error).__name__}: {first_line(error)}; outputs {_shape(outputs)}, "
                f"target {_shape(batch.target)}"
            ) from error
        if not isinstance(own, torch.Tensor) or own.numel() != 1 or not own.requires_grad:
            raise InvalidInput(
                f"loss(outputs, target) returned {_shape(own)}; expected one number as a tensor that depends on the outputs"
            )
        return mean + own.reshape(())

    def judged(self, predict: Callable[[Batch], Any]) -> float:
        """Mean divergence of a sample on held-out data."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.held_out:
                mean, samples = mean_divergence(predict(batch), batch.dense, self.task.divergence, self.axes, batch.squares)
                total, count = total + samples * float(mean), count + samples
        total, whole = self.processes.total(total, count)
        return total / whole

    def held_out_loss(self, student: Student) -> float:
        """Of a student as it is deployed."""
        with student.deployed():
            return self.judged(lambda b: student(b.traced, b.args, b.kwargs))

    def first(self, count: int) -> list[Batch]:
        """Batches that trials are made on."""
        found = list(islice(self.batches(0), count))
        return [found[i % len(found)] for i in range(count)] if found else []


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    return kwargs if kwargs else args


def _samples(inputs: Inputs) -> int:
    args, kwargs = as_call(inputs)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim()]
    return len(tensors[0]) if tensors else 1


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"of shape {tuple(value.shape)} ({str(value.dtype).removeprefix('torch.')})"
    return f"of type {type(value).__name__}"


def digest_seed(*numbers: int) -> int:
    """Of random numbers that are a training's own: of an epoch, of a step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

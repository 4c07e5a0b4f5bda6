"""Recovery: better than the refit where it can be, never worse, the same after a kill, and clear where it cannot go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recovering
import torch
from recovering import off, recover
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.errors import HwsearchError, InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.progress import Progress
from hwsearch.recovery import training
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.recovery import RATES, Options, Recovered, Recovery, lifted
from hwsearch.recovery.trained import Trained


def with_task(task: hs.Task, **options: Any) -> Recovered:
    """Recovers a task at whole widths in int8."""
    whole = Lowering(task)
    first, kept, variants = recovering.start("int8", 1.0)
    fields = {"epochs": 1, "rate": recovering.RATE, **options}
    return Recovery(whole, first_of(first, whole), kept, variants, Options(**fields)).run()


def first_of(known: Lowering, whole: Lowering) -> Lowering:
    """Refitted weights of the same network, for another task."""
    return whole.narrow({}, known.replaced, calibrate=True)


@pytest.mark.parametrize("data", [False, True])
def test_held_out_loss_falls_below_that_of_the_refit(data: bool) -> None:
    done = recover(data)
    assert done.better
    assert done.course.least < 0.8 * done.course.start
    assert done.score["recovered"] >= done.score["refitted"]


def test_trained_engines_are_no_further_from_the_simulation_than_refitted_ones() -> None:
    done = recover()
    first, _, variants = recovering.start()
    before, after = (off(low, variants) for low in (first, done.lowering))
    assert after <= max(2 * before, 1e-5)


def test_the_answer_is_never_worse_on_held_out_data_than_the_start() -> None:
    done = recover(data=True, precision="fp32", rate=0.5, epochs=2)  # far too large a rate
    first, _, _ = recovering.start("fp32", data=True)
    objective = Objective(done.lowering)
    start, now = (objective.judged(lambda b, low=low: low.traced_for(b.args, "").graph(*b.args)) for low in (first, done.lowering))
    assert now <= start * (1 + 1e-6)
    assert not done.better
    assert done.course.stopped or len(done.course.points) > 2


@pytest.mark.parametrize("data", [False, True])
def test_weights_are_chosen_on_what_nothing_was_fitted_on(data: bool) -> None:
    """On what weights were refitted on, the refitted ones look far better than they are, and so does whatever stays near them."""

    def samples(batches: Iterable[tuple[Any, ...]]) -> set[bytes]:
        return {x.numpy().tobytes() for args in batches for x in args[0]}

    low = recovering.lowering(data)
    objective = Objective(recovering.start(data=data)[0])
    fitted, last = (samples(args for _, args, _ in own) for own in (low.fitting, low.scoring))
    held_out = samples(b.args for b in objective.held_out)
    assert held_out == last
    assert not held_out & fitted
    if not data:
        assert samples(b.args for b in objective.batches(0)) == fitted


def test_one_seed_gives_one_result_and_another_seed_another() -> None:
    one, same, other = recover(seed=1), recover(seed=1), recover(seed=2)
    assert all(torch.equal(one.trained.tensors[k], same.trained.tensors[k]) for k in one.trained.tensors)
    assert any(not torch.equal(one.trained.tensors[k], other.trained.tensors[k]) for k in one.trained.tensors)


def test_the_rate_is_found_by_trials(capsys: pytest.CaptureFixture[str]) -> None:
    first, kept, variants = recovering.start(data=True)
    options = Options(epochs=1, scored=False)
    done = Recovery(recovering.lowering(True), first, kept, variants, options, progress=Progress()).run()
    lines = [line for line in capsys.readouterr().err.splitlines() if "finding the learning rate: " in line]
    tried = {float(a): float(b.split(",")[0]) for a, b in (line.split("rate: ")[1].split(": held-out ") for line in lines)}
    assert tuple(tried) == RATES
    each = max(done.schedule.steps // (2 * len(RATES)), 1)  # half of so few steps are for trials
    assert done.schedule.rate == pytest.approx(lifted(tried, (done.schedule.steps / each) ** (1 / 3)), rel=0.02)


@pytest.mark.parametrize(
    ("trials", "rate"),
    [
        ({1e-5: 2.0, 1e-4: 1.0, 1e-3: 1.1}, 3e-4),  # the best times the factor
        ({1e-5: 1.015, 1e-4: 1.0, 1e-3: 2.0}, 1e-4 * 10 ** (math.log(1.25) / math.log(2.0))),  # to where trials are a quarter worse
        ({1e-5: 1.0, 1e-4: 1.015, 1e-3: 1e9}, 1.03e-4),  # of two alike the larger, and hardly more
        ({1e-5: 1.0, 1e-4: math.inf, 1e-3: math.inf}, 1e-5),  # no step towards what diverges
        ({1e-5: 3.0, 1e-4: 2.0, 1e-3: 1.0}, 3e-3),  # nothing is known of larger ones
        ({1e-5: 0.0, 1e-4: 0.0, 1e-3: 0.0}, 3e-3),
    ],
)
def test_the_best_trials_rate_is_raised_as_far_as_larger_ones_allow(trials: dict[float, float], rate: float) -> None:
    assert lifted(trials, 3.0) == pytest.approx(rate, rel=0.02)


def test_a_time_limit_bounds_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def tick() -> float:
        now[0] += 0.5
        return now[0]

    first, kept, variants = recovering.start()
    whole = recovering.lowering()
    done = Recovery(whole, first, kept, variants, Options(time_limit_s=60, rate=recovering.RATE, scored=False), clock=tick).run()
    assert now[0] <= 66
    assert 5 < done.course.points[-1].step <= done.schedule.steps < 400


def _fails_at(step: int, value: float) -> Any:
    seen = [0]

    def loss(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return F.cross_entropy(outputs, target) * (value if seen[0] > step else 1.0)

    return loss


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "became nan"), (1e7, "exploded to")])
def test_a_loss_that_diverges_is_an_error_and_what_was_reached_is_kept(value: float, message: str, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    task = recovering.task(train=recovering.train, loss=_fails_at(12, value))
    whole = Lowering(task)
    first, kept, variants = recovering.start(data=True)
    low = whole.narrow(first.kept, first.replaced, calibrate=True)
    options = Options(epochs=1, rate=recovering.RATE, scored=False)
    with pytest.raises(HwsearchError, match=rf"{message} .*at step 13 of 16.*--lr .*are in .*t\.safetensors"):
        Recovery(whole, low, kept, variants, options, out=out).run()
    assert Trained.load(out).report["best_step"] > 0


def no_batches(epoch: int) -> list[Any]:
    return []


def no_pairs(epoch: int) -> Iterator[torch.Tensor]:
    for x, _ in recovering.train(epoch):
        yield x


def other_targets(epoch: int) -> Iterator[Any]:
    for x, y in recovering.train(epoch):
        yield x, y[:7]


def other_inputs(epoch: int) -> Iterator[Any]:
    for x, y in recovering.train(epoch):
        yield x[:, :1], y


def fewer_later(epoch: int) -> Iterator[Any]:
    for number, pair in enumerate(recovering.train(epoch)):
        if epoch == 0 or number < 3:
            yield pair


@pytest.mark.parametrize(
    ("train", "loss", "message"),
    [
        (no_batches, F.cross_entropy, "train.0. gave no batches"),
        (no_pairs, F.cross_entropy, r"gave Tensor as batch 0; expected pairs of \(inputs, target\)"),
        (other_targets, F.cross_entropy, r"loss\(outputs, target\) failed.*shape \(64, 8\).*shape \(7,\)"),
        (other_inputs, F.cross_entropy, "the model fails on training data"),
        (recovering.train, lambda y, t: F.cross_entropy(y, t, reduction="none"), "expected one number"),
        (recovering.train, lambda y, t: 1.0, "of type float; expected one number"),
        (fewer_later, F.cross_entropy, r"train\(1\) gave 3 batches and train\(0\) gave 16"),
    ],
)
def test_data_and_losses_that_are_wrong_are_said(train: Any, loss: Any, message: str) -> None:
    with pytest.raises(HwsearchError, match=message):
        with_task(recovering.task(train=train, loss=loss), epochs=2, scored=False)


def test_short_memory_is_said_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    own = Objective.loss

    def loss(self: Objective, student: Any, batch: Any) -> torch.Tensor:
        if student.tensors and len(seen) == 9:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        seen.append(0)
        return own(self, student, batch)

    seen: list[int] = []
    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(HwsearchError, match="memory is too short for a step on a batch of 32 samples"):
        recover(out=tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors.begun").is_file()
    monkeypatch.setattr(Objective, "loss", own)
    done, whole = recover(out=tmp_path / "t.safetensors"), recover()
    assert all(torch.equal(done.trained.tensors[k], whole.trained.tensors[k]) for k in whole.trained.tensors)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "magic", "unknown method"),
        ("epochs", 0, "at least 1"),
        ("time_limit_s", -1.0, "positive"),
        ("rate", 0.0, "positive"),
    ],
)
def test_options_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(Options(), **{field: value})

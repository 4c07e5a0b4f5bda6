"""How weights are led: the augmented Lagrangian finds supports, removed channels fade to exact zero, patterns are kept."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovering
import tiny
import torch

from hwsearch.compress.patterns import nm_mask
from hwsearch.compress.widths import Kept
from hwsearch.lowering.refitted import refitted
from hwsearch.network.variants import Variant, legal
from hwsearch.recovery.checkpoint import Checkpoint
from hwsearch.recovery.coupling import Fading, HalfSpace, Lagrangian, SparseRefined, coupling
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.recovery.student import FLOAT, Student
from hwsearch.recovery.training import Point, Schedule, Training

N, K, SEEDS, PASSES, START, GROWTH = 10, 3, 100, 80, 1e-3, 1.1


def top(w: Any) -> dict[str, torch.Tensor]:
    """The nearest with K entries."""
    value = w["w"]
    kept = torch.zeros_like(value).scatter_(0, value.abs().topk(K).indices, 1.0)
    return {"w": value * kept}


class WithoutMultipliers(Lagrangian):
    def compress(self, w: Any, growth: float) -> None:
        super().compress(w, growth)
        self.multipliers = {k: torch.zeros_like(v) for k, v in self.multipliers.items()}


class WithTheWrongSign(Lagrangian):
    def compress(self, w: Any, growth: float) -> None:
        before = {k: v.clone() for k, v in self.multipliers.items()}
        super().compress(w, growth)
        self.multipliers = {k: 2 * before[k] - v for k, v in self.multipliers.items()}


def _found(kind: type[Lagrangian], seed: int) -> tuple[bool, bool]:
    """(whether the best support on the way is that of brute force, whether it is no worse than projecting the optimum)."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((N, N)))
    curves = np.geomspace(1.0, 30.0, N)
    H = torch.from_numpy(q @ np.diag(curves / curves.mean()) @ q.T)
    best = torch.from_numpy(rng.standard_normal(N))
    supports = torch.tensor(list(combinations(range(N), K)))  # all 120, each with the best values on it
    on = torch.linalg.solve(H[supports[:, :, None], supports[:, None, :]], (H @ best)[supports])
    off = torch.zeros(len(supports), N, dtype=torch.float64).scatter_(1, supports, on) - best
    losses = dict(zip(map(tuple, supports.tolist()), ((off @ H) * off).sum(1).tolist(), strict=True))

    def tuned(theta: torch.Tensor) -> float:
        return losses[tuple(torch.nonzero(theta).flatten().tolist())]

    bound = kind({"w": best}, top, START)
    reached = [tuned(bound.theta["w"])]
    for _ in range(PASSES):  # an exact L step: the gradient and `pull` are zero at its end
        zero = bound.pull({"w": torch.zeros(N, dtype=torch.float64)})["w"]
        w = torch.linalg.solve(H + bound.mu * torch.eye(N, dtype=torch.float64), H @ best - zero)
        bound.compress({"w": w}, GROWTH)
        reached.append(tuned(bound.theta["w"]))
    return min(reached) <= min(losses.values()) * (1 + 1e-9), min(reached) <= reached[0]


def _share(kind: type[Lagrangian]) -> float:
    found = [_found(kind, seed) for seed in range(SEEDS)]
    assert all(no_worse for _, no_worse in found)
    return float(np.mean([same for same, _ in found]))


def test_the_lagrangian_finds_the_supports_of_brute_force_and_its_mutants_do_not() -> None:
    assert _share(Lagrangian) >= 0.85
    assert _share(WithoutMultipliers) < 0.6
    assert _share(WithTheWrongSign) < 0.6


def _whole(name: str) -> tuple[Student, Kept]:
    low = tiny.lowering(name)
    kept = {g: tuple(range(0, n, 2)) for g, n in low.network.channels.items()}
    return Student(low, dict.fromkeys((u.name for u in low.network.units), FLOAT)), kept


@pytest.mark.parametrize(("kind", "late"), [(Fading, False), (Fading, True), (HalfSpace, False), (HalfSpace, True)])
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_whole_network_computes_what_the_cut_one_does_once_channels_are_led_out(
    name: str, kind: type[Fading], late: bool
) -> None:
    student, kept = _whole(name)
    low = student.lowering
    led = kind(student, kept)
    assert led.removed
    Training(student, Objective(low), led, Schedule(9, 1e-3), late=lambda: late).run_to_the_end()
    assert all(not bool((student.tensors[path] * mask).any()) for path, mask in led.removed)
    whole = low.narrow({}, tensors=student.everywhere({p: t.detach() for p, t in student.tensors.items()}))
    cut = whole.narrow(kept)
    assert cut.network.macs < 0.7 * whole.network.macs
    for traced, args, kwargs in whole.calibration[:2]:
        with torch.no_grad():
            want = traced.graph(*args, **kwargs)
            have = cut.traced_for(args, "").graph(*args, **kwargs)
        assert torch.allclose(have, want, atol=1e-5 * float(want.abs().max()))


def test_shrinking_is_linear() -> None:
    student, kept = _whole("cnn")
    led = Fading(student, kept)
    path, mask = led.removed[0]
    start = student.tensors[path].detach().clone()
    for step in range(4):
        led.stepped(step, 4, 0.0)
        assert torch.allclose(student.tensors[path] * mask, start * mask * (3 - step) / 4)
        assert torch.equal(student.tensors[path] * ~led.faded[path], start * ~led.faded[path])


def test_a_half_space_step_that_turns_a_group_around_makes_it_zero_for_good() -> None:
    student, kept = _whole("cnn")
    led = HalfSpace(student, kept)
    (one, first), (two, second) = led.removed[:2]
    for path, tensor in student.tensors.items():
        tensor.grad = torch.zeros_like(tensor) if path else None
    for step, factor in enumerate((-0.1, 1.0)):
        led.gradients(1)
        with torch.no_grad():
            own = student.tensors[one]
            own.copy_(torch.where(first, own * factor, own))
            if step:
                own.add_(0.1 * first)  # what a moment of the optimizer would do
        led.stepped(step, 10, 1e-3)
        assert not bool((student.tensors[one] * first).any())
        assert bool((student.tensors[two] * second).any())


def sparse(precision: str = "int8") -> tuple[Student, dict[str, Variant]]:
    """2:4 wherever that is possible, of refitted weights."""
    whole = recovering.lowering()
    wanted = Variant(precision, "2:4")
    variants = {u.name: wanted if legal(u, [wanted]) else Variant("fp32") for u in whole.network.units}
    return Student(refitted(whole, variants), variants), variants


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("method", ["ste", "mask", "srste", "lc"])
def test_patterns_are_kept_by_every_method(method: str, precision: str) -> None:
    student, variants = sparse(precision)
    units = [u for u, v in variants.items() if v.kept]
    assert len(units) >= 3
    before = _masks(student, units)
    how = coupling(method, student)
    training = Training(student, Objective(student.lowering), how, Schedule(10, 1e-3))
    training.run()
    answer = how.answer()
    for unit in units:
        path, network = student.lowering.traced.paths[unit][0], student.lowering.traced.network
        assert path is not None
        assert not bool((answer[path] * ~nm_mask(answer[path], network[unit].in_axis, 2, 4)).any())
    if method in ("ste", "mask"):
        assert all(torch.equal(a, b) for a, b in zip(before, _masks(student, units), strict=True))
        for unit in units:
            moment = training.optimizer.state[student.weight_of(unit)]["exp_avg"]
            weight = student.weight_of(unit)
            assert weight is not None
            assert not bool(moment[weight == 0].any())
            assert int((weight == 0).sum()) >= weight.numel() // 2


def _masks(student: Student, units: list[str]) -> list[torch.Tensor]:
    weights = [student.weight_of(u) for u in units]
    return [w != 0 for w in weights if w is not None]


def test_srste_lets_supports_change_and_its_pull_makes_them_change_less(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = {}
    for pull in (0.0, 200.0):
        monkeypatch.setattr("hwsearch.recovery.coupling.PULL", pull)
        student, _ = sparse()
        how = SparseRefined(student)
        Training(student, Objective(student.lowering), how, Schedule(40, 3e-3)).run()
        flips[pull] = sum(how.flips)
    assert 0 < flips[200.0] < flips[0.0]


def test_srste_counts_flips_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.recovery.training.CHECKPOINT_S", 0.0)
    done = Training._one

    def trained(path: Path, stop: int = -1) -> tuple[list[float], list[Point]]:
        student, _ = sparse()
        how = SparseRefined(student)
        checkpoint = Checkpoint(path, {"of": "a test"})
        training = Training(student, Objective(student.lowering), how, Schedule(40, 3e-3), checkpoint=checkpoint)

        def one(self: Training, batch: Any) -> None:
            if self.step == stop:
                raise KeyboardInterrupt
            done(self, batch)

        monkeypatch.setattr(Training, "_one", one)
        points = training.run().points
        return how.flips, points

    flips, points = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=17)
    again, same = trained(tmp_path / "parts")
    assert again == flips
    assert len(flips) == 40
    assert sum(flips) > 0
    assert [p.flips for p in same] == [p.flips for p in points] == [None, *np.reshape(flips, (20, 2)).mean(1).tolist()]


def test_the_share_of_flips_is_in_the_result() -> None:
    student, variants = sparse()
    options = Options(epochs=2, rate=3e-3, method="srste", scored=False)
    done = Recovery(recovering.lowering(), student.lowering, {}, variants, options).run()
    flips = [p["flips"] for p in done.to_json()["curve"]]
    assert flips[0] is None
    assert f"{flips[1]:.2%} of the weights of N:M patterns entered or left them" in str(done)
    assert f"{flips[-1]:.2%} at last" in str(done)


def test_the_answer_of_lc_is_what_is_deployed() -> None:
    first, _, variants = recovering.start("int8")
    student = Student(first, variants)
    how = coupling("lc", student)
    Training(student, Objective(first), how, Schedule(24, 1e-3)).run()
    answer = how.answer()
    assert all(torch.equal(student.rounded_weight(u, answer[p]), answer[p]) for u, p in how.homes.items())  # type: ignore[attr-defined]

"""Learned scales of int8 weights: LSQ's gradient, and what is trained is still what is deployed."""

from __future__ import annotations

from pathlib import Path

import pytest
import recovering
import torch
from networks import leaves
from recovering import off, recover
from torch import nn

import hwsearch as hs
from hwsearch.compress.patterns import nm_mask
from hwsearch.errors import InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted
from hwsearch.network.variants import INT8_BITS, Variant, int8_levels, legal, uniform
from hwsearch.recovery.recovery import Options
from hwsearch.recovery.student import SCALES, Student
from hwsearch.recovery.trained import Trained

LEVELS = int8_levels(INT8_BITS)


def moved(student: Student, seed: int = 0) -> Student:
    """With other weights, biases and scales."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, tensor in student.tensors.items():
            size = 0.2 if path.endswith(SCALES) else 0.05 * float(tensor.abs().mean())
            tensor.add_(size * torch.randn(tensor.shape, generator=random))
    return student


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_gradients_are_those_of_lsq(pattern: str) -> None:
    whole = recovering.lowering()
    wanted = Variant("int8", pattern)
    variants = {u.name: wanted if legal(u, [wanted]) else Variant("int8") for u in whole.network.units}
    student = moved(Student(refitted(whole, variants), variants, learned=True))
    assert len(student.held) == len(student.grids) == 5
    clipped = 0
    for unit in student.held:
        weight, log = student.weight_of(unit), student.tensors[unit + SCALES]
        assert weight is not None
        with torch.no_grad():
            weight.mul_(1.3)  # so that the largest are clipped
        v = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        found = student.learned_weight(unit, weight)
        assert torch.equal(found, student.rounded_weight(unit, weight))
        (found * v).sum().backward()
        scale = student.grids[unit] * log.detach().exp()
        sparse = student.variants[unit].kept is not None
        kept = nm_mask(weight, whole.network[unit].in_axis, 2, 4) if sparse else torch.ones(1)
        at = weight.detach() / scale * kept
        inside = at.abs() <= LEVELS
        clipped += int((~inside).sum())
        by_scale = torch.where(inside, at.round() - at, LEVELS * at.sign())
        dims = [d for d in range(at.dim()) if d != whole.network[unit].out_axis]
        assert log.grad is not None
        assert torch.allclose(log.grad, (v * by_scale * scale).sum(dims, keepdim=True), rtol=1e-3, atol=1e-5)
        assert weight.grad is not None
        assert torch.allclose(weight.grad, v * inside, rtol=1e-5)
    assert clipped > 20


def test_learned_scales_begin_as_fixed_ones() -> None:
    first, _, variants = recovering.start("int8")
    fixed, learned = Student(first, variants), Student(first, variants, learned=True)
    answers = fixed.answer(), learned.answer()
    assert all(torch.equal(answers[0][path], answers[1][path]) for path in answers[0])
    for traced, args, kwargs in first.calibration[:2]:
        assert torch.equal(fixed(traced, args, kwargs), learned(traced, args, kwargs))


def test_what_is_deployed_of_moved_scales_computes_what_the_student_does() -> None:
    first, kept, variants = recovering.start("int8")
    student = moved(Student(first, variants, learned=True))
    again = recovering.lowering().narrow(kept, tensors=student.everywhere(student.answer()), ranges=student.ranges)
    for traced, args, kwargs in again.calibration[:2]:
        with torch.no_grad():
            have = student(first.traced_for(args, ""), args, kwargs)
        (want,) = leaves(again.simulator(traced, args, kwargs, quantize_outputs=False)(variants))
        assert torch.allclose(have, want, rtol=0, atol=1e-6 * float(want.abs().max()))


def test_a_recovery_learns_scales_and_its_engine_is_no_further_from_the_simulation(tmp_path: Path) -> None:
    done = recover(scales="learned", data=True, out=tmp_path / "t.safetensors")
    assert done.course.least < 0.8 * done.course.start
    assert done.to_json()["scales"] == "learned"
    first, _, variants = recovering.start(data=True)
    start, trained = (Student(low, variants).grids for low in (first, done.lowering))
    doublings = [(start[u] / trained[u]).log2() for u in start]  # a grid twice as fine holds the same weights
    assert max(float((d - d.round()).abs().max()) for d in doublings) > 1e-3
    assert not any(name.endswith(SCALES) for name in Trained.load(tmp_path / "t.safetensors").tensors)
    before, after = (off(low, variants) for low in (first, done.lowering))
    assert after <= max(2 * before, 1e-5)


def test_channels_whose_scale_a_bias_asks_for_keep_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.7
    x = torch.randn(64, 8)
    whole = Lowering(hs.Task(model.eval(), x[:1], list(x.split(16)), lambda predict: 1.0, "dead"))
    student = moved(Student(whole, uniform(whole.network, "int8"), learned=True))
    held = {unit: torch.nonzero(own.flatten()).flatten().tolist() for unit, own in student.held.items()}
    assert list(held.values()) == [[2], []]
    same = student.scales("0") == student.grids["0"]
    assert same.flatten().tolist() == [i == 2 for i in range(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scales": "free"}, "unknown scales 'free'; expected one of fixed, learned"),
     ({"scales": "learned", "method": "lc"}, "lc multiplies with weights that are not rounded"),
     ({"scales": "learned", "method": "mask"}, "mask multiplies with weights that are not rounded")],
)  # fmt: skip
def test_scales_that_cannot_be_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Options(**options)  # type: ignore[arg-type]

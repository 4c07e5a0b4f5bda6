"""BatchNorm unfolded: trained as the user's module in training mode is, and folded again into what is deployed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import recovering
import torch
from networks import NETWORKS
from recovering import off, recover
from torch import nn

import hwsearch as hs
from hwsearch.errors import InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.processes import Processes
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.recovery.student import GAMMA, MEAN, VARIANCE, Student

ALL_FOLDED = ("mlp_batchnorm", "one_dimensional", "grouped", "residual", "transposed_1d", "mobilenet_v3")


@pytest.mark.parametrize("name", ["recovering", *ALL_FOLDED])
def test_a_step_is_that_of_the_module_in_training_mode(name: str) -> None:
    """Outputs, gradients and running statistics, where nothing is rounded or removed."""
    model, x = (recovering.trained(), recovering.images(16, seed=5)[0]) if name == "recovering" else NETWORKS[name]()
    whole = Lowering(hs.Task(model.eval(), x, [x], lambda predict: 1.0, name))
    student = Student(whole, uniform(whole.network, "fp32"), unfolded=True)
    module, norms = copy.deepcopy(model).eval(), []
    with torch.no_grad():
        assert torch.allclose(student(whole.traced, (x,), {}), module(x), rtol=1e-3, atol=1e-4)
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.train()  # and all else stays as it was traced
        norm.register_forward_pre_hook(lambda norm, args: norms.append(norm))
    have, want = student(whole.traced, (x,), {}), module(x)
    assert torch.allclose(have, want, rtol=1e-3, atol=1e-3 * float(want.detach().abs().max()))
    random = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    (have * random).sum().backward()
    (want * random).sum().backward()
    assert len(norms) == len(student.norms) > 0
    for unit, norm in zip(student.norms, norms, strict=True):
        path, bias = (str(p) for p in whole.traced.paths[unit])
        own = module.get_submodule(path.removesuffix(".weight"))
        pairs = [(student.tensors[student.home[path]].grad, own.weight.grad), (student.tensors[unit + VARIANCE], norm.running_var)]
        pairs.append((student.tensors[unit + MEAN] + (0.0 if own.bias is None else own.bias), norm.running_mean))
        if norm.affine:
            pairs.append((student.tensors[unit + GAMMA].grad, norm.weight.grad))
            pairs.append((student.tensors[student.home[bias]].grad, norm.bias.grad))
        for a, b in pairs:
            assert torch.allclose(a, b, rtol=1e-2, atol=2e-3 * float(b.abs().max())), path


@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16"])
def test_it_begins_as_what_is_deployed(precision: str) -> None:
    first, _, variants = recovering.start(precision)
    folded, unfolded = Student(first, variants), Student(first, variants, unfolded=True)
    assert unfolded.norms
    for unit in unfolded.norms:
        places = [folded.tensors[folded.home[str(p)]] for p in first.traced.paths[unit]]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(unfolded.folded(unit), places, strict=True))
    objective = Objective(first)
    losses = [objective.held_out_loss(student) for student in (folded, unfolded)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("options", [{}, {"method": "mask"}, {"scales": "learned", "gradients": "1:2:mvue"}])
def test_what_is_deployed_is_what_was_judged(options: dict[str, Any]) -> None:
    done = recover(data=True, batchnorm="unfolded", epochs=2, scored=False, **options)
    assert done.course.least < 0.95 * done.course.start
    assert done.to_json()["batchnorm"] == "unfolded"
    first, _, variants = recovering.start(data=True)
    assert Objective(done.lowering).held_out_loss(Student(done.lowering, variants)) == pytest.approx(done.course.least, rel=0.01)
    before, after = (off(low, variants) for low in (first, done.lowering))
    assert after <= max(2 * before, 1e-5)


def test_what_cannot_be_unfolded_is_refused() -> None:
    for options, message in (
        ({"batchnorm": "frozen"}, "unknown batchnorm 'frozen'; expected one of folded, unfolded"),
        ({"batchnorm": "unfolded", "method": "lc"}, "lc trains with BatchNorm folded; unfolded it is trained by ste, mask, srste"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Options(**options)  # type: ignore[arg-type]
    first, kept, variants = recovering.start()
    two = Processes(SimpleNamespace(device=torch.device("cpu"), num_processes=2, process_index=0))
    with pytest.raises(InvalidInput, match="normalises over the batch of one process"):
        Recovery(recovering.lowering(), first, kept, variants, Options(batchnorm="unfolded"), processes=two)
    x = torch.randn(8, 6)
    plain = Lowering(hs.Task(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), x[:1], [x], lambda predict: 1.0))
    with pytest.raises(InvalidInput, match="no BatchNorm that was folded"):
        Student(plain, uniform(plain.network, "fp32"), unfolded=True)
    student = Student(first, variants, unfolded=True)
    with pytest.raises(InvalidInput, match="one value for each channel"):
        student.normalised(next(iter(student.norms)), torch.zeros(1, 16, 1, 1))

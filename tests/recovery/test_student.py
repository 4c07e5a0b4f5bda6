"""What is trained is what is deployed: the same numbers, with gradients."""

from __future__ import annotations

import pytest
import recovering
import tiny
import torch
from networks import NETWORKS, leaves
from torch import nn

import hwsearch as hs
from hwsearch.compress.widths import Kept
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.variants import Variant, legal, uniform
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.recovery.student import Student, straight


def half(name: str, precision: str) -> tuple[Lowering, dict[str, Variant]]:
    whole = tiny.lowering(name)
    widths = {g: max(1, n // 2) for g, n in whole.network.channels.items()}
    variants = uniform(whole.network, precision)
    return refitted(whole, variants, widths, weight_bank(whole)), variants


@pytest.mark.parametrize("precision", ["fp32", "int8", "bf16", "fp8", "w8"])
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_a_student_computes_what_the_simulator_does_bit_by_bit(name: str, precision: str) -> None:
    low, variants = half(name, precision)
    for outputs in (False, True):
        student = Student(low, variants, quantize_outputs=outputs)
        for traced, args, kwargs in low.calibration[:2]:
            simulate = low.simulator(traced, args, kwargs, quantize_outputs=outputs)
            for have, want in zip(leaves(student(traced, args, kwargs)), leaves(simulate(variants)), strict=True):
                assert torch.equal(have, want)


def test_what_is_deployed_of_a_moved_student_computes_what_it_does() -> None:
    low, kept, variants = recovering.start("int8")
    student = Student(low, variants)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in student.tensors.values():
            tensor.add_(0.05 * tensor.abs().mean() * torch.randn(tensor.shape, generator=random))
    again = recovering.lowering().narrow(kept, tensors=student.everywhere(student.answer()), ranges=student.ranges)
    for traced, args, kwargs in again.calibration[:2]:
        with torch.no_grad():
            have = student(low.traced_for(args, ""), args, kwargs)
        (want,) = leaves(again.simulator(traced, args, kwargs, quantize_outputs=False)(variants))
        assert torch.allclose(have, want, rtol=0, atol=1e-6 * float(want.abs().max()))


def test_gradients_pass_rounding_and_stop_where_values_are_clipped() -> None:
    x = torch.tensor([-3.0, -0.4, 0.6, 2.0], requires_grad=True)
    straight(x, lambda v: v.round().clamp(-1, 1), -1.0, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_every_trained_tensor_gets_the_gradient_of_the_float_network_where_nothing_is_rounded() -> None:
    low, _, variants = recovering.start("fp32")
    student = Student(low, variants)
    traced, args, kwargs = low.calibration[0]
    student(traced, args, kwargs).square().sum().backward()
    module = low.traced.graph
    own = {p: t.detach().clone().requires_grad_() for p, t in student.tensors.items()}
    torch.func.functional_call(module, own, args).square().sum().backward()
    for path, tensor in student.tensors.items():
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, own[path].grad, rtol=1e-4, atol=1e-5), path


class Everything(nn.Module):
    """BatchNorm, LayerNorm, GroupNorm, PReLU, dropout, tied embeddings and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(12, 16)
        self.mix = nn.Conv1d(16, 24, 3, padding=1)
        self.batch, self.group = nn.BatchNorm1d(24), nn.GroupNorm(2, 24)
        self.act, self.drop = nn.PReLU(24), nn.Dropout(0.3)
        self.back, self.norm = nn.Linear(24, 16), nn.LayerNorm(16)
        self.decode = nn.Linear(16, 12, bias=False)
        self.decode.weight = self.token.weight
        self.other = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.token(ids)
        y = self.act(self.group(self.batch(self.mix(x.transpose(1, 2)))))
        x = self.norm(x + self.back(self.drop(y).transpose(1, 2)))
        return self.decode(x).transpose(1, 2), self.other(x.mean(1))


@pytest.mark.parametrize(("precision", "batchnorm"), [("fp32", "folded"), ("int8", "folded"), ("int8", "unfolded")])
def test_a_network_with_everything_recovers_and_deploys(precision: str, batchnorm: str) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    model.batch.running_var.uniform_(0.5, 2.0)
    ids = [torch.randint(0, 12, (16, 6)) for _ in range(8)]
    whole = Lowering(hs.Task(model, ids[0][:1], ids, lambda predict: 1.0, "everything"))
    widths = {g: max(1, n // 2) for g, n in whole.network.channels.items()}
    assert widths
    chosen = uniform(whole.network, precision)
    variants = {u.name: chosen[u.name] if legal(u, [chosen[u.name]]) else Variant("fp32") for u in whole.network.units}
    bank = weight_bank(whole)
    first = refitted(whole, variants, widths, bank)
    kept: Kept = bank.kept(widths)
    done = Recovery(whole, first, kept, variants, Options(epochs=6, rate=3e-3, scored=False, batchnorm=batchnorm)).run()
    assert done.better
    assert any(u.tied for u in whole.network.units)
    graph = done.lowering.traced.graph
    held = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    tables = [t for p, t in graph.state_dict().items() if p in held and t.shape[0] == 12 and t.dim() == 2]
    assert all(torch.equal(t, tables[0]) for t in tables)  # tied weights stay tied, and were trained
    assert not any(torch.equal(t, model.token.weight) for t in tables)
    samples = [sample for batch in ids for sample in batch.split(1)]
    before, after = (recovering.off(low, variants, samples) for low in (first, done.lowering))
    assert after <= max(2 * before, 1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v3", "unet", "densenet", "preactivation", "squeeze_excite", "mlp_3d_batchnorm"])
def test_gradients_reach_all_layers_of_many_kinds_of_networks(name: str) -> None:
    model, inputs = NETWORKS[name]()
    whole = Lowering(hs.Task(model.eval(), inputs, [inputs], lambda predict: 1.0, name))
    variants = uniform(whole.network, "int8")
    student = Student(refitted(whole, variants), variants)
    _, args, kwargs = whole.calibration[0]
    sum(y.square().sum() for y in leaves(student(student.lowering.traced_for(args, ""), args, kwargs))).backward()
    weights = [student.weight_of(u) for u in student.lowering.traced.sites if student.weight_of(u) is not None]
    assert len(weights) >= 2
    assert all(w is not None and w.grad is not None and bool(w.grad.any()) for w in weights)

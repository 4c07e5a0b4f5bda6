"""Whole channels: one threshold over channel groups, and a narrower network that computes what zeros compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from networks import NETWORKS, leaves
from torch import nn

import hwsearch as hs
from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import as_call
from hwsearch.lowering.lowering import Lowering
from hwsearch.schemes import Compose, FilterPrune, NeuronPrune, Prune, Scheme, StructurePrune
from hwsearch.task import Inputs

NAMES = (
    "mlp_batchnorm", "residual", "inception", "densenet", "squeeze_excite", "channel_shuffle", "transposed_1d",
    "transformer_encoder", "norms",
)  # fmt: skip


def task(model: nn.Module, inputs: Inputs) -> hs.Task:
    return hs.Task(model.eval(), inputs, [inputs, inputs], lambda _: 0.0)


def run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return leaves(model(*args, **kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_the_narrower_network_computes_what_zeros_in_place_compute(name: str) -> None:
    model, inputs = NETWORKS[name]()
    model.eval()
    dense = run(model, inputs)
    small = StructurePrune(0.5)(task(model, inputs))
    zeros = copy.deepcopy(model)
    assert StructurePrune(0.5).in_place(zeros, inputs) == small.footprint
    narrow = run(small.task.model, inputs)
    for a, b in zip(narrow, run(zeros, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(narrow, dense, strict=True))
    before, after = (Lowering(t).network.units for t in (task(model, inputs), small.task))  # it is a task like any other
    assert sum(u.weight_count for u in after) < sum(u.weight_count for u in before)


def scores(model: tiny.CNN) -> dict[str, torch.Tensor]:
    """The norm of each slot's filters; stem and conv2 are tied by the residual add."""
    square = {n: getattr(model, n).weight.detach().double().square().flatten(1).sum(1) for n in ("stem", "conv1", "conv2", "conv3")}
    return {"stem": (square["stem"] + square["conv2"]).sqrt(), "conv1": square["conv1"].sqrt(), "conv3": square["conv3"].sqrt()}


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_one_threshold_over_all_groups_of_filters(density: float) -> None:
    model = copy.deepcopy(tiny.task("cnn").model)
    assert isinstance(model, tiny.CNN)
    own = scores(model)
    rest = torch.cat([s[s != s.max()] for s in own.values()]).sort(descending=True).values  # each group keeps its best
    count = int(density * 60) - len(own)
    kept = {g: (s >= rest[count - 1]) | (s == s.max()) for g, s in own.items()}
    before = copy.deepcopy(model.state_dict())
    left = FilterPrune().in_place(model, tiny.inputs("cnn", 1), density=density)
    assert left.widths == {g: int(k.sum()) for g, k in kept.items()}
    for layer, puts, reads in (("conv1", "conv1", "stem"), ("conv2", "stem", "conv1"), ("conv3", "conv3", "stem")):
        stays = (kept[puts][:, None] & kept[reads][None])[:, :, None, None]
        assert torch.equal(getattr(model, layer).weight, before[f"{layer}.weight"] * stays)
    assert torch.equal(model.conv1.bias, before["conv1.bias"] * kept["conv1"])


def test_every_group_keeps_a_slot_and_multiples_of_what_is_asked() -> None:
    task = tiny.task("cnn")
    assert set(FilterPrune(0.0)(task).footprint.widths.values()) == {1}
    for density in (0.0, 0.3, 0.7):
        free, by_eight = (FilterPrune(density, align=n)(task).footprint.widths for n in (1, 8))
        assert by_eight == {g: max(8, w // 8 * 8) for g, w in free.items()}
    whole = FilterPrune(1.0)(task)
    assert type(whole.task.model) is tiny.CNN
    assert whole.footprint.widths == {"stem": 24, "conv1": 20, "conv3": 16}


def test_normalised_scores_do_not_depend_on_how_many_weights_a_filter_has() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    for p in model.parameters():
        nn.init.ones_(p)
    with torch.no_grad():
        model[0].weight *= 1.1
    x = torch.randn(2, 4)
    by_norm = NeuronPrune(64 / 72)(task(model, x)).footprint.widths
    assert by_norm == {"0": 1, "2": 63}  # 2.2 against 2.83
    assert NeuronPrune(64 / 72, normalise=True)(task(model, x)).footprint.widths == {"0": 8, "2": 56}


def test_filters_neurons_and_both() -> None:
    cnn, transformer = tiny.task("cnn"), tiny.task("transformer")
    with pytest.raises(InvalidInput, match="no channel group for NeuronPrune"):
        NeuronPrune(0.5)(cnn)
    with pytest.raises(InvalidInput, match="no channel group for FilterPrune"):
        FilterPrune(0.5)(transformer)
    assert StructurePrune(0.5)(cnn).footprint == FilterPrune(0.5)(cnn).footprint
    both = NeuronPrune(0.5)(transformer).footprint
    assert sum(both.widths.values()) == (4 + 32) // 2
    spared = NeuronPrune(0.5, skip="qkv")(transformer).footprint
    assert spared.widths == {"qkv": 4, "up": 16}


@pytest.mark.parametrize("scheme", [FilterPrune(0.4), Compose(FilterPrune(0.4), Prune(0.5))], ids=str)
def test_once_more_in_place_changes_nothing(scheme: Scheme) -> None:
    model = copy.deepcopy(tiny.task("cnn").model)
    x: Any = tiny.inputs("cnn", 1)
    FilterPrune(0.4).in_place(model, x)
    once = copy.deepcopy(model.state_dict())
    FilterPrune(0.4).in_place(model, x)
    assert all(torch.equal(t, once[n]) for n, t in model.state_dict().items())
    both = Compose(scheme)(tiny.task("cnn")).footprint
    assert both.nonzero <= FilterPrune(0.4)(tiny.task("cnn")).footprint.nonzero


def test_densities_after_filters_are_of_what_is_left() -> None:
    filters = FilterPrune(0.5)(tiny.task("cnn")).footprint
    both = Compose(FilterPrune(0.5), Prune(0.5))(tiny.task("cnn")).footprint
    assert both.nonzero == filters.nonzero // 2
    assert both.weights == filters.weights
    assert both.dense_bytes == filters.dense_bytes > 2 * both.nonzero_bytes


class Mean(nn.Module):
    """Reads its own channels twice: through a convolution, and as their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).sigmoid()
        return self.b(y) + y.mean(1, keepdim=True)


def test_where_zeros_are_not_the_network_without_its_channels_a_module_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Mean().eval(), torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match="sums over channels that go"):
        FilterPrune(0.5).in_place(model, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    small = FilterPrune(0.5)(task(model, x))
    kept = model.a.weight.square().flatten(1).sum(1).topk(8).indices
    y = model.a(x).sigmoid()[:, kept.sort().values]
    want = nn.functional.conv2d(y, model.b.weight[:, kept.sort().values], model.b.bias) + y.sum(1, keepdim=True) / 16
    torch.testing.assert_close(run(small.task.model, x)[0], want.detach(), rtol=1e-4, atol=1e-5)

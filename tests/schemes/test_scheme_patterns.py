"""Zeros by magnitude: exactly those that trying all choices would leave."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hwsearch.compress.patterns import balanced_mask, largest
from hwsearch.errors import InvalidInput
from hwsearch.schemes import NM, Balanced, BlockPrune, Compose, Footprint, Free, Prune, Quantize, Scheme

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    """Two convolutions with BatchNorm between, and a linear layer; 864 + 864 + 96 weights."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12)).eval()
    assert isinstance(model[1].running_var, torch.Tensor)
    model[1].running_var.uniform_(0.1, 9.0)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of its layers, copied."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: m.weight.detach().clone() for n, m in layers.items()}


def rows(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: w.flatten(1) for n, w in weights(model).items()}


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=6), min_size=1, max_size=4), st.integers(0, 24))
def test_the_largest_of_all_stay_and_of_equal_ones_the_first(values: list[list[float]], count: int) -> None:
    flat = [x for own in values for x in own]
    if count > len(flat):
        with pytest.raises(ValueError, match="cannot stay"):
            largest([torch.tensor(own) for own in values], count)
        return
    masks = largest([torch.tensor(own) for own in values], count)
    kept = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    assert [len(m) for m in masks] == [len(own) for own in values]
    assert torch.cat(masks).nonzero().flatten().tolist() == sorted(kept)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_one_threshold_over_all_layers_on_the_weights_before_folding(density: float) -> None:
    model = net()
    before = weights(model)
    every = torch.cat([w.abs().flatten() for w in before.values()]).sort(descending=True).values
    count = int(density * len(every))
    left = Prune().in_place(model, X, density=density)
    assert left.nonzero == count
    for name, weight in weights(model).items():
        stays = before[name].abs() >= every[count - 1] if count else torch.zeros_like(before[name], dtype=torch.bool)
        assert torch.equal(weight, before[name] * stays), name
        assert left.densities[name] == float(stays.double().mean())


def test_of_equal_weights_exactly_the_share_stays_the_first_ones() -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))
    for p in model.parameters():
        nn.init.ones_(p)
    assert Prune(0.5).in_place(model, torch.ones(1, 8)).nonzero == 30
    assert torch.cat([w.flatten() for w in weights(model).values()]).tolist() == [1.0] * 30 + [0.0] * 30


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_nm_keeps_the_most_of_every_m_input_channels(n: int, m: int) -> None:
    model = net()
    before, left = weights(model), NM(n, m).in_place(model, X)
    assert not left.left_out
    for name, weight in weights(model).items():
        was, now = (w.movedim(1, -1).reshape(-1, m) for w in (before[name], weight))
        for old, new in zip(was.tolist(), now.tolist(), strict=True):
            best = max(sum(x * x for x in own) for own in combinations(old, n))
            assert sum(x != 0 for x in new) == n
            assert sum(x * x for x in new) == pytest.approx(best)
            assert all(x in (0.0, y) for x, y in zip(new, old, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_balanced_keeps_the_largest_of_each_block_of_a_row(density: float) -> None:
    model, block = net(), 4
    before, keep = rows(model), round(density * block)
    left = Balanced(density, block).in_place(model, X)
    assert left.density == density
    for name, matrix in rows(model).items():
        for old, new in zip(before[name].reshape(-1, block), matrix.reshape(-1, block), strict=True):
            assert int((new != 0).sum()) == keep
            most = old.square().sort(descending=True).values[:keep].sum()
            assert float(new.square().sum()) == pytest.approx(float(most))


def test_a_wrong_axis_would_keep_less_of_gaussians() -> None:
    """Blocks of 32 keep at least 95 % of the energy that no structure at all keeps (papers: 98 to 99 %)."""
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    for density in (0.125, 0.5):
        free = largest([matrix.abs()], int(density * matrix.numel()))[0]
        held = balanced_mask(matrix, 32, round(density * 32))
        assert float((matrix * held).square().sum()) >= 0.95 * float((matrix * free).square().sum())
        assert held.sum() == free.sum()


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_blocks_of_the_largest_norm_over_all_layers_stay(density: float) -> None:
    model, (r, c) = net(), (4, 4)
    before = rows(model)
    norms = {}
    for name, matrix in before.items():
        for i in range(0, matrix.shape[0], r):
            for j in range(0, matrix.shape[1], c):
                norms[name, i, j] = float(matrix[i : i + r, j : j + c].double().square().sum())
    kept = sorted(norms, key=lambda key: -norms[key])[: int(density * len(norms))]
    BlockPrune(density, (r, c)).in_place(model, X)
    now = rows(model)
    for name, i, j in norms:
        own, old = (m[name][i : i + r, j : j + c] for m in (now, before))
        assert torch.equal(own, old if (name, i, j) in kept else torch.zeros_like(old))


def test_layers_that_sizes_do_not_divide_stay_and_are_named() -> None:
    model = net()
    before = weights(model)
    left = BlockPrune(0.0, (3, 4)).in_place(model, X)
    assert left.left_out == {"3": "blocks of 3x4 do not divide 8 outputs by 108 inputs"}
    assert torch.equal(weights(model)["3"], before["3"])
    assert not weights(model)["0"].any()
    left = Balanced(0.5, 9).in_place(model, X)
    assert set(left.left_out) == {"7"}
    assert set(NM(2, 8).in_place(model, X).left_out) == {"3"}
    with pytest.raises(InvalidInput, match="no layer for NM"):
        NM(2, 16).in_place(model, X)


def test_skipped_layers_stay_and_count_for_nothing() -> None:
    model = net()
    before = weights(model)
    Prune(0.5, skip="0").in_place(model, X)
    now = weights(model)
    assert torch.equal(now["0"], before["0"])
    assert sum(int(w.count_nonzero()) for n, w in now.items() if n != "0") == (864 + 96) // 2
    with pytest.raises(InvalidInput, match=r"nothing is called 'features\.\*'"):
        Prune(0.5, skip=("7", "features.*")).in_place(model, X)


@pytest.mark.parametrize(
    "scheme",
    [Prune(0.3), BlockPrune(0.3, (4, 2)), NM(1, 4), Balanced(0.5, 4), Quantize("int8"), Quantize("fp16"), Quantize(3),
     Compose(Prune(0.2), Quantize("int4"))], ids=str,
)  # fmt: skip
def test_once_more_changes_nothing(scheme: Scheme) -> None:
    model = net()
    first = scheme.in_place(model, X)
    once = weights(model)
    again = scheme.in_place(model, X)
    assert again == first
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, once[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_have_so_many_levels_and_are_the_nearest(bits: int) -> None:
    model, top = net(), 2 ** (bits - 1) - 1
    before = weights(model)
    Quantize(Free("bits", 2, 8, whole=True)).in_place(model, X, bits=bits)
    for name, weight in weights(model).items():
        step = before[name].flatten(1).abs().amax(1) / top
        whole = weight / step.reshape(-1, *[1] * (weight.dim() - 1))
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)
        assert int(whole.abs().max().round()) == top
        assert bool(((weight - before[name]).flatten(1).abs().amax(1) <= 0.5001 * step).all())


def test_halves_are_the_nearest_and_what_they_do_not_hold_is_refused() -> None:
    model = net()
    before = weights(model)
    Quantize("bf16").in_place(model, X)
    assert all(torch.equal(w, before[n].bfloat16().float()) for n, w in weights(model).items())
    with torch.no_grad():
        model[7].weight[0, 0] = 1e5
    with pytest.raises(InvalidInput, match="a weight of 7 is larger than fp16 holds; take bf16"):
        Quantize("fp16").in_place(model, X)


def footprint(scheme: Scheme) -> Footprint:
    torch.manual_seed(0)
    return scheme.in_place(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 8))


def test_bytes_are_those_of_the_values_and_with_positions_more() -> None:
    biases = 4 * 36
    dense = footprint(Prune(1.0))
    assert dense.dense_bytes == dense.nonzero_bytes == dense.packed_bytes == 4 * 384 + biases
    half = footprint(Prune(0.5))
    assert (half.weights, half.nonzero, half.density) == (384, 192, 0.5)
    assert half.nonzero_bytes == 4 * 192 + biases
    assert half.nonzero_bytes + 384 / 8 * 0.5 < half.packed_bytes <= half.nonzero_bytes + 384 / 8  # at most a bit a weight
    small = footprint(Compose(Prune(0.5), Quantize("int4")))
    assert small.nonzero_bytes == 192 // 2 + biases
    scales = 4 * 36
    assert small.packed_bytes - small.nonzero_bytes == half.packed_bytes - half.nonzero_bytes + scales
    nothing = footprint(Prune(0.0))
    assert nothing.nonzero_bytes == nothing.packed_bytes == biases
    assert "50.00%" in str(half)

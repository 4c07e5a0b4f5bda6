from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import follows

from hwsearch.compress.patterns import nm_mask, prune


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """(weight, axis, n, m) with m dividing the axis."""
    m = draw(st.integers(2, 6))
    shape = list(draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = m * draw(st.integers(1, 3))
    elements = st.floats(-4, 4, width=16)  # coarse, so that magnitudes tie
    array = draw(hnp.arrays(np.float32, tuple(shape), elements=elements))
    return torch.from_numpy(array), axis, draw(st.integers(1, m - 1)), m


def blocks(weight: torch.Tensor, axis: int, m: int) -> np.ndarray:
    """[blocks, m]."""
    return np.moveaxis(weight.numpy(), axis, -1).reshape(-1, m)


@given(weights())
def test_every_block_keeps_n_and_as_much_energy_as_can_be(of: tuple[torch.Tensor, int, int, int]) -> None:
    weight, axis, n, m = of
    mask = nm_mask(weight, axis, n, m)
    assert mask.shape == weight.shape
    for own, kept in zip(blocks(weight, axis, m), blocks(mask, axis, m), strict=True):
        assert kept.sum() == n
        best = max(sum(own[i] ** 2 for i in some) for some in itertools.combinations(range(m), n))
        assert np.sum(own[kept] ** 2) == pytest.approx(best)
        assert np.abs(own[kept]).min() >= np.abs(own[~kept]).max()


@given(weights())
def test_what_is_pruned_follows_the_pattern_and_stays(of: tuple[torch.Tensor, int, int, int]) -> None:
    weight, axis, n, m = of
    pruned = prune(weight, axis, n, m)
    assert follows(pruned, axis, n, m)
    assert torch.equal(prune(pruned, axis, n, m), pruned)
    assert torch.equal(pruned[pruned != 0], weight[nm_mask(weight, axis, n, m) & (weight != 0)])
    brute = all((block != 0).sum() <= n for block in blocks(weight, axis, m))
    assert follows(weight, axis, n, m) == brute


def test_a_convolution_has_a_pattern_at_each_position_of_its_kernel() -> None:
    weight = torch.zeros(1, 4, 2, 1)
    weight[0, :, 0, 0] = torch.tensor([1.0, -4.0, 3.0, 2.0])
    weight[0, :, 1, 0] = torch.tensor([5.0, 1.0, 1.0, -6.0])
    pruned = prune(weight, 1, 2, 4)
    assert pruned[0, :, 0, 0].tolist() == [0, -4, 3, 0]
    assert pruned[0, :, 1, 0].tolist() == [5, 0, 0, -6]
    assert not follows(weight, 1, 2, 4)


def test_what_cannot_be_is_refused() -> None:
    weight = torch.randn(3, 6)
    with pytest.raises(ValueError, match="no multiple of 4"):
        nm_mask(weight, 1, 2, 4)
    for n, m in ((0, 2), (2, 2), (3, 2)):
        with pytest.raises(ValueError, match="0 < N < M"):
            nm_mask(weight, 1, n, m)
    assert not follows(weight, 1, 2, 4)

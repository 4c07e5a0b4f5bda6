from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from hwsearch.compress.quantize import (
    LEVELS,
    Range,
    activation_ranges,
    int8_scale,
    on_grid,
    quantize_weight,
)
from hwsearch.errors import InvalidInput
from hwsearch.graph.trace import trace

finite = st.floats(-100, 100, width=32)


def ranges(data: list[torch.Tensor], method: str) -> dict[tuple[str, int, str], float]:
    layer = nn.Linear(data[0].shape[1], 2)
    return activation_ranges([(trace(layer, x), (x,), {}) for x in data], method)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=finite), st.data()
)
def test_weights_round_to_the_nearest_of_255_levels(array: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, array.ndim - 1))
    made = quantize_weight(torch.from_numpy(array), axis)
    assert made.scales.shape == (array.shape[axis],)
    assert np.abs(made.values.astype(int)).max() <= 127
    shape = [1] * array.ndim
    shape[axis] = -1
    assert np.all(np.abs(made.dequantized() - array) <= 0.5001 * made.scales.reshape(shape) + 1e-30)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, (16, 8), elements=finite))
def test_mse_is_never_worse_than_minmax(array: np.ndarray) -> None:
    x = torch.from_numpy(array)
    key = ("linear", 0, "in0")

    def loss(method: str) -> float:
        found = ranges([x], method)
        return float(
            (on_grid(x, next(v.limit for k, v in found.items() if k[2] == key[2]) / LEVELS) - x).square().mean()
        )

    assert loss("mse") <= loss("minmax") * (1 + 1e-6) + 1e-12


def test_minmax_is_the_largest_magnitude_over_all_batches() -> None:
    data = [torch.randn(4, 8), torch.randn(9, 8), -7 * torch.ones(1, 8)]
    assert next(v for k, v in ranges(data, "minmax").items() if k[2] == "in0") == Range(7.0, 7.0)


def test_outliers_are_clipped() -> None:
    x = torch.randn(4000, 64)
    x[0, 0] = 30.0
    found = next(v for k, v in ranges([x], "mse").items() if k[2] == "in0")
    assert found.limit < 15
    assert found.top == 30.0


def test_zeros_get_a_harmless_range() -> None:
    found = ranges([torch.zeros(4, 8)], "mse")
    assert next(v for k, v in found.items() if k[2] == "in0") == Range(1.0, 1.0)


class Gated(nn.Module):
    """`b` reads what a ReLU left, `c` what may be negative, and a product takes a ReLU's output on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        z: torch.Tensor = torch.bmm(y, y.transpose(1, 2)) @ self.c(self.b(y))
        return z


def test_what_is_never_negative_is_unsigned_but_in_the_place_of_a_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, 8)
    batches = [(trace(Gated(), x), (x,), {})]
    for method in ("mse", "minmax"):
        found = activation_ranges(batches, method, unsigned=True)
        signed = activation_ranges(batches, method)
        assert {k[:1] + k[2:] for k, v in found.items() if v.unsigned} == {
            ("a", "out"), ("b", "in0"), ("matmul", "in0"), ("matmul", "out"), ("matmul_1", "in0"),
        }  # fmt: skip
        assert not any(v.unsigned for v in signed.values())
        assert {k: v for k, v in found.items() if not v.unsigned} == {
            k: signed[k] for k, v in found.items() if not v.unsigned
        }
    y = torch.rand(64, 8) * 3.0
    of = Range(3.0, 3.0, unsigned=True)
    assert int8_scale(of, "in0") == 3.0 / 255
    assert float((on_grid(y, int8_scale(of, "in0"), unsigned=True) - y).abs().max()) <= 0.5001 * 3.0 / 255
    assert on_grid(torch.tensor([-1.0, 4.0]), 3.0 / 255, unsigned=True).tolist() == pytest.approx([0.0, 3.0])


def test_infinity_within_a_network_has_no_range() -> None:
    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.nan_to_num(self.b(1.0 / torch.relu(self.a(x))), 0.0, 0.0, 0.0)
            return y

    x = torch.randn(4, 8)
    traced = trace(Inverse(), x)
    # the infinite batch before a finite one, and after it
    with torch.no_grad():
        traced.graph(x)
    found = activation_ranges([(traced, (x,), {}), (traced, (x * 0,), {}), (traced, (x,), {})], "mse")
    assert {k[:1] + k[2:]: v.finite for k, v in found.items()} == {
        ("a", "in0"): True, ("a", "out"): True, ("b", "in0"): False, ("b", "out"): False,
    }  # fmt: skip
    assert found["b", 0, "in0"] == Range(float("inf"), float("inf"))


def test_nan_and_unknown_method() -> None:
    x = torch.randn(2, 8)
    traced = trace(nn.Linear(8, 2), x)
    with pytest.raises(InvalidInput, match="NaN"):
        activation_ranges([(traced, (x * float("nan"),), {})], "mse")
    with pytest.raises(InvalidInput, match="unknown range method"):
        activation_ranges([], "max")


def test_the_same_data_gives_the_same_ranges() -> None:
    x = torch.randn(5000, 80)
    layer = nn.Linear(80, 40)
    batches = [(trace(layer, x), (x,), {})]
    assert activation_ranges(batches) == activation_ranges(batches)


@given(hnp.arrays(np.int8, (3, 20), elements=st.integers(-127, 127)), st.integers(65, 127))
def test_what_is_on_a_grid_stays_on_it(values: np.ndarray, top: int) -> None:
    values = np.clip(values, -top, top)
    values[:, 7] = top
    weight = torch.from_numpy(values).float() * torch.tensor([[0.1], [3.0], [0.007]])
    for axis, own in ((0, weight), (1, weight.T)):
        np.testing.assert_allclose(quantize_weight(own, axis).dequantized(), own.numpy(), rtol=1e-5)

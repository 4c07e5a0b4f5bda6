from __future__ import annotations

import pytest
import torch
from torch import nn

from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.graph.trace import trace


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 0:
            x = -x
        return self.fc(x)


def test_untraceable_names_module_class_and_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Branch()))
    with pytest.raises(UntraceableModel, match=r"module 1\.1 \(Branch\).*test_export\.py:\d+.*if float"):
        trace(model, torch.randn(2, 4))


def test_a_model_that_fails_or_returns_nan() -> None:
    with pytest.raises(InvalidInput, match="fails on example_inputs"):
        trace(nn.Linear(4, 4), torch.randn(2, 5))
    with pytest.raises(InvalidInput, match="NaN"):
        trace(nn.Linear(4, 4), torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_only_fp32_models(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInput, match="expected float32"):
        trace(nn.Linear(4, 4).to(dtype), torch.randn(2, 4, dtype=dtype))

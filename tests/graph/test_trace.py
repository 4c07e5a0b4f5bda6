from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, leaves
from torch import nn

from hwsearch.errors import UntraceableModel
from hwsearch.graph.calls import as_call
from hwsearch.graph.trace import trace

OFFLINE = [n for n in NETWORKS if not n.startswith("hf_")]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_graph_computes_the_model_and_leaves_it_as_it_was(name: str) -> None:
    model, inputs = NETWORKS[name]()
    model.train()
    next(model.modules()).training = False
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    traced = trace(model, inputs)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        want, have = leaves(model.eval()(*args, **kwargs)), leaves(traced.graph(*args, **traced.kwargs))
    assert len(want) == len(have)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_layers() -> None:
    with pytest.raises(UntraceableModel, match="no layer"):
        trace(nn.ReLU(), torch.randn(2, 4))


def test_buffers_that_the_model_writes_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.fc(x)

    model = Counts()
    traced = trace(model, torch.randn(2, 4))
    assert float(model.calls) == 0
    traced.graph(torch.randn(2, 4))
    assert float(model.calls) == 0

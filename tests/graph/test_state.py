"""After a model was called in eval mode, all that it holds is what it was."""

from __future__ import annotations

import torch
from torch import nn

from hwsearch.graph.calls import evaluating
from hwsearch.graph.state import State


class _Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.tensor([1.0, float("nan")]))
        self.steps, self.seen, self.by_name = 0, [torch.ones(1)], {"a": 1}
        self.last = torch.zeros(2)
        self.untouched = torch.tensor([float("nan")])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.replaced = self.replaced + 1
        self.steps += 1
        self.seen.append(x)
        self.by_name["b"] = 2
        self.last.add_(1)
        self.new = x
        self.register_buffer("later", x)
        return x


def test_what_calls_change_is_named_and_put_back() -> None:
    model = _Changing().train()
    seen, replaced = model.seen, model.replaced
    state = State(model)
    assert state.changed() == []
    with evaluating(model):
        assert not model.inner.training
        model(torch.ones(2, 3))
        assert sorted(state.changed()) == [
            "by_name",
            "count",
            "last",
            "later",
            "new",
            "replaced",
            "seen",
            "steps",
        ]
    assert state.changed() == []
    assert model.training
    assert model.inner.training
    assert model.seen is seen
    assert len(seen) == 1
    assert model.replaced is replaced
    assert float(model.count) == float(model.last.sum()) == model.steps == 0
    assert model.by_name == {"a": 1}
    assert not hasattr(model, "new")
    assert not hasattr(model, "later")

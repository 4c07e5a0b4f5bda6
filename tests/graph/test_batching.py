"""Outputs of pieces of a batch are put together along the axis that follows it, wherever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.backends.base import TensorSpec
from hwsearch.deployment.evaluate import predictor
from hwsearch.errors import InvalidInput
from hwsearch.graph.batching import BatchAxis, put_together
from hwsearch.loss.divergence import divergence
from hwsearch.lowering.lowering import Lowering
from hwsearch.task import Task


class _Outputs(nn.Module):
    """Returns `make(y, h)` of a hidden layer h [n, 5, 6] and logits y [n, 4]."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.make = nn.Linear(3, 6), nn.Linear(30, 4), make

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.a(x))
        return self.make(self.b(h.flatten(1)), h)


KINDS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], BatchAxis]] = {
    "batch first": (lambda y, h: y, BatchAxis(0)),
    "batch x positions": (lambda y, h: h.flatten(0, 1), BatchAxis(0, 5)),
    "positions x batch": (lambda y, h: h.transpose(0, 1).flatten(0, 1), BatchAxis(0, 5, inner=True)),
    "second": (lambda y, h: h.transpose(0, 1), BatchAxis(1)),
    "last": (lambda y, h: h.permute(1, 2, 0), BatchAxis(2)),
    "second, batch x positions": (lambda y, h: h.permute(2, 0, 1).flatten(1, 2), BatchAxis(1, 5)),
    "second, positions x batch": (lambda y, h: h.permute(2, 1, 0).flatten(1, 2), BatchAxis(1, 5, inner=True)),
    "scalar": (lambda y, h: h.mean(), BatchAxis(None)),
    "statistic": (lambda y, h: h.mean((0, 1)), BatchAxis(None)),
    "batch x batch": (lambda y, h: y @ y.T, BatchAxis(None, mixed=True)),
}


def _lowering(make: Callable[..., Any], batch: int) -> Lowering:
    torch.manual_seed(0)
    return Lowering(
        Task(
            _Outputs(make).eval(),
            torch.randn(batch, 5, 3),
            [torch.randn(8, 5, 3) for _ in range(2)],
            lambda p: 0.0,
        )
    )


class _Engine:
    """The traced graph in the place of a compiled engine: it takes its own batch alone."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering = lowering
        shape = lowering.network.input_shapes[0]
        self.inputs = [TensorSpec("x", shape, np.dtype(np.float32))]

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        assert x.shape == self.inputs[0].shape
        with torch.no_grad():
            own = self.lowering.traced.graph(torch.from_numpy(x))
        return [t.numpy() for t in torch.utils._pytree.tree_leaves(own) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_axis_that_follows_the_batch_is_found(kind: str, batch: int) -> None:
    make, wanted = KINDS[kind]
    found = _lowering(lambda y, h: (y, make(y, h), None), batch).batch_axes
    assert found == (BatchAxis(0), wanted)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [k for k, (_, axis) in KINDS.items() if axis.axis is not None])
def test_predict_returns_what_the_module_does_for_any_batch(kind: str, batch: int) -> None:
    make, _ = KINDS[kind]
    lowering = _lowering(lambda y, h: {"y": y, "own": (make(y, h), None, 7)}, batch)
    predict = predictor(lowering, _Engine(lowering))  # type: ignore[arg-type]
    for count in (1, 3, 7):  # 7: pieces of 3 leave one over
        x = torch.randn(count, 5, 3)
        with torch.no_grad():
            want, have = lowering.task.model(x), predict(x)
        assert have["own"][1:] == (None, 7)
        assert torch.allclose(have["y"], want["y"], atol=1e-5)
        assert have["own"][0].shape == want["own"][0].shape
        assert torch.allclose(have["own"][0], want["own"][0], atol=1e-5)


def test_a_scalar_is_the_mean_over_samples() -> None:
    lowering = _lowering(lambda y, h: (y, h.mean()), 1)
    predict, x = predictor(lowering, _Engine(lowering)), torch.randn(7, 5, 3)  # type: ignore[arg-type]
    with torch.no_grad():
        want, have = lowering.task.model(x), predict(x)
    assert torch.allclose(have[0], want[0], atol=1e-5)
    assert have[1].shape == ()
    assert torch.allclose(have[1], want[1], atol=1e-5)


def test_what_has_no_mean_is_put_together_of_one_piece_alone() -> None:
    lowering = _lowering(lambda y, h: (y, y @ y.T), 3)
    predict, x = predictor(lowering, _Engine(lowering)), torch.randn(7, 5, 3)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(predict(x[:3])[1], lowering.task.model(x[:3])[1], atol=1e-5)
    with pytest.raises(InvalidInput, match=r"output 1 .*evaluate batches of 3, or deploy .*--batch"):
        predict(x)
    whole = [torch.tensor(3), torch.tensor(3)]
    assert put_together([whole], [BatchAxis(None)], [2, 1], 2) == [torch.tensor(3)]
    with pytest.raises(InvalidInput, match="no axis that follows the batch"):
        put_together([[torch.tensor(3), torch.tensor(4)]], [BatchAxis(None)], [2, 1], 2)


def test_losses_are_compared_in_the_deployed_batch_where_an_output_is_a_whole() -> None:
    plain, whole = _lowering(lambda y, h: y, 3), _lowering(lambda y, h: (y, y @ y.T), 3)
    assert plain.comparable is not whole.comparable
    assert [len(b[1][0]) for b in plain.comparable] == [len(b[1][0]) for b in plain.scoring]
    assert {len(b[1][0]) for b in whole.comparable} == {3}
    given = torch.cat([args[0] for _, args, _ in whole.scoring])
    own = torch.cat([args[0] for _, args, _ in whole.comparable])
    assert all(any(torch.equal(row, x) for x in given) for row in own)


@pytest.mark.parametrize("kind", ["second", "last", "batch x positions", "positions x batch"])
def test_divergence_is_the_mean_over_samples_wherever_the_batch_is(kind: str) -> None:
    make, axis = KINDS[kind]
    h, off = torch.randn(8, 5, 6), torch.randn(8, 5, 6)
    want = 8 * float((h.double() - off.double()).square().mean() / h.double().square().mean())
    assert divergence([make(h, off)], [make(h, h)], "mse", [axis]) == (pytest.approx(want, rel=1e-6), 8)


def test_divergence_takes_no_batch_for_classes_and_a_scalar_as_a_whole() -> None:
    p, q = torch.randn(8, 4), torch.randn(8, 4)
    want = divergence([q], [p], "kl")
    assert divergence([q.T], [p.T], "kl", [BatchAxis(1)]) == pytest.approx(want)
    # logits and a scalar that is a tenth off
    both = divergence([q, torch.tensor(1.1)], [p, torch.tensor(1.0)], "auto", [BatchAxis(0), BatchAxis(None)])
    assert both == (pytest.approx((want[0] + 8 * 0.01) / 2, rel=1e-5), 8)


def test_a_model_of_one_batch_size_has_it_on_the_axis_of_that_size() -> None:
    class Fixed(_Outputs):
        def forward(self, x: torch.Tensor) -> Any:
            assert len(x) == 3
            return super().forward(x)

    torch.manual_seed(0)
    model = Fixed(lambda y, h: (y, h.transpose(0, 1)))
    task = Task(model, torch.randn(3, 5, 3), [torch.randn(3, 5, 3) for _ in range(8)], lambda p: 0.0)
    assert Lowering(task).batch_axes == (BatchAxis(0), BatchAxis(1))

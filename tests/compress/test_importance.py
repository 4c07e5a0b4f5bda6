from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import nn

from hwsearch.compress import importance
from hwsearch.compress.gram import Batch
from hwsearch.compress.importance import gate_gradients, order_slots, removal_losses
from hwsearch.graph.narrow import masked_graph
from hwsearch.graph.trace import trace
from hwsearch.loss.divergence import divergence
from tests.networks import NETWORKS


def task(model: nn.Module, *xs: torch.Tensor) -> list[Batch]:
    traced = trace(model.eval(), xs[0])
    return [(traced, (x,), {}) for x in xs]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["residual", "transformer_encoder", "densenet", "grouped", "unet"])
def test_an_order_is_a_permutation_and_repeats(name: str) -> None:
    model, x = NETWORKS[name]()
    own = task(model, x)
    first, again = order_slots(own), order_slots(own)
    assert list(first) == [g.name for g in own[0][0].network.groups]
    for group, order in first.items():
        assert sorted(order.tolist()) == list(range(own[0][0].network.channels[group]))
        np.testing.assert_array_equal(order, again[group])


def test_dead_channels_go_first() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for dead in (2, 5):
            model.a.weight[dead], model.a.bias[dead] = 0, 0
            model.b.weight[:, dead] = 0
    order = order_slots(task(model, *(torch.randn(16, 3, 9, 9) for _ in range(3))))["a"]
    assert set(order[-2:].tolist()) == {2, 5}


def test_elimination_keeps_one_of_two_twins() -> None:
    """A channel that another one repeats is free to go, however large; then the other one is not."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.a.weight[4], model.a.bias[4] = 3 * model.a.weight[1], 3 * model.a.bias[1]
    own = task(model, *(torch.randn(16, 3, 9, 9) for _ in range(3)))
    order = order_slots(own)["a"].tolist()
    assert order[-1] in (1, 4)
    assert not {1, 4} <= set(order[-2:])


def test_gate_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(4, 3, 7, 7)
    own = task(model, x)
    gates, _ = gate_gradients(own, seed=3)
    with torch.no_grad():
        logits = model(x)
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(3))

        def loss() -> torch.Tensor:
            return -model(x).log_softmax(-1).gather(1, labels)[:, 0]

        for slot in range(8):
            weight = model.b.weight[:, slot].clone()
            step = 0.02
            model.b.weight[:, slot] = weight * (1 + step)
            up = loss()
            model.b.weight[:, slot] = weight * (1 - step)
            down = loss()
            model.b.weight[:, slot] = weight
            np.testing.assert_allclose(gates["a"][0][:, slot], ((up - down) / (2 * step)).numpy(), atol=1e-3)


def test_estimates_rank_as_losses_do() -> None:
    """Of widths of both groups, nothing refitted, against the divergence of the masked network."""
    torch.manual_seed(0)
    model = Net()
    own = task(model, *(torch.randn(64, 3, 9, 9) for _ in range(4)))
    traced, (x,), _ = own[0]
    order = order_slots(own)
    cuts = [(g, w) for g, n in traced.network.channels.items() for w in range(1, n + 1)]
    estimates = removal_losses(own, order, cuts)
    losses = []
    for group, width in cuts:
        masked = masked_graph(
            traced.graph, traced.channels, traced.channels.mask({group: order[group][:width]}), traced.reads()
        )
        with torch.no_grad():
            losses.append(divergence(masked(x), traced.graph(x), "kl")[0])
    assert kendalltau(losses, [estimates[c] for c in cuts]).statistic > 0.5
    assert all(estimates[g, n] == 0.0 for g, n in traced.network.channels.items())


@pytest.mark.parametrize(
    "operator", [lambda y: torch.special.gammainc(y, y), lambda y: torch.heaviside(y - 1.2, y)]
)
def test_an_operator_without_a_derivative_passes_no_gradient_and_ends_nothing(
    operator: Callable[..., torch.Tensor],
) -> None:
    """Not even where torch tells so only as it goes backwards."""

    class Opaque(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).relu()
            return self.c(operator(self.b(y).abs() + 1).mean((2, 3)))

    torch.manual_seed(0)
    own = task(Opaque(), torch.randn(8, 3, 8, 8))
    gates, squares = gate_gradients(own)
    assert not gates["a"][0].any()
    assert gates["b"][0].any()
    assert set(squares) == {"c"}
    assert set(order_slots(own)) == {"a", "b"}


def test_outputs_without_a_gradient_give_none() -> None:
    class Hard(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (super().forward(x) > 0).float()

    own = task(Hard(), torch.randn(8, 3, 8, 8))
    gates, squares = gate_gradients(own)
    assert not squares
    assert not any(g.any() for several in gates.values() for g in several)
    assert set(order_slots(own)) == {"a", "b"}


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 3), st.integers(1, 4))
def test_elimination_removes_what_costs_least_with_all_that_is_left_refitted(
    seed: int, slots: int, each: int, panel: int
) -> None:
    """Against the least squares of every choice, solved anew."""
    rng = np.random.default_rng(seed)
    cases = []
    for outputs in (3, 5):
        beside = int(rng.integers(0, 3))  # features of no slot
        x = rng.standard_normal((40, slots * each + beside)) @ rng.standard_normal((slots * each + beside,) * 2)
        columns = rng.permutation(x.shape[1])[: slots * each].reshape(slots, each)
        cases.append((rng.standard_normal((outputs, x.shape[1])), x.T @ x / 40 + 0.1 * np.eye(x.shape[1]), columns))

    def lost(gone: list[int]) -> float:
        total = 0.0
        for weight, second, columns in cases:
            r = columns[gone].ravel()
            k = np.setdiff1d(np.arange(len(second)), r)
            inner = second[np.ix_(k, k)]
            left = second[np.ix_(r, r)] - second[np.ix_(r, k)] @ np.linalg.solve(inner, second[np.ix_(k, r)])
            total += float(np.trace(weight[:, r] @ left @ weight[:, r].T))
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "PANEL", panel)
        found = importance._eliminate(
            importance.Consumer(
                torch.from_numpy(w), torch.from_numpy(np.linalg.inv(g)), torch.from_numpy(c)
            )
            for w, g, c in cases
        )
    assert sorted(found) == list(range(slots))
    removed: list[int] = []
    for slot in reversed(found[1:].tolist()):
        costs = {s: lost([*removed, s]) for s in range(slots) if s not in removed}
        assert costs[slot] <= min(costs.values()) * (1 + 1e-6)
        removed.append(slot)

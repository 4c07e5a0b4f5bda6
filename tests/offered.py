"""Random small networks on a simulated device, all that it offers of them, and whether "infeasible" is true of random budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.allocate.budget import COMPUTED
from hwsearch.allocate.search import search
from hwsearch.api import widths_to_score
from hwsearch.backends.base import BuildOptions
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.errors import Infeasible
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.choices import candidate_widths
from hwsearch.network.memory import peak_bytes
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, legal, network_bytes
from hwsearch.profiler.profile import Effort, profile, without_times
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of

Array = NDArray[np.float64]

FAST = Protocol(width=0.05, block_ns=1, warmup_ns=1, limit_s=0.5)
QUALIFIED = ("the least known so far", "a prediction cannot tell")
KINDS = (
    ("latency",), ("latency",), ("latency", "size"), ("latency", "macs"), ("latency", "memory"), ("size",), ("macs",),
    ("size", "memory"),
)  # fmt: skip


class Chain(nn.Module):
    """Convolutions in a row, some with the block's input added, and a linear layer."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.added: list[bool] = []
        convs, into = [], 3
        for i in range(int(rng.integers(2, 4))):
            self.added.append(bool(i and rng.random() < 0.3))
            out = into if self.added[-1] else int(rng.choice((4, 6, 8, 12, 16, 20)))
            convs.append(nn.Conv2d(into, out, int(rng.choice((1, 3, 5))), padding="same", bias=bool(rng.random() < 0.7)))
            into = out
        self.convs, self.head = nn.ModuleList(convs), nn.Linear(into, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, added in zip(self.convs, self.added, strict=True):
            y = F.relu(conv(x))
            x = x + y if added else y
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trial:
    """What became of one network, its budgets and its time limit.

    exists: whether any allocation of the offered space truly meets the budgets. refused: what the search said where it found none.
    """

    budgets: Sequence[str]
    builds: int
    exists: bool
    refused: str = ""

    @property
    def outcome(self) -> str:
        """`answer`, `refused` flatly, or `so far`: refused with what is not known."""
        if not self.refused:
            return "answer"
        return "so far" if any(words in self.refused for words in QUALIFIED) else "refused"

    @property
    def false(self) -> bool:
        """Whether it was said to be infeasible and is not."""
        return self.exists and self.outcome == "refused"


@cache
def network(number: int) -> tuple[Lowering, SensitivityTable]:
    """A random network made ready, and the losses of all that a profile would try of it."""
    torch.manual_seed(number)
    x, y = torch.randn(8, 3, 6, 6), torch.randn(4, 3, 6, 6)
    task = hs.Task(Chain(np.random.default_rng(number)).eval(), x[:1], [x, y], lambda _: 0.0, f"random{number}")
    lowering = Lowering(task)
    setup = Setup(lowering, SimulatedBackend(LatencyLaw.random(lowering.network)), BuildOptions(), storage=True)
    grid = {g: candidate_widths(n) for g, n in lowering.network.channels.items()}
    return lowering, sensitivity_for(setup, None, grid=grid)


def trial(seed: int, networks: int) -> Trial:
    """One of so many networks with a random law, time limit and budgets: profile and search, beside exhaustive search."""
    rng = np.random.default_rng(seed)
    lowering, losses = network(seed % networks)
    kinds = KINDS[int(rng.integers(len(KINDS)))]
    law = LatencyLaw.random(lowering.network, seed)
    backend = SimulatedBackend(law, noise=0.002, build_noise=0.002, node_noise=0.01, build_ns=10**9, seed=seed)
    setup = Setup(lowering, backend, BuildOptions(), storage="size" in kinds)
    table = without_times(setup)
    every, of = list(allocations(setup)), columns(setup, law, table)
    costs = {c: np.array([of[c](*own) for own in every], float) for c in kinds}
    bounds = _bounds(costs, rng)
    units = {"latency": "ns", "macs": "MAC"}
    budgets = [f"{c}={bound}{units.get(c, 'B')}" for c, bound in bounds.items()]
    exists = bool(np.all([costs[c] <= bound for c, bound in bounds.items()], axis=0).any())
    if not set(kinds) <= set(COMPUTED):
        limit_s = float(np.exp(rng.uniform(np.log(2.0), np.log(150.0))))
        table = profile(setup, None, Effort(limit_s, protocol=FAST))
    scored = widths_to_score(table, bounds)
    known = {g: {w: own[w] for w in scored[g]} for g, own in losses.width_loss.items()}
    try:
        search(table, replace(losses, width_loss=known), budgets)
    except Infeasible as error:
        return Trial(budgets, len(table.builds), exists, str(error))
    return Trial(budgets, len(table.builds), exists)


def _bounds(costs: Mapping[str, Array], rng: np.random.Generator) -> dict[str, int]:
    """Budgets around what an allocation costs that is among the best twentieth by the first of them, or below the least."""
    order = np.argsort(next(iter(costs.values())), kind="stable")
    chosen = order[int(rng.integers(max(1, len(order) // 20))) if rng.random() < 0.7 else 0]
    return {c: int(own[chosen] * rng.choice((0.97, 1.0, 1.0, 1.01, 1.05, 1.2))) for c, own in costs.items()}


Allocation = tuple[dict[str, Variant], dict[str, int], Network]


def allocations(setup: Setup) -> Iterator[Allocation]:
    """Every (variants, widths, network at these widths) that is offered."""
    network = setup.network
    for chosen in product(*(candidate_widths(n) for n in network.channels.values())):
        widths = dict(zip(network.channels, chosen, strict=True))
        narrow = network.narrow(widths)
        for variants in product(*(legal(u, setup.variants()) for u in narrow.units)):
            yield dict(zip((u.name for u in network.units), variants, strict=True)), widths, narrow


def columns(setup: Setup, law: LatencyLaw, sizes: LatencyTable) -> dict[str, Callable[..., float]]:
    """What an allocation costs, of each kind."""
    network, header = setup.network, sizes.header

    def size(variants: Mapping[str, Variant], _: Mapping[str, int], narrow: Network) -> int:
        graph = sum(header.unit_bytes[u][str(v)] for u, v in variants.items())
        return network_bytes(narrow, variants) + header.graph_bytes + graph

    return {
        "latency": lambda variants, widths, _: law.time_ns(
            {u: "int8" if v.quantized else "fp32" for u, v in variants.items()}, sizes_of(network, widths)
        ),
        "size": size,
        "memory": lambda variants, widths, _: peak_bytes(network, variants, widths, base="fp32"),
        "macs": lambda _, __, narrow: narrow.macs,
    }

"""Random small networks on a simulated device, all that it offers of them, and whether "infeasible" is true of random budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.allocate.budget import COMPUTED, parse_budgets
from hwsearch.allocate.search import search
from hwsearch.api import widths_to_score
from hwsearch.backends.base import BuildOptions
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.errors import Infeasible
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.choices import candidate_widths
from hwsearch.network.memory import peak_bytes
from hwsearch.network.variants import Variant, legal, network_bytes
from hwsearch.profiler.profile import Effort, profile, without_times
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of

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
    tags: set[str] = field(default_factory=set)

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


def trial(seed: int) -> Trial:
    """A random network, law, time limit and budgets, from the profile to the search, beside exhaustive search."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x, y = torch.randn(8, 3, 6, 6), torch.randn(4, 3, 6, 6)
    task = hs.Task(Chain(rng).eval(), x[:1], [x, y], lambda _: 0.0, f"random{seed}")
    lowering = Lowering(task)
    kinds = KINDS[int(rng.integers(len(KINDS)))]
    law = LatencyLaw.random(lowering.network, seed)
    backend = SimulatedBackend(law, noise=0.002, build_noise=0.002, node_noise=0.01, build_ns=10**9, seed=seed)
    setup = Setup(lowering, backend, BuildOptions(), storage="size" in kinds)
    sizes = without_times(setup)
    costs = {c: np.array(own) for c, own in zip(("latency", "size", "memory", "macs"), zip(*_offered(setup, law, sizes), strict=True), strict=True)}
    # budgets around what one allocation of the fastest or smallest tenth costs, now and then below the least
    near = np.argsort(costs[kinds[0]])[: max(1, len(costs["size"]) // 10)]
    chosen = near[int(rng.integers(len(near)))]
    bounds = {c: int(costs[c][chosen] * rng.choice((0.97, 1.0, 1.0, 1.03, 1.2))) for c in kinds}
    units = {"latency": "ns", "macs": "MAC"}
    budgets = [f"{c}={bound}{units.get(c, 'B')}" for c, bound in bounds.items()]
    exists = bool(np.all([costs[c] <= bound for c, bound in bounds.items()], axis=0).any())
    parsed, table = parse_budgets(budgets), sizes
    if not set(kinds) <= set(COMPUTED):
        limit_s = float(np.exp(rng.uniform(np.log(2.0), np.log(150.0))))
        table = profile(setup, None, Effort(limit_s, protocol=FAST))
    losses = sensitivity_for(setup, None, grid=widths_to_score(table, parsed))
    try:
        search(table, losses, budgets)
    except Infeasible as error:
        return Trial(budgets, len(table.builds), exists, str(error))
    return Trial(budgets, len(table.builds), exists)


def _offered(setup: Setup, law: LatencyLaw, sizes: LatencyTable) -> Iterator[tuple[float, int, int, int]]:
    """(ns, bytes, bytes of activations, MACs) of every allocation: each variant of the backend at each width to try."""
    network, header = setup.network, sizes.header
    steps = [candidate_widths(n) for n in network.channels.values()]
    for chosen in product(*steps):
        widths = dict(zip(network.channels, chosen, strict=True))
        narrow, at = network.narrow(widths), sizes_of(network, widths)
        for variants in product(*(legal(u, setup.variants()) for u in narrow.units)):
            own: dict[str, Variant] = dict(zip((u.name for u in narrow.units), variants, strict=True))
            graph = header.graph_bytes + sum(header.unit_bytes[u][str(v)] for u, v in own.items())
            yield (
                law.time_ns({u: "int8" if v.quantized else "fp32" for u, v in own.items()}, at),
                network_bytes(narrow, own) + graph,
                peak_bytes(network, own, widths, base="fp32"),
                narrow.macs,
            )

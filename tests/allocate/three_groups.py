"""A network of three channel groups with a table and losses, small enough for brute force."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

from simulation import OFFERED, grouped, scores, simulated_table

from hwsearch.allocate.allocation import Allocation
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.network.choices import Candidate
from hwsearch.network.memory import peak_bytes
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK = grouped()
GRID = {"conv0": [24, 16, 8], "conv1": [40, 24, 16, 8], "conv2": [16, 8]}
LAW = LatencyLaw.random(NETWORK, 3)
ADDITIVE = LatencyLaw(LAW.units, rest_ns=LAW.rest_ns, whole=LAW.whole)
SCORES = scores(NETWORK, GRID)


@cache
def table(additive: bool = False) -> LatencyTable:
    return simulated_table(NETWORK, ADDITIVE if additive else LAW, design=8, grid=GRID)


@cache
def model(additive: bool = False) -> LatencyModel:
    return fit(table(additive))


def everything(grid: dict[str, list[int]] = GRID) -> Iterator[Candidate]:
    units, groups = list(NETWORK.by_name), list(grid)
    for widths in product(*grid.values()):
        for variants in product(OFFERED, repeat=len(units)):
            yield Candidate(dict(zip(units, variants, strict=True)), dict(zip(groups, widths, strict=True)))


def chosen(found: Allocation) -> Candidate:
    return Candidate({u: Variant.parse(v) for u, v in found.variants.items()}, found.widths)


def memory(of: Candidate, quantize_outputs: bool = False) -> int:
    return peak_bytes(NETWORK, of.variants, of.widths, base="fp32", quantize_outputs=quantize_outputs)


def narrow(of: Candidate) -> Network:
    return NETWORK.narrow(of.widths)

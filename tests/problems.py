"""Random allocation problems, small enough for brute force or as large as a real network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import strategies as st

from hwsearch.allocate.problem import Choice, Cost, Problem

LOSSES = ("uniform", "decades", "ties")


@st.composite
def problems(draw: st.DrawFn, budgets: bool = True) -> Problem:
    """Up to 6 variables of up to 4 choices, pairwise costs of either sign, costs of 1 to 1e10, 1 or 2 budgets.

    Budgets are the costs of some choice, exactly or one unit below.
    """
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = 10 ** draw(st.integers(0, 10))
    names = ["latency", "size"][: draw(st.integers(1, 2))]
    problem = Problem(
        variables=tuple(f"u{i}" for i in range(len(sizes))),
        choices=tuple(tuple(f"c{a}" for a in range(n)) for n in sizes),
        loss=tuple(random_loss(rng, draw(st.sampled_from(LOSSES)), n) for n in sizes),
        costs={name: random_cost(rng, sizes, largest) for name in names},
    )
    if not budgets:
        return problem
    limits = {}
    for name in names:
        some = [int(rng.integers(n)) for n in sizes]
        limits[name] = problem.cost(name, some) - draw(st.integers(0, 1))
    return replace(problem, budgets=limits)


def random_loss(rng: np.random.Generator, kind: str, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if kind == "uniform":
        return rng.random(n)
    return 10.0 ** rng.uniform(-9, 1, n) if kind == "decades" else rng.integers(0, 3, n) / 4


def random_cost(rng: np.random.Generator, sizes: list[int], largest: int) -> Cost:
    """Half of the pairs interact; half of those by classes of choices only."""
    pairwise = {}
    for j, i in product(range(len(sizes)), repeat=2):
        if i < j and rng.random() < 0.5:
            matrix = rng.integers(-largest, largest, (sizes[i], sizes[j]), endpoint=True)
            if rng.random() < 0.5:
                matrix = matrix[np.ix_(rng.integers(0, min(2, sizes[i]), sizes[i]), np.arange(sizes[j]))]
            pairwise[i, j] = matrix
    unary = tuple(rng.integers(0, largest, n, endpoint=True) for n in sizes)
    return Cost(int(rng.integers(0, largest, endpoint=True)), unary, pairwise)


def all_choices(problem: Problem) -> Iterator[Choice]:
    return product(*map(range, problem.sizes))


def network(units: int, skips: int, seed: int = 0, scale_ns: float = 1e4) -> Problem:
    """Like a network: a chain with skips, fp32, bf16 and int8, boundaries by class (int8 or not)."""
    rng = np.random.default_rng(seed)
    fp32 = (rng.lognormal(0, 1, units) * 5 * scale_ns).astype(np.int64)
    factors = np.stack([np.ones(units), rng.uniform(0.3, 0.7, units), rng.uniform(0.1, 0.5, units)], 1)
    edges = {(i, i + 1) for i in range(units - 1)}
    while len(edges) < units - 1 + skips:
        i = int(rng.integers(0, units - 5))
        edges.add((i, i + int(rng.integers(2, 5))))
    pairwise = {}
    for edge in sorted(edges):
        into, out = (rng.lognormal(0, 0.7, 2) * 0.5 * scale_ns).astype(np.int64)
        fused = -int(rng.integers(0, round(0.3 * scale_ns)))
        pairwise[edge] = np.array([[0, into], [out, fused]])[np.ix_([0, 0, 1], [0, 0, 1])]
    weights = rng.lognormal(10, 1, units).astype(np.int64)
    loss = rng.lognormal(-7, 2, units)
    return Problem(
        variables=tuple(f"u{i}" for i in range(units)),
        choices=(("dense.fp32", "dense.bf16", "dense.int8"),) * units,
        loss=tuple(np.array([0.0, x * 1e-3 * rng.random(), x]) for x in loss),
        costs={
            "latency": Cost(int(scale_ns), tuple((fp32[:, None] * factors).astype(np.int64)), pairwise),
            "size": Cost(1000, tuple(np.array([4 * w, 2 * w, w + 64]) for w in weights)),
        },
    )

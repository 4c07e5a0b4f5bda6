"""The peak of the activations in the program: against `memory.peak_bytes` and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program, programs

from hwsearch.allocate.activations import with_memory
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Choice, Cost, Problem
from hwsearch.errors import Infeasible
from hwsearch.network.memory import peak_bytes
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant

OFFERED = (Variant("bf16"), Variant("int8"))


def completed(problem: Problem, first: Choice) -> Choice:
    """The choice of the first variables with those that ties decide."""
    found = dict(enumerate(first))
    for j in range(len(first), len(problem.sizes)):
        into = [t for t in problem.ties if t.j == j and t.i in found]
        out = [t for t in problem.ties if t.i == j and t.j in found]
        fits = [
            a for a in range(problem.sizes[j])
            if all(t.of[found[t.i]] == a for t in into) and all(t.of[a] == found[t.j] for t in out)
        ]  # fmt: skip
        assert len(fits) == 1
        found[j] = fits[0]
    return tuple(found[j] for j in range(len(problem.sizes)))


def of(network: Network, quantize_outputs: bool, seed: int) -> Problem:
    """Losses and a second cost at random, and the peak."""
    rng = np.random.default_rng(seed)
    n = len(network.units)
    free = Problem(
        variables=tuple(u.name for u in network.units),
        choices=(("bf16", "int8"),) * n,
        loss=tuple(np.array([0.0, x]) for x in rng.random(n)),
        costs={"latency": Cost(0, tuple(np.array([9, int(x)]) for x in rng.integers(1, 20, n)))},
    )
    return with_memory(
        free, network, [[(v, {}) for v in OFFERED]] * n, "bf16", quantize_outputs=quantize_outputs
    )


def peaks(problem: Problem, network: Network, quantize_outputs: bool) -> dict[Choice, int]:
    """Every allocation, with its peak."""
    found = {}
    for choice in product((0, 1), repeat=len(network.units)):
        variants = {u.name: OFFERED[c] for u, c in zip(network.units, choice, strict=True)}
        found[completed(problem, choice)] = peak_bytes(
            network, variants, base="bf16", quantize_outputs=quantize_outputs
        )
    return found


@settings(max_examples=60, deadline=None)
@given(programs(most=6), st.booleans(), st.integers(0, 99))
def test_the_peak_is_exact(program: Program, quantize_outputs: bool, seed: int) -> None:
    problem = of(program.network, quantize_outputs, seed)
    for choice, peak in peaks(problem, program.network, quantize_outputs).items():
        assert problem.consistent(choice)
        assert problem.cost("memory", choice) == peak


@settings(max_examples=40, deadline=None)
@given(programs(most=6), st.booleans(), st.integers(0, 99), st.floats(0, 1), st.booleans())
def test_equals_brute_force(
    program: Program, quantize_outputs: bool, seed: int, share: float, timed: bool
) -> None:
    """The least loss under a budget on the peak, alone or beside another; the least peak where there is none."""
    problem = of(program.network, quantize_outputs, seed)
    found = peaks(problem, program.network, quantize_outputs)
    times = [problem.cost("latency", c) for c in found]
    budgets = {"memory": round(min(found.values()) - 1 + share * (max(found.values()) - min(found.values())))}
    if timed:
        budgets["latency"] = round(min(times) + share * (max(times) - min(times)))
    bounded = replace(problem, budgets=budgets)
    allowed = [c for c in found if bounded.feasible(c)]
    if not allowed:
        with pytest.raises(Infeasible) as caught:
            solve(bounded)
        others = [c for c in found if problem.cost("latency", c) <= budgets.get("latency", 10**9)]
        assert caught.value.least["memory"] == min(found[c] for c in others)
        return
    best = solve(bounded)
    assert best.choice in allowed
    assert best.loss == pytest.approx(min(map(problem.total_loss, allowed)), rel=1e-9)
    assert best.costs["memory"] == found[best.choice]


@settings(max_examples=40, deadline=None)
@given(programs(most=6), st.booleans(), st.floats(0, 1))
def test_the_least_peak_is_proven(program: Program, quantize_outputs: bool, share: float) -> None:
    problem = of(program.network, quantize_outputs, 0)
    found = peaks(problem, program.network, quantize_outputs)
    times = [problem.cost("latency", c) for c in found]
    limit = round(min(times) + share * (max(times) - min(times)))
    least = minimise(problem, "memory", budgets={"latency": limit})
    assert least.costs["memory"] == min(m for c, m in found.items() if problem.cost("latency", c) <= limit)
    assert (least.status, least.gap) == ("optimal", 0.0)

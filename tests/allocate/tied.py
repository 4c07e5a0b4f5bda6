"""Problems with ties: random ones for brute force, and a network whose channel groups have widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from problems import all_choices, problems

from hwsearch.allocate.problem import Choice, Cost, Problem, Tie

GRAIN = 8
"""Channels that the simulated kernels work on at once: a width is rounded up to them, so time is not monotone."""


@st.composite
def tied_problems(draw: st.DrawFn, budgets: bool = True) -> Problem:
    """Problems with up to three ties, to one target or to several, chained or not; at least one choice agrees.

    Budgets are the costs of some choice that agrees with the ties, exactly or one unit below.
    """
    problem = draw(problems(budgets=False))
    n = len(problem.sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    some = [int(rng.integers(size)) for size in problem.sizes]
    ties = []
    for _ in range(draw(st.integers(1, 3)) if n > 1 else 0):
        i, j = (int(v) for v in rng.choice(n, 2, replace=False))
        of = rng.integers(0, problem.sizes[j], problem.sizes[i])
        of[some[i]] = some[j]
        ties.append(Tie(i, j, of))
    problem = replace(problem, ties=tuple(ties))
    if not budgets:
        return problem
    limits = {c: problem.cost(c, some) - draw(st.integers(0, 1)) for c in problem.costs}
    return replace(problem, budgets=limits)


def consistent_choices(problem: Problem) -> list[Choice]:
    return [a for a in all_choices(problem) if problem.consistent(a)]


def channels(blocks: int = 16, stages: int = 8, widths: int = 7, seed: int = 0) -> Problem:
    """Like an inverted-residual network: stem, `blocks` of expand, depthwise and project, and a head.

    A group for the trunk of each stage, for the inside of each block and for the head; each with `widths` widths.
    A unit's choice is (width of its input group, width of its output group, fp32 or int8). Latency is about the
    product of the widths, rounded up to GRAIN, with noise; ns and bytes.
    """
    rng = np.random.default_rng(seed)
    stage = [b * stages // blocks for b in range(blocks)]
    trunk, inside, head = range(stages), range(stages, stages + blocks), stages + blocks
    channel_counts = [*(16 + 24 * s for s in range(stages)), *(6 * (16 + 24 * s) for s in stage), 1280]
    units: list[tuple[int | None, int | None, str]] = [(None, 0, "stem")]
    edges = []
    for b in range(blocks):
        source = trunk[stage[max(b - 1, 0)]]
        edges += [(len(units) - 1 + k, len(units) + k) for k in range(3)]
        if b and stage[b] == stage[b - 1]:
            edges.append((len(units) - 1, len(units) + 2))  # the residual sum
        units += [(source, inside[b], "expand"), (inside[b], inside[b], "depthwise"),
                  (inside[b], trunk[stage[b]], "project")]  # fmt: skip
    edges.append((len(units) - 1, len(units)))
    units.append((trunk[stages - 1], head, "head"))
    ratios = np.linspace(1, 0.25, widths)
    kept = [np.maximum(1, np.round(ratios * count)).astype(int) for count in channel_counts]
    groups = len(channel_counts)
    loss = [_width_loss(rng, ratios) for _ in range(groups)]
    choices = [tuple(f"w{int(k)}" for k in ks) for ks in kept]
    variables = [f"g{g}" for g in range(groups)]
    latency = [np.zeros(widths, np.int64)] * groups
    size = [np.zeros(widths, np.int64)] * groups
    macs = [np.zeros(widths, np.int64)] * groups
    ties, int8 = [], []
    for u, (source_group, target_group, kind) in enumerate(units):
        one = kind == "depthwise"
        wide_in = [0] if source_group is None or one else range(widths)
        cells = [(a, b, p) for a in wide_in for b in range(widths) for p in (0, 1)]
        into, out, precision = (np.array(column) for column in zip(*cells, strict=True))
        n_in = np.full(len(cells), 3) if source_group is None else kept[source_group][into]
        n_out = kept[target_group][out]
        count = n_out * 9 if one else n_in * n_out
        padded = _up(n_out) * 9 if one else _up(n_in) * _up(n_out)
        pixels = 112**2 * 4 // (1 + (channel_counts[target_group] // (16 if one else 8)))
        speed = rng.uniform(0.4, 0.7) * rng.normal(1, 0.04, len(cells))
        noise = rng.normal(1, 0.06, len(cells))
        variables.append(f"u{u}")
        choices.append(
            tuple(f"{n_in[c]}x{n_out[c]}.{('fp32', 'int8')[p]}" for c, (_, _, p) in enumerate(cells))
        )
        loss.append(precision * 10 ** rng.normal(-4, 0.5))
        latency.append(
            (
                2e3 + padded * pixels * rng.uniform(0.5, 2) / 900 * noise * np.where(precision, speed, 1)
            ).astype(np.int64)
        )
        size.append((count * np.where(precision, 1, 4) + n_out * 4).astype(np.int64))
        macs.append((count * pixels).astype(np.int64))
        if source_group is not None and not one:
            ties.append(Tie(groups + u, source_group, into))
        ties.append(Tie(groups + u, target_group, out))
        int8.append(precision)
    pairwise = {}
    for i, j in edges:
        enter, leave = (rng.lognormal(0, 0.7, 2) * 2e4).astype(np.int64)
        small = np.array([[0, enter], [leave, -int(rng.integers(0, 10**4))]])
        pairwise[groups + i, groups + j] = small[np.ix_(int8[i], int8[j])]
    return Problem(
        variables=tuple(variables),
        choices=tuple(choices),
        loss=tuple(loss),
        costs={
            "latency": Cost(10**5, tuple(latency), pairwise),
            "size": Cost(10**4, tuple(size)),
            "macs": Cost(0, tuple(macs)),
        },
        ties=tuple(ties),
    )


def _up(n: NDArray[np.int64]) -> NDArray[np.int64]:
    rounded: NDArray[np.int64] = -(-n // GRAIN) * GRAIN
    return rounded


def _width_loss(rng: np.random.Generator, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Falls with the width, about convex, with noise; none at full width."""
    scale, power = 10 ** rng.normal(-2, 0.5), rng.uniform(1.2, 2.5)
    loss: NDArray[np.float64] = scale * (1 - ratios) ** power * rng.normal(1, 0.05, len(ratios))
    return loss

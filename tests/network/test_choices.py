"""Designs cover what a table should know; widths on a grid are worth their place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import OFFERED, chain, grouped

from hwsearch.errors import InvalidInput
from hwsearch.network.choices import (
    FASTER,
    MOST_STEPS,
    Candidate,
    all_cells,
    candidate_widths,
    check_axes,
    cover,
    random_allocation,
    random_candidate,
    whole,
    worth,
)
from hwsearch.network.variants import Variant


@pytest.mark.parametrize("seed", range(4))
def test_the_design_covers_every_variant_and_every_pair_on_an_edge(seed: int) -> None:
    network = chain(20)
    offered = {u.name: OFFERED for u in network.units} | {"layer5.conv": (Variant("fp32"),)}
    rng = np.random.default_rng(seed)
    done: list[Candidate] = []
    for _ in range(16):
        done.append(cover(network, offered, whole(network), done, rng))
    for unit, variants in offered.items():
        assert {c.variants[unit] for c in done} == set(variants)
    for edge in network.edges:
        wanted = {
            (a.quantized, b.quantized) for a, b in itertools.product(offered[edge.src], offered[edge.dst])
        }
        seen = {(c.variants[edge.src].quantized, c.variants[edge.dst].quantized) for c in done}
        assert seen == wanted


def test_the_residual_width_is_a_width() -> None:
    assert check_axes(["width", "residual"]) == ("width", "residual")
    with pytest.raises(InvalidInput, match="width,residual"):
        check_axes(["precision", "residual"])


@pytest.mark.parametrize("seed", range(4))
def test_the_design_covers_every_cell(seed: int) -> None:
    network = grouped()
    offered = {u.name: OFFERED for u in network.units} | {"conv1": (Variant("fp32"),)}
    grid = {"conv0": [24, 16, 8], "conv1": [40, 32, 16, 8], "conv2": [16]}
    cells = all_cells(network, offered, grid)
    assert len(cells) == 3 * 2 + 12 + 4 * 2 + 2
    rng = np.random.default_rng(seed)
    done: list[Candidate] = []
    missing = set(cells)
    while missing:
        done.append(cover(network, offered, grid, done, rng))
        own = set(done[-1].cells(network))
        assert own & missing, "a build that says nothing new"
        missing -= own
    assert len(done) <= 2 * 12  # the unit with the most cells needs 12 builds
    assert set().union(*(c.cells(network) for c in done)) == cells


def test_random_allocations_keep_to_what_is_offered() -> None:
    network, grid = grouped(), {"conv0": [24, 8], "conv1": [40], "conv2": [16, 12, 4]}
    offered = {u.name: OFFERED[i % 2 :] for i, u in enumerate(network.units)}
    rng = np.random.default_rng(0)
    widths = set()
    for _ in range(100):
        assert all(v in offered[u] for u, v in random_allocation(network, offered, rng).items())
        drawn = random_candidate(network, offered, grid, rng)
        assert all(v in offered[u] for u, v in drawn.variants.items())
        assert all(w in grid[g] for g, w in drawn.widths.items())
        widths.add(tuple(drawn.widths.values()))
    assert len(widths) == 6


def test_axes_are_checked() -> None:
    assert check_axes(["precision", "width"]) == ("precision", "width")
    for wrong in (["depth"], ["width", "sparsity"], []):
        with pytest.raises(InvalidInput, match="expected width and precision"):
            check_axes(wrong)


@given(st.integers(1, 4096))
def test_candidate_widths_fall_from_the_whole_one(channels: int) -> None:
    widths = candidate_widths(channels)
    assert widths[0] == channels
    assert widths == sorted(set(widths), reverse=True)
    assert widths[-1] >= max(channels // 4, 1)
    assert len(widths) <= 9
    if channels > 1:
        assert len(widths) > 1


times = st.floats(1.0, 1e6)


@given(st.dictionaries(st.integers(1, 512), st.tuples(times, times), min_size=1))
def test_widths_worth_knowing_are_faster_than_every_wider_one_that_is(
    measured: dict[int, tuple[float, float]],
) -> None:
    kept = worth(measured)
    assert kept[0] == max(measured)
    assert kept == sorted(set(kept), reverse=True)
    assert set(kept) <= set(measured)
    assert len(kept) <= MOST_STEPS
    for i, width in enumerate(kept[1:], 1):
        assert any(
            measured[width][p] < (1 - FASTER) * min(measured[wider][p] for wider in kept[:i])
            for p in range(2)
        )


@given(st.dictionaries(st.integers(1, 512), times, min_size=1))
def test_a_width_left_out_is_no_faster_than_a_wider_one_kept(measured: dict[int, float]) -> None:
    kept = worth({w: [t] for w, t in measured.items()})
    if len(kept) < MOST_STEPS:
        for width in set(measured) - set(kept):
            assert measured[width] >= (1 - FASTER) * min(measured[k] for k in kept if k > width)
    assert min(measured[k] for k in kept) <= min(measured.values()) / (1 - FASTER)

"""The next builds are those that most reduce what is unknown of likely allocations."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import OFFERED, chain, grouped, header, simulated_build, simulated_table

from hwsearch.network.choices import Candidate, cover, whole
from hwsearch.network.network import Network
from hwsearch.network.variants import uniform
from hwsearch.profiler.proposal import Belief, propose
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, sizes_of

GROUPED = grouped()
GRID = {"conv0": [24, 16, 8], "conv1": [40, 24, 16], "conv2": [16, 8]}


def measured(table: LatencyTable, law: LatencyLaw, candidate: Candidate, seed: int) -> LatencyTable:
    rng = np.random.default_rng(seed)
    return table.with_build(
        simulated_build(table.network, law, candidate.variants, noise=0.005, node_noise=0.05, rng=rng,
                        widths=candidate.widths)
    )  # fmt: skip


def anchors(network: Network, law: LatencyLaw) -> LatencyTable:
    plain = [uniform(network, p) for p in ("fp32", "int8")]
    builds = [
        simulated_build(network, law, v, r) for r, v in zip(("reference", "uniform"), plain, strict=True)
    ]
    return LatencyTable(header(network, law), tuple(builds))


def test_what_is_expected_of_a_build_comes_true() -> None:
    """The error that a proposal foresees after its builds is what the next proposal finds before its own."""
    network = chain(12)
    law = LatencyLaw.random(network, 3)
    offered, grid = {u.name: OFFERED for u in network.units}, whole(network)
    table = simulated_table(network, law, design=2, noise=0.005, node_noise=0.05)
    for step in range(3):
        found = propose(table, offered, grid, np.random.default_rng(step), 3)
        assert found.after < found.error
        for i, candidate in enumerate(found.candidates):
            table = measured(table, law, candidate, 10 * step + i)
        then = propose(table, offered, grid, np.random.default_rng(100 + step), 3)
        assert then.error == pytest.approx(found.after, rel=0.5)


def test_chosen_builds_leave_less_unknown_than_covering_ones() -> None:
    """Of allocations near what a search would pick, at cells of which some were never built."""
    offered = {u.name: OFFERED for u in GROUPED.units}
    chosen, covering = [], []
    for seed in range(4):
        law = LatencyLaw.random(GROUPED, seed)
        table = other = simulated_table(GROUPED, law, design=4, noise=0.005, node_noise=0.05)
        rng = np.random.default_rng(seed)
        for candidate in propose(table, offered, GRID, rng, 6).candidates:
            table = measured(table, law, candidate, seed)
        for _ in range(6):
            done = [other.candidate(b) for b in other.builds]
            other = measured(other, law, cover(GROUPED, offered, GRID, done, rng), seed)
        for found, where in ((table, chosen), (other, covering)):
            where.append(propose(found, offered, GRID, np.random.default_rng(50), 1).error)
    assert np.mean(chosen) < np.mean(covering)


def test_likely_allocations_are_near_the_least_time_at_no_loss() -> None:
    law = LatencyLaw.random(GROUPED, 1)
    table = simulated_table(GROUPED, law, design=12, grid=GRID)
    offered = {u.name: OFFERED for u in GROUPED.units}
    belief = Belief(table, offered, GRID)
    rng = np.random.default_rng(0)
    drawn = belief.likely(rng, 60)
    times = [
        law.time_ns({u: v.precision for u, v in c.variants.items()}, sizes_of(GROUPED, c.widths))
        for c in drawn
    ]
    whole_ns = law.time_ns(dict.fromkeys(law.units, "fp32"))
    least = law.time_ns(
        dict.fromkeys(law.units, "int8"), sizes_of(GROUPED, {g: s[-1] for g, s in GRID.items()})
    )
    assert min(times) < 1.1 * least
    assert max(times) > 0.8 * whole_ns
    assert len({tuple(c.widths.values()) for c in drawn}) > 5
    assert all(c.widths[g] in GRID[g] for c in drawn for g in GRID)


def test_cells_that_were_never_built_are_expected_from_their_stairs() -> None:
    """Of a law whose stairs multiply: from probes of single groups, a cell that is narrow on both sides."""
    law = LatencyLaw.random(GROUPED, 2)
    table = anchors(GROUPED, law)
    for group, steps in GRID.items():
        for width in steps[1:]:
            for precision in ("fp32", "int8"):
                candidate = Candidate(uniform(GROUPED, precision), {**GROUPED.channels, group: width})
                table = measured(table, law, candidate, width)
    belief = Belief(table, {u.name: OFFERED for u in GROUPED.units}, GRID)
    both = {"conv0": 8, "conv1": 16}
    assert ("unit", GROUPED.unit_at("conv1", both).signature, "dense.fp32") in belief.unbuilt
    want = law.nodes({"conv1": "fp32"}, sizes=sizes_of(GROUPED, both))[0].time_ns
    assert belief.unit_ns("conv1", both, OFFERED[0]) == pytest.approx(want, rel=0.15)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_model_of_noise_still_has_a_next_build(seed: int) -> None:
    """On a busy machine few builds may be predicted to take less than nothing."""
    law = LatencyLaw.random(GROUPED, seed)
    table = simulated_table(GROUPED, law, design=4, noise=0.4, node_noise=1.0, seed=seed)
    found = propose(table, {u.name: OFFERED for u in GROUPED.units}, GRID, np.random.default_rng(seed), 3)
    assert len(found.candidates) == 3
    assert np.isfinite(found.error)

"""Which widths a profile learns, on a device whose time goes in steps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from profiling import narrow_law, narrow_setup, run_widths

from hwsearch.allocate.search import search
from hwsearch.errors import Infeasible
from hwsearch.latency.model import fit
from hwsearch.latency.staircase import staircase, unbuilt
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.variants import Variant, uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import SimulatedBackend, sizes_of

pytestmark = pytest.mark.usefixtures("own_locks")


def test_the_grid_holds_the_edges_of_the_steps(widths_table: tuple[Path, LatencyTable]) -> None:
    """20 channels take as long as 24 would: 16 and 8 are the next steps down, 12 costs what 16 does, and 4 what 8 does."""
    _, table = widths_table
    assert table.network.channels == {"stem": 24, "conv1": 20, "conv3": 16}
    grid = table.grid()
    assert {g: (steps[0], steps[-1]) for g, steps in grid.items() if g != "conv3"} == {"stem": (24, 8), "conv1": (20, 8)}
    assert grid["conv3"][0] == 16
    assert 8 in grid["conv3"]
    assert 16 in grid["stem"]
    assert 16 in grid["conv1"]
    assert {s.width for s in staircase(table) if s.group == "conv1"} == {20, 16, 12, 8}
    assert unbuilt(table) == {}


def test_a_backend_without_int8_has_widths_to_choose() -> None:
    table = run_widths(narrow_setup(int8=False), None)
    assert len(table.grid()["stem"]) >= 3
    assert {b.variants for b in table.builds} == {("dense.fp32",) * 5}


def test_the_time_limit_ends_a_profile_over_widths() -> None:
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_setup(backend), None, time_limit_s=20.0)
    assert backend.clock() < 30e9
    assert fit(table).predict(uniform(table.network, "int8")).time_ns > 0


def test_every_group_has_its_narrowest_width_however_early_the_time_limit_ends() -> None:
    """Else "the least that can be met" would be that of a table without widths."""
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_setup(backend), None, time_limit_s=0.1)
    assert {g: steps[0] for g, steps in table.grid().items()} == table.network.channels
    assert {g: steps[-1] for g, steps in table.grid().items()} == {"stem": 8, "conv1": 8, "conv3": 4}
    assert table.header.cut_short
    zero = SensitivityTable(
        table.network,
        {u: dict.fromkeys((*vs, "dense.fp32"), 0.0) for u, vs in table.offered().items()},
        1,
        "kl",
        False,
        width_loss={g: dict.fromkeys(steps, 0.0) for g, steps in table.grid().items()},
        order={g: tuple(range(n)) for g, n in table.network.channels.items()},
    )
    with pytest.raises(Infeasible, match=r"least known so far, as .* ended at its time limit: ") as of_time:
        search(table, zero, ["latency=1ns"])
    assert "3 of 3 channel groups have widths that none of them holds" in str(of_time.value)
    assert "`hwsearch profile TASK -o TABLE --backend simulated --threads 1 --base fp32" in str(of_time.value)
    ends = {w for steps in table.grid().values() for w in (steps[0], steps[-1])}
    few = {g: {w: loss for w, loss in own.items() if w in ends} for g, own in zero.width_loss.items()}
    with pytest.raises(Infeasible) as of_size:
        search(table, replace(zero, width_loss=few), ["size=1B"])
    assert "time limit" not in str(of_size.value), "sizes are known without a profile"
    assert re.search(r"the sensitivities lack \d+ of \d+ widths: `hwsearch sensitivity", str(of_size.value))


def test_the_least_is_known_of_however_short_a_profile() -> None:
    """Every unit in every variant where all groups are at their narrowest, which nothing else tells as surely."""
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_setup(backend), None, time_limit_s=0.1)
    widths = {g: steps[-1] for g, steps in table.grid().items()}
    model = fit(table)
    for unit in table.network.units:
        for variant in ("fp32", "int8"):
            assert model.knows(unit.name, Variant(variant), widths)


def test_every_width_is_offered_however_early_the_time_limit_ends() -> None:
    """What no build holds is told by the whole and the narrowest width, with an error that says so."""
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_setup(backend), None, time_limit_s=0.1)
    assert table.header.cut_short
    assert {g: len(steps) for g, steps in table.grid().items()} == {"stem": 5, "conv1": 4, "conv3": 4}
    model, exact, network = fit(table), narrow_law(), table.network
    middle = {g: steps[len(steps) // 2] for g, steps in table.grid().items()}
    for precision in ("fp32", "int8"):
        found = model.predict(uniform(network, precision), middle)
        want = exact.time_ns(dict.fromkeys(exact.units, precision), sizes_of(network, middle))
        assert abs(found.time_ns - want) < 3 * found.sigma_ns
        assert found.sigma_ns > 1.5 * model.predict(uniform(network, precision)).sigma_ns


def test_a_profile_that_the_time_limit_ended_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    first = run_widths(
        narrow_setup(SimulatedBackend(narrow_law(), noise=0.0005, build_ns=1_000_000_000)),
        out,
        time_limit_s=12.0,
    )
    assert first.header.cut_short
    whole = run_widths(narrow_setup(noise=0.0005), out)
    assert [b.key for b in whole.builds][: len(first.builds)] == [b.key for b in first.builds]
    assert len(whole.builds) > len(first.builds)
    assert not whole.header.cut_short
    assert unbuilt(whole) == {}

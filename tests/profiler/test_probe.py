"""Which widths are worth knowing, on a device whose time goes in steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from profiling import narrow_law, narrow_setup, run_widths

from hwsearch.allocate.search import search
from hwsearch.errors import Infeasible
from hwsearch.latency.model import fit
from hwsearch.latency.staircase import staircase, unprobed
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.variants import Variant, uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


def test_the_grid_holds_the_edges_of_the_steps(widths_table: tuple[Path, LatencyTable]) -> None:
    """20 channels take as long as 24 would: 16 and 8 are the next steps down, 12 costs what 16 does."""
    _, table = widths_table
    assert table.network.channels == {"stem": 24, "conv1": 20, "conv3": 16}
    assert table.grid() == {"stem": [24, 16, 8], "conv1": [20, 16, 8], "conv3": [16, 8]}
    assert [b.role for b in table.builds].count("probe") == 2 * (4 + 3 + 3) - 2 * 3
    assert {s.width for s in staircase(table) if s.group == "conv1"} == {20, 16, 12, 8}


def test_a_backend_without_int8_has_widths_to_choose() -> None:
    table = run_widths(narrow_setup(int8=False), None)
    assert len(table.grid()["stem"]) == 3
    assert {b.variants for b in table.builds} == {("dense.fp32",) * 5}


def test_the_time_limit_ends_the_search_for_a_grid() -> None:
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
    assert "3 of 3 channel groups were timed at their whole and narrowest width only" in str(of_time.value)
    assert "`hwsearch profile TASK -o TABLE --backend simulated --threads 1 --base fp32" in str(of_time.value)
    with pytest.raises(Infeasible) as of_size:
        search(table, zero, ["size=1B"])
    assert "time limit" not in str(of_size.value), "sizes are known without a profile"
    assert re.search(r"the sensitivities lack \d+ of \d+ widths: `hwsearch sensitivity", str(of_size.value))


def test_the_least_is_known_of_however_short_a_profile() -> None:
    """Every unit in every variant where all groups are at their narrowest, which no probe of one class of groups tells."""
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_setup(backend), None, time_limit_s=0.1)
    widths = {g: steps[-1] for g, steps in table.grid().items()}
    model = fit(table)
    for unit in table.network.units:
        for variant in ("fp32", "int8"):
            assert model.knows(unit.name, Variant(variant), widths)


def test_a_design_that_is_content_leaves_its_time_to_the_widths_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.profiler.sequential.GOAL", 0.2)  # content early
    monkeypatch.setattr("hwsearch.profiler.sequential.DOUBT", 1.0)

    def left(later: float) -> int:
        monkeypatch.setattr("hwsearch.profiler.profile.LATER_SHARE", later)
        backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
        return sum(map(len, unprobed(run_widths(narrow_setup(backend), None, time_limit_s=50.0)).values()))

    assert left(0.0) > left(0.75)


def test_a_search_for_a_grid_that_the_time_limit_ended_is_completed(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    first = run_widths(
        narrow_setup(SimulatedBackend(narrow_law(), noise=0.0005, build_ns=1_000_000_000)),
        out,
        time_limit_s=38.0,
    )
    probed = [b.key for b in first.builds if b.role == "probe"]
    assert 3 <= len(probed) < 14
    assert all(len(steps) > 1 for steps in first.grid().values()), "every group has a step before any has all"
    whole = run_widths(narrow_setup(noise=0.0005), out)
    assert [b.key for b in whole.builds if b.role == "probe"][: len(probed)] == probed
    assert whole.grid() == {"stem": [24, 16, 8], "conv1": [20, 16, 8], "conv3": [16, 8]}

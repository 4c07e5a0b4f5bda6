"""How many builds a profile makes, which, and what ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from profiling import DESIGN, law, lowering, run, set_up

from hwsearch.cli.overview import summary
from hwsearch.latency.model import fit, validate
from hwsearch.network.choices import all_cells
from hwsearch.network.variants import Variant
from hwsearch.profiler.sequential import FALL, GOAL, LEAST_GAIN, enough_builds
from hwsearch.table.table import LatencyTable
from hwsearch.testing import SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


def test_a_backend_without_int8_has_nothing_to_choose(tmp_path: Path) -> None:
    table = run(set_up(int8=False), tmp_path / "t.parquet")
    assert [b.role for b in table.builds] == ["reference", "dense"]
    assert set(table.offered().values()) == {("dense.fp32",)}


def test_the_time_limit_ends_the_design_and_keeps_the_anchors(tmp_path: Path) -> None:
    backend = SimulatedBackend(law(), build_ns=1_000_000_000)
    table = run(set_up(backend), tmp_path / "t.parquet", time_limit_s=5.5)
    assert 3 <= len(table.builds) < 3 + DESIGN
    more = run(set_up(backend), tmp_path / "t.parquet", time_limit_s=100.0)
    assert len(more.builds) == 3 + DESIGN


def test_a_network_with_fewer_allocations_than_builds_ends() -> None:
    network = lowering().network
    table = run(set_up(refused=tuple(u.name for u in network.units[1:])), None)
    assert len(table.builds) == 4 + DESIGN
    assert table.builds[3].role == "uniform", "int8 once more, where alone it executes"
    assert {b.role for b in table.builds[4:]} == {"design"}


def test_the_design_over_widths_knows_all_cells_and_says_why_it_ended(
    widths_table: tuple[Path, LatencyTable],
) -> None:
    _, table = widths_table
    offered = {u: [Variant.parse(v) for v in own] for u, own in table.offered().items()}
    model = fit(table)
    cells = all_cells(table.network, offered, table.grid())
    built = {f[1:] for f in model.index if f[0] == "unit"}
    told = {f[1:] for f in model.unbuilt}
    assert cells <= built | told
    assert not built & told
    assert cells & told, "most are told by few builds"
    heldout = [b for b in table.builds if b.kept_out]
    assert len(heldout) >= 4
    assert not {b.key for b in heldout} & {b.key for b in table.builds if not b.kept_out}
    assert validate(fit(table), heldout).median_error < 0.03
    said = table.header.design
    assert said["stopped"] == f"another build would lower the error of likely allocations, {said['error']:.1%}, by less than 0.03%"
    assert said["builds"] == sum(b.role == "design" or b.kept_out for b in table.builds)
    assert 0.01 < said["error"] < 0.03
    assert f"ended by: {said['stopped']}" in summary(table)


@pytest.mark.parametrize("error", [0.3, 0.05, 0.02, 0.012])
def test_a_design_needs_as_many_builds_as_tell_enough(error: float) -> None:
    """By counting on, build by build, as the error falls."""
    builds = 20
    needed = enough_builds(error, builds)
    n = builds
    while (now := error * (builds / n) ** FALL) > GOAL and FALL * now / n > LEAST_GAIN:
        n += 1
    assert n - 1 <= needed <= n or needed <= builds == n

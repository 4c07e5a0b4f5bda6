from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from hwsearch import device as devices
from hwsearch.backends.base import BuildOptions
from hwsearch.design import all_cells
from hwsearch.errors import BackendUnavailable, DeviceBusy, IncompatibleTables, InvalidInput
from hwsearch.latency import fit, validate
from hwsearch.lower import Lowering
from hwsearch.measure import Protocol
from hwsearch.overview import summary
from hwsearch.profiler import profile
from hwsearch.regime import Regime
from hwsearch.staircase import staircase
from hwsearch.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of
from hwsearch.testing.contract import small_network
from hwsearch.variants import Variant, uniform

pytestmark = pytest.mark.usefixtures("own_locks")
FAST = Protocol(width=0.05, block_ns=1, warmup_ns=1, limit_s=0.5)
DESIGN = 6


@cache
def lowering() -> Lowering:
    return small_network("residual")


def law() -> LatencyLaw:
    return LatencyLaw.random(lowering().network)


def regime(backend: SimulatedBackend | None = None, **options: Any) -> Regime:
    return Regime(lowering(), backend or SimulatedBackend(law(), **options), BuildOptions(1, "fp32"))


def run(at: Regime, out: Path | None, **options: Any) -> LatencyTable:
    return profile(at, out, **{"builds": DESIGN, "protocol": FAST, "axes": ["precision"], **options})


def test_every_build_is_measured_and_on_disk(tmp_path: Path) -> None:
    table = run(regime(noise=0.01), tmp_path / "t.parquet")
    assert [b.role for b in table.builds[:3]] == ["reference", "dense", "uniform"]
    assert len(table.builds) == 3 + DESIGN
    assert sum(b.role == "heldout" for b in table.builds) == 1
    loaded = LatencyTable.load(tmp_path / "t.parquet")
    assert loaded.header == table.header
    assert [b.key for b in loaded.builds] == [b.key for b in table.builds]
    for build in table.builds:
        precisions = {
            u.name: Variant.parse(v).precision
            for u, v in zip(table.network.units, build.variants, strict=True)
        }
        assert table.time_ns(build) == pytest.approx(law().time_ns(precisions), rel=0.05)
        assert build.executed == tuple(precisions.values())
        assert build.as_asked()
        assert len(build.samples_ns)
    assert table.header.graph_bytes > 0
    assert table.header.dense_file_bytes > 0


def test_the_end_to_end_ratio_survives_drift() -> None:
    table = run(regime(drift=lambda s: 1.0 + 0.4 * np.sin(20 * s)), None)
    dense, uniform_build = table.find("dense"), table.find("uniform")
    exact = law()
    int8 = exact.time_ns(dict.fromkeys(exact.units, "int8")) / exact.time_ns(
        dict.fromkeys(exact.units, "fp32")
    )
    assert uniform_build.ratio / dense.ratio == pytest.approx(int8, rel=0.02)


@pytest.mark.parametrize("number", [0, 1, 2, 4, 7])
def test_a_profile_that_dies_loses_at_most_one_build_and_resumes(tmp_path: Path, number: int) -> None:
    out = tmp_path / "t.parquet"
    backend = SimulatedBackend(law(), noise=0.01, failing=(number,))
    with pytest.raises(BackendUnavailable):
        run(regime(backend), out)
    # The reference engine is built first, and belongs to no row.
    kept = LatencyTable.load(out).builds if out.exists() else ()
    assert len(kept) == max(0, number - 1)
    table = run(regime(backend), out)
    assert len(table.builds) == 3 + DESIGN
    for old, new in zip(kept, table.builds, strict=False):
        assert old.key == new.key
        assert np.array_equal(old.samples_ns, new.samples_ns)
    assert fit(table).predict(uniform(table.network, "int8")).time_ns > 0
    built = backend.builds
    assert len(run(regime(backend), out).builds) == 3 + DESIGN
    assert backend.builds == built, "a finished profile was measured again"


_KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_profiler as t

class Dies(t.SimulatedBackend):
    def build(self, onnx, options):
        if self.builds == 5:
            os.kill(os.getpid(), 9)
        return super().build(onnx, options)

t.run(t.regime(Dies(t.law(), noise=0.01)), Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_profile_loses_at_most_one_build(tmp_path: Path) -> None:
    out, here = tmp_path / "t.parquet", Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(here)], env=environment, check=False)
    assert done.returncode == -9
    assert len(LatencyTable.load(out).builds) == 4
    assert len(run(regime(noise=0.01), out).builds) == 3 + DESIGN  # and the dead process's lock is free


def test_one_profile_at_a_time(tmp_path: Path) -> None:
    with devices.lock(devices.fingerprint().id), pytest.raises(DeviceBusy, match=str(os.getpid())):
        run(regime(), tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()
    run(regime(), tmp_path / "t.parquet", builds=1)


def test_a_unit_that_does_not_run_as_asked_is_recorded_and_never_offered(tmp_path: Path) -> None:
    table = run(regime(refused=("conv1",)), tmp_path / "t.parquet")
    assert table.header.unsupported == {"conv1": {"dense.int8": "executed in fp32"}}
    assert table.offered()["conv1"] == ("dense.fp32",)
    assert table.offered()["conv2"] == ("dense.fp32", "dense.int8")
    position = [u.name for u in table.network.units].index("conv1")
    assert {b.variants[position] for b in table.builds if b.role in ("design", "heldout")} == {"dense.fp32"}
    assert not table.find("uniform").as_asked()


def test_a_backend_without_int8_has_nothing_to_choose(tmp_path: Path) -> None:
    table = run(regime(int8=False), tmp_path / "t.parquet")
    assert [b.role for b in table.builds] == ["reference", "dense"]
    assert set(table.offered().values()) == {("dense.fp32",)}


def test_the_time_limit_ends_the_design_and_keeps_the_anchors(tmp_path: Path) -> None:
    backend = SimulatedBackend(law(), build_ns=1_000_000_000)
    table = run(regime(backend), tmp_path / "t.parquet", time_limit_s=5.5)
    assert 3 <= len(table.builds) < 3 + DESIGN
    more = run(regime(backend), tmp_path / "t.parquet", time_limit_s=100.0)
    assert len(more.builds) == 3 + DESIGN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_limit_s": 0}, "time limit"),
        ({"mode": "guess"}, "unknown mode"),
        ({"mode": "isolated"}, "is `alone` now"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(regime(), None, **options)


def _header(**changes: Any) -> Callable[[LatencyTable], LatencyTable]:
    return lambda table: table.with_header(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.with_header(device={**t.header.device, "id": "0", "chip": "Other"}), "another device"),
        (lambda t: t.with_header(network=replace(t.network, edges=())), "another network"),
        (
            lambda t: LatencyTable(replace(t.header, network=tiny.lowering("cnn").network)),
            "another network",
        ),
        (_header(backend="openvino"), "another backend"),
        (_header(versions={"simulated": "2"}), "another runtime"),
        (_header(mode="alone"), "mode alone"),
    ],
)
def test_a_table_of_something_else_is_refused_and_kept(
    tmp_path: Path, change: Callable[[LatencyTable], LatencyTable], message: str
) -> None:
    out = tmp_path / "t.parquet"
    change(run(regime(), None, builds=1)).save(out)
    before = out.read_bytes()
    with pytest.raises(IncompatibleTables, match=message):
        run(regime(), out)
    assert out.read_bytes() == before


def test_a_network_with_fewer_allocations_than_builds_ends() -> None:
    network = lowering().network
    table = run(regime(refused=tuple(u.name for u in network.units[1:])), None)
    assert len(table.builds) == 3 + DESIGN
    assert {b.role for b in table.builds[3:]} == {"design"}


# ---------------------------------------------------------------- widths


def narrow_law() -> LatencyLaw:
    return LatencyLaw.random(tiny.lowering("cnn").network, 2)


def narrow_regime(backend: SimulatedBackend | None = None, **options: Any) -> Regime:
    return Regime(tiny.lowering("cnn"), backend or SimulatedBackend(narrow_law(), **options), BuildOptions())


def run_widths(at: Regime, out: Path | None, **options: Any) -> LatencyTable:
    return profile(at, out, **{"protocol": FAST, **options})


@pytest.fixture(scope="module")
def widths_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LatencyTable]:
    out = tmp_path_factory.mktemp("widths") / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return out, run_widths(narrow_regime(noise=0.002), out)


def test_a_profile_over_widths_times_what_is_really_narrower(widths_table: tuple[Path, LatencyTable]) -> None:
    """The simulated device takes its time from the shapes of the weights in the ONNX file that it is given."""
    out, table = widths_table
    exact = narrow_law()
    for build in table.builds:
        candidate = table.candidate(build)
        precisions = {u: v.precision for u, v in candidate.variants.items()}
        law_ns = exact.time_ns(precisions, sizes_of(table.network, candidate.widths))
        assert table.time_ns(build) == pytest.approx(law_ns, rel=0.02)
        assert build.as_asked()
        assert not build.wrong
    assert len({b.widths for b in table.builds}) > 10
    assert [b.key for b in LatencyTable.load(out).builds] == [b.key for b in table.builds]


def test_the_grid_holds_the_edges_of_the_steps(widths_table: tuple[Path, LatencyTable]) -> None:
    """20 channels take as long as 24 would: 16 and 8 are the next steps down, 12 costs what 16 does."""
    _, table = widths_table
    assert table.network.channels == {"stem": 24, "conv1": 20, "conv3": 16}
    assert table.grid() == {"stem": [24, 16, 8], "conv1": [20, 16, 8], "conv3": [16, 8]}
    assert [b.role for b in table.builds].count("probe") == 2 * (4 + 3 + 3) - 2 * 3
    assert {s.width for s in staircase(table) if s.group == "conv1"} == {20, 16, 12, 8}


def test_the_design_over_widths_knows_most_cells_and_says_why_it_ended(
    widths_table: tuple[Path, LatencyTable],
) -> None:
    _, table = widths_table
    offered = {u: [Variant.parse(v) for v in own] for u, own in table.offered().items()}
    built = [table.candidate(b).cells(table.network) for b in table.builds if b.role != "heldout"]
    cells = all_cells(table.network, offered, table.grid())
    assert len(cells & set().union(*built)) > 0.9 * len(cells)
    heldout = [b for b in table.builds if b.role == "heldout"]
    assert len(heldout) >= 4
    assert not {b.key for b in heldout} & {b.key for b in table.builds if b.role != "heldout"}
    assert validate(fit(table), heldout).median_error < 0.03
    said = table.header.design
    assert said["stopped"].startswith("likely allocations are known to")
    assert said["builds"] == sum(b.role in ("design", "heldout") for b in table.builds)
    assert 0 < said["error"] <= 0.01
    assert f"ended by: {said['stopped']}" in summary(table)


def test_held_out_builds_are_spread_over_the_profile(widths_table: tuple[Path, LatencyTable]) -> None:
    """They show what the fit gets wrong, and not how the machine changed since."""
    _, table = widths_table
    later = [b.role for b in table.builds if b.role in ("design", "heldout")]
    assert "heldout" in later[: len(later) // 2]
    assert "design" in later[later.index("heldout") :]


@pytest.mark.parametrize("number", [6, 26])
def test_a_profile_over_widths_that_dies_resumes(tmp_path: Path, number: int) -> None:
    """While it looks for the grid, and after."""
    out = tmp_path / "t.parquet"
    backend = SimulatedBackend(narrow_law(), noise=0.002, failing=(number,))
    with pytest.raises(BackendUnavailable):
        run_widths(narrow_regime(backend), out)
    kept = LatencyTable.load(out)
    assert len(kept.builds) == number - 1
    table = run_widths(narrow_regime(backend), out)
    for old, new in zip(kept.builds, table.builds, strict=False):
        assert old.key == new.key
        assert np.array_equal(old.samples_ns, new.samples_ns)
    assert table.grid() == {"stem": [24, 16, 8], "conv1": [20, 16, 8], "conv3": [16, 8]}
    built = backend.builds
    assert len(run_widths(narrow_regime(backend), out).builds) == len(table.builds)
    assert backend.builds <= built + 1, "a finished profile was measured again"


def test_a_table_of_precisions_gains_widths(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    plain = run_widths(narrow_regime(), out, axes=["precision"], builds=3)
    assert {b.widths for b in plain.builds} == {(24, 20, 16)}
    assert plain.grid() == {"stem": [24], "conv1": [20], "conv3": [16]}
    table = run_widths(narrow_regime(), out)
    assert [b.key for b in table.builds[: len(plain.builds)]] == [b.key for b in plain.builds]
    assert len(table.grid()["stem"]) == 3


def test_a_backend_without_int8_has_widths_to_choose() -> None:
    table = run_widths(narrow_regime(int8=False), None)
    assert len(table.grid()["stem"]) == 3
    assert {b.variants for b in table.builds} == {("dense.fp32",) * 5}


def test_the_time_limit_ends_the_search_for_a_grid() -> None:
    backend = SimulatedBackend(narrow_law(), build_ns=1_000_000_000)
    table = run_widths(narrow_regime(backend), None, time_limit_s=20.0)
    assert backend.clock() < 30e9
    assert fit(table).predict(uniform(table.network, "int8")).time_ns > 0


def test_a_search_for_a_grid_that_the_time_limit_ended_is_completed(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    first = run_widths(
        narrow_regime(SimulatedBackend(narrow_law(), noise=0.002, build_ns=1_000_000_000)),
        out,
        time_limit_s=30.0,
    )
    probed = [b.key for b in first.builds if b.role == "probe"]
    assert 3 <= len(probed) < 14
    assert all(len(steps) > 1 for steps in first.grid().values()), "every group has a step before any has all"
    whole = run_widths(narrow_regime(noise=0.002), out)
    assert [b.key for b in whole.builds if b.role == "probe"][: len(probed)] == probed
    assert whole.grid() == {"stem": [24, 16, 8], "conv1": [20, 16, 8], "conv3": [16, 8]}


def test_unknown_axes() -> None:
    with pytest.raises(InvalidInput, match="unknown axes depth"):
        run(regime(), None, axes=["depth"])

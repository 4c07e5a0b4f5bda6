"""A profile from its beginning to its end: on disk, resumed, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from profiling import DESIGN, law, narrow_law, narrow_setup, run, run_widths, set_up

import hwsearch as hs
from hwsearch.device import fingerprint as devices
from hwsearch.device.spent import Spent
from hwsearch.engine.reference import INSTANCES
from hwsearch.errors import BackendUnavailable, DeviceBusy, IncompatibleTables, InvalidInput
from hwsearch.latency.model import fit
from hwsearch.network.variants import Variant, uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


def test_every_build_is_measured_and_on_disk(tmp_path: Path) -> None:
    table = run(set_up(noise=0.01), tmp_path / "t.parquet")
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


@pytest.mark.parametrize("number", [0, 1, 2, 4, 7])
def test_a_profile_that_dies_loses_at_most_one_build_and_resumes(tmp_path: Path, number: int) -> None:
    out = tmp_path / "t.parquet"
    backend = SimulatedBackend(law(), noise=0.01, failing=(number,))
    with pytest.raises(BackendUnavailable):
        run(set_up(backend), out)
    # The reference engines are built first, and belong to no row.
    kept = LatencyTable.load(out).builds if out.exists() else ()
    assert len(kept) == max(0, number - INSTANCES)
    table = run(set_up(backend), out)
    assert len(table.builds) == 3 + DESIGN
    for old, new in zip(kept, table.builds, strict=False):
        assert old.key == new.key
        assert np.array_equal(old.samples_ns, new.samples_ns)
    assert fit(table).predict(uniform(table.network, "int8")).time_ns > 0
    built = backend.builds
    assert len(run(set_up(backend), out).builds) == 3 + DESIGN
    assert backend.builds == built, "a finished profile was measured again"


_KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import profiling as t

class Dies(t.SimulatedBackend):
    def build(self, onnx, options):
        if self.builds == 7:
            os.kill(os.getpid(), 9)
        return super().build(onnx, options)

t.run(t.set_up(Dies(t.law(), noise=0.01)), Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_profile_loses_at_most_one_build(tmp_path: Path) -> None:
    out, here = tmp_path / "t.parquet", Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(here)], env=environment, check=False)
    assert done.returncode == -9
    assert len(LatencyTable.load(out).builds) == 4
    assert len(run(set_up(noise=0.01), out).builds) == 3 + DESIGN  # and the dead process's lock is free


def test_one_profile_at_a_time(tmp_path: Path, busy: Any) -> None:
    with busy(devices.fingerprint().id), pytest.raises(DeviceBusy, match=str(os.getpid())):
        run(set_up(), tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()
    run(set_up(), tmp_path / "t.parquet", builds=1)


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
        run(set_up(), None, **options)


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
    change(run(set_up(), None, builds=1)).save(out)
    before = out.read_bytes()
    with pytest.raises(IncompatibleTables, match=message):
        run(set_up(), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("number", [6, 26])
def test_a_profile_over_widths_that_dies_resumes(tmp_path: Path, number: int) -> None:
    """While its first builds are made, and later."""
    out = tmp_path / "t.parquet"
    backend = SimulatedBackend(narrow_law(), noise=0.0005, failing=(number,))
    with pytest.raises(BackendUnavailable):
        run_widths(narrow_setup(backend), out)
    kept = LatencyTable.load(out)
    assert len(kept.builds) == number - INSTANCES
    table = run_widths(narrow_setup(backend), out)
    for old, new in zip(kept.builds, table.builds, strict=False):
        assert old.key == new.key
        assert np.array_equal(old.samples_ns, new.samples_ns)
    assert all(len(steps) > 1 for steps in table.grid().values())
    built = backend.builds
    assert len(run_widths(narrow_setup(backend), out).builds) == len(table.builds)
    assert backend.builds <= built + 1, "a finished profile was measured again"


def test_a_table_of_precisions_gains_widths(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    plain = run_widths(narrow_setup(), out, axes=["precision"], builds=3)
    assert {b.widths for b in plain.builds} == {(24, 20, 16)}
    assert plain.grid() == {"stem": [24], "conv1": [20], "conv3": [16]}
    table = run_widths(narrow_setup(), out)
    assert [b.key for b in table.builds[: len(plain.builds)]] == [b.key for b in plain.builds]
    assert len(table.grid()["stem"]) >= 3


def test_unknown_axes() -> None:
    with pytest.raises(InvalidInput, match="unknown axes depth"):
        run(set_up(), None, axes=["depth"])


def test_where_the_time_went_is_kept_and_goes_on(tmp_path: Path) -> None:
    """Of a simulated device, whose clock alone counts; what a resumed profile takes is added."""
    out = tmp_path / "t.parquet"

    def spent(builds: int) -> dict[str, float]:
        backend = SimulatedBackend(law(), noise=0.003, build_ns=1_000_000_000)
        run(replace(set_up(backend), spent=Spent(backend.clock)), out, builds=builds)
        return LatencyTable.load(out).header.spent

    first = spent(4)
    assert {"compiling", "timing", "warming up", "choosing the reference", "other"} <= set(first)
    assert first["timing"] > 0
    assert first["compiling"] >= 4
    assert spent(8)["compiling"] >= first["compiling"] + 4


def test_a_trace_is_left_of_one_call_whatever_ends_it(tmp_path: Path) -> None:
    trace, backend = tmp_path / "time.json", SimulatedBackend(narrow_law(), noise=0.003, build_ns=1_000_000_000)
    hs.profile(tiny.task("cnn"), backend=backend, axes=["precision"], builds=4, trace=trace)
    told = json.loads(trace.read_bytes())
    assert told["kind"] == "trace"
    assert told["total_s"] == pytest.approx(sum(told["seconds"].values()))
    assert told["seconds"]["compiling"] >= 4
    trace.unlink()
    with pytest.raises(InvalidInput, match="unknown mode"):
        hs.profile(tiny.task("cnn"), backend=backend, mode="guess", trace=trace)
    assert trace.exists()

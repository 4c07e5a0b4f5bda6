"""A backend on a GPU: tables are of the GPU and know the state it was in; its clocks are locked while something is measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from simulated_nvml import NO_PERMISSION, NOT_SUPPORTED, Nvml

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.cli.overview import summary
from hwsearch.device.energy import tick_s
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, DeviceBusy, IncompatibleTables, InvalidInput
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


class OnGpu(SimulatedBackend):
    gpu = True


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    simulated = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", simulated)
    return simulated


def backend(kind: type[SimulatedBackend] = OnGpu, **options: Any) -> SimulatedBackend:
    return kind(LatencyLaw.random(tiny.lowering("cnn").network), noise=0.003, **options)


def profile(out: Path | None = None, on: SimulatedBackend | None = None, **options: Any) -> LatencyTable:
    return hs.profile(
        tiny.task("cnn"), backend=on or backend(), out=out, axes=["precision"], builds=3, **options
    )


def test_a_gpu_s_energy_is_counted_where_it_was_asked_for(nvml: Nvml) -> None:
    """It takes seconds of each engine; a CPU's counter is read in passing."""
    setup = Setup(tiny.lowering("cnn"), backend(), BuildOptions(1, "fp32"))
    assert setup.meter is None
    meter = replace(setup, energy=True).meter
    assert meter is not None
    assert tick_s(meter) == 0.1
    assert meter() == nvml.millijoules / 1e3
    assert all(b.energy_j is None for b in profile().builds)


def test_a_table_is_of_the_gpu_and_holds_its_state_around_each_build(nvml: Nvml, tmp_path: Path) -> None:
    nvml.throttle = 0x5
    table = profile(tmp_path / "t.parquet")
    assert (table.header.device["chip"], table.header.device["kind"]) == ("NVIDIA Test 0", "gpu")
    assert table.header.device["host"]
    loaded = LatencyTable.load(tmp_path / "t.parquet")
    assert [b.states for b in loaded.builds] == [b.states for b in table.builds]
    for build in loaded.builds:
        assert len(build.states) == 2
        assert build.states[0].throttle == ("idle", "power cap")
    said = f"gpu        1980 to 1980 MHz, 123 to 123 W, 61 to 61 °C, {len(table.builds)} builds slowed by power cap"
    assert said in summary(loaded)
    assert "NVIDIA Test 0" in summary(loaded)
    assert "clocks" not in table.header.options
    assert "nvmlDeviceSetGpuLockedClocks" not in dict(nvml.calls)


def test_what_the_gpu_does_not_tell_is_not_in_the_table(nvml: Nvml, tmp_path: Path) -> None:
    nvml.fails |= dict.fromkeys(
        ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"), NOT_SUPPORTED
    )
    profile(tmp_path / "t.parquet")
    loaded = LatencyTable.load(tmp_path / "t.parquet")
    assert all(s.power_w is None and s.throttle is None for b in loaded.builds for s in b.states)
    assert "1980 to 1980 MHz, 61 to 61 °C, what slows it down is not told" in summary(loaded)


def test_on_a_cpu_nothing_is_looked_at(nvml: Nvml) -> None:
    table = profile(on=backend(SimulatedBackend))
    assert all(b.states == () for b in table.builds)
    assert "gpu  " not in summary(table)
    assert nvml.calls == []


def test_without_nvml_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailable, match="nvidia-ml-py"):
        profile()


@pytest.mark.slow
def test_tables_of_a_cpu_or_of_another_driver_are_others(nvml: Nvml, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    table = profile(out)
    with pytest.raises(IncompatibleTables, match="another device"):
        profile(out, backend(SimulatedBackend))
    nvml.answers["nvmlSystemGetDriverVersion"] = lambda: "580.1"
    with pytest.raises(IncompatibleTables, match="another device"):
        hs.recheck(table, tiny.task("cnn"), backend=backend())
    nvml.answers["nvmlSystemGetDriverVersion"] = lambda: "570.12"
    nvml.answers["nvmlDeviceGetUUID"] = lambda h: "GPU-another-card"
    assert hs.recheck(table, tiny.task("cnn"), backend=backend()).holds


def test_locked_clocks_are_a_regime_of_their_own(nvml: Nvml, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    free = profile(out)
    held = profile(out, lock_clocks=True)
    assert nvml.locked is None
    assert held.header.options == {**free.header.options, "clocks": 1410}
    assert {s.sm_mhz for b in held.builds for s in b.states} == {1410}
    assert {s.sm_mhz for b in free.builds for s in b.states} == {1980}
    assert len(LatencyTable.sections(out)) == 2
    assert LatencyTable.load(out, clocks=1410).header.options["clocks"] == 1410
    assert "clocks" not in LatencyTable.load(out, clocks=0).header.options
    assert hs.recheck(held, tiny.task("cnn"), backend=backend(), lock_clocks=True).holds
    assert nvml.locked is None
    with pytest.raises(IncompatibleTables, match="another clocks: table=1410, current=None"):
        hs.recheck(held, tiny.task("cnn"), backend=backend())


@pytest.mark.slow
def test_a_share_of_the_gpu_is_a_regime_of_its_own(
    nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, name = tmp_path / "t.parquet", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    free = profile(out)
    monkeypatch.setenv(name, "40")
    shared = profile(out)
    assert shared.header.options == {**free.header.options, "mps": 40.0}
    assert LatencyTable.load(out, mps=40).header.options["mps"] == 40.0
    assert "mps" not in LatencyTable.load(out, mps=0).header.options
    assert hs.recheck(shared, tiny.task("cnn"), backend=backend()).holds
    with pytest.raises(IncompatibleTables, match=r"another mps: table=None, current=40\.0"):
        hs.recheck(free, tiny.task("cnn"), backend=backend())
    on_cpu = hs.profile(tiny.task("cnn"), backend=backend(SimulatedBackend), axes=["precision"], builds=3)
    assert "mps" not in on_cpu.header.options
    for wrong in ("half", "0", "101", "nan"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(InvalidInput, match="MPS_ACTIVE_THREAD_PERCENTAGE"):
            profile(out)


@pytest.mark.parametrize("number", [0, 3])
def test_clocks_are_let_go_where_a_profile_fails(nvml: Nvml, number: int) -> None:
    seen: list[int | None] = []

    class Failing(OnGpu):
        def build(self, *args: Any) -> Any:
            seen.append(nvml.locked)
            return super().build(*args)

    with pytest.raises(BackendUnavailable, match="fails on build"):
        profile(on=backend(Failing, failing=(number,)), lock_clocks=True)
    assert seen == [1410] * (number + 1)
    assert nvml.locked is None


def test_clocks_that_may_not_be_locked_stop_a_profile_before_its_first_build(nvml: Nvml) -> None:
    nvml.fails["nvmlDeviceSetGpuLockedClocks"] = NO_PERMISSION
    on = backend()
    with pytest.raises(BackendUnavailable, match="takes root"):
        profile(on=on, lock_clocks=True)
    assert on.builds == 0
    with pytest.raises(InvalidInput, match="simulated runs on the CPU"):
        profile(on=backend(SimulatedBackend), lock_clocks=True)


@pytest.mark.slow
def test_verify_locks_clocks_and_keeps_others_off_the_gpu(nvml: Nvml, busy: Any) -> None:
    task = tiny.task("cnn")
    table = profile(lock_clocks=True)
    scores = hs.sensitivity(task, backend=backend(), axes=["precision"])
    found = hs.search(table, scores, ["size=60%"], axes=["precision"])
    assert found.options["clocks"] == 1410
    nvml.answers["nvmlDeviceGetDefaultApplicationsClock"] = lambda h, clock: 900
    report = hs.verify(task, found, backend=backend(), table=table, lock_clocks=True)
    assert report.options["clocks"] == 1410, "the clock of the table, not the one that would be taken now"
    assert report.device["chip"] == "NVIDIA Test 0"
    assert nvml.locked is None
    free = replace(found, options={k: v for k, v in found.options.items() if k != "clocks"})
    assert hs.verify(task, free, backend=backend(), lock_clocks=True).options["clocks"] == 900
    with busy(table.header.device["id"]), pytest.raises(DeviceBusy):
        hs.verify(task, found, backend=backend(), table=table, lock_clocks=True)
    assert "clocks" not in hs.verify(task, found, backend=backend(), table=table).options

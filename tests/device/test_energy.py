"""Energy: counters read from a made-up folder, blocks that are metered, and budgets on a simulated device that counts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from device.test_timing import Machine
from simulation import grouped, header, scores, simulated_table

import hwsearch as hs
from hwsearch.allocate.search import search
from hwsearch.device.energy import find, rapl
from hwsearch.device.timing import Protocol, paired
from hwsearch.errors import InvalidInput
from hwsearch.latency.energy_model import energy_table, fit_energy
from hwsearch.table.build import Build
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of

GRID = {"conv0": [24, 16, 8], "conv1": [40, 24, 16, 8], "conv2": [16, 8]}
NETWORK = grouped()
LAW = LatencyLaw.random(NETWORK, 3)
WATTS = {"fp32": 20.0, "int8": 12.0}


# ---------------------------------------------------------------- counters


class Powercap:
    """A folder like /sys/class/powercap, of packages with their parts and the platform beside them."""

    def __init__(self, root: Path, packages: int = 2, limit: int = 10**6) -> None:
        self.root = root
        for n in range(packages):
            self.domain(f"intel-rapl:{n}", f"package-{n}", limit)
            self.domain(f"intel-rapl:{n}:0", "core", limit)
        self.domain(f"intel-rapl:{packages}", "psys", limit)
        (root / "intel-rapl").mkdir()

    def domain(self, folder: str, name: str, limit: int) -> None:
        (self.root / folder).mkdir()
        for file, text in (("name", name), ("max_energy_range_uj", str(limit)), ("energy_uj", "0")):
            (self.root / folder / file).write_text(f"{text}\n")

    def set(self, number: int, energy_uj: int) -> None:
        (self.root / f"intel-rapl:{number}" / "energy_uj").write_text(f"{energy_uj}\n")


def test_rapl_adds_up_packages_and_nothing_else(tmp_path: Path) -> None:
    fake = Powercap(tmp_path)
    fake.set(0, 500)
    found = rapl(tmp_path)
    assert found.source == "RAPL, 2 package(s)"
    assert found.meter is not None
    assert found.meter() == 0.0
    fake.set(0, 1500)
    fake.set(1, 200)
    fake.set(2, 77)
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("9999")
    assert found.meter() == pytest.approx(1200e-6)
    assert found.meter() == pytest.approx(1200e-6)


def test_rapl_goes_on_after_a_counter_came_round(tmp_path: Path) -> None:
    fake = Powercap(tmp_path, packages=1, limit=1000)
    fake.set(0, 900)
    meter = rapl(tmp_path).meter
    assert meter is not None
    total = 0
    for value, used in ((950, 50), (30, 80), (10, 980), (10, 0)):
        fake.set(0, value)
        total += used
        assert meter() == pytest.approx(total * 1e-6)


def test_where_nothing_counts_there_is_no_meter(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        found = find(root=root)
        assert found.meter is None
        assert "no RAPL package" in found.reason
        assert found.to_json() == {"available": False, "source": "", "reason": found.reason}


def test_a_counter_for_root_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Powercap(tmp_path)
    read = Path.read_text

    def refused(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, os.strerror(13), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_text", refused)
    found = rapl(tmp_path)
    assert found.meter is None
    assert "intel-rapl:0/energy_uj may be read by root only" in found.reason


def test_a_damaged_counter_is_none(tmp_path: Path) -> None:
    Powercap(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")
    found = rapl(tmp_path)
    assert found.meter is None
    assert "cannot be read" in found.reason


# ---------------------------------------------------------------- blocks


def test_blocks_are_metered_without_what_stands_between_them() -> None:
    """Refilling caches and warming up cost energy that no inference is charged with."""
    machine, watts = Machine(noise=0.02), {"reference": 30.0, "candidate": 10.0}
    joules = 0.0

    def metered(name: str, time_ns: float):  # type: ignore[no-untyped-def]
        inner = machine.run(name, time_ns)

        def run() -> None:
            nonlocal joules
            before = machine.now
            inner()
            joules += (machine.now - before) * 1e-9 * watts[name]

        return run

    timing = paired(
        metered("reference", 2e6), {"candidate": metered("candidate", 1e6)}, Protocol(), clock=machine.clock,
        meter=lambda: joules,
    )["candidate"]  # fmt: skip
    energy = timing.energy
    assert energy is not None
    assert energy.joules == pytest.approx(1e6 * 1e-9 * 10.0, rel=0.02)
    assert energy.joules / energy.reference_joules == pytest.approx(timing.ratio / 3, rel=0.02)
    assert 0 < energy.error < 0.02


def test_without_a_meter_or_with_one_that_stands_still_there_is_no_energy() -> None:
    machine = Machine()
    runs = {"candidate": machine.run("candidate", 1e6)}
    for meter in (None, lambda: 3.0):
        timing = paired(machine.run("reference", 2e6), runs, clock=machine.clock, meter=meter)["candidate"]
        assert timing.energy is None


class Coarse:
    """A counter like NVML's on an H100: it moves every 100 ms only, to what was used until then."""

    tick_s = 0.1

    def __init__(self, machine: Machine) -> None:
        self.machine, self.joules, self.told, self.moved = machine, 0.0, 0.0, 0.0

    def __call__(self) -> float:
        self.machine.now += 1e4  # asking takes time
        if self.machine.now - self.moved >= self.tick_s * 1e9:
            self.told, self.moved = self.joules, self.machine.now
        return self.told

    def run(self, name: str, time_ns: float, watts: float):  # type: ignore[no-untyped-def]
        inner = self.machine.run(name, time_ns)

        def run() -> None:
            before = self.machine.now
            inner()
            self.joules += (self.machine.now - before) * 1e-9 * watts

        return run


def test_a_coarse_counter_is_read_while_each_engine_runs_by_itself() -> None:
    """By blocks of 12 ms a tick would carry the joules of the engine before: the ratio would be near 1."""
    machine = Machine(noise=0.02)
    counter = Coarse(machine)
    reference, candidate = counter.run("reference", 2e6, 600.0), counter.run("candidate", 1e6, 200.0)
    timing = paired(reference, {"candidate": candidate}, clock=machine.clock, meter=counter)["candidate"]
    energy = timing.energy
    assert energy is not None
    assert energy.joules == pytest.approx(1e6 * 1e-9 * 200.0, rel=0.02)
    assert energy.reference_joules == pytest.approx(2e6 * 1e-9 * 600.0, rel=0.02)
    assert 0 < energy.error < 0.02


def test_a_coarse_counter_that_stands_still_gives_no_energy() -> None:
    machine = Machine()
    counter = Coarse(machine)
    counter.tick_s = 1e6
    runs = {"candidate": counter.run("candidate", 1e6, 1.0)}
    timing = paired(counter.run("reference", 1e6, 1.0), runs, clock=machine.clock, meter=counter)["candidate"]
    assert timing.energy is None


# ---------------------------------------------------------------- tables and budgets


def metered(table: LatencyTable) -> LatencyTable:
    """The table of a machine that draws WATTS while a node runs, and nothing besides."""
    reference = joules(table.find("reference"))

    def with_energy(build: Build) -> Build:
        return replace(build, energy_j=joules(build), reference_energy_j=reference, energy_error=1e-4)

    return LatencyTable(table.header, tuple(map(with_energy, table.builds)))


def joules(build: Build) -> float:
    """Every node of the law draws the power of its precision."""
    of = LatencyTable(header(NETWORK, LAW)).candidate(build)
    precisions = {u: v.precision for u, v in of.variants.items()}
    nodes = LAW.nodes(precisions, sizes=sizes_of(NETWORK, of.widths))
    return sum(n.time_ns * 1e-9 * WATTS[n.precision] for n in nodes)


@pytest.fixture(scope="module")
def counted() -> LatencyTable:
    return metered(simulated_table(NETWORK, LAW, design=30, heldout=8, grid=GRID))


def test_the_model_of_energies_foretells_builds_it_has_not_seen(counted: LatencyTable) -> None:
    model = fit_energy(counted)
    heldout = [b for b in counted.builds if b.role == "heldout"]
    errors = []
    for build in heldout:
        of = counted.candidate(build)
        errors.append(abs(model.predict(of.variants, of.widths).time_ns / (joules(build) * 1e9) - 1))
    times = [
        abs(counted.time_ns(b) / counted.header.reference_ns / (b.energy_ratio or 1) - 1) for b in heldout
    ]
    assert np.median(errors) < 0.05
    assert np.median(errors) < 0.3 * np.median(times)  # times alone would predict them worse


@pytest.mark.parametrize("share", [30, 50, 80])
def test_a_budget_on_energy_is_met_as_predicted(counted: LatencyTable, share: int) -> None:
    found = search(counted, scores(NETWORK, GRID), [f"energy={share}%"])
    p = found.predicted
    assert p["energy_nj"] + p["energy_sigma_nj"] <= found.budgets[0]["limit"]
    assert found.dense["energy_nj"] == pytest.approx(joules(counted.find("dense")) * 1e9, rel=1e-9)
    assert found.budgets[0]["limit"] == int(found.dense["energy_nj"] * share / 100)


def test_a_smaller_energy_loses_more(counted: LatencyTable) -> None:
    losses = [
        search(counted, scores(NETWORK, GRID), [f"energy={share}%"]).predicted["loss"]
        for share in (30, 50, 70, 100)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0 < losses[0]


def test_a_table_without_energies_says_what_is_missing() -> None:
    table = simulated_table(NETWORK, LAW, design=8, grid=GRID)
    with pytest.raises(
        InvalidInput, match=r"the table has none of its reference and dense.*`hwsearch devices`"
    ):
        search(table, scores(NETWORK, GRID), ["energy=50%"])
    assert "energy_nj" not in search(table, scores(NETWORK, GRID), ["macs=50%"]).predicted


def test_builds_without_energies_are_left_out(counted: LatencyTable) -> None:
    """As where a profile went on after its counter was closed to it."""
    some = [
        replace(b, energy_j=None) if b.role == "design" and n % 4 == 0 else b
        for n, b in enumerate(counted.builds)
    ]
    partial = energy_table(LatencyTable(counted.header, tuple(some)))
    assert len(partial.builds) == sum(b.energy_j is not None for b in some) < len(some)


def test_energies_round_trip(counted: LatencyTable, tmp_path: Path) -> None:
    none = replace(counted.builds[-1], energy_j=None, reference_energy_j=None, energy_error=None)
    LatencyTable(counted.header, (*counted.builds, none)).save(tmp_path / "t.parquet")
    loaded = LatencyTable.load(tmp_path / "t.parquet").builds
    assert [b.energy_j for b in loaded] == [*(b.energy_j for b in counted.builds), None]
    assert loaded[-1].energy_ratio is None


@pytest.mark.usefixtures("own_locks")
def test_a_run_meets_a_budget_on_energy_and_memory(tmp_path: Path) -> None:
    """Counted, fitted, searched, deployed and counted again; the memory is computed."""
    network = tiny.lowering("cnn").network
    old = tiny.task("cnn")
    task = hs.Task(old.model, old.example_inputs, old.calibration, lambda predict: 0.5, "metered")
    backend = SimulatedBackend(LatencyLaw.random(network), noise=0.003, watts=WATTS)
    report = hs.run(task, ["energy=45%", "memory=60%"], tmp_path, backend=backend)
    table = LatencyTable.load(tmp_path / "table.parquet")
    assert all(b.energy_j and b.reference_energy_j for b in table.builds)
    assert report.met
    data = json.loads((tmp_path / "report.json").read_text())
    energy, memory = data["energy_mj"], data["memory"]
    assert energy["measured"] <= energy["budget"] + 1e-6
    assert energy["budget"] == pytest.approx(0.45 * energy["dense"], rel=1e-4)
    assert energy["predicted"] == pytest.approx(energy["measured"], rel=0.1)
    assert memory["source"] == "estimated"
    assert memory["deployed"] <= memory["budget"] == int(0.6 * memory["dense"])
    assert (
        json.loads((tmp_path / "alloc.json").read_text())["predicted"]["memory_bytes"] == memory["deployed"]
    )
    assert "mJ measured" in str(report)
    assert "bytes of activations at most (estimated)" in str(report)
    silent = SimulatedBackend(LatencyLaw.random(network), noise=0.003)
    with pytest.raises(InvalidInput, match="no counter moved here"):
        hs.verify(
            task, hs.Allocation.load(tmp_path / "alloc.json"), backend=silent, weights=tmp_path / "weights"
        )

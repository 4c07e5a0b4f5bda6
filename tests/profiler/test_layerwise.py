"""Profiles made layer by layer, on a device with a known law and on OpenVINO."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from profiling import measured
from torch import nn

import hwsearch as hs
from hwsearch.allocate.budget import parse_budgets
from hwsearch.allocate.search import search
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.cli import overview
from hwsearch.deployment.session import Session, uniform_candidates
from hwsearch.device.timing import Protocol
from hwsearch.engine.reference import INSTANCES
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, IncompatibleTables, InvalidInput
from hwsearch.latency.layer_sum import dense_ns
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.network import Network
from hwsearch.network.sandwich import contexts, filling, plan
from hwsearch.network.variants import Variant, uniform
from hwsearch.pipeline.closed_loop import closed_loop
from hwsearch.profiler.profile import Effort, profile
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
FAST = Protocol(width=0.02, block_ns=1, warmup_ns=1, limit_s=0.5)


class Deep(nn.Module):
    """A stem, five residual blocks of growing width, two of them alike, and a head: 12 units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        sides = [(8, 12), (8, 16), (8, 16), (8, 20), (8, 24)]
        self.wide = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in sides)
        self.back = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in sides)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for wide, back in zip(self.wide, self.back, strict=True):
            x = torch.relu(x + back(torch.relu(wide(x))))
        return self.head(x.mean((2, 3)))


@cache
def lowering() -> Lowering:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    return Lowering(hs.Task(Deep().eval(), x[:1], [x], lambda predict: 0.0, "deep"))


def law(**changes: Any) -> LatencyLaw:
    """Each cut end of a unit costs as much as a typical unit, an inference half of that; boundaries cost only where classes
    differ."""
    made = LatencyLaw.random(lowering().network)
    mixed = {pair: cost for pair, cost in made.boundaries.items() if pair != (True, True)}
    return replace(
        made, **{"boundaries": mixed, "end_ns": 50_000.0, "dispatch_ns": 25_000.0, "rest_ns": 0.0, **changes}
    )


def backend(own: LatencyLaw | None = None, **options: Any) -> SimulatedBackend:
    return SimulatedBackend(own or law(), **options)


def run(device: SimulatedBackend, out: Path | None, mode: str = "sandwiched", **options: Any) -> LatencyTable:
    setup = Setup(lowering(), device, BuildOptions(1, device.bases()[0]))
    return measured(setup, out, **{"protocol": FAST, "mode": mode, **options})


def unit_errors(model: LatencyModel, exact: LatencyLaw) -> list[float]:
    return [
        abs(model.unit_ns(u, Variant(p)) / exact.units[u][p] - 1.0)
        for u in exact.units
        for p in ("fp32", "int8")
    ]


def test_units_between_neighbours_take_what_they_take_in_the_network() -> None:
    """Alone they pay for their ends and for the inference."""
    exact = law()
    model = fit(run(backend(noise=0.001, node_noise=0.001), None))
    assert max(unit_errors(model, exact)) < 0.03
    assert model.rest_ns == pytest.approx(exact.dispatch_ns, rel=0.1)
    assert min(unit_errors(fit(run(backend(), None, "alone")), exact)) > 0.5


def test_the_sum_is_the_network_s_time_where_no_boundary_enters() -> None:
    exact, table = law(), run(backend(), None)
    network, model = table.network, fit(table)
    for precision in ("fp32", "int8"):
        found = model.predict(uniform(network, precision))
        assert found.time_ns == pytest.approx(exact.time_ns(dict.fromkeys(exact.units, precision)), rel=0.01)
        assert 0.0 < found.sigma_ns < 0.2 * found.time_ns
    rng = np.random.default_rng(0)
    for _ in range(10):
        mixed = {u.name: Variant(str(rng.choice(["fp32", "int8"]))) for u in network.units}
        found = model.predict(mixed)
        true = exact.time_ns({u: v.precision for u, v in mixed.items()})
        assert abs(found.time_ns - true) < 3 * found.sigma_ns, "boundaries are unknown, and sigma says so"
    assert dense_ns(table)[0] == pytest.approx(exact.time_ns(dict.fromkeys(exact.units, "fp32")), rel=0.01)
    assert dense_ns(table)[2]


class Watched(SimulatedBackend):
    """Remembers the units of each network that it compiled."""

    def build(self, onnx: bytes, options: BuildOptions) -> Any:
        engine = super().build(onnx, options)
        self.__dict__.setdefault("seen", []).append((options.base, set(engine.executed)))
        return engine


def test_no_network_is_built_whole_and_every_cell_is_covered() -> None:
    device = Watched(law(units=bf16()), bases=("bf16", "fp32"))
    table = run(device, None)
    network, sandwiches = table.network, plan(lowering().network)
    assert all(units < set(network.by_name) for _, units in device.__dict__["seen"])
    assert len(table.builds) == 3 * len(sandwiches) <= 3 * len(network.units)
    assert device.builds == 1 + len(table.builds)
    for base, variant in (("bf16", "dense.bf16"), ("bf16", "dense.int8"), ("fp32", "dense.fp32")):
        held = {
            contexts(network)[u]
            for b in table.builds
            if b.base == base
            for asked in [dict(zip(network.by_name, b.variants, strict=True))]
            for u in filling(network, [u for u, v in asked.items() if v])
            if asked[u] == variant
        }
        assert held == set(contexts(network).values())
    assert table.offered() == {u.name: ("dense.bf16", "dense.int8") for u in network.units}
    exact = device.law.time_ns(dict.fromkeys(device.law.units, "fp32"))
    dense = search(table, scores(network, "bf16"), ["latency=100%"])
    bars = hs.plot_allocation(dense, table).axes[1].patches
    assert 0.9 < sum(b.get_width() for b in bars if b.get_fill()) * 1e6 / dense_ns(table)[0] <= 1.0
    assert dense_ns(table)[0] == pytest.approx(exact, rel=0.02)


def bf16() -> dict[str, dict[str, float]]:
    return {u: {**own, "bf16": 0.6 * own["fp32"]} for u, own in law().units.items()}


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("mode", ["sandwiched", "alone"])
def test_a_profile_that_dies_resumes(tmp_path: Path, number: int, mode: str) -> None:
    out = tmp_path / "t.parquet"
    device = backend(noise=0.01, failing=(number,))
    with pytest.raises(BackendUnavailable):
        run(device, out, mode)
    kept = LatencyTable.load(out).builds if out.exists() else ()
    first = INSTANCES if mode == "alone" else 1
    assert len(kept) == max(0, number - first), "reference engines are built first, and belong to no row"
    table = run(device, out, mode)
    assert [b.key for b in table.builds[: len(kept)]] == [b.key for b in kept]
    whole = run(backend(noise=0.01), None, mode)
    assert [(b.role, b.key) for b in table.builds] == [(b.role, b.key) for b in whole.builds]
    built = device.builds
    assert len(run(device, out, mode).builds) == len(table.builds)
    assert device.builds <= built + first, "a finished profile was measured again"
    with pytest.raises(IncompatibleTables, match=f"mode {mode}"):
        run(device, out, "context")
    with pytest.raises(InvalidInput, match="no prior"):
        run(device, out, mode, prior=[table])


@pytest.mark.parametrize("mode", ["sandwiched", "alone"])
def test_the_time_limit_is_an_error_that_keeps_what_was_measured(tmp_path: Path, mode: str) -> None:
    out, device = tmp_path / "t.parquet", backend(build_ns=1_000_000_000)
    with pytest.raises(InvalidInput, match="goes on from there"):
        run(device, out, mode, time_limit_s=1.5)
    kept = len(LatencyTable.load(out).builds)
    assert kept > 0
    assert len(run(device, out, mode).builds) > kept


def test_what_a_unit_refuses_is_not_offered_and_its_neighbours_are_measured_beside_the_base() -> None:
    refused = lowering().network.units[1].name
    table = run(backend(refused=(refused,)), None)
    network = table.network
    alike = {u.name for u in network.units if u.signature == network[refused].signature}
    assert table.header.unsupported[refused] == {"dense.int8": "executed in fp32"}
    offered = table.offered()
    assert all(offered[u] == ("dense.fp32",) for u in alike)
    assert all(offered[u.name] == ("dense.fp32", "dense.int8") for u in network.units if u.name not in alike)
    model = fit(table)
    mixed = {u.name: Variant("fp32" if u.name in alike else "int8") for u in network.units}
    assert model.predict(mixed).time_ns > 0
    mixed_sandwiches = [b for b in table.builds if {"dense.fp32", "dense.int8"} <= set(b.variants)]
    assert mixed_sandwiches


def scores(network: Network, *halves: str) -> SensitivityTable:
    loss = {
        u.name: {"dense.fp32": 0.0, **{f"dense.{p}": 0.1 for p in halves}, "dense.int8": 1.0 + i}
        for i, u in enumerate(network.units)
    }
    return SensitivityTable(network, loss, 8, "kl", False)


def test_a_search_on_such_a_table_says_what_is_estimated() -> None:
    table = run(backend(), None)
    found = search(table, scores(table.network), ["latency=70%"])
    assert found.dense["estimated"]
    assert 0 < found.predicted["latency_ns"] + found.predicted["sigma_ns"] <= 0.7 * found.dense["latency_ns"]
    assert found.predicted["size_bytes"] < found.dense["size_bytes"] == table.header.dense_file_bytes
    assert set(search(table, scores(table.network), ["latency=100%"]).variants.values()) == {"dense.fp32"}
    with pytest.raises(InvalidInput, match="tails"):
        search(table, scores(table.network), ["latency_p99=70%"])
    assert "estimated" in overview.summary(table)
    assert "boundaries" in overview.summary(table)
    assert overview.quality(table) is None
    with pytest.raises(InvalidInput, match="in context can be checked"):
        hs.recheck(table, lowering().task, backend=backend())


def test_the_closed_loop_measures_what_the_sum_does_not_know(tmp_path: Path) -> None:
    """The whole network takes a third longer than its layers; the budget holds as measured all the same."""
    exact = law(rest_ns=200_000.0)
    device = backend(exact)
    table = run(device, None)
    setup = Setup(lowering(), device, BuildOptions(1, "fp32"))
    budgets = parse_budgets(["latency=75%"])
    report, found, after = closed_loop(Session(setup, table), table, scores(table.network), budgets, tmp_path)
    assert report.state != "missed"
    assert report.table_check is None
    dense = exact.time_ns(dict.fromkeys(exact.units, "fp32"))
    chosen = exact.time_ns({u: Variant.parse(v).precision for u, v in found.variants.items()})
    assert report.latency_ms["dense"] == pytest.approx(dense / 1e6, rel=0.02)
    assert report.latency_ms["measured"] == pytest.approx(chosen / 1e6, rel=0.02)
    assert chosen < 0.76 * dense
    assert [b.role for b in after.builds].count("deployed") == report.rounds
    assert LatencyTable.load(tmp_path / "table.parquet").header.mode == "sandwiched"


def test_whole_networks_are_measured_on_the_scale_of_the_sandwiches() -> None:
    """The closed loop's builds have times as the table's own, and correct the sum."""
    exact = law(rest_ns=200_000.0)
    device = backend(exact)
    table = run(device, None)
    setup = Setup(lowering(), device, BuildOptions(1, "fp32"))
    session = Session(setup, table)
    _, measured = session.measure_all(None, uniform_candidates(setup, {}))
    for name, job in measured.items():
        true = exact.time_ns(dict.fromkeys(exact.units, name.removeprefix("dense.")))
        assert session.ms(job) * 1e6 == pytest.approx(true, rel=0.02)
        before = fit(table).predict(job.variants).time_ns
        after = fit(table.with_build(job.build)).predict(job.variants)
        assert before < 0.95 * true
        assert after.time_ns == pytest.approx(true, rel=0.02)


def test_tables_of_earlier_versions_are_read_as_what_they_are(tmp_path: Path) -> None:
    table = run(backend(), None, "alone")
    old = LatencyTable(
        replace(table.header, mode="isolated"),
        tuple(replace(b, role="isolated") if b.role == "alone" else b for b in table.builds),
    )
    old.save(tmp_path / "old.parquet")
    loaded = LatencyTable.load(tmp_path / "old.parquet")
    assert loaded.header.mode == "alone"
    assert [b.role for b in loaded.builds] == [b.role for b in table.builds]
    variants = uniform(table.network, "int8")
    assert fit(loaded).predict(variants) == fit(table).predict(variants)


def test_a_table_that_lacks_the_dense_layers_says_so() -> None:
    table = run(backend(law(units=bf16()), bases=("bf16", "fp32")), None)
    builds = [b for b in table.builds if b.base == "fp32"]
    first = LatencyTable(table.header, tuple(b for b in table.builds if all(b is not x for x in builds[1:])))
    for broken in (
        first,
        LatencyTable(table.header, tuple(b for b in table.builds if all(b is not x for x in builds))),
    ):
        with pytest.raises(InvalidInput, match="fp32"):
            search(broken, scores(table.network, "bf16"), ["latency=1ms"])


def test_alone_times_each_distinct_layer_once() -> None:
    table = run(backend(), None, "alone")
    own = [b for b in table.builds if b.role == "alone"]
    assert len(own) == 2 * len({u.signature for u in table.network.units})
    assert table.offered() == {u.name: ("dense.fp32", "dense.int8") for u in table.network.units}
    assert dense_ns(table)[2] is False


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_openvino(name: str, tmp_path: Path) -> None:
    runtime = OpenVINOBackend()
    base = runtime.bases()[0]
    setup = Setup(tiny.lowering(name), runtime, BuildOptions(1, base))
    quick = Protocol(width=0.5, limit_s=0.05, min_rounds=2, block_ns=100_000, warmup_ns=100_000)
    table = profile(setup, tmp_path / "t.parquet", Effort(protocol=quick), mode="sandwiched")
    network, model = table.network, fit(table)
    for unit in network.units:
        for variant in runtime.variants(base):
            assert model.knows(unit.name, variant, {}) or str(variant) in table.header.unsupported[unit.name]
            if str(variant) in table.offered()[unit.name]:
                assert 0 <= model.unit_ns(unit.name, variant) < 1e9
    found = model.predict({u: Variant.parse(own[-1]) for u, own in table.offered().items()})
    assert np.isfinite(found.time_ns)
    assert 0 < found.sigma_ns < found.time_ns
    assert 0 < dense_ns(table)[0] < 1e9

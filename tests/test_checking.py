"""A table is checked by measuring some of its builds again: on a device that stayed, and on one that changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.checking import spread
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.measure import Protocol
from hwsearch.profiler import profile
from hwsearch.regime import Regime
from hwsearch.session import Job, Session
from hwsearch.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend
from hwsearch.variants import uniform

pytestmark = pytest.mark.usefixtures("own_locks")
LAW = LatencyLaw.random(tiny.lowering("cnn").network, 2)


def backend(law: LatencyLaw = LAW, **options: Any) -> SimulatedBackend:
    return SimulatedBackend(law, **{"noise": 0.003, **options})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        at = Regime(tiny.lowering("cnn"), backend(), BuildOptions())
        return profile(at, None, protocol=Protocol(limit_s=1e-3, min_rounds=3))


def test_builds_are_spread_from_the_slowest_to_the_fastest(table: LatencyTable) -> None:
    found = spread(table, 5)
    ratios = [b.ratio for b in found]
    assert len(found) == 5
    assert ratios == sorted(ratios, reverse=True)
    everything = [b.ratio for b in table.builds if b.base == "fp32" and b.as_asked()]
    assert ratios[-1] == min(everything)
    assert len({b.key for b in found}) == 5
    assert len(spread(table, 10**6)) == len({b.key for b in table.builds if b.role != "reference"} - {None})


def test_a_table_holds_on_the_device_that_it_was_made_on(table: LatencyTable) -> None:
    found = hs.check(table, tiny.task("cnn"), backend=backend())
    assert found.holds
    assert abs(found.median) < 0.01
    assert "the table holds" in str(found)
    json.dumps(found.to_json())


def test_a_device_that_is_slower_as_a_whole_still_holds(table: LatencyTable) -> None:
    """Times are ratios to the reference: a throttled machine slows that down too."""
    slow = replace(LAW, units={u: {p: 1.5 * t for p, t in own.items()} for u, own in LAW.units.items()})
    slow = replace(
        slow,
        rest_ns=1.5 * slow.rest_ns,
        boundaries={pair: (1.5 * a, 1.5 * b) for pair, (a, b) in slow.boundaries.items()},
    )
    found = hs.check(table, tiny.task("cnn"), backend=backend(slow))
    assert found.holds
    assert found.reference_now_ns == pytest.approx(1.5 * found.reference_then_ns, rel=0.02)


def test_a_machine_that_is_slower_while_verifying_is_said_so(table: LatencyTable) -> None:
    slow = replace(LAW, units={u: {p: 1.3 * t for p, t in own.items()} for u, own in LAW.units.items()})
    at = Regime(tiny.lowering("cnn"), backend(slow), BuildOptions())
    session = Session(at, table)
    session.measure({"deployed": Job(uniform(at.network, "int8"), "fp32")})
    assert session.slowdown == pytest.approx(0.3, abs=0.1)
    session = Session(Regime(tiny.lowering("cnn"), backend(), BuildOptions()), table)
    session.measure({"deployed": Job(uniform(at.network, "int8"), "fp32")})
    assert session.slowdown == 0.0


def test_a_device_whose_int8_became_slower_does_not(table: LatencyTable) -> None:
    changed = replace(
        LAW,
        units={
            u: {p: t * (1.4 if p == "int8" else 1.0) for p, t in own.items()} for u, own in LAW.units.items()
        },
    )
    found = hs.check(table, tiny.task("cnn"), backend=backend(changed))
    assert not found.holds
    assert found.worst > 0.1
    assert "profile again" in str(found)


def test_what_a_check_needs(table: LatencyTable) -> None:
    with pytest.raises(InvalidInput, match="--task"):
        hs.check(table, backend=backend())
    with pytest.raises(IncompatibleTables, match="network"):
        hs.check(table, tiny.task("transformer"), backend=backend())
    with pytest.raises(InvalidInput, match="layer by layer"):
        hs.check(table.with_header(mode="alone"), tiny.task("cnn"), backend=backend())
    with pytest.raises(IncompatibleTables, match="runtime"):
        hs.check(table.with_header(versions={"simulated": "0"}), tiny.task("cnn"), backend=backend())


def test_a_report_tells_when_the_table_drifted(table: LatencyTable, tmp_path: Path) -> None:
    """Prediction and measurement part because the device changed: verify looks at the table by itself."""
    scores = hs.sensitivity(tiny.task("cnn"), backend=backend(), axes=["precision"])
    allocation = hs.search(table, scores, ["latency=75%"], axes=["precision"])
    fine = hs.verify(tiny.task("cnn"), allocation, backend=backend(), table=table)
    assert fine.table_check is None
    changed = replace(
        LAW,
        units={
            u: {p: t * (1.6 if p == "int8" else 1.0) for p, t in own.items()} for u, own in LAW.units.items()
        },
    )
    report = hs.verify(
        tiny.task("cnn"), allocation, backend=backend(changed), table=table, out=tmp_path / "r.json"
    )
    assert report.table_check is not None
    assert report.table_check["holds"] is False
    assert "the table no longer holds" in str(report)

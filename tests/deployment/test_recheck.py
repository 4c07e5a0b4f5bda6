"""A table is checked by measuring some of its builds again: on a device that stayed, and on one that changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.deployment.recheck import spread_builds
from hwsearch.deployment.session import Job, Session
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.network.variants import uniform
from hwsearch.profiler.profile import Effort, profile
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")
LAW = LatencyLaw.random(tiny.lowering("cnn").network, 2)


def backend(law: LatencyLaw = LAW, **options: Any) -> SimulatedBackend:
    return SimulatedBackend(law, **{"noise": 0.003, **options})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        setup = Setup(tiny.lowering("cnn"), backend(), BuildOptions())
        return profile(setup, None, Effort(protocol=Protocol(limit_s=1e-3, min_rounds=3)))


def test_builds_are_spread_from_the_slowest_to_the_fastest(table: LatencyTable) -> None:
    found = spread_builds(table, 5)
    ratios = [b.ratio for b in found]
    assert len(found) == 5
    assert ratios == sorted(ratios, reverse=True)
    everything = [b.ratio for b in table.builds if b.base == "fp32" and b.as_asked()]
    assert ratios[-1] == min(everything)
    assert len({b.key for b in found}) == 5
    assert len(spread_builds(table, 10**6)) == len({b.key for b in table.builds if b.role != "reference"} - {None})


def test_a_table_holds_on_the_device_that_it_was_made_on(table: LatencyTable) -> None:
    found = hs.recheck(table, tiny.task("cnn"), backend=backend())
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
    found = hs.recheck(table, tiny.task("cnn"), backend=backend(slow))
    assert found.holds
    assert found.reference_now_ns == pytest.approx(1.5 * found.reference_then_ns, rel=0.02)


LATE = replace(
    LAW,
    node_ns=0.3
    * LAW.time_ns(dict.fromkeys(LAW.units, "fp32"))
    / len(LAW.nodes(dict.fromkeys(LAW.units, "fp32"))),
)
"""Every node takes longer, the reference in all by 0.3 of its time."""


def test_a_device_on_which_every_node_takes_longer_still_holds_where_the_table_knows_of_it(
    table: LatencyTable,
) -> None:
    """As far as the table was measured on such a device, too; one that never was knows only that ratios changed."""
    assert not hs.recheck(table, tiny.task("cnn"), backend=backend(LATE)).holds
    found = hs.recheck(knowing(table), tiny.task("cnn"), backend=backend(LATE))
    assert found.holds
    assert abs(found.median) < 0.06


def knowing(table: LatencyTable) -> LatencyTable:
    """The table with half of its design measured where the nodes of the reference took 0.25 of its time longer."""
    builds = []
    for i, b in enumerate(table.builds):
        if b.role == "design" and i % 2:
            ratio = (b.ratio + 0.25 * table.nodes(b)) / 1.25
            own = 0.25 * float(np.median(b.reference_ns)) / table.reference_nodes
            b = replace(
                b, ratio=ratio, low=b.low * ratio / b.ratio, high=b.high * ratio / b.ratio,
                reference_ns=(1.25 * b.reference_ns).astype("int64"),
                nodes=tuple(replace(n, time_ns=n.time_ns + own) for n in b.nodes),
            )  # fmt: skip
        builds.append(b)
    return LatencyTable(table.header, tuple(builds))


def test_verifying_on_such_a_device_converts_and_says_so(table: LatencyTable) -> None:
    setup = Setup(tiny.lowering("cnn"), backend(LATE), BuildOptions())
    session = Session(setup, knowing(table))
    found = session.measure({"deployed": Job(uniform(setup.network, "int8"), "fp32")})["deployed"]
    exact = LAW.time_ns(dict.fromkeys(LAW.units, "int8"))
    scale = table.header.reference_ns / LAW.time_ns(dict.fromkeys(LAW.units, "fp32"))
    assert session.time_ns(found) == pytest.approx(scale * exact, rel=0.05)
    assert found.timing.ratio * session.scale_ns > 1.1 * scale * exact
    assert session.slowdown == pytest.approx(0.3, abs=0.05)


def test_a_device_whose_int8_became_slower_does_not(table: LatencyTable) -> None:
    changed = replace(
        LAW,
        units={
            u: {p: t * (1.4 if p == "int8" else 1.0) for p, t in own.items()} for u, own in LAW.units.items()
        },
    )
    found = hs.recheck(table, tiny.task("cnn"), backend=backend(changed))
    assert not found.holds
    assert found.worst > 0.1
    assert "profile again" in str(found)


def test_what_a_check_needs(table: LatencyTable) -> None:
    with pytest.raises(InvalidInput, match="--task"):
        hs.recheck(table, backend=backend())
    with pytest.raises(IncompatibleTables, match="network"):
        hs.recheck(table, tiny.task("transformer"), backend=backend())
    with pytest.raises(InvalidInput, match="layer by layer"):
        hs.recheck(table.with_header(mode="alone"), tiny.task("cnn"), backend=backend())
    with pytest.raises(IncompatibleTables, match="runtime"):
        hs.recheck(table.with_header(versions={"simulated": "0"}), tiny.task("cnn"), backend=backend())


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

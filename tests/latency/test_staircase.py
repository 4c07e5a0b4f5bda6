"""What a channel group costs at each width, from the probes of a profile."""

from __future__ import annotations

import pytest
from simulation import grouped, probed, simulated_table

from hwsearch.latency.staircase import as_json, group_times, staircase
from hwsearch.network.choices import candidate_widths
from hwsearch.testing import LatencyLaw, sizes_of

LAW = LatencyLaw.random(grouped(), 3)


def exact(group: str, width: int, precision: str) -> float:
    """What the law says of the units that a group runs through, with the conversions on their way in."""
    network = grouped()
    sizes = sizes_of(network, {group: width})
    touched = {u.name for u in network.units if group in u.groups}
    own = sum(LAW.units[u][precision] * LAW.stairs(u, sizes) for u in touched)
    edges = [e for e in network.edges_at({group: width}) if e.dst in touched]
    return own + sum(LAW.boundary_ns(e, (precision == "int8",) * 2) for e in edges)


def test_times_are_those_of_the_law() -> None:
    table = probed()
    steps = staircase(table)
    assert [(s.group, s.width) for s in steps] == [
        (g, w) for g, n in table.network.channels.items() for w in candidate_widths(n)
    ]
    for step in steps:
        assert set(step.times_ns) == {"fp32", "int8"}
        for precision, time in step.times_ns.items():
            assert time == pytest.approx(exact(step.group, step.width, precision), rel=1e-3)
        assert step.kept is (step.width in table.grid()[step.group])


def test_widths_off_the_steps_are_not_kept() -> None:
    """Channels are rounded up to eight: 40, 32, 24, 16 and 8 of conv1 are steps; of conv2's 16, 12 and 4 are not."""
    table = probed()
    assert table.grid() == {"conv0": [24, 16, 8], "conv1": [40, 32, 24, 16], "conv2": [16, 8]}


def test_only_widths_probed_under_every_precision_are_compared() -> None:
    table = probed()
    whole = group_times(table)
    last = table.builds[-1]
    assert last.role == "probe"
    short = type(table)(table.header, table.builds[:-1])
    width = last.widths[2]
    assert width in whole["conv2"]
    assert width not in group_times(short)["conv2"]


def test_as_json_holds_the_same() -> None:
    table = probed()
    assert [(s["group"], s["width"], s["kept"]) for s in as_json(table)] == [
        (s.group, s.width, s.kept) for s in staircase(table)
    ]


def test_a_table_without_probes_has_no_steps() -> None:
    assert staircase(simulated_table(grouped(), LAW, design=1)) == []

"""What a channel group costs at each width, as the builds of a profile tell it."""

from __future__ import annotations

import pytest
from simulation import grouped, probed, simulated_table

from hwsearch.latency.staircase import as_json, group_times, staircase, unbuilt
from hwsearch.network.choices import candidate_widths
from hwsearch.testing import LatencyLaw, sizes_of

LAW = LatencyLaw.random(grouped(), 3)


def exact(group: str, width: int, precision: str) -> float:
    """What the law says of the units that a group runs through."""
    network = grouped()
    sizes = sizes_of(network, {group: width})
    touched = {u.name for u in network.units if group in u.groups}
    return sum(LAW.units[u][precision] * LAW.stairs(u, sizes) for u in touched)


def test_times_are_those_of_the_law() -> None:
    table = probed()
    steps = staircase(table)
    assert [(s.group, s.width) for s in steps] == [
        (g, w) for g, n in table.network.channels.items() for w in candidate_widths(n)
    ]
    for step in steps:
        assert set(step.times_ns) == {"fp32", "int8"}
        for precision, time in step.times_ns.items():
            # builds all in int8 do not tell what is a conversion's
            within = 0.03 if precision == "fp32" else 0.5
            assert time == pytest.approx(exact(step.group, step.width, precision), rel=within)
        assert step.kept is (step.width in table.grid()[step.group])


def test_widths_off_the_steps_are_not_kept() -> None:
    """Channels are rounded up to eight: 40, 32, 24, 16 and 8 of conv1 are steps; of conv2's 16, 12 and 4 are not."""
    table = probed()
    assert table.grid() == {"conv0": [24, 16, 8], "conv1": [40, 32, 24, 16], "conv2": [16, 8]}


def test_a_width_that_no_build_holds_is_told_by_the_others() -> None:
    table = probed()
    last = table.builds[-1]
    width = last.widths[2]
    short = type(table)(table.header, tuple(b for b in table.builds if b.widths != last.widths))
    assert unbuilt(table) == {}
    assert unbuilt(short) == {"conv2": [width]}
    (step,) = [s for s in staircase(short) if (s.group, s.width) == ("conv2", width)]
    assert not step.built
    whole = group_times(short)["conv2"]
    assert whole[16][0] > step.times_ns["fp32"] > 0
    assert all(s.built for s in staircase(table))


def test_as_json_holds_the_same() -> None:
    table = probed()
    assert [(s["group"], s["width"], s["kept"]) for s in as_json(table)] == [
        (s.group, s.width, s.kept) for s in staircase(table)
    ]


def test_a_table_without_probes_has_no_steps() -> None:
    assert staircase(simulated_table(grouped(), LAW, design=1)) == []

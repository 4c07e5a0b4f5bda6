"""Builds that are kept from the fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from profiling import FAST, narrow_setup

from hwsearch.cli.overview import quality
from hwsearch.device.timelimit import TimeLimit
from hwsearch.latency.model import fit, validate
from hwsearch.profiler.heldout import LEAST, LEAST_TESTED, HeldOut
from hwsearch.profiler.recorder import Recorder
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable

pytestmark = pytest.mark.usefixtures("own_locks")


def test_held_out_builds_are_spread_over_the_profile(widths_table: tuple[Path, LatencyTable]) -> None:
    """They show what the fit gets wrong, and not how the machine changed since."""
    _, table = widths_table
    later = [b.role for b in table.builds if b.role in ("design", "heldout")]
    assert "heldout" in later[: len(later) // 2]
    assert "design" in later[later.index("heldout") :]


def recorder(table: LatencyTable) -> Recorder:
    """On with a profile as if nothing had been held out of it."""
    bare = LatencyTable(table.header, tuple(b for b in table.builds if not b.kept_out))
    return Recorder(narrow_setup(noise=0.002), bare, None, FAST, Progress.silent())


def test_as_many_as_tell_anything(widths_table: tuple[Path, LatencyTable]) -> None:
    """Allocations that were not built, and that the model knows."""
    own = recorder(widths_table[1])
    before = own.candidates()
    held = HeldOut(own, TimeLimit(1e9, own.setup.clock, str))
    assert held.error() is None
    held.complete()
    assert [own.count("heldout"), own.count("test")] == [LEAST, LEAST_TESTED]
    assert held.number == LEAST + LEAST_TESTED
    builds = [b for b in own.table.builds if b.role == "heldout"]
    error = held.error()
    assert error is not None
    assert validate(fit(own.table), builds).median_error <= error < 0.1
    assert all(fit(own.table).predicts(b) for b in own.table.builds if b.kept_out)
    assert not [c for c in own.candidates()[len(before) :] if c in before]


def test_nothing_looks_at_test_builds(widths_table: tuple[Path, LatencyTable]) -> None:
    """A quarter of what is kept out or more; with other times in them all is decided and predicted as before."""
    table = widths_table[1]
    tested = [b for b in table.builds if b.role == "test"]
    assert len(tested) >= max(2, sum(b.kept_out for b in table.builds) / 4)
    other = LatencyTable(table.header, tuple(replace(b, ratio=2 * b.ratio) if b.role == "test" else b for b in table.builds))
    own, model = recorder(table), fit(table)
    for changed in (table, other):
        own.table = changed
        assert HeldOut(own, TimeLimit(1e9, own.setup.clock, str)).error() == pytest.approx(
            HeldOut(replace(own, table=table), TimeLimit(1e9, own.setup.clock, str)).error()
        )
    for build in table.builds:
        assert fit(other).predict_build(build) == model.predict_build(build)
    assert quality(table)["builds"] == len(tested)
    assert quality(other)["median_error"] > 0.4, "and they alone are reported"


def test_none_once_the_time_is_over(widths_table: tuple[Path, LatencyTable]) -> None:
    own = recorder(widths_table[1])
    held = HeldOut(own, TimeLimit(0.0, own.setup.clock, str))
    held.complete()
    assert held.number == 1, "begun in time, and the last"

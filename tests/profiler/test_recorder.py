"""One build after another: timed beside the reference, read back, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from profiling import FAST, law, narrow_law, run, set_up

from hwsearch.device.timing import KNOWN
from hwsearch.engine.reference import INSTANCES
from hwsearch.network.choices import Candidate
from hwsearch.network.variants import uniform
from hwsearch.profiler.recorder import Recorder
from hwsearch.progress import Progress
from hwsearch.table.table import LatencyTable
from hwsearch.testing import SimulatedBackend, sizes_of

pytestmark = pytest.mark.usefixtures("own_locks")


def test_the_end_to_end_ratio_survives_drift() -> None:
    table = run(set_up(drift=lambda s: 1.0 + 0.4 * np.sin(7 * s)), None)
    dense, uniform_build = table.find("dense"), table.find("uniform")
    exact = law()
    int8 = exact.time_ns(dict.fromkeys(exact.units, "int8")) / exact.time_ns(
        dict.fromkeys(exact.units, "fp32")
    )
    assert uniform_build.ratio / dense.ratio == pytest.approx(int8, rel=0.02)


def test_on_a_machine_that_is_always_restless_few_builds_are_called_unstable() -> None:
    table = run(set_up(noise=0.08), None)
    first, others = table.builds[:KNOWN], table.builds[KNOWN:]
    assert all(b.unstable == (b.width > FAST.width) for b in first), "nothing is known yet"
    assert sum(b.width > FAST.width for b in others) > 0.5 * len(others)
    assert not any(b.unstable for b in others)


def test_a_unit_that_does_not_run_as_asked_is_recorded_and_never_offered(tmp_path: Path) -> None:
    table = run(set_up(refused=("conv1",)), tmp_path / "t.parquet")
    assert table.header.unsupported == {"conv1": {"dense.int8": "executed in fp32"}}
    assert table.offered()["conv1"] == ("dense.fp32",)
    assert table.offered()["conv2"] == ("dense.fp32", "dense.int8")
    position = [u.name for u in table.network.units].index("conv1")
    assert {b.variants[position] for b in table.builds if b.role == "design" or b.kept_out} == {"dense.fp32"}
    assert not table.find("uniform").as_asked()


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


def test_what_the_table_has_is_not_measured_again_and_what_it_lacks_is_on_disk(tmp_path: Path) -> None:
    out, backend = tmp_path / "t.parquet", SimulatedBackend(law())
    table = run(set_up(backend), out, builds=1)
    recorder = Recorder(set_up(backend), table, out, FAST, Progress.silent())
    plain, built = Candidate(uniform(table.network, "fp32"), table.network.channels), backend.builds
    assert recorder.measure("reference", plain) == table.find("reference")
    assert backend.builds == built
    recorder.measure("design", plain)
    assert backend.builds == built + INSTANCES + 1, "the reference engine, and the build"
    assert recorder.count("design") == table.header.design["builds"] + 1
    assert len(LatencyTable.load(out).builds) == len(recorder.table.builds) == len(table.builds) + 1

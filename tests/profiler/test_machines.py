"""All machines of a cluster profile at once, and fill one table."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny

import hwsearch as hs
from hwsearch.errors import HwsearchError, IncompatibleTables, InvalidInput
from hwsearch.latency.model import fit
from hwsearch.table.build import Build
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

TESTS = Path(__file__).parents[1]
SPEC = f"{TESTS / 'tiny.py'}:cnn"
NAME, SLOWER, LIFE, KIND = "TEST_MACHINE", "TEST_SLOWER", "TEST_LIFE", "TEST_KIND"
"""Of each node: the name of the machine that it pretends to be, by what factor it is slower, after how many builds it is killed,
and the version of its runtime."""


class Pretending(SimulatedBackend):
    """A device of the machine that the environment names."""

    def __init__(self) -> None:
        law = LatencyLaw.random(tiny.lowering("cnn").network, 3)
        slower = float(os.environ.get(SLOWER, "1"))
        super().__init__(law, noise=0.003, wander=lambda second, network: slower if len(network) % 2 else 1.0)
        self.machine = os.environ.get(NAME, "none")
        self.life = int(os.environ.get(LIFE, "1000"))

    def versions(self) -> dict[str, str]:
        return {"simulated": os.environ.get(KIND, "1")}

    def build(self, *args: Any) -> Any:
        self.life -= 1
        if not self.life:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build(*args)


class Here:
    """Becomes the device in the worker: what is sent says nothing of the machine."""

    def __reduce__(self) -> Any:
        return Pretending, ()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose first node has no CPU; each test adds its machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS / "profiler"), os.environ.get("PYTHONPATH", "")]))
        ray: ModuleType = pytest.importorskip("ray")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def add(cluster: Any) -> Iterator[Any]:
    """Adds a machine for one test."""
    nodes = []

    def node(name: str, **more: str) -> None:
        nodes.append(cluster.add_node(num_cpus=1, env_vars={NAME: name, **more}))
        cluster.wait_for_nodes()

    yield node
    for own in nodes:
        cluster.remove_node(own)


def profiled(out: Path | None, **options: Any) -> LatencyTable:
    given = {"backend": Here(), "builds": 8, "ray": "auto", **options}
    return hs.profile(hs.load(SPEC), out=out, **given)


def keys(builds: Sequence[Build]) -> list[tuple[Any, ...]]:
    """Of each build its machine, what it is and its time."""
    return [(b.machine, b.role, b.key, b.ratio) for b in builds]


@pytest.mark.usefixtures("own_locks")
def test_machines_of_one_kind_fill_one_table(add: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        add(name)
    out = tmp_path / "all.parquet"
    table = profiled(out)
    assert sorted(table.machines) == ["a", "b"]
    first, other = (table.of_machine(name) for name in table.machines)
    assert min(len(first), len(other)) >= 8
    assert {b.key for b in first if b.role == "design"} != {b.key for b in other if b.role == "design"}, "another seed"
    assert fit(table).apart.keys() == {table.machines[1]}
    assert keys(LatencyTable.load(out).builds) == keys(table.builds)
    assert table.header.command == " ".join(Path(w).name if Path(w).is_absolute() else w for w in sys.argv)
    alone = profiled(None, backend=Pretending(), ray=None)
    assert [key[1:] for key in keys(alone.builds)] == [key[1:] for key in keys(first)], "the same builds as without others"
    before = len(table.builds)
    more = profiled(out, builds=12)
    assert more.machines == table.machines
    assert before < len(more.builds) <= before + 12, "it went on with what each machine had"
    assert keys(more.builds[: len(first)]) == keys(first)
    with pytest.raises(InvalidInput, match="give each table a file of its own"):
        profiled(out, threads=2)
    assert keys(LatencyTable.load(out).builds) == keys(more.builds)
    assert all(len(LatencyTable.sections(f)) == 1 for f in (tmp_path / "all.parquet.machines").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_a_machine_that_dies_costs_its_own_work_alone(add: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.profiler.machines.POLL_S", 0.05)
    add("whole")
    add("dies", **{LIFE: "9"})
    with pytest.warns(UserWarning, match="the machine dies is lost"):
        table = profiled(tmp_path / "all.parquet")
    assert len(table.of_machine("whole")) >= 8
    assert len(table.of_machine("dies")) < len(table.of_machine("whole")) or "dies" not in table.machines


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_machines_of_other_kinds_are_named(add: Any, tmp_path: Path) -> None:
    add("a")
    add("a")
    add("other", **{KIND: "2"})
    twice, other = "two nodes of the cluster are of the machine a", "is left out: other versions of the runtime than"
    with pytest.warns(UserWarning, match=twice), pytest.warns(UserWarning, match=other):
        table = profiled(tmp_path / "all.parquet", time_limit_s=5.0)
    assert len(table.machines) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_a_machine_that_disagrees_is_named_and_one_too_far_apart_left_out(add: Any, tmp_path: Path) -> None:
    add("a")
    add("b", **{SLOWER: "1.5"})
    with pytest.warns(UserWarning, match="is left out: .*more than machines of one kind do.*its own table is .*parquet"):
        table = profiled(tmp_path / "all.parquet")
    assert len(table.machines) == 1
    assert len(list((tmp_path / "all.parquet.machines").glob("*.parquet"))) == 2


def test_what_several_machines_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="mode alone cannot be merged"):
        profiled(None, mode="alone")
    with pytest.raises(InvalidInput, match="a trace is of one machine"):
        profiled(None, trace=tmp_path / "t.json")
    with pytest.raises(InvalidInput, match="by its name"):
        hs.profile(tiny.task("cnn"), backend=Pretending(), ray="auto")


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_a_table_of_something_else_and_a_cluster_without_machines(cluster: Any, add: Any, tmp_path: Path) -> None:
    with pytest.raises(HwsearchError, match="no machine with a CPU that is free"):
        profiled(None)
    add("a")
    out = tmp_path / "all.parquet"
    hs.profile(tiny.task("transformer"), out=out, backend=SimulatedBackend(LatencyLaw.random(tiny.lowering("transformer").network)))
    with pytest.raises(IncompatibleTables):
        profiled(out)

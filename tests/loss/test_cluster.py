"""The workers of a Ray cluster refit and score as one process does, and one that dies costs what it was at."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import hwsearch as hs
from hwsearch.allocate.allocation import Allocation
from hwsearch.cli import app
from hwsearch.errors import HwsearchError, IncompatibleTables, InvalidInput
from hwsearch.loss.cluster import PARTS, RETRIES
from hwsearch.loss.table import SensitivityTable
from hwsearch.table.header import Header
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend

TESTS = Path(__file__).parents[1]
SPEC = f"{TESTS / 'tiny.py'}:cnn"
CPUS = 2


def device() -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network))


def scored(folder: Path, spec: str = SPEC, ray: str | None = None) -> SensitivityTable:
    """The sensitivities of the small CNN, in a folder with its refitted weights."""
    backend, grid = device(), {"stem": [24, 12], "conv1": [20, 8], "conv3": [16]}
    table = LatencyTable(Header(tiny.lowering("cnn").network, {}, backend.name, {}, {"base": "fp32"}, grid=grid))
    task = hs.load(spec)
    return hs.sensitivity(task, out=folder / "s.parquet", weights=folder / "weights", backend=backend, table=table, ray=ray)


def weights(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, list[float]]]]:
    """Of each file of refitted weights its header and its numbers."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            header = file.metadata()
        found[str(path.relative_to(folder))] = header, {k: t.tolist() for k, t in load_file(path).items()}
    return found


def when_made_left_out(table: SensitivityTable) -> SensitivityTable:
    return replace(table, created="")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SensitivityTable]:
    """What one process with one thread finds."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return folder, scored(folder)
    finally:
        torch.set_num_threads(threads)


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(HwsearchError, match=r"pip install 'hwsearch\[ray\]'"):
        scored(tmp_path, ray="auto")


def test_an_address_where_nothing_answers(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["sensitivity", SPEC, "-o", str(tmp_path / "s.parquet"), "--ray"]
    result = CliRunner().invoke(app, [*words, f"127.0.0.1:{port}"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"nothing answers at 127.0.0.1:{port}" in result.stderr
    assert "ray start" in result.stderr
    result = CliRunner().invoke(app, [*words, "somewhere"])
    assert result.exit_code == 2
    assert "expected auto, local or HOST:PORT" in result.stderr


def test_a_task_without_a_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="by its name"):
        hs.sensitivity(tiny.task("cnn"), backend=device(), ray="auto")


@pytest.fixture(scope="module")
def ray() -> Iterator[ModuleType]:
    """A cluster of two workers on this machine, which this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        module = pytest.importorskip("ray")
        module.init(
            address="local", num_cpus=CPUS, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR",
        )  # fmt: skip
        yield module
        module.shutdown()


def test_the_results_are_those_of_one_process(ray: ModuleType, alone: tuple[Path, SensitivityTable], tmp_path: Path) -> None:
    folder, table = alone
    found = scored(tmp_path, ray="auto")
    assert when_made_left_out(found) == when_made_left_out(table)
    assert when_made_left_out(SensitivityTable.load(tmp_path / "s.parquet")) == when_made_left_out(found)
    assert weights(tmp_path / "weights") == weights(folder / "weights") != {}
    assert ray.is_initialized(), "the connection was its caller's"


def test_a_cluster_that_this_process_is_not_connected_to(ray: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is connected to the Ray cluster at"):
        scored(tmp_path, ray="127.0.0.1:1")


def test_a_task_that_is_another_one_in_the_worker(ray: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "restless.py").write_text(
        f"import dataclasses, os, sys\nsys.path.insert(0, {str(TESTS)!r})\nimport tiny, torch\n\n"
        "def make_task():\n"
        "    torch.manual_seed(os.getpid())\n"
        "    return dataclasses.replace(tiny.task('cnn'), calibration=[torch.randn(32, 3, 8, 8)])\n"
    )
    with pytest.raises(IncompatibleTables, match=rf"on {socket.gethostname()}: .*is of other calibration data"):
        scored(tmp_path, f"{tmp_path / 'restless.py'}:make_task", "auto")


FATAL = """
import os, signal, sys

sys.path.insert(0, {tests!r})
import tiny
from hwsearch.loss import measure


def make_task():
    if os.getpid() != {here}:  # in a worker
        measure.divergence = counted(measure.divergence)
    return tiny.task("cnn")


def counted(real):
    calls = []

    def divergence(*args):
        calls.append(1)
        with open({log!r}, "a") as log:
            log.write("scored\\n")
        if len(calls) == 4:
            try:
                os.close(os.open({died!r}, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    return divergence
"""


@pytest.mark.slow
def test_a_worker_that_dies_costs_what_it_was_at(ray: ModuleType, alone: tuple[Path, SensitivityTable], tmp_path: Path) -> None:
    log, died = tmp_path / "log", tmp_path / "died"
    text = FATAL.format(tests=str(TESTS), here=os.getpid(), log=str(log), died=str(died))
    (tmp_path / "fatal.py").write_text(text)
    folder, table = alone
    found = scored(tmp_path, f"{tmp_path / 'fatal.py'}:make_task", "auto")
    assert died.exists(), "no worker died"
    assert when_made_left_out(found) == when_made_left_out(table)
    assert weights(tmp_path / "weights") == weights(folder / "weights")
    choices = sum(len(row) - 1 for row in (*table.loss.values(), *table.width_loss.values()))
    part = -(-choices // (PARTS * CPUS))
    again = len(log.read_text().splitlines()) - 3 * (choices + len(table.validation))
    assert 1 <= again <= part


@pytest.mark.slow
def test_work_that_kills_every_worker_ends_with_an_error(ray: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(TESTS)!r})\nimport tiny\n\n"
        "def make_task():\n"
        f"    if os.getpid() != {os.getpid()}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return tiny.task('cnn')\n"
    )
    with pytest.raises(HwsearchError, match=f"died at the same work {RETRIES + 1} times"):
        scored(tmp_path, f"{tmp_path / 'deadly.py'}:make_task", "auto")


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_a_run_answers_the_same(ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name, address in (("alone", None), ("cluster", "auto")):
        hs.run(hs.load(SPEC), ["size=40%"], tmp_path / name, backend=device(), ray=address)
    one, other = tmp_path / "alone", tmp_path / "cluster"
    tables = [when_made_left_out(SensitivityTable.load(folder / "sens.parquet")) for folder in (one, other)]
    assert tables[0] == tables[1]
    assert weights(one / "weights") == weights(other / "weights") != {}
    answers = [Allocation.load(folder / "alloc.json") for folder in (one, other)]
    assert answers[0].variants == answers[1].variants
    assert answers[0].widths == answers[1].widths
    assert (one / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()

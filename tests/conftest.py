"""Fixtures shared by all tests."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from torch.utils import _pytree as pytree

from hwsearch.backends.cuda import driver
from hwsearch.device.fingerprint import cache_dir
from hwsearch.device.lock import lock
from hwsearch.errors import BackendUnavailable
from hwsearch.graph.canonical import is_get_attr, tensor_attr
from hwsearch.graph.export import weights_digest
from hwsearch.graph.trace import Traced
from hwsearch.lowering import lowering
from hwsearch.lowering.marked import export
from hwsearch.table.table import LatencyTable

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # workers side by side profile with locks of their own, and share the zoo
    _zoo, _own = cache_dir() / "zoo", Path(tempfile.mkdtemp(prefix="hwsearch-tests-"))
    (_own / "zoo").symlink_to(_zoo)
    os.environ["HWSEARCH_CACHE"] = str(_own)

pytest.register_assert_rewrite("hwsearch.testing.contract")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU run where there is one, and are listed as not run where there is none."""
    try:
        driver()
    except BackendUnavailable as error:
        not_run = pytest.mark.skip(reason=f"not run, it needs an NVIDIA GPU: {error}")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(not_run)


@pytest.fixture(autouse=True, scope="session")
def exported_once() -> Iterator[None]:
    """Equal graphs are exported once in a worker: many tests set the same few networks up, and that was a quarter of their time."""
    made: dict[str, onnx.ModelProto] = {}

    def once(traced: Traced) -> onnx.ModelProto:
        key = _content(traced)
        if key not in made:
            made[key] = export(traced)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "export", once)
        yield


def _content(traced: Traced) -> str:
    """A digest of all that an export depends on: the code, every tensor, the arguments, and where units are."""
    graph = traced.graph
    tensors = [(str(n.target), tensor_attr(graph, str(n.target))) for n in graph.graph.nodes if is_get_attr(n)]
    arguments = [(f"{i}", x) for i, x in enumerate(pytree.tree_leaves((traced.args, traced.kwargs)))]
    words = [graph.code, traced.sites, traced.stored, traced.paths]
    held = [(n, x) for n, x in (*tensors, *arguments) if isinstance(x, torch.Tensor)]
    first: dict[int, str] = {}
    words += [(n, x) for n, x in arguments if not isinstance(x, torch.Tensor)]
    words += [(n, first.setdefault(x.data_ptr(), n)) for n, x in held]  # tied tensors are exported as one
    return hashlib.sha256((repr(words) + weights_digest(held)).encode()).hexdigest()


@pytest.fixture
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test alone: another profile on this machine must not make it fail."""
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def busy(own_locks: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """Makes a device busy for others: its lock is held by another thread, and nobody waits for it."""
    monkeypatch.setattr("hwsearch.device.lock.WAIT_S", 0.0)

    @contextmanager
    def held(device_id: str) -> Iterator[None]:
        has, done = threading.Event(), threading.Event()

        def hold() -> None:
            with lock(device_id):
                has.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        has.wait()
        try:
            yield
        finally:
            done.set()
            thread.join()

    return held


@pytest.fixture(scope="session")
def widths_table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LatencyTable]:
    """A profile over widths and precisions of the simulated device of `profiling.narrow_law`, and its file."""
    from profiling import narrow_setup, run_widths

    out = tmp_path_factory.mktemp("widths") / "t.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HWSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        return out, run_widths(narrow_setup(noise=0.0005), out)

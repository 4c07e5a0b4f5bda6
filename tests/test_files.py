"""Files are whole or as they were, whatever the disk does; what made a file is compared by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulation import grouped, scores, simulated_table

from hwsearch import files
from hwsearch.allocate.search import front, search
from hwsearch.cli.ending import _explain
from hwsearch.errors import HwsearchError
from hwsearch.plot import plot_front
from hwsearch.testing import LatencyLaw

NETWORK = grouped()


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("broken", "number", "todo"),
    [
        ("fsync", errno.ENOSPC, "free some space"),
        ("fsync", errno.EDQUOT, "free some space"),
        ("replace", errno.EROFS, "not read-only"),
        ("replace", errno.EACCES, "may write to"),
        ("fsync", errno.EIO, "another place"),
    ],
)
@pytest.mark.parametrize("old", [b"as it was", None])
def test_a_disk_that_takes_nothing_names_the_file_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, number: int, todo: str, old: bytes | None
) -> None:
    path = tmp_path / "t.parquet"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, broken, failing(number))
    with pytest.raises(HwsearchError) as caught:
        files.write_bytes(path, b"new")
    line, code = _explain(caught.value)
    assert (code, str(path) in line, todo in line, os.strerror(number) in line) == (1, True, True, True)
    assert ("as it was" in line) == (old is not None)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old is not None else [])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for attempt in (
        lambda: files.make_folder(tmp_path / "file" / "out"),
        lambda: files.write_bytes(tmp_path / "file" / "out" / "t.parquet", b""),
    ):
        with pytest.raises(HwsearchError, match=r"file/out.*cannot be written.*folders are no files"):
            attempt()


def test_every_writer_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = simulated_table(NETWORK, LatencyLaw.random(NETWORK), design=4, noise=0.02)
    own = scores(NETWORK, {})
    found, sweep = search(table, own, ["latency=80%"]), front(table, own, points=3)
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    writers: dict[str, Callable[[Path], Any]] = {
        "table.parquet": table.save,
        "sens.parquet": own.save,
        "alloc.json": found.save,
        "front.parquet": sweep.save,
        "front.png": lambda path: plot_front(sweep, path),
        "copy.onnx": lambda path: files.copy(tmp_path / "model.onnx", path),
    }
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    for name, write in writers.items():
        with pytest.raises(HwsearchError, match=rf"{name} cannot be written.*free some space"):
            write(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "a", b"1" * 100_000)
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1" * 100_000


def test_what_changed_is_named_and_shown_where_it_is_short() -> None:
    made = {"seed": "0", "calibration data": "0123456789abcdef", "method": "1"}
    assert files.changed(made, made) == ""
    assert files.changed(made, {**made, "seed": "1"}) == "seed (0, now 1)"
    assert files.changed(made, {**made, "calibration data": "fedcba9876543210", "seed": "3"}) == (
        "seed (0, now 3), calibration data"
    )
    assert files.changed(made, {**made, "weights": "ff"}) == "weights (none, now ff)"
    assert "does not say" in files.changed({}, made)

"""`hwsearch init`: a task file that runs as it is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from invoking import invoke

import hwsearch as hs
from hwsearch.cli.starting import template


def test_it_writes_the_template_and_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("init")
    assert result.exit_code == 0
    assert Path("task.py").read_text() == template()
    assert "hwsearch run task.py:make_task --budget latency=50% --out out" in result.stdout
    below = invoke("init", "a/b")
    assert below.exit_code == 0
    assert Path("a/b/task.py").read_text() == template()
    assert "hwsearch run a/b/task.py:make_task" in below.stdout


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("mine")
    result = invoke("init", str(tmp_path))
    assert result.exit_code == 2
    assert "is not overwritten" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "task.py").read_text() == "mine"


def test_the_folder_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert invoke("init", str(tmp_path / "file")).exit_code == 2


def test_the_template_explains_every_field_of_a_task() -> None:
    lines = template().splitlines()
    for field in dataclasses.fields(hs.Task):
        given = [i for i, line in enumerate(lines) if re.match(rf"        {field.name}=", line)]
        assert len(given) == 1, field.name
        assert lines[given[0] - 1].strip().startswith("#"), f"no comment above {field.name}"


def test_the_help_has_an_example() -> None:
    assert "Example: hwsearch init" in invoke("init", "--help").stdout


def test_the_task_loads_and_is_scored(tmp_path: Path) -> None:
    from hwsearch.lowering.lowering import Lowering

    assert invoke("init", str(tmp_path)).exit_code == 0
    spec = f"{tmp_path / 'task.py'}:make_task"
    task = hs.load(spec)
    assert task.evaluate(task.model.eval()) > 0.9
    network = Lowering(task).network
    assert network.channels
    assert Lowering(hs.load(spec)).network.weights_digest == network.weights_digest


@pytest.mark.slow
@pytest.mark.usefixtures("own_locks")
def test_it_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("init").exit_code == 0
    result = invoke(*"run task.py:make_task --budget latency=50% --out out --time-limit 20s".split())
    assert result.exit_code in (0, 3), result.stderr  # a busy machine may miss a budget
    assert Path("out/report.json").is_file()

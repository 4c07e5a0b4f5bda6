"""How commands end: one line and an exit code, whatever happens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from invoking import Install, Table, invoke, raising

from hwsearch.cli.ending import _left_by
from hwsearch.errors import (
    BudgetMissed,
    DeviceBusy,
    HwsearchError,
    Infeasible,
    InvalidInput,
    UntraceableModel,
)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (HwsearchError("went wrong"), 1, "error: went wrong"),
        (InvalidInput("no such task;\n  try zoo:x"), 2, "error: no such task; try zoo:x"),
        (DeviceBusy("busy, pid 12"), 1, "error: busy, pid 12"),
        (Infeasible("at least 5 ms", {"latency": 5e6}), 3, "error: at least 5 ms"),
        (BudgetMissed("nearest 6 ms"), 3, "error: nearest 6 ms"),
        (OSError(28, "Disk full", "t.parquet"), 1, "error: Disk full: t.parquet; run again with --debug"),
        (ValueError("odd"), 1, "error: unexpected ValueError: odd; run again with --debug"),
        (RuntimeError("sizes differ\n\nWhile executing %mm : [num_users=1]\nOriginal traceback:\nUse tlparse to see"), 1,
         "error: unexpected RuntimeError: sizes differ; run again with --debug"),
        (UntraceableModel("no\nFor more, run with TORCH_LOGS=dynamic"), 1, "error: no"),
        (KeyboardInterrupt(), 130, "interrupted: what was finished is on disk, the same command goes on from there"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_an_exit_code(
    api: Install, error: BaseException, code: int, line: str
) -> None:
    api(profile=raising(error))
    result = invoke("profile", "zoo:x", "-o", "t.parquet")
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"{line}\n", "")


@pytest.mark.parametrize(
    ("words", "resumed"),
    [
        (("profile", "zoo:x", "-o", "t.parquet"), True),
        (("sensitivity", "zoo:x", "--output=s.parquet"), True),
        (("run", "zoo:x", "--budget", "latency=50%", "--out", "out"), True),
        (("bayes", "zoo:x", "--scheme", "s.py:s", "--floor", "98%", "--out", "out"), True),
        (("verify", "zoo:x", "--alloc", "a.json", "-o", "r.json"), False),
        (("search", "--table", "t", "--sensitivity", "s", "--budget", "size=50%", "-o", "a.json"), False),
    ],
)
def test_the_same_command_goes_on_is_said_where_it_does(words: tuple[str, ...], resumed: bool) -> None:
    assert ("goes on" in _left_by(words)) == resumed
    assert ("begins anew" in _left_by(words)) == (not resumed)


@pytest.mark.parametrize(
    "words", [("--debug", "profile", "zoo:x", "-o", "t"), ("profile", "zoo:x", "-o", "t", "--debug")]
)
@pytest.mark.parametrize("error", [InvalidInput("bad"), ValueError("odd")])
def test_debug_shows_the_traceback_before_or_after_the_command(
    api: Install, words: tuple[str, ...], error: Exception
) -> None:
    api(profile=raising(error))
    result = invoke(*words)
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "--debug" not in result.stderr.splitlines()[-1]
    assert result.exit_code == (2 if isinstance(error, InvalidInput) else 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("profile",), "Missing argument 'TASK'"),
        (("profile", "zoo:x"), "--output"),
        (("profile", "zoo:x", "-o", "t", "--threads", "0"), "--threads"),
        (("profile", "zoo:x", "-o", "t", "--mode", "sideways"), "sandwiched"),
        (("profile", "zoo:x", "-o", "t", "--time-limit", "soon"), "'soon' is no duration"),
        (("search", "--table", "t", "--sensitivity", "s", "-o", "a"), "--budget"),
        (("front", "--table", "t", "--sensitivity", "s", "-o", "a", "--points", "1"), "--points"),
        (("frobnicate",), "frobnicate"),
        (("devices", "--nonsense"), "--nonsense"),
        (("table",), "command"),
    ],
)
def test_usage_errors_are_one_line_and_2(words: tuple[str, ...], said: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_output_that_is_a_folder(tmp_path: Path) -> None:
    result = invoke("profile", "zoo:x", "-o", str(tmp_path))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "directory" in result.stderr


def test_warnings_of_dependencies_are_for_debugging(api: Install) -> None:
    def profile(*args: Any, **kwargs: Any) -> Table:
        warnings.warn("some day this will change", FutureWarning, stacklevel=1)
        return Table()

    api(profile=profile)
    assert invoke("profile", "zoo:x", "-o", "t").stderr == ""
    with pytest.warns(FutureWarning, match="some day"):
        invoke("profile", "zoo:x", "-o", "t", "--debug")

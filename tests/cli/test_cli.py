"""The whole command line: its help, quickly, and every step from the files of those before."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
from invoking import invoke

import hwsearch as hs
from hwsearch.cli import app, arguments, sections


def test_help_needs_no_heavy_module_and_no_patience() -> None:
    code = (
        "import sys; from hwsearch import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pandas', 'numpy', 'scipy', 'onnx', 'openvino', 'onnxruntime', 'matplotlib', 'pyarrow'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = os.times()
    assert "loaded: []" in done.stdout
    assert "profile" in done.stdout
    # Processor time, not the clock on the wall: it takes 0.25 s, and half a second is promised on an idle machine.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize(
    "command",
    [
        "devices",
        "doctor",
        "profile",
        "table",
        "table show",
        "table staircase",
        "sensitivity",
        "search",
        "front",
        "bayes",
        "deploy",
        "verify",
        "run",
    ],
)
def test_every_command_has_help(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: hwsearch " + command in result.stdout


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, inner in command.commands.items():
        yield (*path, name), inner
        if hasattr(inner, "commands"):
            yield from _commands(inner, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_has_an_example_that_the_command_takes(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    label, _, example = (command.epilog or "").partition(": ")
    assert label == "Example"
    hwsearch, *words = shlex.split(example)
    assert hwsearch == "hwsearch"
    assert tuple(words[: len(path)]) == path
    command.make_context(path[-1], words[len(path) :])
    shown = " ".join(invoke(*path, "--help").stdout.split())
    assert f"Example: {example}" in shown


def test_options_that_choose_a_table_are_a_panel() -> None:
    for words in (("table", "show"), ("search",), ("front",)):
        shown = invoke(*words, "--help").stdout
        options, _, panel = shown.partition(f"{sections.PANEL}:")
        for name in ("--threads", "--batch", "--base", "--shape", "--load", "--clocks", "--int8-bits"):
            assert name in panel
            assert name not in options
    for words in (("profile",), ("run",)):
        _, _, panel = invoke(*words, "--help").stdout.partition(f"{arguments.MADE}:")
        assert all(name in panel for name in ("--threads", "--batch", "--base", "--load"))


def test_run_takes_what_profile_and_verify_take() -> None:
    """But for what stands in its folder, or is the task's."""
    own = {name: {o for p in COMMANDS[(name,)].params for o in p.opts} for name in ("run", "profile", "verify")}
    assert (own["profile"] | own["verify"]) - own["run"] == {
        "--output", "--shape", "--table", "--trace", "--weights", "allocation",
    }  # fmt: skip


def test_shells_complete_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_HWSEARCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "hwsearch pro")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert invoke().stdout.split() == ["profile"]


def test_without_words_it_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert "Usage: hwsearch" in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"hwsearch {hs.__version__}\n"


@pytest.mark.usefixtures("own_locks")
def test_every_step_on_a_real_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile, score, search, deploy and verify a tiny network with widths, each from the files of those before."""
    monkeypatch.undo()  # the overview
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))
    spec = f"{Path(tiny.__file__)}:cnn"
    table, scores, alloc, model, report = (
        str(tmp_path / name) for name in ("t.parquet", "s.parquet", "a.json", "m.onnx", "r.json")
    )
    weights = str(tmp_path / "weights")

    def ok(*words: str) -> Any:
        result = invoke(*words, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    made = ok("profile", spec, "-o", table, "--backend", "onnxruntime", "--time-limit", "20s")
    assert set(made["grid"]) == {"stem", "conv1", "conv3"}
    steps = ok("table", "staircase", table)
    lost = ok(
        "sensitivity", spec, "-o", scores, "--backend", "onnxruntime", "--table", table, "--weights", weights
    )
    assert set(lost["width_loss"]) <= {s["group"] for s in steps}
    files = ("--table", table, "--sensitivity", scores)
    found = ok("search", *files, "--budget", "size=70%", "--keep", "stem", "-o", alloc)
    assert found["widths"]["stem"] == 24
    assert found["predicted"]["size_bytes"] <= found["budgets"][0]["limit"]
    swept = ok("front", *files, "--points", "4", "-o", str(tmp_path / "f.parquet"))
    assert swept["groups"] == ["stem", "conv1", "conv3"]
    deployed = ok("deploy", spec, alloc, "-o", model, "--weights", weights)
    assert deployed["size_bytes"] == Path(model).stat().st_size
    verified = ok("verify", spec, alloc, "-o", report, "--table", table, "--weights", weights)
    assert verified["met"]
    assert verified["widths"] == {
        g: [w, n] for (g, w), n in zip(found["widths"].items(), (24, 20, 16), strict=True)
    }

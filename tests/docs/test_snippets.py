"""Every code block of README.md and docs/*.md is executed, or, where a comment before it says why, parsed.

Blocks are fenced with their language. One Python namespace and one temporary folder for each page:

- `python`: executed in order. One that begins with `# name.py` is also written to that file.
- `console`: each line is a command of `hwsearch` and runs in this process; `pip install` and `scripts/...` are checked against
  pyproject.toml and the file system.
- `text`, `json`, `toml`: shown only, JSON and TOML parsed. A block of another language, or indented, is an error.

A comment on the line before a block changes that:

- `<!-- parsed: REASON -->`: only parsed. Commands against the options of the command line, Python calls of hwsearch against
  signatures.
- `<!-- run: A is B, --option is VALUE -->`: run with A in the place of B, and profiles with these options, so that it is quick.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import hwsearch as hs
from hwsearch.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = ("text", "json", "toml")
VERDICTS = {"table recheck": 1, "table diagnose": 2, "verify": 3}
"""Exit codes that say what was measured, on a busy machine too: a table that does not hold, too few builds, a missed budget."""
RENDERED = re.compile(r"^\{[\w-]+\}|^:::")  # MyST directives

_FENCE = re.compile(r"^(`{3,})\s*(.*)$")
_MARK = re.compile(r"^<!-- (parsed|run): (\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """One code block; how: `parsed` or `run`, and why or with what, by the comment before it."""

    page: str
    line: int
    language: str
    text: str
    how: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    lines = path.read_text(encoding="utf-8").splitlines()
    fence, begun, language, kept = "", 0, "", list[str]()
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if fence:
            if match and match[1] == fence and not match[2]:
                mark = _MARK.match(lines[begun - 2]) if begun > 1 else None
                if not RENDERED.match(language):
                    how, why = mark.groups() if mark else ("", "")
                    yield Block(path.name, begun, language, "\n".join(kept) + "\n", how, why)
                fence = ""
            else:
                kept.append(line)
        elif match:
            fence, begun, language, kept = match[1], number, match[2], []
        elif line.startswith("    ") and number > 1 and not lines[number - 2].strip():
            yield Block(path.name, number, "", line)  # indented: no language can be told
    assert not fence, f"{path.name}:{begun}: a block without an end"


def commands(block: Block) -> list[list[str]]:
    """The words of each line, comments left out."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


ALL = {path.name: list(blocks(path)) for path in PAGES}
TASKS = ("image_task", "text_task", "audio_task")


@pytest.fixture
def page_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page: with locks of its own, and the repository's profiles."""
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


def test_pages_are_found() -> None:
    assert {"README.md", "start.md", "your_own_network.md", "commands.md", "extending.md"} <= set(ALL)
    assert sum(map(len, ALL.values())) > 30


@pytest.mark.parametrize("block", [b for own in ALL.values() for b in own], ids=str)
def test_a_block_names_its_language(block: Block) -> None:
    known = ("python", "console", *SHOWN)
    assert block.language in known, f"{block}: fence it and name its language, one of {', '.join(known)}"
    assert not block.how or block.language in ("python", "console"), f"{block}: nothing of it is run"
    if block.how != "run":
        return
    assert all(" is " in part for part in block.why.split(", ")), f"{block}: write `A is B, ...`"


LONG = {"commands.md"}
"""Every command in order, on a real runtime; scripts/test has `tests/cli/test_cli.py` of them."""


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] * (p in LONG)) for p, own in ALL.items() if own]
)
def test_the_snippets_of_a_page(page: str, page_folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for block in ALL[page]:
        if block.language == "python":
            _parse_python(block)
            if block.how != "parsed":
                _execute(block, namespace, page_folder)
        elif block.language == "console":
            for words in commands(block):
                run = block.how != "parsed"
                _command(block, _substituted(block, words) if run else words, run=run)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)


def _execute(block: Block, namespace: dict[str, Any], folder: Path) -> None:
    first = block.text.partition("\n")[0]
    name = first.removeprefix("# ") if re.fullmatch(r"# \w+\.py", first) else f"line{block.line}.py"
    path = folder / name
    path.write_text(block.text)
    namespace["__file__"] = str(path)
    exec(compile(block.text, str(path), "exec"), namespace)


def _parse_python(block: Block) -> None:
    """Calls of `hs.NAME(...)` fit the signatures of hwsearch's own functions."""
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hs":
            assert node.attr in (*hs.__all__, "schemes"), f"{block}: hwsearch has no {node.attr}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "hs":
            named = {k.arg: None for k in node.keywords if k.arg}
            inspect.signature(getattr(hs, node.func.attr)).bind(*node.args, **named)


def _substituted(block: Block, words: list[str]) -> list[str]:
    """The words with what `<!-- run: ... -->` puts in their place; its options are for profiles."""
    if block.how != "run" or words[0] != "hwsearch":
        return words
    pairs = [part.split(" is ") for part in block.why.split(", ")]
    texts = {old: new for old, new in pairs if not old.startswith("--")}
    words = [texts.get(word, word) for word in words]
    if words[1] in ("profile", "run", "sensitivity"):
        # Of these three only profiles and runs have a time limit.
        words += [
            w for old, new in pairs if old.startswith("--") and (old != "--time-limit" or words[1] != "sensitivity")
            for w in (old, new)
        ]  # fmt: skip
    return words


def _command(block: Block, words: list[str], *, run: bool) -> None:
    while words[0] in ("sudo", "env", "-E") or re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] in ("accelerate", "torchrun"):  # which start a module in several processes
        words = words[words.index("-m") + 1 :]
    if words[0] == "hwsearch":
        _parse_command(block, words[1:])
        if run:
            result = CliRunner().invoke(app, words[1:])
            fine = {0, next((code for verdict, code in VERDICTS.items() if shlex.join(words[1:]).startswith(verdict)), 0)}
            assert result.exit_code in fine, f"{block}: {shlex.join(words)}: {result.stderr}"
            if words[1] == "profile":
                _go_on(words)
    elif words[:2] == ["pip", "install"]:
        _install(block, words[2:])
    elif words[0] == "sphinx-build":
        assert not run, f"{block}: scripts/check runs it"
    else:
        _script(block, words)


def _go_on(words: list[str]) -> None:
    """On a busy machine the short time limit ends a profile before any width is known: the same command goes on."""
    path = words[words.index("-o") + 1]
    for _ in range(3):
        if any(len(steps) > 1 for steps in hs.LatencyTable.load(path).grid().values()):
            return
        assert CliRunner().invoke(app, words[1:]).exit_code == 0


def _parse_command(block: Block, words: list[str]) -> None:
    """Every option exists, and every value is one that it takes. Paths need not be there."""
    command, path = typer.main.get_command(app), "hwsearch"
    context = command.make_context(path, [], resilient_parsing=True)
    while hasattr(command, "commands"):
        assert (words or [""])[0] in command.commands, f"{block}: {path} has no command {words[:1]}"
        path, command, words = f"{path} {words[0]}", command.commands[words[0]], words[1:]
    try:
        command.make_context(path, list(words), parent=context)
    except Exception as error:
        pytest.fail(f"{block}: {path} {shlex.join(words)}: {error}")


def _install(block: Block, words: list[str]) -> None:
    """The extra is one of pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match = re.fullmatch(r"(?:\.|hwsearch)\[([\w,-]+)\]", words[-1])
    assert match, f"{block}: pip install {words[-1]}"
    assert set(match[1].split(",")) <= set(project["optional-dependencies"]), f"{block}: {words[-1]}"
    assert words[:-1] in (["-e"], []), f"{block}: pip install {shlex.join(words)}"


def _script(block: Block, words: list[str]) -> None:
    """The script is there. Its shell is right; of a Python one the options are in its help; steps of the trial exist."""
    if words[0] in ("bash", "python"):
        words = words[1:]
    path = ROOT / words[0]
    assert path.is_file(), f"{block}: there is no {words[0]}"
    text = path.read_text()
    if path.suffix != ".py":
        assert text.startswith("#!/usr/bin/env bash"), f"{block}: {words[0]} is no shell script"
        subprocess.run(["bash", "-n", str(path)], check=True)
        for word in words[1:]:
            assert re.search(rf"\b{re.escape(word)}\b", text), f"{block}: {words[0]} knows no {word}"
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, f"{block}: {words[0]} --help: {done.stderr}"
    for option in (w for w in words[1:] if w.startswith("--")):
        assert option in done.stdout, f"{block}: {words[0]} has no {option}"


def _write_task(name: str, folder: Path) -> Path:
    (block,) = (b for b in ALL["your_own_network.md"] if b.text.startswith(f"# {name}.py\n"))
    path = folder / f"{name}.py"
    path.write_text(block.text)
    return path


@pytest.mark.parametrize("name", TASKS)
def test_a_worked_task_is_traced_with_channels_to_choose_from(name: str, page_folder: Path) -> None:
    from hwsearch.lowering.lowering import Lowering

    spec = f"{_write_task(name, page_folder)}:make_task"
    low = Lowering(hs.load(spec))
    assert low.network.channels
    assert len(low.network.units) >= 4
    assert Lowering(hs.load(spec)).network.weights_digest == low.network.weights_digest


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_worked_task_runs_through_the_pipeline(name: str, page_folder: Path) -> None:
    """By the command of the page, with a shorter time limit."""
    _write_task(name, page_folder)
    (words,) = (
        c for b in ALL["your_own_network.md"] if b.language == "console" for c in commands(b) if f"{name}.py:make_task" in c
    )
    out = Path(words[words.index("--out") + 1])
    result = CliRunner().invoke(app, [*words[1:], "--time-limit", "20s"])
    assert result.exit_code in (0, 3), result.stderr  # a busy machine may miss a budget
    assert (out / "report.json").is_file()
    assert (out / "model.onnx").is_file()

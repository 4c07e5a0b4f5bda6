"""How every command ends: an error is one line on standard error and an exit code; `--debug` adds the traceback."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hwsearch.errors import HwsearchError

INTERRUPTED = 130
RESUMED = ("profile", "sensitivity", "run", "bayes")
"""Commands that leave in their output what they have finished, and go on from there."""
MISSED = 3
_ADVICE = re.compile(r"tlparse|TORCH_LOGS|TORCHDYNAMO_|TORCH_COMPILE_DEBUG|TORCH_SHOW_CPP_STACKTRACES")


class Command(TyperCommand):
    """Its help has the options of each panel under the panel's name, as rich would show them, at once."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Called by typer."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(param, "rich_help_panel", None) or usual, []).append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Called by typer; an example stays one line, to be copied."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(f"  {self.epilog}\n")


class Group(TyperGroup):
    """Turns every error into one line on standard error and an exit code; `--debug` adds the traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # it may stand anywhere, before the command or after it
        words = [word for word in words if word != "--debug"] or ["--help"]
        try:
            with warnings.catch_warnings():
                if (
                    not debug and not sys.warnoptions
                ):  # of our dependencies to theirs: nothing a user could act on
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                code = super().main(words, "hwsearch", complete_var, False, windows_expand_args, **extra) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = _explain(error)
            say(message if debug or not _unforeseen(error) else f"{message}; run again with --debug")
        if code == INTERRUPTED:
            say(f"interrupted: {_left_by(words)}")
        if standalone_mode:
            sys.exit(code)
        return code


def _left_by(words: Sequence[str]) -> str:
    """What an interrupted command has left, and what it does when it is given again."""
    command = next((word for word in words if not word.startswith("-")), "")
    if command in RESUMED and any(word.startswith(("-o", "--out")) for word in words):
        return "what was finished is on disk, the same command goes on from there"
    return "the same command begins anew"


def _explain(error: Exception) -> tuple[str, int]:
    """(line for standard error, exit code)."""
    if isinstance(error, HwsearchError):
        return f"error: {_own_words(error)}", error.exit_code
    if isinstance(error, typer.TyperException):  # usage: an unknown option, a missing argument
        path = getattr(getattr(error, "ctx", None), "command_path", "hwsearch")
        return f"error: {error.format_message().rstrip('. ')} (see `{path} --help`)", error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.strerror}: {error.filename}", 1
    return f"error: unexpected {type(error).__name__}: {_own_words(error)}", 1


def _own_words(error: Exception) -> str:
    """What an error says, without what torch adds for those who develop it: the node, its traceback, tools and variables."""
    text = str(error).partition("\n\nWhile executing %")[0]
    return "\n".join(line for line in text.splitlines() if not _ADVICE.search(line)) or type(error).__name__


def _unforeseen(error: Exception) -> bool:
    return not isinstance(error, HwsearchError | typer.TyperException)


def say(message: str) -> None:
    """A line on standard error."""
    print(" ".join(message.split()), file=sys.stderr)

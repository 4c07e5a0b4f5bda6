"""How Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build/html`, without a network.

The directive `command-line` writes the help of every command, as `hwsearch COMMAND --help` prints it, at build time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hwsearch  # noqa: E402

project = "hwsearch"
version = release = hwsearch.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "gpu_trial_h100"]
html_theme = "furo"
html_title = f"hwsearch {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings mark names by single backquotes
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "Source")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
add_module_names = False
python_maximum_signature_line_length = 88


class CommandLine(SphinxDirective):
    """A section for each command with its help."""

    has_content = False
    wide = 100

    def run(self) -> list[nodes.Node]:
        """Sections in the order of `hwsearch --help`; those of a group of commands follow one another."""
        import typer

        from hwsearch.cli import app

        self.env.note_reread()
        return [self._section(path, text) for path, text in self._help(typer.main.get_command(app), ("hwsearch",), None)]

    def _help(self, command: Any, path: tuple[str, ...], parent: Any) -> Iterator[tuple[str, str]]:
        settings = {**command.context_settings, "terminal_width": self.wide, "max_content_width": self.wide}
        context = command.make_context(path[-1], [], parent=parent, resilient_parsing=True, **settings)
        yield " ".join(path), command.get_help(context)
        for name, inner in getattr(command, "commands", {}).items():
            yield from self._help(inner, (*path, name), context)

    def _section(self, path: str, text: str) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(path)], names=[nodes.fully_normalize_name(path)])
        section += nodes.title(text=path)
        section += nodes.literal_block(text, text, language="text")
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}

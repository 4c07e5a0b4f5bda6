"""What may be shown to others: texts without the folders and the name of whoever ran this."""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from typing import Any


def shared(value: Any) -> Any:
    """The same without names of folders and of the user, in all texts of a JSON-like value."""
    if isinstance(value, dict):
        return {key: shared(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [shared(v) for v in value]
    return _without_places(value) if isinstance(value, str) else value


_FOLDERS = re.compile(r"(?<![\w/\\.:-])(?:[A-Za-z]:)?(?:[/\\][^/\\\s'\"`:;,()<>|]+)+[/\\]")
"""Of an absolute path everything before its last name."""


def _without_places(text: str) -> str:
    text = _FOLDERS.sub(".../", text.replace(str(Path.home()), "~"))
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return text
    return text if user == "root" else re.sub(rf"\b{re.escape(user)}\b", "USER", text)

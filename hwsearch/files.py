"""Files: written so that a killed writer leaves the old one whole, and what made one compared with what would make it now."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hwsearch.errors import HwsearchError

_WRITING = ".writing"
_LEFT_S = 60.0
_WHAT_TO_DO = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EROFS: "give a place that is not read-only",
    errno.EACCES: "give a folder that you may write to",
    errno.EPERM: "give a folder that you may write to",
    errno.EISDIR: "give the name of a file, not of a folder",
    errno.ENOTDIR: "give a place whose folders are no files",
    errno.EEXIST: "give a place whose folders are no files",
}


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file and put it in place in one step. Raises HwsearchError where the disk is full or must not be written to."""
    _write(Path(path), lambda file: file.write(data))


def copy(source: str | Path, path: str | Path) -> None:
    """Copy a file as `write_bytes` writes one."""
    with open(source, "rb") as read:
        _write(Path(path), lambda file: shutil.copyfileobj(read, file))


def make_folder(path: str | Path) -> None:
    """Make a folder and those it is in. Raises HwsearchError where that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def remove_unfinished(folder: str | Path) -> None:
    """Remove what killed writers left in a folder and those in it; what is younger than a minute may still be written."""
    for path in Path(folder).rglob(f".*{_WRITING}"):
        with suppress(OSError):  # it is in place by now, or not ours to remove
            if time.time() - path.stat().st_mtime > _LEFT_S:
                path.unlink()


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=_WRITING)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: str | Path, error: OSError) -> HwsearchError:
    """Why a file cannot be written, what is left of it, and what to do."""
    todo = _WHAT_TO_DO.get(error.errno or 0, "give another place, or mend this one")
    kept = "; the file that is there is as it was" if Path(path).is_file() else ""
    return HwsearchError(f"{path} cannot be written: {error.strerror or error}{kept}; {todo}, then run again")


def changed(made_of: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between what a file was made of and what it would be made of now, by name; empty for nothing.

    Values are shown where they are short: others are digests.
    """
    if not made_of:
        return "what made it, which it does not say"
    named = []
    for what in dict.fromkeys([*now, *made_of]):
        old, new = made_of.get(what, "none"), now.get(what, "none")
        if old != new:
            named.append(f"{what} ({old}, now {new})" if max(len(old), len(new)) < 12 else what)
    return ", ".join(named)

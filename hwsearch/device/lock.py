"""Locks across the processes of a user: one measurement at a time on a device, one writer at a time of a folder or file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from hwsearch.device.fingerprint import cache_dir
from hwsearch.errors import DeviceBusy, InvalidInput

WAIT_S = 600.0
"""How long a command waits for another to end."""
_POLL_S = 0.05
_NAMED_S = 1.0
"""How long a wait goes on in silence until the holder, which first locks and then writes its name, is known."""
_held: dict[tuple[Path, int, int], int] = {}
"""How often each lock is held, by its file, process and thread."""


def lock(
    device_id: str, wait_s: float | None = None, say: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """One measurement at a time on a device: holds a lock of this user, across processes, while the block runs.

    The system releases the lock when its holder dies, however it dies. A thread that holds it gets it again.

    Args:
        device_id: `Device.id`.
        wait_s: Seconds to wait for another holder; None for `WAIT_S`.
        say: Is told who holds it and since when, once, before the wait; None for a warning.

    Raises:
        DeviceBusy: Another process or thread holds it still; the message names it.
        InvalidInput: No lock file can be kept.
    """
    return _hold(f"{device_id}.lock", "this device", "two at once would disturb each other's times", wait_s, say)


def lock_path(
    path: Path, wait_s: float | None = None, say: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """One writer at a time of a folder or file, as `lock`."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return _hold(f"path-{name}.lock", str(path), "two at once would mix their files", wait_s, say)


@contextmanager
def _hold(
    name: str, what: str, why: str, wait_s: float | None, say: Callable[[str], None] | None
) -> Iterator[None]:
    path = cache_dir() / "locks" / name
    key = (path, os.getpid(), threading.get_ident())
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        wait_s = WAIT_S if wait_s is None else wait_s
        began, said = time.monotonic(), False
        while not _try_lock(file, path):
            named, busy = _busy(file, path, what, why)
            waited = time.monotonic() - began
            if waited >= wait_s:
                raise DeviceBusy(busy)
            if not said and (named or waited >= _NAMED_S):
                (say or _warn)(f"{busy}; waiting for it, {wait_s:.0f} s at most")
                said = True
            time.sleep(_POLL_S)
        holder = {"pid": os.getpid(), "command": _command(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, json.dumps(holder).encode())
        _held[key] = 1
        yield
    finally:
        if _held.pop(key, None):
            os.ftruncate(file, 0)  # the next holder must not be called by this one's name
        os.close(file)  # releases the lock


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: int, path: Path) -> bool:
        os.lseek(
            file, 1 << 30, os.SEEK_SET
        )  # locked bytes cannot be read: lock one far past the holder's name
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise _unusable(path, error) from error
        return True

else:
    import fcntl

    def _try_lock(file: int, path: Path) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise _unusable(path, error) from error
        return True


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _unusable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"cannot keep a lock at {path} ({error.strerror}); set HWSEARCH_CACHE to a local folder that you may write"
    )


def _busy(file: int, path: Path, what: str, why: str) -> tuple[bool, str]:
    """Whether the holder's name is known, and what to say."""
    os.lseek(file, 0, os.SEEK_SET)
    try:
        holder = json.loads(os.read(file, 4096))
        pid, command, since = int(holder["pid"]), holder["command"], holder["since"]
    except (ValueError, KeyError, TypeError):  # the holder has the lock but has not yet written its name
        return False, f"another process is about to use {what} (lock {path}); wait for it to end, then try again"
    return True, (
        f"{what} is in use by pid {pid} (`{command}`, since {since}); {why}: wait until it ends, or stop it with "
        f"`kill {pid}` (what it has measured is kept)"
    )


def _command() -> str:
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    return command if len(command) <= 200 else command[:199] + "…"

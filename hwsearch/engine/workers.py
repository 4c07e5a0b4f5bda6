"""The connection to a Ray cluster."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hwsearch.errors import HwsearchError, InvalidInput
from hwsearch.task import Task

ANSWER_S = 10.0
"""For so long an address may not answer."""


@contextmanager
def joined(address: str, task: Task) -> Iterator[Any]:
    """The module ray, connected while the block runs.

    Args:
        address: `auto` (the cluster that this machine is in, or that the process is connected to), `local` (one of this machine's
            cores, for the block alone) or `HOST:PORT`.
        task: What workers load by its name.

    Raises:
        InvalidInput: The address is malformed, or the task has no name.
        HwsearchError: Ray is not installed, or there is no cluster.
    """
    if not task.spec:
        raise InvalidInput(
            "workers of a cluster load the task by its name, and this one has none; take it from hs.load('task.py:make_task')"
        )
    ray, own = _connect(address)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def _connect(address: str) -> tuple[Any, bool]:
    """(the module ray, whether the connection was made here)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise HwsearchError(f"Ray cannot be imported ({error}); install it with: pip install 'hwsearch[ray]'") from error
    if ray.is_initialized():
        have = ray.get_runtime_context().gcs_address
        if address not in ("auto", have):
            raise InvalidInput(
                f"this process is connected to the Ray cluster at {have}, not {address}; give auto, or call ray.shutdown() first"
            )
        return ray, False
    _require_answer(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise HwsearchError(
            f"no Ray cluster is found at {address} ({str(error).splitlines()[0]}); start one with `ray start --head`, and give the "
            "address that it prints, or local for this machine's cores"
        ) from error
    return ray, True


def _require_answer(address: str) -> None:
    """Raises where nothing listens at HOST:PORT: Ray would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(
            f"{address!r} is no address of a Ray cluster; expected auto, local or HOST:PORT, for instance 10.0.0.5:6379"
        )
    try:
        socket.create_connection((host, int(port)), ANSWER_S).close()
    except OSError as error:
        raise HwsearchError(
            f"nothing answers at {address} ({error}); start the cluster there with `ray start --head --port={port}`, or give the "
            "address that it printed"
        ) from error


def place_of_work() -> str:
    """Where this process works, as JSON: the folder that names of files begin at, hwsearch's variables of the environment, and the
    command, which tables tell."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("HWSEARCH_")}
    return json.dumps({"folder": os.getcwd(), "environment": environment, "command": sys.argv})


def enter(place: Mapping[str, Any]) -> None:
    """Work there, in a worker. Raises InvalidInput where the folder is not on its machine."""
    if not Path(place["folder"]).is_dir():
        raise InvalidInput(
            f"there is no {place['folder']}, where the command runs; machines of a cluster need the same files in the same place"
        )
    os.chdir(place["folder"])
    os.environ.update(place["environment"])
    sys.argv[:] = place["command"]

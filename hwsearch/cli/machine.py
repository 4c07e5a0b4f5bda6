"""What this machine is, and what works on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import AsJson, Quiet


def devices(as_json: AsJson = False) -> None:
    """Show this machine, its GPUs and its backends."""
    from hwsearch import backends
    from hwsearch.device import energy, nvidia
    from hwsearch.device import fingerprint as device

    here, found, counter = device.fingerprint(), backends.status(), energy.find()
    gpus, no_gpu = nvidia.gpus()
    if as_json:
        show.as_json(
            {
                "device": here.to_json(),
                "gpus": [gpu.to_json() for gpu in gpus],
                "no_gpu": no_gpu,
                "backends": [entry.to_json() for entry in found],
                "energy": counter.to_json(),
            }
        )
        return
    measured = f"measured by {counter.source}" if counter.meter else f"not measured: {counter.reason}"
    show.wrapped(str(here))
    show.wrapped(f"id {here.id}")
    show.wrapped(f"energy {measured}")
    for gpu in gpus:
        show.wrapped(f"\n{gpu}")
        show.wrapped(f"id {gpu.id}, {gpu.uuid or 'UUID not known'}")
    if no_gpu:
        show.wrapped(f"\nno GPU: {no_gpu}")
    print("\nbackends")
    for b in found:
        own = f"{', '.join(b.versions.values())}; base precision {', '.join(b.bases)}"
        show.wrapped(f"{b.name:14s}{own if b.available else f'not available: {b.reason}'}", indent=14)


def doctor(
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Backend to examine; by default every one that is installed."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="JSON to attach to a bug report; without paths and user names.",
        ),
    ] = None,
    lock_clocks: Annotated[
        bool,
        typer.Option("--lock-clocks", help="Also try whether a GPU's clocks can be locked, for a moment."),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Examine what works on this machine. Driver, runtimes, permissions, small engines, the backend contract.

    Exit 1 where something that should work does not.
    """
    from hwsearch.doctor.checks import examine
    from hwsearch.errors import BackendUnavailable
    from hwsearch.progress import Progress

    with Progress(quiet=quiet) as progress:
        keep = None if report is None else lambda sofar: sofar.save(report)
        found = examine(backend, lock_clocks=lock_clocks, progress=progress, keep=keep)
    if as_json:
        show.as_json(found.to_json())
    if backend is not None and not found.backends[0].available:
        raise BackendUnavailable(found.backends[0].reason)
    if not as_json:
        print(found)
    if not found.healthy:
        raise typer.Exit(1)

"""The steps as functions, from a Task to a Report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hwsearch import backends
from hwsearch.backends.base import Backend
from hwsearch.design import AXES, RESIDUAL, candidate_widths, check_axes
from hwsearch.pipeline import sensitivity_for
from hwsearch.profiler import profile as _profile
from hwsearch.progress import Progress
from hwsearch.regime import regime
from hwsearch.scoring import SensitivityTable
from hwsearch.table import LatencyTable
from hwsearch.task import Task


def _backend(which: str | Backend) -> Backend:
    return backends.get(which) if isinstance(which, str) else which


def profile(
    task: Task,
    *,
    out: str | Path | None = None,
    backend: str | Backend = "openvino",
    threads: int = 1,
    base: str | None = None,
    batch: int | None = None,
    time_limit_s: float = 600.0,
    mode: str = "context",
    axes: Sequence[str] = AXES,
    seed: int = 0,
    builds: int | None = None,
    load: int = 0,
    prior: Sequence[LatencyTable] = (),
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of a task on this device, or go on with the one at `out`.

    threads: inference threads. base: precision of what is not int8 (None: the backend's preferred one). batch: None
    for that of the example inputs. time_limit_s: seconds after which no further build begins. mode: `context` (whole
    networks), `sandwiched` (units between their neighbours, for networks too large to build whole) or `alone` (each unit by
    itself, the naive baseline); the last two keep every width whole.
    axes: what allocations may differ in, `width`, `precision` or both; beside
    `width` also `residual`, the width of a transformer's residual stream.
    builds: builds of the design (None: by the network's size). load: busy workers beside the measured network, one thread
    each: a table of a shared machine is another one. prior: other tables of this device and regime, whose layers need not
    be learnt again.
    Raises DeviceBusy, BackendUnavailable, UntraceableModel, IncompatibleTables, InvalidInput.
    """
    axes = check_axes(axes)
    at = regime(
        task,
        _backend(backend),
        threads=threads,
        base=base,
        batch=batch,
        residual=RESIDUAL in axes,
        load=load,
    )
    return _profile(
        at,
        out,
        time_limit_s=time_limit_s,
        mode=mode,
        axes=axes,
        seed=seed,
        builds=builds,
        progress=progress,
        prior=prior,
    )


def sensitivity(
    task: Task,
    *,
    out: str | Path | None = None,
    backend: str | Backend = "openvino",
    base: str | None = None,
    axes: Sequence[str] = AXES,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Loss of every (unit, variant) of a backend, and of every (channel group, width), on the task's calibration data.

    `out` is used again if it is there. axes: without `width` the groups are left out. table: its widths are scored (None:
    all that a profile would try). weights: folder to keep refitted weights in, for `deploy` and `verify`.
    Raises UntraceableModel, IncompatibleTables, InvalidInput.
    """
    axes = check_axes(axes)
    residual = RESIDUAL in axes or (table is not None and bool(table.header.options.get("residual")))
    at = regime(task, _backend(backend), base=base, residual=residual)
    grid: Mapping[str, Sequence[int]] = {}
    if "width" in axes and table is not None:
        table.require(network=at.network)
        grid = table.grid()
    elif "width" in axes:
        grid = {g: candidate_widths(n) for g, n in at.network.channels.items()}
    return sensitivity_for(at, out, seed=seed, grid=grid, weights=weights, progress=progress)

"""The steps as functions, from a Task to a Report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwsearch import backends
from hwsearch.backends.base import Backend
from hwsearch.deployment.closed_loop import sensitivity_for
from hwsearch.device.fingerprint import clocks_to_lock
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import InvalidInput
from hwsearch.loss.sensitivity import SensitivityTable
from hwsearch.network.choices import AXES, RESIDUAL, STORAGE, candidate_widths, check_axes
from hwsearch.network.variants import STORAGE as IN_INT8
from hwsearch.profiler.profile import profile as _profile
from hwsearch.profiler.reshape import own_shapes, reshaped
from hwsearch.profiler.transfer import comparable
from hwsearch.progress import Progress
from hwsearch.table.section import Shapes, only
from hwsearch.table.table import LatencyTable
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
    shape: Shapes | None = None,
    prior: Sequence[LatencyTable | str | Path] = (),
    lock_clocks: bool = False,
    energy: bool = False,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of a task on this device, or go on with the one at `out`.

    A file at `out` of the same model under other options, or at another input shape, gets a section more.
    threads: inference threads. base: precision of what is not int8 (None: the backend's preferred one). batch: None
    for that of the example inputs. time_limit_s: seconds after which no further build begins. mode: `context` (whole
    networks), `sandwiched` (units between their neighbours, for networks too large to build whole) or `alone` (each unit by
    itself, the naive baseline); the last two keep every width whole.
    axes: what allocations may differ in, `width`, `precision` or both; beside
    `width` also `residual`, the width of a transformer's residual stream, and beside `precision` also `storage`: weights stored
    in int8 and computed with in the base precision, for budgets on size.
    builds: builds of the design (None: by the network's size). load: busy workers beside the measured network, one thread
    each: a table of a shared machine is another one. shape: of the inputs, the batch first, where not that of the example
    inputs (see `reshape`): for timing; sensitivities, deployed files and reports want a task of that shape.
    prior: other tables of this device and setup, or their files, whose layers need not be learnt again.
    lock_clocks: hold the GPU's clock while measuring (needs root; undone afterwards): the table is of that clock.
    energy: also read a GPU's counter of energy, for which each engine runs 6 s more; a CPU's is always read, where there is one.
    Raises DeviceBusy, BackendUnavailable, UntraceableModel, IncompatibleTables, InvalidInput.
    """
    axes = check_axes(axes)
    runtime = _backend(backend)
    clocks = clocks_to_lock(runtime) if lock_clocks else 0
    if shape is not None and shape != ():
        task = reshaped(task, shape)
        own = own_shapes(task)[0][0]
        if batch not in (None, own):
            raise InvalidInput(f"the shape is of batch {own}, not {batch}; give only one of the two")
        batch = own
    setup = set_up(
        task,
        runtime,
        threads=threads,
        base=base,
        batch=batch,
        residual=RESIDUAL in axes,
        load=load,
        clocks=clocks,
        storage=STORAGE in axes,
        energy=energy,
    )
    return _profile(
        setup,
        out,
        time_limit_s=time_limit_s,
        mode=mode,
        axes=axes,
        seed=seed,
        builds=builds,
        progress=progress,
        prior=[t for p in prior for t in ([p] if isinstance(p, LatencyTable) else _comparable(p, setup))],
    )


def _comparable(path: str | Path, setup: Setup) -> list[LatencyTable]:
    """The tables in a file that may tell of a setup; where none may, the nearest, for `evidence` to say why not.

    Of several their own measurements alone: what one took from another would count twice.
    """
    tables, mine = LatencyTable.sections(path), comparable(setup.described)
    found = [t for t in tables if comparable(t.header.options) == mine]
    if not found:
        return [max(tables, key=lambda t: t.header.section.agrees(mine))]
    return found if len(found) == 1 else [t.with_header(prior=()) for t in found]


def sensitivity(
    task: Task,
    *,
    out: str | Path | None = None,
    backend: str | Backend = "openvino",
    base: str | None = None,
    batch: int | None = None,
    axes: Sequence[str] = AXES,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Loss of every (unit, variant) of a backend, and of every (channel group, width), on the task's calibration data.

    `out` is used again if it is there. batch: None for the table's, or that of the example inputs.
    axes: without `width` the groups are left out. table: its variants and widths are scored (None:
    all that a profile would try). weights: folder to keep refitted weights in, for `deploy` and `verify`.
    Raises UntraceableModel, IncompatibleTables, InvalidInput.
    """
    axes = check_axes(axes)
    residual = RESIDUAL in axes or (table is not None and bool(table.header.options.get("residual")))
    if batch is None and table is not None:
        batch = table.header.options.get("batch")
    stored = table is not None and any(str(IN_INT8) in own for own in table.offered().values())
    storage = STORAGE in axes or stored
    int8: dict[str, Any] = {}
    if table is not None:
        int8 = {"int8_bits": table.header.int8_bits, "unsigned": table.header.unsigned}
    setup = set_up(task, _backend(backend), base=base, batch=batch, residual=residual, storage=storage, **int8)
    grid: Mapping[str, Sequence[int]] = {}
    if "width" in axes and table is not None:
        table.require(network=setup.network)
        grid = table.grid()
    elif "width" in axes:
        grid = {g: candidate_widths(n) for g, n in setup.network.channels.items()}
    return sensitivity_for(setup, out, seed=seed, grid=grid, weights=weights, progress=progress)


def table_of_task(path: str | Path, task: Task, *, batch: int | None = None, **wanted: Any) -> LatencyTable:
    """The table in a file that is of a task's own input shapes, where it has several; wanted: as `LatencyTable.load`."""
    found = LatencyTable.sections(path, batch=batch, **wanted)
    sizes = [shape if batch is None else (batch, *shape[1:]) for shape in own_shapes(task)]
    own = [t for t in found if list(t.network.input_shapes) == sizes] or found
    return own[only([t.header.section for t in own], path)]

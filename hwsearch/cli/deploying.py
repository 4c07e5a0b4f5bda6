"""An allocation on this machine: its file, whether it meets its budgets as measured, and the whole line up to there."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    AllocationFile,
    AnyWeights,
    AsJson,
    Axes,
    Backends,
    Base,
    Batch,
    BatchNorm,
    Energy,
    Floor,
    Gradients,
    Keep,
    Load,
    LockClocks,
    MaybeBackend,
    MaybeBudgets,
    MaybeOutput,
    Minimize,
    Plot,
    Prior,
    Quiet,
    Ray,
    Samples,
    Scales,
    Seed,
    TaskSpec,
    Threads,
    Weights,
    axes_of,
    require_backend,
    require_output,
    seconds,
)
from hwsearch.cli.ending import MISSED, say
from hwsearch.errors import BudgetMissed, InvalidInput

if TYPE_CHECKING:
    from hwsearch.deployment.report import Report


def deploy(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE|DIR", help="File to write; with --for the folder.")
    ],
    backend: MaybeBackend = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SM",
            help="With --backend tensorrt: leave a folder for a machine with TensorRT and such a GPU (sm89, ...).",
        ),
    ] = None,
    weights: AnyWeights = None,
    as_json: AsJson = False,
) -> None:
    """Write the ONNX file of an allocation, with refitted weights."""
    import hwsearch as hs
    from hwsearch.allocate.allocation import Allocation

    chosen = Allocation.load(allocation)
    if target is not None and backend != "tensorrt":
        raise InvalidInput("--for leaves files for TensorRT: give --backend tensorrt with it")
    if output.is_dir() if target is None else output.is_file():
        raise InvalidInput(f"{output} is a {'folder' if target is None else 'file'}; give another path with -o")
    if target is None:
        require_backend(backend or chosen.backend)
        deployed = hs.deploy(hs.load(task), chosen, output, backend=backend, weights=weights)
        path, size = deployed.path, deployed.size_bytes
    else:
        from hwsearch.deployment.targets import for_tensorrt

        path = for_tensorrt(hs.load(task), chosen, output, target=target, weights=weights)
        size = path.stat().st_size
    if as_json:
        show.as_json({"path": str(path), "size_bytes": size})
        return
    print(f"{path}: {show.size(size)}")
    if target is not None:
        print(f"take {output} to the machine with the GPU, and there: python run_tensorrt.py")


def verify(
    task: TaskSpec,
    allocation: AllocationFile,
    output: MaybeOutput = None,
    backend: MaybeBackend = None,
    threads: Annotated[int | None, typer.Option(min=1, help="By default the allocation's.")] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Latency table that the allocation was searched on.")
    ] = None,
    weights: AnyWeights = None,
    lock_clocks: LockClocks = False,
    as_json: AsJson = False,
) -> None:
    """Measure an allocation. Latency, score and size, beside what was predicted; exit 3 if a budget is missed."""
    require_output(output, as_json)
    import hwsearch as hs
    from hwsearch.allocate.allocation import Allocation

    chosen = Allocation.load(allocation)
    require_backend(backend or chosen.backend, lock_clocks)
    known = None
    if table is not None:
        known = hs.LatencyTable.load(table, network=chosen.network, like=chosen.options)
    report = hs.verify(
        hs.load(task),
        chosen,
        backend=backend,
        threads=threads,
        table=known,
        weights=weights,
        lock_clocks=lock_clocks,
    )
    if output is not None:
        report.save(output)
    _finish(report, as_json)


def recover(
    task: TaskSpec,
    allocation: AllocationFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="File for the trained weights (.safetensors).")
    ],
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Of the task's training data (by default 2), or passes over calibration data (by default 30)."),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Of all of it: 90s, 10m, 1h30m. With --epochs: no more than that.")
    ] = None,
    method: Annotated[
        Literal["ste", "mask", "lc", "srste", "shrink", "halfspace"],
        typer.Option(help="How weights are led to what the allocation allows; see the page Recovery of the documentation."),
    ] = "ste",
    gradients: Gradients = "dense",
    scales: Scales = "fixed",
    batchnorm: BatchNorm = "folded",
    lr: Annotated[str, typer.Option(metavar="auto|RATE", help="The largest learning rate; auto tries a few.")] = "auto",
    seed: Seed = 0,
    weights: Weights = None,
    backend: MaybeBackend = None,
    plot: Plot = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what a search chose, as it is deployed. Take the file to deploy and verify with --weights.

    With the task's `train` and `loss` on these, else on calibration data towards the dense network's outputs. A killed training
    goes on where it was a minute before when the same command is given again.
    """
    rate, limit = _rate(lr), None if time_limit is None else seconds(time_limit)
    if output.suffix != ".safetensors":
        raise InvalidInput(f"trained weights are a file of safetensors; give its name as {output.with_suffix('.safetensors')}")
    import hwsearch as hs
    from hwsearch.allocate.allocation import Allocation
    from hwsearch.progress import Progress
    from hwsearch.recovery.gradients import rule
    from hwsearch.recovery.processes import launched

    rule(gradients)
    chosen = Allocation.load(allocation)
    require_backend(backend or chosen.backend)
    main = launched().main
    with Progress(quiet=quiet or not main) as progress:
        done = hs.recover(
            hs.load(task), chosen, output, epochs=epochs, time_limit_s=limit, method=method, gradients=gradients, scales=scales,
            batchnorm=batchnorm, rate=rate, seed=seed, weights=weights, backend=backend, progress=progress,
        )  # fmt: skip
    if not main:
        return
    if plot is not None:
        hs.plot_recovery(done, plot)
    if as_json:
        show.as_json({"path": str(output), **done.to_json()})
        return
    print(f"{done}\n{output}: {show.size(output.stat().st_size)}; give it to deploy and verify as --weights")


def _rate(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise InvalidInput(f"--lr {text!r} is no learning rate; expected a positive number such as 3e-4, or auto")
    return rate


def run(
    task: TaskSpec,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for everything.")
    ],
    budget: MaybeBudgets = None,
    floor: Floor = None,
    minimize: Minimize = None,
    samples: Samples = 10,
    backend: Backends = "openvino",
    threads: Threads = 1,
    base: Base = None,
    batch: Batch = None,
    axes: Axes = "width,precision",
    keep: Keep = None,
    load: Load = 0,
    seed: Seed = 0,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Of the whole run: 90s, 10m, 1h30m; by default 10m, and what --recover takes. The profile takes what the later "
            "stages leave.",
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Of the time limit: train the answer so long, and measure it again."),
    ] = None,
    gradients: Gradients = "dense",
    scales: Scales = "fixed",
    batchnorm: BatchNorm = "folded",
    mode: Annotated[
        Literal["context", "sandwiched"],
        typer.Option(help="Of the profile; sandwiched, for networks too large to build whole, keeps every width whole."),
    ] = "context",
    prior: Prior = None,
    lock_clocks: LockClocks = False,
    energy: Energy = False,
    ray: Ray = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Do all of it, until the budget or the floor holds. Profile, sensitivities, search, deploy, verify; uses what DIR already has.

    DIR/run.log says what was done when, while it runs.
    """
    begun, trained_s = time.monotonic(), 0.0 if recover is None else seconds(recover)
    limit = 600.0 + trained_s if time_limit is None else seconds(time_limit)
    require_backend(backend, lock_clocks)
    import hwsearch as hs
    from hwsearch.progress import Progress

    try:
        with Progress(quiet=quiet) as progress:
            own = hs.load(task)
            report = hs.run(
                own, budget or (), out, backend=backend, threads=threads, base=base, batch=batch, seed=seed, mode=mode,
                axes=axes_of(axes), keep=keep or (), load=load, prior=prior or (), lock_clocks=lock_clocks, energy=energy,
                floor=floor, minimize=minimize, samples=samples, recover_s=trained_s, gradients=gradients, scales=scales,
                batchnorm=batchnorm, ray=ray,
                time_limit_s=max(limit - (time.monotonic() - begun), 1.0), progress=progress,
            )  # fmt: skip
    except BudgetMissed as error:
        if error.nearest is not None:
            show.report(cast("Report", error.nearest), as_json, out)
        raise
    _finish(report, as_json, out)


def _finish(report: Report, as_json: bool, folder: Path | None = None) -> None:
    show.report(report, as_json, folder)
    for sentence in report.unexplained:
        say(f"warning: {sentence}")
    if report.state == "met_within_noise":
        say("met_within_noise: within the budget as measured, by less than measurements of one network differ; exit code 0")
    if report.state == "missed":
        say("missed: the network does not meet its budget as measured")
        raise typer.Exit(MISSED)

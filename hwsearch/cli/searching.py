"""From the two tables to an allocation, or to all that a budget may choose from; from a scheme to its numbers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    AsJson,
    Axes,
    Backend,
    Batch,
    Budgets,
    Forbid,
    Keep,
    MaybeBudgets,
    MaybeOutput,
    Only,
    Plot,
    Quiet,
    Seed,
    SensitivityFile,
    TableFile,
    TaskSpec,
    Threads,
    axes_of,
    require_backend,
    require_output,
)
from hwsearch.cli.ending import say
from hwsearch.cli.sections import choosing
from hwsearch.errors import BudgetMissed

if TYPE_CHECKING:
    from hwsearch.pipeline.tuning import Tuned

Objective = Literal["loss", "latency", "latency_p90", "latency_p95", "latency_p99", "size", "memory", "energy", "macs"]


class Swept(StrEnum):
    """Costs that a front may be over; typer takes no list of literals."""

    LATENCY = "latency"
    SIZE = "size"
    MEMORY = "memory"


@choosing
def search(
    table: TableFile, sensitivity: SensitivityFile, budget: Budgets, section: dict[str, Any],
    output: MaybeOutput = None,
    minimize: Annotated[Objective, typer.Option(help="What is to be least within the budgets.")] = "loss",
    axes: Axes = "width,precision", keep: Keep = None, forbid: Forbid = None, only: Only = None,
    kappa: Annotated[
        float, typer.Option(min=0.0, help="Standard errors of the prediction that budgets on latency and energy keep in reserve.")
    ] = 1.0,
    diverse: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers: the best (-o a.json), then the best that differ (a-2.json, ...).")
    ] = 1,
    differ: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="With --diverse: in so many units two differ; by default a tenth.")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find the best allocation under budgets. The one of least predicted loss, or of least latency, size, ...; solved exactly."""
    require_output(output, as_json)
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    measured = hs.LatencyTable.load(table, network=scores.network.fingerprint, **section)
    options: dict[str, Any] = {
        "minimize": minimize, "kappa": kappa, "axes": axes_of(axes), "keep": keep or (), "forbid": forbid or (), "only": only or (),
    }  # fmt: skip
    if diverse == 1:
        found = [hs.search(measured, scores, budget, **options)]
    else:
        found = hs.search_diverse(measured, scores, budget, diverse, differ=differ, **options)
    paths = [output and output.with_stem(f"{output.stem}-{n}" if n > 1 else output.stem) for n in range(1, len(found) + 1)]
    for allocation, path in zip(found, paths, strict=True):
        if path is not None:
            allocation.save(path)
    if diverse == 1:
        show.allocation(found[0], as_json)
    else:
        show.allocations(found, paths, as_json)
        if len(found) < diverse:
            say(f"warning: only {len(found)} of {diverse} answers: no more meet the budgets and differ in as many units")


@choosing
def front(
    table: TableFile,
    sensitivity: SensitivityFile,
    section: dict[str, Any],
    output: MaybeOutput = None,
    over: Annotated[
        list[Swept] | None,
        typer.Option(help="The cost that is swept, by default latency; twice, for a grid of budgets on two."),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=2, help="Budgets to sweep of each cost: by default 20 of one, 8 of each of two.")
    ] = None,
    budget: MaybeBudgets = None,
    axes: Axes = "width,precision",
    keep: Keep = None,
    forbid: Forbid = None,
    only: Only = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Sweep a budget, or two. The allocations that no other beats in both loss and cost."""
    require_output(output, as_json)
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    found = hs.front(
        hs.LatencyTable.load(table, network=scores.network.fingerprint, **section), scores, points=points,
        over=[str(column) for column in over or [Swept.LATENCY]], budgets=budget or (), axes=axes_of(axes), keep=keep or (),
        forbid=forbid or (), only=only or (),
    )  # fmt: skip
    if output is not None:
        found.save(output)
    if plot is not None:
        hs.plot_front(found, plot)
    show.front(found, as_json)


def bayes(
    task: TaskSpec,
    scheme: Annotated[
        str, typer.Option(metavar="FILE:NAME", help="A scheme of one to three free parameters, or a function that returns one.")
    ],
    floor: Annotated[
        str, typer.Option(metavar="SCORE", help="Least score of the answer: 99% (of the dense one), -0.5pt or 0.93.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", file_okay=False, help="Folder for the answer and every sample.")
    ],
    minimize: Annotated[
        Literal["size", "latency", "macs"],
        typer.Option(help="The cost that is least: packed bytes (computed), latency (measured) or multiply-accumulates."),
    ] = "size",
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Networks that are measured at most, failures included.")] = 10,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Train each sample before it is measured: `lc:steps=12`, `mask:epochs=2`, `mask:5m,lr=1e-3`, or epochs (`2`) or a "
            "duration (`5m`) alone.",
        ),
    ] = None,
    backend: Backend = "openvino",
    threads: Threads = 1,
    batch: Batch = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the numbers of a scheme. The cheapest network of it whose measured score holds a floor, in at most ten samples.

    Each sample is a folder in DIR: the same command goes on with them, and another floor uses them again.
    """
    require_backend(backend)
    import hwsearch as hs
    from hwsearch.progress import Progress

    try:
        with Progress(quiet=quiet) as progress:
            found = hs.bayes(
                hs.load(task), scheme, out, floor=floor, minimize=minimize, samples=samples, recover=recover,
                backend=backend, threads=threads, batch=batch, seed=seed, progress=progress,
            )  # fmt: skip
    except BudgetMissed as error:
        show.tuned(cast("Tuned", error.nearest), as_json, out)
        raise
    show.tuned(found, as_json, out)

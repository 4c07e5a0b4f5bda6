"""From the two tables to an allocation, or to all that a budget may choose from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from hwsearch.cli import printing as show
from hwsearch.cli.arguments import (
    AsJson,
    Axes,
    Budgets,
    Keep,
    MaybeBudgets,
    MaybeOutput,
    Plot,
    SensitivityFile,
    TableFile,
    axes_of,
    require_output,
)
from hwsearch.cli.sections import choosing


@choosing
def search(
    table: TableFile, sensitivity: SensitivityFile, budget: Budgets, section: dict[str, Any],
    output: MaybeOutput = None, axes: Axes = "width,precision", keep: Keep = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Find the best allocation under budgets. The one of least predicted loss, solved exactly."""
    require_output(output, as_json)
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    allocation = hs.search(
        hs.LatencyTable.load(table, network=scores.network.fingerprint, **section),
        scores,
        budget,
        axes=axes_of(axes),
        keep=keep or (),
    )
    if output is not None:
        allocation.save(output)
    show.allocation(allocation, as_json)


@choosing
def front(
    table: TableFile,
    sensitivity: SensitivityFile,
    section: dict[str, Any],
    output: MaybeOutput = None,
    over: Annotated[
        Literal["latency", "size", "memory"], typer.Option(help="The cost that is swept.")
    ] = "latency",
    points: Annotated[int, typer.Option(min=2, help="Budgets to sweep.")] = 20,
    budget: MaybeBudgets = None,
    axes: Axes = "width,precision",
    keep: Keep = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Sweep a budget. The allocations that no other beats in both loss and cost."""
    require_output(output, as_json)
    import hwsearch as hs

    scores = hs.SensitivityTable.load(sensitivity)
    found = hs.front(
        hs.LatencyTable.load(table, network=scores.network.fingerprint, **section), scores, over=over, points=points,
        budgets=budget or (), axes=axes_of(axes), keep=keep or (),
    )  # fmt: skip
    if output is not None:
        found.save(output)
    if plot is not None:
        hs.plot_front(found, plot)
    show.front(found, as_json)

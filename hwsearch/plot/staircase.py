"""The picture of a staircase: time against width, one small panel for each channel group."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hwsearch.errors import InvalidInput
from hwsearch.latency.staircase import staircase
from hwsearch.plot.style import INK, PRECISION_COLORS, Picture, done, shorten, where
from hwsearch.table.table import LatencyTable

MOST_PANELS = 30


def plot_staircase(table: LatencyTable, path: str | Path | None = None) -> Figure:
    """Plot the time of the units on each channel group, in µs, against its width, by precision, as the latency model tells it.

    Widths on the grid are filled, those that no build holds are diamonds.
    Groups of one shape and curve are drawn each by itself, at most thirty.

    Args:
        table: made over widths.
        path: file to write (PNG, SVG or PDF); None writes none.

    Returns:
        The figure.

    Raises:
        InvalidInput: the table holds no widths.
    """
    steps = staircase(table)
    groups = list(dict.fromkeys(s.group for s in steps))
    if not groups:
        raise InvalidInput("the table holds no widths; profile without `--axes precision`")
    shown = groups[:MOST_PANELS]
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Picture(figsize=(3.1 * across, 2.3 * down + 0.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, group in zip(panels, shown, strict=False):
        own = [s for s in steps if s.group == group]
        for precision in own[0].times_ns:
            points = [(s.width, s.times_ns[precision] / 1e3, s) for s in own if precision in s.times_ns]
            color = PRECISION_COLORS.get(precision.rpartition(".")[2], INK)
            axes.plot(
                [p[0] for p in points], [p[1] for p in points], color=color, linewidth=1, label=precision
            )
            for width, time, step in points:
                shape, fill = "o" if step.built else "D", color if step.kept else "white"
                axes.plot(width, time, shape, markersize=4, color=color, markerfacecolor=fill)
        axes.set_title(shorten(group, 34), fontsize=8, loc="left")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.grid(color="#DDDDDD", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    more = f" ({len(shown)} of {len(groups)} groups)" if len(groups) > len(shown) else ""
    header = {
        "backend": table.header.backend,
        "options": table.header.options,
        "device": table.header.device.get("chip"),
    }
    figure.suptitle(
        f"{table.network.name}: time of a channel group's units (µs) against its width{more}\n{where(header)}; "
        "filled: on the grid; diamonds: in no build, told by other widths",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8, frameon=False)
    return done(figure, path)

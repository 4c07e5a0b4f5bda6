"""What all pictures share: colours, titles, the legend, the scale of losses.

Colours are those of Okabe and Ito, and cividis, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from hwsearch.files import write_bytes

PRECISION_COLORS = {
    "fp32": "#666666",
    "tf32": "#AAAAAA",
    "bf16": "#E69F00",
    "fp16": "#CC79A7",
    "int8": "#0072B2",
    "w8": "#999933",
    "fp8": "#56B4E9",
    "int4": "#009E73",
    "nvfp4": "#F0E442",
}
HATCH = "////"
"""Over the colour of a precision: weights in an N:M pattern."""
HIGHLIGHT, FAINT, INK = "#D55E00", "#999999", "#222222"


class Picture(Figure):
    """A Figure that a notebook shows without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def shorten(name: str, length: int) -> str:
    """A name with its middle left out where it is longer than `length` characters."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def single_axes(width: float, height: float) -> tuple[Picture, Axes]:
    figure = Picture(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def where(header: Mapping[str, Any]) -> str:
    """Backend, threads and device: what the numbers hold for."""
    threads = (header.get("options") or {}).get("threads")
    parts = [
        str(header.get("backend") or ""),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads is not None else "",
        shorten(str(header.get("device") or ""), 48),
    ]
    return ", ".join(part for part in parts if part)


def titles(axes: Axes, title: str, *lines: str) -> None:
    """A title over the axes, and lines of smaller text between the two."""
    lines = tuple(line for line in lines if line)
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left", pad=8 + 12.5 * len(lines))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color=INK,
    ).set_in_layout(False)  # the title's padding keeps its place


def legend_below(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Below the axes, where no data can be."""
    figure.legend(
        handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )


def scale_losses(axes: Axes, which: str, values: Iterable[float]) -> str:
    """Make the x or y axis fit losses over many decades, zeros included; returns the scale's name."""
    shown = np.array([v for v in values if np.isfinite(v)])
    positive = shown[shown > 0]
    setter = axes.set_xscale if which == "x" else axes.set_yscale
    axis = axes.xaxis if which == "x" else axes.yaxis
    top = float(positive.max()) if len(positive) else 0.0
    if not len(positive) or (top < 20 * positive.min() and len(positive) == len(shown)):
        limits = (-0.03 * top, 1.1 * top) if top else (-0.1, 1.0)
        axes.set_xlim(limits) if which == "x" else axes.set_ylim(limits)
        axis.set_major_locator(MaxNLocator(5) if top else FixedLocator([0.0]))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.1e}" if value and top < 1e-2 else f"{value:.3g}")
        )
        return "linear scale"
    if len(positive) == len(shown):
        setter("log")
        name = "log scale"
    else:
        threshold = 10.0 ** np.floor(np.log10(positive.min()))
        setter("symlog", linthresh=threshold, linscale=0.5)
        name = "log scale, linear near 0"
    axis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08) if which == "x" else axes.margins(y=0.08)
    return name


def color_losses(values: Iterable[float]) -> tuple[Normalize, str]:
    """A scale of colours for losses over many decades, zeros included, and its name."""
    shown = np.array([v for v in values if np.isfinite(v)])
    positive = shown[shown > 0]
    if not len(positive) or (positive.max() < 20 * positive.min() and len(positive) == len(shown)):
        return Normalize(0.0, float(positive.max()) if len(positive) else 1.0), "linear scale"
    low, high = float(positive.min()), float(positive.max())
    if len(positive) == len(shown):
        return LogNorm(low, high), "log scale"
    return SymLogNorm(10.0 ** np.floor(np.log10(low)), vmin=0.0, vmax=high), "log scale, linear near 0"


def light(color: str) -> str:
    """The colour half-way to white."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(p + 255) // 2:02X}" for p in parts)


def done(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        buffer = BytesIO()
        figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png")
        write_bytes(path, buffer.getvalue())
    return figure

"""A front: loss against the swept cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from hwsearch.plot.style import (
    FAINT,
    HIGHLIGHT,
    INK,
    done,
    legend_below,
    scale_losses,
    single_axes,
    titles,
    where,
)
from hwsearch.variants import WEIGHT_BITS

if TYPE_CHECKING:
    from hwsearch.allocate.front import Front

PER_UNIT = {"latency": (1e6, "ms"), "size": (1e6, "MB"), "macs": (1e6, "MMAC")}
"""For each cost column how many of its integer units (ns, bytes, MACs) make one of the unit drawn."""


@dataclass(frozen=True)
class _Row:
    """A row of a front in the units drawn."""

    cost: float
    sigma: float
    loss: float
    budget: float
    precisions: tuple[str, ...]
    dominated: bool
    infeasible: bool


def plot_front(front: Front, path: str | Path | None = None) -> Figure:
    """Loss against the swept cost: latency in ms, or size in MB.

    The front is a step line, its points coloured by the share of units in the coarsest precision, with bars of sigma.
    Allocations that another beats are hollow, budgets that nothing meets are crosses on the axis, measured allocations
    are diamonds with their interval. path: where to save it, in the format its suffix names.
    """
    scale, unit = PER_UNIT[front.over]
    rows = _front_rows(front)
    found = [r for r in rows if not r.infeasible]
    best = sorted((r for r in found if not r.dominated), key=lambda r: r.cost)
    beaten = [r for r in found if r.dominated]
    missed = [r.budget for r in rows if r.infeasible]
    points = [p for p in front.measured if _measured_at(p, front.over) is not None]

    figure, axes = single_axes(8.0, 5.4)
    handles: list[Any] = []
    if best:
        across, down = np.repeat([r.cost for r in best], 2)[1:], np.repeat([r.loss for r in best], 2)[:-1]
        axes.plot(across, down, color=INK, linewidth=1.0, zorder=2)
        if any(r.sigma for r in best):
            axes.errorbar(
                [r.cost for r in best], [r.loss for r in best], xerr=[r.sigma for r in best], fmt="none",
                ecolor="#777777", elinewidth=0.9, capsize=2, zorder=3,
            )  # fmt: skip
        coarsest = min((p for r in best for p in r.precisions), key=lambda p: (WEIGHT_BITS[p], p))
        shares = [100.0 * r.precisions.count(coarsest) / len(r.precisions) for r in best]
        dots = axes.scatter(
            [r.cost for r in best], [r.loss for r in best], c=shares, cmap="cividis_r", vmin=0, vmax=100, s=48,
            edgecolors=INK, linewidths=0.7, zorder=5, label="front",
        )  # fmt: skip
        bar = figure.colorbar(dots, ax=axes, pad=0.02, shrink=0.9)
        bar.set_label(f"share of units in {coarsest} (%)")
        bar.outline.set_linewidth(0.5)
        spread = ", bars: ±σ" if any(r.sigma for r in best) else ""
        key = Line2D([], [], color=INK, linewidth=1.0, marker="o", markerfacecolor="#B8A86B")
        key.set_label(f"front, predicted{spread}")
        handles.append(key)
    if beaten:
        hollow = axes.scatter(
            [r.cost for r in beaten], [r.loss for r in beaten], s=36, facecolors="none", edgecolors=FAINT,
            linewidths=1.1, zorder=4, label="dominated",
        )  # fmt: skip
        handles.append(hollow)
    labels: list[tuple[float, float, str]] = []
    for point in points:
        x, low, high = _measured_at(point, front.over) or (0.0, 0.0, 0.0)
        labels.append((x, float(point["loss"]), str(point["label"])))
        axes.errorbar(
            [x], [point["loss"]], xerr=[[max(x - low, 0.0)], [max(high - x, 0.0)]], fmt="D", color=HIGHLIGHT,
            markersize=7, markeredgecolor="white", ecolor=HIGHLIGHT, elinewidth=1.4, capsize=3, zorder=6,
        )  # fmt: skip
    if points:
        interval = ", bars: 95 % interval" if front.over == "latency" else ""
        key = Line2D([], [], color=HIGHLIGHT, marker="D", markeredgecolor="white", linewidth=0)
        key.set_label(f"measured{interval}")
        handles.append(key)
    losses = [r.loss for r in found] + [float(p["loss"]) for p in points]
    name = scale_losses(axes, "y", losses)
    axes.set_ylabel(f"loss (divergence per sample, {name})")
    axes.set_xlabel(f"{front.over} ({unit})")
    dense = _draw_dense(axes, front.dense.get(front.over, 0.0) / scale, unit, handles)
    if missed:
        handles += axes.plot(
            missed, [0.0] * len(missed), "x", color=INK, markersize=7, markeredgewidth=1.5, clip_on=False, zorder=7,
            transform=axes.get_xaxis_transform(), label="budget that nothing meets",
        )  # fmt: skip
    if not found:
        axes.set_yticks([])
    titles(axes, f"{front.network}: loss against {front.over}", where(front.header), dense)
    legend_below(figure, handles, columns=3 if len(handles) != 4 else 2)
    _label(figure, axes, labels, [(r.cost, r.loss) for r in found])
    return done(figure, path)


def _front_rows(front: Front) -> list[_Row]:
    return [_Row(**vars(r)) for r in front.rows]


def _measured_at(point: Mapping[str, Any], over: str) -> tuple[float, float, float] | None:
    """(value, low, high) of a measured allocation, in the unit drawn; None where it lacks that cost or its loss."""
    value = point.get({"latency": "latency_ms", "size": "size_bytes"}.get(over, over))
    if value is None or point.get("loss") is None:
        return None
    if over != "latency":
        size = float(value) / PER_UNIT[over][0]
        return size, size, size
    low, high = point.get("low_ms"), point.get("high_ms")
    return float(value), float(value if low is None else low), float(value if high is None else high)


def _draw_dense(axes: Axes, dense: float, unit: str, handles: list[Any]) -> str:
    """The cost of the dense network as a line, or, where it is far outside, as the words returned."""
    low, high = axes.get_xlim()
    text = f"dense fp32: {dense:.3g} {unit}"
    if dense <= 0:
        return ""
    if dense > high + 0.4 * (high - low):
        return f"{text}, beyond the right edge"
    handles.append(axes.axvline(dense, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=text, zorder=1))
    return ""


_AROUND = [(dx, dy, side) for dx, side in ((1, "left"), (-1, "right"), (0, "center")) for dy in (0.7, -1.7)]
"""Where a label may stand about its point: across, up, in radii, and which of its sides is nearest."""


def _label(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    others: Sequence[tuple[float, float]],
) -> None:
    """Write each (x, y, text) beside its point, where it covers the least of the points and the other labels."""
    if not labels:
        return
    figure.draw_without_rendering()
    dots = axes.transData.transform([*others, *((x, y) for x, y, _ in labels)])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in dots]
    lines = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            lines += [bars.get_transform().transform(segment) for segment in bars.get_segments()]
    taken += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for line in lines for x, y in _walk(line)]
    frame = axes.get_window_extent()
    for x, y, text in labels:
        note = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=HIGHLIGHT, zorder=8
        )
        note.set_in_layout(False)
        best: tuple[float, tuple[float, float], str, Bbox] | None = None
        for radius in (8.0, 12.0, 20.0):
            for dx, dy, side in _AROUND:
                note.set(position=(dx * radius, dy * radius), horizontalalignment=side)
                box = note.get_window_extent()
                covered = sum(bool(box.overlaps(other)) for other in taken)
                outside = not (
                    frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                )
                cost = covered + 20.0 * outside + radius / 4
                if best is None or cost < best[0]:
                    best = cost, (dx * radius, dy * radius), side, box
        assert best is not None
        note.set(position=best[1], horizontalalignment=best[2])
        taken.append(best[3])


def _walk(line: Any, step: float = 6.0) -> list[tuple[float, float]]:
    """Points every few pixels along a polyline in pixels."""
    points = []
    for (x0, y0), (x1, y1) in pairwise(line[np.isfinite(line).all(axis=1)]):
        count = min(int(np.hypot(x1 - x0, y1 - y0) / step) + 1, 500)
        points += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return points

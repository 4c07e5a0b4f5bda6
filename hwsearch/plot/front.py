"""A front: loss against the swept cost, or over two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import Bbox

from hwsearch.errors import InvalidInput
from hwsearch.network.variants import WEIGHT_BITS, Variant
from hwsearch.plot.style import (
    FAINT,
    HIGHLIGHT,
    INK,
    color_losses,
    done,
    legend_below,
    scale_losses,
    single_axes,
    titles,
    where,
)

if TYPE_CHECKING:
    from hwsearch.allocate.front import Front, Point

PER_UNIT = {"latency": (1e6, "ms"), "size": (1e6, "MB"), "memory": (1e6, "MB")}
"""For each cost column how many of its integer units (ns, bytes) make one of the unit drawn."""

NAMES = {"memory": "peak memory of activations, estimated"}


def plot_front(front: Front, path: str | Path | None = None) -> Figure:
    """Plot loss against the swept cost: latency in ms, size or (estimated) peak memory in MB; or over two costs, as colours.

    The front is a step line, its points coloured by the share of units in the coarsest precision, with bars of sigma.
    Allocations that another beats are hollow, budgets that nothing meets are crosses on the axis, measured allocations
    are diamonds with their interval. Over two costs each pair of budgets is a cell in the colour of the least loss within both,
    and the allocations stand where their own costs are.

    Args:
        front: the answer of `hwsearch.front`.
        path: file to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.
    """
    if front.beside:
        return done(_over_two(front), path)
    scale, unit = PER_UNIT[front.over]
    best = front.best()
    drawn = [p for p in front.points if np.isfinite(_cost(p, front.over)) and np.isfinite(p.loss)]
    kept = {(_cost(p, front.over), p.loss) for p in best}  # one allocation may answer several budgets
    beaten = [
        p for p in drawn if p.dominated and not p.measured and (_cost(p, front.over), p.loss) not in kept
    ]
    measured = [p for p in drawn if p.measured]
    missed = [p.budget / scale for p in front.points if p.infeasible]

    figure, axes = single_axes(8.0, 5.4)
    handles: list[Any] = []
    if best:
        handles.append(_draw_best(figure, axes, best, front.over))
    if beaten:
        x, y = _places(beaten, front.over)
        style: dict[str, Any] = {"facecolors": "none", "edgecolors": FAINT, "linewidths": 1.1}
        handles.append(axes.scatter(x, y, s=36, zorder=4, label="dominated", **style))
    if measured:
        handles.append(_draw_measured(axes, measured, front.over))
    name = scale_losses(axes, "y", [p.loss for p in drawn])
    axes.set_ylabel(f"loss (divergence per sample, {name})")
    axes.set_xlabel(f"{NAMES.get(front.over, front.over)} ({unit})")
    dense = _draw_dense(axes, front.header.get("dense", {}).get(front.over, 0.0) / scale, unit, handles)
    if missed:
        handles += axes.plot(
            missed, [0.0] * len(missed), "x", color=INK, markersize=7, markeredgewidth=1.5, clip_on=False, zorder=7,
            transform=axes.get_xaxis_transform(), label="budget that nothing meets",
        )  # fmt: skip
    if not drawn:
        axes.set_yticks([])
    network = front.header.get("network") or "network"
    titles(axes, f"{network}: loss against {front.over}", where(front.header), dense)
    legend_below(figure, handles, columns=3 if len(handles) != 4 else 2)
    labels = [(_cost(p, front.over), p.loss, p.label) for p in measured]
    _label(figure, axes, labels, [(_cost(p, front.over), p.loss) for p in drawn])
    return done(figure, path)


def _over_two(front: Front) -> Figure:
    """Cells of budgets in the colour of their least loss, and the allocations at their costs."""
    figure, axes = single_axes(8.0, 5.8)
    known = [p for p in front.points if np.isfinite(p.loss)]
    norm, name = color_losses([p.loss for p in known])
    colors: dict[str, Any] = {"cmap": "cividis_r", "norm": norm}
    cells = [p for p in front.points if np.isfinite(p.budget) and np.isfinite(p.budget_beside)]
    edges = []
    for column, own in ((front.over, "budget"), (front.beside, "budget_beside")):
        budgets = np.unique([getattr(p, own) for p in cells]) / PER_UNIT[column][0]
        edges.append(np.append(budgets, 2 * budgets[-1] - budgets[-2] if len(budgets) > 1 else budgets[-1] * 1.1))
    losses = np.full((len(edges[1]) - 1, len(edges[0]) - 1), np.nan)
    for p in cells:
        at = int(np.searchsorted(edges[0], p.budget / PER_UNIT[front.over][0]))
        losses[int(np.searchsorted(edges[1], p.budget_beside / PER_UNIT[front.beside][0])), at] = p.loss
    axes.grid(visible=False)
    axes.set_facecolor("#EEEEEE")
    shown = axes.pcolormesh(*edges, np.ma.masked_invalid(losses), zorder=1, **colors)
    figure.colorbar(shown, ax=axes, pad=0.02).set_label(f"loss (divergence per sample, {name})")
    handles: list[Any] = []
    best = front.best()
    kept = {(*map(p.cost, front.swept), p.loss) for p in best}
    beaten = [p for p in known if p.dominated and not p.measured and (*map(p.cost, front.swept), p.loss) not in kept]
    for label, points, area, marker, face in (
        ("front, predicted", best, 48, "o", "white"),
        ("dominated", beaten, 20, "o", FAINT),
        ("measured", [p for p in known if p.measured], 64, "D", HIGHLIGHT),
    ):
        if points:
            x, y = (_places(points, column)[0] for column in front.swept)
            axes.scatter(x, y, s=area, c=face, marker=marker, edgecolors=INK, label=label, clip_on=False, zorder=4)
            handles.append(Line2D([], [], linewidth=0, marker=marker, mec=INK, mfc=face, label=label))
    if np.isnan(losses).any():
        handles.append(Patch(facecolor="#EEEEEE", edgecolor=FAINT, label="budgets that nothing meets"))
    units = [PER_UNIT[column][1] for column in front.swept]
    axes.set(**{f"{a}label": f"{NAMES.get(c, c)} ({u})" for a, c, u in zip("xy", front.swept, units, strict=True)})
    dense = front.header.get("dense", {})
    words = [f"{dense.get(c, np.nan) / PER_UNIT[c][0]:.3g} {u}" for c, u in zip(front.swept, units, strict=True)]
    title = f"{front.header.get('network') or 'network'}: least loss over {front.over} and {front.beside}"
    titles(axes, title, where(front.header), f"dense fp32: {', '.join(words)}")
    legend_below(figure, handles, columns=4)
    return figure


def _cost(point: Point, over: str) -> float:
    """The swept cost in the unit drawn."""
    return point.cost(over) / PER_UNIT[over][0]


def _places(points: Sequence[Point], over: str) -> tuple[list[float], list[float]]:
    return [_cost(p, over) for p in points], [p.loss for p in points]


def _draw_best(figure: Figure, axes: Axes, best: Sequence[Point], over: str) -> Line2D:
    """The front as steps, its points coloured by how much of the network is in the coarsest precision; its key."""
    x, y = _places(best, over)
    axes.plot(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], color=INK, linewidth=1.0, zorder=2)
    key = Line2D(
        [], [], color=INK, linewidth=1.0, marker="o", markerfacecolor="#B8A86B", label="front, predicted"
    )
    if over == "latency":
        sigma = np.nan_to_num([p.sigma_ns / PER_UNIT[over][0] for p in best])
        axes.errorbar(x, y, xerr=sigma, fmt="none", ecolor="#777777", elinewidth=0.9, capsize=2, zorder=3)
        key.set_label("front, predicted, bars: ±σ")
    precisions = [[Variant.parse(v).precision for v in p.variants] for p in best]
    coarsest = min((p for row in precisions for p in row), key=lambda p: (WEIGHT_BITS[p], p))
    shares = [100.0 * row.count(coarsest) / len(row) for row in precisions]
    dots = axes.scatter(
        x,
        y,
        c=shares,
        cmap="cividis_r",
        vmin=0,
        vmax=100,
        s=48,
        edgecolors=INK,
        linewidths=0.7,
        zorder=5,
        label="front",
    )
    bar = figure.colorbar(dots, ax=axes, pad=0.02, shrink=0.9)
    bar.set_label(f"share of units in {coarsest} (%)")
    return key


def _draw_measured(axes: Axes, measured: Sequence[Point], over: str) -> Line2D:
    """Diamonds, with their interval where it is known; their key."""
    key = Line2D([], [], color=HIGHLIGHT, marker="D", markeredgecolor="white", linewidth=0, label="measured")
    x, y = _places(measured, over)
    bars = None
    if over == "latency":
        key.set_label("measured, bars: 95 % interval")
        ends = [(p.latency_ns - p.low_ns, p.high_ns - p.latency_ns) for p in measured]
        bars = np.nan_to_num(np.array(ends).T / PER_UNIT[over][0]).clip(0)
    axes.errorbar(
        x, y, xerr=bars, fmt="D", color=HIGHLIGHT, markersize=7, markeredgecolor="white", elinewidth=1.4, capsize=3,
        zorder=6,
    )  # fmt: skip
    return key


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


_OF_RUNTIME = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_fronts(
    fronts: Mapping[str, Front], path: str | Path | None = None, *, ratios: Mapping[str, float] | None = None
) -> Figure:
    """Plot the fronts of one network in several runtimes: loss against latency in ms.

    Each runtime has a colour: its front a step line, measured allocations diamonds with their interval, its dense network a
    dashed line.

    Args:
        fronts: Backend -> its front over latency.
        path: file to write, in the format that its suffix names; None writes none.
        ratios: Backend -> time of its dense network over the fastest's, measured in turns: tables of different hours are put
            on the scale of the fastest's by it. None takes the times of each table as they are.

    Returns:
        The figure.

    Raises:
        InvalidInput: A front is over something else, or there is none.
    """
    if not fronts or any(front.over != "latency" for front in fronts.values()):
        raise InvalidInput("expected fronts over latency, at least one")
    dense = {name: front.header.get("dense", {}).get("latency", np.nan) / 1e6 for name, front in fronts.items()}
    scale = dict.fromkeys(fronts, 1.0)
    if ratios is not None:
        fastest = min(fronts, key=lambda n: ratios[n])
        scale = {n: dense[fastest] * ratios[n] / ratios[fastest] / dense[n] for n in fronts}
    figure, axes = single_axes(8.0, 5.4)
    handles: list[Any] = []
    shown: list[float] = []
    for color, (name, front) in zip(_OF_RUNTIME * len(fronts), fronts.items(), strict=False):
        x, y = _places(front.best(), "latency")
        axes.plot(
            np.repeat(np.array(x) * scale[name], 2)[1:], np.repeat(y, 2)[:-1], color=color, linewidth=1.4, zorder=3
        )
        axes.plot(np.array(x) * scale[name], y, "o", color=color, markersize=4.5, zorder=4)
        at = dense[name] * scale[name]
        axes.axvline(at, color=color, linestyle=(0, (5, 3)), linewidth=1.1, zorder=1)
        handles.append(Line2D([], [], color=color, marker="o", markersize=4.5, label=f"{name} (dense fp32 {at:.3g} ms)"))
        measured = [p for p in front.points if p.measured]
        for p in measured:
            ends = np.nan_to_num([[p.latency_ns - p.low_ns], [p.high_ns - p.latency_ns]]).clip(0)
            axes.errorbar(
                p.latency_ns / 1e6 * scale[name], p.loss, xerr=ends / 1e6 * scale[name], fmt="D", color=color, markersize=7,
                markeredgecolor="white", elinewidth=1.4, capsize=3, zorder=6,
            )  # fmt: skip
        shown += [*y, *(p.loss for p in measured)]
    axes.set_ylabel(f"loss (divergence per sample, {scale_losses(axes, 'y', shown)})")
    axes.set_xlabel("latency (ms)")
    header = {**next(iter(fronts.values())).header, "backend": ""}
    titles(
        axes, f"{header.get('network') or 'network'}: loss against latency by runtime", where(header),
        "lines: predicted; diamonds: measured; dashed: dense fp32",
    )  # fmt: skip
    legend_below(figure, handles, columns=min(len(handles), 3))
    return done(figure, path)

"""Errors of a latency model on builds that it has not seen: how large, how well predicted, and what they go with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hwsearch.latency.diagnosis import CAUSES, BuildError, Diagnosis, diagnose
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.plot.style import FAINT, HIGHLIGHT, INK, Picture, done, where
from hwsearch.table.table import LatencyTable

FITTED = "#0072B2"
SHOWN = tuple(c for c in CAUSES if c != "measured time")


def plot_diagnosis(source: LatencyTable | LatencyModel, path: str | Path | None = None) -> Figure:
    """Plot the errors of a latency model, each build predicted without itself.

    Above: the error against the measured time, with sigma (of prediction and measurement together); how often errors are
    within so many sigma, beside what a normal distribution would give. Below: the error against each thing that it should
    not depend on, one panel each.

    Args:
        source: a table (a model is fitted on it) or a model.
        path: file to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.

    Raises:
        InvalidInput: there is too little to show.
    """
    model = source if isinstance(source, LatencyModel) else fit(source)
    found = diagnose(model)
    causes = [c for c in SHOWN if c in found.correlations]
    figure = Picture(figsize=(10.0, 7.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    first, second = above.subplots(1, 2, width_ratios=[1.6, 1.0])
    _over_time(first, found)
    _within_sigma(second, found)
    panels = below.subplots(1, max(len(causes), 1), sharey=True, squeeze=False)[0]
    for axes, cause in zip(panels, causes, strict=False):
        _against(axes, cause, found)
    panels[0].set_ylabel("error of the prediction")
    for axes in (first, second, *panels):
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    h = model.table.header
    place = where({"device": h.device.get("chip"), "backend": h.backend, "options": h.options})
    q = found.quality
    noise = "not measured" if q.noise is None else f"{q.noise:.1%}"
    figure.suptitle(
        f"{model.network.name}: errors on {q.builds} builds, each predicted without itself ({place})\n"
        f"median {q.median_error:.1%}, 90th percentile {q.p90_error:.1%}, Kendall τ {q.kendall_tau:.2f}, noise floor {noise}",
        fontsize=10.5, ha="left", x=0.01,
    )  # fmt: skip
    return done(figure, path)


def _parts(diagnosis: Diagnosis) -> list[tuple[dict[str, Any], str, list[BuildError]]]:
    """(how to draw them, what they are, points); hollow where the machine was disturbed."""
    parts = []
    for marker, color, what, heldout in (
        ("o", FITTED, "left out once", False),
        ("D", HIGHLIGHT, "held out", True),
    ):
        for disturbed in (False, True):
            points = [p for p in diagnosis.points if (p.heldout, p.disturbed) == (heldout, disturbed)]
            edge = (
                {"markerfacecolor": "white", "markeredgecolor": color}
                if disturbed
                else {"markeredgecolor": "white"}
            )
            name = f"{what}, on a disturbed machine" if disturbed else what
            if points:
                parts.append(({"marker": marker, "color": color, **edge}, f"{name} ({len(points)})", points))
    return parts


def _over_time(axes: Axes, diagnosis: Diagnosis) -> None:
    for look, label, points in _parts(diagnosis):
        x = [p.measured_ns / 1e6 for p in points]
        sigma = [p.together_ns / p.measured_ns for p in points]
        axes.errorbar(
            x, [p.error for p in points], yerr=sigma, linestyle="none", ecolor=FAINT, elinewidth=0.7, markersize=4.5,
            label=label, **look,
        )  # fmt: skip
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("measured latency (ms)")
    axes.set_ylabel("error of the prediction (bars: ±σ)")
    axes.legend(frameon=False, fontsize=8.5)


def _within_sigma(axes: Axes, diagnosis: Diagnosis) -> None:
    from scipy.stats import norm

    z = np.sort([abs(p.z) for p in diagnosis.points])
    axes.step(z, np.arange(1, len(z) + 1) / len(z), where="post", color=FITTED, label="builds")
    grid = np.linspace(0.0, max(3.0, float(z[-1])), 100)
    axes.plot(grid, 2 * norm.cdf(grid) - 1, color=INK, linewidth=0.9, linestyle="--", label="normal")
    axes.set(xlim=(0, min(float(grid[-1]), 6.0)), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("error within so many σ")
    axes.set_ylabel("share of builds")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def _against(axes: Axes, cause: str, diagnosis: Diagnosis) -> None:
    for look, _, points in _parts(diagnosis):
        axes.plot(
            [p.causes[cause] for p in points], [p.error for p in points], linestyle="none", markersize=3.5,
            **{**look, "markeredgewidth": 0.8 if points[0].disturbed else 0.4},
        )  # fmt: skip
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    correlation, p = diagnosis.correlations[cause]
    suspect = cause in diagnosis.suspects
    axes.set_xlabel(cause)
    axes.set_title(
        f"ρ {correlation:+.2f} (p {p:.1g}){': depends' if suspect else ''}", fontsize=9,
        color=HIGHLIGHT if suspect else INK, loc="left",
    )  # fmt: skip

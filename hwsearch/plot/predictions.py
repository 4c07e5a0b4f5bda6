"""Predicted against measured latency, build by build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hwsearch.errors import InvalidInput
from hwsearch.latency.model import LatencyModel, fit, noise_floor, validate
from hwsearch.plot.style import FAINT, HIGHLIGHT, INK, done, legend_below, light, single_axes, titles, where
from hwsearch.table.build import Build, Role
from hwsearch.table.header import LAYERED
from hwsearch.table.table import LatencyTable, judged_by, usable


def plot_predictions(source: LatencyTable | LatencyModel, path: str | Path | None = None) -> Figure:
    """Plot predicted against measured latency, in ms, of every build of the table's base precision.

    Error bars are sigma of the prediction and the 95 % interval of the measurement. Builds held out of the fit are marked; so are
    those in which a unit did not run as asked, which are no part of the fit.

    Args:
        source: a table (a model is fitted on it) or a model.
        path: file to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.

    Raises:
        InvalidInput: the table has no build to show.
    """
    model = source if isinstance(source, LatencyModel) else fit(source)
    table = model.table
    h = table.header
    header = {"device": h.device.get("chip"), "backend": h.backend, "options": h.options}
    base = table.header.options["base"]
    good = usable(table)
    groups = {
        "fitted": [b for b in good if not b.kept_out],
        "kept out": [b for b in good if b.kept_out],
        "not as asked": [b for b in table.builds if b.base == base and not b.partial and not b.as_asked()],
    }
    if model.table.header.mode in LAYERED:
        groups = {"fitted": [], "kept out": good, "not as asked": groups["not as asked"]}
    figure, axes = single_axes(6.4, 6.6)
    extent = _scatter(axes, model, groups)
    if not extent:
        raise InvalidInput(f"the table has no whole-network build of base {base} to compare; profile again")
    low, high = max(min(extent), 0.0), max(extent)
    margin = 0.05 * (high - low) or 0.05 * high
    ends = np.array([max(low - margin, 0.0), high + margin])
    axes.plot(ends, ends, color=INK, linewidth=1.0, label="predicted = measured", zorder=2)
    axes.fill_between(
        ends, 0.95 * ends, 1.05 * ends, color="#56B4E9", alpha=0.2, linewidth=0, label="±5 %", zorder=1
    )
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("measured latency (ms; bars: 95 % interval)")
    axes.set_ylabel("predicted latency (ms; bars: ±σ)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    about = _accuracy(model, judged_by(table) or groups["kept out"], groups["fitted"])
    titles(axes, f"{table.network.name}: predicted and measured latency", where(header), *about)
    legend_below(figure, axes.get_legend_handles_labels()[0], columns=2)
    return done(figure, path)


def _scatter(axes: Axes, model: LatencyModel, groups: Mapping[str, Sequence[Build]]) -> list[float]:
    """Draw the builds of each group with their error bars; the ends of these, in ms."""
    scale = model.table.header.reference_ns / 1e6
    styles = {
        "fitted": ("o", "#0072B2", "build of the fit"),
        "kept out": ("D", HIGHLIGHT, "held-out or test build"),
        "not as asked": ("x", FAINT, "a unit ran in another precision (not fitted)"),
    }
    extent: list[float] = []
    for kind, builds in groups.items():
        known = [(b, p) for b in builds for p in [_predicted(model, b)] if p is not None]
        if not known:
            continue
        marker, color, label = styles[kind]
        x = np.array([b.ratio * scale for b, _ in known])
        across = (
            np.array([[(b.ratio - b.low) * scale, (b.high - b.ratio) * scale] for b, _ in known]).clip(0).T
        )
        y, sigma = np.array([p for _, p in known]).T
        axes.errorbar(
            x, y, xerr=across, yerr=sigma, fmt=marker, color=color, markersize=6 if kind != "kept out" else 7,
            markeredgecolor=color if marker == "x" else "white", elinewidth=0.8, ecolor=light(color),
            label=f"{label} ({len(known)})", zorder=3 if kind == "fitted" else 4,
        )  # fmt: skip
        extent += [*(x - across[0]), *(x + across[1]), *(y - sigma), *(y + sigma)]
    return extent


def _predicted(model: LatencyModel, build: Build) -> tuple[float, float] | None:
    """(ms, sigma in ms); None where the model knows no time of some variant."""
    candidate = model.table.candidate(build)
    try:
        found = model.predict(candidate.variants, candidate.widths)
    except InvalidInput:
        return None
    return found.time_ns / 1e6, found.sigma_ns / 1e6


def _named(builds: Sequence[Build]) -> str:
    return "test" if all(b.role == Role.TEST for b in builds) else "held-out"


def _accuracy(model: LatencyModel, kept_out: Sequence[Build], fitted: Sequence[Build]) -> list[str]:
    builds, which = (kept_out, _named(kept_out)) if kept_out else (fitted, "fitted")
    builds = [b for b in builds if _predicted(model, b) is not None]
    noise = noise_floor(model.table)
    floor = "noise floor not measured" if noise is None else f"noise floor {noise:.1%}"
    if not builds:
        return [floor]
    found = validate(model, builds)
    tau = "" if np.isnan(found.kendall_tau) else f", Kendall τ {found.kendall_tau:.2f}"
    plural = "s" if found.builds > 1 else ""
    return [f"median error {found.median_error:.1%}{tau} on {found.builds} {which} build{plural}", floor]

"""The course of a recovery: held-out loss and loss in training over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from hwsearch.plot.style import FAINT, HIGHLIGHT, INK, scale_losses, single_axes, titles
from hwsearch.plot.style import done as finished
from hwsearch.progress import spoken

if TYPE_CHECKING:
    from hwsearch.recovery.recovery import Recovered

HELD_OUT = "#0072B2"


def plot_recovery(source: Recovered | Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Plot the losses of a recovery against its steps; what is kept is marked.

    Args:
        source: What `recover` returned, or the same from a report (`recovery` in report.json).
        path: File to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.
    """
    told: Mapping[str, Any] = source if isinstance(source, Mapping) else source.to_json()
    points, held_out = told["curve"], told["held_out"]
    figure, axes = single_axes(7.0, 4.2)
    trained = [p for p in points if p["loss"] is not None]
    what = "in training, with the task's loss" if told["objective"].startswith("the task's loss") else "in training"
    axes.plot([p["step"] for p in trained], [p["loss"] for p in trained], color=FAINT, label=what)
    axes.plot(
        [p["step"] for p in points], [p["held_out"] for p in points], color=HELD_OUT, marker="o", markersize=3.5,
        label="held out, divergence alone",
    )
    axes.axhline(held_out["refitted"], color=INK, linewidth=0.8, linestyle="--", label="held out, refitted")
    axes.plot(
        [told["best_step"]], [held_out["recovered"]], color=HIGHLIGHT, marker="D", linestyle="none", label="kept", zorder=3
    )
    name = scale_losses(axes, "y", [v for p in points for v in (p["loss"], p["held_out"]) if v is not None])
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({name})")
    axes.legend(frameon=False, fontsize=8.5)
    scores = ", ".join(f"{value:.4f} {what}" for what, value in told["score"].items())
    title = f"Recovery by {told['method']}: {told['steps']} steps in {spoken(told['seconds'])}"
    titles(axes, title, f"score: {scores}" if scores else "")
    return finished(figure, path)

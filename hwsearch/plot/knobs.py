"""A search over the numbers of a scheme: its samples, numbered, with the posterior of the score and the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hwsearch.plot.style import FAINT, HIGHLIGHT, INK, done, single_axes, titles

if TYPE_CHECKING:
    from hwsearch.pipeline.tuning import Tuned

CURVE = "#0072B2"


def plot_bayes(source: Tuned | Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Plot the samples of a search over the numbers of a scheme, numbered as they were measured.

    Of one number the score against it, with the posterior (two standard deviations) and the floor; of two the samples over both, on
    the posterior of the score, with the line of the floor; of three the score against the cost. Samples that hold the floor are
    filled, the others hollow, the answer is marked, and failures are crosses at the lower end.

    Args:
        source: What `bayes` returned, or the same from its report.json.
        path: File to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.
    """
    told: Mapping[str, Any] = source if isinstance(source, Mapping) else source.to_json()
    floor, posterior = told["floor"], told["posterior"]
    samples: Sequence[Mapping[str, Any]] = floor["samples"]
    figure, axes = single_axes(7.4, 4.8)
    if posterior is None:
        _over_cost(axes, samples, floor)
    elif len(posterior["knobs"]) == 1:
        _over_one(axes, samples, posterior, floor)
    else:
        _over_two(figure, axes, samples, posterior, floor["search"]["least"])
    axes.legend(frameon=False, fontsize=8.5)
    values = told["values"]
    answer = "the dense network" if values is None else ", ".join(f"{k}={v:.4g}" for k, v in values.items())
    line = f"least {floor['minimized']} at {floor['text']}: {answer}; score {told['score']['deployed']:.4f}"
    titles(axes, f"{told['task']}: {len(samples)} samples of a scheme", line)
    return done(figure, path)


def _draw(axes: Axes, samples: Sequence[Mapping[str, Any]], places: Sequence[tuple[float, float]]) -> None:
    """Samples at places, with their numbers."""
    for kind, style in (
        ("holds the floor", {"marker": "o", "facecolor": CURVE, "edgecolor": INK}),
        ("does not", {"marker": "o", "facecolor": "white", "edgecolor": INK}),
        ("failed", {"marker": "x", "color": INK}),
        ("answer", {"marker": "D", "facecolor": HIGHLIGHT, "edgecolor": INK}),
    ):
        own = [place for s, place in zip(samples, places, strict=True) if _kind(s) == kind]
        if own:
            x, y = zip(*own, strict=True)
            axes.scatter(x, y, s=46, zorder=4, label=kind, **style)  # type: ignore[arg-type]
    for s, place in zip(samples, places, strict=True):
        axes.annotate(str(s["number"]), place, (4, 5), textcoords="offset points", fontsize=8.5, zorder=5)


def _kind(sample: Mapping[str, Any]) -> str:
    if sample["answer"]:
        return "answer"
    return "failed" if sample["score"] is None else "holds the floor" if sample["holds"] else "does not"


def _over_one(
    axes: Axes, samples: Sequence[Mapping[str, Any]], posterior: Mapping[str, Any], floor: Mapping[str, Any]
) -> None:
    (knob,), (x,) = posterior["knobs"], posterior["places"]
    mean, deviation = np.array(posterior["mean"]), np.array(posterior["deviation"])
    axes.fill_between(x, mean - 2 * deviation, mean + 2 * deviation, color=CURVE, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=CURVE, linewidth=1.2, label="posterior, two standard deviations")
    _floor(axes, floor["search"])
    scored = [s["score"] for s in samples if s["score"] is not None]
    lowest = min([*scored, floor["search"]["least"]])
    places = [(s["values"][knob], lowest if s["score"] is None else s["score"]) for s in samples]
    _draw(axes, samples, places)
    errors = [(at, s["error"]) for s, at in zip(samples, places, strict=True) if s["error"] is not None]
    for (a, b), error in errors:
        axes.errorbar(a, b, yerr=error, color=INK, linewidth=0.8, zorder=3)
    span = floor["search"]["dense"] - lowest or 1.0
    axes.set_ylim(lowest - 0.15 * span, floor["search"]["dense"] + 0.15 * span)
    axes.set(xlabel=knob, ylabel="score in the search", xscale=_scales(posterior)[0])


def _scales(posterior: Mapping[str, Any]) -> list[str]:
    """Of the axis of each knob; reports of before 29 November 2026 do not say."""
    return ["log" if own else "linear" for own in posterior.get("log", [False] * len(posterior["knobs"]))]


def _over_two(
    figure: Figure, axes: Axes, samples: Sequence[Mapping[str, Any]], posterior: Mapping[str, Any], least: float
) -> None:
    knobs, (x, y) = posterior["knobs"], posterior["places"]
    mean = np.array(posterior["mean"]).T
    shown = axes.pcolormesh(x, y, mean, cmap="cividis", shading="nearest", zorder=1)
    figure.colorbar(shown, ax=axes, pad=0.02).set_label("posterior mean of the score")
    if mean.min() < least < mean.max():
        axes.contour(x, y, mean, levels=[least], colors=HIGHLIGHT, zorder=2)
        axes.plot([], [], color=HIGHLIGHT, label=f"floor {least:.4f}")
    _draw(axes, samples, [(s["values"][knobs[0]], s["values"][knobs[1]]) for s in samples])
    along, up = _scales(posterior)
    axes.set(xlabel=knobs[0], ylabel=knobs[1], xscale=along, yscale=up)


def _over_cost(axes: Axes, samples: Sequence[Mapping[str, Any]], floor: Mapping[str, Any]) -> None:
    scored = [s for s in samples if s["score"] is not None]
    scale, unit = {"latency": (1e6, "ms"), "size": (1e6, "MB")}.get(floor["minimized"], (1e6, "million"))
    _draw(axes, scored, [(s["costs"][floor["minimized"]] / scale, s["score"]) for s in scored])
    _floor(axes, floor["search"])
    axes.set(xlabel=f"{floor['minimized']} ({unit})", ylabel="score in the search")


def _floor(axes: Axes, search: Mapping[str, Any]) -> None:
    axes.axhline(search["least"], color=HIGHLIGHT, linewidth=1.0, linestyle="--", label=f"floor {search['least']:.4f}")
    axes.axhline(search["dense"], color=FAINT, linewidth=1.0, linestyle=":", label=f"dense {search['dense']:.4f}")

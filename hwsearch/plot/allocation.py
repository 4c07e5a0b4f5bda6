"""One allocation, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Curve

from hwsearch.errors import InvalidInput
from hwsearch.latency.layer_sum import dense_unit_ns
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.network import Network
from hwsearch.network.variants import WEIGHT_BITS, Variant
from hwsearch.plot.style import (
    FAINT,
    HATCH,
    INK,
    PRECISION_COLORS,
    Picture,
    done,
    legend_below,
    scale_losses,
    shorten,
    titles,
    where,
)
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable

if TYPE_CHECKING:
    from hwsearch.allocate.allocation import Allocation


def plot_allocation(
    allocation: Allocation,
    table: LatencyTable | LatencyModel | None = None,
    sensitivity: SensitivityTable | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Plot one row a unit, in network order, coloured by the precision chosen for it.

    Arcs beside the names are edges between a unit with quantized activations and one without, where a conversion costs time.

    Args:
        allocation: the answer of a search.
        table: gives the predicted time of each unit, boundaries excepted, in ms; other variants' times are outlines.
            Without one every bar has length 1.
        sensitivity: gives the loss of each unit, other variants' as hollow dots.
        path: file to write, in the format that its suffix names; None writes none.

    Returns:
        The figure.

    Raises:
        InvalidInput: the table is of another network.
    """
    chosen = {unit: Variant.parse(v) for unit, v in allocation.variants.items()}
    model = fit(table) if isinstance(table, LatencyTable) else table
    for network in (model and model.network, sensitivity and sensitivity.network):
        if network and set(network.by_name) != set(chosen):
            raise InvalidInput(
                "the allocation is of another network than the table or the sensitivities beside it"
            )
    network = model.network if model else sensitivity.network if sensitivity else None
    units = [u.name for u in network.units] if network else list(chosen)
    rows = {unit: i for i, unit in enumerate(units)}

    ratios = [0.5, 4.0, *([2.0] if sensitivity else [])]
    figure = Picture(
        figsize=(10.5 if sensitivity else 8.5, 2.3 + 0.25 * len(units)), dpi=100, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios))
    arcs, times = panels[0], panels[1]
    arcs.set_yticks(range(len(units)), [shorten(u, 30) for u in units])
    arcs.set_ylim(len(units) - 0.4, -0.6)

    crossed = _draw_boundaries(arcs, network, chosen, rows)
    _draw_times(times, model, chosen, rows, allocation.widths)
    if sensitivity:
        _draw_losses(panels[2], sensitivity, model, chosen, rows)
    for panel in panels[1:]:
        panel.tick_params(left=False)
        panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    titles(
        times, f"{allocation.network_name}: the allocation", where(_allocation_header(allocation)),
        *_allocation_text(allocation, model, chosen),
    )  # fmt: skip
    handles = _variant_handles(chosen)
    if model or sensitivity:
        handles.append(
            Patch(facecolor="none", edgecolor=FAINT, label="hollow: another variant, in its colour")
        )
    handles.append(Line2D([], [], color=INK, linewidth=1.0, label=f"quantized meets float ({crossed})"))
    legend_below(figure, handles, columns=len(handles))
    return done(figure, path)


def _variant_handles(chosen: Mapping[str, Variant]) -> list[Any]:
    """A legend entry for each variant, with how many units have it."""
    order = list(WEIGHT_BITS)
    kinds = sorted(
        set(chosen.values()), key=lambda v: (order.index(v.precision), v.kept is not None, v.pattern)
    )
    counts = {v: sum(own == v for own in chosen.values()) for v in kinds}
    return [
        Patch(
            facecolor=PRECISION_COLORS[v.precision],
            edgecolor="white" if v.kept else PRECISION_COLORS[v.precision],
            hatch=HATCH if v.kept else None,
            label=f"{v.executed} ({n} unit{'s' if n > 1 else ''})",
        )
        for v, n in counts.items()
    ]


def _draw_boundaries(
    axes: Axes, network: Network | None, chosen: Mapping[str, Variant], rows: Mapping[str, int]
) -> int:
    """Arcs between the rows of edges whose ends differ in class; how many there are."""
    if network is None:
        edges = list(pairwise(rows))
    else:
        edges = list(dict.fromkeys((e.src, e.dst) for e in network.edges))
    crossed = [(a, b) for a, b in edges if chosen[a].quantized != chosen[b].quantized]
    longest = max((abs(rows[a] - rows[b]) for a, b in crossed), default=1)
    for a, b in crossed:
        y0, y1 = rows[a] + 0.2, rows[b] - 0.2
        depth = 0.3 + 0.6 * abs(rows[a] - rows[b]) / longest
        curve = Curve([(1, y0), (1 - depth * 4 / 3, y0), (1 - depth * 4 / 3, y1), (1, y1)], [1, 4, 4, 4])
        axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=INK, linewidth=1.0, clip_on=False))
    axes.set_xlim(0, 1.05)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    return len(crossed)


def _draw_times(
    axes: Axes, model: LatencyModel | None, chosen: Mapping[str, Variant], rows: Mapping[str, int],
    widths: Mapping[str, int],
) -> None:  # fmt: skip
    times = {u: _unit_ms(model, u, chosen[u], widths) for u in rows}
    axes.barh(
        list(rows.values()),
        [times[u] for u in rows],
        height=0.72,
        color=[PRECISION_COLORS[chosen[u].precision] for u in rows],
        hatch=[HATCH if chosen[u].kept else "" for u in rows],
        edgecolor="white",
        linewidth=0.0,
    )
    if model is None:
        axes.set_xticks([])
        axes.set_xlabel("no times without a latency table")
        return
    for unit, names in model.table.offered().items():
        for name in names:
            variant = Variant.parse(name)
            if variant != chosen[unit] and model.knows(unit, variant, widths):
                axes.barh(
                    rows[unit], _unit_ms(model, unit, variant, widths), height=0.72, fill=False, linewidth=1.1,
                    edgecolor=PRECISION_COLORS[variant.precision], zorder=3,
                )  # fmt: skip
    kept = {row: text for unit, row in rows.items() if (text := _kept(model.network, unit, widths))}
    if kept:
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(list(kept), list(kept.values()), fontsize=8, color=INK)
        beside.tick_params(right=False, pad=1)
        beside.spines["right"].set_visible(False)
    axes.set_xlabel("predicted time of the unit (ms); at the right the channels kept, where some go")


def _kept(network: Network, unit: str, widths: Mapping[str, int]) -> str:
    """`48/64 → 32/64`: what is left of the channels that a unit reads and of those that it puts out."""
    whole, own = network[unit], network.unit_at(unit, widths)
    if own == whole:
        return ""
    if not whole.weight_shape:
        return " × ".join(
            f"{own.output_shape[w.axis]}/{whole.output_shape[w.axis]}"
            for w in whole.ways
            if w.tensor == "output"
        )
    axis, out = 1 - whole.out_axis, whole.out_axis
    return f"{own.weight_shape[axis]}/{whole.weight_shape[axis]} → {own.weight_shape[out]}/{whole.weight_shape[out]}"


def _unit_ms(model: LatencyModel | None, unit: str, variant: Variant, widths: Mapping[str, int]) -> float:
    """Predicted time in ms; of the dense fp32 build's own nodes where the model's base is another precision."""
    if model is None:
        return 1.0
    try:
        return model.unit_ns(unit, variant, widths) / 1e6
    except InvalidInput:
        if model.table.header.mode == Mode.SANDWICHED and variant == Variant("fp32"):
            return dense_unit_ns(model.table, unit) / 1e6
    for build in model.table.builds:
        if not build.partial and set(build.variants) == {str(variant)} and build.nodes:
            scale = model.table.time_ns(build) / sum(n.time_ns for n in build.nodes)
            return sum(n.time_ns / len(n.units) for n in build.nodes if unit in n.units) * scale / 1e6
    raise InvalidInput(f"the table has no measurement of {variant} for unit {unit}")


def _draw_losses(
    axes: Axes,
    sensitivity: SensitivityTable,
    model: LatencyModel | None,
    chosen: Mapping[str, Variant],
    rows: Mapping[str, int],
) -> None:
    offered = model.table.offered() if model else {u: tuple(row) for u, row in sensitivity.loss.items()}
    shown = []
    for unit, row in rows.items():
        for name in dict.fromkeys((*offered[unit], str(chosen[unit]))):
            variant, loss = Variant.parse(name), sensitivity[unit, name]
            color = PRECISION_COLORS[variant.precision]
            own = variant == chosen[unit]
            axes.plot(
                [loss], [row], "o", color=color, markersize=6, markeredgewidth=1.1,
                markerfacecolor=color if own else "none", zorder=4 if own else 3,
            )  # fmt: skip
            shown.append(loss)
    scale = scale_losses(axes, "x", shown)
    axes.set_xlabel(f"loss of the unit alone\n(divergence per sample,\n{scale})")


def _allocation_text(
    allocation: Allocation, model: LatencyModel | None, chosen: Mapping[str, Variant]
) -> list[str]:
    p, dense = allocation.predicted, allocation.dense
    latency = "latency not known, not bounded"
    if "latency_ns" in p:
        latency = (
            f"predicted {p['latency_ns'] / 1e6:.4g} ± {p['sigma_ns'] / 1e6:.2g} ms "
            f"({p['latency_ns'] / dense['latency_ns']:.0%} of dense)"
        )
    lines = [
        f"{latency}, loss {p['loss']:.3g}",
        f"{p['size_bytes'] / 1e6:.3g} MB"
        + (f", {p['memory_bytes'] / 1e6:.3g} MB of activations (estimated)" if "memory_bytes" in p else ""),
    ]
    if allocation.budgets:
        lines.insert(0, f"budget {', '.join(str(b['text']) for b in allocation.budgets)}")
    try:
        if model:
            units = sum(model.unit_ns(u, v, allocation.widths) for u, v in chosen.items()) / 1e6
            rest = model.rest_ns / 1e6
            between = model.predict(chosen, allocation.widths).time_ns / 1e6 - units - rest
            lines.append(f"units {units:.4f} ms + boundaries {between:.4f} ms + the rest {rest:.4f} ms")
    except InvalidInput:
        pass  # the dense network under another base precision: measured as a whole
    return lines


def _allocation_header(allocation: Allocation) -> dict[str, Any]:
    return {
        "device": allocation.device.get("chip"),
        "backend": allocation.backend,
        "options": allocation.options,
    }

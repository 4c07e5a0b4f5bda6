"""Pictures: what the data hold is what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from simulation import probed

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.front import Front, Point
from hwsearch.errors import InvalidInput
from hwsearch.latency.model import fit
from hwsearch.latency.staircase import staircase
from hwsearch.loss.table import SensitivityTable
from hwsearch.network.network import Edge, Network, Unit
from hwsearch.plot import plot_allocation, plot_front, plot_fronts, plot_predictions, plot_staircase
from hwsearch.plot.style import shorten
from hwsearch.table.build import Build, NodeRow
from hwsearch.table.header import Header
from hwsearch.table.table import LatencyTable

OPTIONS = {"threads": 2, "base": "bf16", "batch": 1}
DEVICE = {"id": "d", "chip": "A chip"}


# ---------------------------------------------------------------- inputs


def network(count: int) -> Network:
    """A chain of `count` convolutions of several shapes, with a shortcut over every third."""
    names = [f"features.block{i}.a_rather_long_name_of_a_part.conv{i}" for i in range(count)]
    units = tuple(
        Unit(n, "conv2d", ((1, 8 + i % 7, 8, 8),), (1, 8, 8, 8), (8, 8, 3, 3), macs=1000)
        for i, n in enumerate(names)
    )
    edges = [Edge(a, b, 1000) for a, b in pairwise(names)]
    edges += [Edge(names[i], names[i + 3], 1000, ("add",), True) for i in range(0, count - 3, 3)]
    return Network(units, tuple(edges), name="a network")


def table(count: int = 6, builds: int = 5) -> LatencyTable:
    """Builds of random allocations, int8 at half the time of bf16; two held out, one not as asked, one dense."""
    rng = np.random.default_rng(0)
    net = network(count)

    def build(role: str, variants: list[str], base: str = "bf16") -> Build:
        cost = {"dense.fp32": 4.0, "dense.bf16": 2.0, "dense.int8": 1.0}
        times = [cost[v] for v in variants]
        ratio = sum(times) / (2.0 * count) * float(rng.normal(1.0, 0.01))
        return Build(
            role=role, base=base, variants=tuple(variants), ratio=ratio, low=ratio * 0.98, high=ratio * 1.03,
            unstable=False, samples_ns=np.array([1, 2]), reference_ns=np.array([1, 2]),
            executed=tuple(v.removeprefix("dense.") for v in variants),
            nodes=tuple(
                NodeRow(u.name, "conv", "unit", (u.name,), "", t) for u, t in zip(net.units, times, strict=True)
            ),
        )  # fmt: skip

    def mixed() -> list[str]:
        return [str(v) for v in rng.choice(["dense.bf16", "dense.int8"], count)]

    made = [
        build("reference", ["dense.bf16"] * count),
        build("dense", ["dense.fp32"] * count, "fp32"),
        build("uniform", ["dense.int8"] * count),
        *(build("heldout" if i in (3, 4) else "design", mixed()) for i in range(builds)),
    ]
    wrong = build("design", ["dense.int8"] * count)
    made.append(replace(wrong, executed=("bf16",) * count))
    return LatencyTable(Header(net, DEVICE, "simulated", {}, OPTIONS, reference_ns=2e6), tuple(made))


def losses(net: Network) -> SensitivityTable:
    row = {"dense.fp32": 0.0, "dense.bf16": 1e-6, "dense.int8": 3e-4}
    return SensitivityTable(net, {u.name: dict(row) for u in net.units}, 8, "kl", False)


def allocation(net: Network, variants: list[str]) -> Allocation:
    return Allocation(
        variants=dict(zip((u.name for u in net.units), variants, strict=True)),
        predicted={"latency_ns": 1.5e6, "sigma_ns": 2e4, "size_bytes": 1_400_000, "loss": 2e-4, "macs": 1},
        dense={"latency_ns": 4e6, "size_bytes": 5_000_000},
        budgets=[{"text": "latency=40%", "column": "latency", "limit": 1_600_000}],
        solver={"status": "optimal", "gap": 0.0}, network=net.fingerprint, weights_digest="",
        network_name=net.name, device=DEVICE, backend="simulated", options=OPTIONS,
    )  # fmt: skip


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def drawn(figure: Figure, label: str) -> int:
    """Points of the errorbars whose legend entry begins with `label`."""
    found = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    return sum(len(c[0].get_xdata()) for c in found if str(c.get_label()).startswith(label))


def is_png(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- a front


def row(cost: float, loss: float, quantized: int, **changes: Any) -> Point:
    """A point of `cost` ms and MB, with `quantized` of ten units in int8."""
    variants = ("dense.int8",) * quantized + ("dense.bf16",) * (10 - quantized)
    found = Point(cost * 1e6, cost * 1e6, 2e4, cost * 1e6, loss, variants, status="optimal", gap=0.0)
    return replace(found, **changes)


def front(
    points: Sequence[Point], measured: Sequence[Point] = (), over: str = "latency", **dense: float
) -> Front:
    costs = {"latency": 3e6, "size": 5.2e6, **dense}
    header = {
        "network": "a network",
        "backend": "simulated",
        "device": "A chip",
        "options": OPTIONS,
        "dense": costs,
    }
    return Front(tuple(points), over, tuple("abcdefghij"), header).with_measured(measured)


def curve(count: int) -> list[Point]:
    return [row(0.4 + i / count, 1e-3 * 0.01 ** (i / count), 10 - 10 * i // count) for i in range(count)]


def infeasible(budget: float) -> Point:
    return Point(budget=budget * 1e6, infeasible=True)


MEASURED = [
    Point(latency_ns=6e5, low_ns=5.8e5, high_ns=6.3e5, size_bytes=2e6, loss=2e-4, label="deployed"),
    Point(latency_ns=9e5, size_bytes=4e6, loss=2e-5, label="uniform"),
]


def clouds(figure: Figure) -> dict[str, int]:
    found = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    return {str(c.get_label()): len(c.get_offsets()) for c in found}


def crosses(figure: Figure) -> list[float]:
    return [x for line in figure.axes[0].lines if line.get_marker() == "x" for x in line.get_xdata()]


def diamonds(figure: Figure) -> list[float]:
    return [x for line in figure.axes[0].lines if line.get_marker() == "D" for x in line.get_xdata()]


def test_a_front_shows_all_its_rows(tmp_path: Path) -> None:
    rows = [*curve(8), row(0.9, 9e-4, 5, dominated=True), row(1.0, 9e-4, 5, dominated=True), infeasible(0.3)]
    figure = plot_front(front(rows, MEASURED), tmp_path / "f.png")
    assert is_png(tmp_path / "f.png")
    assert clouds(figure) == {"front": 8, "dominated": 2}
    assert crosses(figure) == pytest.approx([0.3])
    assert diamonds(figure) == pytest.approx([0.6, 0.9])
    said = texts(figure)
    for words in (
        "a network",
        "simulated",
        "2 threads",
        "A chip",
        "deployed",
        "uniform",
        "3 ms, beyond the right",
    ):
        assert words in said
    assert figure.axes[0].get_xlabel() == "latency (ms)"
    assert "per sample, log scale" in figure.axes[0].get_ylabel()
    assert figure.axes[1].get_ylabel() == "share of units in int8 (%)"


def test_a_front_over_size_is_in_megabytes_and_needs_no_sigma() -> None:
    figure = plot_front(
        front(
            [row(0.3 + i, 1e-4 / (i + 1), i, sigma_ns=float("nan")) for i in range(4)], MEASURED, over="size"
        )
    )
    assert figure.axes[0].get_xlabel() == "size (MB)"
    assert diamonds(figure) == pytest.approx([2.0, 4.0])
    assert "dense fp32: 5.2 MB" in texts(figure)


def test_a_front_over_memory_says_that_it_is_estimated() -> None:
    points = [row(0.3 + i, 1e-4 / (i + 1), i, memory_bytes=1e5 * (i + 1)) for i in range(4)]
    figure = plot_front(front(points, over="memory", memory=6e5))
    assert figure.axes[0].get_xlabel() == "peak memory of activations, estimated (MB)"
    assert "dense fp32: 0.6 MB" in texts(figure)
    offsets = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert {round(float(x), 6) for x in offsets[:, 0]} >= {0.1, 0.2, 0.3, 0.4}


@pytest.mark.parametrize("lossless", [False, True])
def test_a_front_over_two_costs_is_drawn_as_cells(lossless: bool, tmp_path: Path) -> None:
    """One cell for each pair of budgets that something meets, one mark for each allocation that no other beats."""
    points = []
    for i, j in product(range(4), repeat=2):
        loss = 0.0 if lossless and i == j == 3 else 10.0 ** -(i + j)
        grid = {"budget": 1e6 * (i + 1), "budget_beside": 2e6 * (j + 1)}
        if i + j == 0:
            points.append(Point(**grid, infeasible=True))
            continue
        points.append(row(i + 0.9, loss, 3, size_bytes=2e6 * (j + 0.8), memory_bytes=1.0, **grid, dominated=(i, j) == (1, 1)))
    both = replace(front(points, MEASURED), beside="size")
    figure = plot_front(both, tmp_path / "f.png")
    assert is_png(tmp_path / "f.png")
    axes = figure.axes[0]
    meshes = [c for c in axes.collections if isinstance(c, QuadMesh)]
    assert np.ma.count(meshes[0].get_array()) == 15
    assert clouds(figure) == {"front, predicted": 14, "dominated": 1, "measured": 2}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency (ms)", "size (MB)")
    said = texts(figure)
    assert "budgets that nothing meets" in said
    assert "dense fp32: 3 ms, 5.2 MB" in said


def test_fronts_of_two_runtimes_are_on_one_scale(tmp_path: Path) -> None:
    """The second table's times, of an hour when the machine was slower, are put on the scale of the first by the ratio."""
    fronts = {
        "openvino": front(curve(5), MEASURED[:1], latency=3e6),
        "onnxruntime": front(curve(3), MEASURED[1:], latency=6e6),
    }
    figure = plot_fronts(fronts, tmp_path / "f.png", ratios={"openvino": 1.0, "onnxruntime": 1.5})
    assert is_png(tmp_path / "f.png")
    assert diamonds(figure) == pytest.approx([0.6, 0.9 * 0.75])
    said = texts(figure)
    assert "openvino (dense fp32 3 ms)" in said
    assert "onnxruntime (dense fp32 4.5 ms)" in said
    assert diamonds(plot_fronts(fronts)) == pytest.approx([0.6, 0.9]), "as they are"


def test_dense_is_a_line_where_it_is_near() -> None:
    figure = plot_front(front(curve(5), latency=1.3e6))
    assert any(list(line.get_xdata()) == [1.3, 1.3] for line in figure.axes[0].lines)
    assert "beyond" not in texts(figure)


@pytest.mark.parametrize(
    "rows",
    [
        curve(300),
        curve(1),
        [row(0.4, 0.0, 10), row(0.6, 0.0, 5)],
        [row(0.4, 1e-3, 10), row(0.6, 1e-5, 5), row(0.9, 0.0, 0)],
        [infeasible(0.1), infeasible(0.2)],
    ],
    ids=["long", "one point", "no loss", "a loss of zero", "nothing feasible"],
)
def test_fronts_of_any_shape_are_drawn_inside_the_axes(rows: list[Point]) -> None:
    figure = plot_front(front(rows))
    feasible = [r for r in rows if not r.infeasible]
    assert clouds(figure).get("front", 0) == len(feasible)
    assert len(crosses(figure)) == len(rows) - len(feasible)
    low, high = figure.axes[0].get_ylim()
    assert all(low <= r.loss <= high for r in feasible)
    figure.draw_without_rendering()
    frame = figure.bbox
    for axes in figure.axes:
        for text in (axes.xaxis.label, axes.yaxis.label):
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


def test_the_legend_of_a_front_covers_no_data() -> None:
    figure = plot_front(front([*curve(8), infeasible(0.3)], MEASURED))
    figure.draw_without_rendering()
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())


# ---------------------------------------------------------------- predicted against measured


def test_predictions_draw_each_build_of_the_base_once(tmp_path: Path) -> None:
    data = table()
    figure = plot_predictions(data, tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
    assert drawn(figure, "build of the fit") == 2 + 3  # the dense build has another base
    assert drawn(figure, "held-out or test build") == 2
    assert drawn(figure, "a unit ran in another precision") == 1
    said = texts(figure)
    assert "median error" in said
    assert "2 held-out builds" in said
    assert "noise floor" in said
    for label in (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()):
        assert "(ms" in label
    low, high = figure.axes[0].get_xlim()
    assert (low, high) == figure.axes[0].get_ylim()
    for build in data.builds:
        if build.base == "bf16":
            assert low < build.low * 2 < build.high * 2 < high


def test_predictions_take_a_model_as_well_as_a_table() -> None:
    assert drawn(plot_predictions(fit(table())), "build of the fit") == 5


def test_predictions_without_held_out_builds_say_on_what_the_error_is() -> None:
    data = table()
    kept = tuple(b for b in data.builds if b.role != "heldout")
    assert "fitted builds" in texts(plot_predictions(LatencyTable(data.header, kept)))


def test_predictions_of_a_table_without_whole_networks_are_an_error() -> None:
    data = table()
    alone = [("", "", "dense.int8", "", "", "")]
    builds = tuple(replace(data.builds[0], role="alone", variants=v, nodes=()) for v in alone)
    with pytest.raises(InvalidInput, match="no whole-network build"):
        plot_predictions(LatencyTable(data.with_header(mode="alone").header, builds))


# ---------------------------------------------------------------- one allocation


@pytest.mark.parametrize("count", [1, 14, 60])
def test_an_allocation_is_one_bar_a_unit_with_the_other_variants_as_outlines(
    count: int, tmp_path: Path
) -> None:
    data = table(count)
    variants = ["dense.int8" if i % 4 else "dense.bf16" for i in range(count)]
    chosen = allocation(data.network, variants)
    figure = plot_allocation(chosen, data, losses(data.network), path=tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")
    bars = [b for c in figure.axes[1].containers if isinstance(c, BarContainer) for b in c]
    assert sum(b.get_fill() for b in bars) == count
    assert sum(not b.get_fill() for b in bars) == sum(len(v) - 1 for v in data.offered().values())
    dots = [line for line in figure.axes[2].lines if line.get_marker() == "o"]
    assert len(dots) == sum(len(v) for v in data.offered().values())
    crossed = {
        (e.src, e.dst)
        for e in data.network.edges
        if (chosen.variants[e.src] == "dense.int8") != (chosen.variants[e.dst] == "dense.int8")
    }
    assert sum(isinstance(p, PathPatch) for p in figure.axes[0].patches) == len(crossed)
    assert f"quantized meets float ({len(crossed)})" in texts(figure)
    assert "(ms)" in figure.axes[1].get_xlabel()
    assert "per sample" in figure.axes[2].get_xlabel()


def test_rows_of_an_allocation_do_not_overlap() -> None:
    data = table(60)
    figure = plot_allocation(allocation(data.network, ["dense.int8"] * 60), data)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 60
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert min(b.x0 for b in boxes) >= 0


def test_an_allocation_can_be_drawn_without_table_or_losses() -> None:
    net = network(5)
    figure = plot_allocation(allocation(net, ["dense.int8"] * 2 + ["dense.fp16"] * 3))
    assert len(figure.axes) == 2
    assert "fp16 (3 units)" in texts(figure)
    assert "quantized meets float (1)" in texts(figure)


def test_the_dense_allocation_takes_its_times_from_the_dense_build() -> None:
    data = table(6)
    figure = plot_allocation(allocation(data.network, ["dense.fp32"] * 6), data, losses(data.network))
    bars = [b for c in figure.axes[1].containers if isinstance(c, BarContainer) for b in c if b.get_fill()]
    assert sum(b.get_width() for b in bars) == pytest.approx(data.dense_ns / 1e6)
    assert "linear near 0" in figure.axes[2].get_xlabel()


def test_an_allocation_of_another_network_is_refused() -> None:
    with pytest.raises(InvalidInput, match="another network"):
        plot_allocation(allocation(network(4), ["dense.int8"] * 4), table(6))


# ---------------------------------------------------------------- widths


def test_the_channels_kept_stand_beside_the_bars() -> None:
    data = probed()
    widths = {g: n // 2 for g, n in data.network.channels.items()}
    chosen = replace(allocation(data.network, ["dense.int8"] * len(data.network.units)), widths=widths)
    figure = plot_allocation(chosen, data)
    figure.draw_without_rendering()
    times = figure.axes[1]
    labels = [t for axis in times.child_axes for t in axis.get_yticklabels() if t.get_text()]
    narrow = [u for u in data.network.units if data.network.unit_at(u.name, widths) != u]
    assert len(labels) == len(narrow) > 0
    assert all("/" in t.get_text() for t in labels)
    assert min(t.get_window_extent().x0 for t in labels) >= times.get_window_extent().x1
    assert max(t.get_window_extent().x1 for t in labels) <= figure.bbox.x1


def test_a_staircase_shows_every_width_that_was_probed(tmp_path: Path) -> None:
    data = probed()
    figure = plot_staircase(data, tmp_path / "s.png")
    assert is_png(tmp_path / "s.png")
    steps = staircase(data)
    for axes, group in zip(figure.axes, data.network.channels, strict=False):
        assert axes.get_title(loc="left") == group
        own = [s for s in steps if s.group == group]
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        drawn = [
            (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "white") for line in dots
        ]
        for precision in ("fp32", "int8"):
            assert {(s.width, s.times_ns[precision] / 1e3, s.kept) for s in own} <= set(drawn)
        assert len(drawn) == 2 * len(own)
    said = texts(figure)
    for words in ("grouped", "simulated", "fp32", "int8", "filled: on the grid"):
        assert words in said


def test_a_staircase_of_a_table_without_widths_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="holds no widths"):
        plot_staircase(table())


@pytest.mark.parametrize(
    ("name", "length", "short"),
    [("conv1", 10, "conv1"), ("stages.0.conv1", 9, "stag…onv1"), ("abcdef", 4, "a…ef")],
)
def test_names_lose_their_middle(name: str, length: int, short: str) -> None:
    assert shorten(name, length) == short
    assert len(shorten(name, length)) <= length


def test_nothing_is_left_in_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = plot_predictions(table())
    assert plt.get_fignums() == before
    assert figure._repr_png_()[:4] == b"\x89PNG"  # type: ignore[attr-defined]

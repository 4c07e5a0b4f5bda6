"""The samples of a scheme as a picture: each is there with its number, for one, two and three knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hwsearch.plot import plot_bayes

NAMES = ("density", "bits", "filters")


def told(knobs: int) -> dict[str, Any]:
    """A report of four samples: one holds, one is the answer, one does not hold, one failed."""
    samples = []
    for number, (place, score) in enumerate(((0.9, 0.92), (0.5, 0.91), (0.2, 0.7), (0.1, None)), 1):
        costs = {} if score is None else {"size": 1e6 * place, "latency": 1e6, "macs": 1e6}
        samples.append({
            "number": number, "values": dict.fromkeys(NAMES[:knobs], place), "score": score, "error": score and 0.002,
            "holds": score is not None and score > 0.9, "answer": number == 2, "costs": costs,
        })  # fmt: skip
    grid: Any = [0.7, 0.91, 0.92] if knobs == 1 else [[0.6, 0.7, 0.8], [0.7, 0.91, 0.92], [0.8, 0.92, 0.93]]
    posterior: dict[str, Any] = {
        "knobs": list(NAMES[:knobs]), "log": [True, False][:knobs], "places": [[0.1, 0.5, 1.0]] * knobs, "mean": grid,
        "deviation": grid,
    }  # fmt: skip
    floor = {"samples": samples, "search": {"least": 0.9, "dense": 0.93}, "minimized": "size", "text": "97%"}
    return {
        "task": "net", "values": dict.fromkeys(NAMES[:knobs], 0.5), "score": {"dense": 0.93, "deployed": 0.912}, "floor": floor,
        "posterior": posterior if knobs < 3 else None,
    }  # fmt: skip


@pytest.mark.parametrize("knobs", [1, 2, 3])
def test_each_sample_is_drawn_with_its_number(knobs: int, tmp_path: Path) -> None:
    figure = plot_bayes(told(knobs), tmp_path / "bayes.png")
    axes = figure.axes[0]
    numbers = {text.get_text() for text in axes.texts} & {"1", "2", "3", "4"}
    assert numbers == ({"1", "2", "3"} if knobs == 3 else {"1", "2", "3", "4"}), "a failure has no cost to be drawn at"
    legend = axes.get_legend()
    assert legend is not None
    names = {text.get_text() for text in legend.get_texts()}
    assert {"holds the floor", "does not", "answer", "floor 0.9000"} <= names
    assert ("failed" in names) == (knobs < 3)
    assert axes.get_xlabel() == ("size (MB)" if knobs == 3 else "density")
    assert axes.get_xscale() == ("linear" if knobs == 3 else "log")
    assert axes.get_yscale() == "linear"
    assert (tmp_path / "bayes.png").stat().st_size > 0


def test_a_report_that_does_not_say_how_numbers_were_searched_is_drawn() -> None:
    own = told(1)
    del own["posterior"]["log"]
    assert plot_bayes(own).axes[0].get_xscale() == "linear"


def test_the_dense_network_as_the_answer_without_a_sample_is_drawn() -> None:
    own = told(1)
    own["values"], own["floor"]["samples"] = None, []
    assert "the dense network" in plot_bayes(own).axes[0].texts[-1].get_text()

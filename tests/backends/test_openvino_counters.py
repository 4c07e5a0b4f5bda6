from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import pytest

from hwsearch.backends.openvino import _node_means


class Request:
    """Counts as OpenVINO does: the mean of all inferences so far, in whole microseconds."""

    def __init__(self, taken_us: Callable[[int], float]) -> None:
        self.taken_us, self.total_us, self.runs = taken_us, 0.0, 0

    def infer(self) -> None:
        self.total_us += self.taken_us(self.runs)
        self.runs += 1

    def get_profiling_info(self) -> list[SimpleNamespace]:
        mean = timedelta(microseconds=round(self.total_us / self.runs))
        absent = SimpleNamespace(node_name="b", status="Status.NOT_RUN", real_time=timedelta(0))
        return [SimpleNamespace(node_name="a", status="Status.EXECUTED", real_time=mean), absent]


def test_the_first_inference_does_not_count() -> None:
    found = _node_means(Request(lambda run: 4000.0 if run == 0 else 130.0), 20)
    assert found == {"a": pytest.approx(130e3, abs=1e3)}


def test_an_interrupted_inference_does_not_count() -> None:
    found = _node_means(Request(lambda run: 4000.0 if run in (0, 60) else 130.0), 90)
    assert found["a"] == pytest.approx(130e3, abs=3e3)


@pytest.mark.parametrize("runs", [1, 2, 3, 20, 200])
def test_small_times_are_means_over_all_runs(runs: int) -> None:
    assert _node_means(Request(lambda run: 7.4), runs)["a"] == pytest.approx(7.4e3, abs=3e3)

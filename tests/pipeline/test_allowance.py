"""The time limit of a run bounds all of it, on a clock of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny

import hwsearch as hs
from hwsearch import api
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.simulate import Simulator
from hwsearch.errors import BudgetMissed, Infeasible
from hwsearch.pipeline import allowance
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimulatedBackend]:
    """A device on whose clock torch takes its time as well, so many seconds for a batch run once and for a refitted weight."""

    def make(name: str, build_s: float, pass_s: float, refit_s: float) -> SimulatedBackend:
        law = LatencyLaw.random(tiny.lowering(name).network, 2, unit_ns=2e6)
        backend = SimulatedBackend(law, noise=0.002, build_ns=round(1e9 * build_s))
        simulated, refitted = Simulator.__call__, WeightBank._refitted

        def simulate(self: Simulator, *args: Any) -> Any:
            backend.advance(1e9 * pass_s)
            return simulated(self, *args)

        def refit(self: WeightBank, *args: Any) -> Any:
            backend.advance(1e9 * refit_s)
            return refitted(self, *args)

        monkeypatch.setattr(Simulator, "__call__", simulate)
        monkeypatch.setattr(WeightBank, "_refitted", refit)
        monkeypatch.setattr(allowance, "run_once", lambda *batch: backend.advance(1e9 * pass_s))
        return backend

    return make


@pytest.mark.parametrize(
    ("name", "limit_s", "build_s", "pass_s", "refit_s"),
    [
        ("cnn", 120.0, 0.5, 0.1, 0.1),
        pytest.param("cnn", 300.0, 2.0, 0.2, 0.1, marks=pytest.mark.slow),
        pytest.param("cnn", 600.0, 1.0, 1.0, 0.5, marks=pytest.mark.slow),
        pytest.param("cnn", 600.0, 8.0, 0.1, 0.0, marks=pytest.mark.slow),
        pytest.param("transformer", 400.0, 1.0, 0.3, 0.2, marks=pytest.mark.slow),
        pytest.param("transformer", 1500.0, 3.0, 2.0, 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_run_keeps_its_limit(
    device: Callable[..., SimulatedBackend], tmp_path: Path,
    name: str, limit_s: float, build_s: float, pass_s: float, refit_s: float,
) -> None:  # fmt: skip
    backend = device(name, build_s, pass_s, refit_s)
    task = hs.Task(**{**vars(tiny.task(name)), "evaluate": lambda predict: 0.5})
    with suppress(Infeasible, BudgetMissed):  # an answer too, and nothing else is
        assert hs.run(task, ["latency=70%"], tmp_path, backend=backend, time_limit_s=limit_s).met
    taken = backend.clock() / 1e9
    assert taken <= 1.1 * limit_s
    log = (tmp_path / "run.log").read_text().splitlines()
    assert any("time limit" in line and "for the profile" in line and "for a second round, if" in line for line in log)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*  ", line) for line in log)
    assert "verify" in " ".join(log)
    assert any(re.search(r"sensitivity of .* s left, (\d+ min )?\d+ s more for each further round$", line) for line in log)


def test_an_answer_that_misses_is_followed_by_another_within_the_limit(
    device: Callable[..., SimulatedBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that the profile did not build take 12 % longer than it tells, which the first answer shows."""
    backend = device("cnn", 2.0, 0.1, 0.1)
    known, begun, loop = set[str](), [False], api.closed_loop

    def wander(second: float, network: str) -> float:
        if not begun[0]:
            known.add(network)
        return 1.0 if network in known else 1.12

    def begin(*args: Any, **options: Any) -> Any:
        begun[0] = True
        return loop(*args, **options)

    def evaluate(predict: Any) -> float:
        backend.advance(8e9)
        return 0.5

    backend.wander = wander
    monkeypatch.setattr(api, "closed_loop", begin)
    task = hs.Task(**{**vars(tiny.task("cnn")), "evaluate": evaluate})
    assert hs.run(task, ["latency=70%"], tmp_path, backend=backend, time_limit_s=180.0).met
    assert "no time is left for another round" not in (tmp_path / "run.log").read_text()
    assert backend.clock() / 1e9 <= 1.1 * 180.0


def test_the_time_to_score_an_engine_is_what_the_task_takes_beside_its_model_and_the_reference_s_inferences(
    device: Callable[..., SimulatedBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module takes 5 s for each of 3 samples, the task 4 s besides: engines are expected to take those, and 3 inferences."""
    backend = device("cnn", 0.5, 0.1, 0.1)
    own = tiny.task("cnn")
    own.model.register_forward_hook(lambda *_: backend.advance(15e9))
    found: list[tuple[allowance.Allowance, Any]] = []

    def evaluate(predict: Any) -> float:
        backend.advance(4e9)
        predict(own.example_inputs.repeat(3, 1, 1, 1))
        return 0.5

    real = allowance.Allowance.scoring_limit

    def limit(self: allowance.Allowance, table: Any) -> Any:
        found.append((self, table))
        return real(self, table)

    monkeypatch.setattr(allowance.Allowance, "scoring_limit", limit)
    task = hs.Task(**{**vars(own), "evaluate": evaluate})
    with suppress(Infeasible, BudgetMissed):
        hs.run(task, ["latency=70%"], tmp_path, backend=backend, time_limit_s=120.0)
    ((shared, table),) = found
    assert (shared.score_s, shared.scored) == (pytest.approx(19.0), 3)
    assert shared._score_s(None) == pytest.approx(19.0)
    assert shared._score_s(table) == pytest.approx(4.0 + 3 * table.header.reference_ns / 1e9)

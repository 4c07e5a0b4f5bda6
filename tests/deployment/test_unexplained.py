"""A loss far above the predicted one is said, with the layer that brings it, and is never just `met`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deployment.test_deploy import allocation as of_cnn
from deployment.test_report import REPORT
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.allocate.allocation import Allocation
from hwsearch.api import verify
from hwsearch.deployment.confirm import State
from hwsearch.deployment.unexplained import fall_explained, unforeseen
from hwsearch.lowering.lowering import Lowering
from hwsearch.testing import LatencyLaw, SimulatedBackend

pytestmark = pytest.mark.usefixtures("own_locks")


class Outlier(nn.Module):
    """`middle` reads one number a thousand times the others, which it ignores: in int8 the others are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(9, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.middle.weight[:, 8] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x))
        return self.last(self.middle(torch.cat([y, 1000 + 0 * y[:, :1]], 1)))


def task(score: float = 1.0) -> hs.Task:
    torch.manual_seed(0)
    model, x = Outlier().eval(), torch.randn(64, 8)
    scores = iter([score, *[1.0] * 9])
    return hs.Task(model, x[:1], list(x.split(16)), lambda predict: next(scores), "outlier", divergence="mse")


def allocation(predicted: float, coarse: tuple[str, ...] = ("first", "middle", "last")) -> Allocation:
    network = Lowering(task()).network
    return replace(
        of_cnn("cnn", 1.0),
        variants={u: f"dense.{'int8' if u in coarse else 'fp32'}" for u in network.by_name},
        widths={}, network=network.fingerprint, weights_digest=network.weights_digest, backend="simulated",
        predicted={"latency_ns": 1e6, "sigma_ns": 1e4, "size_bytes": 10**6, "macs": network.macs, "loss": predicted},
        budgets=[{"text": "size=100MB", "column": "size", "limit": 10**8}],
        options={"threads": 1, "base": "fp32", "batch": 1},
    )  # fmt: skip


def backend() -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(Lowering(task()).network))


def test_the_layer_is_named() -> None:
    report = verify(task(), allocation(1e-5), backend=backend())
    assert report.met
    assert report.verdict != "met"
    (said,) = report.unexplained
    assert "middle (dense.int8)" in said
    assert "as simulated" in said
    assert "times the predicted 1e-05" in said
    assert said in str(report)
    assert "met, but what it loses is not explained" in str(report)


def test_what_was_foretold_is_not_said() -> None:
    for chosen in (allocation(1.0), allocation(1e-5, ("first", "last"))):
        report = verify(task(), chosen, backend=backend())
        assert not report.unexplained
        assert report.verdict == "met"


def test_a_fall_of_the_score_that_the_loss_does_not_show() -> None:
    report = verify(_falling(), allocation(1e-5, ("first", "last")), backend=backend())
    (said,) = report.unexplained
    assert "score fell by 50.0%" in said
    assert "calibration data" in said
    assert report.verdict != "met"


def _falling() -> hs.Task:
    """The module scores 1, an engine a half."""
    old = task()

    def evaluate(predict: hs.task.Predict) -> float:
        return 1.0 if isinstance(predict, nn.Module) else 0.5

    return replace(old, evaluate=evaluate)


def test_narrow_layers_are_named_as_a_group() -> None:
    import tiny

    chosen = of_cnn("cnn", 0.25, "fp32", backend="simulated")
    chosen = replace(chosen, predicted={**chosen.predicted, "loss": 1e-9})
    law = LatencyLaw.random(tiny.lowering("cnn").network)
    task = replace(tiny.task("cnn"), divergence="mse")
    report = verify(task, chosen, backend=SimulatedBackend(law))
    assert any("narrow layers" in said and "--keep" in said for said in report.unexplained)


@pytest.mark.parametrize(
    ("predicted", "measured", "is_so"),
    [(1e-5, 2e-2, True), (1e-3, 5e-3, False), (0.0, 1e-6, False), (0.0, 0.1, True), (1e-7, 9e-4, False)],
)
def test_what_is_far(predicted: float, measured: float, is_so: bool) -> None:
    assert unforeseen(predicted, measured) is is_so
    assert fall_explained(predicted) >= 0.01


def test_a_missed_budget_is_missed_whatever_the_loss() -> None:
    assert replace(REPORT, judged=replace(REPORT.judged, state=State.MISSED), unexplained=["x"]).verdict == "MISSED"
    assert replace(REPORT, wrong_units={"a": "off by 3"}).wrong_units["a"] in str(
        replace(REPORT, wrong_units={"a": "off by 3"})
    )

"""Met is said where it is true: new engines in several windows, on a device that drifts and builds no engine twice alike."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny

from hwsearch.allocate.budget import Budget, parse_budgets
from hwsearch.allocate.costs import Costs
from hwsearch.deployment.confirm import MOST_WINDOWS, State, Window, decided, half_width, judge
from hwsearch.deployment.session import Session
from hwsearch.engine.setup import set_up
from hwsearch.profiler.profile import without_times
from hwsearch.testing import LatencyLaw, SimulatedBackend

DENSE, SHARE = 4e6, 0.5


@dataclass(frozen=True)
class Noise:
    """Relative standard deviations of an engine and of a window, and the amplitude of a slow drift of each network's ratio."""

    engine: float = 0.0
    window: float = 0.0
    drift: float = 0.0


DEVICES = {
    "slow drift": Noise(0.003, 0.002, 0.01),
    "noisy windows": Noise(0.005, 0.01),
    "engines differ": Noise(0.01, 0.005),
    "all of it": Noise(0.007, 0.007, 0.01),
}


class Device:
    """Times of networks whose truth is known, at some second."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise, self.rng = noise, np.random.default_rng(seed)
        self.periods, self.phases = self.rng.uniform(600, 3600, 3), self.rng.uniform(0, 2 * np.pi, 3)

    def costs(self, network: int, true_ns: float, second: float) -> Costs:
        slow = self.noise.drift * np.sin(2 * np.pi * second / self.periods[network] + self.phases[network])
        fast = self.rng.normal(0, np.hypot(self.noise.engine, self.noise.window))
        return Costs(latency=true_ns * float(np.exp(slow + fast)), size=1000)


def once(noise: Noise, seed: int, budget: Budget, *, slower: float = 1.0) -> tuple[State, bool, float]:
    """(the verdict on an allocation, whether the interval of its latency holds the truth, truth / budget)."""
    device = Device(noise, seed)
    true_ns = SHARE * DENSE * float(device.rng.uniform(0.93, 1.03))
    earlier = [
        [device.costs(1, DENSE, 0.0), device.costs(1, DENSE, 600.0)],
        [device.costs(2, 0.4 * DENSE, 0.0), device.costs(2, 0.4 * DENSE, 600.0)],
    ]
    windows: list[Window] = []
    while len(windows) < MOST_WINDOWS:
        second = 660.0 + 25.0 * len(windows)
        own, dense = device.costs(0, true_ns, second), device.costs(1, DENSE, second)
        now = [replace(c, latency=c["latency"] * slower, size=None) for c in (own, dense)]
        windows.append(Window(own, dense, *now))
        judged = judge(windows, earlier, [budget])
        if decided(judged):
            break
    return judged.state, judged.low["latency"] <= true_ns <= judged.high["latency"], true_ns / (SHARE * DENSE)


@pytest.mark.parametrize("text", ["latency=50%", "latency=2ms"])
@pytest.mark.parametrize("name", DEVICES)
def test_of_what_is_met_little_is_over_and_the_interval_holds_the_truth(name: str, text: str) -> None:
    budget = Budget.parse(text)
    found = [once(DEVICES[name], seed, budget) for seed in range(700)]
    met = [truth for state, _, truth in found if state == State.MET]
    assert len(met) >= 200
    assert np.mean(np.array(met) > 1.01) <= 0.025
    assert 0.90 <= np.mean([holds for _, holds, _ in found]) <= 1.0
    clear = [state for state, _, truth in found if truth < 0.95]
    assert np.mean(np.array(clear) == State.MET) > 0.9, "what is clearly within is said to be"


@pytest.mark.parametrize("text", ["latency=2ms", "latency_p99=2ms"])
def test_a_device_at_half_speed_never_meets_an_absolute_budget_falsely(text: str) -> None:
    states = {once(DEVICES["all of it"], seed, Budget.parse("latency=2ms"), slower=2.0)[0] for seed in range(300)}
    assert states == {State.MISSED}
    own = Costs(latency=1e6, latency_p99=1.9e6, size=9)
    window = Window(own, own, Costs(latency=2e6, latency_p99=3.8e6), Costs(latency=2e6, latency_p99=3.8e6))
    judged = judge([window], [[]], parse_budgets([text]))
    assert judged.state == (State.MISSED if text == "latency_p99=2ms" else State.WITHIN_NOISE)
    assert judge([window], [[]], parse_budgets([text.replace("2ms", "100%")])).state != State.MISSED, "a share holds"


def test_what_is_counted_has_no_noise() -> None:
    own, dense = Costs(latency=1e6, size=500, macs=5), Costs(latency=2e6, size=1000, macs=10)
    window = Window(own, dense, Costs(latency=1e6), Costs(latency=2e6))
    for text, state in (("size=50%", State.MET), ("size=499B", State.MISSED), ("macs=5MAC", State.MET)):
        judged = judge([window], [[]], parse_budgets([text]))
        assert judged.state == state
        assert decided(judged)
    assert judge([window, replace(window, wrong=True)], [[]], parse_budgets(["size=50%"])).state == State.MISSED


def test_the_dense_network_is_not_uncertain_against_itself() -> None:
    own = Costs(latency=1e6, size=500)
    window = Window(own, own, Costs(latency=1e6), Costs(latency=1e6))
    assert judge([window], [[own]], parse_budgets(["latency=100%"])).state == State.MET
    assert judge([window], [[own]], parse_budgets(["latency=1ms"])).state == State.WITHIN_NOISE


def test_more_repeats_and_windows_narrow_the_interval() -> None:
    quiet = [[1.0, 1.0], [2.0, 2.0]]
    assert half_width(quiet * 3, 1) < half_width(quiet, 1) < half_width([], 1)
    assert half_width(quiet, 3) < half_width(quiet, 1)
    assert half_width([[1.0, 1.05]], 1) > half_width([[1.0, 1.001]], 1)


def test_a_network_that_is_the_reference_narrows_nothing() -> None:
    """Its ratio to itself hardly differs, whatever those of others do."""
    own, dense = Costs(latency=1e6), Costs(latency=2e6)
    window = Window(own, dense, own, dense)
    upper = [judge([window], [group], parse_budgets(["latency=2ms"])).high["latency"] for group in (None, [dense] * 5)]
    assert upper[0] > upper[1]


@pytest.mark.usefixtures("own_locks")
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_only_what_is_not_the_reference_tells_how_far_measurements_differ(base: str) -> None:
    law = LatencyLaw.random(tiny.lowering("cnn").network, precisions=("fp32", "bf16", "int8"))
    backend = SimulatedBackend(law, noise=0.01, bases=("fp32", "bf16"))
    setup = set_up(tiny.task("cnn"), backend, base=base)
    session = Session(setup)
    session.bounds(parse_budgets(["latency=50%"]), without_times(setup))
    dense, *others = session.earlier()
    assert (dense is None) == (base == "fp32")
    assert len(others) == 1, "all int8: the other one is the dense network, or the reference"

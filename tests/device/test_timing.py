from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from hwsearch.device.timing import Protocol, Timing, paired, too_wide


class Machine:
    """Runs that take simulated time."""

    def __init__(
        self, noise: float = 0.0, drift: Callable[[float], float] = lambda s: 1.0, seed: int = 0
    ) -> None:
        self.now, self.noise, self.drift, self.rng = 0.0, noise, drift, np.random.default_rng(seed)
        self.calls: list[str] = []

    def clock(self) -> int:
        return round(self.now)

    def run(self, name: str, time_ns: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += (
                time_ns * self.drift(self.now / 1e9) * float(np.exp(self.noise * self.rng.standard_normal()))
            )

        return run

    def compare(self, protocol: Protocol = Protocol(), *, ratio: float = 0.5, seed: int = 0) -> Timing:  # noqa: B008
        runs = {"candidate": self.run("candidate", ratio * 2e6)}
        return paired(self.run("reference", 2e6), runs, protocol, clock=self.clock, seed=seed)["candidate"]


def test_linear_drift_cancels() -> None:
    # The machine slows by half within a second.
    timing = Machine(drift=lambda s: 1.0 + 0.5 * s).compare()
    assert timing.ratio == pytest.approx(0.5, rel=2e-3)
    assert timing.median_ns > 1.02 * 1e6


def test_an_engine_settles_only_behind_another_one() -> None:
    """Blocks A B B A: 4 inferences of A and 2 of B settle, as many are timed."""
    machine = Machine()
    protocol = Protocol(width=0.0, limit_s=0.12, block_ns=2_000_000, settle_ns=2_000_000, min_rounds=2, warmup_ns=1)
    runs = {"b": machine.run("b", 1e6)}
    timing = paired(machine.run("a", 5e5), runs, protocol, clock=machine.clock)["b"]
    turns = [(name, len(list(own))) for name, own in groupby(machine.calls)]
    assert turns[:2] == [("a", 3), ("b", 3)], "warmed up"
    assert turns[2:6] == [("a", 4 + 4), ("b", 2 + 2 + 2), ("a", 4 + 4 + 4), ("b", 2 + 2 + 2)]
    assert len(timing.samples_ns) == machine.calls.count("b") - 3 - 2 * sum(name == "b" for name, _ in turns[2:])


def test_slow_swings_of_the_machine_cancel() -> None:
    timing = Machine(noise=0.02, drift=lambda s: 1.0 + 0.3 * np.sin(s)).compare()
    assert timing.ratio == pytest.approx(0.5, rel=0.01)


def busy(share: float, period_s: float = 0.5) -> Callable[[float], bool]:
    """Something else that takes the machine for a share of each period."""
    return lambda s: s % period_s < share * period_s


def disturbed(at: Callable[[float], bool], **options: Any) -> Timing:
    """A candidate of half the reference's time, hit harder than it (2x against 1.5x) while something else runs."""
    machine = Machine(noise=0.01)

    def run(name: str, time_ns: float, slower: float) -> Callable[[], None]:
        plain = machine.run(name, time_ns)

        def both() -> None:
            before, hit = machine.now, at(machine.now / 1e9)
            plain()
            machine.now += (machine.now - before) * (slower - 1.0) * hit

        return both

    candidate = {"candidate": run("candidate", 1e6, 2.0)}
    return paired(run("reference", 2e6, 1.5), candidate, clock=machine.clock, **options)["candidate"]


def test_disturbed_rounds_do_not_count() -> None:
    timing = disturbed(busy(0.6))
    assert timing.ratio == pytest.approx(0.5, rel=0.01)
    assert not timing.unstable
    assert timing.samples_ns.max() > 1.8e6  # they are kept all the same


def test_a_disturbance_that_lasts_is_flagged_where_the_quiet_machine_is_known() -> None:
    timing = disturbed(lambda s: True, quiet_ns=2e6)
    assert timing.ratio == pytest.approx(0.5 * 2.0 / 1.5, rel=0.01)
    assert timing.unstable
    waited = disturbed(lambda s: s < 4.0, quiet_ns=2e6)  # for half its time
    assert waited.ratio == pytest.approx(0.5, rel=0.01)


def test_a_machine_that_is_slower_as_a_whole_has_quiet_rounds_of_its_own() -> None:
    timing = disturbed(busy(0.5), quiet_ns=1e6)
    assert timing.disturbed
    assert timing.unstable
    assert timing.ratio == pytest.approx(0.5, rel=0.01)


def test_rounds_are_mirrored() -> None:
    machine = Machine()
    protocol = Protocol(block_ns=1, warmup_ns=1)
    machine.compare(protocol)
    order = [name for i, name in enumerate(machine.calls) if not i or machine.calls[i - 1] != name]
    assert order == ["reference", "candidate"] + ["reference", "candidate"] * protocol.min_rounds + [
        "reference"
    ]


def test_stops_as_soon_as_the_interval_is_narrow() -> None:
    protocol = Protocol(min_rounds=5)
    timing = Machine().compare(protocol)
    assert len(timing.samples_ns) == 2 * protocol.min_rounds * timing.block
    assert not timing.unstable
    assert timing.width <= protocol.width


def test_goes_on_while_the_interval_is_wide() -> None:
    quiet, noisy = Machine(noise=0.01).compare(), Machine(noise=0.1).compare()
    assert len(noisy.samples_ns) > 2 * len(quiet.samples_ns)
    assert noisy.unstable or noisy.width <= 0.01


@pytest.mark.parametrize(
    ("width", "usual", "flagged"),
    [
        (0.02, [], True),
        (0.009, [], False),
        (0.02, [0.015] * 3, True),  # of three nothing is concluded
        (0.02, [0.015] * 4, False),
        (0.032, [0.015, 0.014, 0.016, 0.9], True),
        (0.009, [0.001] * 8, False),  # as narrow as asked
        (0.2, [0.15, 0.3, 0.12, 0.18], False),  # a machine that is never quiet
    ],
)
def test_unstable_is_what_a_machine_does_not_usually_show(width: float, usual: list[float], flagged: bool) -> None:
    assert too_wide(width, usual, 0.01) == flagged


def test_unstable_is_flagged_at_the_time_limit() -> None:
    machine = Machine(noise=0.8)
    timing = machine.compare(Protocol(limit_s=0.5))
    assert timing.unstable
    assert timing.width > 0.01
    assert machine.clock() < 3e9
    assert "UNSTABLE" in repr(timing)
    assert "UNSTABLE" not in repr(Machine().compare())


def test_raw_samples_are_kept_and_warm_ups_are_apart() -> None:
    slow_start = Machine(drift=lambda s: 10.0 if s < 0.07 else 1.0)
    timing = slow_start.compare()
    assert timing.warmup_ns.max() > 5e6
    assert len(timing.warmup_ns) >= 3
    assert len(timing.samples_ns) % timing.block == 0
    assert len(timing.reference_ns) % timing.reference_block == 0
    assert len(timing.samples_ns) // timing.block == len(timing.reference_ns) // timing.reference_block
    assert set(timing.samples_ns) == {1_000_000}
    assert set(timing.reference_ns) == {2_000_000}
    assert timing.samples_ns.dtype == np.int64


def test_several_candidates_share_rounds() -> None:
    machine = Machine(noise=0.02)
    ratios = {"half": 0.5, "same": 1.0, "double": 2.0}
    runs = {name: machine.run(name, ratio * 2e6) for name, ratio in ratios.items()}
    timings = paired(machine.run("reference", 2e6), runs, clock=machine.clock)
    assert {name: t.ratio for name, t in timings.items()} == pytest.approx(ratios, rel=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    ratios = [
        Machine(noise=0.03, seed=s).compare(Protocol(width=0.02, min_rounds=9), seed=s) for s in range(100)
    ]
    covered = np.mean([t.low <= 0.5 <= t.high for t in ratios])
    assert 0.8 <= covered <= 1.0
    assert np.median([t.ratio for t in ratios]) == pytest.approx(0.5, rel=2e-3)


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_as_it_was(collecting: bool) -> None:
    def fails() -> None:
        raise RuntimeError

    was = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        Machine().compare()
        assert gc.isenabled() == collecting
        with pytest.raises(RuntimeError):
            paired(fails, {"": fails})
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if was else gc.disable)()


class Launched:
    """An inference on a GPU: launching and waiting take 40 us of this process, unless many follow each other."""

    LAUNCH_NS = 4e4

    def __init__(self, machine: Machine, name: str, time_ns: float) -> None:
        self._machine, self._one = machine, machine.run(name, time_ns)

    def __call__(self) -> None:
        self._one()
        self._machine.now += self.LAUNCH_NS * float(self._machine.rng.choice([1.0, 1.0, 1.0, 2.0]))

    def replays(self, count: int) -> int:
        begun = self._machine.now
        for _ in range(count):
            self._one()
        taken = self._machine.now - begun
        self._machine.now += self.LAUNCH_NS
        return round(taken / count)


def test_launching_is_in_no_ratio_and_in_every_tail() -> None:
    """Networks of 20 and 40 us: by inferences that are waited for one by one the ratio would be 0.75."""
    machine = Machine(noise=0.01)
    timing = paired(
        Launched(machine, "reference", 4e4), {"c": Launched(machine, "candidate", 2e4)}, clock=machine.clock
    )["c"]
    assert timing.ratio == pytest.approx(0.5, rel=0.01)
    assert timing.median_ns == pytest.approx(2e4, rel=0.01)
    assert timing.reference_median_ns == pytest.approx(4e4, rel=0.01)
    assert timing.block == timing.reference_block == 1, "one value for a block"
    assert len(timing.singles_ns) == 200
    assert np.median(timing.singles_ns) == pytest.approx(6e4, rel=0.02)
    assert timing.tail(0.95) == pytest.approx(10 / 6, rel=0.05)


def test_inferences_of_a_cpu_are_their_own_singles() -> None:
    timing = Machine(noise=0.05).compare()
    assert len(timing.singles_ns) == 0
    assert timing.tail(0.95) == np.quantile(timing.samples_ns, 0.95) / np.median(timing.samples_ns)

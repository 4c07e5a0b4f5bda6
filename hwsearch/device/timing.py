"""How anything is timed: interleaved with a reference, until the ratio is known well enough.

Absolute times drift with the machine, ratios of interleaved runs hold (facts.md). Each round visits the
reference and every candidate in mirrored order (A B B A), so that linear drift within a round cancels.

Ratios hold while everything is slowed alike. A program that takes a core away does not do that: an engine of two threads waits
for the slower one, a long layer is hit more often than a short one. Rounds in which the reference took far longer than on the
quiet machine are kept, but do not count where there are enough others.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwsearch.device import stopwatch
from hwsearch.device.energy import Meter, by_ticks, tick_s
from hwsearch.device.nvidia import State
from hwsearch.device.stopwatch import times

Run = Callable[[], None]

DISTURBED = 1.12
"""Time of the reference, relative to its quiet one, above which a round was disturbed by something else on the machine."""
QUIET = 0.2
"""The quantile of the reference's times that is its quiet one."""
SINGLES_NS = 5e7
"""How long inferences of a GPU are waited for one by one, for the tails of their times."""
PATIENCE = 1.5
"""How much longer than its limit a measurement waits for quiet rounds."""


def quietest(reference_ns: NDArray[np.int64]) -> float:
    """Of the times of the reference in one measurement, that of its quietest moments."""
    return float(np.quantile(reference_ns, 0.1))


def relative(samples_ns: NDArray[np.int64], singles_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Times of single inferences relative to their median; samples_ns are such where there are no singles_ns."""
    single = singles_ns if len(singles_ns) else samples_ns
    return np.asarray(single / np.median(single))


@dataclass(frozen=True)
class Energy:
    """Joules of one inference of a candidate and of the reference, and the relative standard error of their ratio."""

    joules: float
    reference_joules: float
    error: float


@dataclass(frozen=True)
class Timing:
    """A candidate timed against a reference.

    samples_ns, reference_ns: every timed inference, in order, warm-ups left out; `block` of them stand together. On a GPU the
    mean of each block (`stopwatch.block`), and singles_ns holds inferences that were waited for one by one.
    ratio: median over the quiet rounds of candidate / reference. low, high: its 95 % bootstrap interval.
    unstable: the interval was still wider than asked when time ran out, or there were too few rounds on a quiet machine.
    energy: of an inference, where a meter was read and moved; else None.
    states: of the GPU before the first round and after the last; empty where none was looked at.
    """

    samples_ns: NDArray[np.int64]
    reference_ns: NDArray[np.int64]
    block: int
    reference_block: int
    ratio: float
    low: float
    high: float
    unstable: bool
    warmup_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    singles_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    energy: Energy | None = None
    disturbed: bool = False
    """Whether there were too few rounds on a machine as quiet as it is known to be."""
    states: tuple[State, ...] = ()

    @property
    def width(self) -> float:
        """Relative width of the interval of the ratio."""
        return (self.high - self.low) / self.ratio

    @property
    def median_ns(self) -> float:
        """Median of the candidate's own samples, as the machine was just then."""
        return float(np.median(self.samples_ns))

    @property
    def quiet_ns(self) -> float:
        """Time of the reference in the quietest moments."""
        return quietest(self.reference_ns)

    @property
    def reference_median_ns(self) -> float:
        return float(np.median(self.reference_ns))

    def tail(self, quantile: float) -> float:
        """That quantile of the times of single inferences of the candidate, relative to their median."""
        return float(np.quantile(self.inferences, quantile))

    @property
    def inferences(self) -> NDArray[np.float64]:
        """Times of single inferences of the candidate, relative to their median."""
        return relative(self.samples_ns, self.singles_ns)

    def __repr__(self) -> str:
        flag = ", UNSTABLE: close other programs or raise the time limit" if self.unstable else ""
        iqr = float(np.subtract(*np.percentile(self.samples_ns, [75, 25])))
        return (
            f"Timing(ratio {self.ratio:.4f} [{self.low:.4f}, {self.high:.4f}], median {self.median_ns / 1e6:.4f} ms, "
            f"IQR {iqr / 1e6:.4f} ms, n={len(self.samples_ns)}{flag})"
        )


@dataclass(frozen=True)
class Protocol:
    """When to stop: interval of the ratio narrower than `width`, or `limit_s` seconds spent on one candidate.

    settle_ns: how long an engine runs untimed whenever its turn comes. Behind another engine the first inferences take
    longer, of small networks by a few percent for 10 ms and more (`scripts/bench/processes.py`).
    """

    width: float = 0.01
    limit_s: float = 3.0
    block_ns: int = 12_000_000
    settle_ns: int = 20_000_000
    min_rounds: int = 5
    warmup_ns: int = 20_000_000


def paired(
    reference: Run,
    candidates: Mapping[str, Run],
    protocol: Protocol = Protocol(),
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    seed: int = 0,
    meter: Meter | None = None,
    quiet_ns: float | None = None,
    sample: Callable[[], State] | None = None,
) -> dict[str, Timing]:
    """Time every candidate against the reference, all interleaved in the same rounds.

    meter: read before and after each block; one that is too coarse for that (`energy.tick_s`) in a pass apart, in which each
    engine runs for seconds.
    sample: looks at the GPU, once before the first round (when everything is warm) and once after the last.
    One round is A B C ... C B A in blocks of a few inferences. Stops when every candidate's interval is narrow
    enough, or after `limit_s` seconds for each candidate; half as long again where the machine was disturbed.
    quiet_ns: time of the reference on the quiet machine, where earlier measurements tell it; else its fastest rounds do.
    """
    runs: dict[str | None, Run] = {None: reference}
    runs.update(candidates)
    warm: dict[str | None, list[int]] = {}
    count: dict[str | None, int] = {}
    settle: dict[str | None, int] = {}
    for name, run in runs.items():
        warm[name] = _warm_up(run, protocol, clock)
        usual = max(np.median(warm[name]), 1.0)
        count[name] = int(np.clip(protocol.block_ns // usual, 2, 200))
        settle[name] = int(np.clip(protocol.settle_ns // usual, 1, 200))
    samples: dict[str | None, list[list[int]]] = {name: [] for name in runs}
    joules: dict[str | None, list[float]] = {name: [] for name in runs}
    coarse = tick_s(meter) > 0.0
    states = [sample()] if sample else []
    limit_ns = int(protocol.limit_s * 1e9 * len(candidates))
    begun = clock()
    rng = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while True:
            for name in (*runs, *reversed(runs)):
                taken, used = _block(runs[name], settle[name], count[name], clock, None if coarse else meter)
                samples[name].append(taken)
                joules[name] += used
            rounds = len(samples[None]) // 2
            if rounds < protocol.min_rounds:
                continue
            quiet = _quiet(samples[None], quiet_ns)
            enough = int(quiet.sum()) >= protocol.min_rounds
            if clock() - begun >= limit_ns * (1.0 if enough else PATIENCE):
                break
            # Look at the intervals ever more rarely: looking costs time and each look is a chance to stop too soon.
            if enough and (rounds - protocol.min_rounds) % max(1, rounds // 8) == 0:
                each = (_interval(samples[name], samples[None], quiet, rng) for name in candidates)
                if all(width <= protocol.width for _, _, _, width in each):
                    break
        singles = {name: _singles(runs[name], warm[name], clock) for name in candidates}
        ticks = {name: by_ticks(run, meter, clock) for name, run in runs.items()} if coarse and meter else {}
    finally:
        if collecting:
            gc.enable()
    states += [sample()] if sample else []
    result = {}
    if not enough:  # a machine that is slower as a whole has its own quiet rounds
        quiet = _quiet(samples[None], None)
    counted = quiet if quiet.sum() >= protocol.min_rounds else np.ones_like(quiet)
    for name in candidates:
        ratio, low, high, width = _interval(
            samples[name], samples[None], counted, np.random.default_rng(seed)
        )
        result[name] = Timing(
            samples_ns=np.concatenate(samples[name]).astype(np.int64),
            reference_ns=np.concatenate(samples[None]).astype(np.int64),
            block=len(samples[name][0]),
            reference_block=len(samples[None][0]),
            ratio=ratio,
            low=low,
            high=high,
            unstable=bool(width > protocol.width) or not enough,
            disturbed=not enough,
            warmup_ns=np.array(warm[name], np.int64),
            singles_ns=np.array(singles[name], np.int64),
            energy=_energy_by_ticks(np.array(ticks[name]), np.array(ticks[None]))
            if ticks
            else _energy_by_rounds(
                np.array(joules[name]) / count[name], np.array(joules[None]) / count[None]
            ),
            states=tuple(states),
        )
    return result


def _block(
    run: Run, settle: int, count: int, clock: Callable[[], int], meter: Meter | None
) -> tuple[list[int], list[float]]:
    """Times of a block's inferences, and its joules where there is a meter."""
    stopwatch.block(run, settle, clock)  # takes back the caches and the cores from the engine before
    before = meter() if meter else 0.0
    taken = stopwatch.block(run, count, clock)
    return taken, [meter() - before] if meter else []


def _singles(run: Run, warm: list[int], clock: Callable[[], int]) -> list[int]:
    """Inferences waited for one by one, where blocks are not made of such."""
    if not hasattr(run, "replays"):
        return []
    return times(run, int(np.clip(SINGLES_NS / max(float(np.median(warm)), 1.0), 20, 200)), clock)


def _energy_by_rounds(own: NDArray[np.float64], other: NDArray[np.float64]) -> Energy | None:
    """Of joules of an inference of a candidate and of the reference, by block, two to a round; None where no meter moved.

    Means over all blocks, as a counter may be too coarse for one; the error is a bootstrap's over rounds.
    """
    if not len(own) or own.sum() <= 0 or other.sum() <= 0:
        return None
    own, other = own.reshape(-1, 2).sum(axis=1), other.reshape(-1, 2).sum(axis=1)
    drawn = np.random.default_rng(0).integers(0, len(own), (300, len(own)))
    above, below = own[drawn].sum(axis=1), other[drawn].sum(axis=1)
    ratios = above[below > 0] / below[below > 0]
    error = float(np.std(ratios) / (own.sum() / other.sum()))
    return Energy(float(own.mean() / 2), float(other.mean() / 2), error)


def _energy_by_ticks(own: NDArray[np.float64], other: NDArray[np.float64]) -> Energy | None:
    """Of joules of an inference by ticks of the counter, each engine by itself; None where the counter did not move."""
    if len(own) < 2 or len(other) < 2:
        return None
    error = float(np.hypot(*(np.std(x, ddof=1) / np.mean(x) / np.sqrt(len(x)) for x in (own, other))))
    return Energy(float(own.mean()), float(other.mean()), error)


def _warm_up(run: Run, protocol: Protocol, clock: Callable[[], int]) -> list[int]:
    taken: list[int] = []
    while len(taken) < 3 or (sum(taken) < protocol.warmup_ns and len(taken) < 500):
        taken += times(run, 1, clock)
    return taken


def _rounds(blocks: list[list[int]]) -> NDArray[np.float64]:
    """[rounds]: the mean of the medians of a round's two blocks."""
    medians = np.array([np.median(b) for b in blocks])
    return np.asarray(medians.reshape(-1, 2).mean(axis=1))


def _quiet(reference: list[list[int]], quiet_ns: float | None) -> NDArray[np.bool_]:
    """[rounds]: whether the machine was quiet, by what the reference took."""
    times = _rounds(reference)
    level = float(np.quantile(times, QUIET))
    return np.asarray(times <= DISTURBED * (level if quiet_ns is None else min(level, quiet_ns)))


def _interval(
    candidate: list[list[int]],
    reference: list[list[int]],
    counted: NDArray[np.bool_],
    rng: np.random.Generator,
) -> tuple[float, float, float, float]:
    """(median ratio over the rounds that count, 2.5 % and 97.5 % bootstrap quantiles, relative width)."""
    ratios = (_rounds(candidate) / _rounds(reference))[counted]
    ratio = float(np.median(ratios))
    draws = np.median(rng.choice(ratios, (300, len(ratios))), axis=1)
    low, high = (float(q) for q in np.percentile(draws, [2.5, 97.5]))
    return ratio, low, high, (high - low) / ratio

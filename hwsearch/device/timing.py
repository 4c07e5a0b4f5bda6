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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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


UNUSUAL, KNOWN = 2.0, 4
"""How many times the median width of a machine's intervals is unusual, and of how many that median is taken at least."""


def too_wide(width: float, usual: Sequence[float], asked: float) -> bool:
    """Whether a ratio is unstable: its interval wider than asked, and than what this machine usually shows.

    Args:
        width: Relative width of the interval.
        usual: Those of other measurements on this machine; of fewer than four nothing is concluded.
        asked: The width that a measurement may end at.
    """
    return width > max(asked, UNUSUAL * float(np.median(usual)) if len(usual) >= KNOWN else 0.0)


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

    settle_ns: how long an engine runs untimed whenever its turn comes after another's: the first inferences take longer then, of
    small networks by a few percent for 10 ms and more (`scripts/bench/processes.py`).
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

    One round is A B C ... C B A in blocks of a few inferences. Stops when every candidate's interval is narrow
    enough, or after `limit_s` seconds for each candidate; half as long again where the machine was disturbed.

    Args:
        meter: Read before and after each block; one that is too coarse for that (`energy.tick_s`) in a pass apart, in which each
            engine runs for seconds.
        quiet_ns: Time of the reference on the quiet machine, where earlier measurements tell it; else its fastest rounds do.
        sample: Looks at the GPU, once before the first round (when everything is warm) and once after the last.
    """
    runs: dict[str | None, Run] = {None: reference}
    runs.update(candidates)
    blocks = _Blocks(runs, protocol, clock)
    coarse = tick_s(meter) > 0.0
    states = [sample()] if sample else []
    limit_ns = int(protocol.limit_s * 1e9 * len(candidates))
    begun = clock()
    rng = np.random.default_rng(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while True:
            blocks.round(None if coarse else meter)
            rounds = len(blocks.samples[None]) // 2
            if rounds < protocol.min_rounds:
                continue
            quiet = _quiet(blocks.samples[None], quiet_ns)
            enough = int(quiet.sum()) >= protocol.min_rounds
            if clock() - begun >= limit_ns * (1.0 if enough else PATIENCE):
                break
            # Look at the intervals ever more rarely: looking costs time and each look is a chance to stop too soon.
            if enough and (rounds - protocol.min_rounds) % max(1, rounds // 8) == 0:
                each = (_interval(blocks.samples[name], blocks.samples[None], quiet, rng) for name in candidates)
                if all(width <= protocol.width for _, _, _, width in each):
                    break
                blocks.last = ""  # the look at the intervals came between
        singles = {name: blocks.singles(name) for name in candidates}
        ticks = {n: by_ticks(run, meter, clock) for n, run in blocks.runs.items()} if coarse and meter else {}
    finally:
        if collecting:
            gc.enable()
    states += [sample()] if sample else []
    if not enough:  # a machine that is slower as a whole has its own quiet rounds
        quiet = _quiet(blocks.samples[None], None)
    counted = quiet if quiet.sum() >= protocol.min_rounds else np.ones_like(quiet)
    return {
        name: replace(
            blocks.timing(name, counted, protocol.width, seed, disturbed=not enough),
            singles_ns=np.array(singles[name], np.int64),
            energy=_energy_by_ticks(np.array(ticks[name]), np.array(ticks[None])) if ticks else blocks.energy(name),
            states=tuple(states),
        )
        for name in candidates
    }


class _Blocks:
    """Blocks of inferences of each engine; None is the reference."""

    def __init__(self, runs: Mapping[str | None, Run], protocol: Protocol, clock: Callable[[], int]) -> None:
        self.runs, self.clock = runs, clock
        self.warm = {name: _warm_up(run, protocol, clock) for name, run in runs.items()}
        usual = {name: max(float(np.median(taken)), 1.0) for name, taken in self.warm.items()}
        self.count = {n: int(np.clip(protocol.block_ns // ns, 2, 200)) for n, ns in usual.items()}
        self.settle = {n: int(np.clip(protocol.settle_ns // ns, 1, 200)) for n, ns in usual.items()}
        self.samples: dict[str | None, list[list[int]]] = {name: [] for name in runs}
        self.joules: dict[str | None, list[float]] = {name: [] for name in runs}
        self.last: str | None = ""

    def round(self, meter: Meter | None) -> None:
        """Two blocks of each engine; meter: None where it is not read."""
        for name in (*self.runs, *reversed(list(self.runs))):
            settle = self.settle[name] if name != self.last else 0  # two blocks of one engine follow on each other
            self.last = name
            taken, used = _block(self.runs[name], settle, self.count[name], self.clock, meter)
            self.samples[name].append(taken)
            self.joules[name] += used

    def singles(self, name: str) -> list[int]:
        return _singles(self.runs[name], self.warm[name], self.clock)

    def energy(self, name: str) -> Energy | None:
        own, other = (np.array(self.joules[n]) / self.count[n] for n in (name, None))
        return _energy_by_rounds(own, other)

    def timing(
        self, name: str, counted: NDArray[np.bool_], width: float, seed: int, *, disturbed: bool
    ) -> Timing:
        """The times of a candidate over the rounds that count; width: of an interval that is stable."""
        own, reference = self.samples[name], self.samples[None]
        ratio, low, high, found = _interval(own, reference, counted, np.random.default_rng(seed))
        return Timing(
            samples_ns=np.concatenate(own).astype(np.int64),
            reference_ns=np.concatenate(reference).astype(np.int64),
            block=len(own[0]),
            reference_block=len(reference[0]),
            ratio=ratio,
            low=low,
            high=high,
            unstable=bool(found > width) or disturbed,
            disturbed=disturbed,
            warmup_ns=np.array(self.warm[name], np.int64),
        )


def _block(
    run: Run, settle: int, count: int, clock: Callable[[], int], meter: Meter | None
) -> tuple[list[int], list[float]]:
    """Times of a block's inferences, and its joules where there is a meter."""
    if settle:
        stopwatch.block(run, settle, clock)  # takes back the caches and the cores from the engine before
    before = meter() if meter else 0.0
    taken = stopwatch.block(run, count, clock)
    return taken, [meter() - before] if meter else []


def _singles(run: Run, warm: list[int], clock: Callable[[], int]) -> list[int]:
    """Inferences waited for one by one, where blocks are not made of such."""
    if not hasattr(run, "replays"):
        return []
    return times(run, int(np.clip(SINGLES_NS / max(float(np.median(warm)), 1.0), 20, 200)), clock)


def _energy_by_rounds(candidate: NDArray[np.float64], reference: NDArray[np.float64]) -> Energy | None:
    """Of joules of an inference of a candidate and of the reference, by block, two to a round; None where no meter moved.

    Means over all blocks, as a counter may be too coarse for one; the error is a bootstrap's over rounds.
    """
    if not len(candidate) or candidate.sum() <= 0 or reference.sum() <= 0:
        return None
    candidate, reference = candidate.reshape(-1, 2).sum(axis=1), reference.reshape(-1, 2).sum(axis=1)
    drawn = np.random.default_rng(0).integers(0, len(candidate), (300, len(candidate)))
    above, below = candidate[drawn].sum(axis=1), reference[drawn].sum(axis=1)
    ratios = above[below > 0] / below[below > 0]
    error = float(np.std(ratios) / (candidate.sum() / reference.sum()))
    return Energy(float(candidate.mean() / 2), float(reference.mean() / 2), error)


def _energy_by_ticks(candidate: NDArray[np.float64], reference: NDArray[np.float64]) -> Energy | None:
    """Of joules of an inference by ticks of the counter, each engine by itself; None where the counter did not move."""
    if len(candidate) < 2 or len(reference) < 2:
        return None
    error = float(np.hypot(*(np.std(x, ddof=1) / np.mean(x) / np.sqrt(len(x)) for x in (candidate, reference))))
    return Energy(float(candidate.mean()), float(reference.mean()), error)


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

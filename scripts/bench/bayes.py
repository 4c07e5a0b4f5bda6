#!/usr/bin/env python
"""The search over the numbers of a scheme beside its rivals: samples used, and how far from the floor each ends.

One knob, by default on 1,000 synthetic curves that fall (slopes, knees, cliffs; floor one to two points below dense), without noise
and with that of 10,000 scored samples: `hwsearch bayes` with its prior mean (the untrained score, a distorted curve) and without;
the same guarded bracket without a Gaussian process; bisection; the unguarded rule of domain-restricted UCB; scikit-optimize's
Optimizer on |score - floor|; 60 random samples. Shortfall: how far below the furthest place that holds the answer is, of the knob's
range; over: share of answers whose true score, less a standard error, is below the floor.

With --task on a network, scored by torch on half of the images of its evaluation, without engines: one knob (density of Prune,
int8) against a sweep of 100 densities, and two knobs (density x bits) against a grid of 10 densities by all bits, by packed bytes;
with --measured also `hs.bayes` itself on OpenVINO.

    python scripts/bench/bayes.py --curves 1000 --slow-curves 50
    python scripts/bench/bayes.py --curves 0 --task zoo:fashion_resnet --floors 99% 98% 95%
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import common
import numpy as np
import torch
from numpy.random import Generator

import hwsearch as hs
from hwsearch.pipeline.goal import Floor
from hwsearch.pipeline.knobs import (
    LEAST_MARGIN,
    TOLERANCE,
    Knob,
    KnobSearch,
    Point,
    Prior,
    place_of,
    value_of,
)
from hwsearch.pipeline.surrogate import Floats, Surrogate
from hwsearch.schemes import Compose, Free, Prune, Quantize, Scheme
from hwsearch.zoo.fashion_resnet import DATA, accuracy, normalise

KNOB = Free("density")
BITS = Free("bits", 2, 8, whole=True)
SAMPLES, GAMMA, RANDOM = 10, 0.95, 60
FINE = np.linspace(0.0, 1.0, 1001)
Score = Callable[[float], float]


@dataclass(frozen=True)
class Curve:
    """Drops of a score at places from 0 to 1: those that are searched, and those of the untrained network."""

    drop: Score
    untrained: Score
    allowed: float
    error: float
    rng: Generator

    @property
    def best(self) -> float:
        """The furthest place that truly holds."""
        held = [x for x in FINE if self.drop(x) + self.error <= self.allowed]
        return float(max(held, default=0.0))

    def margin(self, x: float) -> float:
        """As measured, less a standard error."""
        noise = float(self.rng.normal(0.0, self.error)) if self.error else 0.0
        return 1.0 - (self.drop(x) + noise + self.error) / self.allowed

    @property
    def prior(self) -> Prior:
        """From the untrained score."""
        return Prior.of([KNOB], lambda x: (1.0 - self.untrained(x[0]) / self.allowed, 1.0 - 0.95 * x[0]))


def curve(seed: int, noisy: bool) -> Curve:
    """One of four families, at random."""
    rng = np.random.default_rng(seed)
    kind, size, at = seed % 4, rng.uniform(0.05, 0.8), rng.uniform(0.05, 0.98)
    power, width, tilt = rng.uniform(1.5, 14.0), rng.uniform(0.01, 0.12), rng.uniform(0.0, 0.015)

    def drop(x: float) -> float:
        if kind == 0:
            return float(size * x**power)
        if kind == 1:
            start = 1.0 / (1.0 + math.exp(at / width))
            return float(size * (1.0 / (1.0 + math.exp(min((at - x) / width, 700.0))) - start))
        if kind == 2:
            return float(tilt * x + size * (x > at))
        return float(tilt * x + size * max(0.0, x - at) ** 2 / 0.02)

    stretch, factor = rng.uniform(1.0, 1.3), rng.uniform(1.0, 2.5)
    allowed = rng.uniform(0.01, 0.02)
    error = math.sqrt(0.93 * 0.07 / 10_000) if noisy else 0.0
    return Curve(drop, lambda x: factor * drop(min(stretch * x, 1.0)), allowed, error, rng)


# ---- one knob: each gives its samples as (place, margin)

Found = list[tuple[float, float]]


def ours(margin: Score, prior: Prior, search: type[KnobSearch] = KnobSearch, knob: Knob = KNOB) -> Found:
    """What `hwsearch bayes` does."""
    own, points = search([knob], prior, free=True, measured_cost=False), list[Point]()
    while (x := own.next(points, SAMPLES - len(points))) is not None:
        points.append(Point(x, margin(x[0]), 0.0, math.log(max(1.0 - 0.95 * x[0], 1e-3))))
    return [(p.x[0], p.margin) for p in points]


class Interpolated(KnobSearch):
    """The same bracket with the prior, corrected in proportion between its ends, in the place of a Gaussian process."""

    def margin(self, points: Sequence[Point], x: Floats) -> tuple[Floats, Floats]:
        held = max((p for p in points if p.holds), key=lambda p: p.x, default=Point((0.0,), 1.0, 0.0, 0.0))
        ends = [held, *sorted((p for p in points if not p.holds and p.x > held.x), key=lambda p: p.x)[:1]]
        at = np.array([p.x for p in ends])
        residual = np.array([max(p.margin, LEAST_MARGIN) for p in ends]) - self.prior.margin(at)
        return self.prior.margin(x) + np.interp(x[:, 0], at[:, 0], residual), np.zeros(len(x))


def bisection(margin: Score) -> Found:
    """Seven halvings."""
    lo, hi, found = 0.0, 1.0, list[tuple[float, float]]()
    while hi - lo > TOLERANCE:
        x = (lo + hi) / 2.0
        found.append((x, margin(x)))
        lo, hi = (x, hi) if found[-1][1] >= 0 else (lo, x)
    return found


def unguarded(margin: Score) -> Found:
    """(1 - gamma) sigma - gamma |m - floor|, between the best that held and the least that did not."""
    found: Found = []
    while len(found) < SAMPLES:
        lo = max((x for x, m in found if m >= 0), default=0.0)
        hi = min((x for x, m in found if m < 0), default=1.0)
        end = any(m < 0 for _, m in found)
        x = np.array([x for x in FINE if lo < x < hi or (x == hi and not end)])
        if hi - lo <= TOLERANCE or not len(x):
            break
        at = np.array([[0.0], *([own] for own, _ in found)])
        y = np.array([1.0, *(max(m, LEAST_MARGIN) for _, m in found)])
        mean, deviation = Surrogate(at, y, np.full(len(y), 1e-4))(x[:, None])
        worth = (1.0 - GAMMA) * deviation - GAMMA * np.abs(mean)
        place = float(x[int(worth.argmax())])
        found.append((place, margin(place)))
    return found


def skopt_alone(margin: Score, seed: int) -> Found:
    """Optimizer on |score - floor|, expected improvement, the dense network told."""
    from skopt import Optimizer

    found: Found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Optimizer([(0.0, 1.0)], n_initial_points=3, acq_func="EI", random_state=seed)
        optimizer.tell([0.0], 1.0)
        for _ in range(SAMPLES):
            (x,) = optimizer.ask()
            found.append((float(x), margin(float(x))))
            optimizer.tell([x], abs(found[-1][1]))
    return found


def random(margin: Score, seed: int) -> Found:
    """Sixty places."""
    return [(float(x), margin(float(x))) for x in np.random.default_rng(seed).uniform(0.0, 1.0, RANDOM)]


def searchers(prior: Prior, seed: int) -> dict[str, Callable[[Score], Found]]:
    """Each by name; the last two are slow."""
    return {
        "bisection": bisection,
        "guarded, no process, no prior": lambda m: ours(m, Prior.none([KNOB]), Interpolated),
        "guarded, no process, prior": lambda m: ours(m, prior, Interpolated),
        "random 60": lambda m: random(m, seed),
        "guarded process, no prior": lambda m: ours(m, Prior.none([KNOB])),
        "guarded process, prior (bayes)": lambda m: ours(m, prior),
        "unguarded UCB": unguarded,
        "skopt alone": lambda m: skopt_alone(m, seed),
    }


SLOW = ("unguarded UCB", "skopt alone")


@dataclass(frozen=True)
class Row:
    """Of one curve: samples, shortfall, and whether the answer truly does not hold."""

    samples: int
    shortfall: float
    over: bool


def said(name: str, rows: Sequence[Row]) -> None:
    """A line of the table."""
    samples, short = np.array([r.samples for r in rows]), np.array([max(r.shortfall, 0.0) for r in rows])
    print(
        f"  {name:32s} {len(rows):5d}  {samples.mean():5.2f} ({samples.max():2d})  {np.median(short):.4f} ({short.max():.4f})  "
        f"{np.mean([r.over for r in rows]):5.1%}", flush=True,
    )  # fmt: skip


def synthetic(curves: int, slow: int, noisy: bool) -> None:
    """The table of one knob."""
    print(f"{'with noise' if noisy else 'without noise'}: searcher, curves, samples mean (max), shortfall median (max), over")
    for name in searchers(Prior.none([KNOB]), 0):
        rows = []
        for seed in range(slow if name in SLOW else curves):
            own = curve(seed, noisy)
            found = searchers(own.prior, seed)[name](own.margin)
            answer = max((x for x, m in found if m >= 0), default=0.0)
            rows.append(Row(len(found), own.best - answer, own.drop(answer) + own.error > own.allowed + 1e-12))
        if rows:
            said(name, rows)


# ---- a network

class Network:
    """A task, and a scheme of it scored by torch without an engine, each place once."""

    def __init__(self, task: hs.Task, scheme: Scheme, floor: str) -> None:
        assert task.validate is not None
        self.task, self.scheme, self.validate, self.dense = task, scheme, task.validate, task.validate(task.model)
        self.allowed = self.dense - Floor.parse(floor).of(self.dense)
        self.look = cache(self._look)

    def _look(self, x: tuple[float, ...]) -> tuple[float, float, float]:
        """(margin by the score, margin by agreement on calibration data, share of the dense network's bytes)."""
        knobs = self.scheme.parameters
        made = self.scheme(self.task, **{k.name: value_of(k, own) for k, own in zip(knobs, x, strict=True)})
        score = self.validate(made.task.model)
        error = math.sqrt(score * (1.0 - score) / (self.task.validated or 1))
        held = self.task.calibration[-max(1, len(self.task.calibration) // 4) :]
        with torch.no_grad():
            near = [made.task.model(b).argmax(1) == self.task.model(b).argmax(1) for b in held]
        lost = 1.0 - float(torch.cat(near).float().mean())
        share = made.footprint.packed_bytes / made.footprint.dense_bytes
        return 1.0 - (self.dense - score + error) / self.allowed, 1.0 - lost * self.dense / self.allowed, share

    def prior(self) -> Prior:
        """As `hs.bayes` makes it."""
        return Prior.of(self.scheme.parameters, lambda x: self.look(tuple(x))[1:])


def halves(task: hs.Task) -> hs.Task:
    """`validate` on the even ones of the images that `evaluate` scores, `evaluate` on the odd ones."""
    def half(which: int) -> Callable[[hs.task.Predict], float]:
        def score(predict: hs.task.Predict) -> float:
            images, labels = _labelled()
            return accuracy(predict, images[which::2], labels[which::2])

        return score

    _, labels = _labelled()
    return replace(task, validate=half(0), evaluate=half(1), scored=len(labels[1::2]), validated=len(labels[::2]), spec="")


@cache
def _labelled() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        return normalise(data["evaluation_images"]), torch.from_numpy(data["evaluation_labels"].astype(np.int64))


def one_knob(task: hs.Task, floor: str) -> None:
    """Searchers beside a sweep of 100 densities."""
    net = Network(task, Compose(Prune(KNOB), Quantize("int8")), floor)
    sweep = [place_of(KNOB, n / 100.0) for n in range(1, 101)]
    best = max((x for x in sweep if net.look((x,))[0] >= 0), default=0.0)
    print(f"  one knob, floor {floor}: the least of 100 densities that holds is {value_of(KNOB, best):.2f}")
    prior = net.prior()
    for name, search in searchers(prior, 0).items():
        found = search(lambda x: net.look((x,))[0])
        answer = max((x for x, m in found if m >= 0), default=0.0)
        said_of = f"density {value_of(KNOB, answer):.4f}, shortfall {best - answer:+.4f}"
        print(f"    {name:32s} {len(found):3d} samples, {said_of}", flush=True)


def two_knobs(task: hs.Task, floor: str) -> None:
    """`bayes`, random samples and scikit-optimize beside a grid, by bytes."""
    knobs: tuple[Free, Free] = KNOB, BITS
    net = Network(task, Compose(Prune(KNOB), Quantize(BITS)), floor)
    grid = [(place_of(KNOB, d / 10), place_of(BITS, b)) for d, b in product(range(1, 11), range(2, 9))]

    def least(places: Sequence[tuple[float, ...]]) -> str:
        held = [(net.look(x)[2], x) for x in places if net.look(x)[0] >= 0]
        if not held:
            return "nothing holds"
        share, x = min(held)
        values = ", ".join(f"{k.name}={value_of(k, own):.4g}" for k, own in zip(knobs, x, strict=True))
        return f"{share:.4f} of the dense bytes at {values}"

    print(f"  two knobs, floor {floor}: the grid of {len(grid)}: {least(grid)}", flush=True)
    for name, prior in (("bayes", net.prior()), ("bayes, no prior", Prior.none(knobs))):
        search, points = KnobSearch(knobs, prior, free=False, measured_cost=False), list[Point]()
        while (x := search.next(points, SAMPLES - len(points))) is not None:
            margin, _, share = net.look(x)
            points.append(Point(x, margin, 0.0, math.log(share)))
        print(f"    {name:32s} {len(points):3d} samples, {least([p.x for p in points])}", flush=True)
    rng = np.random.default_rng(0)
    for count in (SAMPLES, RANDOM):
        drawn = zip(rng.uniform(0.0, 1.0, count), rng.integers(2, 9, count), strict=True)
        places = [(float(a), place_of(BITS, int(b))) for a, b in drawn]
        print(f"    {f'random {count}':32s} {count:3d} samples, {least(places)}", flush=True)
    print(f"    {'skopt alone':32s} {SAMPLES:3d} samples, {least(list(_penalised(net)))}", flush=True)


def _penalised(net: Network) -> Iterator[tuple[float, ...]]:
    """Optimizer on the bytes, with a penalty for what the floor is missed by."""
    from skopt import Optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = Optimizer([(0.0, 1.0), (2, 8)], n_initial_points=3, random_state=0)
        for _ in range(SAMPLES):
            a, bits = optimizer.ask()
            x = (float(a), place_of(BITS, int(bits)))
            margin, _, share = net.look(x)
            optimizer.tell([a, bits], share + (0.0 if margin >= 0 else 1.0 + min(-margin, 10.0)))
            yield x


def measured(task: hs.Task, floor: str, out: Path) -> None:
    """`hs.bayes` itself, on OpenVINO."""
    for name, scheme in (("one", Compose(Prune(KNOB), Quantize("int8"))), ("two", Compose(Prune(KNOB), Quantize(BITS)))):
        print(hs.bayes(task, scheme, out / f"{name}-{floor.strip('%')}", floor=floor), flush=True)


def main() -> None:
    parser: argparse.ArgumentParser = common.parser(__doc__)
    parser.add_argument("--curves", type=int, default=1000)
    parser.add_argument("--slow-curves", type=int, default=50, help="of the unguarded rule and of scikit-optimize alone")
    parser.add_argument("--task", choices=["zoo:fashion_resnet"], help="a network as well")
    parser.add_argument("--floors", nargs="*", default=["99%", "98%", "95%"], help="of the network")
    parser.add_argument("--knobs", type=int, nargs="*", default=[1, 2], help="of the network")
    parser.add_argument("--measured", action="store_true", help="also hs.bayes itself, on OpenVINO")
    parser.add_argument("--out", type=Path, default=Path("bench-bayes"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.say_machine()
    for noisy in (False, True) if args.curves else ():
        synthetic(args.curves, args.slow_curves, noisy)
    if args.task:
        task = halves(hs.load(args.task))
        for floor in args.floors:
            if 1 in args.knobs:
                one_knob(task, floor)
            if 2 in args.knobs:
                two_knobs(task, floor)
            if args.measured:
                measured(task, floor, args.out)


if __name__ == "__main__":
    main()

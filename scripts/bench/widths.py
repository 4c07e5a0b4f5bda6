#!/usr/bin/env python
"""Widths and precisions searched together, against simpler ways to get as fast; one thread, OpenVINO.

At budgets from just below the fastest uniform precision down to half of its time: the joint search with its closed loop,
beside (a) the same share of every group's channels, with the same refitting, (b) the channels of least magnitude over the
whole network, without refitting, (c) widths searched under a budget of multiply-accumulates instead of time. The rivals run
in the fastest uniform precision. Each is measured in one session; for each budget a rival shows its best network that
measured no slower than the joint one. Also: what refitting gains at 75 % width, and how long weights take.

    python scripts/bench/widths.py zoo:fashion_resnet zoo:efficientnet_lite0
    python scripts/bench/widths.py zoo:minilm --shares 0.769 --rivals 0
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import common
import numpy as np
import torch

import hwsearch as hs
from hwsearch import backends
from hwsearch.allocate.budget import parse_budgets
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.simulate import Simulator
from hwsearch.deployment.session import Job, Session
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import HwsearchError
from hwsearch.loss.divergence import divergence
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.variants import Variant
from hwsearch.pipeline.closed_loop import closed_loop


@dataclass(frozen=True)
class Found:
    """One measured network: ms on the session's scale, score, divergence on calibration data."""

    what: str
    ms: float
    score: float
    loss: float
    met: bool = True


def main() -> None:
    parser = common.searching(__doc__, ["zoo:fashion_resnet", "zoo:efficientnet_lite0"], "bench-widths")
    parser.add_argument("--shares", type=float, nargs="*", default=list(np.linspace(0.95, 0.5, 8)),
                        help="budgets, of the fastest uniform network's time")  # fmt: skip
    parser.add_argument("--rivals", type=int, default=8, help="networks that each rival tries")
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.say_machine()
    for spec in args.tasks:
        bench(spec, args)


def bench(spec: str, args: argparse.Namespace) -> None:
    task = hs.load(spec)
    folder = args.out / task.name
    setup = set_up(task, backends.get("openvino"))
    print(f"\n{spec}: {len(setup.network.units)} units, {len(setup.network.groups)} channel groups"
          + "".join(f"\n  stays whole: {why}" for why in setup.network.blocked))  # fmt: skip
    table, sensitivity = common.tables(setup, folder, args)
    bank = weight_bank(setup.lowering, folder / "weights", sensitivity.order)
    weights(setup, bank, table.grid())
    refitting(setup, bank)
    session, uniforms, name = common.uniforms(setup, table)
    dense = session.dense_score
    print(f"  dense score {dense:.4f}")
    for what, m in uniforms.items():
        print(
            f"  {what:11s} {session.ms(m):.4g} ms, score {session.score(m, what):.4f}, KL {session.loss(session.refitted(m)):.3g}"
        )
    quick = uniforms[name]
    fastest = session.ms(quick)
    joint = []
    for share in args.shares:
        budget = parse_budgets([f"latency={fastest * share:.6f}ms"])
        try:
            report, allocation, table = closed_loop(
                session,
                table,
                sensitivity,
                budget,
                folder / f"{share:.3f}",
                weights=folder / "weights",
            )
        except HwsearchError as error:
            print(f"  {share:.0%} of {name}: {error}")
            continue
        joint.append(Found(f"{share:.0%}", report.latency_ms["measured"] or 0.0, report.score["deployed"],
                           report.loss["measured"], report.met))  # fmt: skip
        print(f"  {share:4.0%} of {name} ({fastest * share:.4g} ms): {report.verdict} in {report.rounds} "
              f"round(s), measured {report.latency_ms['measured']:.4g} ms ({fastest / joint[-1].ms:.2f}x), predicted "
              f"{report.latency_ms['predicted']:.4g}, score {joint[-1].score:.4f} ({100 * (joint[-1].score - dense):+.2f}), "
              f"KL {joint[-1].loss:.3g}, {allocation.counts()}", flush=True)  # fmt: skip
    if args.rivals:
        rivals = {
            "(a) uniform width": uniform_widths(setup, bank, quick.variants, args.rivals),
            "(b) magnitude, not refitted": least_magnitude(setup, args.rivals),
            "(c) by MACs": by_macs(setup, bank, quick.variants, table, sensitivity, args.rivals),
        }
        compare(joint, {what: measured(session, quick.variants, own) for what, own in rivals.items()})


def weights(setup: Setup, bank: WeightBank, grid: Mapping[str, list[int]]) -> None:
    """How long it takes to put an allocation's weights together."""
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(5):
        widths = {g: int(rng.choice(steps)) for g, steps in grid.items()}
        fresh = weight_bank(setup.lowering, bank.folder.parent if bank.folder else None, bank.order)  # from disk
        began = time.perf_counter()
        setup.lowering.narrow(fresh.kept(widths), fresh.assemble(widths))
        seconds.append(time.perf_counter() - began)
    print(f"  a random allocation put together from the weights on disk: {np.median(seconds):.2f} s")


def refitting(setup: Setup, bank: WeightBank) -> None:
    """Divergence at 75 % width of one group at a time, without and with refitting."""
    low = setup.lowering
    traced, args, kwargs = low.scoring[0]
    simulate = Simulator(traced, args, kwargs, {}, {})
    gains = []
    for group, channels in setup.network.channels.items():
        widths = {group: max(1, round(0.75 * channels))}
        if widths[group] == channels:
            continue
        refitted = bank.masked_weights(widths)
        cut = {}
        for unit, (weight, _) in refitted.items():
            assert isinstance(weight, torch.Tensor)
            whole = traced.weight(unit)
            assert whole is not None
            axis = 1 if setup.network[unit].op != "matmul" and "transpose" not in setup.network[unit].op else 0
            others = [d for d in range(weight.dim()) if d != axis]
            cut[unit] = whole * (weight.abs().amax(others, keepdim=True) > 0), None
        plain, fitted = (
            divergence(simulate({}, w), simulate.dense, low.task.divergence)[0] for w in (cut, refitted)
        )
        gains.append((plain / max(fitted, 1e-12), group, plain, fitted))
    if gains:
        ratio = np.median([g for g, *_ in gains])
        print(f"  one group at 75 % width: refitting lowers the divergence {ratio:.1f}x (median of {len(gains)} groups; least "
              f"{min(gains)[0]:.1f}x, most {max(gains)[0]:.0f}x)")  # fmt: skip


# ---------------------------------------------------------------- rivals


def uniform_widths(
    setup: Setup, bank: WeightBank, variants: Mapping[str, Variant], count: int
) -> dict[str, Setup]:
    """The same share of every group, in whole eights where there are many channels; refitted as the joint ones are."""
    found = {}
    for share in np.linspace(0.95, 0.4, count):
        widths = {
            g: max(1, round(n * share / 8) * 8 if n >= 32 else round(n * share))
            for g, n in setup.network.channels.items()
        }
        found[f"{share:.0%}"] = replace(setup, lowering=refitted(setup.lowering, variants, widths, bank))
    return found


def least_magnitude(setup: Setup, count: int) -> dict[str, Setup]:
    """Slots of the least root mean square weight of the whole network go; what is left stays as it is."""
    traced = setup.lowering.traced
    square: dict[str, np.ndarray] = {g: np.zeros(n) for g, n in setup.network.channels.items()}
    number = {g: np.zeros(n) for g, n in setup.network.channels.items()}
    for unit in setup.network.units:
        path = traced.paths[unit.name][0]
        for axis in traced.channels.tensors.get(path or "", []):
            weight = traced.weight(unit.name)
            assert weight is not None
            each = weight.square().sum([d for d in range(weight.dim()) if d != axis.axis]).numpy()
            for group, slots in traced.channels.groups.items():
                for place, slot in enumerate(slots):
                    own = axis.slots == slot
                    square[group][place] += each[own].sum()
                    number[group][place] += own.sum() * weight.numel() / weight.shape[axis.axis]
    score = {g: np.sqrt(square[g] / np.maximum(number[g], 1)) for g in square}
    everything = np.sort(np.concatenate(list(score.values())))
    found = {}
    for share in np.linspace(0.97, 0.4, count):
        least = everything[int((1 - share) * len(everything))]
        kept = {g: tuple(np.flatnonzero(s >= least)) or (int(s.argmax()),) for g, s in score.items()}
        found[f"{share:.0%}"] = setup.narrow(kept, calibrate=True)
    return found


def by_macs(
    setup: Setup,
    bank: WeightBank,
    variants: Mapping[str, Variant],
    table: hs.LatencyTable,
    sensitivity: hs.SensitivityTable,
    count: int,
) -> dict[str, Setup]:
    """Least loss under a budget of multiply-accumulates; refitted as the joint ones are."""
    found = {}
    for share in np.linspace(0.9, 0.2, count):
        try:
            allocation = hs.search(table, sensitivity, [f"macs={share:.3%}"], axes=["width"])
        except HwsearchError:
            break
        found[f"{share:.0%}"] = replace(setup, lowering=refitted(setup.lowering, variants, allocation.widths, bank))
    return found


def measured(
    session: Session, variants: Mapping[str, Variant], networks: Mapping[str, Setup]
) -> list[Found]:
    found = []
    for what, setup in networks.items():
        m = session.measure({what: Job(dict(variants), setup.options.base, None, setup)})[what]
        found.append(Found(what, session.ms(m), session.score(m, f"rival {what}"), session.loss(m)))
    return found


def compare(joint: list[Found], rivals: Mapping[str, list[Found]]) -> None:
    for what, own in rivals.items():
        print(
            f"  {what}: " + "; ".join(f"{f.what}: {f.ms:.4g} ms, {f.score:.4f}, KL {f.loss:.3g}" for f in own)
        )
    print("\n  | budget | joint ms | score | KL |" + "".join(f" {what}: ms, score, KL |" for what in rivals))
    for j in joint:
        cells = []
        for own in rivals.values():
            quick = [f for f in own if f.ms <= j.ms * 1.01]
            best = min(quick, key=lambda f: f.loss, default=None)
            cells.append("none as fast" if best is None else f"{best.ms:.4g}, {best.score:.4f}, {best.loss:.3g}"
                         + ("" if best.loss >= j.loss else " (better)"))  # fmt: skip
        print(
            f"  | {j.what} | {j.ms:.4g}{'' if j.met else ' MISSED'} | {j.score:.4f} | {j.loss:.3g} | "
            + " | ".join(cells)
            + " |"
        )


if __name__ == "__main__":
    main()

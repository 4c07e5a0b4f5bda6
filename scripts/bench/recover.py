#!/usr/bin/env python
"""Recovery of what a search chose: scores dense, refitted and recovered, and the methods beside each other at equal minibatches.

At a share of the fastest uniform network's time the closed loop finds an allocation on OpenVINO, one thread. It is recovered for
each number of epochs and each seed, exported, and measured beside the refitted one in one session: times must not move, scores do.
Then every method recovers, for one number of epochs at the rate that `auto` finds for `ste`: that allocation; 2:4 weights in fp16
wherever they can be; int4 weights wherever they can be; from the same refitted weights, scored as simulated in torch. `mask` is the
rival of each. The allocation is recovered with pruned gradients too. Nothing else may run on the machine.

    python scripts/bench/recover.py zoo:fashion_resnet --share 0.5 --epochs 2 10 --seeds 0 1 2
    python scripts/bench/recover.py zoo:minilm --share 0.77 --epochs 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
import torch

import hwsearch as hs
from hwsearch import backends
from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import parse_budgets
from hwsearch.compress.widths import Kept
from hwsearch.deployment.deploy import as_deployed, bank_of, kept_of, parse_variants
from hwsearch.deployment.session import DENSE, Job, Session
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import HwsearchError
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted
from hwsearch.network.variants import Variant, legal
from hwsearch.pipeline.closed_loop import closed_loop
from hwsearch.progress import Progress
from hwsearch.recovery.coupling import METHODS
from hwsearch.recovery.gradients import WORDS
from hwsearch.recovery.recovery import BATCHNORM, LED, Options, Recovered, Recovery

ALLOCATION = "allocation"


@dataclass(frozen=True)
class Case:
    """What is recovered: refitted weights of an allocation."""

    name: str
    whole: Lowering
    start: Lowering
    kept: Kept
    variants: Mapping[str, Variant]
    quantize_outputs: bool

    def recovered(self, options: Options, out: Path | None = None) -> Recovered:
        """By a method."""
        return Recovery(
            self.whole, self.start, self.kept, self.variants, options, quantize_outputs=self.quantize_outputs, out=out,
            progress=Progress(),
        ).run()  # fmt: skip


def main() -> None:
    parser = common.searching(__doc__, ["zoo:fashion_resnet"], "bench-recover")
    parser.add_argument("--share", type=float, default=0.5, help="budget, of the fastest uniform network's time")
    parser.add_argument("--epochs", type=int, nargs="*", default=[2, 10], help="recoveries of so many are measured")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="learning rate; by default it is found")
    parser.add_argument("--batchnorm", choices=BATCHNORM, default=BATCHNORM[0], help="of the recoveries that are measured")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="of the table")
    parser.add_argument("--gradients", nargs="*", default=list(WORDS[1:]), help="pruned ones, tried on the allocation")
    parser.add_argument("--table-epochs", type=int, default=1, help="of the table of methods; 0: no table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    common.say_machine()
    for spec in args.tasks:
        bench(spec, args)


def bench(spec: str, args: argparse.Namespace) -> None:
    task = hs.load(spec)
    folder = args.out / task.name
    setup = set_up(task, backends.get("openvino"))
    print(f"\n{spec}: {len(setup.network.units)} units, {len(setup.network.groups)} channel groups")
    if task.train is None:
        print("  without training data: recoveries are on calibration data")
    session, allocation = searched(setup, folder, args)
    start = as_deployed(setup, allocation, bank_of(setup, allocation, folder / "weights"))
    own = Case(
        ALLOCATION, setup.lowering, start.lowering, kept_of(allocation, setup.network), parse_variants(allocation),
        setup.backend.quantize_outputs,
    )  # fmt: skip
    print(f"  dense score {session.dense_score:.4f}")
    for epochs in args.epochs:
        measured(session, allocation, start, own, epochs, folder, args)
    if args.table_epochs:
        for case in (own, *everywhere(setup)):
            methods(case, args)


def searched(setup: Setup, folder: Path, args: argparse.Namespace) -> tuple[Session, Allocation]:
    """The answer at the share, and the session that measured it."""
    table, sensitivity = common.tables(setup, folder, args)
    session, uniforms, name = common.uniforms(setup, table)
    quick = uniforms[name]
    print(f"  fastest uniform {name}: {session.ms(quick):.4g} ms, score {session.score(quick, name):.4f}")
    share = args.share * session.ms(quick) / session.ms(uniforms[DENSE])
    budgets = parse_budgets([f"latency={share:.6%}"])
    report, allocation, _ = closed_loop(
        session, table, sensitivity, budgets, folder / f"{args.share:.3f}", weights=folder / "weights"
    )
    print(f"  at {args.share:.0%} of it: {report.latency_ms['measured']:.4g} ms, {report.verdict}, "
          f"score {report.score['deployed']:.4f} refitted")  # fmt: skip
    return session, allocation


def measured(
    session: Session, allocation: Allocation, start: Setup, case: Case, epochs: int, folder: Path, args: argparse.Namespace
) -> None:
    """Recoveries of so many epochs beside the refitted network, in one session."""
    variants, base = parse_variants(allocation), str(allocation.options["base"])
    jobs, seconds = {"refitted": Job(variants, base, setup=start)}, {}
    for seed in args.seeds:
        began = time.perf_counter()
        options = Options(epochs=epochs, rate=args.rate, seed=seed, scored=False, batchnorm=args.batchnorm)
        try:
            done = case.recovered(options, folder / f"{args.share:.3f}.{epochs}.{seed}.safetensors")
        except HwsearchError as error:
            print(f"  {epochs} epochs, seed {seed}: {error}")
            continue
        jobs[f"seed {seed}"] = Job(variants, base, setup=replace(start, lowering=done.lowering))
        seconds[f"seed {seed}"] = time.perf_counter() - began
        print(f"  {epochs} epochs, seed {seed}: rate {done.schedule.rate:.0e}, held-out loss {done.course.start:.4g} to "
              f"{done.course.least:.4g} (step {done.course.best} of {done.schedule.steps})")  # fmt: skip
    found = session.measure(jobs)
    print(f"  {epochs} epochs, as measured: engine, ms, of the refitted one's time, score, KL, seconds of recovery")
    for name, one in found.items():
        ratio = session.ms(one) / session.ms(found["refitted"])
        print(f"    {name:9s} {session.ms(one):.4g} {ratio:.3f} {session.score(one, name):.4f} {session.loss(one):.3g} "
              f"{seconds.get(name, 0.0):.0f}")  # fmt: skip


def everywhere(setup: Setup) -> list[Case]:
    """2:4 weights in fp16 and int4 weights, wherever a unit can have them and there is one that can."""
    whole, found = setup.lowering, []
    for variant in (Variant("fp16", "2:4"), Variant("int4")):
        chosen = {u.name: variant if legal(u, [variant]) else Variant("fp32") for u in whole.network.units}
        if variant in chosen.values():
            found.append(Case(f"{variant} everywhere", whole, refitted(whole, chosen), {}, chosen, False))
    return found


def methods(case: Case, args: argparse.Namespace) -> None:
    """The methods at equal minibatches, rates and starting weights: held-out losses and scores, mean and range over seeds."""
    sparse = any(v.kept for v in case.variants.values())
    offered = [m for m in args.methods if (m not in LED or case.kept) and (m != "srste" or sparse)]
    rate = args.rate or case.recovered(Options(epochs=args.table_epochs, scored=False)).schedule.rate
    print(f"  {case.name}, {args.table_epochs} epoch(s) at {rate:.0e}: method, held-out loss (range), score (range)")
    plain = Options(epochs=args.table_epochs, rate=rate)
    rows = {method: replace(plain, method=method) for method in offered}
    if case.name == ALLOCATION:
        rows |= {word: replace(plain, gradients=word) for word in args.gradients}
    for number, (name, options) in enumerate(rows.items()):
        done = []
        for seed in args.seeds:
            try:
                done.append(case.recovered(replace(options, seed=seed)))
            except HwsearchError as error:
                print(f"    {name}, seed {seed}: {error}")
        if not done:
            continue
        if number == 0:
            print(f"    {'refitted':14s} {done[0].course.start:.4g} {done[0].score['refitted']:.4f}")
        losses, scores = [d.course.least for d in done], [d.score["recovered"] for d in done]
        print(f"    {name:14s} {np.mean(losses):.4g} ({min(losses):.4g} to {max(losses):.4g}) "
              f"{np.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})")  # fmt: skip
        if own := done[0].pruned:
            print(f"      zeros {own['zeros']:.2f} ({own['zeros_dense']:.2f} dense); of the time of products, backward ones are "
                  f"{own['backward_share']:.2f}, hardware would save {own['estimated_saving']:.2f} (estimated)")  # fmt: skip


if __name__ == "__main__":
    main()

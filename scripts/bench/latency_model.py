#!/usr/bin/env python
"""Predicted against measured latency on allocations that the fit has not seen.

For each network and number of threads: profile in context and layer by layer (or go on with the tables in --out, and with
the allocations that were timed for them), then build and time --heldout allocations: independent random ones, Markov runs, and
answers of the solver under random losses and budgets. Printed are the errors of the latency model beside the baselines: the
additive model without boundary terms, a constant, the noise floor (one allocation built and timed twice), and, on the
allocations whose channels are all there, the sum of layers timed alone. With --budgets N also the closed loop, at budgets
spread from the fastest to the dense network in the base precision.

    python scripts/bench/latency_model.py zoo:fashion_resnet zoo:minilm zoo:efficientnet_lite0 --threads 1 2

With --ablate, or --without TERM, nothing is timed: what each term of the model wins is told from tables that are there
(`ablation.py`). `spend-rest` is a step of the closed loop and not of the model: it runs on a simulated device.

    python scripts/bench/latency_model.py --ablate --tables profiles/*.parquet
    python scripts/bench/latency_model.py --without pooling spend-rest
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import ablation
import common
import numpy as np
import spending

import hwsearch as hs
from hwsearch import backends
from hwsearch.allocate.budget import parse_budgets
from hwsearch.allocate.milp import minimise
from hwsearch.allocate.space import make_space
from hwsearch.cli.overview import disturbed
from hwsearch.deployment.session import Session
from hwsearch.device.timing import Timing
from hwsearch.engine.reference import reference_engine
from hwsearch.engine.setup import Setup, set_up
from hwsearch.errors import HwsearchError
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.network.choices import Candidate, random_allocation
from hwsearch.network.variants import Variant
from hwsearch.pipeline.closed_loop import closed_loop
from hwsearch.profiler.profile import Effort, profile
from hwsearch.progress import Progress
from hwsearch.table.build import Build
from hwsearch.table.table import LatencyTable, usable

ATTEMPTS = 3
SPEND_REST = "spend-rest"
HERE = Path(__file__).resolve().parents[2]


def main() -> None:
    tasks = ["zoo:fashion_resnet", "zoo:efficientnet_lite0", "zoo:minilm"]
    parser = common.parser(__doc__, tasks=tasks, threads=[1], backend=True)
    parser.add_argument("--axes", default="width,precision")
    parser.add_argument("--heldout", type=int, default=25)
    parser.add_argument(
        "--twice", type=int, default=5, help="how many of them are built and timed a second time"
    )
    parser.add_argument("--budgets", type=int, default=0, help="budgets for the closed loop")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each profile")
    parser.add_argument("--no-alone", action="store_true", help="without the sum of layers timed alone, which takes a profile more")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--out", type=Path, default=Path("bench-latency"))
    parser.add_argument("--without", nargs="+", choices=[*ablation.TERMS, SPEND_REST], default=[], metavar="TERM",
                        help=f"what a term wins, on saved tables: {', '.join(ablation.TERMS)}, or {SPEND_REST}")  # fmt: skip
    parser.add_argument("--ablate", action="store_true", help="the same of every term of the model")
    parser.add_argument(
        "--tables", type=Path, nargs="+", default=sorted((HERE / "profiles").glob("*.parquet"))
    )
    args = parser.parse_args()
    if args.ablate or args.without:
        if terms := list(ablation.TERMS) if args.ablate else [t for t in args.without if t != SPEND_REST]:
            ablation.ablate(args.tables, terms)
        if SPEND_REST in args.without:
            spending.compare()
        return
    common.say_machine()
    for spec in args.tasks:
        for threads in args.threads:
            bench(spec, threads, args)


def bench(spec: str, threads: int, args: argparse.Namespace) -> None:
    task = hs.load(spec)
    setup = set_up(task, backends.get(args.backend), threads=threads)
    axes = args.axes.split(",")
    stem = f"{task.name}.{args.backend}.{threads}t.{'-'.join(axes)}"
    modes = ["context"] if args.no_alone else ["context", "alone"]
    table, *alone = (
        profile(
            setup, args.out / f"{stem}.{mode}.parquet", Effort(args.time_limit, extend=False), mode=mode, axes=axes,
            progress=Progress(),
        )
        for mode in modes
    )  # fmt: skip
    model = fit(table)
    path = args.out / f"{stem}.heldout.json"
    if not path.exists():
        measure(setup, table, model, path, args)
    kept = json.loads(path.read_text())
    heldout = [
        (k["kind"], Candidate({u: Variant.parse(v) for u, v in k["variants"].items()}, k["widths"]))
        for k in kept
    ]
    raw = np.array([k["measured_ns"] for k in kept])
    slower = [k.get("slowdown", 0.0) for k in kept]
    measured = ablation.on_quiet_machine(table, model, kept)
    again = [abs(k["again_ns"] / k["measured_ns"] - 1.0) for k in kept if "again_ns" in k]
    noise = np.array([k["error_ns"] for k in kept])
    show(task.name, threads, args, table, model, alone[0] if alone else None, heldout, measured, noise, again)
    if (moved := ~np.isclose(measured, raw, rtol=1e-9)).any():
        by = float(np.median(np.array(slower)[moved]))
        print(f"  {moved.sum()} of {len(kept)} were timed on a machine slower by {by:.0%} (median) than the table's, and converted "
              f"({model.per_node:.2f} of a slowdown is the same time for every executed node); as measured:")  # fmt: skip
        errors(
            "latency model", np.array([model.predict(c.variants, c.widths).time_ns for _, c in heldout]), raw
        )
    if hit := sum(k["disturbed"] for k in kept):
        print(f"  {hit} of {len(kept)} held-out allocations were never timed on a quiet machine")
    if args.budgets:
        loops(task, setup, table, args, axes)


def measure(
    setup: Setup, table: LatencyTable, model: LatencyModel, path: Path, args: argparse.Namespace
) -> None:
    """Time the held-out allocations, once for each table: `path` keeps them.

    Those that something else on the machine disturbed are timed again after all others, at most twice.
    """
    reference = reference_engine(setup)
    drawn = candidates(table, model, args.heldout, args.seed)
    scale, kept = table.header.reference_ns, {}
    left = list(range(len(drawn)))
    for _ in range(ATTEMPTS):
        for index in left:
            kind, candidate = drawn[index]
            found, nodes = timed(setup, reference.run, candidate, table.quiet_ns)
            kept[index] = {
                "kind": kind,
                "variants": {u: str(v) for u, v in candidate.variants.items()},
                "widths": candidate.widths,
                "measured_ns": found.ratio * scale,
                "error_ns": found.width / 3.92 * found.ratio * scale,
                "disturbed": found.disturbed,
                "slowdown": found.quiet_ns / table.quiet_ns - 1.0,
                "nodes": nodes / table.reference_nodes,
            }
            if index % max(args.heldout // args.twice, 1) == 0:
                again, _ = timed(setup, reference.run, candidate, table.quiet_ns)
                kept[index]["again_ns"] = again.ratio * scale
        left = [i for i in left if kept[i]["disturbed"]]
    path.write_text(json.dumps([kept[i] for i in range(len(drawn))]))


def candidates(
    table: LatencyTable, model: LatencyModel, count: int, seed: int
) -> list[tuple[str, Candidate]]:
    """(kind, allocation), no two the same and none of the table: two in five Markov runs at whole widths, the others at random
    widths, independent or answers of the solver."""
    network, grid = table.network, table.grid()
    offered = {u: [Variant.parse(v) for v in vs] for u, vs in table.offered().items()}
    rng = np.random.default_rng(seed)
    seen = {b.key[1:] for b in table.builds}
    found: list[tuple[str, Candidate]] = []
    kinds = (
        ["run", "random", "solver", "run", "random"] if table.network.groups else ["run", "solver", "random"]
    )
    for number in range(40 * count):
        if len(found) == count:
            break
        kind = kinds[len(found) % len(kinds)]
        widths = {g: int(rng.choice(steps)) for g, steps in grid.items()}
        if kind == "run":
            drawn = Candidate(random_allocation(network, offered, rng), dict(network.channels))
        elif kind == "random":
            drawn = Candidate({u: vs[int(rng.integers(len(vs)))] for u, vs in offered.items()}, widths)
        else:
            drawn = solved(table, model, np.random.default_rng(seed + number))
        key = (tuple(map(str, drawn.variants.values())), tuple(drawn.widths.values()))
        known = all(model.knows(u, v, drawn.widths) for u, v in drawn.variants.items())
        if known and key not in seen:
            seen.add(key)
            found.append((kind, drawn))
    return found


def solved(table: LatencyTable, model: LatencyModel, rng: np.random.Generator) -> Candidate:
    """The solver's answer to random losses (int8 and narrower always lose something) under a random budget."""
    network = table.network
    loss = {
        u: {
            v: 0.0 if not Variant.parse(v).quantized else float(rng.exponential())
            for v in (*vs, "dense.fp32")
        }
        for u, vs in table.offered().items()
    }
    widths = {
        g: dict(zip(steps, np.cumsum([0.0, *rng.exponential(size=len(steps) - 1)]).tolist(), strict=True))
        for g, steps in table.grid().items()
        if len(steps) > 1
    }
    order = {g: tuple(range(n)) for g, n in network.channels.items()}
    losses = hs.SensitivityTable(
        network, loss, 1, "kl", False, width_loss=widths, order=order,
        int8_bits=table.header.int8.bits, unsigned=table.header.int8.unsigned,
    )  # fmt: skip
    problem = make_space(table, losses, model)
    least = minimise(problem.problem, "latency").costs["latency"]
    most = table.time_ns(table.find("reference"))
    budget = int(least + rng.uniform(0.05, 0.8) * (most - least))
    allocation = hs.search(table, losses, [f"latency={budget}ns"], model=model, kappa=0.0)
    return Candidate({u: Variant.parse(v) for u, v in allocation.variants.items()}, dict(allocation.widths))


def timed(
    setup: Setup, reference: Callable[[], None], candidate: Candidate, quiet_ns: float
) -> tuple[Timing, int]:
    """(time, executed nodes)."""
    engine = common.build(setup, candidate)
    return common.against(reference, engine, quiet_ns), len(engine.nodes())


def show(
    name: str, threads: int, args: argparse.Namespace, table: LatencyTable, model: LatencyModel, alone: LatencyTable | None,
    heldout: list[tuple[str, Candidate]], measured: np.ndarray, noise: np.ndarray,
    again: list[float],
) -> None:  # fmt: skip
    network = table.network
    if not heldout:
        print(f"\n{name}: no allocation is left to hold out: the design holds all that its few choices make")
        return
    offered = sum(map(len, table.offered().values()))
    grid, variants = table.grid(), table.offered()
    cells = sum(len(variants[u.name]) * math.prod(len(grid[g]) for g in u.groups) for u in network.units)
    fitted, kept = (sum((b.role == "heldout") == held for b in table.builds) for held in (False, True))
    print(f"\n{name}: {args.backend}, {threads} thread(s), axes {args.axes}: {len(network.units)} units, "
          f"{offered} (unit, variant) at whole widths, {cells} at all widths; {fitted} builds and {kept} held out (a third of the "
          f"(unit, widths, variant): {cells // 3}) in {sum(profiled(b) for b in table.builds):.0f} s; "
          f"design ended by: {table.header.design.get('stopped')}; {disturbed(table)} builds on a disturbed machine; "
          f"{len(heldout)} held-out allocations, {measured.min() / 1e6:.3f}-{measured.max() / 1e6:.3f} ms, dense "
          f"{table.dense_ns / 1e6:.3f} ms")  # fmt: skip
    predictions = [model.predict(c.variants, c.widths) for _, c in heldout]
    additive = fit(table, boundaries=False)
    rows = {
        "latency model": np.array([p.time_ns for p in predictions]),
        "additive in context": np.array([additive.predict(c.variants, c.widths).time_ns for _, c in heldout]),
        "constant": np.full(len(heldout), float(np.mean([table.time_ns(b) for b in usable(table)]))),
    }
    for what, predicted in rows.items():
        errors(what, predicted, measured)
    for kind in dict.fromkeys(k for k, _ in heldout):
        own = np.array([k == kind for k, _ in heldout])
        errors(f"  of these: {kind}", rows["latency model"][own], measured[own])
    whole = np.array([c.widths == network.channels for _, c in heldout])
    if alone is not None and whole.any():
        scale = table.header.reference_ns / alone.header.reference_ns
        isolated = fit(alone)
        sums = np.array(
            [isolated.predict(c.variants).time_ns for (_, c), w in zip(heldout, whole, strict=True) if w]
        )
        errors("sum of layers alone", sums * scale, measured[whole])
    z = np.abs(rows["latency model"] - measured) / np.hypot([p.sigma_ns for p in predictions], noise)
    print(f"  inside sigma {np.mean(z <= 1):.0%}, inside two sigma {np.mean(z <= 2):.0%}; "
          f"noise floor (built and timed twice) median {np.median(again):.1%}", flush=True)  # fmt: skip


def profiled(build: Build) -> float:
    """Seconds that a build took to compile and to time."""
    return build.build_s + float(build.samples_ns.sum() + build.reference_ns.sum()) / 1e9


def errors(what: str, predicted: np.ndarray, measured: np.ndarray) -> None:
    print(f"  {what:22s} {common.Errors.of(predicted, measured)}")


def loops(task: hs.Task, setup: Setup, table: LatencyTable, args: argparse.Namespace, axes: list[str]) -> None:
    """The closed loop at budgets spread between the fastest predicted and the dense network in the base precision."""
    folder = args.out / f"{task.name}.{setup.options.threads}t.loops"
    grid = table.grid() if "width" in axes else {}
    sensitivity = sensitivity_for(
        setup, folder / "sens.parquet", grid=grid, weights=folder / "weights", progress=Progress()
    )
    least = minimise(make_space(table, sensitivity, axes=axes).problem, "latency").costs["latency"]
    session = Session(setup, table)
    slack, rounds, met = [], [], 0
    # above the whole network in its base precision every budget is met by that, with slack to any size
    most = table.time_ns(table.find("reference"))
    shares = np.linspace(0.1, 1.0, args.budgets)
    for share in shares:
        budget = int(least + share * (most - least))
        try:
            report, _, table = closed_loop(
                session, table, sensitivity, parse_budgets([f"latency={budget}ns"]), folder, axes=axes,
                weights=folder / "weights",
            )  # fmt: skip
        except HwsearchError as error:
            print(f"  budget {budget / 1e6:.4g} ms: {error}")
            continue
        have = report.latency_ms["measured"] or 0.0
        slack.append(1.0 - have * 1e6 / budget)
        rounds.append(report.rounds)
        met += have * 1e6 <= 1.01 * budget
        print(
            f"  budget {budget / 1e6:.4g} ms: measured {have:.4g} ms in {report.rounds} round(s)", flush=True
        )
    print(f"  closed loop: {met} of {len(shares)} within budget x 1.01, median slack {np.median(slack):.1%}, "
          f"median rounds {np.median(rounds):.0f}")  # fmt: skip


if __name__ == "__main__":
    main()

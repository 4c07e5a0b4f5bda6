#!/usr/bin/env python
"""Exact allocation of widths and precisions, on a simulated network.

An inverted-residual network (tests/allocate/tied.py): each channel group has a width, each unit the widths of its
groups and fp32 or int8. For shares of the dense latency, and then with sizes below what those answers have: columns
of the program, seconds to the proof, loss, gap, and the bound that the linear relaxation gives.

    python scripts/bench_allocate.py --blocks 16 --stages 8 --widths 7
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from hwsearch.allocate.lagrangian import lower_bound
from hwsearch.allocate.milp import solve
from hwsearch.allocate.problem import Problem, Solution
from hwsearch.allocate.program import Program

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "allocate")]
from tied import channels  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=16, help="of three units each")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--widths", type=int, default=7, help="choices of each channel group")
    parser.add_argument(
        "--latency", type=float, nargs="*", default=[0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12]
    )
    parser.add_argument(
        "--size", type=float, default=0.85, help="share of the answer's size in the second half"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=60.0)
    args = parser.parse_args()
    free = channels(args.blocks, args.stages, args.widths, args.seed)
    dense = [0] * len(free.sizes)
    units = sum(name.startswith("u") for name in free.variables)
    print(f"{units} units, {len(free.sizes) - units} groups of {args.widths} widths, "
          f"{sum(free.sizes)} choices, dense {free.cost('latency', dense) / 1e6:.3f} ms")  # fmt: skip
    within = [replace(free, budgets={"latency": int(free.cost("latency", dense) * f)}) for f in args.latency]
    found = [
        bench(problem, f"latency {f:.0%}", args) for problem, f in zip(within, args.latency, strict=True)
    ]
    for problem, f, s in zip(within, args.latency, found, strict=True):
        size = int(s.costs["size"] * args.size)
        bench(replace(problem, budgets={**problem.budgets, "size": size}), f"latency {f:.0%}, size", args)


def bench(problem: Problem, name: str, args: argparse.Namespace) -> Solution:
    columns = int(np.count_nonzero(Program(problem, time.monotonic()).upper))
    bound = lower_bound(problem)
    start = time.perf_counter()
    found = solve(problem, time_limit_s=args.time_limit)
    print(f"  {name:20s} {columns:6d} columns  {time.perf_counter() - start:6.2f} s  loss {found.loss:.6g}  "
          f"gap {found.gap:.1g} ({found.status})  relaxed {bound:.6g}", flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    main()

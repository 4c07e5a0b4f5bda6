"""How often "infeasible" is false: random small networks, budgets and time limits on simulated devices, against exhaustive search.

`python scripts/bench/infeasible.py [TRIALS] [NETWORKS] [FIRST]`: the search's answers by whether an allocation of the offered space
meets the budgets, and how much of what exists was found. Exit 1 where "infeasible" was said flatly of what exists.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))


def judge(trials: int = 200, networks: int = 40, first: int = 0) -> int:
    """Prints each false trial and the counts; returns how many were false."""
    from offered import trial

    counts: Counter[tuple[str, str]] = Counter()
    false = 0
    for seed in range(first, first + trials):
        tried = trial(seed, networks)
        counts["exists" if tried.exists else "does not exist", tried.outcome] += 1
        if tried.false:
            false += 1
            print(f"trial {seed}, {tried.builds} builds: {', '.join(tried.budgets)} exists, but: {tried.refused}", flush=True)
        if tried.exists and tried.refused and not tried.false:
            print(f"trial {seed}, {tried.builds} builds: {', '.join(tried.budgets)} exists; said: {tried.refused}", flush=True)
    for (truth, said), count in sorted(counts.items()):
        print(f"{truth:15s} {said:8s} {count}")
    print(f"{false} of {trials} said to be infeasible although an answer exists")
    return false


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, {"HWSEARCH_CACHE": cache}):
        sys.exit(bool(judge(*map(int, sys.argv[1:]))))

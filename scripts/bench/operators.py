"""How many operators leave a network's channels free: python scripts/bench/operators.py [CHECKOUT]

Each operator of tests/torch_operators.py stands between two convolutions; it is followed where the channels between these form a
group. CHECKOUT: another working tree of hwsearch to count with (an earlier commit); the operators are those of this one. With
this tree also torch's own list of operators: how many have a rule, are spelled out at the trace, or have a reason.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]


def tried() -> None:
    from torch_operators import FOLLOWED, MIXED, between

    from hwsearch.graph.trace import trace

    found: dict[str, str] = {}
    for name, operator in {**FOLLOWED, **MIXED}.items():
        try:
            network = trace(*between(operator)).network
            free = any("a" in g.producers and "b" in g.consumers for g in network.groups)
            found[name] = "" if free else ("; ".join(network.blocked) or "no word why")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    stopped = {n: why for n, why in found.items() if why}
    print(f"{len(found)} operators tried, {len(found) - len(stopped)} followed, {len(stopped)} stop channels")
    print(
        f"of these {len(set(stopped) & set(FOLLOWED))} needlessly: {', '.join(n for n in stopped if n in FOLLOWED)}"
    )
    for name in MIXED:
        print(f"  {name}: {found[name] or 'followed'}")


def listed() -> None:
    from graph.test_operators import fate, operators

    counts = Counter(fate(op)[0] for op in operators())
    print(
        "torch's operators that a trace may hold:",
        ", ".join(f"{n} {kind}" for kind, n in counts.most_common()),
    )


def main() -> None:
    warnings.simplefilter("ignore")
    tree = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    sys.path[:0] = [str(tree), str(HERE / "tests")]
    tried()
    if tree == HERE:
        listed()


if __name__ == "__main__":
    main()

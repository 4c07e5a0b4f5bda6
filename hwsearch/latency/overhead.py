"""What an inference takes beside its executed nodes, whatever they are: from builds of very different nodes.

A network's nodes add up to less than its inference: the call into the runtime, threads that are woken, outputs handed over.
That is the same for a small network and a large one. To count it among the layers, in proportion, would make one layer slower in a
narrow network than in a wide one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import theilslopes

from hwsearch.latency.student_t import weight

Floats = NDArray[np.float64]

EXPECTED = 0.1
"""Of the shortest time, how much of it is expected before anything is measured (a standard deviation, from zero)."""
MOST = 0.8
"""Of the shortest time, the most that is not its nodes'."""
_ROUNDS = 20


def dispatch_ns(times: Floats, counted: Floats) -> float:
    """The share of an inference that no node accounts for, in ns: times = dispatch + slope x counted.

    times, counted [builds]: of whole inferences and of the sums of their nodes, in ns, above zero. Least squares of relative
    errors, neither term below zero, where errors follow `student_t` (a build whose nodes were
    counted on a machine of another speed than it was timed on does not decide). What builds scatter around the line says how far
    to trust it: the dispatch is shrunk towards zero. 0 where all builds count the same.
    """
    if len(set(counted.tolist())) < 3:
        return 0.0
    shortest = float(times.min())
    rows = np.stack([np.full(len(times), shortest), counted], axis=1) / times[:, None]
    slope, intercept, *_ = theilslopes(times, counted)
    fitted = np.array([intercept / shortest, slope])
    for _ in range(_ROUNDS):
        off = rows @ fitted - 1.0
        scatter = max(1.48 * float(np.median(np.abs(off))), 1e-6)
        root = np.sqrt(weight(off / scatter))
        shrunk = np.vstack([rows * root[:, None], [scatter / EXPECTED, 0.0]])
        fitted, _ = nnls(shrunk, np.append(root, 0.0))
    return min(float(fitted[0]), MOST) * shortest

"""What an inference takes beside its executed nodes, and what nodes take beside their work while they are counted.

From builds of very different nodes. A network's nodes add up to less than its inference: the call into the runtime, threads that
are woken, outputs handed over. That is the same for a small network and a large one. To count it among the layers, in proportion,
would make one layer slower in a narrow network than in a wide one. The other way round, a runtime that reads a clock before and
after every node (ONNX Runtime: about 2 us) counts that among them: in small networks they add up to more than the inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import theilslopes

from hwsearch.latency.student_t import weight

Floats = NDArray[np.float64]

EXPECTED, EXPECTED_COUNTING = 0.1, 1.0
"""Of the shortest time, how much is expected beside the nodes, and how much counting the most nodes takes, before anything is
measured (standard deviations, from zero)."""
MOST = 0.8
"""Of the shortest time, the most that is not its nodes'."""
LEAST = 0.05
"""Of a node's counted time, what is at least its work."""
_ROUNDS = 20


@dataclass(frozen=True)
class Beside:
    """dispatch_ns: what an inference takes beside its nodes. counter_ns: what the count of a node holds of the counting."""

    dispatch_ns: float = 0.0
    counter_ns: float = 0.0


def worked_ns(counted_ns: Floats, counter_ns: float) -> Floats:
    """What nodes [nodes] take without the counting."""
    return np.maximum(counted_ns - counter_ns, LEAST * counted_ns)


def beside(times: Floats, counted: Floats, nodes: Floats) -> Beside:
    """What no node accounts for, and what nodes take only while they are counted.

    times = dispatch + slope x (counted - counter x nodes)

    times, counted, nodes [builds]: of whole inferences, the sums of their nodes' times, in ns, and how many nodes. Least squares of
    relative errors, no term below zero, where errors follow `student_t` (a build whose nodes were counted on a machine of another
    speed than it was timed on does not decide). What builds scatter around the line says how far to trust it: dispatch and
    counter are shrunk towards zero. Nothing where all builds count the same.
    """
    if len(set(counted.tolist())) < 3:
        return Beside()
    shortest, most = float(times.min()), float(nodes.max())
    rows = np.stack([np.full(len(times), shortest), counted, -nodes * shortest / most], axis=1) / times[:, None]
    slope, intercept, *_ = theilslopes(times, counted)
    fitted = np.array([intercept / shortest, slope, 0.0])
    for _ in range(_ROUNDS):
        off = rows @ fitted - 1.0
        scatter = max(1.48 * float(np.median(np.abs(off))), 1e-6)
        root = np.sqrt(weight(off / scatter))
        expected = [[scatter / EXPECTED, 0.0, 0.0], [0.0, 0.0, scatter / EXPECTED_COUNTING]]
        shrunk = np.vstack([rows * root[:, None], expected])
        fitted, _ = nnls(shrunk, np.concatenate([root, [0.0, 0.0]]))
    counter = float(fitted[2]) * shortest / most / max(float(fitted[1]), 1e-9)
    return Beside(min(float(fitted[0]), MOST) * shortest, min(counter, MOST * float(np.min(counted / np.maximum(nodes, 1.0)))))

"""The local polytope of a problem: one column for each choice, one for each pair of classes of choices.

A pairwise matrix is first made zero in its first row and column (the rest moves into the unary costs, exactly);
choices that it then cannot tell apart form one class, and the pair's columns live on classes. The marginals of
the pair's columns equal the sums of the choices' columns (Wainwright and Jordan, 2008, section 4.1.1), which is
exact on integers and tight on trees. A tie is marginals as well: the columns of a variable's choices that require k
of another sum to the other's column k.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from hwsearch.allocate.problem import Choice, Cost, Problem, Tie

Vector = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """constant + coefficients @ x over the polytope's columns; integers for costs, floats for losses."""

    constant: float
    coefficients: Vector


@dataclass(frozen=True)
class Pair:
    """Classes of the choices of variables i and j, with one representative choice of each class."""

    i: int
    j: int
    class_i: Ints
    class_j: Ints
    first_i: Ints
    first_j: Ints


class Polytope:
    """Columns and equalities (`matrix @ x == right`, 0 <= x <= 1) of the costs `columns`.

    units: how many columns belong to choices; those are the integer ones. Each block of columns sums to 1.
    """

    def __init__(self, problem: Problem, columns: Collection[str]) -> None:
        self.sizes, self.ties = problem.sizes, problem.ties
        self.pairs = _pairs([part for column in columns for part in problem.parts(column)])
        widths = [*self.sizes, *(len(p.first_i) * len(p.first_j) for p in self.pairs)]
        self.widths = np.array(widths)
        self.starts = np.concatenate([[0], np.cumsum(self.widths)])
        self.count = int(self.starts[-1])
        self.units = sum(self.sizes)
        self.matrix, self.right = self._equalities()

    def linear(self, unary: Sequence[Vector], cost: Cost | None = None) -> Linear:
        """A loss (`unary`) or, with `cost`, its fixed and pairwise parts too, as a function of the columns."""
        rest = [np.array(u) for u in unary]
        matrices: dict[tuple[int, int], Ints] = {}
        for (i, j), m in (cost.pairwise if cost else {}).items():
            rest[i] += m[:, 0]
            rest[j] += m[0] - m[0, 0]
            matrices[i, j] = _reduced(m)
        for p in self.pairs:
            reduced = matrices.get((p.i, p.j))
            size = len(p.first_i) * len(p.first_j)
            picked = np.zeros(size, np.int64) if reduced is None else reduced[np.ix_(p.first_i, p.first_j)]
            rest.append(picked.ravel())
        return self.shifted(Linear(cost.fixed if cost else 0, np.concatenate(rest)))

    def shifted(self, linear: Linear) -> Linear:
        """The same function with the least coefficient of each block at 0, so that `constant` bounds it below."""
        least = np.minimum.reduceat(linear.coefficients, self.starts[:-1])
        moved = linear.coefficients - np.repeat(least, self.widths)
        return Linear(linear.constant + least.sum().item(), moved)

    def largest(self, linear: Linear) -> float:
        """An upper bound of a shifted function."""
        largest: float = np.maximum.reduceat(linear.coefficients, self.starts[:-1]).sum().item()
        return linear.constant + largest

    def decode(self, x: Vector) -> Choice:
        """The choices nearest to a vector of columns; they agree with the ties where it is integral."""
        starts = self.starts[: len(self.sizes)]
        return tuple(int(x[s : s + n].argmax()) for s, n in zip(starts, self.sizes, strict=True))

    def rounded(self, x: Vector) -> Choice:
        """The same where a vector need not be integral: of choices that require others, the nearest that require what is chosen."""
        choice, ties = list(self.decode(x)), dict[int, list[Tie]]()
        for tie in self.ties:
            ties.setdefault(tie.i, []).append(tie)
        for i, own in ties.items():
            able = np.all([tie.of == choice[tie.j] for tie in own], axis=0)
            if able.any():
                choice[i] = int(np.where(able, x[self.starts[i] : self.starts[i] + self.sizes[i]], -1.0).argmax())
        return tuple(choice)

    def columns(self, choice: Sequence[int]) -> Ints:
        """The choices' own columns."""
        return np.asarray(self.starts[: len(self.sizes)] + np.asarray(choice), np.int64)

    def wider(self, extra: int) -> csr_array:
        """`matrix` with columns of zeros added."""
        m = self.matrix
        return csr_array((m.data, m.indices, m.indptr), shape=(len(self.right), self.count + extra))

    def _equalities(self) -> tuple[csr_array, Vector]:
        n = len(self.sizes)
        rows = [np.repeat(np.arange(n), self.sizes)]
        cols, vals = [np.arange(self.units)], [np.ones(self.units)]
        row = n
        for k, p in enumerate(self.pairs):
            shape = (len(p.first_i), len(p.first_j))
            block = self.starts[n + k] + np.arange(shape[0] * shape[1])
            for axis, (v, classes) in enumerate(((p.i, p.class_i), (p.j, p.class_j))):
                rows += [row + np.indices(shape)[axis].ravel(), row + classes]
                cols += [block, self.starts[v] + np.arange(len(classes))]
                vals += [np.ones(len(block)), -np.ones(len(classes))]
                row += shape[axis]
        for tie in self.ties:
            i, j = (self.starts[v] + np.arange(self.sizes[v]) for v in (tie.i, tie.j))
            rows += [row + tie.of, row + np.arange(len(j))]
            cols += [i, j]
            vals += [np.ones(len(i)), -np.ones(len(j))]
            row += len(j)
        entries = (np.concatenate(vals), (np.concatenate(rows), np.concatenate(cols)))
        return csr_array(entries, shape=(row, self.count)), (np.arange(row) < n).astype(float)


def _reduced(m: Ints) -> Ints:
    reduced: Ints = m - m[:, :1] - m[:1] + m[0, 0]
    return reduced


def _pairs(costs: Sequence[Cost]) -> list[Pair]:
    stacked: dict[tuple[int, int], list[Ints]] = {}
    for cost in costs:
        for pair, m in cost.pairwise.items():
            stacked.setdefault(pair, []).append(_reduced(m))
    pairs = []
    for (i, j), ms in sorted(stacked.items()):
        _, first_i, class_i = np.unique(np.hstack(ms), axis=0, return_index=True, return_inverse=True)
        _, first_j, class_j = np.unique(np.vstack(ms), axis=1, return_index=True, return_inverse=True)
        if len(first_i) > 1:  # else the matrix is a sum of unary costs
            pairs.append(Pair(i, j, class_i.ravel(), class_j.ravel(), first_i, first_j))
    return pairs

"""The factor graph: variables with choices, a loss on each, cost columns on one or two of them, ties, budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwsearch.allocate.budget import LOSS
from hwsearch.errors import InvalidInput
from hwsearch.loss.interactions import Correction

Choice = tuple[int, ...]
"""For each variable, the index of what was chosen."""

LARGEST = 2**53
"""Sums of costs stay below this, where floats still hold every integer."""


@dataclass(frozen=True, eq=False)
class Cost:
    """One linear cost column in integers (ns, bytes or MACs).

    cost(a) = fixed + sum over i of unary[i][a_i] + sum over (i, j) of pairwise[i, j][a_i, a_j]

    unary: for each variable, [choices]. pairwise: (i < j) -> [choices of i, choices of j]; may be negative.
    """

    fixed: int
    unary: tuple[NDArray[np.int64], ...]
    pairwise: Mapping[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def of(self, choice: Sequence[int]) -> int:
        """The cost of a choice, exactly."""
        unary = sum(int(u[a]) for u, a in zip(self.unary, choice, strict=True))
        return self.fixed + unary + sum(int(m[choice[i], choice[j]]) for (i, j), m in self.pairwise.items())


@dataclass(frozen=True, eq=False)
class Tie:
    """Choosing a for variable i requires choice `of[a]` for variable j, as a unit's widths require its groups'.

    of: [choices of i], integers.
    """

    i: int
    j: int
    of: NDArray[np.int64]


@dataclass(frozen=True)
class Apart:
    """Of the first variables, as many as `known` has, at least `least` choose otherwise than it; -1 there is no choice."""

    known: Choice
    least: int

    def holds(self, choice: Sequence[int]) -> bool:
        """Whether a choice differs in enough variables."""
        return sum(a != b for a, b in zip(self.known, choice, strict=False)) >= self.least


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one of `choices[i]` for each variable: least total loss, every budgeted cost within its budget.

    loss: for each variable, [choices], finite. correction: how their total becomes the predicted loss, which budgets and solutions
    are in, and which grows with it. costs: by column name (`latency`, `size`, `macs`). peaks: columns that are
    the largest of several costs (`memory`, of what is alive at each step).
    budgets: column name -> greatest integer allowed; `loss` -> greatest predicted loss. ties: choices that require others. implied:
    numbers of the variables without loss that ties from others decide, so that no two choices differ in them alone. apart:
    choices to differ from.
    Raises InvalidInput where these do not fit together.
    """

    variables: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    loss: tuple[NDArray[np.float64], ...]
    costs: Mapping[str, Cost]
    budgets: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    peaks: Mapping[str, tuple[Cost, ...]] = field(default_factory=dict)
    implied: frozenset[int] = frozenset()
    apart: tuple[Apart, ...] = ()
    correction: Correction = field(default_factory=Correction)

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not sizes or min(sizes) == 0:
            raise InvalidInput(
                f"every problem needs variables, each with a choice; choices are {self.choices}"
            )
        if len(self.variables) != len(sizes):
            raise InvalidInput(f"{len(self.variables)} variables but choices for {len(sizes)}")
        _check_unary("loss", self.loss, sizes, np.floating)
        for column, cost in self.costs.items():
            _check_cost(column, cost, sizes)
        for column, parts in self.peaks.items():
            if not parts or column in self.costs:
                raise InvalidInput(f"the peak {column} needs a cost at least, and a name that no cost has")
            for part in parts:
                _check_cost(column, part, sizes)
        unknown = sorted(set(self.budgets) - {LOSS, *self.columns})
        if unknown:
            raise InvalidInput(f"budgets on {unknown}, but the costs known are {sorted(self.columns)}")
        for tie in self.ties:
            _check_tie(tie, sizes)
        for other in self.apart:
            if not 1 <= other.least <= len(other.known) <= len(sizes):
                raise InvalidInput(f"{len(other.known)} of {len(sizes)} variables cannot differ in {other.least}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many choices each variable has."""
        return tuple(map(len, self.choices))

    def total_loss(self, choice: Sequence[int]) -> float:
        """Sum of the losses, correctly rounded (so that it does not depend on their order)."""
        return math.fsum(loss[a] for loss, a in zip(self.loss, choice, strict=True))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all costs and peaks."""
        return (*self.costs, *self.peaks)

    def parts(self, column: str) -> tuple[Cost, ...]:
        """The costs of which a column is the largest: of a linear one, itself."""
        return self.peaks[column] if column in self.peaks else (self.costs[column],)

    def cost(self, column: str, choice: Sequence[int]) -> int:
        """One cost of a choice, exactly."""
        return max(part.of(choice) for part in self.parts(column))

    def value(self, column: str, choice: Sequence[int]) -> float:
        """One cost or, of the column `loss`, the predicted loss of a choice."""
        return self.correction.loss(self.total_loss(choice)) if column == LOSS else self.cost(column, choice)

    def consistent(self, choice: Sequence[int]) -> bool:
        """Whether every tie holds."""
        return all(tie.of[choice[tie.i]] == choice[tie.j] for tie in self.ties)

    def feasible(self, choice: Sequence[int]) -> bool:
        """Whether every tie and every budget holds, costs in integers."""
        return (
            self.consistent(choice)
            and all(self.value(column, choice) <= limit for column, limit in self.budgets.items())
            and all(other.holds(choice) for other in self.apart)
        )

    def variants(self, choice: Sequence[int]) -> dict[str, str]:
        """Variable -> name of what was chosen."""
        return {v: c[a] for v, c, a in zip(self.variables, self.choices, choice, strict=True)}

    def solution(self, choice: Sequence[int], status: str, bound: float, gap: float) -> Solution:
        """A choice with its predicted loss and all of its costs, recomputed exactly."""
        costs = {column: self.cost(column, choice) for column in self.columns}
        return Solution(tuple(map(int, choice)), self.value(LOSS, choice), costs, status, gap, bound)


@dataclass(frozen=True)
class Solution:
    """A choice, its predicted loss and costs, and what is proven of it.

    status: `optimal`, or `time_limit` where the proof was cut short. bound: no allowed choice has less of what
    was minimised. gap: (value - bound) / max(|value|, |bound|), 0 when both are 0.
    """

    choice: Choice
    loss: float
    costs: dict[str, int]
    status: str
    gap: float
    bound: float

    def value(self, column: str) -> float:
        """One of the costs or, of the column `loss`, the loss."""
        return self.loss if column == LOSS else self.costs[column]


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / max(|value|, |bound|), finite and not negative."""
    scale = max(abs(value), abs(bound))
    return max(0.0, (value - bound) / scale) if scale else 0.0


def _check_unary(what: str, arrays: Sequence[NDArray[np.generic]], sizes: Sequence[int], kind: type) -> None:
    shapes = [a.shape for a in arrays]
    if shapes != [(n,) for n in sizes]:
        raise InvalidInput(
            f"{what}: expected one array for each variable, of lengths {list(sizes)}; got {shapes}"
        )
    for i, array in enumerate(arrays):
        if not np.issubdtype(array.dtype, kind) or not np.isfinite(array).all():
            raise InvalidInput(f"{what} of variable {i}: expected finite {kind.__name__}; got {array!r}")


def _check_cost(column: str, cost: Cost, sizes: Sequence[int]) -> None:
    _check_unary(column, cost.unary, sizes, np.signedinteger)
    n = len(sizes)
    for (i, j), matrix in cost.pairwise.items():
        if not 0 <= i < j < n:
            raise InvalidInput(f"{column}: pair {(i, j)} is not i < j among {n} variables")
        if matrix.shape != (sizes[i], sizes[j]) or not np.issubdtype(matrix.dtype, np.signedinteger):
            raise InvalidInput(
                f"{column}, pair {(i, j)}: expected integers of shape {(sizes[i], sizes[j])}; "
                f"got {matrix.dtype} {matrix.shape}"
            )
    arrays = [*cost.unary, *cost.pairwise.values()]
    total = abs(int(cost.fixed)) + sum(max(abs(int(a.min())), abs(int(a.max()))) for a in arrays)
    if total >= LARGEST:
        raise InvalidInput(f"{column}: costs sum to {total}, beyond 2**53; use a coarser unit")


def _check_tie(tie: Tie, sizes: Sequence[int]) -> None:
    n = len(sizes)
    if not (0 <= tie.i < n and 0 <= tie.j < n and tie.i != tie.j):
        raise InvalidInput(f"a tie of {tie.i} to {tie.j} is not between two of {n} variables")
    if tie.of.shape != (sizes[tie.i],) or not np.issubdtype(tie.of.dtype, np.signedinteger):
        raise InvalidInput(
            f"tie of {tie.i} to {tie.j}: expected {sizes[tie.i]} integers, one for each choice of {tie.i}; "
            f"got {tie.of.dtype} {tie.of.shape}"
        )
    absent = np.flatnonzero((tie.of < 0) | (tie.of >= sizes[tie.j]))
    if len(absent):
        raise InvalidInput(
            f"tie of {tie.i} to {tie.j}: choices {absent.tolist()} of {tie.i} require {tie.of[absent].tolist()}, "
            f"but {tie.j} has choices 0 to {sizes[tie.j] - 1}; leave such choices out"
        )

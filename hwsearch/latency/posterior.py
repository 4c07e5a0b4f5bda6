"""The posterior of many parameters under sparse equations, in time and memory linear in the parameters.

An equation of one unit's nodes holds a few parameters of its own (a cell, what its edges cost) and a few that all share (the
rest, pools); that of a whole build holds them all. With S what the first kind and the prior say of the own parameters, which is
block diagonal, and B what ties them to the shared ones and to the equations of whole builds, the covariance is

    C = S^-1 + E K^-1 E^T,   E = (-S^-1 B; I; 0),   K = K0 - B^T S^-1 B,

the inverse of a bordered matrix (Golub and Van Loan, Matrix Computations, 2.1.4): K has a row for each shared parameter and one for
each whole build, and no matrix of all parameters by all parameters is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.sparse import csr_array, diags_array, hstack, vstack
from scipy.sparse.csgraph import connected_components

Floats = NDArray[np.float64]
Numbers = NDArray[np.intp]
Sparse = Any
"""A csr_array."""

LARGEST = 1500
"""Parameters of a block; of a larger one those that touch most of the others are taken as shared."""
PROMOTED = 64
"""So many at a time."""
CHUNK = 1024
"""Rows that are multiplied at a time: memory of that size is used again, and stays near the processor."""


@dataclass(frozen=True)
class Prior:
    """What is known of each parameter before any build: mean and standard deviation."""

    mean: Floats
    deviation: Floats


class Blocks:
    """A symmetric matrix of `size` rows that is block diagonal up to their order; rows of no block are zero.

    parts: blocks of one size together: the rows of each [blocks, n], and their values [blocks, n, n].
    """

    def __init__(self, size: int, parts: Sequence[tuple[Numbers, Floats]]) -> None:
        self.size, self.parts = size, parts

    @staticmethod
    def of(matrix: Sparse, rows: Numbers, size: int) -> Blocks:
        """A sparse symmetric matrix of some rows of `size`."""
        count, label = connected_components(matrix, directed=False)
        sizes = np.bincount(label, minlength=count)
        order = np.argsort(label, kind="stable")
        place = np.empty(len(label), np.intp)
        place[order] = np.arange(len(label)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entries = matrix.tocoo()
        of_row, of_column = entries.coords
        of_entry = sizes[label[of_row]]
        parts = []
        for n in np.unique(sizes[sizes > 0]):
            own = np.flatnonzero(sizes == n)
            rank = np.empty(count, np.intp)
            rank[own] = np.arange(len(own))
            index = rows[order[sizes[label[order]] == n]].reshape(len(own), n)
            values = np.zeros((len(own), n, n))
            which = of_entry == n
            i, j = of_row[which], of_column[which]
            values[rank[label[i]], place[i], place[j]] = entries.data[which]
            parts.append((index, values))
        return Blocks(size, parts)

    def inverse(self, more: Floats | None = None) -> Blocks:
        """Of the matrix with `more` added to its diagonal."""
        parts: list[tuple[Numbers, Floats]] = []
        for index, values in self.parts:
            if more is not None:
                values = values + more[index][:, :, None] * np.eye(index.shape[1])
            parts.append((index, np.asarray(np.linalg.inv(values), np.float64)))
        return Blocks(self.size, parts)

    def whitening(self) -> Blocks:
        """Of a positive matrix the blocks W for which W^T W is its inverse."""
        parts = [(i, np.asarray(np.linalg.inv(np.linalg.cholesky(v)), np.float64)) for i, v in self.parts]
        return Blocks(self.size, parts)

    def labels(self) -> Numbers:
        """Of each row a number of its block; -1 where it is in none."""
        found, count = np.full(self.size, -1), 0
        for index, _ in self.parts:
            found[index] = count + np.arange(len(index))[:, None]
            count += len(index)
        return found

    def __matmul__(self, x: Any) -> Floats:
        """Times a dense or sparse matrix, or a vector."""
        flat = x[:, None] if x.ndim == 1 else x
        found = np.zeros((self.size, flat.shape[1]))
        for index, values in self.parts:
            step = max(CHUNK // index.shape[1], 1)
            for at in range(0, len(index), step):
                own = index[at : at + step]
                rows = flat[own.ravel()]
                rows = rows if isinstance(rows, np.ndarray) else rows.toarray()
                found[own] = values[at : at + step] @ rows.reshape(*own.shape, -1)
        return found[:, 0] if x.ndim == 1 else found

    @cached_property
    def sparse(self) -> Sparse:
        """The same as a sparse matrix."""
        sizes = np.zeros(self.size, np.intp)
        for index, _ in self.parts:
            sizes[index] = index.shape[1]
        begin = np.concatenate([[0], np.cumsum(sizes)])
        data, columns = np.empty(begin[-1]), np.empty(begin[-1], np.intp)
        for index, values in self.parts:
            where = begin[index][:, :, None] + np.arange(index.shape[1])
            data[where], columns[where] = values, index[:, None, :]
        return csr_array((data, columns, begin), shape=(self.size, self.size))

    def diagonal(self) -> Floats:
        found = np.zeros(self.size)
        for index, values in self.parts:
            found[index] = np.diagonal(values, axis1=1, axis2=2)
        return found


@dataclass(frozen=True)
class Normal:
    """Equations a . parameters = b of unit variance, summed up; a posterior is made of them and a prior.

    second: a^T a of all but the wide ones, which are `whole`. target: a^T b of all.
    """

    second: Sparse
    whole: Sparse
    target: Floats
    shared: NDArray[np.bool_]

    @staticmethod
    def of(a: Sparse, b: Floats, wide: NDArray[np.bool_], shared: NDArray[np.bool_]) -> Normal:
        """wide [equations]: those that hold (nearly) all parameters. shared [parameters]: those that (nearly) all equations hold.

        Any choice of both gives the same posterior; theirs decides what it costs.
        """
        narrow = a[np.flatnonzero(~wide)]
        second = csr_array(narrow.T @ narrow)
        return Normal(second, a[np.flatnonzero(wide)], a.T @ b, _with_hubs(second, shared))

    def with_equations(self, rows: Sparse, wide: NDArray[np.bool_]) -> Normal:
        """With more equations, of which only what they hold is known yet."""
        narrow = rows[np.flatnonzero(~wide)]
        whole = csr_array(vstack([self.whole, rows[np.flatnonzero(wide)]]))
        return Normal(csr_array(self.second + narrow.T @ narrow), whole, self.target, self.shared)


def _with_hubs(second: Sparse, shared: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The shared parameters, with those that hold a block together that is too large."""
    shared = shared.copy()
    while True:
        own = np.flatnonzero(~shared)
        inner = second[own][:, own]
        _, label = connected_components(inner, directed=False)
        large = np.bincount(label, minlength=1)[label] > LARGEST
        if not large.any():
            return shared
        degree = np.where(large, np.diff(inner.indptr), 0)
        shared[own[np.argsort(-degree, kind="stable")[:PROMOTED]]] = True


@dataclass(frozen=True)
class Covariance:
    """inner + outer core^-1 outer^T. core: [k, k], inverse: its inverse; outer [parameters, k]."""

    inner: Blocks
    outer: Floats
    core: Floats
    inverse: Floats

    @staticmethod
    def independent(variance: Floats) -> Covariance:
        """Of parameters that know nothing of each other."""
        parts = [(np.arange(len(variance))[:, None], variance[:, None, None])]
        return Covariance(
            Blocks(len(variance), parts), np.zeros((len(variance), 0)), np.zeros((0, 0)), np.zeros((0, 0))
        )

    def __matmul__(self, x: Floats) -> Floats:
        return np.asarray(self.inner @ x + self.outer @ (self.inverse @ (self.outer.T @ x)))

    def variances(self, rows: Sparse) -> Floats:
        """Of sums of parameters [rows, parameters]."""
        own = (rows @ self.inner.sparse).multiply(rows).sum(axis=1)
        return np.asarray(np.maximum(own + self._core(rows @ self.outer), 0.0))

    def deviations(self, places: Numbers | None = None) -> Floats:
        """Standard deviations of parameters; places: which, all where it is None."""
        places = np.arange(self.inner.size) if places is None else places
        parts = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
        core = np.concatenate([np.zeros(0), *(self._core(self.outer[own]) for own in parts)])
        return np.asarray(np.sqrt(np.maximum(self.inner.diagonal()[places] + core, 0.0)))

    def _core(self, beside: Floats) -> Floats:
        """x^T core^-1 x of each row."""
        return np.asarray(np.einsum("ij,ij->i", beside @ self.inverse, beside))

    def after(self, rows: Sparse, sign: float, of: Directions, gone: Numbers | None = None) -> Floats:
        """x^T C' x for some vectors x, where equations `rows` (none of them wide) are added (sign 1) or taken away (-1).

        gone: rows of the core, those of wide equations, that are taken away. By the matrix inversion lemma, block by block.
        """
        count = rows.shape[0]
        moved = csr_array(rows @ self.inner.sparse @ rows.T) * sign + diags_array(np.ones(count))
        whitening = Blocks.of(csr_array(moved), np.arange(count), count).whitening()
        beside, spread = whitening @ (rows @ self.outer), whitening @ of.beside
        core, outer = self.core + sign * (beside.T @ beside), of.outer - sign * (beside.T @ spread)
        if gone is not None:
            outer[gone] = 0.0
            _drop(core, gone)
        return np.asarray(of.inner - sign * (spread.T @ spread) + outer.T @ _solve(core, outer))


@dataclass(frozen=True)
class Directions:
    """Vectors x as `Covariance.after` takes them. inner: x^T inner x; beside: rows inner x; outer: outer^T x."""

    inner: Floats
    beside: Floats
    outer: Floats


class Posterior:
    """mean, covariance: of the parameters. shared: the parameters of the first rows of the covariance's core; the others are of
    the wide equations, in their order. target: what the covariance makes the mean of."""

    def __init__(self, normal: Normal, prior: Prior) -> None:
        weight = prior.deviation**-2.0
        count, own = len(weight), np.flatnonzero(~normal.shared)
        hubs, m = np.flatnonzero(normal.shared), normal.whole.shape[0]
        k = len(hubs)
        second, whole = normal.second, normal.whole
        border = csr_array(hstack([second[:, hubs], whole.T]))
        inner = Blocks.of(second[own][:, own], own, count).inverse(weight)
        outer = inner @ border
        core = np.zeros((k + m, k + m))
        core[:k, :k] = second[hubs][:, hubs].toarray() + np.diag(weight[hubs])
        core[k:, :k] = whole[:, hubs].toarray()
        core[:k, k:] = core[k:, :k].T
        core[k:, k:] = -np.eye(m)
        core -= border.T @ outer
        outer *= -1.0
        outer[hubs] = 0.0
        outer[hubs, np.arange(k)] = 1.0
        core = (core + core.T) / 2.0
        self.shared = hubs
        self.covariance = Covariance(inner, outer, core, _solve(core, np.eye(k + m)))
        self.target = normal.target + weight * prior.mean
        self.mean = self.covariance @ self.target

    def non_negative(self, physical: NDArray[np.bool_]) -> tuple[Floats, Numbers]:
        """(the mean with some parameters at zero or above, those that are held there), by block principal pivoting.

        Portugal et al., 1994.
        """
        mean, holding = self.mean, _Holding(self)
        for _ in range(50):
            below = physical & (mean < 0)
            below[holding.held] = False
            freed = holding.held[holding.force < 0]
            if not below.any() and not len(freed):
                break
            mean = holding.mean(np.union1d(np.setdiff1d(holding.held, freed), np.flatnonzero(below)))
        return np.where(physical, np.maximum(mean, 0.0), mean), holding.held


class _Holding:
    """The mean of a posterior where some parameters are held at zero, and the force that each of them takes for that.

    They are left out of the bordered matrix: with I the rows and columns of theirs of the covariance's inner part and O the rows of
    its outer part, the core grows by O^T I^-1 O. What a block adds is taken over from set to set.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.covariance, self.shared = posterior.covariance, posterior.shared
        count = len(posterior.mean)
        self.held, self.force = np.zeros(0, np.intp), np.zeros(0)
        self._block = self.covariance.inner.labels()
        self._core = self.covariance.core.copy()
        self._inner = self.covariance.inner @ posterior.target
        self._goal = self.covariance.outer.T @ posterior.target
        self._in_core = np.full(count, -1)
        self._in_core[self.shared] = np.arange(len(self.shared))
        self._inverse: Sparse = csr_array((count, count))

    def mean(self, held: Numbers) -> Floats:
        """That of all parameters."""
        covariance, own = self.covariance, self._in_core < 0
        changed = np.zeros(len(own) + 1, bool)
        changed[self._block[np.setxor1d(held, self.held)]] = True
        for sign, some in ((-1.0, self.held), (1.0, held)):
            self._take(some[changed[self._block[some]] & own[some]], sign)
        fixed = self._in_core[held[~own[held]]]
        goal, core = self._goal.copy(), self._core.copy()
        goal[fixed] = 0.0
        _drop(core, fixed)
        shared = _solve(core, goal)
        mean = self._inner + covariance.outer @ shared
        force = -(self._inverse @ mean)
        mean += covariance.inner @ force
        force[self.shared[fixed]] = (self._core @ shared - self._goal)[fixed]
        mean[held] = 0.0
        self.held, self.force = held, force[held]
        return mean

    def _take(self, some: Numbers, sign: float) -> None:
        """Count what the held parameters of some blocks add, or (-1) no longer."""
        if not len(some):
            return
        inner, outer = self.covariance.inner.sparse, self.covariance.outer[some]
        blocks = Blocks.of(inner[some][:, some], np.arange(len(some)), len(some))
        inverse, white = blocks.inverse(), blocks.whitening() @ outer
        self._core += sign * (white.T @ white)
        self._goal -= sign * (outer.T @ (inverse @ self._inner[some]))
        entries = inverse.sparse.tocoo()
        row, column = some[entries.coords[0]], some[entries.coords[1]]
        self._inverse = csr_array(self._inverse + csr_array((sign * entries.data, (row, column)), shape=inner.shape))


def _drop(core: Floats, gone: Numbers) -> None:
    """Leave some rows and columns out."""
    core[gone], core[:, gone] = 0.0, 0.0
    core[gone, gone] = 1.0


def _solve(core: Floats, right: Floats) -> Floats:
    """core^-1 right, of a core whose rows are of different scales."""
    scale = np.abs(np.diag(core)) ** -0.5
    return np.asarray((scale * solve(core * np.outer(scale, scale), (scale * right.T).T).T).T)

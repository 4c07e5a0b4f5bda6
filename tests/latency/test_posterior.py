"""The bordered posterior is that of the dense normal equations, whatever is taken as wide or as shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from hwsearch.latency import posterior as posterior_module
from hwsearch.latency.posterior import Covariance, Directions, Normal, Posterior, Prior


@dataclass
class Case:
    a: Any
    b: Any
    prior: Prior
    wide: Any
    shared: Any

    @property
    def precision(self) -> Any:
        return self.a.T @ self.a + np.diag(self.prior.deviation**-2.0)

    @property
    def target(self) -> Any:
        return self.a.T @ self.b + self.prior.mean * self.prior.deviation**-2.0

    def solved(self) -> Posterior:
        return Posterior(Normal.of(csr_array(self.a), self.b, self.wide, self.shared), self.prior)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sparse equations of parameters of very different scales."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 16))
    scale = 10.0 ** rng.uniform(-2, 2, columns)
    a = np.where(rng.random((rows, columns)) < 0.2, rng.uniform(0.5, 2.0, (rows, columns)), 0.0)
    wide = rng.random(rows) < 0.2
    a[wide] = rng.uniform(0.5, 2.0, (wide.sum(), columns))
    b = a @ rng.normal(0.3, 1.0, columns) + 0.1 * rng.standard_normal(rows)
    prior = Prior(scale * rng.normal(0.0, 1.0, columns), scale * rng.uniform(0.5, 3.0, columns))
    return Case(a / scale, b, prior, wide, rng.random(columns) < 0.2)


@given(cases())
def test_mean_and_covariance_are_those_of_the_dense_equations(case: Case) -> None:
    found, covariance = case.solved(), np.linalg.inv(case.precision)
    scale = case.prior.deviation
    assert found.mean / scale == pytest.approx(covariance @ case.target / scale, rel=1e-6, abs=1e-8)
    whole = found.covariance @ np.eye(len(scale))
    assert whole / np.outer(scale, scale) == pytest.approx(covariance / np.outer(scale, scale), rel=1e-6, abs=1e-8)
    assert found.covariance.deviations() == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-6)
    assert found.covariance.variances(csr_array(case.a)) == pytest.approx(
        np.einsum("ij,jk,ik->i", case.a, covariance, case.a), rel=1e-6, abs=1e-12
    )


@given(cases(), st.integers(0, 2**32 - 1))
def test_a_mean_held_at_zero_meets_the_conditions_of_optimality(case: Case, seed: int) -> None:
    physical = np.random.default_rng(seed).random(len(case.shared)) < 0.7
    scale = case.prior.deviation
    mean, held = case.solved().non_negative(physical)
    slack = (case.precision @ mean - case.target) * scale
    assert (mean[physical] >= 0).all()
    assert set(held) <= set(np.flatnonzero(physical))
    free = np.setdiff1d(np.arange(len(mean)), held)
    size = 1.0 + np.abs(case.target * scale).max()
    assert np.abs(slack[free]).max(initial=0.0) < 1e-6 * size
    assert (slack[held] >= -1e-6 * size).all()


@given(cases(), st.integers(0, 2**32 - 1))
def test_equations_are_added_and_taken_away(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, x = case.solved(), rng.standard_normal((2, len(case.shared))) / case.prior.deviation
    own = rng.random(len(case.b)) < 0.3
    narrow, gone = np.flatnonzero(own & ~case.wide), np.flatnonzero(own & case.wide)
    covariance: Covariance = found.covariance
    rows = csr_array(case.a[narrow])
    inner = covariance.inner @ x.T
    of = Directions(x @ inner, rows @ inner, covariance.outer.T @ x.T)
    more = case.precision + case.a[narrow].T @ case.a[narrow]
    assert covariance.after(rows, 1.0, of) == pytest.approx(x @ np.linalg.inv(more) @ x.T, rel=1e-6, abs=1e-8)
    less = case.precision - case.a[own].T @ case.a[own]
    in_core = len(found.shared) + (np.cumsum(case.wide) - 1)[gone]
    assert covariance.after(rows, -1.0, of, in_core) == pytest.approx(x @ np.linalg.inv(less) @ x.T, rel=1e-5, abs=1e-6)


@given(cases())
def test_a_block_that_is_too_large_is_cut_by_sharing_what_holds_it_together(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior_module, "LARGEST", 3)
        patch.setattr(posterior_module, "PROMOTED", 1)
        found = case.solved()
    assert all(index.shape[1] <= 3 for index, _ in found.covariance.inner.parts)
    scale = case.prior.deviation
    assert found.mean / scale == pytest.approx(np.linalg.solve(case.precision, case.target) / scale, rel=1e-6, abs=1e-8)

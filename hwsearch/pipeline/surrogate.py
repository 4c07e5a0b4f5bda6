"""The one module that uses scikit-optimize: its Gaussian process over the few samples of a search."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from hwsearch.errors import BackendUnavailable

Floats = NDArray[np.float64]
LEAST_NOISE = 1e-6
"""Variance of every value: two samples at one place may differ by rounding."""


def require() -> None:
    """Raises BackendUnavailable where scikit-optimize is not installed."""
    try:
        import skopt  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"a search over the numbers of a scheme takes scikit-optimize, which is not installed here ({error}); install it with: "
            "pip install 'hwsearch[bayes]'"
        ) from error


class Surrogate:
    """A Gaussian process with a Matern kernel (5/2), fitted to values of order 1 whose noise is known.

    Far from all samples its mean is 0: a prior mean is for who calls it.

    Args:
        x: Places, [samples, knobs], from 0 to 1.
        y: Values.
        variance: Of their noise.
        seed: Of the restarts of its fit.
    """

    def __init__(self, x: Floats, y: Floats, variance: Floats, seed: int = 0) -> None:
        require()
        from skopt.learning import GaussianProcessRegressor
        from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern

        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(0.3, (0.05, 2.0), nu=2.5)
        self._model = GaussianProcessRegressor(
            kernel=kernel, alpha=variance + LEAST_NOISE, n_restarts_optimizer=1, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a kernel at an end of its range: with so few samples it often is
            self._model.fit(x, y)

    def __call__(self, x: Floats) -> tuple[Floats, Floats]:
        """(mean, standard deviation) at some places."""
        mean, deviation = self._model.predict(x, return_std=True)
        return np.asarray(mean, np.float64), np.asarray(deviation, np.float64)

from __future__ import annotations

import numpy as np
import pytest

from hwsearch.latency.uncertainty import Spread, rescaled, scale_of, surprise


@pytest.mark.parametrize("degrees", [4, 200])
def test_the_scale_has_two_thirds_inside_one_sigma_and_nearly_all_inside_two(degrees: int) -> None:
    z = np.abs(np.random.default_rng(0).standard_t(degrees, 20_000))
    scale = scale_of(z)
    assert 0.60 <= np.mean(z <= scale) <= 0.75
    assert 0.90 <= np.mean(z <= 2 * scale) <= 0.98


def test_few_held_out_builds_move_sigma_a_little_and_many_decide() -> None:
    plain = Spread(2.0, 0.04)
    rng = np.random.default_rng(1)
    few, many = (rescaled(plain, 0.25 * rng.standard_normal(n)) for n in (3, 500))
    assert 0.2 * plain.inflate < many.inflate < 0.3 * plain.inflate
    assert many.inflate < few.inflate < plain.inflate
    assert rescaled(plain, 1e-9 * rng.standard_normal(50)).floor >= 0.01


def test_a_prior_that_admits_of_everything_is_not_the_best() -> None:
    measured = np.full(50, 100.0)
    guess = measured * (1 + 0.02 * np.random.default_rng(2).standard_normal(50))
    noise = np.full(50, 0.2)
    honest, vague, blind = (surprise(guess, np.full(50, s**2), measured, noise) for s in (1.0, 30.0, 0.0))
    assert honest < vague
    off = surprise(guess + 20.0, np.full(50, 1.0), measured, noise)
    assert off > surprise(guess + 20.0, np.full(50, 20.0**2), measured, noise)
    assert np.isfinite(blind)

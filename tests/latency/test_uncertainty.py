from __future__ import annotations

import numpy as np
import pytest

from hwsearch.latency.uncertainty import ErrorScale, rescaled, scale_of


@pytest.mark.parametrize("degrees", [4, 200])
def test_the_scale_has_two_thirds_inside_one_sigma_and_nearly_all_inside_two(degrees: int) -> None:
    z = np.abs(np.random.default_rng(0).standard_t(degrees, 20_000))
    scale = scale_of(z)
    assert 0.60 <= np.mean(z <= scale) <= 0.75
    assert 0.90 <= np.mean(z <= 2 * scale) <= 0.98


def test_few_held_out_builds_move_sigma_a_little_and_many_decide() -> None:
    plain = ErrorScale(2.0, 0.04)
    rng = np.random.default_rng(1)
    few, many = (rescaled(plain, 0.25 * rng.standard_normal(n)) for n in (3, 500))
    assert 0.2 * plain.inflate < many.inflate < 0.3 * plain.inflate
    assert many.inflate < few.inflate < plain.inflate
    assert rescaled(plain, 1e-9 * rng.standard_normal(50)).floor >= 0.01

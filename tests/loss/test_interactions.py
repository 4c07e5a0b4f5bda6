"""What is learnt from stitched networks whose law is known, and the networks themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import grouped, scores

from hwsearch.loss.interactions import Agreement, Correction, Fitted, fitted, learn
from hwsearch.loss.stitched import ROUND, SPAN, TOP, stitched
from hwsearch.network.variants import Variant

NAMES = 12
Vector = np.ndarray[Any, np.dtype[np.float64]]


def networks(rng: np.random.Generator, count: int) -> Vector:
    """Losses of what each of so many networks changes, over three decades."""
    losses: Vector = 10.0 ** rng.uniform(-4.0, -1.0, (count, NAMES)) * (rng.random((count, NAMES)) < 0.7)
    losses[losses.sum(1) == 0, 0] = 0.01
    return losses


def away(law: Fitted, losses: Vector, truth: Vector) -> float:
    """Root mean square of the logarithm of predicted / true."""
    return float(np.sqrt(np.square(np.log(law.predict(losses) / truth)).mean()))


@pytest.mark.parametrize("exponent", [0.8, 1.3])
def test_a_law_is_recovered_from_networks_that_follow_it(exponent: float) -> None:
    """Coefficients (as ratios to their mean: the rest is the factor) and exponent; and fresh networks are predicted."""
    rng = np.random.default_rng(3)
    true = Fitted(rng.normal(0.0, 0.7, NAMES), 1.5, exponent)
    losses = networks(rng, 48)
    simulated = true.predict(losses) * np.exp(rng.normal(0.0, 0.02, 48))
    law, unseen = learn(losses, simulated)
    fresh = networks(rng, 200)
    assert law.exponent == pytest.approx(true.exponent, rel=0.05)
    assert np.corrcoef(law.logs, true.logs)[0, 1] > 0.95
    assert away(law, fresh, true.predict(fresh)) < 0.1
    assert away(law, fresh, true.predict(fresh)) < 0.2 * away(Fitted(np.zeros(NAMES)), fresh, true.predict(fresh))
    assert np.sqrt(np.square(np.log(unseen / simulated)).mean()) < 0.2, "predicted by laws that have not seen them"


def test_where_the_sum_is_right_it_stays() -> None:
    rng = np.random.default_rng(0)
    losses = networks(rng, 48)
    law, unseen = learn(losses, losses.sum(1))
    assert law.logs.tolist() == [0.0] * NAMES
    assert (law.factor, law.exponent) == (1.0, 1.0)
    assert unseen == pytest.approx(losses.sum(1))


@pytest.mark.parametrize("seed", range(6))
def test_where_the_sum_is_right_but_for_noise_nothing_is_made_much_worse(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses, fresh = networks(rng, 48), networks(rng, 200)
    law, _ = learn(losses, losses.sum(1) * np.exp(rng.normal(0.0, 0.2, 48)))
    assert away(law, fresh, fresh.sum(1)) < 0.1, "half of the noise of one network"


def test_coefficients_stay_near_one_where_little_is_known() -> None:
    """Of more columns than networks: shrunk, above 0, and finite."""
    rng = np.random.default_rng(1)
    losses = 10.0 ** rng.uniform(-4, -1, (14, 80))
    law = fitted(losses, losses.sum(1) * np.exp(rng.normal(0, 0.3, 14)), 0.3)
    assert np.isfinite(law.logs).all()
    assert np.abs(law.logs).max() < 1.0
    assert np.sqrt(np.square(law.logs).mean()) < 0.3
    assert away(fitted(losses, losses.sum(1), None), losses, losses.sum(1)) == pytest.approx(0.0)


@settings(deadline=None)
@given(
    st.floats(0.1, 10.0), st.floats(0.5, 4.0), st.just(0.0) | st.floats(1e-9, 100.0),
    st.lists(st.floats(0.0, 10.0), min_size=2, max_size=2),
)  # fmt: skip
def test_a_bound_on_the_loss_is_one_on_the_total(
    factor: float, exponent: float, loss: float, totals: list[float]
) -> None:
    own = Correction(factor=factor, exponent=exponent)
    bound = own.total(loss)
    assert own.loss(bound) <= loss
    assert own.loss(bound * (1 + 1e-9)) >= loss * (1 - 1e-9)
    low, high = sorted(totals)
    assert own.loss(low) <= own.loss(high)


def test_without_anything_learnt_the_loss_is_the_sum() -> None:
    own = Correction()
    assert own.plain
    assert [own.of_unit("a", x) for x in (0.0, 0.1, 3.0)] == [0.0, 0.1, 3.0]
    assert [own.of_group("a", x) for x in (0.0, 0.1, 3.0)] == [0.0, 0.1, 3.0]
    assert (own.loss(-1e-20), own.loss(0.3), own.total(0.3)) == (-1e-20, 0.3, 0.3)


def test_a_table_predicts_by_its_correction() -> None:
    network = grouped()
    own = Correction({"conv3": 2.0}, {"conv1": 3.0}, 1.5, 1.2)
    table = replace(scores(network, {"conv0": [24, 8], "conv1": [40, 16]}), correction=own)
    a, b = table["conv3", "dense.int8"], table.of_width("conv1", 16)
    variants = {"conv3": Variant("int8"), "conv0": Variant("fp32")}
    assert table.total(variants, {"conv0": 24, "conv1": 16}) == pytest.approx(1.5 * (2 * a + 3 * b) ** 1.2)
    assert table.total({}, {}) == 0.0
    assert table.most() >= table.total(dict.fromkeys(network.by_name, Variant("int8")), {"conv0": 8, "conv1": 16})


def test_how_well_predictions_agree() -> None:
    found = Agreement.of([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 3.5, 4.1])
    assert found is not None
    assert (found.within, found.networks) == (0.75, 4)
    assert found.ratio == pytest.approx((3 / 3.5 + 4 / 4.1) / 2)
    assert found.tau == pytest.approx(0.9129, abs=1e-3)
    assert Agreement.of([1.0, 2.0], [1.0, 2.0]) is None
    assert "75% within a factor of 1.5" in str(found)


def drawn(count: int = 4 * ROUND, seed: int = 0) -> tuple[list[Any], Vector]:
    """(stitched networks, their sums of losses)."""
    table = scores(grouped((24, 40, 16, 32, 48)), {f"conv{i}": [24, 16, 12, 8, 4] for i in range(5)})
    loss = {u: {v: 0.05 * x**6 for v, x in own.items()} for u, own in table.loss.items()}
    widths = {g: {w: 0.05 * x**6 for w, x in own.items()} for g, own in table.width_loss.items()}
    found = stitched(loss, widths, count, seed)
    return found, np.array([sum(loss[u][str(v)] for u, v in a.items()) + sum(widths[g][w] for g, w in b.items()) for a, b in found])


def test_stitched_networks_are_spread_over_two_decades_in_every_round() -> None:
    found, sums = drawn()
    for begin in range(0, len(found), ROUND):
        own = np.sort(sums[begin : begin + ROUND])
        assert own[-1] <= 2 * TOP
        assert own[-1] / own[0] > SPAN / 10
        assert np.unique(own).size > ROUND / 2
    variants, widths = found[0]
    assert all(isinstance(v, Variant) for v in variants.values())
    assert set(widths) == {f"conv{i}" for i in range(5)}


def test_the_first_rounds_are_those_of_fewer_networks() -> None:
    assert drawn(2 * ROUND)[0] == drawn()[0][: 2 * ROUND]
    assert drawn(seed=1)[0] != drawn()[0]


def test_nothing_is_stitched_where_nothing_loses_anything() -> None:
    assert stitched({"a": {"dense.fp32": 0.0}}, {}, 12, 0) == []
    assert stitched({"a": {"dense.fp32": 0.0, "dense.int8": 0.0}}, {}, 12, 0) == []
    assert stitched({"a": {"dense.fp32": 0.0, "dense.int8": math.inf}}, {}, 12, 0) == []

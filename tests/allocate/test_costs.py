"""Costs against bounds."""

from __future__ import annotations

import pytest

from hwsearch.allocate.budget import UNITS, Budget
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.errors import InvalidInput


def test_every_budget_has_its_cost() -> None:
    assert set(Costs(*range(len(UNITS))).known()) == set(UNITS)


def test_a_bound_holds_only_if_no_known_cost_is_over_it() -> None:
    costs = Costs(latency=100.0, size=10, macs=7)
    assert costs.within(Costs())
    assert costs.within(Costs(latency=99.5, size=10))  # a nanosecond of slack
    assert not costs.within(Costs(latency=98.9))
    assert not costs.within(Costs(size=9.99))
    assert costs.excess(Costs(latency=80.0, size=20)) == pytest.approx(0.25)
    assert costs.excess(Costs(latency=200.0)) == pytest.approx(-0.5)
    assert Costs().excess(Costs()) == 0.0


def test_what_is_not_known_is_not_taken_to_be_met() -> None:
    with pytest.raises(InvalidInput, match="energy is not known"):
        Costs(latency=1.0).within(Costs(energy=3.0))


def test_relative_budgets_are_of_the_dense_network() -> None:
    dense = Costs(latency=1000.0, size=501.0)
    found = bounds([Budget.parse("latency=25%"), Budget.parse("size=2x")], dense)
    assert found == Costs(latency=250, size=250)


def test_a_budget_on_the_loss_bounds_no_cost() -> None:
    assert bounds([Budget.parse("loss=0.01"), Budget.parse("size=400B")], Costs(size=1000)) == Costs(size=400)

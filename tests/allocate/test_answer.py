"""An allocation says what it costs."""

from __future__ import annotations

import pytest
from three_groups import NETWORK, SCORES, chosen, memory, model, narrow, table

from hwsearch.allocate.search import search
from hwsearch.network.variants import network_bytes


@pytest.mark.parametrize("budget", ["latency=60%", "size=20%", "macs=2x", "macs=20%"])
def test_predicted_costs_are_those_of_the_narrow_network(budget: str) -> None:
    found = search(table(), SCORES, [budget], model=model())
    of = chosen(found)
    prediction = model().predict(of.variants, of.widths)
    assert found.predicted["latency_ns"] == prediction.time_ns
    assert found.predicted["sigma_ns"] == prediction.sigma_ns
    assert found.predicted["macs"] == narrow(of).macs
    assert (
        found.predicted["size_bytes"] == network_bytes(narrow(of), of.variants) + table().header.graph_bytes
    )
    for what in found.budgets:
        column = {"latency": "latency_ns", "size": "size_bytes", "macs": "macs"}[what["column"]]
        assert found.predicted[column] <= what["limit"]
    assert found.narrow
    assert {g: len(s) for g, s in found.slots.items()} == NETWORK.channels


def test_memory_is_told_where_it_is_not_bounded() -> None:
    found = search(table(), SCORES, ["macs=50%"], model=model())
    assert found.predicted["memory_bytes"] == memory(chosen(found))

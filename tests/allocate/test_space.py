"""What may be chosen, and what each choice costs."""

from __future__ import annotations

from itertools import product

import pytest
from simulation import grouped, scores, simulated_table
from three_groups import LAW, NETWORK, SCORES, model, narrow, table

from hwsearch.allocate.search import search
from hwsearch.allocate.space import make_space
from hwsearch.errors import IncompatibleTables, Infeasible, InvalidInput
from hwsearch.network.choices import Candidate


def test_every_choice_costs_what_the_model_says_within_rounding() -> None:
    space = make_space(table(), SCORES, model())
    count = 0
    for choice in product(*map(range, space.problem.sizes)):
        if count < 40 and space.problem.consistent(choice):
            count += 1
            of = Candidate(space.variants(choice), space.widths(choice))
            assert space.problem.cost("latency", choice) == pytest.approx(space.predict(choice).time_ns, abs=20)
            assert space.problem.cost("macs", choice) == narrow(of).macs
    assert count == 40


def test_channels_that_are_kept_all_stay() -> None:
    free = search(table(), SCORES, ["macs=80%"], model=model())
    assert (free.widths["conv0"], free.widths["conv1"]) != (24, 40)
    for pattern in ("conv1", "*1"):  # it reads the group of conv0 and puts out its own
        kept = search(table(), SCORES, ["macs=88%"], model=model(), keep=[pattern])
        assert kept.widths == {"conv0": 24, "conv1": 40, "conv2": 8}
        with pytest.raises(Infeasible):
            search(table(), SCORES, ["macs=80%"], model=model(), keep=[pattern])
    with pytest.raises(Infeasible):
        search(table(), SCORES, ["macs=99%"], model=model(), keep=["*"])


def test_a_pattern_that_names_no_layer_is_an_error() -> None:
    with pytest.raises(InvalidInput, match=r"no layer is named like 'fc\*'; layers are conv0"):
        search(table(), SCORES, ["latency=50%"], model=model(), keep=["fc*"])


def test_axes_limit_what_is_chosen() -> None:
    budget = ["latency=85%"]
    precision = search(table(), SCORES, budget, model=model(), axes=["precision"])
    assert precision.widths == NETWORK.channels
    assert not precision.narrow
    assert not precision.order
    assert set(precision.variants.values()) == {"dense.fp32", "dense.int8"}
    width = search(table(), SCORES, budget, model=model(), axes=["width"])
    assert set(width.variants.values()) == {"dense.fp32"}
    assert width.narrow
    both = search(table(), SCORES, budget, model=model())
    assert both.predicted["loss"] <= min(precision.predicted["loss"], width.predicted["loss"])
    with pytest.raises(InvalidInput, match="unknown axes depth"):
        search(table(), SCORES, budget, axes=["depth"])


def test_widths_whose_loss_is_unknown_are_not_offered() -> None:
    bare = scores(NETWORK, {})
    assert search(table(), bare, ["latency=90%"], model=model()).widths == NETWORK.channels


def test_a_table_without_widths_offers_the_whole_ones() -> None:
    plain = simulated_table(NETWORK, LAW, design=8)
    found = search(plain, SCORES, ["latency=90%"])
    assert found.widths == NETWORK.channels
    with pytest.raises(IncompatibleTables, match="network"):
        search(plain, scores(grouped((24, 40, 8)), {}), ["latency=90%"])

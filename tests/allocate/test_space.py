"""What may be chosen, and what each choice costs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from simulation import grouped, scores, simulated_table
from three_groups import LAW, NETWORK, SCORES, everything, model, narrow, table

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.search import search
from hwsearch.allocate.space import make_space
from hwsearch.errors import IncompatibleTables, Infeasible, InvalidInput
from hwsearch.network.choices import Candidate
from hwsearch.network.variants import network_bytes


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


def test_rules_say_what_units_may_become() -> None:
    """The least loss of all networks that keep them; the dense network is no answer where a rule excludes it."""
    budget = ["latency=95%", "size=60%"]
    at = model()

    def losses(allowed: Callable[[dict[str, str], dict[str, int]], bool]) -> float:
        limit = 0.95 * table().dense_ns
        return min(
            SCORES.total(c.variants, c.widths)
            for c in everything()
            if allowed({u: str(v) for u, v in c.variants.items()}, c.widths)
            and network_bytes(narrow(c), c.variants) + 500 <= int(0.6 * table().header.dense_file_bytes)
            and at.predict(c.variants, c.widths).time_ns <= limit
        )

    def found(**offer: Any) -> Allocation:
        return search(table(), SCORES, budget, kappa=0.0, model=at, **offer)

    for pattern in ("conv[12]:int8", "conv[12]:dense.int8", "conv[12]:i*,dense.int8"):
        answer = found(forbid=[pattern])
        assert {answer.variants["conv1"], answer.variants["conv2"]} == {"dense.fp32"}
        assert answer.predicted["loss"] == pytest.approx(losses(lambda v, _: v["conv1"] == v["conv2"] == "dense.fp32"), rel=1e-9)
    answer = found(only=["conv0:int8"], forbid=["conv3:int8"])
    assert (answer.variants["conv0"], answer.variants["conv3"]) == ("dense.int8", "dense.fp32")
    assert answer.predicted["loss"] == pytest.approx(
        losses(lambda v, _: v["conv0"] == "dense.int8" and v["conv3"] == "dense.fp32"), rel=1e-9
    )
    pinned = found(keep=["conv2=dense.int8"])
    assert (pinned.variants["conv2"], pinned.widths["conv1"], pinned.widths["conv2"]) == ("dense.int8", 40, 16)
    assert search(table(), SCORES, ["size=100%"], model=at).variants["conv0"] == "dense.fp32"
    assert search(table(), SCORES, ["size=100%"], model=at, only=["conv0:int8"]).variants["conv0"] == "dense.int8"


@pytest.mark.parametrize(
    ("offer", "said"),
    [
        ({"forbid": ["fc*:int8"]}, r"no layer is named like 'fc\*'; layers are conv0"),
        ({"only": ["conv0:fp8"]}, "only 'conv0:fp8': conv0 is offered nothing named like 'fp8'; it is offered dense.fp32, dense.i"),
        ({"keep": ["conv0=bf16"]}, "offered nothing named like 'bf16'"),
        ({"forbid": ["conv0"]}, r"malformed; expected UNITS:VARIANTS, for instance 'features.\*:dense.fp32'"),
        ({"forbid": ["conv0:*"]}, "nothing is left for unit conv0 to become: 'conv0:.*' rule out all of dense.fp32, dense.int8"),
        ({"only": ["*:fp32"], "forbid": ["conv1:fp32"]}, "nothing is left for unit conv1"),
    ],
)
def test_rules_that_name_nothing_or_leave_nothing_are_errors(offer: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        search(table(), SCORES, ["latency=90%"], model=model(), **offer)


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

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.allocate.budget import Budget, attainable, parse_budgets, quantity
from hwsearch.errors import InvalidInput

DENSE = 10_000_000.0


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("latency=4ms", 4_000_000),
        ("latency=250us", 250_000),
        ("latency=250µs", 250_000),
        ("latency=0.1s", 100_000_000),
        ("latency=1500ns", 1500),
        ("latency=1.9ns", 1),
        ("latency=40%", 4_000_000),
        ("latency=2.5x", 4_000_000),
        ("latency=3x", 3_333_333),
        ("latency=33.3%", 3_330_000),
        ("size=800KB", 800_000),
        ("size=2MB", 2_000_000),
        ("size=1.5GB", 1_500_000_000),
        ("size=1KiB", 1024),
        ("size=1.5MiB", 1_572_864),
        ("size=2GiB", 2**31),
        ("size=123456B", 123_456),
        ("size=25%", 2_500_000),
        ("size=4x", 2_500_000),
        ("size=100KB", 100_000),
        ("macs=300MMAC", 300_000_000),
        ("macs=50%", 5_000_000),
        ("memory=800KB", 800_000),
        ("memory=50%", 5_000_000),
        ("memory=2x", 5_000_000),
        ("energy=5mJ", 5_000_000),
        ("energy=1.5J", 1_500_000_000),
        ("energy=40%", 4_000_000),
        (" latency = 4 MS ", 4_000_000),
        ("size=2000kb", 2_000_000),
    ],
)
def test_what_a_budget_means(text: str, limit: int) -> None:
    budget = Budget.parse(text)
    assert budget.resolve(DENSE) == limit
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency=4", "no unit; expected ns, us, ms, s, % or x"),
        ("latency=", "malformed; expected a number and a unit: latency=4ms"),
        ("latency=ms", "malformed"),
        ("latency", "malformed"),
        ("latency=-4ms", "malformed"),
        ("latency=nanms", "malformed"),
        ("latency=nan%", "malformed"),
        ("latency=inf", "malformed"),
        ("latency=4ms5", "malformed"),
        ("latency=4,5ms", "malformed"),
        ("latency=0ms", "out of range"),
        ("latency=0%", "out of range"),
        ("latency=0x", "out of range"),
        ("latency=0.4ns", "at least 1 ns"),
        ("latency=1" + "0" * 30 + "s", "out of range"),
        ("latency=1" + "0" * 30 + "%", "out of range"),
        ("latency=1e3ms", "malformed"),
        ("latency=2MB", "unit 'MB'; expected ns, us, ms, s"),
        ("size=4ms", "unit 'ms'; expected B, KB"),
        ("size=4mb/s", "malformed"),
        (
            "power=4W",
            "bounds none of latency, latency_p90, latency_p95, latency_p99, size, memory, energy, macs",
        ),
        ("4ms", "bounds none of"),
        ("", "bounds none of"),
    ],
)
def test_malformed_budgets_are_refused_with_an_example(text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Budget.parse(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)
    assert "=4ms" in str(caught.value) or "=800KB" in str(caught.value)


@pytest.mark.parametrize("text", ["loss=0.01", "loss=1e-3", " loss = .5", "loss=2"])
def test_a_budget_on_loss_is_absolute(text: str) -> None:
    budget = Budget.parse(text)
    assert budget.resolve(DENSE) == budget.value == float(text.partition("=")[2])
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss=1%", "is a share, which a loss has not"),
        ("loss=2x", "is a share"),
        ("loss=4ms", "a number without a unit: loss=0.01"),
        ("loss=nan", "malformed"),
        ("loss=0", "expected above 0"),
        ("loss=-1", "malformed"),
    ],
)
def test_a_budget_on_loss_is_nothing_else(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        Budget.parse(text)
    with pytest.raises(InvalidInput, match="no share"):
        Budget("loss", "fraction", 0.5)


@given(st.floats(1e-12, 1e3))
def test_the_least_loss_told_can_be_asked_for(loss: float) -> None:
    told = Budget.parse(f"loss={attainable('loss', loss)}").value
    assert loss <= told <= loss * 1.0011


@pytest.mark.parametrize(
    "arguments",
    [
        ("power", "absolute", 1.0),
        ("latency", "relative", 1.0),
        ("latency", "absolute", 1.5),
        ("latency", "fraction", 0.0),
        ("latency", "fraction", -0.5),
        ("latency", "speedup", float("nan")),
        ("latency", "speedup", float("inf")),
    ],
)
def test_budgets_made_in_code_are_checked_too(arguments: tuple[str, str, float]) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        Budget(*arguments)


@pytest.mark.parametrize("dense", [0.0, -1.0, float("nan"), float("inf")])
def test_a_relative_budget_needs_a_dense_cost(dense: float) -> None:
    assert Budget.parse("latency=4ms").resolve(dense) == 4_000_000
    with pytest.raises(InvalidInput, match="relative to the dense network"):
        Budget.parse("latency=40%").resolve(dense)


numbers = st.decimals(min_value="0.00001", max_value="99999", allow_nan=False, places=9)


@given(numbers, st.sampled_from(["us", "ms", "s"]), st.just(1.0))
def test_absolute_budgets_are_never_loosened(number: object, unit: str, dense: float) -> None:
    text = f"latency={number:f}{unit}"
    exact = Fraction(str(number)) * {"us": 10**3, "ms": 10**6, "s": 10**9}[unit]
    if exact < 1:
        return
    budget = Budget.parse(text)
    assert exact - 1 < budget.resolve(dense) <= exact
    assert Budget.parse(str(budget)) == budget


@given(numbers, st.sampled_from(["%", "x"]), st.floats(1, 1e12))
def test_relative_budgets_are_never_loosened(number: object, unit: str, dense: float) -> None:
    budget = Budget.parse(f"size={number:f}{unit}")
    share = Fraction(str(number)) / 100 if unit == "%" else 1 / Fraction(str(number))
    exact = Fraction(dense) * share
    assert budget.resolve(dense) <= exact
    assert budget.resolve(dense) > exact * (1 - Fraction(1, 10**13)) - 1
    assert Budget.parse(str(budget)) == budget


@given(st.integers(1, 10**12), st.floats(1, 1e12), st.sampled_from(["fraction", "speedup"]))
def test_the_nearest_budget_is_met_and_close(least: int, dense: float, kind: str) -> None:
    found = Budget("latency", kind, 0.5).nearest(least, dense)
    assert found.kind == kind
    assert Budget.parse(str(found)) == found
    ratio = Fraction(dense) / least if kind == "speedup" else Fraction(least) / Fraction(dense)
    assert least <= found.resolve(dense)
    assert abs(Fraction(found.value) / ratio - 1) <= 0.0101


def test_digits_that_floats_cannot_hold_are_rounded_to_the_tighter_side() -> None:
    assert Budget.parse("latency=33.33333333333333339%").resolve(3e15) <= 1e15
    assert Budget.parse("latency=1.0000000000000001x").resolve(1e15) < 1e15
    assert Budget.parse("latency=30%").resolve(10) == 3  # 0.3 as a float is a little less


def test_budgets_together() -> None:
    latency, size = parse_budgets(["latency=4ms", "size=25%"])
    assert (latency.column, size.column) == ("latency", "size")
    with pytest.raises(InvalidInput, match=r"no budget was given; write e\.g\. latency=4ms"):
        parse_budgets([])
    with pytest.raises(InvalidInput, match=r"latency is bounded more than once \(latency=4ms, latency=40%\)"):
        parse_budgets(["latency=4ms", "size=2MB", "latency=40%"])


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("latency", 4_500_000, "4.5ms"),
        ("latency", 4_500_001, "4.500001ms"),
        ("latency", 0, "0ns"),
        ("latency", -1500, "-1.5us"),
        ("size", 123_456, "123.456KB"),
        ("macs", 7, "7MAC"),
        ("power", 12345, "12345"),
    ],
)
def test_quantities_are_exact(column: str, value: int, text: str) -> None:
    assert quantity(column, value) == text

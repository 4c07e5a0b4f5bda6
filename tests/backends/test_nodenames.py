"""Names of ONNX nodes: what is read from them, and that none is given twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hwsearch.backends.nodenames import call_of, unique, unit_of


def test_a_name_says_its_unit_and_call() -> None:
    assert unit_of("conv1|2|QuantizeLinear.in0") == ("conv1", True)
    assert unit_of("~conv1|2|Relu") == ("conv1", False)
    assert unit_of("~|0|Identity.y") == ("", False)
    assert unit_of("/layer/Conv") == ("", False)
    assert [call_of(name) for name in ("conv1|2|Conv", "~conv1|3|Relu", "/layer/Conv")] == ["2", "3", "0"]


@given(st.sets(st.sampled_from(["a|0|Cast", "a|0|Cast.1", "a|0|Cast.2", "b|0|Cast"])), st.integers(1, 5))
def test_no_name_is_given_twice_and_it_still_says_its_unit(taken: set[str], times: int) -> None:
    before = set(taken)
    made = [unique("a|0|Cast", taken) for _ in range(times)]
    assert len(set(made)) == times
    assert not before & set(made)
    assert taken == before | set(made)
    assert {unit_of(name) for name in made} == {("a", True)}
    assert made[0] == "a|0|Cast" or "a|0|Cast" in before

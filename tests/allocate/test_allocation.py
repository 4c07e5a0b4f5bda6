from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.allocate.allocation import SCHEMA, Allocation
from hwsearch.errors import IncompatibleTables, InvalidInput

ALLOCATION = Allocation(
    variants={"stem": "dense.bf16", "layer.10": "dense.int8", "layer.2": "dense.int8"},
    predicted={"latency_ns": 4.1e6, "sigma_ns": 5e4, "size_bytes": 812_345, "macs": 10**7, "loss": 0.0123},
    dense={"latency_ns": 1e7, "size_bytes": 2_000_000},
    budgets=[{"text": "latency=45%", "column": "latency", "limit": 4_500_000}],
    solver={"status": "optimal", "gap": 0.0, "bound": 0.0123},
    network="0123456789abcdef",
    weights_digest="fedcba",
    device={"id": "d1", "chip": "some chip"},
    backend="openvino",
    options={"threads": 1, "batch": 1, "base": "bf16"},
    network_name="tiny",
    created="2026-01-01T00:00:00+00:00",
)


NARROW = replace(ALLOCATION, widths={"stem": 3, "layer.2": 1}, order={"stem": "2 0 1 3", "layer.2": "0"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ALLOCATION.save(tmp_path / "alloc.json")
    return tmp_path / "alloc.json"


def test_round_trip_keeps_the_order_of_units(path: Path) -> None:
    loaded = Allocation.load(path)
    assert loaded == ALLOCATION
    assert list(loaded.variants) == ["stem", "layer.10", "layer.2"]
    assert isinstance(loaded.predicted["size_bytes"], int)
    before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@given(
    st.dictionaries(st.text(min_size=1), st.sampled_from(["dense.fp32", "dense.int8"]), min_size=1),
    st.floats(0, 1e3),
)
def test_round_trip_of_any_names(
    tmp_path_factory: pytest.TempPathFactory, variants: dict[str, str], loss: float
) -> None:
    path = tmp_path_factory.mktemp("a") / "alloc.json"
    allocation = replace(ALLOCATION, variants=variants, predicted={**ALLOCATION.predicted, "loss": loss})
    allocation.save(path)
    assert Allocation.load(path) == allocation


def test_counts_and_uniform() -> None:
    assert ALLOCATION.counts() == {"dense.int8": 2, "dense.bf16": 1}
    assert ALLOCATION.uniform is None
    assert replace(ALLOCATION, variants={"a": "dense.int8", "b": "dense.int8"}).uniform == "dense.int8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variants": None}, "variants"),
        ({"variants": {}}, "allocates no unit"),
        ({"variants": {"a": "3:4.int7"}}, "variants.a is '3:4.int7'"),
        ({"variants": {"a": 8}}, "variants.a"),
        ({"predicted": {"latency_ns": 1.0}}, "predicted lacks sigma_ns, size_bytes, loss"),
        ({"predicted": {"latency_ns": "fast"}}, "predicted.latency_ns"),
        ({"dense": {}}, "dense lacks latency_ns"),
        ({"solver": {"status": "optimal"}}, "solver lacks gap"),
        ({"budgets": [{"text": "latency=4ms"}]}, "a budget lacks column, limit"),
        ({"budgets": "latency=4ms"}, "budgets"),
        ({"device": "this one"}, "device"),
    ],
)
def test_malformed_files_name_what_is_wrong(path: Path, change: dict[str, Any], said: str) -> None:
    data = {**ALLOCATION.to_json(), **change}
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidInput) as caught:
        Allocation.load(path)
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["variants", "predicted", "network", "weights_digest", "backend", "schema"])
def test_missing_keys_are_named(path: Path, key: str) -> None:
    data = ALLOCATION.to_json()
    del data[key]
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match=key):
        Allocation.load(path)


def test_widths_and_the_order_of_slots_come_back(path: Path) -> None:
    NARROW.save(path)
    loaded = Allocation.load(path)
    assert loaded == NARROW
    assert loaded.slots == {"stem": [2, 0, 1, 3], "layer.2": [0]}
    assert loaded.narrow
    assert not replace(NARROW, widths={"stem": 4, "layer.2": 1}).narrow
    assert not ALLOCATION.narrow


def test_a_narrow_allocation_is_not_uniform() -> None:
    same = dict.fromkeys(NARROW.variants, "dense.int8")
    assert replace(ALLOCATION, variants=same).uniform == "dense.int8"
    assert replace(NARROW, variants=same).uniform is None


@pytest.mark.parametrize(
    "change",
    [
        {"widths": {"stem": 5, "layer.2": 1}},
        {"widths": {"stem": 0, "layer.2": 1}},
        {"widths": {"layer.2": 1}},
        {"widths": {"stem": "wide", "layer.2": 1}},
        {"order": {"stem": "2 0 1", "layer.2": "0"}, "widths": {"stem": 4, "layer.2": 1}},
        {"order": {"stem": "2 0 1 1", "layer.2": "0"}},
        {"order": {"stem": "2 0 1 4", "layer.2": "0"}},
        {"order": {"stem": "two", "layer.2": "0"}},
        {"order": ["2 0 1 3"]},
    ],
)
def test_widths_and_orders_that_do_not_fit_together(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**NARROW.to_json(), **change}))
    with pytest.raises(InvalidInput, match="not an allocation"):
        Allocation.load(path)


def test_files_that_are_no_allocation(path: Path) -> None:
    text = path.read_text()
    for broken in ("", text[: len(text) // 2], "\x00\xff", text.replace("0.0123", "NaN")):
        path.write_text(broken)
        with pytest.raises(InvalidInput, match="not JSON"):
            Allocation.load(path)
    for other in ("[]", "3", "null", "{}"):
        path.write_text(other)
        with pytest.raises(InvalidInput, match="not an allocation"):
            Allocation.load(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InvalidInput, match="not JSON"):
        Allocation.load(path)
    path.unlink()
    with pytest.raises(InvalidInput, match="cannot be read"):
        Allocation.load(path)


def test_another_schema(path: Path) -> None:
    path.write_text(json.dumps({**ALLOCATION.to_json(), "schema": SCHEMA + 1}))
    with pytest.raises(IncompatibleTables, match=f"schema {SCHEMA + 1}"):
        Allocation.load(path)

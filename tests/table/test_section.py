"""Which of several tables of a file is meant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwsearch.errors import InvalidInput
from hwsearch.table.section import Section, Shape, matching, only, parse_shapes, written

SMALL, LARGE = (1, 3, 8, 8), (1, 3, 12, 12)


def section(threads: int = 1, shapes: tuple[Shape, ...] = (SMALL,), **options: Any) -> Section:
    return Section({"threads": threads, "base": "fp32", "batch": 1, **options}, shapes)


SECTIONS = [
    section(),
    section(2),
    section(1, (LARGE,)),
    section(load=1),
    section(residual=True),
    section(cpus="0"),
]
sizes = st.lists(st.integers(1, 4096), min_size=1, max_size=5).map(tuple)


@given(sizes)
def test_shapes_are_read_as_they_are_written(shape: Shape) -> None:
    assert parse_shapes(written(shape)) == [(None, shape)]
    assert parse_shapes([f"ids={written(shape)}"]) == [("ids", shape)]
    assert parse_shapes([shape]) == [(None, shape)]


@pytest.mark.parametrize("text", ["", "1x", "x3", "1x0x3", "1x-3", "1,3", "a=", "1x3.5", "²"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(InvalidInput, match="1x3x160x160"):
        parse_shapes([text])


@pytest.mark.parametrize("place", range(len(SECTIONS)))
def test_its_own_keys_choose_every_section(place: int) -> None:
    keys = ("threads", "batch", "base", "load", "residual", "cpus")
    mine = SECTIONS[place]
    shape = [written(s) for s in mine.shapes]
    assert matching(SECTIONS, "t", shape=shape, **{k: mine[k] for k in keys}) == [place]
    assert [s == mine for s in SECTIONS].index(True) == place
    assert len({s.key for s in SECTIONS}) == len(SECTIONS)


def test_what_an_option_is_without_being_named() -> None:
    assert section() == section(load=0, residual=False, cpus="")
    assert section() != section(load=1)


def test_one_section_needs_no_choice() -> None:
    assert matching([section(4)], "t") == [0]
    assert only([section(4)], "t") == 0


def test_several_are_listed_with_the_options_that_choose() -> None:
    found = [section(1), section(4, (LARGE,))]
    with pytest.raises(InvalidInput) as caught:
        only(found, "t.parquet")
    said = str(caught.value)
    for text in (
        "t.parquet holds 2 sections",
        str(found[0]),
        "1x3x12x12",
        "--threads and --shape",
        "threads=...",
    ):
        assert text in said
    assert "--base" not in said


def test_none_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(
        InvalidInput, match=r"no section of threads 8, shape 1x3x8x8; it holds \(1\) threads 1"
    ):
        matching(SECTIONS, "t", threads=8, shape="1x3x8x8")
    with pytest.raises(InvalidInput, match="no table has an option 'treads'"):
        matching(SECTIONS, "t", treads=1)


def test_shapes_of_several_inputs() -> None:
    both = [
        section(shapes=((1, 64), (1, 64))),
        section(shapes=((1, 64), (1, 8))),
        section(shapes=((1, 8), (1, 64))),
    ]
    assert matching(both, "t", shape="1x64") == [0, 1, 2]
    assert matching(both, "t", shape="1x8") == [1, 2]
    assert matching(both, "t", shape=["1x64", "1x64"]) == [0]
    assert matching(both, "t", shape=[(1, 8), (1, 64)]) == [2]
    assert matching(both, "t", shape=["ids=1x8", "mask=1x64"]) == [2]


def test_options_in_which_sections_agree() -> None:
    assert section(2).agrees(section(2).options) > section(1).agrees(section(2).options)
    assert section().agrees(section().options) > section(load=1).agrees(section().options)

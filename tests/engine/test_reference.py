"""The engine that everything else is timed against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from hwsearch.device.spent import Spent
from hwsearch.engine.reference import reference_engine
from hwsearch.engine.setup import Setup
from tests import tiny


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


@pytest.mark.parametrize("times", [(100, 103, 97), (104, 100, 97), (97, 100, 100)])
def test_of_three_engines_the_middle_one(times: tuple[int, ...]) -> None:
    clock, left = Clock(), list(times)

    def build(variants: Any) -> tuple[Any, None]:
        assert {str(v) for v in variants.values()} == {"dense.fp32"}
        own = 10_000 * left.pop(0)

        def run() -> None:
            clock.now += own

        return SimpleNamespace(run=run, own=own), None

    setup = SimpleNamespace(
        network=tiny.lowering("cnn").network, options=SimpleNamespace(base="fp32"), build=build, clock=clock, spent=Spent()
    )
    found: Any = reference_engine(cast(Setup, setup))
    assert found.own == 10_000 * sorted(times)[1]
    assert not left

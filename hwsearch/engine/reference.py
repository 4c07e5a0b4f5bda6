"""The engine that everything else is timed against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hwsearch.backends.base import Engine
from hwsearch.device.spent import REFERENCE
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.setup import Setup
from hwsearch.network.variants import uniform

INSTANCES = 3
COMPARED = Protocol(width=0.005, limit_s=0.4)


def reference_engine(setup: Setup) -> Engine:
    """The network in the base precision: of three engines compiled from it the one of middle speed.

    Engines of one network run a little faster or slower, presumably by where their memory lies (0.2 % of one network here, up to
    4 % of another), and all ratios of a session have their reference's share of that.
    """
    plain = uniform(setup.network, setup.options.base)
    engines = [setup.build(plain)[0] for _ in range(INSTANCES)]
    first, *others = engines
    with setup.spent.on(REFERENCE):
        timed = paired(first.run, {str(i): e.run for i, e in enumerate(others)}, COMPARED, clock=setup.clock)
    ratios = [1.0, *(timing.ratio for timing in timed.values())]
    return engines[int(np.argsort(ratios)[INSTANCES // 2])]


@dataclass(frozen=True)
class Reference:
    """The reference engine of a setup, compiled where it is first asked for: one for all stages of a command."""

    setup: Setup

    @cached_property
    def engine(self) -> Engine:
        """What everything is timed against."""
        return reference_engine(self.setup)

    @property
    def compiled(self) -> bool:
        """Whether the engine is there."""
        return "engine" in self.__dict__

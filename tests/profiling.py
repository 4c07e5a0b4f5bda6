"""Profiles of two small networks on simulated devices with known laws."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import tiny

from hwsearch.backends.base import BuildOptions
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.lowering.lowering import Lowering
from hwsearch.profiler.profile import Effort, profile
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend
from hwsearch.testing.contract import small_network

FAST = Protocol(width=0.05, block_ns=1, warmup_ns=1, limit_s=0.5)
DESIGN = 6


@cache
def lowering() -> Lowering:
    return small_network("residual")


def law() -> LatencyLaw:
    return LatencyLaw.random(lowering().network)


def set_up(backend: SimulatedBackend | None = None, **options: Any) -> Setup:
    return Setup(lowering(), backend or SimulatedBackend(law(), **options), BuildOptions(1, "fp32"))


def measured(setup: Setup, out: Path | None, **options: Any) -> LatencyTable:
    """A profile with little effort; options are those of `profile` and of `Effort`."""
    effort = {f.name: options.pop(f.name) for f in fields(Effort) if f.name in options}
    return profile(setup, out, Effort(**{"protocol": FAST, **effort}), **options)


def run(setup: Setup, out: Path | None, **options: Any) -> LatencyTable:
    return measured(setup, out, **{"builds": DESIGN, "axes": ["precision"], **options})


def narrow_law() -> LatencyLaw:
    return LatencyLaw.random(tiny.lowering("cnn").network, 2)


def narrow_setup(backend: SimulatedBackend | None = None, **options: Any) -> Setup:
    return Setup(tiny.lowering("cnn"), backend or SimulatedBackend(narrow_law(), **options), BuildOptions())


def run_widths(setup: Setup, out: Path | None, **options: Any) -> LatencyTable:
    return measured(setup, out, **options)

"""hwsearch: per-layer width and precision that meet a budget on a device, on measured times of compiled code."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwsearch import schemes as schemes
    from hwsearch.allocate.allocation import Allocation as Allocation
    from hwsearch.allocate.search import front as front
    from hwsearch.allocate.search import search as search
    from hwsearch.allocate.search import search_diverse as search_diverse
    from hwsearch.api import bayes as bayes
    from hwsearch.api import profile as profile
    from hwsearch.api import recover as recover
    from hwsearch.api import run as run
    from hwsearch.api import sensitivity as sensitivity
    from hwsearch.api import verify as verify
    from hwsearch.deployment.deploy import deploy as deploy
    from hwsearch.deployment.recheck import recheck as recheck
    from hwsearch.deployment.targets import build as build
    from hwsearch.deployment.targets import check as check
    from hwsearch.loading import load as load
    from hwsearch.loss.table import SensitivityTable as SensitivityTable
    from hwsearch.plot import plot_allocation as plot_allocation
    from hwsearch.plot import plot_bayes as plot_bayes
    from hwsearch.plot import plot_diagnosis as plot_diagnosis
    from hwsearch.plot import plot_front as plot_front
    from hwsearch.plot import plot_fronts as plot_fronts
    from hwsearch.plot import plot_predictions as plot_predictions
    from hwsearch.plot import plot_recovery as plot_recovery
    from hwsearch.plot import plot_staircase as plot_staircase
    from hwsearch.table.table import LatencyTable as LatencyTable
    from hwsearch.task import Task as Task

__version__ = "0.1.0"
_HOMES = {
    "allocate.allocation": ["Allocation"], "api": ["bayes", "profile", "recover", "run", "sensitivity", "verify"],
    "deployment.recheck": ["recheck"], "deployment.deploy": ["deploy"],
    "plot": [
        "plot_allocation", "plot_bayes", "plot_diagnosis", "plot_front", "plot_fronts", "plot_predictions", "plot_recovery",
        "plot_staircase",
    ],
    "allocate.search": ["front", "search", "search_diverse"],
    "loss.table": ["SensitivityTable"], "table.table": ["LatencyTable"],
    "deployment.targets": ["build", "check"], "loading": ["load"], "task": ["Task"],
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "schemes":  # a folder of many names
        return import_module("hwsearch.schemes")
    if name not in _HOME:
        raise AttributeError(f"module 'hwsearch' has no attribute {name!r}")
    return getattr(import_module(f"hwsearch.{_HOME[name]}"), name)

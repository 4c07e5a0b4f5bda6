"""What a user may import."""

from __future__ import annotations

import pkgutil

import pytest

import hwsearch as hs


def test_exported_names() -> None:
    """A name that goes breaks somebody's script."""
    assert hs.__all__ == [
        "Allocation", "LatencyTable", "SensitivityTable", "Task", "build", "check", "deploy", "front", "load",
        "plot_allocation", "plot_diagnosis", "plot_front", "plot_fronts", "plot_predictions", "plot_recovery", "plot_staircase",
        "profile", "recheck", "recover", "run", "search", "search_diverse", "sensitivity", "verify",
    ]  # fmt: skip
    assert all(callable(getattr(hs, name)) for name in hs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hs.nothing


def test_no_module_hides_a_name() -> None:
    """Importing `hwsearch.x` sets the attribute `x` of the package, whatever it was."""
    modules = {m.name for m in pkgutil.iter_modules(hs.__path__)}
    assert not modules & set(hs.__all__)

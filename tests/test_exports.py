"""What a user may import."""

from __future__ import annotations

import pytest

import hwsearch as hs


def test_exported_names() -> None:
    """A name that goes breaks somebody's script."""
    assert hs.__all__ == [
        "Allocation", "LatencyTable", "SensitivityTable", "Task", "deploy", "front", "load", "plot_allocation",
        "plot_front", "plot_predictions", "plot_staircase", "profile", "run", "search", "sensitivity", "verify",
    ]  # fmt: skip
    assert all(callable(getattr(hs, name)) for name in hs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hs.nothing

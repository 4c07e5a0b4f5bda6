"""What a user may import."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import hwsearch as hs


def test_exported_names() -> None:
    """A name that goes breaks somebody's script."""
    assert hs.__all__ == [
        "Allocation", "LatencyTable", "SensitivityTable", "Task", "bayes", "build", "check", "deploy", "front", "load",
        "plot_allocation", "plot_bayes", "plot_diagnosis", "plot_front", "plot_fronts", "plot_predictions", "plot_recovery",
        "plot_staircase", "profile", "recheck", "recover", "run", "search", "search_diverse", "sensitivity", "verify",
    ]  # fmt: skip
    assert all(callable(getattr(hs, name)) for name in hs.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hs.nothing


def test_schemes_are_a_folder_of_names_that_is_imported_when_it_is_used() -> None:
    assert set(hs.schemes.__all__) >= {
        "Compose", "Prune", "NeuronPrune", "FilterPrune", "StructurePrune", "BlockPrune", "NM", "Balanced", "Quantize", "Allocate",
    }  # fmt: skip
    assert all(callable(getattr(hs.schemes, name)) for name in hs.schemes.__all__)
    code = "import sys, hwsearch as hs; assert 'torch' not in sys.modules; hs.schemes.Compose; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_hides_a_name() -> None:
    """Importing `hwsearch.x` sets the attribute `x` of the package, whatever it was."""
    modules = {m.name for m in pkgutil.iter_modules(hs.__path__)}
    assert not modules & set(hs.__all__)

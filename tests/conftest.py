"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("hwsearch.testing.contract")


@pytest.fixture
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test alone: another profile on this machine must not make it fail."""
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))

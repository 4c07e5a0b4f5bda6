"""Fixtures of the command line: an API that says what it was called with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from invoking import Install

import hwsearch as hs


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts functions in the place of hwsearch's own, without importing what those need."""

    def install(**functions: Any) -> None:
        for name, function in functions.items():
            monkeypatch.setitem(vars(hs), name, function)

    install(load=lambda spec: f"task {spec}")
    monkeypatch.setattr("hwsearch.backends.get", lambda name: SimpleNamespace(name=name, versions=dict, bases=tuple))
    monkeypatch.setattr("hwsearch.device.fingerprint.clocks_to_lock", lambda runtime: 1410)
    return install


@pytest.fixture(autouse=True)
def overview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.cli.overview.as_json", lambda table: {"backend": "openvino"})
    monkeypatch.setattr("hwsearch.cli.overview.summary", lambda table: "a table of 24 builds")

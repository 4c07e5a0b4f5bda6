"""Backends are found through entry points; a missing or dead runtime is a reason to read, not a crash."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from hwsearch import backends
from hwsearch.errors import BackendUnavailable, InvalidInput


class Good:
    name = "good"

    def versions(self) -> dict[str, str]:
        return {"good": "1.2"}

    def bases(self) -> tuple[str, ...]:
        return ("bf16", "fp32")


class Absent(Good):
    def versions(self) -> dict[str, str]:
        raise BackendUnavailable("the runtime is not installed; install it with: pip install 'hwsearch[cpu]'")


class Dead(Good):
    def bases(self) -> tuple[str, ...]:
        raise RuntimeError("driver gone")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "good": f"{__name__}:Good",
        "absent": f"{__name__}:Absent",
        "dead": f"{__name__}:Dead",
        "openvino": "no_such_module_of_ours:Backend",
        "foreign": f"{__name__}:NoSuchClass",
    }
    entries = [EntryPoint(name, value, backends.GROUP) for name, value in values.items()]
    monkeypatch.setattr(backends, "_OWN", {})
    monkeypatch.setattr(backends, "entry_points", lambda group: [e for e in entries if e.group == group])


@pytest.mark.usefixtures("registered")
def test_names_and_get() -> None:
    assert backends.names() == ("absent", "dead", "foreign", "good", "openvino")
    assert type(backends.get("good")).__name__ == "Good"
    assert backends.get("absent").name == "good", "a runtime is not touched before it is used"


@pytest.mark.usefixtures("registered")
def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        InvalidInput, match="unknown backend 'opnvino'; known: absent, dead, foreign, good, openvino"
    ):
        backends.get("opnvino")


def test_a_checkout_that_is_not_installed_knows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On PYTHONPATH alone nothing records entry points; those of an installation and of other packages come first."""
    recorded = {e.name: e.value for e in backends.entry_points(group=backends.GROUP)}
    monkeypatch.setattr(backends, "entry_points", lambda group: [])
    assert backends.names() == ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch")
    assert {name: recorded[name] for name in backends.names()} == backends._OWN
    assert backends.get("openvino").name == "openvino"
    mine = EntryPoint("openvino", f"{__name__}:Good", backends.GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group: [mine])
    assert type(backends.get("openvino")).__name__ == "Good"


def test_python_m_hwsearch_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hwsearch", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("hwsearch ")


@pytest.mark.usefixtures("registered")
def test_import_failure_names_the_extra() -> None:
    with pytest.raises(BackendUnavailable, match=r"no_such_module_of_ours.*pip install 'hwsearch\[cpu\]'"):
        backends.get("openvino")
    with pytest.raises(BackendUnavailable, match=r"NoSuchClass.*the package that offers it"):
        backends.get("foreign")


@pytest.mark.usefixtures("registered")
def test_status_tells_of_each() -> None:
    found = {entry.name: entry for entry in backends.status()}
    assert found["good"].to_json() == {
        "name": "good", "available": True, "versions": {"good": "1.2"}, "bases": ["bf16", "fp32"], "reason": "",
    }  # fmt: skip
    assert not any(found[name].available for name in ("absent", "dead", "openvino", "foreign"))
    assert "pip install" in found["absent"].reason
    assert "RuntimeError: driver gone" in found["dead"].reason


def test_the_real_ones_are_registered() -> None:
    assert {"openvino", "onnxruntime"} <= set(backends.names())
    assert backends.get("openvino").name == "openvino"

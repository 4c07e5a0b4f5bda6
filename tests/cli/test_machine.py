"""`hwsearch devices`."""

from __future__ import annotations

import json
import sys

import pytest
from invoking import invoke
from simulated_nvml import NOT_SUPPORTED, Nvml


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch import backends

    found = [
        backends.Status("good", True, {"good": "1.2"}, ("bf16", "fp32")),
        backends.Status("bad", False, reason="install it with: pip install 'hwsearch[cpu]'"),
    ]
    monkeypatch.setattr(backends, "status", lambda: found)
    result = invoke("devices")
    assert result.exit_code == 0
    for text in ("good", "1.2", "bf16, fp32", "hwsearch[cpu]"):
        assert text in result.stdout
    data = json.loads(invoke("devices", "--json").stdout)
    assert [entry["name"] for entry in data["backends"]] == ["good", "bad"]
    assert len(data["device"]["id"]) == 12


def test_devices_lists_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwsearch.backends.status", list)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(2, fails={"nvmlDeviceGetEccMode": NOT_SUPPORTED}))
    shown = " ".join(invoke("devices").stdout.split())
    for text in ("NVIDIA Test 0, SM 8.6, 24.0 GiB, driver 570.12", "GPU-0aaa", "GPU-1aaa", "now 1980 MHz"):
        assert text in shown
    found = json.loads(invoke("devices", "--json").stdout)
    assert [gpu["uuid"] for gpu in found["gpus"]] == ["GPU-1aaa", "GPU-0aaa"]
    assert all("ecc" not in gpu for gpu in found["gpus"])
    assert found["no_gpu"] == ""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "no GPU: NVML cannot be asked" in " ".join(invoke("devices").stdout.split())
    assert json.loads(invoke("devices", "--json").stdout)["gpus"] == []


def test_devices_says_whether_energy_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch import backends
    from hwsearch.device import energy

    monkeypatch.setattr(backends, "status", list)
    monkeypatch.setattr(energy, "find", lambda: energy.Counter(reason="no RAPL package"))
    assert "energy not measured: no RAPL package" in invoke("devices").stdout
    data = json.loads(invoke("devices", "--json").stdout)
    assert data["energy"] == {"available": False, "source": "", "reason": "no RAPL package"}
    monkeypatch.setattr(energy, "find", lambda: energy.Counter(lambda: 0.0, "RAPL, 1 package(s)"))
    assert "energy measured by RAPL, 1 package(s)" in invoke("devices").stdout
    assert json.loads(invoke("devices", "--json").stdout)["energy"]["available"]


def test_devices_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from hwsearch import backends

    found = [
        backends.Status("good", True, {"good": "1.2, " + "a process for each engine, " * 5}, ("bf16", "fp32")),
        backends.Status("bad", False, reason="the package cannot be imported, and there is no driver; " * 4),
    ]
    monkeypatch.setattr(backends, "status", lambda: found)
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("devices").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "not available: the package cannot" in " ".join(lines)

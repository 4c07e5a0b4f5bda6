"""The doctor says what holds on this machine: on the real runtimes, on a simulated GPU, and where there is nothing."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from simulated_nvml import NO_PERMISSION, NOT_SUPPORTED, Nvml
from typer.testing import CliRunner

from hwsearch import backends, cli
from hwsearch.backends.base import BuildOptions
from hwsearch.device import fingerprint as device
from hwsearch.doctor import checks as doctor
from hwsearch.doctor.checks import Examination, Result, examine
from hwsearch.doctor.sharing import shared
from hwsearch.errors import BackendUnavailable, DeviceBusy, InvalidInput
from hwsearch.network.variants import Variant
from hwsearch.testing import BackendContract, LatencyLaw, SimulatedBackend
from hwsearch.testing.contract import checks, small_network

pytestmark = pytest.mark.usefixtures("own_locks")
NETWORKS = [small_network(name) for name in (*doctor.NETWORKS, "stored")]


class Simulated(SimulatedBackend):
    """A device that knows the laws of the contract's networks."""

    def __init__(self) -> None:
        self.parts = [SimulatedBackend(LatencyLaw.random(n.network)) for n in NETWORKS]
        super().__init__(self.parts[0].law)

    def build(self, onnx: bytes, options: BuildOptions) -> Any:
        for part in self.parts:
            try:
                engine = part.build(onnx, options)
            except BackendUnavailable as error:
                reason = error
            else:
                return engine
        raise reason

    def clock(self) -> int:
        return sum(part.clock() for part in self.parts)


class OnGpu(Simulated):
    gpu = True


class Forgetful(Simulated):
    """Names no versions, and takes every base precision."""

    def versions(self) -> dict[str, str]:
        return {}

    def build(self, onnx: bytes, options: BuildOptions) -> Any:
        return super().build(onnx, BuildOptions(1, "fp32"))


class Absent(OnGpu):
    def versions(self) -> dict[str, str]:
        raise BackendUnavailable("its runtime is not installed; install it with: pip install absent")


class Dead(Simulated):
    def bases(self) -> tuple[str, ...]:
        raise RuntimeError("/home/somebody/lib.so: undefined symbol")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {c.__name__.lower(): EntryPoint(c.__name__.lower(), f"{__name__}:{c.__name__}", backends.GROUP)
           for c in (Simulated, OnGpu, Forgetful, Absent, Dead)}  # fmt: skip
    real = backends._registered()
    monkeypatch.setattr(backends, "_registered", lambda: {**own, **real})


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    simulated = Nvml()
    simulated.pids = (os.getpid(),)
    monkeypatch.setitem(sys.modules, "pynvml", simulated)
    return simulated


def results(found: Examination) -> dict[str, Result]:
    [examined] = found.backends
    return {r.name: r for r in examined.results}


def texts(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [t for k, v in data.items() for t in (k, *texts(v))]
    if isinstance(data, list):
        return [t for v in data for t in texts(v)]
    return [data] if isinstance(data, str) else []


# ---------------------------------------------------------------- real runtimes


@pytest.mark.parametrize("name", [pytest.param("onnxruntime", marks=pytest.mark.slow), "openvino"])
def test_the_runtimes_here_are_healthy_and_the_report_is_whole(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    path = tmp_path / "report.json"
    done = CliRunner().invoke(cli.app, ["doctor", "--backend", name, "--report", str(path)])
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert report["healthy"]
    assert (report["kind"], report["schema"]) == ("doctor", doctor.SCHEMA)
    assert report["packages"][name]
    assert report["device"]["id"] == device.fingerprint().id
    [examined] = report["backends"]
    assert examined["versions"][name] == report["packages"][name]
    outcomes = {r["name"]: r["outcome"] for r in examined["results"]}
    assert [n for n in outcomes if n.startswith("engine: ")] == [
        "engine: residual", "engine: attention", "engine: two inputs",
    ]  # fmt: skip
    assert "huge pages" in outcomes
    contract = {n.removeprefix("contract: ") for n in outcomes if n.startswith("contract: ")}
    assert contract == {n[5:].replace("_", " ") for n in dir(BackendContract) if n.startswith("test_")}
    assert set(outcomes.values()) <= {"ok", "not possible"}
    for what in ("small networks build and can be timed", doctor.PROVES["contract"]):
        assert what in examined["proven"]
        assert what in done.stdout.split("not proven here:")[0]
    assert any("fp8" in what for what in examined["not_proven"])
    assert f"contract {'':8s}"[:8] in done.stdout
    assert f"{len(contract)} of {len(contract)} checks held" in done.stdout


# ---------------------------------------------------------------- a GPU


def test_a_gpu_is_examined_with_what_nvml_tells(nvml: Nvml) -> None:
    nvml.fails["nvmlDeviceGetEccMode"] = NOT_SUPPORTED
    found = examine("ongpu")
    by_name = results(found)
    assert found.healthy
    assert "NVIDIA Test 0, SM 8.6" in by_name["driver"].detail
    assert by_name["driver"].detail.endswith("not told: ecc")
    assert by_name["memory"] == Result("memory", "ok", "5.0 of 24.0 GiB free")
    assert by_name["energy counter"].detail == "NVML"
    assert by_name["quiet GPU"].outcome == "ok"
    locking = by_name["clock locking"]
    assert (locking.outcome, locking.remedy) == ("not possible", "hwsearch doctor --lock-clocks")
    assert "nvmlDeviceSetGpuLockedClocks" not in dict(nvml.calls)
    assert found.gpus[0]["not_told"] == {"ecc": "Not Supported"}
    [examined] = found.backends
    assert examined.device["chip"] == "NVIDIA Test 0"
    assert any("steady clocks" in what for what in examined.not_proven)
    assert any(
        what.startswith("tf32, bf16, fp16, fp8, int4, nvfp4: not offered") for what in examined.not_proven
    )


def test_a_report_is_saved_after_each_check(
    nvml: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends an examination leaves what was found, which says that it is not all."""

    def interrupted(backend: Any, network: str) -> Result:
        if network == "attention":
            raise KeyboardInterrupt
        return Result(f"engine: {network}", "ok")

    monkeypatch.setattr(doctor, "engine", interrupted)
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        examine("ongpu", keep=lambda sofar: sofar.save(path))
    report = json.loads(path.read_text())
    assert (report["complete"], report["healthy"]) == (False, False)
    assert [r["name"] for r in report["backends"][0]["results"]][-1] == "engine: residual"


def test_what_is_offered_is_built_by_the_contract_and_not_said_to_be_missing() -> None:
    class More(Simulated):
        def variants(self, base: str) -> tuple[Variant, ...]:
            return Variant(base), Variant("int8"), Variant("fp8")

    said = doctor.not_covered(More(), device.fingerprint())
    assert any("int4" in what and "not offered" in what for what in said)
    assert not any("fp8" in what for what in said)


def test_clock_locking_is_tried_where_it_is_asked_for(nvml: Nvml) -> None:
    tried = doctor.clock_locking(True)
    assert (tried.outcome, "asked for 1410 MHz, then 1410 MHz" in tried.detail) == ("ok", True)
    assert nvml.locked is None
    nvml.fails["nvmlDeviceSetGpuLockedClocks"] = NO_PERMISSION
    assert "takes root" in doctor.clock_locking(True).detail


@pytest.mark.parametrize(
    ("change", "check", "outcome", "said"),
    [
        (lambda n: setattr(n, "pids", (1, 2)), "quiet GPU", "not possible", "2 other process(es)"),
        (lambda n: setattr(n, "throttle", 0x44), "quiet GPU", "not possible", "power cap and hardware thermal"),
        (lambda n: n.fails.update(nvmlDeviceGetComputeRunningProcesses=4), "quiet GPU", "not possible", "does not tell"),
        (lambda n: n.fails.update(nvmlDeviceGetMemoryInfo=3), "memory", "not possible", "not told"),
        (lambda n: n.fails.update(nvmlDeviceGetTotalEnergyConsumption=3), "energy counter", "not possible", "Not Supp"),
    ],
)  # fmt: skip
def test_what_a_gpu_does_not_give_is_not_made_up(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, change: Any, check: str, outcome: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "_at_work", lambda backend, progress: [])
    change(nvml)
    found = results(examine("ongpu"))[check]
    assert found.outcome == outcome
    assert said in found.detail


def test_too_little_memory_fails(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_BYTES", 10**12)
    monkeypatch.setattr(doctor, "_at_work", lambda backend, progress: [])
    assert not examine("ongpu").healthy
    assert results(examine("simulated"))["memory"].outcome == "failed"


@pytest.mark.parametrize(
    ("share", "outcome", "said"), [(1.0, "ok", "100%"), (0.0, "not possible", "0%"), (None, "not possible", "does not tell")]
)  # fmt: skip
def test_engines_without_huge_pages_are_told(
    monkeypatch: pytest.MonkeyPatch, share: float | None, outcome: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "huge_pages", lambda: share)
    for work in ("_at_work", "sums"):  # engines are built in other tests
        monkeypatch.setattr(doctor, work, lambda *given: [])
    assert "huge pages" not in results(examine("simulated")), "its engines are built where it is"
    monkeypatch.setattr(Simulated, "own_process", True, raising=False)
    found = results(examine("simulated"))["huge pages"]
    assert (found.outcome, said in found.detail) == (outcome, True)
    assert ("madvise" in found.remedy) == (share == 0.0)


# ---------------------------------------------------------------- what does not work


def test_a_broken_contract_is_a_failure_with_the_reason(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["doctor", "--backend", "forgetful", "--report", str(tmp_path / "r.json"), "--json"]
    )
    assert done.exit_code == 1
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "r.json").read_text())
    [examined] = data["backends"]
    failed = {r["name"]: r for r in examined["results"] if r["outcome"] == "failed"}
    assert set(failed) == {"contract: versions are named", "contract: unknown base is refused"}
    assert "versions() is empty" in failed["contract: versions are named"]["detail"]
    assert "--report" in failed["contract: versions are named"]["remedy"]
    assert doctor.PROVES["contract"] not in examined["proven"]
    assert any("contract: versions are named failed" in what for what in examined["not_proven"])


def test_one_that_is_asked_for_and_not_there_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = CliRunner().invoke(cli.app, ["doctor", "--backend", "absent", "--report", str(path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: absent cannot be used here: ")
    assert "pip install absent" in done.stderr
    assert done.stderr.count("\n") == 1
    report = json.loads(path.read_text())
    assert not report["healthy"]
    outcomes = {r["name"]: r["outcome"] for r in report["backends"][0]["results"]}
    assert outcomes == {"driver": "failed", "runtime": "failed"}
    dead = CliRunner().invoke(cli.app, ["doctor", "--backend", "dead"])
    assert "RuntimeError" in dead.stderr
    with pytest.raises(InvalidInput, match="unknown backend 'nonsense'"):
        examine("nonsense")


def test_without_a_name_what_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_at_work", lambda backend, progress: [])
    found = examine()
    available = {b.backend: b.available for b in found.backends}
    assert available["simulated"]
    assert not any(available[name] for name in ("absent", "dead", "ongpu"))
    assert found.healthy
    assert found.no_gpu
    assert "pip install absent" in str(found)
    monkeypatch.setattr(backends, "names", lambda: ("absent", "dead"))
    assert not examine().healthy
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1


def test_a_device_that_is_being_profiled_is_left_alone(busy: Any) -> None:
    with busy(device.fingerprint().id), pytest.raises(DeviceBusy):
        examine("simulated")


@pytest.mark.slow  # torch is compiled anew without assertions
def test_the_contract_is_not_empty_without_assertions() -> None:
    code = "from hwsearch.testing.contract import checks; checks()"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "run without -O" in done.stderr


def test_the_checks_are_those_of_the_contract_in_its_order() -> None:
    class Larger(BackendContract):
        def test_another(self, backend: Any) -> None:
            raise AssertionError("never right")

    names = list(checks())
    assert names[0] == "versions are named"
    assert list(checks(Larger())) == [*names, "another"]
    with pytest.raises(AssertionError, match="never right"):
        checks(Larger())["another"](None)


# ---------------------------------------------------------------- what others may see


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open /opt/private/project/lib.so: no such file", "cannot open .../lib.so: no such file"),
        ("'/a/b/c.py' and \"/d/e\"", "'.../c.py' and \".../e\""),
        (r"in C:\Users\me\x.dll", r"in .../x.dll"),
        ("see https://docs.nvidia.com/deploy/x.html, 3/4 of it, -/-", None),
        ("pip install 'hwsearch[cpu]'", None),
    ],
)
def test_folders_are_not_shown(text: str, shown: str | None) -> None:
    assert shared(text) == (text if shown is None else shown)


def test_a_report_names_neither_folders_nor_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jane"))

    def broken(backend: Any, progress: Any) -> list[Result]:
        return [
            Result(
                "engine: residual",
                "failed",
                "/home/jane/secret/model.so: jane may not read /srv/jane/x",
            )
        ]

    monkeypatch.setattr(doctor, "_at_work", broken)
    data = examine("simulated").to_json()
    said = texts(data)
    assert any(".../model.so: USER may not read .../x" in t for t in said)
    assert not [t for t in said if "jane" in t or "secret" in t or "/home" in t or "/srv" in t]
    assert json.loads(json.dumps(data)) == data

"""NVML: what is not told is absent and never zero; clocks are let go however a measurement ends."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_nvml import FUNCTION_NOT_FOUND, GIB, GPU_IS_LOST, NO_PERMISSION, NOT_SUPPORTED, Handle, Nvml

from hwsearch.device import clocks, nvidia
from hwsearch.device import fingerprint as device
from hwsearch.device.clocks import lock_clocks, sustained_mhz
from hwsearch.device.energy import find as find_energy
from hwsearch.device.nvidia import REASONS, State, decoded, every, find
from hwsearch.errors import BackendUnavailable, InvalidInput

FIELDS = {
    "nvmlDeviceGetUUID": ["uuid"],
    "nvmlDeviceGetCudaComputeCapability": ["compute_capability"],
    "nvmlSystemGetDriverVersion": ["driver"],
    "nvmlSystemGetCudaDriverVersion_v2": ["cuda"],
    "nvmlDeviceGetMemoryInfo": ["memory_bytes", "memory_free_bytes"],
    "nvmlDeviceGetMaxClockInfo": ["sm_max_mhz", "memory_max_mhz"],
    "nvmlDeviceGetApplicationsClock": ["sm_application_mhz", "memory_application_mhz"],
    "nvmlDeviceGetEnforcedPowerLimit": ["power_limit_w"],
    "nvmlDeviceGetEccMode": ["ecc"],
    "nvmlDeviceGetMigMode": ["mig_mode"],
    "nvmlDeviceGetPersistenceMode": ["persistence"],
    "nvmlDeviceGetComputeRunningProcesses": ["processes"],
    "nvmlDeviceGetClockInfo": ["state.sm_mhz", "state.memory_mhz"],
    "nvmlDeviceGetPowerUsage": ["state.power_w"],
    "nvmlDeviceGetTemperature": ["state.temperature_c"],
    "nvmlDeviceGetCurrentClocksEventReasons": ["state.throttle"],
}
"""Which fields each function of NVML tells."""


def flat(data: dict[str, Any]) -> dict[str, Any]:
    """Of nested JSON the leaves, by dotted names."""
    found = {}
    for key, value in data.items():
        inner = flat(value) if isinstance(value, dict) else None
        found |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return found


def test_all_that_is_told() -> None:
    gpu = find(Nvml(), {}).gpu()
    data = gpu.to_json()
    assert json.loads(json.dumps(data)) == data
    assert data == {
        "id": gpu.id, "chip": "NVIDIA Test 0", "kind": "gpu", "name": "NVIDIA Test 0", "uuid": "GPU-0aaa",
        "compute_capability": "8.6", "driver": "570.12", "cuda": "12.8", "memory_bytes": 24 * GIB,
        "memory_free_bytes": 5 * GIB, "sm_max_mhz": 2100, "memory_max_mhz": 9501, "sm_application_mhz": 1695,
        "memory_application_mhz": 9251, "power_limit_w": 350.0, "ecc": True, "mig_mode": False, "persistence": False,
        "processes": [{"pid": 1}, {"pid": 4242, "memory_bytes": 300}],
        "state": {"sm_mhz": 1980, "memory_mhz": 9251, "power_w": 123.4, "temperature_c": 61, "throttle": ["idle"]},
    }  # fmt: skip
    assert gpu.not_told == {}
    assert "2 other process(es)" in str(gpu)
    assert set(flat(data)) - {"id", "chip", "kind", "name"} == {
        f for fields in FIELDS.values() for f in fields
    }


@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, None])
@pytest.mark.parametrize("function", FIELDS)
def test_what_is_not_told_is_absent_and_the_rest_is_there(function: str, error: int | None) -> None:
    """error None: the binding is older than the function."""
    whole, nvml = flat(find(Nvml(), {}).gpu().to_json()), Nvml()
    if error is None:
        del nvml.answers[function]
    else:
        nvml.fails[function] = error
    gpu = find(nvml, {}).gpu()
    data = flat(gpu.to_json())
    assert set(whole) - set(data) == set(FIELDS[function])
    assert {k: v for k, v in data.items() if k != "id"} == {
        k: v for k, v in whole.items() if k not in {*FIELDS[function], "id"}
    }
    assert set(gpu.not_told) == {f.removeprefix("state.") for f in FIELDS[function]} - {"memory_free_bytes"}
    assert str(gpu)
    assert gpu.id == find(nvml, {}).gpu().id


def test_older_drivers_know_throttle_reasons_by_their_first_name() -> None:
    nvml = Nvml(fails={"nvmlDeviceGetCurrentClocksEventReasons": FUNCTION_NOT_FOUND})
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = lambda h: 0x44
    assert find(nvml, {}).state().throttle == ("power cap", "hardware thermal slowdown")


def test_no_reason_is_told_apart_from_reasons_not_told() -> None:
    nvml = Nvml()
    nvml.throttle = 0
    assert find(nvml, {}).state().to_json()["throttle"] == []
    assert State().to_json() == {}
    assert State(throttle=("idle",)).slowed == ()
    assert State(throttle=("idle", "power cap")).slowed == ("power cap",)


def test_a_gpu_without_a_name_or_that_is_lost_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="does not name the GPU: Not Supported"):
        find(Nvml(fails={"nvmlDeviceGetName": NOT_SUPPORTED}), {}).gpu()
    with pytest.raises(BackendUnavailable, match="does not answer any more"):
        find(Nvml(fails={"nvmlDeviceGetPowerUsage": GPU_IS_LOST}), {}).state()


def test_the_id_is_of_what_decides_speed_and_not_of_the_card_or_the_moment() -> None:
    gpu = find(Nvml(), {}).gpu()
    same = replace(gpu, uuid="GPU-other", processes=(), state=State(), memory_free_bytes=0, host="another CPU",
                   memory_bytes=24 * GIB + 1000, power_limit_w=200.0)  # fmt: skip
    assert same.id == gpu.id
    for change in (
        {"name": "X"}, {"compute_capability": "9.0"}, {"memory_bytes": 48 * GIB}, {"driver": "580"},
        {"driver": None}, {"mig": "1g.6gb"},
    ):  # fmt: skip
        assert replace(gpu, **change).id != gpu.id


# ---------------------------------------------------------------- the real binding


def names_used() -> set[str]:
    source = "".join(Path(module.__file__ or "").read_text() for module in (nvidia, clocks))
    return set(re.findall(r"\b(?:nvml[A-Z]\w+|NVML_\w+|NVMLError)\b", source)) - {"nvmlClocksEventReasons"}


def test_every_name_is_in_the_real_binding_and_takes_these_arguments() -> None:
    real = pytest.importorskip("pynvml")
    assert names_used() > set(FIELDS)
    assert {name for name in names_used() if not hasattr(real, name)} == set()
    for name in ("NVML_CLOCK_GRAPHICS", "NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU",
                 "NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_NO_PERMISSION", "NVML_ERROR_GPU_IS_LOST"):  # fmt: skip
        assert getattr(real, name) == getattr(Nvml, name)
    nvml = Nvml(instances=2, fails={"nvmlDeviceGetDefaultApplicationsClock": NOT_SUPPORTED})
    find(nvml, {}).gpu()
    nvml.instances = 0
    probe = find(nvml, {})
    probe.meter()
    with lock_clocks(probe, sustained_mhz(probe)):
        pass
    for name, args in nvml.calls:
        inspect.signature(getattr(real, name)).bind(*args)
    missing = names_used() - {name for name, _ in nvml.calls}
    missing = {n for n in missing if n.startswith("nvml")}
    assert missing == {"nvmlInit", "nvmlDeviceGetCurrentClocksThrottleReasons"}


def test_reasons_are_those_of_the_real_binding() -> None:
    real = pytest.importorskip("pynvml")
    bits = {v for k, v in vars(real).items() if re.match(r"nvmlClocks(Event|Throttle)Reason(?!All|None)", k)}
    assert bits == set(REASONS)
    assert decoded(0x4 | 0x8000) == ("power cap", "0x8000")
    assert decoded(0) == ()


def test_without_a_driver_the_real_binding_says_so() -> None:
    real = pytest.importorskip("pynvml")
    try:
        real.nvmlInit()
    except real.NVMLError:
        with pytest.raises(
            BackendUnavailable, match=r"no NVIDIA driver answers here \(NVML Shared Library Not Found\)"
        ):
            find()
        gpus, why = nvidia.gpus()
        assert (gpus, "no NVIDIA driver answers" in why) == ((), True)
    else:
        pytest.skip("there is a driver here")


def test_without_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailable, match="pip install nvidia-ml-py"):
        find()


@pytest.mark.gpu
def test_a_real_gpu_is_named() -> None:
    gpu = find().gpu()
    assert gpu.name
    assert gpu.driver
    assert gpu.memory_bytes


# ---------------------------------------------------------------- which GPU


@pytest.mark.parametrize(
    ("visible", "order", "expected"),
    [
        (None, "PCI_BUS_ID", 2),  # the last in NVML's order is on the first bus
        ("0", "PCI_BUS_ID", 2),
        ("2,0", "PCI_BUS_ID", 0),
        ("GPU-1aaa", None, 1),
        ("GPU-0", None, 0),
    ],
)
def test_the_gpu_is_the_one_that_cuda_puts_first(
    visible: str | None, order: str | None, expected: int
) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    assert find(Nvml(3), {k: v for k, v in environ.items() if v is not None}).handle == Handle(expected)


def test_where_the_order_is_open_it_is_not_guessed() -> None:
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        with pytest.raises(InvalidInput, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            find(Nvml(2), visible)
    assert find(Nvml(1), {"CUDA_VISIBLE_DEVICES": "0"}).handle == Handle(0)


@pytest.mark.parametrize("visible", ["", "-1", "1", "NoDevFiles", "GPU-9"])
def test_hidden_gpus(visible: str) -> None:
    with pytest.raises(BackendUnavailable, match="CUDA_VISIBLE_DEVICES"):
        find(Nvml(), {"CUDA_VISIBLE_DEVICES": visible})


def test_a_driver_without_gpus() -> None:
    for nvml in (Nvml(0), Nvml(fails={"nvmlDeviceGetHandleByIndex": NO_PERMISSION})):
        with pytest.raises(BackendUnavailable, match="shows no GPU to this process"):
            find(nvml, {})


def test_mig_instances_have_memory_of_their_own_and_clocks_of_the_whole() -> None:
    nvml = Nvml(instances=2)
    probe = find(nvml, {})
    assert probe.instance == Handle(0, 0)
    gpu = probe.gpu()
    assert (gpu.mig, gpu.mig_mode, gpu.uuid, gpu.chip) == (
        "1g.6gb",
        True,
        "MIG-00bbb",
        "NVIDIA Test 0 MIG 1g.6gb",
    )
    assert gpu.memory_bytes == 6 * GIB
    asked = dict(nvml.calls)
    assert asked["nvmlDeviceGetClockInfo"][0] == asked["nvmlDeviceGetPowerUsage"][0] == Handle(0)
    assert asked["nvmlDeviceGetComputeRunningProcesses"] == (Handle(0, 0),)
    assert find(nvml, {"CUDA_VISIBLE_DEVICES": "MIG-01"}).instance == Handle(0, 1)
    assert find(nvml, {"CUDA_VISIBLE_DEVICES": "GPU-0"}).instance == Handle(0, 0)
    assert [p.instance for p in every(Nvml(2, instances=2))] == [None, Handle(0, 0), Handle(0, 1)]
    assert probe.meter() == (
        None,
        "NVML counts the energy of the whole GPU, and this process has a MIG instance of it",
    )
    with pytest.raises(InvalidInput, match="MIG instance"):
        sustained_mhz(probe)


def test_a_backend_on_a_gpu_has_the_gpu_as_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        name, gpu = "mine", True

    class OnCpu:
        name = "other"

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    found = device.fingerprint_for(OnGpu())  # type: ignore[arg-type]
    assert isinstance(found, nvidia.Gpu)
    assert (found.id, found.host) == (find(Nvml(), {}).gpu().id, device.fingerprint().chip)
    assert device.fingerprint_for(OnCpu()).id == device.fingerprint().id  # type: ignore[arg-type]
    assert device.clocks_to_lock(OnGpu()) == 1410  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="other runs on the CPU; go without --lock-clocks"):
        device.clocks_to_lock(OnCpu())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailable, match="nvidia-ml-py"):
        device.fingerprint_for(OnGpu())  # type: ignore[arg-type]


def test_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = find_energy(gpu=True).meter
    assert meter is not None
    before, nvml.millijoules = meter(), 5250
    assert meter() - before == pytest.approx(0.25)
    for fails, said in (
        ({"nvmlInit": 9}, "error 9"),
        ({"nvmlDeviceGetTotalEnergyConsumption": NOT_SUPPORTED}, "Not Supported"),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", Nvml(fails=fails))
        assert find_energy(gpu=True).meter is None
        assert said in find_energy(gpu=True).reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in find_energy(gpu=True).reason


# ---------------------------------------------------------------- clocks


def test_the_clock_is_one_that_the_gpu_should_keep() -> None:
    unrated = {"nvmlDeviceGetDefaultApplicationsClock": NOT_SUPPORTED}
    assert sustained_mhz(find(Nvml(), {})) == 1410
    assert sustained_mhz(find(Nvml(fails=unrated), {})) == 1575  # the highest step within 75 % of 2100
    stepless = {**unrated, "nvmlDeviceGetSupportedGraphicsClocks": NOT_SUPPORTED}
    assert sustained_mhz(find(Nvml(fails=stepless), {})) == 1575
    with pytest.raises(BackendUnavailable, match="no clock to lock this GPU to: Not Supported"):
        sustained_mhz(find(Nvml(fails={**unrated, "nvmlDeviceGetMaxClockInfo": NOT_SUPPORTED}), {}))


def test_clocks_are_let_go_at_the_end_and_on_exceptions() -> None:
    nvml = Nvml()
    before = signal.getsignal(signal.SIGTERM)
    with lock_clocks(find(nvml, {}), 1410):
        assert nvml.locked == 1410
        assert signal.getsignal(signal.SIGTERM) != before
    assert nvml.locked is None
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ZeroDivisionError), lock_clocks(find(nvml, {}), 1410):
        raise ZeroDivisionError
    assert nvml.locked is None
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("error", "said"), [(NO_PERMISSION, "takes root"), (NOT_SUPPORTED, "since Volta")])
def test_clocks_that_may_not_be_locked(error: int, said: str) -> None:
    nvml = Nvml(fails={"nvmlDeviceSetGpuLockedClocks": error, "nvmlDeviceResetGpuLockedClocks": error})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(BackendUnavailable, match=said), lock_clocks(find(nvml, {}), 1410):
        pytest.fail("measured, though the clock is free")
    assert signal.getsignal(signal.SIGTERM) == before


def test_clocks_that_stay_locked_are_told() -> None:
    nvml = Nvml(fails={"nvmlDeviceResetGpuLockedClocks": 999})
    with (
        pytest.raises(BackendUnavailable, match="nvidia-smi --reset-gpu-clocks"),
        lock_clocks(find(nvml, {}), 1410),
    ):
        pass


def test_clocks_are_locked_in_the_main_thread_only() -> None:
    nvml, errors = Nvml(), []

    def work() -> None:
        try:
            with lock_clocks(find(nvml, {}), 1410):
                pass
        except InvalidInput as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
    assert "nvmlDeviceSetGpuLockedClocks" not in dict(nvml.calls)


RETURNS = """
import os, signal
from simulated_nvml import Nvml
from hwsearch.device.clocks import lock_clocks
from hwsearch.device.nvidia import find
nvml, seen = Nvml(), []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append((int(number), nvml.locked)))
with lock_clocks(find(nvml, {}), 1410):
    signal.raise_signal(signal.SIGTERM)
    print(seen, nvml.locked)
    signal.raise_signal(signal.SIGTERM)
    print(len(seen))
print(nvml.locked)
signal.raise_signal(signal.SIGTERM)
print(len(seen))
"""


def test_a_handler_that_returns_finds_the_clock_free_and_leaves_it_locked() -> None:
    number = int(signal.SIGTERM)
    assert _run(RETURNS) == [f"[({number}, None)] 1410", "2", "None", "3"]


WHILE_LETTING_GO = """
import signal
from simulated_nvml import Nvml
from hwsearch.device.clocks import lock_clocks
from hwsearch.device.nvidia import find
nvml, seen, times = Nvml(), [], []
let_go = nvml.answers["nvmlDeviceResetGpuLockedClocks"]

def interrupted(handle):
    let_go(handle)
    times.append(len(seen))
    if len(times) == 1:
        signal.raise_signal(signal.SIGTERM)

nvml.answers["nvmlDeviceResetGpuLockedClocks"] = interrupted
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(int(number)))
with lock_clocks(find(nvml, {}), 1410):
    pass
print(seen, nvml.locked)
"""


def test_a_signal_while_the_clock_is_let_go_does_not_lock_it_again() -> None:
    assert _run(WHILE_LETTING_GO) == [f"[{int(signal.SIGTERM)}] None"]


def _run(script: str) -> list[str]:
    """The lines that a script prints in a process of its own, which is all that a signal gone astray could end."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SCRIPT = """
import signal, sys, time
from pathlib import Path
from simulated_nvml import Nvml
from hwsearch.device.clocks import lock_clocks
from hwsearch.device.nvidia import find
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:  # whoever runs the tests in the background has them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
with lock_clocks(find(Nvml(log=Path(sys.argv[1])), {}), 1410):
    print("locked", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("number", "handler", "code", "seconds"),
    [
        (signal.SIGTERM, "default", -signal.SIGTERM, 60),
        (signal.SIGHUP, "default", -signal.SIGHUP, 60),
        (
            signal.SIGINT,
            "default",
            -signal.SIGINT,
            60,
        ),  # KeyboardInterrupt, which Python ends in the signal itself
        (signal.SIGTERM, "ignored", 0, 1),
    ],
)
def test_a_signal_that_ends_the_process_lets_go_first(
    tmp_path: Path, number: int, handler: str, code: int, seconds: float
) -> None:
    log = tmp_path / "clocks"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(log), handler, str(seconds)], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert log.read_text().split() == ["1410"]
        process.send_signal(number)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.communicate()
    assert log.read_text().split()[0] == "1410"
    assert log.read_text().split()[-1] == "None"

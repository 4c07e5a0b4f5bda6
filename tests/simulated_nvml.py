"""A module in the place of `pynvml`: GPUs that answer, or refuse to, function by function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 4, 13, 15
GIB = 2**30


@dataclass(frozen=True)
class Handle:
    """Of a GPU, or of a MIG instance of one."""

    gpu: int
    instance: int | None = None


class Nvml(ModuleType):
    """fails: function -> NVML's error. instances: how many MIG instances the first GPU is divided into. log: a file that gets
    a line each time clocks are locked and let go."""

    NVML_CLOCK_GRAPHICS, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2
    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = NOT_SUPPORTED, NO_PERMISSION
    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = GPU_IS_LOST, 16

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__({3: "Not Supported", 4: "Insufficient Permissions"}.get(value, f"error {value}"))
            self.value = value

    def __init__(
        self,
        gpus: int = 1,
        fails: Mapping[str, int] | None = None,
        instances: int = 0,
        log: Path | None = None,
    ) -> None:
        super().__init__("pynvml")
        self.gpus, self.fails, self.instances, self.log = gpus, dict(fails or {}), instances, log
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.locked: int | None = None
        self.millijoules = 5000
        self.throttle = 0x1
        self.pids = (1, 4242)
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: self.gpus,
            "nvmlDeviceGetHandleByIndex": Handle,
            # the second GPU sits on a bus before the first
            "nvmlDeviceGetPciInfo": lambda h: SimpleNamespace(busId=f"00000000:{9 - h.gpu:02X}:00.0"),
            "nvmlDeviceGetName": lambda h: f"NVIDIA Test {h.gpu}",
            "nvmlDeviceGetUUID": lambda h: (
                f"GPU-{h.gpu}aaa" if h.instance is None else f"MIG-{h.gpu}{h.instance}bbb"
            ),
            "nvmlDeviceGetCudaComputeCapability": lambda h: (8, 6),
            "nvmlSystemGetDriverVersion": lambda: "570.12",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12080,
            "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(
                total=(24 if h.instance is None else 6) * GIB, free=5 * GIB, used=GIB
            ),
            "nvmlDeviceGetMaxClockInfo": lambda h, clock: {0: 2100, 1: 2100, 2: 9501}[clock],
            "nvmlDeviceGetApplicationsClock": lambda h, clock: {1: 1695, 2: 9251}[clock],
            "nvmlDeviceGetDefaultApplicationsClock": lambda h, clock: 1410,
            "nvmlDeviceGetSupportedGraphicsClocks": lambda h, memory: [2100, 1580, 1575, 1560, 300],
            "nvmlDeviceGetClockInfo": lambda h, clock: {1: self.locked or 1980, 2: 9251}[clock],
            "nvmlDeviceGetPowerUsage": lambda h: 123_400,
            "nvmlDeviceGetEnforcedPowerLimit": lambda h: 350_000,
            "nvmlDeviceGetTemperature": lambda h, sensor: 61,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda h: self.throttle,
            "nvmlDeviceGetEccMode": lambda h: [1, 1],
            "nvmlDeviceGetMigMode": lambda h: [int(self.instances > 0 and h.gpu == 0), 0],
            "nvmlDeviceGetMaxMigDeviceCount": lambda h: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._instance,
            "nvmlDeviceGetAttributes_v2": lambda h: SimpleNamespace(
                computeInstanceSliceCount=1, gpuInstanceSliceCount=1, memorySizeMB=5952
            ),
            "nvmlDeviceGetPersistenceMode": lambda h: 0,
            "nvmlDeviceGetComputeRunningProcesses": lambda h: [
                SimpleNamespace(pid=pid, usedGpuMemory=None if pid == 1 else 300) for pid in self.pids
            ],
            "nvmlDeviceGetTotalEnergyConsumption": lambda h: self.millijoules,
            "nvmlDeviceSetGpuLockedClocks": self._lock,
            "nvmlDeviceResetGpuLockedClocks": lambda h: self._lock(h, None, None),
        }

    def _instance(self, handle: Handle, index: int) -> Handle:
        if not index % 2 or index // 2 >= self.instances:  # the places between are empty
            raise self.NVMLError(6)
        return Handle(handle.gpu, index // 2)

    def _lock(self, handle: Handle, least: int | None, most: int | None) -> None:
        assert handle.instance is None
        assert least == most
        self.locked = most
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{most}\n")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.answers:
            raise AttributeError(name)

        def asked(*args: Any) -> Any:
            self.calls.append((name, args))
            if name in self.fails:
                raise self.NVMLError(self.fails[name])
            return self.answers[name](*args)

        return asked


def install(nvml: ModuleType) -> None:
    """For a script; tests put it there with monkeypatch."""
    sys.modules["pynvml"] = nvml

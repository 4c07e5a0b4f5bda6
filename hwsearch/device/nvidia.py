"""NVIDIA GPUs through NVML: which one CUDA runs on, what it is, and the state it is in.

Every question is asked by itself. What a GPU, a driver or a permission does not answer is absent (None, and left out of
JSON), never zero. Source: NVIDIA's NVML API reference, by its binding nvidia-ml-py (module `pynvml`).

Read on an H100 (docs/gpu_trial.md): what a GPU is, its states, and how often its counter of energy moves. Tests hold it
against a simulated `pynvml`, the names and arguments of the real one, and the real one's error where there is no driver.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hwsearch.errors import BackendUnavailable, InvalidInput

REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""NVML's bits of why clocks are not at their highest (nvmlClocksEventReasons)."""
MEANT = ("idle", "application clocks", "display clocks")
"""Reasons that are somebody's setting or nobody's work: they slow no measurement down unawares."""
_GONE = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED")


@dataclass(frozen=True)
class State:
    """How a GPU was just then: clocks in MHz, power in W (NVML averages it, over up to a second), temperature in °C.

    throttle: why clocks were not at their highest (values of `REASONS`; empty where nothing held them). None: not told.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: tuple[str, ...] | None = None

    @property
    def slowed(self) -> tuple[str, ...]:
        """Reasons that make times of this moment hold for this moment only."""
        return tuple(r for r in self.throttle or () if r not in MEANT)

    def to_json(self) -> dict[str, Any]:
        """Without what is not told."""
        return _known(asdict(self))

    def __str__(self) -> str:
        parts = [
            "" if self.sm_mhz is None else f"{self.sm_mhz} MHz",
            "" if self.memory_mhz is None else f"memory {self.memory_mhz} MHz",
            "" if self.power_w is None else f"{self.power_w:.0f} W",
            "" if self.temperature_c is None else f"{self.temperature_c} °C",
            f"clocks held down by {' and '.join(self.throttle)}" if self.throttle else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, repr=False)
class Gpu:
    """A GPU, or one MIG instance of it, as `fingerprint.Device` is a CPU. Of all but the name, None is what is not told.

    The stable fields make the `id` that tables belong to: name, compute_capability (`8.6`), memory (in whole GiB; of a MIG
    instance its own), driver and mig (the instance's profile, `1g.10gb`). The rest is kept for the reader: cuda (the newest
    that the driver runs), the highest and the application clocks in MHz, power_limit_w, ecc, mig_mode, persistence,
    processes (pid and bytes of those that compute on it, this one among them if it does), host (the CPU), and the state.
    not_told: field -> NVML's reason.
    """

    name: str
    uuid: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None
    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    sm_max_mhz: int | None = None
    memory_max_mhz: int | None = None
    sm_application_mhz: int | None = None
    memory_application_mhz: int | None = None
    power_limit_w: float | None = None
    ecc: bool | None = None
    mig_mode: bool | None = None
    mig: str | None = None
    persistence: bool | None = None
    processes: tuple[tuple[int, int | None], ...] | None = None
    host: str | None = None
    state: State = State()
    not_told: Mapping[str, str] = field(default_factory=dict)

    @property
    def chip(self) -> str:
        """What tables and reports call the device."""
        return f"{self.name} MIG {self.mig}" if self.mig and "MIG" not in self.name else self.name

    @property
    def id(self) -> str:
        """Short hash of the stable fields."""
        gib = None if self.memory_bytes is None else round(self.memory_bytes / 2**30)
        stable = ("gpu", self.name, self.compute_capability, gib, self.driver, self.mig)
        return hashlib.sha256(json.dumps(stable).encode()).hexdigest()[:12]

    @property
    def others(self) -> int | None:
        """Processes that compute on it beside this one (in a container this one may have another number, and be counted)."""
        if self.processes is None:
            return None
        return sum(pid != os.getpid() for pid, _ in self.processes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form, without what is not told."""
        own = {k: v for k, v in asdict(self).items() if k not in ("state", "not_told", "processes")}
        found = {"id": self.id, "chip": self.chip, "kind": "gpu", **_known(own), "state": self.state.to_json()}
        if self.processes is not None:
            found["processes"] = [_known({"pid": pid, "memory_bytes": used}) for pid, used in self.processes]
        return found

    def __repr__(self) -> str:
        return f"Gpu({self.id}: {self})"

    def __str__(self) -> str:
        def switch(what: str, on: bool | None) -> str:
            return "" if on is None else f"{what} {'on' if on else 'off'}"

        parts = [
            self.chip,
            "" if self.compute_capability is None else f"SM {self.compute_capability}",
            "" if self.memory_bytes is None else f"{self.memory_bytes / 2**30:.1f} GiB",
            "" if self.driver is None else f"driver {self.driver}",
            "" if self.cuda is None else f"CUDA {self.cuda}",
            "" if self.sm_max_mhz is None else f"at most {self.sm_max_mhz} MHz",
            "" if self.power_limit_w is None else f"at most {self.power_limit_w:.0f} W",
            switch("ECC", self.ecc),
            switch("persistence", self.persistence),
            "" if not self.others else f"{self.others} other process(es) on it",
            f"now {self.state}" if str(self.state) else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Probe:
    """What NVML is asked about: a GPU, and the MIG instance of it that CUDA sees where there is one.

    nvml: the module `pynvml`, initialised. handle: NVML's of the whole GPU, which clocks, power and temperature are of.
    """

    nvml: Any
    handle: Any
    instance: Any = None

    def gpu(self) -> Gpu:
        """All that NVML tells. Raises BackendUnavailable where the GPU is lost or has no name."""
        ask, nvml, whole = Questions(self.nvml), self.nvml, self.handle
        part = self.instance or whole
        name = ask("name", "nvmlDeviceGetName", whole)
        if name is None:
            raise BackendUnavailable(f"NVML does not name the GPU: {ask.not_told['name']}")
        memory = ask("memory_bytes", "nvmlDeviceGetMemoryInfo", part)
        return Gpu(
            name=name,
            uuid=ask("uuid", "nvmlDeviceGetUUID", part),
            compute_capability=ask(
                "compute_capability",
                "nvmlDeviceGetCudaComputeCapability",
                whole,
                of=lambda v: f"{v[0]}.{v[1]}",
            ),
            driver=ask("driver", "nvmlSystemGetDriverVersion"),
            cuda=ask(
                "cuda", "nvmlSystemGetCudaDriverVersion_v2", of=lambda v: f"{v // 1000}.{v % 1000 // 10}"
            ),
            memory_bytes=None if memory is None else int(memory.total),
            memory_free_bytes=None if memory is None else int(memory.free),
            sm_max_mhz=ask("sm_max_mhz", "nvmlDeviceGetMaxClockInfo", whole, nvml.NVML_CLOCK_SM),
            memory_max_mhz=ask("memory_max_mhz", "nvmlDeviceGetMaxClockInfo", whole, nvml.NVML_CLOCK_MEM),
            sm_application_mhz=ask(
                "sm_application_mhz", "nvmlDeviceGetApplicationsClock", whole, nvml.NVML_CLOCK_SM
            ),
            memory_application_mhz=ask(
                "memory_application_mhz", "nvmlDeviceGetApplicationsClock", whole, nvml.NVML_CLOCK_MEM
            ),
            power_limit_w=ask("power_limit_w", "nvmlDeviceGetEnforcedPowerLimit", whole, of=_watts),
            ecc=ask("ecc", "nvmlDeviceGetEccMode", whole, of=lambda v: bool(v[0])),
            mig_mode=ask("mig_mode", "nvmlDeviceGetMigMode", whole, of=lambda v: bool(v[0])),
            mig=ask("mig", "nvmlDeviceGetAttributes_v2", self.instance, of=_profile)
            if self.instance
            else None,
            persistence=ask("persistence", "nvmlDeviceGetPersistenceMode", whole, of=bool),
            processes=ask("processes", "nvmlDeviceGetComputeRunningProcesses", part, of=_processes),
            state=self._state(ask),
            not_told=ask.not_told,
        )

    def state(self) -> State:
        """Clocks, power, temperature and what holds the clocks down, now: of the whole GPU."""
        return self._state(Questions(self.nvml))

    def _state(self, ask: Questions) -> State:
        nvml, whole = self.nvml, self.handle
        throttle = ask("throttle", "nvmlDeviceGetCurrentClocksEventReasons", whole, of=decoded)
        if throttle is None:  # its name before driver 535
            throttle = ask("throttle", "nvmlDeviceGetCurrentClocksThrottleReasons", whole, of=decoded)
        return State(
            sm_mhz=ask("sm_mhz", "nvmlDeviceGetClockInfo", whole, nvml.NVML_CLOCK_SM),
            memory_mhz=ask("memory_mhz", "nvmlDeviceGetClockInfo", whole, nvml.NVML_CLOCK_MEM),
            power_w=ask("power_w", "nvmlDeviceGetPowerUsage", whole, of=_watts),
            temperature_c=ask("temperature_c", "nvmlDeviceGetTemperature", whole, nvml.NVML_TEMPERATURE_GPU),
            throttle=throttle,
        )

    def meter(self) -> tuple[EnergyCounter | None, str]:
        """(joules since the driver was loaded, or None, and then why not). A counter of the whole GPU."""
        if self.instance is not None:
            return None, "NVML counts the energy of the whole GPU, and this process has a MIG instance of it"
        ask = Questions(self.nvml)
        if ask("energy", "nvmlDeviceGetTotalEnergyConsumption", self.handle) is None:
            return None, f"NVML tells no energy of this GPU: {ask.not_told['energy']}"
        return EnergyCounter(self.nvml, self.handle), ""


@dataclass(frozen=True)
class EnergyCounter:
    """Joules of the whole GPU since the driver was loaded. tick_s: between two moves of the counter (100 ms on an H100)."""

    nvml: Any
    handle: Any
    tick_s: float = 0.1

    def __call__(self) -> float:
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3


def find(nvml: Any = None, environ: Mapping[str, str] = os.environ) -> Probe:
    """The GPU that CUDA calls device 0 in this process. nvml: in place of the module `pynvml`.

    Raises BackendUnavailable without nvidia-ml-py, driver or GPU; InvalidInput where several GPUs are there and the
    environment leaves CUDA's order open: NVML's is another one.
    """
    nvml = nvml or _started()
    handles = _by_bus(nvml)
    asked = environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if asked is None else asked.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return _by_uuid(nvml, handles, first)
    if not first.isdigit() or int(first) >= len(handles):
        raise BackendUnavailable(
            f"CUDA_VISIBLE_DEVICES={asked!r} hides every one of the {len(handles)} GPU(s) here; unset it, or name one of them"
        )
    if len(handles) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise InvalidInput(
            f"there are {len(handles)} GPUs, and which of them CUDA puts first is not said; set CUDA_DEVICE_ORDER=PCI_BUS_ID "
            "(and CUDA_VISIBLE_DEVICES to the one to use), or CUDA_VISIBLE_DEVICES to its UUID: `hwsearch devices` lists them"
        )
    handle = handles[int(first)]
    return Probe(nvml, handle, next(iter(_instances(nvml, handle)), None))


def mps_share(environ: Mapping[str, str] = os.environ) -> float:
    """Percentage of the GPU's threads that CUDA's multi-process service (MPS) leaves to this process; 0 where it says nothing.

    As CUDA reads it: from CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, which counts where an MPS server runs. Raises InvalidInput on
    what is no percentage.
    """
    said = environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "").strip()
    if not said:
        return 0.0
    try:
        share = float(said)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 100.0:
        raise InvalidInput(
            f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE is {said!r}; set it to a number above 0 and up to 100, or unset it"
        )
    return share


def every(nvml: Any = None) -> list[Probe]:
    """All GPUs of the machine in the order of their buses, of those in MIG mode each instance. Raises BackendUnavailable."""
    nvml = nvml or _started()
    probes = []
    for handle in _by_bus(nvml):
        instances = _instances(nvml, handle)
        probes += [Probe(nvml, handle, i) for i in instances] or [Probe(nvml, handle)]
    return probes


def gpus() -> tuple[tuple[Gpu, ...], str]:
    """(all GPUs of the machine, nothing), or (nothing, why there are none)."""
    try:
        return tuple(probe.gpu() for probe in every()), ""
    except BackendUnavailable as error:
        return (), str(error)


def decoded(bits: int) -> tuple[str, ...]:
    """NVML's bit mask in words; bits that are not known here in hexadecimal."""
    named = [name for bit, name in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return (*named, *([hex(rest)] if rest else []))


# ---------------------------------------------------------------- asking


class Questions:
    """Asks NVML one thing at a time, and keeps why an answer is missing."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.not_told: dict[str, str] = {}

    def __call__(self, what: str, function: str, *args: Any, of: Callable[[Any], Any] = lambda v: v) -> Any:
        """The answer, put through `of`; None where there is none. Raises BackendUnavailable where the GPU is gone."""
        asked = getattr(self.nvml, function, None)
        if asked is None:
            self.not_told[what] = f"this nvidia-ml-py has no {function}"
            return None
        try:
            answer = asked(*args)
        except self.nvml.NVMLError as error:
            if getattr(error, "value", None) in [getattr(self.nvml, name) for name in _GONE]:
                raise BackendUnavailable(
                    f"the GPU does not answer any more ({error}); reset it or restart the machine, and look into `dmesg`"
                ) from error
            self.not_told[what] = str(error)
            return None
        self.not_told.pop(what, None)
        return of(answer)


def _started() -> Any:
    """The module, initialised. Raises BackendUnavailable."""
    try:
        import pynvml
    except ImportError as error:
        raise BackendUnavailable(
            "NVML cannot be asked about GPUs: pynvml is not installed; install it with: pip install nvidia-ml-py"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise BackendUnavailable(
            f"no NVIDIA driver answers here ({error}); it takes an NVIDIA GPU and its driver, and in a container the GPU passed "
            "on (docker run --gpus all)"
        ) from error
    return pynvml


def _by_bus(nvml: Any) -> list[Any]:
    """Handles in the order of their PCI buses, which is CUDA's under PCI_BUS_ID. Raises BackendUnavailable on none."""
    ask = Questions(nvml)
    count = ask("count", "nvmlDeviceGetCount") or 0
    handles = [ask("GPU", "nvmlDeviceGetHandleByIndex", i) for i in range(count)]
    found = [h for h in handles if h is not None]
    if not found:
        why = "; ".join(ask.not_told.values()) or "it counts none"
        raise BackendUnavailable(f"the NVIDIA driver shows no GPU to this process: {why}")
    buses = [ask("bus", "nvmlDeviceGetPciInfo", h, of=lambda v: str(v.busId)) for h in found]
    order = sorted(range(len(found)), key=lambda i: (buses[i] or "", i))
    return [found[i] for i in order]


def _by_uuid(nvml: Any, handles: list[Any], wanted: str) -> Probe:
    """CUDA takes the beginning of a UUID for the whole, where only one begins like that."""
    ask = Questions(nvml)
    probes = [Probe(nvml, h) for h in handles]
    if wanted.startswith("MIG-"):
        probes = [Probe(nvml, h, i) for h in handles for i in _instances(nvml, h)]
    for probe in probes:
        uuid = ask("uuid", "nvmlDeviceGetUUID", probe.instance or probe.handle)
        if uuid is not None and uuid.startswith(wanted):
            inside = None if probe.instance else next(iter(_instances(nvml, probe.handle)), None)
            return Probe(nvml, probe.handle, probe.instance or inside)
    raise BackendUnavailable(
        f"CUDA_VISIBLE_DEVICES names {wanted}, and no GPU here has that UUID; `hwsearch devices` lists them"
    )


def _instances(nvml: Any, handle: Any) -> list[Any]:
    """MIG instances of a GPU; none where it is not divided."""
    ask = Questions(nvml)
    mode = ask("mode", "nvmlDeviceGetMigMode", handle)
    if not mode or not mode[0]:
        return []
    count = ask("count", "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    found = [ask("instance", "nvmlDeviceGetMigDeviceHandleByIndex", handle, i) for i in range(count)]
    return [instance for instance in found if instance is not None]


def _watts(milliwatts: int) -> float:
    return milliwatts / 1e3


def _profile(attributes: Any) -> str:
    """`1g.10gb`, or `1c.2g.20gb` of a part of an instance's compute slices, as NVIDIA's MIG guide names profiles."""
    compute, slices = int(attributes.computeInstanceSliceCount), int(attributes.gpuInstanceSliceCount)
    part = f"{compute}c." if compute < slices else ""
    return f"{part}{slices}g.{math.ceil(attributes.memorySizeMB / 1024)}gb"


def _processes(processes: Any) -> tuple[tuple[int, int | None], ...]:
    return tuple((int(p.pid), None if p.usedGpuMemory is None else int(p.usedGpuMemory)) for p in processes)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in fields.items()
        if value is not None
    }

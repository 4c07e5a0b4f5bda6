"""The machine that is measured: its fingerprint.

Source: proc(5) and the kernel's cpufreq documentation on Linux; sysctl on macOS; `platform` elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.device import clocks, nvidia
from hwsearch.errors import InvalidInput

if TYPE_CHECKING:
    from hwsearch.backends.base import Backend

_ISA = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *(
        "neon",
        "asimd",
        "asimdhp",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
        "svei8mm",
        "svebf16",
        "sme",
        "sme2",
    ),
)
"""CPU flags, as Linux spells them, that decide which kernels a runtime picks."""

_SYSCTL_ISA = {
    "avx1_0": "avx", "avx2_0": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512f", "avx512vnni": "avx512_vnni",
    "neon": "asimd", "FEAT_FP16": "asimdhp", "FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16",
    "FEAT_SME": "sme", "FEAT_SME2": "sme2",
}  # fmt: skip

_ARM_IMPLEMENTERS = {
    "0x41": "Arm", "0x42": "Broadcom", "0x43": "Cavium", "0x46": "Fujitsu", "0x48": "HiSilicon", "0x4e": "NVIDIA",
    "0x51": "Qualcomm", "0x53": "Samsung", "0x61": "Apple", "0x6d": "Microsoft", "0xc0": "Ampere",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Device:
    """A CPU, with what decides how fast compiled code runs on it, and the state it was in when it was read.

    The stable fields make the `id`, and tables belong to that: chip, vendor, revision (family-model-stepping; on Arm
    part-variant-revision), architecture, isa (flags as Linux spells them, sorted), cores, cpus (logical), system,
    and whether there is a hypervisor. The rest is kept for the reader: memory_bytes, kernel, hypervisor (its name),
    governor, turbo, clock_mhz (of the first CPU, just then); None is what the machine does not tell.
    """

    chip: str
    vendor: str = ""
    revision: str = ""
    architecture: str = ""
    isa: tuple[str, ...] = ()
    cores: int = 1
    cpus: int = 1
    system: str = ""
    hypervisor: str | None = None
    memory_bytes: int | None = None
    kernel: str = ""
    governor: str | None = None
    turbo: bool | None = None
    clock_mhz: float | None = None

    @property
    def id(self) -> str:
        """Short hash of the stable fields."""
        stable = (self.chip, self.vendor, self.revision, self.architecture, sorted(self.isa), self.cores, self.cpus,
                  self.system, self.hypervisor is not None)  # fmt: skip
        return hashlib.sha256(json.dumps(stable).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form, `id` included; `from_json` is its inverse."""
        return {"id": self.id, **asdict(self), "isa": list(self.isa)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Device:
        """Inverse of `to_json`; the `id` is worked out anew. Raises KeyError or TypeError on anything else."""
        fields = {key: value for key, value in data.items() if key != "id"}
        return Device(**{**fields, "isa": tuple(data["isa"])})

    def __repr__(self) -> str:
        return f"Device({self.id}: {self})"

    def __str__(self) -> str:
        parts = [
            f"{self.chip} {self.revision}".strip(),
            f"{self.cores} cores" + (f" ({self.cpus} threads)" if self.cpus != self.cores else ""),
            " ".join(self.isa),
            "" if self.memory_bytes is None else f"{self.memory_bytes / 2**30:.1f} GiB",
            f"{self.system} {self.kernel}".strip(),
            "" if self.hypervisor is None else f"under {self.hypervisor}",
            "" if self.governor is None else f"governor {self.governor}",
            "" if self.turbo is None else f"turbo {'on' if self.turbo else 'off'}",
            "" if self.clock_mhz is None else f"{self.clock_mhz:.0f} MHz",
        ]
        return ", ".join(part for part in parts if part)


def fingerprint() -> Device:
    """The machine that this process runs on. What cannot be read is left out, never an error."""
    system = platform.system()
    if system == "Linux":
        return _linux(Path("/"))
    known = _darwin() if system == "Darwin" else {}
    cpus = os.cpu_count() or 1
    common = {
        "chip": platform.processor() or platform.machine() or "unknown CPU",
        "architecture": platform.machine(),
        "cores": cpus,
        "cpus": cpus,
        "system": system,
        "kernel": platform.release(),
    }
    return Device(**{**common, **known})


def on_gpu(backend: Backend) -> bool:
    """Whether a backend says that it runs on an NVIDIA GPU (`gpu = True`), and not on this CPU."""
    return bool(getattr(backend, "gpu", False))


def fingerprint_for(backend: Backend) -> Device | nvidia.Gpu:
    """What a backend runs on: this machine's CPU, or the GPU that CUDA puts first, with the CPU beside it by name.

    Raises BackendUnavailable or InvalidInput where a GPU cannot be named: no table is made of a device that nobody knows.
    """
    here = fingerprint()
    return replace(nvidia.find().gpu(), host=here.chip) if on_gpu(backend) else here


def clocks_to_lock(backend: Backend) -> int:
    """MHz to hold a backend's GPU at while it is measured. Raises InvalidInput where it runs on the CPU."""
    if not on_gpu(backend):
        raise InvalidInput(
            f"clocks can be locked of NVIDIA GPUs only, and {backend.name} runs on the CPU; go without --lock-clocks"
        )
    return clocks.sustained_mhz(nvidia.find())


def cache_dir() -> Path:
    """`$HWSEARCH_CACHE`, by default `~/.cache/hwsearch`; it need not exist."""
    root = os.environ.get("HWSEARCH_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "hwsearch"


def _linux(root: Path) -> Device:
    """Reads proc and sys under `root`."""
    first, *rest = _processors(_read(root / "proc/cpuinfo")) or [{}]
    flags = set(first.get("flags", first.get("Features", "")).split())
    cpus = 1 + len(rest)
    cores = {(p.get("physical id"), p["core id"]) for p in (first, *rest) if "core id" in p}
    parts = sorted({part for p in (first, *rest) if (part := _arm_part(p))})
    board = _read(root / "sys/firmware/devicetree/base/model").strip("\0\n ")
    arm = " + ".join(parts) + (f" ({board})" if board else "") if parts else board
    implementer = first.get("CPU implementer", "")
    revision = [first.get(key) for key in ("cpu family", "model", "stepping")]
    if first.get("CPU part"):
        revision = [first.get(key) for key in ("CPU part", "CPU variant", "CPU revision")]
    return Device(
        chip=first.get("model name") or arm or platform.processor() or platform.machine() or "unknown CPU",
        vendor=first.get("vendor_id", _ARM_IMPLEMENTERS.get(implementer, implementer)),
        revision="-".join(part for part in revision if part),
        architecture=platform.machine(),
        isa=tuple(sorted(flags & set(_ISA))),
        cores=len(cores) or cpus,
        cpus=cpus,
        system="Linux",
        hypervisor=_hypervisor(root, "hypervisor" in flags),
        memory_bytes=_memory(_read(root / "proc/meminfo")),
        kernel=_read(root / "proc/sys/kernel/osrelease").strip(),
        governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        turbo=_turbo(root),
        clock_mhz=_clock(root, first),
    )


def _processors(cpuinfo: str) -> list[dict[str, str]]:
    """One dict for each processor; lines that belong to none (some Arm kernels end with them) are left out."""
    blocks = []
    for text in cpuinfo.split("\n\n"):
        pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        block = {key.strip(): value.strip() for key, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks


def _arm_part(processor: Mapping[str, str]) -> str:
    if "CPU part" not in processor:
        return ""
    implementer = processor.get("CPU implementer", "?")
    return f"{_ARM_IMPLEMENTERS.get(implementer, implementer)} {processor['CPU part']}"


def _hypervisor(root: Path, flagged: bool) -> str | None:
    """Name of the hypervisor; `flagged`: the CPU says that there is one (x86 only)."""
    kind = _read(root / "sys/hypervisor/type").strip()
    if kind:
        return kind
    product = " ".join(
        _read(root / f"sys/class/dmi/id/{key}").strip() for key in ("sys_vendor", "product_name")
    ).strip()
    virtual = any(
        word in product.lower()
        for word in ("kvm", "qemu", "vmware", "virtual", "amazon ec2", "google compute")
    )
    if flagged or virtual:
        return product if virtual else "a hypervisor"
    return None


def _memory(meminfo: str) -> int | None:
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _turbo(root: Path) -> bool | None:
    cpu = root / "sys/devices/system/cpu"
    off, boost = _read(cpu / "intel_pstate/no_turbo").strip(), _read(cpu / "cpufreq/boost").strip()
    return off == "0" if off else boost == "1" if boost else None


def _clock(root: Path, processor: Mapping[str, str]) -> float | None:
    khz = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq").strip()
    try:
        return float(khz) / 1e3 if khz else float(processor["cpu MHz"])
    except (KeyError, ValueError):
        return None


def _darwin() -> dict[str, Any]:
    try:
        text = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return _from_sysctl(text)


def _from_sysctl(text: str) -> dict[str, Any]:
    """Fields of a Device from what `sysctl -a` prints on macOS."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    names = (
        key.rsplit(".", 1)[1]
        for key, value in values.items()
        if key.startswith("hw.optional.") and value == "1"
    )
    revision = [values.get(f"machdep.cpu.{key}") for key in ("family", "model", "stepping")]
    known = {
        "chip": values.get("machdep.cpu.brand_string"),
        "vendor": values.get("machdep.cpu.vendor", "Apple"),
        "revision": "-".join(part for part in revision if part),
        "isa": tuple(sorted({_SYSCTL_ISA[name] for name in names if name in _SYSCTL_ISA})),
        "cores": int(values.get("hw.physicalcpu", 0)),
        "cpus": int(values.get("hw.logicalcpu", 0)),
        "memory_bytes": int(values.get("hw.memsize", 0)),
        "hypervisor": "a hypervisor" if values.get("kern.hv_vmm_present") == "1" else None,
    }
    return {key: value for key, value in known.items() if value}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

"""The fingerprint says the same thing twice, and what differs between two machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hwsearch.device import fingerprint as device
from hwsearch.device.fingerprint import Device, fingerprint


def test_fingerprint_is_stable_across_processes_and_json() -> None:
    here = fingerprint()
    assert here.id == fingerprint().id
    printed = subprocess.run(
        [sys.executable, "-c", "from hwsearch.device.fingerprint import fingerprint; print(fingerprint().id)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert printed.stdout.strip() == here.id
    back = Device.from_json(json.loads(json.dumps(here.to_json())))
    assert back == here
    assert back.id == here.to_json()["id"] == here.id
    assert here.chip
    assert here.cpus >= here.cores >= 1


def test_id_is_of_what_decides_speed_and_not_of_the_moment() -> None:
    one = Device(
        "chip", isa=("avx2", "fma"), cores=4, cpus=8, system="Linux", hypervisor="KVM", clock_mhz=2000.0
    )
    later = replace(one, clock_mhz=3100.0, governor="powersave", turbo=False, kernel="7.1", memory_bytes=1)
    assert one.id == later.id
    assert one.id == replace(one, isa=("fma", "avx2"), hypervisor="QEMU").id
    for change in ({"chip": "other"}, {"isa": ("avx2",)}, {"cores": 2}, {"cpus": 4}, {"hypervisor": None}):
        assert one.id != replace(one, **change).id
    assert "4 cores (8 threads)" in repr(one)
    assert one.id in repr(one)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_linux_x86(tmp_path: Path) -> None:
    cpu = (
        "processor\t: {}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon X\n"
    )
    cpu += "stepping\t: 8\ncpu MHz\t\t: 2000.5\nphysical id\t: 0\ncore id\t\t: {}\n"
    cpu += "flags\t\t: fpu sse avx2 amx_int8 hypervisor\n"
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "\n".join(cpu.format(i, i // 2) for i in range(4)),
            "proc/meminfo": "MemTotal:       2048 kB\nMemFree: 1 kB\n",
            "proc/sys/kernel/osrelease": "6.1.0\n",
            "sys/class/dmi/id/sys_vendor": "QEMU\n",
            "sys/class/dmi/id/product_name": "Standard PC\n",
            "sys/devices/system/cpu/intel_pstate/no_turbo": "1\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "3100000\n",
        },
    )
    found = device._linux(root)
    assert (found.chip, found.vendor, found.revision) == ("Xeon X", "GenuineIntel", "6-143-8")
    assert (found.cores, found.cpus, found.isa) == (2, 4, ("amx_int8", "avx2"))
    assert (found.hypervisor, found.governor, found.turbo) == ("QEMU Standard PC", "performance", False)
    assert (found.clock_mhz, found.memory_bytes, found.kernel) == (3100.0, 2048 * 1024, "6.1.0")


def test_linux_arm(tmp_path: Path) -> None:
    cpu = "processor\t: {}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm bf16 sve\nCPU implementer\t: 0x41\n"
    cpu += "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0xd40\nCPU revision\t: 1\n"
    text = "\n".join(cpu.format(i) for i in range(3)) + "\nModel\t\t: Some Board\n"
    root = write(tmp_path, {"proc/cpuinfo": text, "sys/firmware/devicetree/base/model": "Some Board\0"})
    found = device._linux(root)
    assert (found.chip, found.vendor, found.revision) == ("Arm 0xd40 (Some Board)", "Arm", "0xd40-0x1-1")
    assert (found.cores, found.cpus) == (3, 3)
    assert found.isa == ("asimd", "asimddp", "bf16", "i8mm", "sve")
    assert (found.hypervisor, found.turbo, found.clock_mhz, found.memory_bytes) == (None, None, None, None)


def test_linux_that_tells_nothing(tmp_path: Path) -> None:
    found = device._linux(tmp_path)
    assert found.chip
    assert (found.cores, found.cpus, found.isa) == (1, 1, ())


def test_macos() -> None:
    found = device._from_sysctl(
        "machdep.cpu.brand_string: Apple M2\nhw.physicalcpu: 8\nhw.logicalcpu: 8\nhw.memsize: 17179869184\n"
        "hw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_SME: 0\nhw.optional.neon: 1\nkern.hv_vmm_present: 0\n"
    )
    assert found == {
        "chip": "Apple M2", "vendor": "Apple", "isa": ("asimd", "i8mm"), "cores": 8, "cpus": 8,
        "memory_bytes": 17179869184,
    }  # fmt: skip
    assert Device(**found).cores == 8


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    found = fingerprint()
    assert found.chip
    assert found.cpus == os.cpu_count()

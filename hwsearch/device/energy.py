"""Counters of energy: RAPL of the CPU's packages, NVML of a GPU. Where a machine has none there is none: nothing is estimated.

A counter is of the whole package: of everything that runs on it. So energies are compared as times are, in the same rounds
as a reference. RAPL moves about once a millisecond: single inferences cannot be told apart, blocks of them can. NVML's counter
moves every 100 ms (measured on an H100, `scripts/gpu_trial.py facts`): there each engine runs by itself for seconds, and
only what lies between two observed ticks counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwsearch.device import nvidia
from hwsearch.device.stopwatch import block
from hwsearch.errors import HwsearchError

Meter = Callable[[], float]
"""Joules since some moment in the past; never falls."""

TICKS_S = 2.0
"""How long an engine runs while a coarse counter is watched."""
_LOOKS = 50
"""How often the counter is looked at between two of its moves."""
SETTLE_S = 1.0
"""How long it runs before, until the power is its own."""

POWERCAP = Path("/sys/class/powercap")


@dataclass
class Rapl:
    """The packages under a powercap folder. A call returns joules used by all of them since it was made.

    Raises OSError where a counter cannot be read any more.
    """

    packages: tuple[Path, ...]
    _range_uj: dict[Path, int] = field(default_factory=dict)
    _last_uj: dict[Path, int] = field(default_factory=dict)
    _total_uj: int = 0

    def __post_init__(self) -> None:
        self._range_uj = {p: _number(p / "max_energy_range_uj") for p in self.packages}
        self._last_uj = {p: _number(p / "energy_uj") for p in self.packages}

    def __call__(self) -> float:
        for package in self.packages:
            now, last = _number(package / "energy_uj"), self._last_uj[package]
            # a counter that fell began again at zero after its largest value; it takes minutes to come round
            self._total_uj += now - last if now >= last else now - last + self._range_uj[package]
            self._last_uj[package] = now
        return self._total_uj / 1e6


@dataclass(frozen=True)
class Counter:
    """A meter, or why there is none. source: `RAPL` or `NVML`."""

    meter: Meter | None = None
    source: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"available": self.meter is not None, "source": self.source, "reason": self.reason}


def find(*, gpu: bool = False, root: Path = POWERCAP) -> Counter:
    """The counter of what a backend runs on: the CPU's packages, or the GPU that CUDA puts first."""
    return nvml() if gpu else rapl(root)


def rapl(root: Path = POWERCAP) -> Counter:
    """The counter of all CPU packages under a powercap folder."""
    packages = []
    for path in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        try:
            if path.name.count(":") == 1 and (path / "name").read_text().startswith("package"):
                packages.append(path)
        except OSError:
            continue
    if not packages:
        return Counter(reason=f"no RAPL package under {root}: the CPU has no counter, or a hypervisor hides it")
    try:
        return Counter(Rapl(tuple(packages)), f"RAPL, {len(packages)} package(s)")
    except PermissionError as error:
        return Counter(
            reason=f"{error.filename} may be read by root only; allow it with `chmod a+r` on each package's energy_uj"
        )
    except (OSError, ValueError) as error:
        return Counter(reason=f"the RAPL counter cannot be read: {error}")


def nvml() -> Counter:
    """The counter of the GPU that CUDA puts first, by NVML."""
    try:
        meter, reason = nvidia.find().meter()
    except HwsearchError as error:
        return Counter(reason=str(error))
    return Counter(meter, "NVML") if meter else Counter(reason=reason)


def tick_s(meter: Meter | None) -> float:
    """Seconds between two moves of a counter that is too coarse for blocks of inferences; 0 for others."""
    return float(getattr(meter, "tick_s", 0.0))


def by_ticks(run: Callable[[], None], meter: Meter, clock: Callable[[], int]) -> list[float]:
    """Joules of an inference, one value for each two neighbouring ticks of a coarse counter that were seen while `run` ran.

    Empty where the counter did not move in time.
    """
    usual = max(statistics.median(block(run, 3, clock)), 1.0)
    count = min(max(int(tick_s(meter) * 1e9 / _LOOKS / usual), 1), 200)
    begun = clock()
    while clock() - begun < SETTLE_S * 1e9:
        block(run, count, clock)
    found: list[float] = []
    inferences, joules, counting = 0, meter(), False
    begun = clock()
    while clock() - begun < TICKS_S * 1e9:
        block(run, count, clock)
        inferences += count
        now = meter()
        if now == joules:
            continue
        if counting:
            found.append((now - joules) / inferences)
        inferences, joules, counting = 0, now, True
    return found


def _number(path: Path) -> int:
    return int(path.read_text())

"""The clock of an NVIDIA GPU held while something is measured, and let go however that ends.

Source: NVML API reference, nvmlDeviceSetGpuLockedClocks (Volta on, root). No line of this ran on a GPU yet.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hwsearch.device.nvidia import Probe, Questions
from hwsearch.errors import BackendUnavailable, InvalidInput

SHARE = 0.75
"""Of its highest clock, what a GPU is held at that names no clock which it sustains."""


def sustained_mhz(probe: Probe) -> int:
    """A clock that the GPU should keep under load: its default application clock, else `SHARE` of its highest.

    Raises InvalidInput on a MIG instance, whose clocks are others' as well; BackendUnavailable where no clock is told.
    """
    if probe.instance is not None:
        raise InvalidInput(
            "clocks cannot be locked from a MIG instance: the others on this GPU run at them too; profile without it"
        )
    ask, clock = Questions(probe.nvml), probe.nvml.NVML_CLOCK_GRAPHICS
    rated = ask("rated", "nvmlDeviceGetDefaultApplicationsClock", probe.handle, clock)
    if rated:
        return int(rated)
    highest = ask("highest", "nvmlDeviceGetMaxClockInfo", probe.handle, clock)
    if not highest:
        raise BackendUnavailable(
            f"NVML tells no clock to lock this GPU to: {ask.not_told.get('highest', 'it says 0 MHz')}"
        )
    at_most = SHARE * highest
    memory = ask("memory", "nvmlDeviceGetMaxClockInfo", probe.handle, probe.nvml.NVML_CLOCK_MEM)
    steps = ask("steps", "nvmlDeviceGetSupportedGraphicsClocks", probe.handle, memory) if memory else None
    return max((int(s) for s in steps or () if s <= at_most), default=int(at_most))


@contextmanager
def lock_clocks(probe: Probe, mhz: int) -> Iterator[None]:
    """Hold a GPU's clock while the block runs; needs root. Let go at its end, however it ends, and on SIGINT, SIGTERM, SIGHUP.

    A signal's handler of before is called afterwards; if it returns, the clock is held again and the block goes on. SIGKILL
    cannot be caught: `nvidia-smi --reset-gpu-clocks` undoes what it leaves. NVML does not tell a clock that somebody else has
    locked before, and this undoes that as well. Raises BackendUnavailable where the GPU or the driver refuses, InvalidInput
    outside the main thread, where signals cannot be caught.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InvalidInput("clocks can be locked from the main thread only: elsewhere no signal can undo it")
    caught = [s for s in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if s is not None]
    own = {s: signal.getsignal(s) for s in caught}
    own = {s: handler for s, handler in own.items() if callable(handler) or handler == signal.SIG_DFL}
    ending = False

    def on_signal(number: int, frame: Any) -> None:
        release()
        before = own[signal.Signals(number)]
        if not callable(before):
            os.kill(os.getpid(), number)
            return
        before(number, frame)
        if not ending:
            hold()

    def hold() -> None:
        for number in own:
            signal.signal(number, on_signal)
        _set_clock(probe, mhz)

    def release() -> None:
        try:
            _reset_clock(probe)
        finally:
            for number, before in own.items():
                signal.signal(number, before)

    try:
        hold()
        yield
    finally:
        ending = True
        release()


def _set_clock(probe: Probe, mhz: int) -> None:
    nvml = probe.nvml
    try:
        nvml.nvmlDeviceSetGpuLockedClocks(probe.handle, mhz, mhz)
    except nvml.NVMLError as error:
        if getattr(error, "value", None) == nvml.NVML_ERROR_NO_PERMISSION:
            remedy = "it takes root (sudo; in a container CAP_SYS_ADMIN)"
        else:
            remedy = "GPUs since Volta can"
        raise BackendUnavailable(
            f"the GPU's clocks cannot be locked at {mhz} MHz ({error}): {remedy}; or go without --lock-clocks"
        ) from error


def _reset_clock(probe: Probe) -> None:
    nvml = probe.nvml
    try:
        nvml.nvmlDeviceResetGpuLockedClocks(probe.handle)
    except nvml.NVMLError as error:
        if getattr(error, "value", None) in (nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_NOT_SUPPORTED):
            return  # then they were not locked either
        raise BackendUnavailable(
            f"the GPU's clocks may still be locked ({error}); reset them with `nvidia-smi --reset-gpu-clocks`"
        ) from error

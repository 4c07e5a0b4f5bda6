"""Whether a backend does on this machine what hwsearch builds on: the command that a first user of a GPU runs.

Each check is a function that returns a `Result`. What is not asked of the machine (a permission that only trying would show)
is `not possible`, with the way to find out; nothing here is taken on trust.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from hwsearch import __version__, backends
from hwsearch.backends.base import Backend, BuildOptions
from hwsearch.backends.process import huge_pages
from hwsearch.device import clocks, energy, nvidia
from hwsearch.device import fingerprint as devices
from hwsearch.device.lock import lock
from hwsearch.doctor.sharing import shared
from hwsearch.errors import BackendUnavailable, HwsearchError
from hwsearch.files import write_bytes
from hwsearch.progress import Progress

SCHEMA = 1
NETWORKS = ("residual", "attention", "two_inputs")
"""Small networks of the backend contract, built and timed here."""
PACKAGES = (
    *("numpy", "scipy", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nvidia-ml-py"),
    *(f"nvidia-{part}-cu{major}" for part in ("cublas", "cudnn", "cusparselt") for major in (12, 13)),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-rtx", "tensorrt-rtx-cu12"),
)
"""Whose versions a report gives, where they are installed."""
PROVES = {
    "driver": "an NVIDIA driver answers",
    "runtime": "the runtime answers",
    "memory": "there is memory to build in",
    "huge pages": "engines lie in huge pages",
    "energy counter": "energy is counted",
    "int8 sums": "int8 products are summed exactly",
    "quiet GPU": "nothing else disturbs the GPU",
    "clock locking": "clocks can be locked and let go",
    "engine": "small networks build and can be timed",
    "contract": "numbers agree with torch, precisions and node times are read back, wrong input is refused, engines keep apart",
}
"""What holds where all checks of a kind do."""
LEAST_BYTES = 512 * 2**20
"""Free memory below which building even small networks may fail."""

Outcome = Literal["ok", "failed", "not possible"]


@dataclass(frozen=True)
class Result:
    """One check: what was found, and what to do about it. `not possible`: it cannot be told here, or was not tried."""

    name: str
    outcome: Outcome
    detail: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Examined:
    """A backend's checks, in order. available: its runtime answers. not_covered: what no check here is about."""

    backend: str
    available: bool
    results: tuple[Result, ...]
    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(r for r in self.results if r.outcome == "failed")

    @property
    def reason(self) -> str:
        """Why it is not available, in one line; a runtime that misses the driver says so itself."""
        why = {r.name: r.detail for r in self.results if r.outcome != "ok"}
        if "driver" in why.get("runtime", ""):
            why.pop("driver", None)
        return f"{self.backend} cannot be used here: {'; '.join(why.values())}"

    @property
    def kinds(self) -> dict[str, list[Result]]:
        """Results by what stands before the colon of their names."""
        found: dict[str, list[Result]] = {}
        for r in self.results:
            found.setdefault(r.name.split(":")[0], []).append(r)
        return found

    @property
    def proven(self) -> tuple[str, ...]:
        """What was tried and held."""
        held = {kind for kind, results in self.kinds.items() if all(r.outcome == "ok" for r in results)}
        return tuple(what for kind, what in PROVES.items() if kind in held)

    @property
    def not_proven(self) -> tuple[str, ...]:
        """What failed, what could not be tried, and what no check is about."""
        missing = []
        for kind, results in self.kinds.items():
            bad = [f"{r.name} {r.outcome}" for r in results if r.outcome != "ok"]
            missing += [f"{PROVES[kind]} ({', '.join(bad)})"] if bad else []
        return (*missing, *self.not_covered)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "proven": self.proven, "not_proven": self.not_proven}

    def __str__(self) -> str:
        """Checks of the contract that held are one line together."""
        named = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        lines = [f"{self.backend} ({named})" if named else self.backend]
        contract = self.kinds.get("contract", [])
        held = [r for r in contract if r.outcome == "ok"]
        shown = [r for r in self.results if r not in held]
        if held:
            shown.append(Result("contract", "ok", f"{len(held)} of {len(contract)} checks held"))
        width = max(len(r.name) for r in shown)
        for r in shown:
            lines.append(f"  {r.outcome:12s}  {r.name:{width}s}  {r.detail}".rstrip())
            lines += [f"  {'':12s}  {'':{width}s}  do: {r.remedy}"] if r.remedy else []
        if self.available:
            lines += ["  proven here:", *(f"    {what}" for what in self.proven)]
            lines += ["  not proven here:", *(f"    {what}" for what in self.not_proven)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Examination:
    """All backends that were looked at, with what a bug report needs. healthy: at least one is there, and nothing failed.

    complete: False of what is kept while the examination still goes on.
    """

    backends: tuple[Examined, ...]
    device: dict[str, Any]
    gpus: tuple[dict[str, Any], ...]
    no_gpu: str
    packages: dict[str, str]
    hwsearch: str
    created: str
    complete: bool = True

    @property
    def healthy(self) -> bool:
        return (
            self.complete
            and any(b.available for b in self.backends)
            and not any(b.failed for b in self.backends)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, without paths and the user's name: `shared` goes over every text."""
        found = {
            "schema": SCHEMA,
            "kind": "doctor",
            "healthy": self.healthy,
            "complete": self.complete,
            "hwsearch": self.hwsearch,
            "created": self.created,
            "python": platform.python_version(),
            "packages": self.packages,
            "device": self.device,
            "gpus": list(self.gpus),
            "no_gpu": self.no_gpu,
            "backends": [b.to_json() for b in self.backends],
        }
        safe: dict[str, Any] = shared(found)
        return safe

    def save(self, path: str | Path) -> None:
        """Write JSON, in place in one step."""
        write_bytes(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.backends))


def examine(
    name: str | None = None,
    *,
    lock_clocks: bool = False,
    progress: Progress | None = None,
    keep: Callable[[Examination], None] | None = None,
) -> Examination:
    """Look at one backend, or at all that are registered. lock_clocks: also try to lock a GPU's clocks, for a moment.

    keep: called after each check with what was found so far, and with all at the end.

    A backend whose runtime does not answer is asked nothing more: that takes no torch, and no time. Raises InvalidInput on
    an unknown name, DeviceBusy while a profile runs on the device.
    """
    progress = progress or Progress.silent()
    names = backends.names() if name is None else (name,)
    gpus, no_gpu = nvidia.gpus()
    found = Examination(
        backends=(),
        device=devices.fingerprint().to_json(),
        gpus=tuple({**gpu.to_json(), "not_told": dict(gpu.not_told)} for gpu in gpus),
        no_gpu=no_gpu,
        packages=dict(_packages()),
        hwsearch=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=False,
    )
    try:
        for n in names:
            before = found.backends
            for sofar in _examined(n, name is not None, lock_clocks, progress):
                found = replace(found, backends=(*before, sofar))
                if keep:
                    keep(found)
    finally:
        progress.stop()
    found = replace(found, complete=True)
    if keep:
        keep(found)
    return found


def _examined(name: str, asked_for: bool, lock_clocks: bool, progress: Progress) -> Iterator[Examined]:
    """What is known of a backend, again after each check."""
    outcome: Outcome = "failed" if asked_for else "not possible"
    try:
        backend = backends.get(name)
    except BackendUnavailable as error:
        yield Examined(name, False, (Result("runtime", outcome, str(error)),))
        return
    results = [driver()] if devices.on_gpu(backend) else []
    versions, found = runtime(backend, outcome)
    results.append(found)
    if any(r.outcome != "ok" for r in results):
        if not asked_for:  # a machine without a GPU is not ill
            results = [Result(r.name, "not possible" if r.outcome == "failed" else r.outcome, r.detail, r.remedy)
                       for r in results]  # fmt: skip
        yield Examined(name, False, tuple(results), versions)
        return
    device = devices.fingerprint_for(backend)
    results += [precisions(backend), memory(device), counters(backend)]
    results += [pages()] if getattr(backend, "own_process", False) else []
    if isinstance(device, nvidia.Gpu):
        results += [undisturbed(device), clock_locking(lock_clocks)]
    sofar = Examined(name, True, tuple(results), versions, device.to_json(), not_covered(backend, device))
    yield sofar
    with lock(device.id, wait_s=0.0):
        for result in chain(sums(backend), _at_work(backend, progress)):
            sofar = replace(sofar, results=(*sofar.results, result))
            yield sofar


def _at_work(backend: Backend, progress: Progress) -> Iterator[Result]:
    from hwsearch.testing.contract import checks

    contract = checks()
    progress.start(len(NETWORKS) + len(contract), f"examine {backend.name}")
    for network in NETWORKS:
        yield engine(backend, network)
        progress.step(network)
    for what, check in contract.items():
        yield contract_check(what, check, backend)
        progress.step(what)


# ---------------------------------------------------------------- checks


def driver() -> Result:
    """Whether an NVIDIA driver answers, and which GPU CUDA puts first."""
    try:
        gpu = nvidia.find().gpu()
    except HwsearchError as error:
        return Result("driver", "failed", str(error))
    missing = f"; not told: {', '.join(gpu.not_told)}" if gpu.not_told else ""
    return Result("driver", "ok", f"{gpu}{missing}")


def runtime(backend: Backend, absent: Outcome = "failed") -> tuple[dict[str, str], Result]:
    """(versions, result): whether the runtime's packages are there and answer."""
    try:
        versions, bases = dict(backend.versions()), backend.bases()
    except Exception as error:  # a runtime may fail in any way
        return {}, Result("runtime", absent, _why(error))
    if not bases:
        return versions, Result("runtime", absent, "it offers no base precision on this device")
    named = ", ".join(f"{k} {v}" for k, v in versions.items())
    return versions, Result("runtime", "ok", f"{named}; base {bases[0]}")


def precisions(backend: Backend) -> Result:
    """What the device executes, by the backend's word; the contract's networks are built in each."""
    offered = [
        f"{base} with {' and '.join(map(str, backend.variants(base)[1:])) or 'nothing'}"
        for base in backend.bases()
    ]
    return Result("precisions", "ok", "base " + ", ".join(offered))


def memory(device: devices.Device | nvidia.Gpu) -> Result:
    """Free memory of the GPU, or of the machine."""
    if isinstance(device, nvidia.Gpu):
        free, total = device.memory_free_bytes, device.memory_bytes
    else:
        free, total = _free_bytes(), device.memory_bytes
    if free is None:
        return Result("memory", "not possible", "how much is free is not told here")
    of = "" if total is None else f" of {total / 2**30:.1f}"
    detail = f"{free / 2**30:.1f}{of} GiB free"
    if free < LEAST_BYTES:
        return Result("memory", "failed", detail, "end what holds it: even small networks may not build")
    return Result("memory", "ok", detail)


def pages() -> Result:
    """Whether the kernel gives huge pages to engines in processes of their own."""
    share = huge_pages()
    if share is None:
        return Result("huge pages", "not possible", "the system does not tell of them")
    detail = f"{share:.0%} of a process's large memory is in them"
    if share > 0.5:
        return Result("huge pages", "ok", detail)
    return Result(
        "huge pages", "not possible", detail,
        "without them engines of one allocation differ by about 1 % more; they want glibc 2.35 or later, no GLIBC_TUNABLES that "
        "says otherwise, and, as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )  # fmt: skip


def sums(backend: Backend) -> Iterator[Result]:
    """How many bits int8 weights have here, for products to be summed exactly; nothing where no int8 is offered."""
    from hwsearch.backends.exactness import OFF, int8_bits, sum_error
    from hwsearch.network.variants import INT8_BITS, Variant

    base = backend.bases()[0]
    if Variant("int8") not in backend.variants(base):
        return
    try:
        bits = int8_bits(backend, BuildOptions(1, base))
        off = sum_error(backend, BuildOptions(1, base), bits)
    except Exception as error:
        yield Result("int8 sums", "failed", _why(error), _REPORT)
        return
    if off > OFF:
        yield Result("int8 sums", "failed", f"off by {off:.1%} even with weights of {bits} bits", _REPORT)
        return
    why = "" if bits == INT8_BITS else f": it sums products of {INT8_BITS} bits inexactly on this device"
    yield Result("int8 sums", "ok", f"exact with weights of {bits} bits{why}")


def counters(backend: Backend) -> Result:
    """Whether energy is counted, and may be read."""
    found = energy.find(gpu=devices.on_gpu(backend))
    if found.meter is None:
        return Result(
            "energy counter", "not possible", found.reason, "budgets on energy need one; all others do not"
        )
    return Result("energy counter", "ok", found.source)


def undisturbed(gpu: nvidia.Gpu) -> Result:
    """Whether somebody else's work, or a hot or capped GPU, would be measured as well."""
    said = [f"{gpu.others} other process(es) on it"] if gpu.others else []
    said += [f"slowed by {' and '.join(gpu.state.slowed)}"] if gpu.state.slowed else []
    if gpu.processes is None or gpu.state.throttle is None:
        said.append("NVML does not tell who works on it, or what holds its clocks down")
    if said:
        remedy = (
            "end the others, let it cool, raise its power limit; in a container this process may be counted"
        )
        return Result("quiet GPU", "not possible", "; ".join(said), remedy)
    return Result("quiet GPU", "ok", str(gpu.state))


def clock_locking(tried: bool) -> Result:
    """Whether this user may lock clocks: that shows only in trying, which is done where it was asked for."""
    if not tried:
        return Result("clock locking", "not possible", "not tried: it changes the GPU's clocks for a moment",
                      "hwsearch doctor --lock-clocks")  # fmt: skip
    try:
        probe = nvidia.find()
        mhz = clocks.sustained_mhz(probe)
        with lock(probe.gpu().id, wait_s=0.0), clocks.lock_clocks(probe, mhz):
            state = probe.state()
    except HwsearchError as error:
        return Result("clock locking", "not possible", str(error))
    return Result("clock locking", "ok", f"asked for {mhz} MHz, then {state}; undone")


def engine(backend: Backend, network: str) -> Result:
    """A small network built and timed in the preferred base, in the base once more, and in int8 where that is offered."""
    from hwsearch.device.timing import Protocol, paired
    from hwsearch.network.variants import Variant, uniform
    from hwsearch.testing.contract import small_setup

    name = f"engine: {network.replace('_', ' ')}"
    try:
        base = backend.bases()[0]
        precisions = ["int8"] if Variant("int8") in backend.variants(base) else []
        setup = small_setup(network, backend, base)
        reference, again = (setup.build(uniform(setup.network, base))[0] for _ in range(2))
        others = {p: setup.build(uniform(setup.network, p))[0].run for p in precisions}
        timings = paired(
            reference.run, {"again": again.run, **others}, Protocol(width=0.02, limit_s=1.0), clock=setup.clock,
            sample=setup.sample,
        )  # fmt: skip
    except Exception as error:
        return Result(name, "failed", _why(error), _REPORT)
    told = timings["again"]
    detail = f"{base} {told.reference_median_ns / 1e6:.4g} ms, built twice {told.ratio:.3f}"
    detail += "".join(f", {p} {timings[p].ratio:.3f} of it" for p in others)
    slowed = sorted({reason for state in told.states for reason in state.slowed})
    return Result(name, "ok", detail + (f"; slowed by {' and '.join(slowed)}" if slowed else ""))


def contract_check(what: str, check: Any, backend: Backend) -> Result:
    """One check of `hwsearch.testing.BackendContract`."""
    name = f"contract: {what}"
    try:
        check(backend)
    except Exception as error:
        return Result(name, "failed", _why(error), _REPORT)
    return Result(name, "ok")


_REPORT = "attach what `hwsearch doctor --report file.json` writes to a bug report"


def not_covered(backend: Backend, device: devices.Device | nvidia.Gpu) -> tuple[str, ...]:
    """What an examination without a failure still says nothing of."""
    from hwsearch.network.variants import PRECISIONS

    offered = {v.precision for base in backend.bases() for v in backend.variants(base)}
    missing = [p for p in PRECISIONS if p != "w8" and p not in offered]  # w8 is offered by an attribute of the backend
    return (
        "your own network (`hwsearch profile` builds and times it)",
        *([f"{', '.join(missing)}: not offered by {backend.name} on this device"] if missing else []),
        *(["times at steady clocks: they were free to move"] if isinstance(device, nvidia.Gpu) else []),
        "another device, driver or version of the runtime",
    )


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _free_bytes() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not Linux
        return None


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, HwsearchError | AssertionError) and text
        else f"{type(error).__name__}: {text}"
    )

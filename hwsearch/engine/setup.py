"""One network made ready for one backend under one set of options, and building its engines."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hwsearch.backends import exactness
from hwsearch.backends.base import Backend, BuildOptions, Engine, qdq_form
from hwsearch.backends.faults import faults
from hwsearch.backends.process import compiler, wait
from hwsearch.compress.widths import Kept, Weights
from hwsearch.device import fingerprint as device
from hwsearch.device import nvidia
from hwsearch.device.clocks import lock_clocks
from hwsearch.device.energy import Meter, find, tick_s
from hwsearch.device.load import cpus
from hwsearch.device.spent import ASSEMBLING, COMPILING, EXPORTING, STARTING, TRACING, Spent
from hwsearch.engine.outputs import Expected
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.choices import RESIDUAL
from hwsearch.network.choices import STORAGE as STORED
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, STORAGE, Int8, Variant

if TYPE_CHECKING:
    from hwsearch.task import Task


@dataclass(frozen=True)
class Setup:
    """One network made ready for one backend under one set of options."""

    lowering: Lowering
    backend: Backend
    options: BuildOptions
    load: int = 0
    """Workers that keep the machine busy while it is measured."""
    clocks: int = 0
    """MHz that the GPU's clock is locked to while it is measured; 0: it is not."""
    storage: bool = False
    """Whether weights may also be stored in int8 and computed with in the base precision."""
    energy: bool = False
    """Whether a counter of energy that asks for seconds of each engine (a GPU's) is read as well; see `energy.by_ticks`."""
    spent: Spent = field(default_factory=Spent, compare=False)
    """Where the time goes, of this setup and of those made from it."""

    @property
    def network(self) -> Network:
        return self.lowering.network

    def variants(self, base: str | None = None) -> tuple[Variant, ...]:
        """What units may ask for under a base (None: the setup's own), `dense.BASE` first."""
        own = self.backend.variants(base or self.options.base)
        return (*own, STORAGE) if self.storage and self.stores else own

    @property
    def stores(self) -> bool:
        """Whether the backend computes right with weights that are stored in int8 alone."""
        return bool(getattr(self.backend, "weight_storage", False))

    @cached_property
    def expected(self) -> Expected:
        """What engines of this network should return."""
        return Expected(self.lowering, self.backend.quantize_outputs)

    @property
    def clock(self) -> Callable[[], int]:
        """See `clock_of`."""
        return clock_of(self.backend)

    @property
    def machine(self) -> str:
        """The name of this machine in its network, or of the one that the backend pretends to be."""
        return getattr(self.backend, "machine", "") or platform.node()

    @property
    def meter(self) -> Meter | None:
        """Joules, where what the backend runs on counts them: a simulated one, a GPU, or this machine's CPU."""
        own: Meter | None = getattr(self.backend, "meter", None)
        found = own or find(gpu=device.on_gpu(self.backend)).meter
        return None if tick_s(found) and not self.energy else found

    @cached_property
    def sample(self) -> Callable[[], nvidia.State] | None:
        """Looks at the clocks, power and temperature of the GPU that the backend runs on; None on a CPU."""
        return nvidia.find().state if device.on_gpu(self.backend) else None

    def locked(self) -> AbstractContextManager[None]:
        """The GPU's clock held at `clocks` while the block runs, where that was asked for."""
        return lock_clocks(nvidia.find(), self.clocks) if self.clocks else nullcontext()

    @property
    def described(self) -> dict[str, Any]:
        """Everything that a measurement belongs to beside device and network, for tables and reports."""
        own: dict[str, Any] = {**self.options.to_json(), "batch": self.lowering.batch}
        if self.lowering.int8_bits != INT8_BITS:
            own["int8_bits"] = self.lowering.int8_bits
        if self.lowering.unsigned:
            own["unsigned"] = True
        if self.lowering.residual:
            own["residual"] = True
        if self.load:
            own["load"] = self.load
        if self.clocks:
            own["clocks"] = self.clocks
        if device.on_gpu(self.backend) and (share := nvidia.mps_share()):
            own["mps"] = share
        if restricted := cpus():
            own["cpus"] = restricted
        return own

    def narrow(self, kept: Kept, weights: Weights | None = None, *, calibrate: bool = False) -> Setup:
        """The same with only the kept slots of the channel groups; see `Lowering.narrow`."""
        if all(len(k) == self.network.channels[g] for g, k in kept.items()) and not weights:
            return self
        return replace(self, lowering=self.lowering.narrow(kept, weights, calibrate=calibrate))

    def onnx(self, variants: Mapping[str, Variant], metadata: Mapping[str, str] | None = None) -> Any:
        return self.lowering.onnx(variants, metadata=metadata, **qdq_form(self.backend))

    def build(
        self,
        variants: Mapping[str, Variant],
        base: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Engine, Any]:
        """(engine on the example inputs, ONNX model).

        Raises BackendUnavailable where the backend is known to compute such a graph wrongly (see `faults`).
        """
        build_engine = compiler(self.backend)  # whose process starts while the graph is made
        with self.spent.on(EXPORTING):
            _ = self.lowering.marked
        with self.spent.on(ASSEMBLING):
            model = self.onnx(variants, metadata)
            found = faults(model, self.backend.name)
        if found:
            raise BackendUnavailable(f"{self.backend.name} computes this network wrongly: {'; '.join(found)}")
        with self.spent.on(STARTING):
            wait(build_engine)
        with self.spent.on(COMPILING):
            engine = build_engine(
                model.SerializeToString(), replace(self.options, base=base or self.options.base)
            )
            engine.prepare(*self.lowering.arrays())
        return engine, model


def clock_of(backend: Backend) -> Callable[[], int]:
    """Nanoseconds: of a backend that keeps its own time (a simulated one), else of this machine."""
    own: Callable[[], int] = getattr(backend, "clock", time.perf_counter_ns)
    return own


def set_up(
    task: Task,
    backend: Backend,
    *,
    threads: int = 1,
    base: str | None = None,
    batch: int | None = None,
    axes: Collection[str] = (),
    load: int = 0,
    clocks: int = 0,
    energy: bool = False,
    int8: Int8 | None = None,
) -> Setup:
    """Trace a task and make it ready for a backend.

    Args:
        threads: Inference threads.
        base: Base precision; None for the one that the backend prefers on this device.
        batch: Of the deployed network; None for that of the example inputs.
        axes: With `residual` a transformer's residual width is a channel group too; with `storage` weights may be stored in int8
            alone, where the backend has that. Others change nothing here.
        load: Busy workers beside the measured network.
        clocks: MHz to lock the GPU's clock to; 0 leaves it.
        energy: See `Setup`.
        int8: How int8 is taken; None for how the backend takes it here.

    Raises:
        InvalidInput: The backend lacks the base precision, or there is no thread.
    """
    bases = backend.bases()
    if base is not None and base not in bases:
        raise InvalidInput(
            f"{backend.name} does not offer base precision {base!r} here; it offers {', '.join(bases)}"
        )
    if threads < 1:
        raise InvalidInput(f"threads must be at least 1, got {threads}")
    options, spent = BuildOptions(threads, base or bases[0]), Spent(clock_of(backend))
    with spent.on(TRACING):
        int8 = int8 or exactness.int8_of(backend, options)
        lowering = Lowering(
            task, batch, residual=RESIDUAL in axes, int8_bits=int8.bits, unsigned=int8.unsigned
        )
    return Setup(lowering, backend, options, load, clocks, STORED in axes, energy, spent)

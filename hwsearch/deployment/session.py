"""What engines really do, measured side by side in one session: latency, score, loss, size, energy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hwsearch.allocate.budget import TAILS, Budget
from hwsearch.allocate.costs import Costs, bounds
from hwsearch.backends.base import Engine
from hwsearch.deployment.confirm import Window
from hwsearch.deployment.evaluate import predictor, score
from hwsearch.deployment.recheck import Check, measure_again, spread_builds
from hwsearch.device import fingerprint as devices
from hwsearch.device.load import background
from hwsearch.device.lock import lock
from hwsearch.device.timelimit import TimeLimit
from hwsearch.device.timing import Protocol, Timing, paired, too_wide
from hwsearch.engine.record import record
from hwsearch.engine.reference import Reference
from hwsearch.engine.setup import Setup
from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import evaluating
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.latency.regression import USUAL_SLOWDOWN
from hwsearch.loss.divergence import divergence
from hwsearch.lowering.refitted import refitted
from hwsearch.network.memory import peak_bytes
from hwsearch.network.variants import Variant, everywhere, uniform
from hwsearch.profiler.layerwise import sandwich_engine
from hwsearch.progress import Progress, spoken
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable

VERIFY = Protocol(width=0.01, limit_s=3.0, min_rounds=9)
SHARE, SHORTEST_S = 20, 1.5
"""Of the time left to the session, one over that share is what an engine is timed for, but no less than so many seconds."""
LOSS_SAMPLES = 256
DENSE = "dense.fp32"
"""Name of the dense fp32 network among the uniform ones."""


@dataclass(frozen=True)
class Job:
    """What is to be built: variants, base precision, the metadata of the file, and at which widths (None: whole)."""

    variants: dict[str, Variant]
    base: str
    metadata: Mapping[str, str] | None = None
    setup: Setup | None = None


@dataclass(frozen=True)
class Measured:
    """One allocation measured beside the reference in one session."""

    variants: dict[str, Variant]
    timing: Timing
    build: Build
    engine: Engine
    file_bytes: int
    setup: Setup


class Session:
    """Engines of one task, timed together: the deployed one, the dense one and uniform ones, on one scale.

    table: gives the scale (its reference time); without one the session's own reference time is the scale. On a machine that is
    slower than the table's was, times are those of the quiet machine, by what the table knows of slowdowns (see
    `LatencyModel.on_quiet_machine`). limit: when it is to end; None for never. progress: is told what was measured.
    reference: of the profile, where that was made in this process; else another one is compiled.
    """

    def __init__(
        self, setup: Setup, table: LatencyTable | None = None, limit: TimeLimit | None = None, progress: Progress | None = None,
        reference: Reference | None = None,
    ) -> None:  # fmt: skip
        self.setup, self.table = setup, table
        self.progress = progress or Progress.silent()
        self.limit = limit or TimeLimit(math.inf, setup.clock)
        if table is not None and table.header.mode == Mode.SANDWICHED:
            self.reference = sandwich_engine(setup)
        else:
            self.reference = (reference or Reference(setup)).engine
        self.scale_ns = table.header.reference_ns if table is not None else 0.0
        self.reference_now_ns = 0.0
        self.slowdown = 0.0
        """Of the machine against the table's quiet one, in the last measurement, as far as it counts."""
        self._uniforms: dict[str, Measured] = {}
        self._scores: dict[str, float] = {}
        self._check: Check | None = None

    def check(self, table: LatencyTable) -> Check:
        """Whether the table still holds, by three of its builds; looked at once."""
        if self._check is None:
            with self._as_profiled():
                self._check = measure_again(table, self.setup, spread_builds(table, 3), reference=self.reference)
        return self._check

    def measure_all(
        self, deployed: Job | None, uniforms: Mapping[str, Job]
    ) -> tuple[Measured | None, dict[str, Measured]]:
        """(the allocation if one is given, the uniform ones beside it); uniform ones are timed once, with rounded weights."""
        missing = {n: job for n, job in uniforms.items() if n not in self._uniforms}
        jobs = {**({"deployed": deployed} if deployed else {}), **missing}
        measured = self.measure(jobs) if jobs else {}
        own = measured.pop("deployed", None)
        self._uniforms.update(measured)
        return own, dict(self._uniforms)

    def measure(self, wanted: Mapping[str, Job]) -> dict[str, Measured]:
        """Each job measured, all interleaved with the reference and each other."""
        with self._as_profiled():
            return self._measure(wanted)

    def window(self, job: Job) -> Window:
        """An allocation and the dense network beside it, both built anew."""
        found = self.measure({"deployed": job, DENSE: uniform_candidates(self.setup, {})[DENSE]})
        return self.as_window(found["deployed"], found[DENSE])

    def as_window(self, deployed: Measured, dense: Measured) -> Window:
        """What was measured together, as a window."""
        costs, now = (self.costs(deployed), self.costs(dense)), (self.costs_now(deployed), self.costs_now(dense))
        return Window(*costs, *now, deployed.build.wrong)

    def earlier(self) -> list[list[Costs] | None]:
        """What the dense network cost in the table, then what each other uniform one cost in this session and in the table.

        None for the network of the reference: it is slow when its reference is, and its ratio differs less than those of others.
        """
        of_table = {b.key: b for b in self.table.builds if b.role != Role.DEPLOYED} if self.table is not None else {}
        base = self.setup.options.base
        reference = base, uniform(self.setup.network, base)
        found: dict[str, list[Costs] | None] = {}
        for name, measured in self._uniforms.items():
            if (measured.build.base, measured.variants) == reference:
                found[name] = None
                continue
            group = [self.costs(measured)] if name != DENSE else []
            if (build := of_table.get(measured.build.key)) is not None and self.table is not None:
                time = self._model.on_quiet_machine(build.ratio, self.table.nodes(build), self.table.slowdown(build))
                group.append(Costs(latency=time.time_ns))
            found[name] = group
        return [found.pop(DENSE, []), *(group for group in found.values() if group is not None)]

    @contextmanager
    def _as_profiled(self) -> Iterator[None]:
        """The machine as it is to be while something is measured, and nobody else may measure on it."""
        with ExitStack() as stack:
            stack.enter_context(lock(devices.fingerprint_for(self.setup.backend).id))
            stack.enter_context(background(self.setup.load))
            stack.enter_context(self.setup.locked())
            yield

    def _measure(self, wanted: Mapping[str, Job]) -> dict[str, Measured]:
        begun = self.setup.clock()
        setups = {n: job.setup or self.setup for n, job in wanted.items()}
        built = {n: setups[n].build(job.variants, job.base, job.metadata) for n, job in wanted.items()}
        timings = paired(
            self.reference.run,
            {name: engine.run for name, (engine, _) in built.items()},
            replace(VERIFY, limit_s=float(np.clip(self.limit.left_s / SHARE, SHORTEST_S, VERIFY.limit_s))),
            clock=self.setup.clock,
            meter=self.setup.meter,
            quiet_ns=self.table.quiet_on(self.setup.machine) if self.table is not None else None,
            sample=self.setup.sample,
        )
        self.reference_now_ns = next(iter(timings.values())).reference_median_ns
        self.slowdown = self._slowdown(next(iter(timings.values())))
        if not self.scale_ns:
            self.scale_ns = self.reference_now_ns
        self.progress.say(f"measured {', '.join(wanted)} in {spoken((self.setup.clock() - begun) / 1e9)}")
        return {
            name: Measured(
                variants=job.variants,
                timing=timings[name],
                build=replace(
                    record(setups[name], Role.DEPLOYED, job.variants, job.base, timings[name], *built[name], 0.0),
                    widths=tuple(setups[name].network.channels.values()),
                ),
                engine=built[name][0],
                file_bytes=int(built[name][1].ByteSize()),
                setup=setups[name],
            )
            for name, job in wanted.items()
        }

    def bounds(self, budgets: Sequence[Budget], table: LatencyTable) -> tuple[Costs, Costs]:
        """(what the budgets allow, what the dense fp32 network costs), as this session measures it."""
        _, measured = self.measure_all(None, uniform_candidates(self.setup, table.header.unsupported))
        dense = self.costs(measured[DENSE])
        require_energy(budgets, dense)
        return bounds(budgets, dense), dense

    def ms(self, measured: Measured) -> float:
        """Time on the session's scale, in ms."""
        return self.time_ns(measured) / 1e6

    def time_ns(self, measured: Measured) -> float:
        """Time on the session's scale, on the quiet machine."""
        ratio, slowdown = measured.timing.ratio, self._slowdown(measured.timing)
        if self.table is None or not slowdown:
            return ratio * self.scale_ns
        return self._model.on_quiet_machine(ratio, self.table.nodes(measured.build), slowdown).time_ns

    def unstable(self, measured: Measured) -> bool:
        """Whether a ratio is known less well than this machine usually shows, or was measured on a disturbed machine."""
        usual = [b.width for b in self.table.builds] if self.table is not None else []
        return measured.timing.disturbed or too_wide(measured.timing.width, usual, VERIFY.width)

    def _slowdown(self, timing: Timing) -> float:
        """0 where it is too small to tell anything, or no table tells what the quiet machine is."""
        if self.table is None or self.table.header.mode != Mode.CONTEXT:
            return 0.0
        slowdown = timing.quiet_ns / self.table.quiet_on(self.setup.machine) - 1.0
        return slowdown if abs(slowdown) > USUAL_SLOWDOWN else 0.0

    @cached_property
    def _model(self) -> LatencyModel:
        assert self.table is not None
        return fit(self.table)

    def costs(self, measured: Measured) -> Costs:
        """Everything that a budget may bound, on the session's scale; the energy where a counter of it moved."""
        time_ns = self.time_ns(measured)
        return Costs(
            latency=time_ns,
            **{column: time_ns * measured.timing.tail(q) for column, q in TAILS.items()},
            size=measured.file_bytes,
            memory=peak_bytes(
                self.setup.network, measured.variants, measured.setup.network.channels,
                base=measured.build.base, quantize_outputs=self.setup.backend.quantize_outputs,
            ),
            macs=measured.setup.network.macs,
            energy=self._energy_nj(measured.build),
        )  # fmt: skip

    def costs_now(self, measured: Measured) -> Costs:
        """What is measured, as the machine was just then: not on the scale of the table."""
        timing = measured.timing
        return Costs(
            latency=timing.median_ns,
            **{column: timing.median_ns * timing.tail(q) for column, q in TAILS.items()},
            energy=timing.energy.joules * 1e9 if timing.energy else None,
        )

    def _energy_nj(self, build: Build) -> float | None:
        """Energy of an inference on the scale of the table's reference, where the table has energies."""
        if build.energy_ratio is None or build.reference_energy_j is None:
            return None
        of_table = [b.reference_energy_j for b in self.table.builds if b.reference_energy_j] if self.table else []
        reference_j = float(np.median(of_table)) if of_table else build.reference_energy_j
        return build.energy_ratio * reference_j * 1e9

    def score(self, measured: Measured, what: str) -> float:
        """The task's score through the engine; of each uniform allocation it is taken once, of refitted weights."""
        if what not in self._uniforms:
            return self._score(measured, what)
        if what not in self._scores:
            self._scores[what] = self._score(self.refitted(measured), what)
        return self._scores[what]

    def _score(self, measured: Measured, what: str) -> float:
        return score(self.setup.lowering.task, predictor(measured.setup.lowering, measured.engine), what)

    def refitted(self, uniform: Measured) -> Measured:
        """A uniform allocation with its weights refitted, as those of an allocation are. Times do not depend on weights."""
        lowering = refitted(uniform.setup.lowering, uniform.variants)
        if lowering is uniform.setup.lowering:
            return uniform
        setup = replace(uniform.setup, lowering=lowering)
        return replace(uniform, setup=setup, engine=setup.build(uniform.variants, uniform.build.base)[0])

    @cached_property
    def dense_score(self) -> float:
        """The task's score of the module itself."""
        with evaluating(self.setup.lowering.task.model) as model:
            return score(self.setup.lowering.task, model, "the dense model")

    def loss(self, measured: Measured) -> float:
        """Divergence of the engine's outputs from the dense module's, mean over the calibration samples kept apart for it."""
        kind = self.setup.lowering.task.divergence
        predict = predictor(measured.setup.lowering, measured.engine)
        axes = self.setup.lowering.batch_axes
        total, count = 0.0, 0
        for traced, args, kwargs in self.setup.lowering.comparable:
            with torch.no_grad():
                dense = traced.graph(*args, **kwargs)
            value, samples = divergence(predict(*args, **kwargs), dense, kind, axes)
            total, count = total + value, count + samples
            if count >= LOSS_SAMPLES:
                break
        return total / max(count, 1)


def uniform_candidates(setup: Setup, unsupported: Mapping[str, Mapping[str, str]]) -> dict[str, Job]:
    """Every uniform allocation of this backend: each variant wherever a unit can become it, else the base."""
    base = setup.options.base
    candidates = {DENSE: Job(uniform(setup.network, "fp32"), "fp32")}
    for variant in setup.variants(base):
        chosen = everywhere(setup.network, variant, base, unsupported)
        if variant == Variant(base) or set(chosen.values()) != {Variant(base)}:
            candidates.setdefault(str(variant), Job(chosen, base))
    return candidates


def require_energy(budgets: Sequence[Budget], costs: Costs) -> None:
    """Raises InvalidInput where energy is bounded and this machine measures none."""
    if costs.energy is None and any(b.column == "energy" for b in budgets):
        raise InvalidInput(
            "a budget on energy can only be verified where energy is counted, and no counter moved here; "
            "`hwsearch devices` says why, or leave the budget out"
        )

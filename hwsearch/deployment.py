"""Allocation -> ONNX file -> engine, and what the engine really does: latency, score, size, executed precision."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hwsearch import backends
from hwsearch import device as devices
from hwsearch.allocation import Allocation
from hwsearch.backends.base import Backend, Engine
from hwsearch.background import background
from hwsearch.budget import TAILS, Budget, parse_budgets
from hwsearch.builds import Build
from hwsearch.calling import evaluating, flat_inputs
from hwsearch.checking import Check, measure_again, spread
from hwsearch.compress.bank import WeightBank
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.files import write_bytes
from hwsearch.header import SANDWICHED
from hwsearch.isolated import reference_engine
from hwsearch.lower import Lowering
from hwsearch.measure import Protocol, Timing, paired
from hwsearch.memory import peak_bytes
from hwsearch.network import Network
from hwsearch.refitting import as_module, narrowed, weight_bank
from hwsearch.regime import Regime, record, regime
from hwsearch.report import Report
from hwsearch.scoring import divergence
from hwsearch.table import LatencyTable
from hwsearch.task import Task
from hwsearch.variants import Variant, legal, uniform

VERIFY = Protocol(width=0.01, limit_s=6.0, min_rounds=9)
LOSS_SAMPLES = 256


@dataclass(frozen=True)
class Deployed:
    """An ONNX file that runs without hwsearch, and what it was made from."""

    path: Path
    size_bytes: int
    allocation: Allocation
    base: str
    at: Regime = field(repr=False)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The same network in torch, in fp32: really narrower, with parameters that can be fine-tuned."""
        return as_module(self.at.lowering)


def check_allocation(allocation: Allocation, network: Network) -> None:
    """Raises IncompatibleTables where the allocation is of another network or of other weights."""
    for what, own, current in (
        ("network", allocation.network, network.fingerprint),
        ("weights", allocation.weights_digest, network.weights_digest),
    ):
        if own != current:
            raise IncompatibleTables(
                f"the allocation is of other {what}: allocation={own}, current={current}; search again for this task"
            )


def of_allocation(
    task: Task,
    allocation: Allocation,
    backend: Backend,
    threads: int | None = None,
    lock_clocks: bool = False,
) -> Regime:
    """The task under the allocation's own options. lock_clocks: at the clock of its table, where that was locked."""
    options = allocation.options
    clocks = int(options.get("clocks", 0)) or devices.clocks_to_lock(backend) if lock_clocks else 0
    base = str(options.get("base", "fp32"))
    at = regime(
        task, backend, threads=threads or int(options.get("threads", 1)),
        base=base if base in backend.bases() else None, batch=options.get("batch"),
        residual=bool(options.get("residual", False)), load=int(options.get("load", 0)), clocks=clocks,
    )  # fmt: skip
    check_allocation(allocation, at.network)
    return at


def lowering_of(task: Task, allocation: Allocation, weights: str | Path | None = None) -> Lowering:
    """The task as an allocation wants it, narrow and refitted, whichever backend it was searched on.

    weights: folder of refitted weights; without it they are refitted anew. Raises IncompatibleTables (another network).
    """
    options = allocation.options
    whole = Lowering(task, options.get("batch"), residual=bool(options.get("residual", False)))
    check_allocation(allocation, whole.network)
    bank = weight_bank(whole, weights, allocation.slots) if allocation.narrow else None
    return _narrow(whole, allocation, bank)


def at_widths(at: Regime, allocation: Allocation, bank: WeightBank | None = None) -> Regime:
    """The regime with the channels that an allocation keeps, its weights refitted (by `bank`, or anew)."""
    return replace(at, lowering=_narrow(at.lowering, allocation, bank)) if allocation.narrow else at


def _narrow(lowering: Lowering, allocation: Allocation, bank: WeightBank | None) -> Lowering:
    if not allocation.narrow:
        return lowering
    if {g: len(s) for g, s in allocation.slots.items()} != lowering.network.channels:
        raise IncompatibleTables(
            "the allocation is of other channel groups than the network has; search again"
        )
    bank = bank or weight_bank(lowering, None, allocation.slots)
    return narrowed(lowering, allocation.widths, bank, parse_variants(allocation))


def bank_of(at: Regime, allocation: Allocation, folder: str | Path | None) -> WeightBank | None:
    """The weights that an allocation is put together from, kept in `folder`."""
    return weight_bank(at.lowering, folder, allocation.slots) if allocation.narrow else None


def parse_variants(allocation: Allocation) -> dict[str, Variant]:
    return {unit: Variant.parse(v) for unit, v in allocation.variants.items()}


def deploy(
    task: Task,
    allocation: Allocation,
    out: str | Path,
    *,
    backend: str | Backend | None = None,
    weights: str | Path | None = None,
    at: Regime | None = None,
) -> Deployed:
    """Write the ONNX file of an allocation, after the backend has compiled those very bytes.

    weights: folder of refitted weights, as `hwsearch sensitivity` leaves one; without it they are refitted anew.
    at: the allocation's own regime, at its widths. Raises IncompatibleTables (another network), BackendUnavailable
    (it does not build).
    """
    if at is None:
        whole = of_allocation(task, allocation, _backend(backend or allocation.backend))
        at = at_widths(whole, allocation, bank_of(whole, allocation, weights))
    base = str(allocation.options.get("base", at.options.base))
    model = at.onnx(parse_variants(allocation), metadata=_metadata(allocation, base))
    data = model.SerializeToString()
    at.backend.build(data, replace(at.options, base=base if base in at.backend.bases() else at.options.base))
    path = Path(out)
    write_bytes(path, data)
    return Deployed(path, len(data), allocation, base, at)


def _backend(which: str | Backend) -> Backend:
    return backends.get(which) if isinstance(which, str) else which


def _metadata(allocation: Allocation, base: str) -> dict[str, str]:
    """What someone who finds the file needs to run it as it was measured."""
    return {
        "hwsearch.base_precision": base,
        "hwsearch.backend": allocation.backend,
        "hwsearch.options": json.dumps(allocation.options, sort_keys=True),
        "hwsearch.budgets": json.dumps([b["text"] for b in allocation.budgets]),
    }


def predictor(at: Lowering, engine: Engine) -> Callable[..., Any]:
    """A callable with the model's signature that runs the engine, in pieces of the engine's batch.

    Returns what the model returns: the same structure, on the CPU, in the model's dtypes.
    """
    batch = at.batch
    leaves, out_spec = pytree.tree_flatten(at.traced.outputs)
    graph = at.traced.graph
    flat_names = [spec.name for spec in engine.inputs]

    def predict(*args: Any, **kwargs: Any) -> Any:
        values = [v for v in flat_inputs(graph, args, kwargs) if isinstance(v, torch.Tensor)]
        if len(values) != len(flat_names):
            raise InvalidInput(f"the model takes {len(flat_names)} tensors, evaluate gave {len(values)}")
        arrays = [v.detach().cpu().numpy() for v in values]
        count = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
        pieces: list[list[Any]] = []
        for start in range(0, count, batch):
            part = [a[start : start + batch] for a in arrays]
            short = batch - part[0].shape[0]
            if short:
                part = [np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for a in part]
            results = engine(*part)
            pieces.append([r[: batch - short] if short else r for r in results])
        merged = iter([torch.from_numpy(np.concatenate(column)) for column in zip(*pieces, strict=True)])
        filled = [next(merged).to(leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, out_spec)

    return predict


def score(task: Task, predict: Callable[..., Any], what: str) -> float:
    """evaluate(predict), checked. Raises InvalidInput where it fails or does not return a finite number."""
    try:
        with torch.no_grad():
            value = float(task.evaluate(predict))
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"evaluate failed on {what}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise InvalidInput(
            f"evaluate returned {value} for {what}; expected a finite number, higher is better"
        )
    return value


@dataclass(frozen=True)
class Job:
    """What is to be built: variants, base precision, the metadata of the file, and at which widths (None: whole)."""

    variants: dict[str, Variant]
    base: str
    metadata: Mapping[str, str] | None = None
    at: Regime | None = None


@dataclass(frozen=True)
class Measured:
    """One allocation measured beside the reference in one session."""

    variants: dict[str, Variant]
    timing: Timing
    build: Build
    engine: Engine
    file_bytes: int
    at: Regime


class Session:
    """Engines of one task, timed together: the deployed one, the dense one and uniform ones, on one scale.

    table: gives the scale (its reference time); without one the session's own reference time is the scale.
    """

    def __init__(self, at: Regime, table: LatencyTable | None = None) -> None:
        self.at, self.table = at, table
        if table is not None and table.header.mode == SANDWICHED:
            self.reference = reference_engine(at)
        else:
            self.reference, _ = at.build(uniform(at.network, at.options.base))
        self.scale_ns = table.header.reference_ns if table is not None else 0.0
        self.reference_now_ns = 0.0
        self._uniforms: dict[str, Measured] = {}
        self._scores: dict[str, float] = {}
        self._check: Check | None = None

    def check(self, table: LatencyTable) -> Check:
        """Whether the table still holds, by three of its builds; looked at once."""
        if self._check is None:
            with self._quiet():
                self._check = measure_again(table, self.at, spread(table, 3), reference=self.reference)
        return self._check

    def measure_all(
        self, deployed: Job | None, uniforms: Mapping[str, Job]
    ) -> tuple[Measured | None, dict[str, Measured]]:
        """(the allocation if one is given, the uniform ones beside it); uniform ones are timed once."""
        missing = {name: job for name, job in uniforms.items() if name not in self._uniforms}
        jobs = {**({"deployed": deployed} if deployed else {}), **missing}
        measured = self.measure(jobs) if jobs else {}
        found = measured.pop("deployed", None)
        self._uniforms.update(measured)
        return found, dict(self._uniforms)

    def measure(self, wanted: Mapping[str, Job]) -> dict[str, Measured]:
        """Each job measured, all interleaved with the reference and each other."""
        with self._quiet():
            return self._measure(wanted)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """The machine as it is to be while something is measured; whose clocks are locked nobody else may profile."""
        with ExitStack() as stack:
            if self.at.clocks:
                stack.enter_context(devices.lock(devices.fingerprint_for(self.at.backend).id))
            stack.enter_context(background(self.at.load))
            stack.enter_context(self.at.locked())
            yield

    def _measure(self, wanted: Mapping[str, Job]) -> dict[str, Measured]:
        ats = {n: job.at or self.at for n, job in wanted.items()}
        built = {n: ats[n].build(job.variants, job.base, job.metadata) for n, job in wanted.items()}
        timings = paired(
            self.reference.run,
            {name: engine.run for name, (engine, _) in built.items()},
            VERIFY,
            clock=self.at.clock,
            meter=self.at.meter,
            quiet_ns=self.table.quiet_ns if self.table is not None else None,
            sample=self.at.sample,
        )
        self.reference_now_ns = next(iter(timings.values())).reference_median_ns
        if not self.scale_ns:
            self.scale_ns = self.reference_now_ns
        return {
            name: Measured(
                variants=job.variants,
                timing=timings[name],
                build=replace(
                    record(ats[name], "deployed", job.variants, job.base, timings[name], *built[name], 0.0),
                    widths=tuple(ats[name].network.channels.values()),
                ),
                engine=built[name][0],
                file_bytes=int(built[name][1].ByteSize()),
                at=ats[name],
            )
            for name, job in wanted.items()
        }

    def limits(self, budgets: Sequence[Budget], table: LatencyTable) -> tuple[dict[str, int], dict[str, int]]:
        """Budgets in whole ns, bytes and MACs, and what the dense fp32 network costs, as this session measures it."""
        _, measured = self.measure_all(None, uniform_candidates(self.at, table.header.unsupported))
        dense = self.costs(measured["dense.fp32"])
        require_energy(budgets, dense)
        return {b.column: b.resolve(dense[b.column]) for b in budgets}, {c: int(x) for c, x in dense.items()}

    def ms(self, measured: Measured) -> float:
        """Time on the session's scale, in ms."""
        return measured.timing.ratio * self.scale_ns / 1e6

    def costs(self, measured: Measured) -> dict[str, float]:
        """Everything that a budget may bound, in ns, bytes and MACs."""
        time_ns = measured.timing.ratio * self.scale_ns
        tails = {column: time_ns * measured.timing.tail(q) for column, q in TAILS.items()}
        size, macs = float(measured.file_bytes), float(measured.at.network.macs)
        return {"latency": time_ns, **tails, "size": size, "macs": macs, "memory": self._memory(measured),
                **self._energy(measured)}  # fmt: skip

    def _energy(self, measured: Measured) -> dict[str, float]:
        """Energy of an inference in nJ on the session's scale: that of the table's reference, where it has energies."""
        ratio, own = measured.build.energy_ratio, measured.build.reference_energy_j
        if ratio is None or own is None:
            return {}
        told = [b.reference_energy_j for b in self.table.builds if b.reference_energy_j] if self.table else []
        return {"energy": ratio * (float(np.median(told)) if told else own) * 1e9}

    def _memory(self, measured: Measured) -> float:
        """Peak of the activations in bytes: computed, not measured."""
        widths = measured.at.network.channels
        peak = peak_bytes(
            self.at.network, measured.variants, widths,
            base=measured.build.base, quantize_outputs=self.at.backend.quantize_outputs,
        )  # fmt: skip
        return float(peak)

    def score(self, measured: Measured, what: str) -> float:
        """The task's score through the engine; of each uniform allocation it is taken once."""
        if what not in self._uniforms:
            return score(self.at.lowering.task, predictor(measured.at.lowering, measured.engine), what)
        if what not in self._scores:
            self._scores[what] = score(
                self.at.lowering.task, predictor(measured.at.lowering, measured.engine), what
            )
        return self._scores[what]

    @cached_property
    def dense_score(self) -> float:
        """The task's score of the module itself."""
        with evaluating(self.at.lowering.task.model) as model:
            return score(self.at.lowering.task, model, "the dense model")

    def loss(self, measured: Measured) -> float:
        """Divergence of the engine's outputs from the dense module's, mean over the calibration samples kept apart for it."""
        kind = self.at.lowering.task.divergence
        predict = predictor(measured.at.lowering, measured.engine)
        total, count = 0.0, 0
        for traced, args, kwargs in self.at.lowering.scoring:
            with torch.no_grad():
                dense = traced.graph(*args, **kwargs)
            value, samples = divergence(predict(*args, **kwargs), dense, kind)
            total, count = total + value, count + samples
            if count >= LOSS_SAMPLES:
                break
        return total / max(count, 1)


def require_energy(budgets: Sequence[Budget], costs: Mapping[str, float]) -> None:
    """Raises InvalidInput where energy is bounded and this machine measures none."""
    if "energy" not in costs and any(b.column == "energy" for b in budgets):
        raise InvalidInput(
            "a budget on energy can only be verified where energy is counted, and no counter moved here; "
            "`hwsearch devices` says why, or leave the budget out"
        )


def _parted(measured_ns: float, allocation: Allocation) -> bool:
    """Whether a measurement is further from the prediction than that is uncertain."""
    predicted, sigma = allocation.predicted["latency_ns"], allocation.predicted["sigma_ns"]
    return bool(abs(measured_ns - predicted) > max(3 * sigma, 0.05 * predicted))


def uniform_candidates(at: Regime, unsupported: Mapping[str, Mapping[str, str]]) -> dict[str, Job]:
    """Every uniform allocation of this backend: each variant wherever a unit can become it, else the base."""
    base = at.options.base
    candidates = {"dense.fp32": Job(uniform(at.network, "fp32"), "fp32")}
    for variant in at.backend.variants(base):
        chosen = {
            u.name: variant
            if legal(u, [variant]) and str(variant) not in unsupported.get(u.name, {})
            else Variant(base)
            for u in at.network.units
        }
        if variant == Variant(base) or set(chosen.values()) != {Variant(base)}:
            candidates.setdefault(str(variant), Job(chosen, base))
    return candidates


def verify(
    task: Task,
    allocation: Allocation,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    lock_clocks: bool = False,
    at: Regime | None = None,
    rounds: int = 1,
    session: Session | None = None,
) -> Report:
    """Measure an allocation on this device and report predicted beside measured.

    Latencies are ratios to engines timed in the same session, on the scale of the table's session where one is
    given. The budget holds only as measured. weights: as for `deploy`. lock_clocks: as for `profile`.
    Raises IncompatibleTables where the table is of another device.
    """
    report, _ = verify_with_build(
        task, allocation, backend=backend, threads=threads, table=table, weights=weights, lock_clocks=lock_clocks,
        at=at, rounds=rounds, session=session,
    )  # fmt: skip
    if out is not None:
        report.save(out)
    return report


def verify_with_build(
    task: Task,
    allocation: Allocation,
    *,
    backend: str | Backend | None = None,
    threads: int | None = None,
    table: LatencyTable | None = None,
    weights: str | Path | None = None,
    lock_clocks: bool = False,
    at: Regime | None = None,
    own: Regime | None = None,
    rounds: int = 1,
    session: Session | None = None,
) -> tuple[Report, Build]:
    """As `verify`, with the measured build for the table. own: `at` at the allocation's widths."""
    at = at or of_allocation(task, allocation, _backend(backend or allocation.backend), threads, lock_clocks)
    device = devices.fingerprint_for(at.backend)
    if table is not None:
        table.require(device=device.to_json(), network=at.network, backend=at.backend.name)
    session = session or Session(at, table)
    base = str(allocation.options.get("base", at.options.base))
    variants = parse_variants(allocation)
    unsupported = table.header.unsupported if table is not None else {}
    candidates = uniform_candidates(at, unsupported)
    base = base if base in at.backend.bases() else at.options.base
    own = own or at_widths(at, allocation, bank_of(at, allocation, weights))
    job = Job(variants, base, _metadata(allocation, base), own)
    deployed, measured = session.measure_all(job, candidates)
    assert deployed is not None
    dense = measured["dense.fp32"]
    budgets = parse_budgets([b["text"] for b in allocation.budgets]) if allocation.budgets else ()
    require_energy(budgets, session.costs(dense))
    limit = {b.column: b.resolve(session.costs(dense)[b.column]) for b in budgets}

    def within(m: Measured) -> bool:
        costs = session.costs(m)
        # a nanosecond (or nanojoule) of slack: a time of 100 % is rounded down to whole ones; bytes and MACs are whole
        slack = {c: int(c.startswith("latency") or c == "energy") for c in limit}
        return not m.build.wrong and all(costs[c] <= bound + slack[c] for c, bound in limit.items())

    costs = session.costs(deployed)
    drift = None
    if table is not None and table.header.mode != SANDWICHED and _parted(costs["latency"], allocation):
        drift = session.check(table).to_json()

    scores = {name: session.score(measured[name], name) for name in candidates if within(measured[name])}
    best = max(scores, key=lambda n: (scores[n], -session.ms(measured[n])), default=None)
    report = Report(
        task=task.name,
        backend=at.backend.name,
        device=device.to_json(),
        options={**at.described, "base": base},
        met=within(deployed),
        rounds=rounds,
        latency_ms={
            "dense": session.ms(dense),
            "budget": limit["latency"] / 1e6 if "latency" in limit else None,
            "predicted": allocation.predicted["latency_ns"] / 1e6,
            "sigma": allocation.predicted["sigma_ns"] / 1e6,
            "measured": session.ms(deployed),
            "measured_low": deployed.timing.low * session.scale_ns / 1e6,
            "measured_high": deployed.timing.high * session.scale_ns / 1e6,
            "measured_now": deployed.timing.median_ns / 1e6,
            "reference": session.scale_ns / 1e6,
            "reference_now": session.reference_now_ns / 1e6,
            **{column.removeprefix("latency_"): costs[column] / 1e6 for column in TAILS},
            **{f"budget_{c.removeprefix('latency_')}": limit[c] / 1e6 for c in TAILS if c in limit},
        },
        score={"dense": session.dense_score, "deployed": session.score(deployed, "the deployed engine")},
        loss={"predicted": allocation.predicted["loss"], "measured": session.loss(deployed)},
        size_bytes={
            "dense": dense.file_bytes,
            "budget": limit.get("size"),
            "predicted": allocation.predicted["size_bytes"],
            "deployed": deployed.file_bytes,
        },
        macs={"dense": at.network.macs, "budget": limit.get("macs"), "deployed": own.network.macs},
        memory={
            "dense": session.costs(dense)["memory"],
            "budget": limit.get("memory"),
            "deployed": costs["memory"],
            "source": "estimated",
        },
        energy_mj={
            "dense": session.costs(dense)["energy"] / 1e6,
            "budget": limit["energy"] / 1e6 if "energy" in limit else None,
            "predicted": allocation.predicted["energy_nj"] / 1e6 if "energy_nj" in allocation.predicted else None,
            "measured": costs["energy"] / 1e6,
        }
        if "energy" in costs
        else {},
        widths={g: [w, at.network.channels[g]] for g, w in own.network.channels.items()},
        solver={"status": allocation.solver["status"], "gap": allocation.solver["gap"]},
        uniform=None
        if best is None
        else {"variant": best, "latency_ms": session.ms(measured[best]), "score": scores[best],
              "size_bytes": measured[best].file_bytes},
        uniforms=[
            {"variant": n, "latency_ms": session.ms(m), "size_bytes": m.file_bytes, "met": within(m)}
            for n, m in measured.items()
        ],
        variants=dict(allocation.variants),
        not_as_asked={
            u.name: f"asked {v}, executed in {e}"
            for u, v, e in zip(at.network.units, deployed.build.variants, deployed.build.executed, strict=True)
            if e and e != Variant.parse(v).executed
        },
        unstable=deployed.timing.unstable or dense.timing.unstable,
        output_error=deployed.build.output_error,
        wrong_outputs=deployed.build.wrong,
        table_check=drift,
    )  # fmt: skip
    return report, deployed.build

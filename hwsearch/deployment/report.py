"""Report: what was predicted beside what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hwsearch.allocate.budget import TAILS
from hwsearch.allocate.costs import Costs
from hwsearch.allocate.front import Point
from hwsearch.deployment.confirm import Judgement, State
from hwsearch.files import write_bytes
from hwsearch.loss.interactions import Agreement
from hwsearch.progress import spoken

SCHEMA = 2


@dataclass(frozen=True)
class Timed:
    """What was predicted, and what the machine was like, in ns.

    Attributes:
        sigma: Standard error of the predicted latency; None where none was predicted.
        unconverted: What was measured on the table's scale, before what the table knows of a slower machine was taken off.
        reference, reference_now: Time of the reference engine on the table's scale, and its raw median.
    """

    sigma: float | None
    unconverted: float
    reference: float
    reference_now: float


@dataclass(frozen=True)
class Report:
    """One verified allocation: what was predicted beside what was measured.

    Attributes:
        rounds: Rounds of the closed loop.
        predicted: Costs of the allocation, as predicted.
        judged: Whether the budgets hold, and the costs by which they do; all latencies are on one scale, that of the table where
            there is one, but for `judged.now`.
        timed: What was predicted, and what the machine was like.
        score: `dense`, of the module; `deployed`, of the engine.
        loss: Divergence from the dense outputs, `predicted` and `measured`.
        solver: Status and gap of the search.
        uniform: The best uniform allocation that meets the same budgets, or None. `uniforms`: all of them.
        variants: Unit -> variant.
        widths: Channel group -> [slots kept, slots there were].
        not_as_asked: Units that the engine executed in another precision.
        output_error: Relative error of the engine's outputs from the same allocation simulated.
        wrong_outputs: That error is a bug of the runtime and not rounding: then nothing is met. `wrong_units`: the units that
            bring it about, with the reason.
        unexplained: Sentences on a loss, or a fall of the score, far above what was predicted, with the likeliest layer.
        table_check: Builds of the table measured again, where prediction and measurement part by more than three sigma.
        slowdown: By how much slower than when the table was made the machine was; 0 where it is too little to count.
        float_only: Units that stay float on this task's data, and why.
        properties: What the runtime had to be told beside its options to compile the network, name -> value.
        runtimes: Where several were tried, what came of each: `backend`, `dense_over_fastest`, and `state`, `latency_ms`,
            `dense_ms`, `loss`, `score` and `size_bytes` of its answer, or the `error`.
        recovery: How the answer was trained: its `score` (dense, refitted, recovered), `latency_ms` (refitted, recovered),
            seconds and the course; None where it was not.
        floor: Of a run with one: as `text` and as the `least` score, whether it is `held`, by how many `standard_errors` of the
            final score (`error`; None where its noise is not known), what was `minimized`, the `search` and its `samples`.
        interactions: Of a run: how well the loss of stitched networks is predicted, by the `sum` of losses and `corrected` by what
            was learnt from others of them, and how many forward `passes` they took; None where there was no time for any.

    `to_json` (and so report.json) has the costs by kind: `latency_ms`, `size_bytes`, `macs`, `memory`, `energy_mj`, which are
    attributes as well.
    """

    task: str
    backend: str
    device: dict[str, Any]
    options: dict[str, Any]
    rounds: int
    predicted: Costs
    judged: Judgement
    timed: Timed
    score: dict[str, float]
    loss: dict[str, float]
    solver: dict[str, Any]
    uniform: dict[str, Any] | None
    uniforms: list[dict[str, Any]] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)
    not_as_asked: dict[str, str] = field(default_factory=dict)
    unstable: bool = False
    output_error: float = 0.0
    wrong_outputs: bool = False
    wrong_units: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    table_check: dict[str, Any] | None = None
    slowdown: float = 0.0
    float_only: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)
    runtimes: list[dict[str, Any]] = field(default_factory=list)
    recovery: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None
    interactions: dict[str, Any] | None = None

    @property
    def state(self) -> State:
        """`met`: every budget holds, with an interval of 95 %; `met_within_noise`: as measured, but not with that; or `missed`.

        A floor that the final score is below is missed as well.
        """
        return State.MISSED if self.floor is not None and not self.floor["held"] else self.judged.state

    @property
    def met(self) -> bool:
        """Whether every budget holds, the upper ends of the intervals are within it too, and the floor is held."""
        return self.state == State.MET

    @property
    def rank(self) -> tuple[int, float]:
        """The least is best: of least loss among those that met the budgets, then within the noise, else the nearest to them."""
        if self.state == State.MISSED:
            return 2, max(self.measured.excess(self.bound), self.judged.now.excess(self.judged.bound_now))
        return int(self.state == State.WITHIN_NOISE), self.loss["measured"]

    @property
    def dense(self) -> Costs:
        """Of the dense fp32 network."""
        return self.judged.dense

    @property
    def bound(self) -> Costs:
        """What the budgets allow."""
        return self.judged.bound

    @property
    def measured(self) -> Costs:
        """Of the allocation."""
        return self.judged.measured

    @property
    def latency_ms(self) -> dict[str, float | None]:
        """`dense`, `budget` (None without one), `predicted`, `sigma`, `measured` and so on, in ms; tails where they are known."""
        own = self.timed
        found = {
            "dense": self.dense.latency,
            "budget": self.bound.latency,
            "predicted": self.predicted.latency,
            "sigma": own.sigma,
            "measured": self.measured.latency,
            "measured_low": self.judged.low.latency,
            "measured_high": self.judged.high.latency,
            "measured_unconverted": own.unconverted,
            "measured_now": self.judged.now.latency,
            "reference": own.reference,
            "reference_now": own.reference_now,
        }
        for prefix, costs in (("", self.measured), ("budget_", self.bound)):
            found |= {
                prefix + tail.removeprefix("latency_"): value
                for tail, value in costs.known().items()
                if tail in TAILS
            }
        return {name: value / 1e6 if value is not None else None for name, value in found.items()}

    @property
    def size_bytes(self) -> dict[str, float | None]:
        """`dense`, `budget`, `predicted` and `deployed` bytes of the ONNX file."""
        return {"predicted": self.predicted.size, **self._of("size")}

    @property
    def macs(self) -> dict[str, float | None]:
        """`dense`, `budget` and `deployed` multiply-accumulates."""
        return self._of("macs")

    @property
    def memory(self) -> dict[str, Any]:
        """`dense`, `budget` and `deployed` peak of the activations in bytes: computed, as `source` says."""
        return {**self._of("memory"), "source": "estimated"}

    @property
    def energy_mj(self) -> dict[str, float | None]:
        """`dense`, `budget`, `predicted` and `measured` energy of an inference in mJ; empty where nothing counts it."""
        if self.measured.energy is None:
            return {}
        found = {"predicted": self.predicted.energy, **self._of("energy")}
        found["measured"] = found.pop("deployed")
        return {name: value / 1e6 if value is not None else None for name, value in found.items()}

    def _of(self, column: str) -> dict[str, float | None]:
        three = {"dense": self.dense, "budget": self.bound, "deployed": self.measured}
        return {name: getattr(costs, column) for name, costs in three.items()}

    @property
    def verdict(self) -> str:
        """`MISSED`, `met` or `met_within_noise`, with what is wrong beside it."""
        if self.judged.state == State.MISSED:
            return "MISSED"
        state = str(self.judged.state) if self.floor is None or self.bound.known() else "none"
        return f"{state}, but what it loses is not explained: see the warnings" if self.unexplained else state

    def _now(self) -> list[str]:
        """What absolute budgets also bound: what a clock on the wall shows."""
        if self.judged.bound_now.latency is None:
            return []
        return [
            f"now      {self.judged.now['latency'] / 1e6:.4g} ms (at most {self.judged.now_high['latency'] / 1e6:.4g}) as fast as "
            "the machine is at this moment"
        ]

    def _foreseen(self) -> str:
        """What was predicted of the latency, and what bounds it."""
        latency = self.latency_ms
        predicted = "not predicted, "
        if latency["predicted"] is not None:
            predicted = f"{latency['predicted']:.4g} ± {latency['sigma']:.2g} ms predicted, "
        if latency["budget"] is not None:
            return f"{predicted}budget {latency['budget']:.4g} ms, "
        return predicted + ("" if set(TAILS) & set(self.bound.known()) else "not bounded, ")

    def _memory(self) -> list[str]:
        if self.measured.memory is None:
            return []
        budget = f", budget {self.bound.memory:,.0f}" if self.bound.memory is not None else ""
        return [
            f"memory   {self.measured.memory:,.0f} bytes of activations at most (estimated){budget}, "
            f"dense {self.dense.memory:,.0f}"
        ]

    def _energy(self) -> list[str]:
        energy = self.energy_mj
        if not energy:
            return []
        predicted = f", {energy['predicted']:.4g} mJ predicted" if energy["predicted"] is not None else ""
        budget = f", budget {energy['budget']:.4g} mJ" if energy["budget"] is not None else ""
        return [f"energy   {energy['measured']:.4g} mJ measured{predicted}{budget}, dense {energy['dense']:.4g} mJ"]

    def _floor(self) -> list[str]:
        """How the final score stands to the floor, and every sample of the search for it."""
        own = self.floor
        if own is None:
            return []
        errors, search = own["standard_errors"], own["search"]
        noise = "its noise is not known, as the task does not say how many samples are `scored`"
        if errors is not None:
            noise = f"by {errors:+.1f} standard errors of {own['error']:.4f} (binomial, {own['scored']:,} samples)"
        held = "held" if own["held"] else "MISSED"
        return [
            f"floor    {held}: {self.score['deployed']:.4f} for {own['least']:.4f} ({own['text']}), {noise}",
            f"search   least {own['minimized']}, {len(own['samples'])} sample(s) scored {search['says']}; there at least "
            f"{search['least']:.4f}, dense {search['dense']:.4f}",
            *map(_of_sample, own["samples"]),
        ]

    def _interactions(self) -> list[str]:
        """How far the predicted loss can be trusted."""
        own = self.interactions
        if own is None:
            return []
        by_sum, corrected = Agreement(**own["sum"]), own["corrected"] and Agreement(**own["corrected"])
        told = f"{corrected}; by the sum of losses alone {by_sum}" if corrected else f"by the sum of losses {by_sum}"
        return [f"trust    loss of {by_sum.networks} stitched networks ({own['passes']} passes) as predicted: {told}"]

    def _recovered(self) -> list[str]:
        own = self.recovery
        if own is None:
            return []
        score, ms = own["score"], own["latency_ms"]
        took = f"{own['method']}, {own['curve'][-1]['step']} steps in {spoken(own['seconds'])}"
        if (rule := own.get("gradients", {}).get("rule", "dense")) != "dense":
            took += f", gradients {rule}"
        if own.get("scales") == "learned":
            took += ", learned scales"
        if own.get("batchnorm") == "unfolded":
            took += ", BatchNorm unfolded"
        if not own["kept"]:
            return [f"recover  nothing better than the refitted weights was kept ({own['why']}; {took})"]
        return [
            f"recover  score {score['recovered']:.4f}, {score['refitted']:.4f} refitted; latency {ms['recovered']:.4g} ms, "
            f"{ms['refitted']:.4g} ms refitted ({took})"
        ]

    def _warnings(self) -> list[str]:
        lines = []
        if self.wrong_outputs:
            lines.append(
                f"the runtime computes wrong outputs (relative error {self.output_error:.3g}); do not use it"
            )
        lines += [f"{unit}: {why}" for unit, why in self.wrong_units.items()]
        lines += self.unexplained
        if self.table_check is not None:
            state = (
                "the table still holds"
                if self.table_check["holds"]
                else "the table no longer holds: profile again"
            )
            lines.append(
                f"prediction and measurement part; {len(self.table_check['builds'])} builds of the table measured "
                f"again changed by {self.table_check['median']:+.1%} (median): {state}"
            )
        if self.slowdown:
            raw = self.timed.unconverted
            known = (
                "the table does not tell what that does, and times are as they were measured"
                if math.isclose(raw, self.measured["latency"], rel_tol=1e-9)
                else f"{raw / 1e6:.4g} ms, converted to what it takes on the quiet machine"
            )
            lines.append(
                f"the machine was {abs(self.slowdown):.0%} {'slower' if self.slowdown > 0 else 'faster'} than when the "
                f"table was made: {known}"
            )
        now = self.judged.now
        if over := [c for c, most in self.judged.bound_now.known().items() if now[c] > most >= self.measured[c]]:
            lines.append(
                f"{', '.join(over)}: within the budget on the machine as it was when the table was made, but not now, and an "
                "absolute budget has to hold now: wait until the machine is as fast again, or profile again"
            )
        if self.state == State.WITHIN_NOISE:
            lines.append(
                "measured within the budget, by less than what engines of one network and measurements of them differ by: it may "
                "be missed the next time; ask for a little less to be sure"
            )
        if self.unstable:
            lines.append("timings were unstable: the machine is busy; verify again when it is quiet")
        if self.not_as_asked:
            lines.append(
                f"{len(self.not_as_asked)} unit(s) did not execute as asked; see not_as_asked in the report"
            )
        return [f"warning  {line}" for line in lines]

    def to_json(self) -> dict[str, Any]:
        own = asdict(self)
        for name in ("predicted", "judged", "timed"):
            del own[name]
        own |= {"state": str(self.state), "met": self.met, "windows": self.judged.windows}
        costs = {name: getattr(self, name) for name in ("latency_ms", "size_bytes", "macs", "memory", "energy_mj")}
        return {"schema": SCHEMA, **own, **costs}

    def save(self, path: str | Path) -> None:
        """Write JSON, in place in one step."""
        write_bytes(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def __str__(self) -> str:
        latency, size = self.latency_ms, self.size_bytes
        lines = [
            f"{self.task} on {self.backend}, {self.device.get('chip', 'this device')}, {self.options.get('threads')} thread(s)",
            f"budget   {self.verdict} after {self.rounds} round(s); solver {self.solver['status']}, "
            f"gap {self.solver['gap']:.2g}",
            f"latency  {latency['measured']:.4g} ms measured ({latency['measured_low']:.4g} to {latency['measured_high']:.4g} in "
            f"{self.judged.windows} window(s)), {self._foreseen()}"
            f"dense {latency['dense']:.4g} ms ({latency['dense'] / latency['measured']:.2f}x)",  # type: ignore[operator]
            *self._now(),
            f"score    {self.score['deployed']:.4f} deployed, {self.score['dense']:.4f} dense",
            *self._floor(),
            f"loss     {self.loss['measured']:.3g} measured, {self.loss['predicted']:.3g} predicted",
            *self._interactions(),
            f"size     {size['deployed']:,.0f} bytes, dense {size['dense']:,.0f}",
            *self._recovered(),
            *self._memory(),
            *self._energy(),
            f"variants {', '.join(f'{n} {v}' for v, n in sorted(_counts(self.variants).items()))}",
        ]
        lines += [
            f"tail     {tail} {latency[tail]:.4g} ms measured, budget {latency[f'budget_{tail}']:.4g} ms"
            for tail in ("p90", "p95", "p99")
            if latency.get(f"budget_{tail}") is not None
        ]
        if narrow := {g: (w, n) for g, (w, n) in self.widths.items() if w < n}:
            share = (self.measured.macs or 0) / (self.dense.macs or 1)
            lines.append(
                f"widths   {len(narrow)} of {len(self.widths)} channel groups narrower, down to "
                f"{min(w / n for w, n in narrow.values()):.0%}; {share:.0%} of the multiply-accumulates"
            )
        if "int8_bits" in self.options:
            lines.append(
                f"int8     weights of {self.options['int8_bits']} bits: {self.backend} sums products of 8 inexactly on this device"
            )
        for why in dict.fromkeys(self.float_only.values()):
            units = [unit for unit, own in self.float_only.items() if own == why]
            lines.append(f"float    {', '.join(units)}: {why}")
        if self.properties:
            told = ", ".join(f"{name}={value}" for name, value in self.properties.items())
            lines.append(f"compiled with {told}, as {self.backend} does not compile the network without; deploy it with that, too")
        if self.uniform is None:
            lines.append("uniform  no uniform allocation meets the budget")
        else:
            lines.append(
                f"uniform  best that meets the budget: {self.uniform['variant']}, {self.uniform['latency_ms']:.4g} ms, "
                f"score {self.uniform['score']:.4f}"
            )
        return "\n".join([*lines, *map(_of_runtime, self.runtimes), *self._warnings()])


def _of_runtime(line: dict[str, Any]) -> str:
    """One of several runtimes that were tried, to read."""
    dense = f"dense {line['dense_over_fastest']:.3g} of the fastest's"
    if "error" in line:
        return f"runtime  {line['backend']}: {dense}; no answer: {line['error']}"
    return (
        f"runtime  {line['backend']}: {line['state']}, {line['latency_ms']:.4g} ms, score {line['score']:.4f}, loss "
        f"{line['loss']:.3g}, {dense} ({line['dense_ms']:.4g} ms)"
    )


def _of_sample(sample: dict[str, Any]) -> str:
    """A sample of a search for a floor, to read."""
    about = f"sample   loss {sample['loss']:.3g} predicted, at most {sample['loss_bound']:.3g}: "
    if sample["failed"]:
        return f"{about}failed: {sample['failed']}"
    error = "" if sample["error"] is None else f" ± {sample['error']:.4f}"
    said = [
        f"score {sample['score']:.4f}{error}", "holds" if sample["holds"] else "does not hold",
        f"{sample['costs']['latency'] / 1e6:.4g} ms", f"{sample['costs']['size']:,.0f} bytes",
        "measured before" if sample["reused"] else spoken(sample["seconds"]),
    ]  # fmt: skip
    return about + ", ".join([*said, *["the answer"] * sample["answer"]])


def measured_points(report: Report) -> list[Point]:
    """Measured allocations to draw on a front: the deployed one, with its interval."""
    measured, nan = report.measured, float("nan")
    return [
        Point(
            label="deployed",
            latency_ns=measured["latency"],
            low_ns=report.judged.low["latency"],
            high_ns=report.judged.high["latency"],
            size_bytes=measured["size"],
            memory_bytes=nan if measured.memory is None else measured.memory,
            loss=report.loss["measured"],
            score=report.score["deployed"],
            variants=tuple(report.variants.values()),
            widths=tuple(kept for kept, _ in report.widths.values()),
        )
    ]


def _counts(variants: dict[str, str]) -> dict[str, int]:
    return {v: list(variants.values()).count(v) for v in set(variants.values())}

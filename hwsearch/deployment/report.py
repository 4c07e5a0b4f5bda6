"""Report: what was predicted beside what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 2


@dataclass(frozen=True)
class Report:
    """One verified allocation.

    met: every budget holds as measured. rounds: rounds of the closed loop. latency_ms: dense, budget (None
    without one), predicted and its sigma, measured, all on one scale; `measured_now` and `reference_now` are raw
    medians, as fast as the machine just was; `p90`, `p95` and `p99` are quantiles of single inferences of the deployed
    engine, `budget_p99` and so on their budgets where there are any. score: of the module and of the engine. loss:
    divergence from the dense outputs. size_bytes: of the ONNX files. memory: peak of the activations in bytes (dense, budget,
    deployed), computed from the network and never measured, as its `source` says. energy_mj: of an inference: dense,
    measured, and budget and predicted where energy is bounded; empty where nothing counts it. uniform: the best uniform
    allocation that meets the same budgets, or None. uniforms: all of them. widths: slots kept of each channel group, and how
    many there were. not_as_asked: units that the engine executed in another precision. output_error: relative error of the
    engine's outputs from the same allocation simulated; `wrong_outputs` where it is a bug of the runtime and not rounding:
    then nothing is met, and `wrong_units` names the units that bring it about, with the reason. unexplained: sentences on a loss,
    or a fall of the score, far above what was predicted, with the likeliest layer. slowdown: by how much slower than when the
    table was made the machine was, 0 where it is too little to count; times are those of the quiet machine, and
    `measured_unconverted` is what was measured, on the table's scale. table_check: where prediction and measurement part by more
    than three sigma, builds of the table measured again. float_only: units that stay
    float on this task's data, and why.
    """

    task: str
    backend: str
    device: dict[str, Any]
    options: dict[str, Any]
    met: bool
    rounds: int
    latency_ms: dict[str, float | None]
    score: dict[str, float]
    loss: dict[str, float]
    size_bytes: dict[str, float | None]
    solver: dict[str, Any]
    uniform: dict[str, Any] | None
    uniforms: list[dict[str, Any]] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=dict)
    widths: dict[str, list[int]] = field(default_factory=dict)
    macs: dict[str, float | None] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    energy_mj: dict[str, float | None] = field(default_factory=dict)
    not_as_asked: dict[str, str] = field(default_factory=dict)
    unstable: bool = False
    output_error: float = 0.0
    wrong_outputs: bool = False
    wrong_units: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    table_check: dict[str, Any] | None = None
    slowdown: float = 0.0
    float_only: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`MISSED`, `met`, or `met` with what is wrong beside it."""
        if not self.met:
            return "MISSED"
        return "met, but what it loses is not explained: see the warnings" if self.unexplained else "met"

    def _memory(self) -> list[str]:
        if not self.memory:
            return []
        budget = f", budget {self.memory['budget']:,.0f}" if self.memory["budget"] is not None else ""
        return [
            f"memory   {self.memory['deployed']:,.0f} bytes of activations at most (estimated){budget}, "
            f"dense {self.memory['dense']:,.0f}"
        ]

    def _energy(self) -> list[str]:
        found = self.energy_mj
        if not found:
            return []
        told = f", {found['predicted']:.4g} mJ predicted" if found["predicted"] is not None else ""
        budget = f", budget {found['budget']:.4g} mJ" if found["budget"] is not None else ""
        return [f"energy   {found['measured']:.4g} mJ measured{told}{budget}, dense {found['dense']:.4g} mJ"]

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
            raw = self.latency_ms["measured_unconverted"]
            known = (
                "the table does not tell what that does, and times are as they were measured"
                if raw == self.latency_ms["measured"]
                else f"{raw:.4g} ms, converted to what it takes on the quiet machine"
            )
            lines.append(
                f"the machine was {abs(self.slowdown):.0%} {'slower' if self.slowdown > 0 else 'faster'} than when the "
                f"table was made: {known}"
            )
        if self.unstable:
            lines.append("timings were unstable: the machine is busy; verify again when it is quiet")
        if self.not_as_asked:
            lines.append(
                f"{len(self.not_as_asked)} unit(s) did not execute as asked; see not_as_asked in the report"
            )
        return [f"warning  {line}" for line in lines]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write JSON, in place in one step."""
        from hwsearch.files import write_bytes

        write_bytes(Path(path), (json.dumps(self.to_json(), indent=2) + "\n").encode())

    def __str__(self) -> str:
        latency, size = self.latency_ms, self.size_bytes
        lines = [
            f"{self.task} on {self.backend}, {self.device.get('chip', 'this device')}, {self.options.get('threads')} thread(s)",
            f"budget   {self.verdict} after {self.rounds} round(s); solver {self.solver['status']}, "
            f"gap {self.solver['gap']:.2g}",
            f"latency  {latency['measured']:.4g} ms measured, {latency['predicted']:.4g} ± {latency['sigma']:.2g} ms predicted, "
            + (f"budget {latency['budget']:.4g} ms, " if latency["budget"] is not None else "")
            + f"dense {latency['dense']:.4g} ms ({latency['dense'] / latency['measured']:.2f}x)",  # type: ignore[operator]
            f"score    {self.score['deployed']:.4f} deployed, {self.score['dense']:.4f} dense",
            f"loss     {self.loss['measured']:.3g} measured, {self.loss['predicted']:.3g} predicted",
            f"size     {size['deployed']:,.0f} bytes, dense {size['dense']:,.0f}",
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
            share = (self.macs["deployed"] or 0) / (self.macs["dense"] or 1)
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
        if self.uniform is None:
            lines.append("uniform  no uniform allocation meets the budget")
        else:
            lines.append(
                f"uniform  best that meets the budget: {self.uniform['variant']}, {self.uniform['latency_ms']:.4g} ms, "
                f"score {self.uniform['score']:.4f}"
            )
        return "\n".join([*lines, *self._warnings()])


def _counts(variants: dict[str, str]) -> dict[str, int]:
    return {v: list(variants.values()).count(v) for v in set(variants.values())}

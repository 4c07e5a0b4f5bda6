"""What the commands print on standard output: tables to read, or JSON for programs."""

from __future__ import annotations

import json
import math
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwsearch.allocate.allocation import Allocation
    from hwsearch.allocate.front import Front
    from hwsearch.deployment.recheck import Check
    from hwsearch.deployment.report import Report
    from hwsearch.deployment.targets import EngineFile, Verdict
    from hwsearch.latency.diagnosis import Diagnosis
    from hwsearch.loss.table import SensitivityTable
    from hwsearch.pipeline.tuning import Tuned
    from hwsearch.table.table import LatencyTable

WORST = 10
"""How many units a sensitivity table is shown with."""

_ARTIFACTS = {
    "latency table": "table.parquet",
    "sensitivities": "sens.parquet",
    "allocation": "alloc.json",
    "network": "model.onnx",
    "report": "report.json",
    "plot": "front.png",
    "trained weights": "trained.safetensors",
    "plot of the recovery": "recover.png",
    "plot of the samples": "bayes.png",
}


def as_json(data: Any) -> None:
    """JSON as every parser takes it: null where a number is not finite."""
    print(json.dumps(_finite(data), indent=2))


def wrapped(text: str, indent: int = 2) -> None:
    """Text in lines no wider than the terminal, those after the first indented."""
    width = max(shutil.get_terminal_size().columns - 1, 40)
    lines = textwrap.wrap(
        text.lstrip("\n"), width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    print("\n" * text.startswith("\n") + "\n".join(lines))


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of text under their names, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    Console(markup=False, highlight=False).print(shown)


def size(count: float) -> str:
    """Bytes to read, in the powers of ten that budgets are written in."""
    for unit, one in (("MB", 1e6), ("KB", 1e3)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count:.0f} B"


def staircase(measured: LatencyTable, machine: bool) -> None:
    """Each width tried of each channel group, with its time by precision."""
    from hwsearch.latency import staircase as stairs

    if machine:
        as_json(stairs.as_json(measured))
        return
    steps = stairs.staircase(measured)
    precisions = list(dict.fromkeys(p for s in steps for p in s.times_ns))
    rows, last = [], ""
    for s in steps:
        times = [f"{s.times_ns[p] / 1e3:.1f}" if p in s.times_ns else "" for p in precisions]
        marks = "" if s.built else "not built", "kept" if s.kept else ""
        rows.append((s.group if s.group != last else "", str(s.width), *times, *marks))
        last = s.group
    if rows:
        columns(("channel group", "width", *(f"{p} (µs)" for p in precisions), "", ""), rows)
    else:
        print(
            "the table holds no widths: it was made with `--axes precision` or layer by layer, or the network has no channel groups"
        )


def table(measured: LatencyTable, machine: bool) -> None:
    """machine: as JSON, here and below."""
    from hwsearch.cli import overview

    if machine:
        as_json(overview.as_json(measured))
    else:
        print(overview.summary(measured))


def sections(tables: Sequence[LatencyTable], machine: bool) -> None:
    """The tables of one file."""
    from hwsearch.cli import overview
    from hwsearch.table.section import written

    rows = overview.section_rows(tables)
    if machine:
        as_json({"sections": rows})
        return
    keys = list(dict.fromkeys(k for r in rows for k in r["options"]))
    shown = [
        (
            *(str(r["options"].get(k, "")) for k in keys),
            " and ".join(map(written, r["input_shapes"])),
            f"{r['builds']}{'' if r['ended'] or r['mode'] != 'context' else ' so far'}",
            "" if r["dense_ms"] is None else f"{r['dense_ms']:.4g}",
        )
        for r in rows
    ]
    print(f"{tables[0].network.name} on {tables[0].header.device.get('chip')}, {tables[0].header.backend}")
    columns((*keys, "shape", "builds", "dense (ms)"), shown)
    print("`hwsearch table show` with --threads, --batch, --base, --shape or --load shows one of them")


def diagnosis(diagnosed: Diagnosis, machine: bool) -> None:
    """Errors, how well sigma predicts them, and what they go with."""
    if machine:
        as_json(diagnosed.to_json())
    else:
        print(diagnosed)


def check(checked: Check, machine: bool) -> None:
    """Each build then and now, and the verdict."""
    if machine:
        as_json(checked.to_json())
        return
    rows = [
        (b.role, f"{b.then:.4f}", f"{b.now:.4f}", f"{b.change:+.1%}", f"± {b.error:.1%}")
        for b in checked.builds
    ]
    columns(("build", "then, of the reference", "now", "change", "standard error"), rows)
    print(checked)


def sensitivity(scores: SensitivityTable, machine: bool) -> None:
    """The units that lose most, and how far the sum of losses can be trusted."""
    if machine:
        fields = ("divergence", "samples", "rank_correlation", "loss", "width_loss")
        found = {field: getattr(scores, field) for field in fields}
        found |= {"interactions": scores.trust(), "correction": scores.correction.to_json()}
        as_json({"network": scores.network.name, **found, "estimated": sorted(map(list, scores.estimated))})
        return
    worst = sorted(scores.loss.items(), key=lambda item: -max(item[1].values()))
    variants = list(dict.fromkeys(variant for row in scores.loss.values() for variant in row))
    rows = [(unit, *(f"{row[v]:.2e}" if v in row else "-" for v in variants)) for unit, row in worst[:WORST]]
    columns(("most sensitive units", *variants), rows)
    if scores.width_loss:
        groups = []
        for group, row in scores.width_loss.items():
            whole = scores.network.channels[group]
            lost = ", ".join(
                f"{w}: {x:.1e}{'~' if (group, w) in scores.estimated else ''}"
                for w, x in sorted(row.items(), reverse=True)
                if w < whole
            )
            groups.append((group, str(whole), lost))
        columns(("channel group", "whole", "loss at each width"), groups)
        if scores.estimated:
            print(f"~: {len(scores.estimated)} estimated by the Fisher matrix, not measured")
    tau = "not known" if scores.rank_correlation is None else f"{scores.rank_correlation:.2f}"
    print(
        f"{len(worst)} units, {scores.divergence} divergence on {scores.samples} samples; rank correlation of "
        f"predicted and simulated loss of stitched networks: {tau}"
    )
    before, after = scores.agreement
    if before is not None:
        print(f"{before.networks} stitched networks, {scores.passes} forward passes; predicted by the sum of losses: {before}")
    if after is not None:
        learnt = "the sum stays, as nothing is better" if scores.correction.plain else "interactions learnt"
        print(f"each predicted by what was learnt from the others: {after} ({learnt})")


def allocation(chosen: Allocation, machine: bool) -> None:
    """Predicted costs beside those of the dense network, what was chosen, and the proof."""
    if machine:
        as_json(chosen.to_json())
        return
    predicted, dense, solver = chosen.predicted, chosen.dense, chosen.solver
    latency = "not known: not measured so, and not bounded"
    if "latency_ns" in predicted:
        latency = f"{predicted['latency_ns'] / 1e6:.4g} ± {predicted['sigma_ns'] / 1e6:.2g} ms"
    rows = [
        ("latency", latency, _dense_ms(dense)),
        ("size", size(predicted["size_bytes"]), size(dense["size_bytes"])),
        *_memory(predicted, dense),
        *_energy(predicted, dense),
        ("loss", f"{predicted['loss']:.3g}", "0"),
        ("variants", ", ".join(f"{count} {variant}" for variant, count in chosen.counts().items()), ""),
        *_widths(chosen),
        ("budgets", ", ".join(str(budget["text"]) for budget in chosen.budgets), ""),
        ("solver", f"least {solver.get('minimized', 'loss')}: {solver['status']}, gap {solver['gap']:.2g}", ""),
    ]
    columns(("", "predicted", "dense"), rows)


def allocations(answers: Sequence[Allocation], paths: Sequence[Path | None], machine: bool) -> None:
    """Several answers, the best first, and in how many units each differs from the best."""
    if machine:
        as_json([chosen.to_json() for chosen in answers])
        return
    best = answers[0]
    for number, (chosen, path) in enumerate(zip(answers, paths, strict=True), 1):
        other = sum(chosen.variants[unit] != variant for unit, variant in best.variants.items())
        groups = sum(chosen.widths[group] != width for group, width in best.widths.items())
        apart = f": {other} units and {groups} channel groups other than in answer 1" if number > 1 else ""
        print(f"answer {number} of {len(answers)}{apart}" + (f" ({path})" if path else ""))
        allocation(chosen, machine)


def _memory(predicted: Mapping[str, float], dense: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Peak of the activations; allocations of older versions do not have it."""
    if "memory_bytes" not in predicted or "memory_bytes" not in dense:
        return []
    return [("memory (estimated)", size(predicted["memory_bytes"]), size(dense["memory_bytes"]))]


def _energy(predicted: Mapping[str, float], dense: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Energy of an inference, where it is bounded."""
    if "energy_nj" not in predicted or "energy_nj" not in dense:
        return []
    sigma = f" ± {predicted['energy_sigma_nj'] / 1e6:.2g}" if "energy_sigma_nj" in predicted else ""
    return [("energy", f"{predicted['energy_nj'] / 1e6:.4g}{sigma} mJ", f"{dense['energy_nj'] / 1e6:.4g} mJ")]


def _dense_ms(dense: Mapping[str, float]) -> str:
    if "latency_ns" not in dense:
        return "not measured"
    return f"{dense['latency_ns'] / 1e6:.4g} ms" + (" (estimated)" if dense.get("estimated") else "")


def _widths(chosen: Allocation) -> list[tuple[str, str, str]]:
    """The channel groups that are narrower than the whole."""
    whole = {g: len(slots) for g, slots in chosen.slots.items()}
    narrow = [f"{g} {w}/{whole[g]}" for g, w in chosen.widths.items() if w < whole.get(g, w)]
    more = f" and {len(narrow) - WORST} more" if len(narrow) > WORST else ""
    return [("widths", ", ".join(narrow[:WORST]) + more, "")] if narrow else []


def front(swept: Front, machine: bool) -> None:
    """One row a budget of the sweep, then the measured points."""
    if machine:
        as_json(
            {
                "over": swept.over,
                **({"beside": swept.beside} if swept.beside else {}),
                "units": list(swept.units),
                "groups": list(swept.groups),
                "points": [vars(point) for point in swept.points],
            }
        )
        return
    rows = []
    for point in swept.points:
        costs: tuple[str, ...] = ("-", "-", "-", "-")
        if not point.infeasible:
            sigma = f" ± {point.sigma_ns / 1e6:.2g}" if point.sigma_ns > 0 else ""
            memory = size(point.memory_bytes) if math.isfinite(point.memory_bytes) else "-"
            latency = f"{point.latency_ns / 1e6:.4g}{sigma} ms"
            costs = (latency, size(point.size_bytes), memory, f"{point.loss:.3g}")
        limits = (point.budget, point.budget_beside)[: len(swept.swept)]
        budgets = [f"{most / 1e6:.4g} ms" if c == "latency" else size(most) for c, most in zip(swept.swept, limits, strict=True)]
        if point.measured:
            budgets = [point.label, ""][: len(budgets)]
        note = "infeasible" if point.infeasible else "dominated" if point.dominated else ""
        rows.append((*budgets, *costs, note))
    columns((*(f"{column} budget" for column in swept.swept), "latency", "size", "memory (estimated)", "loss", ""), rows)


def report(done: Report, machine: bool, folder: Path | None = None) -> None:
    """Predicted beside measured; folder: where `hwsearch run` left its files, which are then listed."""
    if machine:
        as_json(done.to_json())
        return
    print(done)
    if folder:
        _files(folder)


def tuned(result: Tuned, machine: bool, folder: Path) -> None:
    """The numbers of a scheme, its costs and every sample; folder: where its files are, which are listed."""
    if machine:
        as_json(result.to_json())
        return
    print(result)
    _files(folder)


def _files(folder: Path) -> None:
    files = {what: folder / name for what, name in _ARTIFACTS.items() if (folder / name).is_file()}
    if files:
        print("\n" + "\n".join(f"{what}: {path}" for what, path in files.items()))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def engine_file(made: EngineFile, machine: bool) -> None:
    """A serialised engine, and what its units were compiled to."""
    if machine:
        as_json(made.to_json())
        return
    where = made.target or "this machine's GPU"
    print(f"{made.path}: {size(made.size_bytes)}, {made.backend} for {where}, base {made.base}")
    kinds = list(made.executed.values())
    counts = [f"{kinds.count(k)} {k}" for k in sorted(set(kinds), key=lambda k: (-kinds.count(k), k))]
    if counts:
        print(f"{len(made.layers)} layers; units compiled to {', '.join(counts)}")
    for unit, what in made.not_as_asked.items():
        print(f"  {unit}: {what}")


def verdicts(checked: Sequence[Verdict], machine: bool, *, layers: bool = False) -> None:
    """Variants by target: legal or not, with NVIDIA's reason, and what they were compiled to."""
    if machine:
        as_json([verdict.to_json() for verdict in checked])
        return
    columns(
        ("target", "variant", "units", "legal", "compiled to", "layers"),
        [
            (v.target, v.variant, f"{len(v.units)} {'+'.join(v.ops)}", "yes" if v.legal else "no", _compiled(v),
             str(len(v.layers) or ""))
            for v in checked
        ],
    )  # fmt: skip
    for v in checked:
        if not v.legal or not v.explained:
            star = "" if v.explained else " *"
            print(
                f"{v.variant} on {v.target} ({'+'.join(v.ops)}): {v.documented or 'documented as legal'}{star}"
            )
            if v.reason:
                print(f"  NVIDIA's builder: {plainly(v.reason)}")
    if layers:
        for v in checked:
            if v.layers:
                print(f"\n{v.variant} on {v.target}, base {v.base}")
                columns(
                    ("layer", "kind", "precision", "made of"),
                    [
                        (layer.name, layer.kind, layer.precision, ", ".join(layer.sources))
                        for layer in v.layers
                    ],
                )
    if not all(v.explained for v in checked):
        print("* the builder does otherwise than NVIDIA's documentation says")


def _compiled(verdict: Verdict) -> str:
    kinds = list(verdict.executed.values())
    return ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds), key=lambda k: (-kinds.count(k), k)))


def plainly(reason: str) -> str:
    """A builder's reason without the places in its own source code."""
    return re.sub(r"\. In \w+ at \S+\)$|^.*?\[\w+\.cpp:\d+: \w+\] ", "", reason)

"""What a latency table holds and how well the model fitted on it predicts: for people, and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwsearch.device.spent import in_words
from hwsearch.errors import InvalidInput
from hwsearch.latency.layer_sum import dense_ns
from hwsearch.latency.model import fit, validate
from hwsearch.network.memory import peak_bytes
from hwsearch.network.variants import Variant, everywhere, uniform
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.merging import apart
from hwsearch.table.parquet import KIND
from hwsearch.table.table import SCHEMA, LatencyTable, judged_by, usable


def as_json(table: LatencyTable) -> dict[str, Any]:
    """Provenance, builds without their raw samples, and the fitted model's errors where there is a fit."""
    header = {k: v for k, v in table.header.to_json().items() if k != "network"}
    network = {
        "name": table.network.name,
        "fingerprint": table.network.fingerprint,
        "input_shapes": table.network.input_shapes,
        "units": len(table.network.units),
    }
    return {
        "schema": SCHEMA,
        "kind": KIND,
        **header,
        "network": network,
        "memory": memory(table),
        "disturbed": disturbed(table),
        "builds": table.to_frame().to_dict(orient="records"),
        "quality": quality(table),
    }


def memory(table: LatencyTable) -> dict[str, int | str]:
    """Peak of the activations of the uniform whole networks, in bytes: computed, not measured.

    int8: wherever units support it. As of a runtime that quantizes what int8 units read, and not what they return: a table
    does not say which.
    """
    network, base = table.network, str(table.header.options["base"])
    lowest = everywhere(network, Variant("int8"), base, table.header.unsupported)
    return {
        "dense_bytes": peak_bytes(network, uniform(network, "fp32"), base="fp32"),
        f"{base}_bytes": peak_bytes(network, uniform(network, base), base=base),
        "int8_bytes": peak_bytes(network, lowest, base=base),
        "source": "estimated",
    }


def quality(table: LatencyTable) -> dict[str, float] | None:
    """Errors on builds that nothing looked at, of the model and without boundary terms; None where nothing can be fitted."""
    heldout = judged_by(table)
    if table.header.mode != Mode.CONTEXT or not heldout or sum(not b.kept_out for b in usable(table)) < 2:
        return None
    found = validate(fit(table), heldout)
    additive = validate(fit(table, boundaries=False), heldout)
    return {
        "builds": found.builds,
        "median_error": found.median_error,
        "p90_error": found.p90_error,
        "kendall_tau": found.kendall_tau,
        "noise_floor": found.noise if found.noise is not None else float("nan"),
        "additive_median_error": additive.median_error,
        "additive_kendall_tau": additive.kendall_tau,
    }


def disturbed(table: LatencyTable) -> int:
    """How many builds were measured on a disturbed machine."""
    return sum(map(table.disturbed, table.builds))


def _energy(build: Build) -> str:
    """Joules of an inference, where a counter was read."""
    return f", {1e3 * build.energy_j:.4g} mJ" if build.energy_j else ""


def _gpu(table: LatencyTable) -> list[str]:
    """How the GPU was while the builds were timed, where one was looked at."""
    states = [state for build in table.builds for state in build.states]
    if not states:
        return []
    parts = []
    for unit, values in (
        ("MHz", [s.sm_mhz for s in states]),
        ("W", [s.power_w for s in states]),
        ("°C", [s.temperature_c for s in states]),
    ):
        if known := [v for v in values if v is not None]:
            parts.append(f"{min(known):.0f} to {max(known):.0f} {unit}")
    slowed = [b for b in table.builds if any(s.slowed for s in b.states)]
    reasons = sorted({r for b in slowed for s in b.states for r in s.slowed})
    parts.append(
        f"{len(slowed)} builds slowed by {', '.join(reasons)}" if slowed
        else "no build seen slowed down" if any(s.throttle is not None for s in states)
        else "what slows it down is not told"
    )  # fmt: skip
    return [f"gpu        {', '.join(parts)}"]


def summary(table: LatencyTable) -> str:
    """A screenful for a person."""
    h = table.header
    frame = table.to_frame()
    roles = (
        ", ".join(f"{n} {role}" for role, n in frame["role"].value_counts().items()) if len(frame) else "none"
    )
    lines = [
        f"{table.network.name or 'network'} ({len(table.network.units)} units, {table.network.fingerprint})",
        f"device     {h.device.get('chip')} ({h.device.get('id')})",
        f"backend    {h.backend} {', '.join(f'{k} {v}' for k, v in h.versions.items())}; "
        f"{h.section}; mode {h.mode}",
        f"made       {h.created} by `{h.command}`",
        f"builds     {roles}; {sum(b.unstable for b in table.builds)} unstable, {disturbed(table)} on a disturbed machine, "
        f"{sum(not b.as_asked() for b in table.builds)} not executed as asked",
    ]
    dense = next((b for b in table.builds if b.role == Role.DENSE), None)
    for role, what in (
        ("dense", "dense fp32"),
        ("reference", f"all {h.options.get('base')}"),
        ("uniform", ""),
    ):
        for build in [b for b in table.builds if b.role == role][:1]:
            what = what or f"all {build.leading}"
            share = (
                f", {build.ratio / dense.ratio:.1%} of dense" if dense is not None and role != Role.DENSE else ""
            )
            width = (build.high - build.low) / 2 / build.ratio
            lines.append(
                f"{what:10s} {table.time_ns(build) / 1e6:.4g} ms ± {width:.1%}{share}{_energy(build)}"
            )
    peaks = memory(table)
    sizes = [
        f"{what.removesuffix('_bytes')} {size / 1e3:,.1f} KB"
        for what, size in peaks.items()
        if not isinstance(size, str)
    ]
    lines.append(f"memory     {', '.join(sizes)} of activations at most ({peaks['source']})")
    lines += _gpu(table)
    lines += _machines(table)
    if h.mode == Mode.SANDWICHED:
        lines += _sums(table)
    found = quality(table)
    if found is not None:
        lines.append(
            f"test       {found['builds']} builds: median error {found['median_error']:.1%} (without boundary terms "
            f"{found['additive_median_error']:.1%}), Kendall tau {found['kendall_tau']:.2f}, "
            f"noise floor {found['noise_floor']:.1%}"
        )
    if h.design:
        lines.append(
            f"design     {h.design['builds']} builds in {h.design['seconds']:.0f} s; ended by: {h.design['stopped']}"
        )
    if h.spent:
        lines.append(f"time       {in_words(h.spent)}")
    if h.grid:
        stairs = [len(steps) for steps in h.grid.values()]
        lines.append(
            f"widths     {sum(n > 1 for n in stairs)} of {len(stairs)} channel groups have more than one to choose from, "
            f"{max(stairs)} at most (see `hwsearch table staircase`)"
        )
    for name in dict.fromkeys(e.table for e in h.prior):
        told = sum(e.table == name for e in h.prior)
        lines.append(f"prior      {told} terms of its model are told by the table of {name}")
    lines += [f"whole      {why}" for why in table.network.blocked]
    lines += [f"float      {u.name}: {u.float_only}" for u in table.network.units if u.float_only]
    for unit, reasons in h.unsupported.items():
        lines += [f"unsupported {unit} {variant}: {reason}" for variant, reason in reasons.items()]
    return "\n".join(lines)


def _machines(table: LatencyTable) -> list[str]:
    """Of several machines how far apart they are."""
    lines = [f"machine    {table.machines[0]}: {len(table.of_machine(table.machines[0]))} builds; times are its own"]
    shares = fit(table).apart if len(table.machines) > 1 else {}
    for own in apart(table):
        share, error = shares.get(own.machine, (0.0, 0.0))
        lines.append(
            f"machine    {own.machine}: {len(table.of_machine(own.machine))} builds; reference {own.slower:+.1%}, times against it "
            f"{share:+.1%} ± {error:.1%}"
        )
    return lines if len(lines) > 1 else []


def section_rows(tables: Sequence[LatencyTable]) -> list[dict[str, Any]]:
    """Of each table of a file what it was measured under, how many builds it has and the dense network's time."""
    rows = []
    for table in tables:
        dense = any(b.role == Role.DENSE for b in table.builds)
        rows.append(
            {
                "options": dict(table.header.options),
                "input_shapes": table.network.input_shapes,
                "mode": table.header.mode,
                "builds": len(table.builds),
                "ended": table.header.ended,
                "dense_ms": table.dense_ns / 1e6 if dense else None,
                "prior_terms": len(table.header.prior),
            }
        )
    return rows


def _sums(table: LatencyTable) -> list[str]:
    """Uniform networks as sums over sandwiches."""
    base, offered = str(table.header.options["base"]), table.offered()
    lowest = {u: Variant("int8") if "dense.int8" in own else Variant(base) for u, own in offered.items()}
    lines = []
    try:
        model = fit(table)
        ns, sigma, _ = dense_ns(table)
        lines.append(f"dense fp32 {ns / 1e6:.4g} ms ± {sigma / ns:.0%}, estimated: a sum over sandwiches")
        for what, variants in ((f"all {base}", uniform(table.network, base)), ("all int8", lowest)):
            found = model.predict(variants)
            lines.append(
                f"{what:10s} {found.time_ns / 1e6:.4g} ms ± {found.sigma_ns / found.time_ns:.0%}, estimated"
            )
    except InvalidInput as error:
        lines.append(f"unfinished {error}")
    return [
        *lines,
        "missing    what boundaries between precisions cost (it counts in the standard error only), and whether outputs are right",
    ]

"""Find the widths worth knowing of every channel group: whole networks, narrower in some groups, are built and timed."""

from __future__ import annotations

from collections.abc import Mapping

from hwsearch.device.timelimit import TimeLimit
from hwsearch.latency.staircase import group_times
from hwsearch.network.choices import Candidate, apart, candidate_widths, halving, worth
from hwsearch.network.variants import Variant, settled, uniform
from hwsearch.profiler.recorder import Recorder
from hwsearch.profiler.transfer import known_grid
from hwsearch.table.build import Role

PROBE_SHARE, NARROWEST_SHARE = 0.4, 0.8
"""Of the time limit, what finding the widths worth knowing may take, and after which not even narrowest ones are probed."""

DESIGNED = 50
"""Builds that a design is likely to take, before its first proposal tells more."""


def expected(recorder: Recorder) -> int:
    """How many builds finding the widths and the design after it are likely to take together."""
    network = recorder.setup.network
    several = 1 + any(v.quantized for own in recorder.offered().values() for v in own)
    return several * sum(max(len(candidate_widths(network.channels[g])) for g in c) - 1 for c in apart(network)) + DESIGNED


def find_grid(recorder: Recorder, limit: TimeLimit, share: float = PROBE_SHARE) -> None:
    """Probe widths of every group, and keep those that are faster than every wider one kept.

    Every group is probed at its narrowest width first, then half-way, and so on: where the time runs out, all have a few steps. A
    longer profile goes on with the widths that are missing. Whatever the time limit, the network at its narrowest widths is
    built in every variant, as without it the least that can be met is not known.

    Args:
        share: Of the time limit, after which no width but the narrowest is probed.
    """
    network, base = recorder.setup.network, recorder.setup.options.base
    tried = {g: candidate_widths(n) for g, n in network.channels.items()}
    narrowest = {g: steps[-1] for g, steps in tried.items()}
    base_names = tuple(str(v) for v in uniform(network, base).values())
    lowest = {u: max(v, key=lambda x: x.quantized) for u, v in recorder.offered().items()}
    uniforms = [uniform(network, base), lowest]
    uniforms = uniforms if uniforms[0] != uniforms[1] else uniforms[:1]
    recorder.progress.expect(expected(recorder))
    header = recorder.table.header
    told = {} if header.grid else known_grid(recorder.table, tried, uniforms)
    classes = [[g for g in c if g not in told] for c in apart(network)]
    # what was refused since an earlier profile changes the second uniform allocation, but not what its probes showed
    done = {(b.widths, b.variants == base_names) for b in recorder.table.builds if b.role == Role.PROBE}
    missing = False
    orders = {g: halving(len(steps) - 1) for g, steps in tried.items()}
    for turn in range(max(map(len, orders.values()), default=0)):
        for groups in classes:
            widths = {g: tried[g][orders[g][turn]] for g in groups if turn < len(orders[g])}
            probe = {**network.channels, **widths}
            for number, variants in enumerate(uniforms if widths else ()):
                if (tuple(probe.values()), number == 0) in done:
                    continue
                if limit.late(share if turn else NARROWEST_SHARE):
                    break
                missing = True
                recorder.measure(Role.UNIFORM if number else Role.REFERENCE, Candidate(variants, network.channels))
                recorder.measure(
                    Role.PROBE, Candidate(settled(network, variants, probe, base), probe), short=True
                )
        if not turn:
            measure_variants(recorder, narrowest)
    if header.grid and not missing:
        return
    times = group_times(recorder.table)
    grid = {
        g: told.get(g) or (worth(times[g]) if g in times else sorted({n, narrowest[g]}, reverse=True))
        for g, n in network.channels.items()
    }
    if limit.late():  # what was built together, then, is the narrowest of all
        grid = {g: sorted({*steps, narrowest[g]}, reverse=True) for g, steps in grid.items()}
    else:
        measure_variants(recorder, {g: steps[-1] for g, steps in grid.items()})
    recorder.keep(recorder.table.with_header(grid=grid))


def measure_variants(recorder: Recorder, widths: Mapping[str, int]) -> None:
    """Units at some widths in every variant that they can become, a network for each; what is known is not built again."""
    network, base = recorder.setup.network, recorder.setup.options.base
    for variant in recorder.setup.variants():
        for _ in range(2):  # a second time without the units that did not execute as asked
            offered = recorder.offered()
            chosen = {u: variant if variant in own else Variant(base) for u, own in offered.items()}
            candidate = Candidate(settled(network, chosen, widths, base), dict(widths))
            if recorder.known_cells().issuperset(candidate.cells(network)):
                break
            recorder.measure(Role.UNIFORM, candidate, short=True)

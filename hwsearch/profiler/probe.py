"""Find the widths worth knowing of every channel group: whole networks, narrower in some groups, are built and timed."""

from __future__ import annotations

from hwsearch.device.timelimit import TimeLimit
from hwsearch.latency.staircase import group_times
from hwsearch.network.choices import Candidate, apart, candidate_widths, halving, worth
from hwsearch.network.variants import settled, uniform
from hwsearch.profiler.recorder import Recorder
from hwsearch.profiler.transfer import known_grid
from hwsearch.table.build import Role

PROBE_SHARE = 0.4
"""Of the time limit, what finding the widths worth knowing may take."""


def find_grid(recorder: Recorder, limit: TimeLimit) -> None:
    """Probe widths of every group, and keep those that are faster than every wider one kept.

    Every group is probed at its narrowest width first, whatever the time limit, as without it the least that can be met is not
    known; then half-way, and so on: where the time runs out, all have a few steps. A longer profile goes on with the widths that
    are missing.
    """
    network, base = recorder.setup.network, recorder.setup.options.base
    tried = {g: candidate_widths(n) for g, n in network.channels.items()}
    base_names = tuple(str(v) for v in uniform(network, base).values())
    lowest = {u: max(v, key=lambda x: x.quantized) for u, v in recorder.offered().items()}
    uniforms = [uniform(network, base), lowest]
    uniforms = uniforms if uniforms[0] != uniforms[1] else uniforms[:1]
    recorder.progress.expect(
        len(uniforms) * sum(max(len(tried[g]) for g in c) - 1 for c in apart(network)) + 20
    )
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
                if turn and limit.late(PROBE_SHARE):
                    break
                missing = True
                recorder.measure(Role.UNIFORM if number else Role.REFERENCE, Candidate(variants, network.channels))
                recorder.measure(
                    Role.PROBE, Candidate(settled(network, variants, probe, base), probe), short=True
                )
    if header.grid and not missing:
        return
    times = group_times(recorder.table)
    grid = {g: told.get(g) or (worth(times[g]) if g in times else [n]) for g, n in network.channels.items()}
    recorder.keep(recorder.table.with_header(grid=grid))

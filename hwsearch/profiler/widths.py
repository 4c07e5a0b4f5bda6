"""The widths that a profile learns of every channel group, and those of them that are worth choosing from."""

from __future__ import annotations

from collections.abc import Mapping

from hwsearch.latency.staircase import group_times
from hwsearch.network.choices import Candidate, candidate_widths, worth
from hwsearch.network.variants import Variant, settled
from hwsearch.profiler.recorder import Recorder
from hwsearch.table.build import Role


def learn_widths(recorder: Recorder) -> None:
    """Builds of a design are to hold every candidate width; the network at its narrowest is built in every variant, whatever the
    time limit, as without it the least that can be met is not known."""
    tried = {g: candidate_widths(n) for g, n in recorder.setup.network.channels.items()}
    recorder.keep(recorder.table.with_header(grid=tried))
    measure_variants(recorder, {g: steps[-1] for g, steps in tried.items()})


def keep_worth(recorder: Recorder) -> None:
    """Of each group the widths that are faster than every wider one kept: a search chooses from those."""
    times = group_times(recorder.table)
    narrowest = {g: steps[-1] for g, steps in recorder.table.grid().items()}
    grid = {g: worth(own) if (own := times.get(g)) else sorted({n, narrowest[g]}, reverse=True)
            for g, n in recorder.setup.network.channels.items()}  # fmt: skip
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

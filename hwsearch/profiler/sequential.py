"""Build whole networks until more of them would tell little more: the sequential design of a profile, and what ends it."""

from __future__ import annotations

import math

import numpy as np

from hwsearch.device.spent import PROPOSING
from hwsearch.device.timelimit import TimeLimit
from hwsearch.network.choices import Candidate, all_cells, cover, whole
from hwsearch.profiler.heldout import HeldOut
from hwsearch.profiler.proposal import Proposal, propose
from hwsearch.profiler.recorder import Recorder
from hwsearch.table.build import Role

MOST_BUILDS = 400
FIRST = 4
"""Builds of a design that cover, before the first is chosen for what it tells; one more than a unit has variants, if more."""
BATCH = 4
"""Builds chosen at a time."""
LATE = "the time limit"
NOTHING = "there is nothing to choose between"
DESIGN_SHARE = 0.9
"""Of the time limit, after which no build of the design begins; the rest is for held-out ones."""
HELDOUT_EVERY = 5
"""Every so many builds one is kept from the fit, to report its error on."""
GOAL, LEAST_GAIN, DOUBT = 0.01, 0.0003, 0.05
"""A design ends where the standard error of likely allocations is below the first, or another build would lower it by less than the
second; but not while one in four held-out builds is predicted with an error above the third."""
FALL, SETTLED = 0.7, 20
"""The standard error after n builds falls about as n to the minus the first, from so many builds on: it did in profiles of four
networks. A proposal tells less well how much the next builds lower it: from one to the next that goes up and down by half."""


def build_by_design(recorder: Recorder, limit: TimeLimit, count: int | None = None) -> None:
    """Builds until more of them would tell little more, every fifth held out; `count` of them where one is given.

    A first batch covers variants and classes of boundaries; the next are those that most lower the standard error of what
    a search is likely to pick. What stopped it is kept in the header.
    """
    begun, steps = recorder.setup.clock(), sum(map(len, recorder.table.grid().values()))
    before = recorder.table.header.design
    built = recorder.count(Role.DESIGN, Role.HELDOUT, Role.TEST)
    if not count and (before.get("builds"), before.get("steps")) == (built, steps) and before["enough"]:
        return
    held = HeldOut(recorder, limit)
    stopped, proposal = _until_enough(recorder, limit, held, count)
    if not count and stopped != NOTHING:
        held.complete()
    recorder.keep(
        recorder.table.with_header(
            design={
                "stopped": stopped,
                "enough": stopped != LATE,
                "builds": recorder.count(Role.DESIGN, Role.HELDOUT, Role.TEST),
                "steps": steps,
                "seconds": round(before.get("seconds", 0.0) + (recorder.setup.clock() - begun) / 1e9, 1),
                "error": round(proposal.error, 5) if proposal else None,
            }
        )
    )


def most_builds(recorder: Recorder) -> int:
    """Builds of a design: with those before it as many as units have variants and narrower widths, if those are many.

    Fewer where other tables of the device tell the same layers: boundaries and the whole are then left to learn.
    """
    network, grid, offered = recorder.setup.network, recorder.table.grid(), recorder.offered()
    levels = sum(len(offered[u.name]) * (1 + sum(len(grid[g]) - 1 for g in u.groups)) for u in network.units)
    others = len(recorder.table.builds) - recorder.count(Role.DESIGN, Role.HELDOUT, Role.TEST)
    least = 24 if any(len(steps) > 1 for steps in grid.values()) else 6
    most = int(np.clip(levels - others, least, MOST_BUILDS))
    return max(4, round(most * (1.0 - 0.4 * _known_share(recorder))))


def _until_enough(
    recorder: Recorder, limit: TimeLimit, held: HeldOut, count: int | None
) -> tuple[str, Proposal | None]:
    """(why no further build is made, the last proposal)."""
    network, grid = recorder.setup.network, recorder.table.grid()
    queue: list[Candidate] = []
    proposal: Proposal | None = None
    most = count or most_builds(recorder)
    first = round(max(FIRST, 1 + max(map(len, recorder.offered().values()))) * (1.0 - _known_share(recorder)))
    while True:
        offered = recorder.offered()
        designed = recorder.count(Role.DESIGN)
        # what a resumed profile draws depends on what is on disk, not on when it was killed
        rng = np.random.default_rng([recorder.seed, designed])
        if all(len(v) == 1 for v in (*offered.values(), *grid.values())):
            return NOTHING, proposal
        if designed + (held.number if count else 0) >= most:
            return f"{most} builds were asked for" if count else f"{most} builds are enough", proposal
        if limit.late(DESIGN_SHARE):
            return LATE, proposal
        if (designed + held.number) % HELDOUT_EVERY == HELDOUT_EVERY - 1 and held.add(rng):
            queue = [c for c in queue if c != recorder.candidates()[-1]]  # what is held out is not built for the fit
            continue
        if designed < first:
            candidate = cover(
                network, offered, grid, recorder.candidates(), rng, known=recorder.table.known()
            )
        else:
            if not queue:
                with recorder.setup.spent.on(PROPOSING):
                    proposal = propose(recorder.table, offered, grid, rng, BATCH, recorder.setup.spent)
                queue = list(proposal.candidates)
                if count is None:
                    builds = len(recorder.table.builds)
                    if builds >= SETTLED:
                        needed = math.ceil(enough_builds(proposal.error, builds)) - builds
                        recorder.progress.expect(int(np.clip(needed, min(BATCH, most - designed), most - designed)))
                    if why := _why_enough(proposal.error, builds):
                        held.complete()
                        if not _doubted(held):
                            return why, proposal
            candidate = queue.pop(0)
            if any(str(v) not in map(str, offered[u]) for u, v in candidate.variants.items()):
                continue  # refused since it was proposed
        recorder.measure(Role.DESIGN, candidate, short=True)


def enough_builds(error: float, builds: int) -> float:
    """How many builds a design needs in all, by the standard error after so many: from there on the next lowers it by less than
    `LEAST_GAIN`."""
    falling = (FALL * error * builds**FALL / LEAST_GAIN) ** (1.0 / (1.0 + FALL))
    return float(min(falling, builds * (error / GOAL) ** (1.0 / FALL)))


def _why_enough(error: float, builds: int) -> str:
    """Why no further build is worth its time; empty where one is."""
    if builds < enough_builds(error, builds):
        return ""
    if error <= GOAL:
        return f"likely allocations are known to {error:.1%}"
    return f"another build would lower the error of likely allocations, {error:.1%}, by less than {LEAST_GAIN:.2%}"


def _doubted(held: HeldOut) -> bool:
    """Whether held-out builds contradict what the model believes of its own errors: then more builds are to tell."""
    error = held.error()
    return error is not None and error > DOUBT


def _known_share(recorder: Recorder) -> float:
    """Share of the cells at whole widths that other tables of the device tell."""
    network = recorder.setup.network
    cells = all_cells(network, recorder.offered(), whole(network))
    return len(cells & recorder.table.known()) / len(cells)

"""Builds that are kept from the fit, to tell by them how far off its predictions are.

Held-out builds are looked at while the profile goes on: they may end it, and widen its predictions. An error reported on them would
be that of builds chosen for a small one, so every third is a test build, which nothing looks at until the profile is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwsearch.device.spent import FITTING
from hwsearch.device.timelimit import TimeLimit
from hwsearch.latency.model import fit
from hwsearch.network.choices import Candidate, random_candidate
from hwsearch.network.variants import Variant
from hwsearch.profiler.recorder import Recorder
from hwsearch.table.build import Role
from hwsearch.table.table import usable

LEAST = 4
"""Held-out builds by which a profile tells anything."""
TEST_EVERY = 3
"""Of the builds that are kept out every so many is a test build."""
LEAST_TESTED = 2
"""Test builds from which on an error is reported on them."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out and test builds of a profile: random allocations of variants that units were built in, at any widths."""

    recorder: Recorder
    limit: TimeLimit

    @property
    def number(self) -> int:
        return self.recorder.count(Role.HELDOUT, Role.TEST)

    def add(self, rng: np.random.Generator) -> bool:
        """Measure one more; False where none is found."""
        candidate = self._drawn(rng)
        if candidate is None:
            return False
        self.recorder.measure(Role.TEST if self.number % TEST_EVERY == 1 else Role.HELDOUT, candidate)
        return True

    def complete(self) -> None:
        """As many as it takes to tell anything by them, while there is time."""
        for _ in range(4 * LEAST):
            enough = self.recorder.count(Role.HELDOUT) >= LEAST and self.recorder.count(Role.TEST) >= LEAST_TESTED
            if enough or self.limit.late():
                return
            if not self.add(np.random.default_rng([self.recorder.seed, len(self.recorder.table.builds)])):
                return

    def error(self) -> float | None:
        """The 75th percentile of the fit's errors on them, from four of them on."""
        table = self.recorder.table
        with self.recorder.setup.spent.on(FITTING):
            model = fit(table)
        errors = []
        for build in usable(table):
            if build.role == Role.HELDOUT and not table.disturbed(build) and model.predicts(build):
                time = model.predict_build(build).time_ns
                errors.append(abs(time / table.time_ns(build) - 1.0))
        return float(np.percentile(errors, 75)) if len(errors) >= LEAST else None

    def _drawn(self, rng: np.random.Generator) -> Candidate | None:
        recorder, done = self.recorder, self.recorder.candidates()
        network, grid = recorder.setup.network, recorder.table.grid()
        measured = {u: tuple(map(Variant.parse, own)) for u, own in recorder.table.offered().items()}
        for _ in range(50):
            drawn = random_candidate(network, measured, grid, rng)
            if drawn not in done:
                return drawn
        return None

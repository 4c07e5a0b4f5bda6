"""Builds that are kept from the fit, to tell by them how far off its predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwsearch.device.timelimit import TimeLimit
from hwsearch.latency.model import fit
from hwsearch.network.choices import Candidate, random_candidate
from hwsearch.profiler.recorder import Recorder
from hwsearch.table.build import Role
from hwsearch.table.table import usable

LEAST = 4
"""Held-out builds by which a profile tells anything."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out builds of a profile: allocations of cells that were all built, none of which was."""

    recorder: Recorder
    limit: TimeLimit

    @property
    def number(self) -> int:
        return self.recorder.count(Role.HELDOUT)

    def add(self, rng: np.random.Generator) -> bool:
        """Measure one more; False where none is found."""
        candidate = self._drawn(rng)
        if candidate is None:
            return False
        self.recorder.measure(Role.HELDOUT, candidate)
        return True

    def complete(self) -> None:
        """As many as it takes to tell anything by them, while there is time."""
        for _ in range(4 * LEAST):
            if self.number >= LEAST or self.limit.late():
                return
            if not self.add(np.random.default_rng([self.recorder.seed, len(self.recorder.table.builds)])):
                return

    def error(self) -> float | None:
        """The 75th percentile of the fit's errors on them, from four of them on."""
        table = self.recorder.table
        model = fit(table)
        errors = []
        for build in usable(table):
            if build.role == Role.HELDOUT and not table.disturbed(build) and model.predicts(build):
                time = model.predict_build(build).time_ns
                errors.append(abs(time / table.time_ns(build) - 1.0))
        return float(np.percentile(errors, 75)) if len(errors) >= LEAST else None

    def _drawn(self, rng: np.random.Generator) -> Candidate | None:
        recorder = self.recorder
        network, grid = recorder.setup.network, recorder.table.grid()
        done, built = recorder.candidates(), self._built()
        for _ in range(50):
            drawn = random_candidate(network, recorder.offered(), grid, rng)
            candidate = self._known(drawn, built)
            if candidate not in done and built.issuperset(candidate.cells(network)):
                return candidate
        return None

    def _built(self) -> set[tuple[str, str]]:
        """Cells that a fit will know."""
        table = self.recorder.table
        built = {
            cell
            for b in usable(table)
            if b.role != Role.HELDOUT
            for cell in table.candidate(b).cells(self.recorder.setup.network)
        }
        return built | table.known()

    def _known(self, candidate: Candidate, built: set[tuple[str, str]]) -> Candidate:
        """The candidate with another variant where that of a unit was not built at these widths."""
        offered = self.recorder.offered()
        variants = {
            unit: next((v for v in (variant, *offered[unit]) if (signature, str(v)) in built), variant)
            for (unit, variant), (signature, _) in zip(
                candidate.variants.items(), candidate.cells(self.recorder.setup.network), strict=True
            )
        }
        return Candidate(variants, candidate.widths)

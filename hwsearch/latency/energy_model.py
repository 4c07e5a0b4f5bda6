"""The energy of an inference in place of its time: the same model, fitted on what counters said of each build.

A build's energy is a ratio to the reference's, measured in the same rounds, as its time is. What a node takes is not counted by
itself: a build's energy is shared out over its nodes by their times, as if it drew the same power all along. That it does not
is left to the end-to-end equations of all builds and to sigma. On simulated devices whose power depends on the precision
this predicts new builds better than end-to-end equations alone wherever there are widths, which are built once each; with a
few cells only, both do. Energies are in nJ wherever the model says ns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwsearch.errors import InvalidInput
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.table.build import Build, Role
from hwsearch.table.header import Mode
from hwsearch.table.table import LatencyTable

NANO = 1e9


def energy_table(table: LatencyTable) -> LatencyTable:
    """The table with energies where it has times, of the builds whose energy was measured.

    `time_ns`, `dense_ns` and `header.reference_ns` of it are in nJ. What other tables tell of times is left out.
    Raises InvalidInput, saying what is missing, where its profile counted no energy.
    """
    builds = [b for b in map(_as_energy, table.builds) if b is not None and not b.partial]
    missing = [role for role in (Role.REFERENCE, Role.DENSE) if role not in {b.role for b in builds}]
    if missing or table.header.mode != Mode.CONTEXT:
        raise InvalidInput(
            f"a budget on energy needs energies, and the table has none of its {' and '.join(missing) or 'whole networks'}: "
            f"it was profiled where no counter was read ({table.header.device.get('chip')}, {table.header.backend}); "
            "`hwsearch devices` says whether this machine has one, then profile again into a new file (on a GPU with --energy)"
        )
    joules = [b.reference_energy_j for b in table.builds if b.reference_energy_j]
    return LatencyTable(
        replace(table.header, reference_ns=float(np.median(joules)) * NANO, prior=()), tuple(builds)
    )


def fit_energy(table: LatencyTable) -> LatencyModel:
    """The model of energies: `predict(...).time_ns` is nJ of one inference. Raises InvalidInput as `energy_table` does."""
    return fit(energy_table(table))


def _as_energy(build: Build) -> Build | None:
    ratio = build.energy_ratio
    if ratio is None:
        return None
    off = 1.96 * (build.energy_error or 0.0)
    return replace(build, ratio=ratio, low=ratio * (1 - off), high=ratio * (1 + off))

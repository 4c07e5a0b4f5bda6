"""What a device's other tables say of the layers of a network that is about to be profiled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.latency.model import fit
from hwsearch.network.choices import FASTER, candidate_widths, worth
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant
from hwsearch.table.header import Evidence, Mode
from hwsearch.table.table import LatencyTable

OWN = ("batch", "residual")
"""Options that may differ: what they change is in the shapes of units."""


def signatures(network: Network) -> set[str]:
    """Of every unit at all widths that a profile would try."""
    found = set()
    for unit in network.units:
        tried = [candidate_widths(network.channels[g]) for g in unit.groups]
        for widths in product(*tried):
            found.add(network.unit_at(unit.name, dict(zip(unit.groups, widths, strict=True))).signature)
    return found


def comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which a table has to agree with another for it to tell of its layers."""
    return {k: v for k, v in options.items() if k not in OWN}


def evidence(prior: LatencyTable, table: LatencyTable, wanted: Collection[str]) -> list[Evidence]:
    """Terms of the model fitted on another table that concern units of these signatures, and boundaries as such.

    Raises IncompatibleTables where it is of another device, backend, runtime or setup than `table`.
    """
    h = table.header
    prior.with_header(options=comparable(prior.header.options)).require(
        device=h.device, backend=h.backend, options=comparable(h.options), versions=h.versions
    )
    if prior.header.mode != Mode.CONTEXT:
        raise IncompatibleTables(
            "a table made layer by layer says nothing of layers in context; give another as --prior"
        )
    refused = {
        (u.signature, variant)
        for u in prior.network.units
        for variant in prior.header.unsupported.get(u.name, {})
    }
    name = f"{prior.network.name} ({prior.network.fingerprint})"
    found = []
    for feature, (ns, error_ns) in fit(prior).terms().items():
        if feature[0] == "unit" and (feature[1] not in wanted or (feature[1], feature[2]) in refused):
            continue
        if feature[0] in ("unit", "pool", "pool bytes"):
            found.append(Evidence(feature, ns, error_ns, name))
    return found


def known_grid(
    table: LatencyTable, tried: Mapping[str, Sequence[int]], uniforms: Sequence[Mapping[str, Variant]]
) -> dict[str, list[int]]:
    """Widths worth knowing of the channel groups whose stairs other tables tell, so that no probe is needed.

    tried: widths of each group. uniforms: allocations that each of them would be probed in. A group is told where every unit
    that it runs through is, at the whole width and at two or more of the narrower ones tried, the others whole. A step has to
    stand out of the standard error of what is told.
    """
    network = table.network
    units_told = [e for e in table.header.prior if e.feature[0] == "unit"]
    told = {(e.feature[1], e.feature[2]): e.ns for e in units_told}
    errors = {(e.feature[1], e.feature[2]): e.error_ns for e in units_told}
    found = {}
    for group, whole in network.channels.items():
        units = [u.name for u in network.units if group in u.groups]
        times, spread = {}, [FASTER]
        for width in tried[group]:
            cells = [
                [(network.unit_at(u, {group: width}).signature, str(variants[u])) for u in units]
                for variants in uniforms
            ]
            if all(cell in told for own in cells for cell in own):
                times[width] = [sum(told[cell] for cell in own) for own in cells]
                spread += [
                    math.hypot(*(errors[cell] for cell in own)) / time
                    for own, time in zip(cells, times[width], strict=True)
                    if time > 0
                ]
        if whole in times and (len(times) > 2 or len(tried[group]) == len(times) > 1):
            found[group] = worth(times, faster=min(max(2.0 * statistics.median(spread), FASTER), 0.2))
    return found


def of_sections(
    others: Sequence[LatencyTable], table: LatencyTable, wanted: Collection[str]
) -> list[Evidence]:
    """What the other tables in a file tell; nothing where they are of another setup, or too short to fit.

    Of their own measurements alone: what one section took from another would count twice.
    """
    found: list[Evidence] = []
    for other in others:
        try:
            found += evidence(other.with_header(prior=()), table, wanted)
        except (IncompatibleTables, InvalidInput):
            continue
    return found

"""What a device's other tables say of the layers of a network that is about to be profiled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Any

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.latency.model import fit
from hwsearch.network.choices import candidate_widths
from hwsearch.network.network import Network
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

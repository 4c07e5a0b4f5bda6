"""What the size of a deployed network is made of, and what keeps it from falling further."""

from __future__ import annotations

from collections.abc import Sequence

from hwsearch.allocate.budget import quantity
from hwsearch.allocate.space import Space
from hwsearch.network.variants import STORAGE, Variant, weight_bytes

NOTABLE = 0.05
"""Of the whole: smaller parts are not named."""
NAMED = 3
_KINDS = {
    "embedding": "embeddings",
    "recurrent": "weights of LSTM and GRU",
    "constant": "constants",
    "linear": "linear layers",
    "matmul": "matrix products",
}
_FIXED, _GRAPH = "norms, buffers and other tensors of no layer", "the graph"


def parts(space: Space, choice: Sequence[int]) -> dict[str, int]:
    """Kind of what is stored -> its bytes under a choice; they sum to its size."""
    network = space.table.network
    widths = space.widths(choice)
    sizes: dict[str, int] = {}
    for unit, variant in space.variants(choice).items():
        own = network.unit_at(unit, widths)
        kind = "transposed convolutions" if "transpose" in own.op else _KINDS.get(own.op, "convolutions")
        sizes[kind] = sizes.get(kind, 0) + weight_bytes(own, variant)
    sizes[_FIXED] = network.narrow(widths).fixed_bytes
    graph = space.problem.cost("size", choice) - sum(sizes.values())
    sizes[_FIXED] += min(graph, 0)  # what the exporter made smaller
    sizes[_GRAPH] = max(graph, 0)
    return sizes


def explained(space: Space, choice: Sequence[int]) -> str:
    """What keeps the size of a choice from falling, the largest first; for the choice of least size."""
    sizes = parts(space, choice)
    whole = sum(sizes.values())
    told = []
    for kind, size in sorted(sizes.items(), key=lambda pair: -pair[1]):
        if size < NOTABLE * whole:
            continue
        told.append(f"{kind} {size / whole:.0%} ({quantity('size', size)})")
        if kind == _FIXED:
            named = (
                f"{path} {quantity('size', n)}: {why}" for path, n, why in space.table.network.fixed[:NAMED]
            )
            told[-1] += f" [{'; '.join(named)}]"
    return ", ".join(told) + _floating(space, choice, whole)


def _floating(space: Space, choice: Sequence[int], whole: int) -> str:
    """The units that stay floating in a choice of least size, and why."""
    network, refused = space.table.network, space.table.header.unsupported
    widths = space.widths(choice)
    smaller = {u.name: any(not c.variant.plain for c in own) for u, own in zip(network.units, space.cells, strict=True)}
    reasons: dict[str, list[str]] = {}
    bytes_of: dict[str, int] = {}
    for unit, variant in space.variants(choice).items():
        if not variant.plain or not network[unit].weight_shape:
            continue
        why = refused.get(unit, {}).get(str(STORAGE)) or (
            "in int8 it takes no less, with what that adds to the graph"
            if smaller[unit]
            else f"the table has no {STORAGE}: profile and score again with --axes width,precision,storage"
            if not any(c.variant == STORAGE for own in space.cells for c in own)
            else "no smaller form of it was measured, or its loss is not known"
        )
        reasons.setdefault(why, []).append(unit)
        bytes_of[why] = bytes_of.get(why, 0) + weight_bytes(network.unit_at(unit, widths), variant)
    told = [
        f"; {size / whole:.0%} stays floating ({', '.join(units[:NAMED])}{', ...' if len(units) > NAMED else ''}): {why}"
        for why, units in reasons.items()
        if (size := bytes_of[why]) >= NOTABLE * whole
    ]
    return "".join(told)

"""A choice of the solver -> an Allocation: predicted costs, proof and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from hwsearch.allocate.allocation import Allocation
from hwsearch.allocate.budget import LOSS, Budget
from hwsearch.allocate.problem import Solution
from hwsearch.allocate.space import Space
from hwsearch.latency.layer_sum import dense_ns
from hwsearch.network.variants import uniform


def as_allocation(
    space: Space, solution: Solution, budgets: Sequence[Budget], wanted: Mapping[str, float], minimize: str = LOSS
) -> Allocation:
    """A solution with its predicted costs, proof and provenance."""
    variants, widths = space.variants(solution.choice), space.widths(solution.choice)
    prediction, energy = space.predict(solution.choice), space.predict_energy(solution.choice)
    return _allocation(
        space,
        {u: str(v) for u, v in variants.items()},
        widths,
        {
            **({"latency_ns": prediction.time_ns, "sigma_ns": prediction.sigma_ns} if prediction else {}),
            "size_bytes": solution.costs["size"],
            "memory_bytes": space.memory(solution.choice),
            "macs": solution.costs["macs"],
            "loss": solution.loss,
            **{f"{column}_ns": ratio * prediction.time_ns for column, ratio in space.tails.items() if prediction},
            **({"energy_nj": energy.time_ns, "energy_sigma_nj": energy.sigma_ns} if energy else {}),
        },
        budgets,
        wanted,
        {
            "status": solution.status, "gap": solution.gap, "bound": solution.bound,
            **({"minimized": minimize} if minimize != LOSS else {}),
        },
        str(space.table.header.options["base"]),
    )


def dense_allocation(space: Space, budgets: Sequence[Budget], wanted: Mapping[str, float]) -> Allocation:
    """The dense fp32 network, which loses nothing."""
    predicted = {
        **_latency(space),
        **({"sigma_ns": dense_ns(space.table)[1]} if space.dense.latency is not None else {}),
        "size_bytes": round(space.dense["size"]),
        "memory_bytes": round(space.dense["memory"]),
        "macs": space.table.network.macs,
        "loss": 0.0,
        **{f"{column}_ns": space.dense[column] for column in space.tails},
        **({"energy_nj": space.dense["energy"]} if space.energy else {}),
    }
    variants = {u: str(v) for u, v in uniform(space.table.network, "fp32").items()}
    proof = {"status": "optimal", "gap": 0.0, "bound": 0.0}
    return _allocation(space, variants, space.table.network.channels, predicted, budgets, wanted, proof, "fp32")


def _allocation(
    space: Space,
    variants: dict[str, str],
    widths: Mapping[str, int],
    predicted: dict[str, Any],
    budgets: Sequence[Budget],
    wanted: Mapping[str, float],
    proof: dict[str, Any],
    base: str,
) -> Allocation:
    header = space.table.header
    network = space.table.network
    return Allocation(
        variants=variants,
        widths=dict(widths),
        order=_order(space, widths),
        predicted=predicted,
        dense={
            **_latency(space),
            "size_bytes": round(space.dense["size"]),
            "memory_bytes": round(space.dense["memory"]),
            **({"energy_nj": space.dense["energy"]} if space.energy else {}),
            **({"estimated": 1} if space.table.builds and dense_ns(space.table)[2] else {}),
        },
        budgets=[{"text": str(b), "column": b.column, "limit": wanted[b.column]} for b in budgets],
        solver=proof,
        network_name=network.name,
        network=network.fingerprint,
        weights_digest=network.weights_digest,
        device={"id": header.device.get("id"), "chip": header.device.get("chip")},
        backend=header.backend,
        options={**header.options, "base": base},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _latency(space: Space) -> dict[str, float]:
    """Of the dense network; nothing where it was not measured."""
    latency = space.dense.latency
    return {} if latency is None else {"latency_ns": latency}


def _order(space: Space, widths: Mapping[str, int]) -> dict[str, str]:
    if all(w == space.table.network.channels[g] for g, w in widths.items()):
        return {}
    return {g: " ".join(map(str, space.sensitivity.order[g])) for g in widths}

"""Table + sensitivities + budgets -> Allocation or Front. No torch, no runtime: this runs on a laptop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.allocate.front import Front, as_front, sweep
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Cost, Problem, Solution
from hwsearch.allocation import Allocation
from hwsearch.budget import Budget, parse_budgets
from hwsearch.errors import IncompatibleTables, Infeasible
from hwsearch.latency import LatencyModel, Prediction, fit
from hwsearch.table import LatencyTable
from hwsearch.variants import Variant, uniform, weight_bytes

if TYPE_CHECKING:
    from hwsearch.scoring import SensitivityTable

KAPPA = 1.0
"""How many standard errors of the prediction a latency budget keeps in reserve."""


@dataclass(frozen=True)
class Space:
    """What may be chosen and what it costs: a problem without its budgets."""

    table: LatencyTable
    sensitivity: SensitivityTable
    model: LatencyModel
    problem: Problem

    @property
    def dense(self) -> dict[str, float]:
        """Costs of the dense fp32 network, in ns, bytes and MACs."""
        return {
            "latency": self.table.dense_ns,
            "size": float(self.table.header.dense_file_bytes),
            "macs": float(self.table.network.macs),
        }

    def variants(self, choice: Sequence[int]) -> dict[str, Variant]:
        names = zip(self.problem.variables, self.problem.choices, choice, strict=True)
        return {unit: Variant.parse(choices[c]) for unit, choices, c in names}

    def predict(self, choice: Sequence[int]) -> Prediction:
        return self.model.predict(self.variants(choice))

    def with_budgets(self, budgets: Mapping[str, int]) -> Problem:
        p = self.problem
        return Problem(p.variables, p.choices, p.loss, p.costs, dict(budgets))


def space(table: LatencyTable, sensitivity: SensitivityTable, model: LatencyModel | None = None) -> Space:
    """Join a table and sensitivities. Raises IncompatibleTables where they are of different networks."""
    sensitivity.require(table.network)
    model = model or fit(table)
    offered = table.offered()
    units = table.network.units
    variants = [[Variant.parse(v) for v in offered[u.name]] for u in units]
    for unit, choices in zip(units, variants, strict=True):
        if not choices:
            raise IncompatibleTables(f"the table offers no variant of unit {unit.name}; profile again")
    position = {u.name: i for i, u in enumerate(units)}
    pairwise: dict[tuple[int, int], Any] = {}
    for src, dst in dict.fromkeys((e.src, e.dst) for e in table.network.edges):
        i, j = position[src], position[dst]
        terms = model.edge_ns(src, dst)
        matrix = np.array(
            [[round(terms[a.quantized, b.quantized]) for b in variants[j]] for a in variants[i]], np.int64
        )
        key, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
        pairwise[key] = pairwise.get(key, 0) + matrix
    latency = Cost(
        fixed=round(model.rest_ns),
        unary=tuple(
            np.array([round(model.unit_ns(u.name, v)) for v in choices], np.int64)
            for u, choices in zip(units, variants, strict=True)
        ),
        pairwise=pairwise,
    )
    size = Cost(
        fixed=table.network.fixed_bytes + table.header.graph_bytes,
        unary=tuple(
            np.array([weight_bytes(u, v) for v in choices], np.int64)
            for u, choices in zip(units, variants, strict=True)
        ),
        pairwise={},
    )
    # precision leaves the work as it is; widths will change it
    macs = Cost(table.network.macs, tuple(np.zeros(len(choices), np.int64) for choices in variants))
    loss = tuple(
        np.array([sensitivity[u.name, str(v)] for v in choices])
        for u, choices in zip(units, variants, strict=True)
    )
    problem = Problem(
        variables=tuple(u.name for u in units),
        choices=tuple(tuple(str(v) for v in choices) for choices in variants),
        loss=loss,
        costs={"latency": latency, "size": size, "macs": macs},
        budgets={},
    )
    return Space(table, sensitivity, model, problem)


def limits(budgets: Sequence[Budget], dense: Mapping[str, float]) -> dict[str, int]:
    """Budgets as integer ns and bytes, relative ones against the dense fp32 network."""
    return {b.column: b.resolve(dense[b.column]) for b in budgets}


def search(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[str | Budget],
    *,
    kappa: float = KAPPA,
    model: LatencyModel | None = None,
    tighten: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation of least loss whose predicted costs meet every budget, solved exactly.

    Latency counts as T + kappa * sigma. Where the dense fp32 network meets every budget, it is the answer.
    tighten: integer limits that replace the budgets' own (the closed loop's).
    Raises Infeasible naming the least that can be met; InvalidInput on malformed budgets.
    """
    parsed = parse_budgets([str(b) for b in budgets])
    at = space(table, sensitivity, model)
    wanted = limits(parsed, at.dense)
    dense_meets = all(math.floor(at.dense[column]) <= limit for column, limit in wanted.items())
    if dense_meets and not tighten:
        return _dense_allocation(at, parsed, wanted)
    bounds = {**wanted, **(tighten or {})}
    solution = _solve_with_reserve(at, bounds, kappa)
    return as_allocation(at, solution, parsed, wanted)


def _solve_with_reserve(at: Space, bounds: Mapping[str, int], kappa: float) -> Solution:
    """Shrink the latency limit until T + kappa * sigma of the answer is within it too.

    Where only the reserve makes it infeasible, the answer that is nearest to having one is returned: whether it
    meets the budget is for the measurement to say.
    """
    best = solve(at.with_budgets(bounds))
    if "latency" not in bounds or kappa == 0:
        return best
    limit = bounds["latency"]
    for _ in range(8):
        prediction = at.predict(best.choice)
        over = prediction.time_ns + kappa * prediction.sigma_ns - bounds["latency"]
        if over <= 0:
            return best
        limit = min(limit - max(1, round(over / 2)), round(bounds["latency"] - kappa * prediction.sigma_ns))
        try:
            best = solve(at.with_budgets({**bounds, "latency": limit}))
        except Infeasible:
            return _fastest(at, bounds)
    return best


def _fastest(at: Space, bounds: Mapping[str, int]) -> Solution:
    """The least loss at the least latency that the other budgets allow."""
    least = minimise(at.with_budgets(bounds), "latency").costs["latency"]
    return solve(at.with_budgets({**bounds, "latency": least}))


def as_allocation(
    at: Space, solution: Solution, budgets: Sequence[Budget], wanted: Mapping[str, int]
) -> Allocation:
    """A solution with its predicted costs, proof and provenance."""
    variants = at.variants(solution.choice)
    prediction = at.model.predict(variants)
    return _allocation(
        at,
        {u: str(v) for u, v in variants.items()},
        {
            "latency_ns": prediction.time_ns,
            "sigma_ns": prediction.sigma_ns,
            "size_bytes": solution.costs["size"],
            "loss": solution.loss,
        },
        budgets,
        wanted,
        {"status": solution.status, "gap": solution.gap, "bound": solution.bound},
        str(at.table.header.options["base"]),
    )


def _dense_allocation(at: Space, budgets: Sequence[Budget], wanted: Mapping[str, int]) -> Allocation:
    build = at.table.find("dense")
    predicted = {
        "latency_ns": at.dense["latency"],
        "sigma_ns": (build.high - build.low) / 3.92 * at.table.header.reference_ns,
        "size_bytes": round(at.dense["size"]),
        "loss": 0.0,
    }
    variants = {u: str(v) for u, v in uniform(at.table.network, "fp32").items()}
    proof = {"status": "optimal", "gap": 0.0, "bound": 0.0}
    return _allocation(at, variants, predicted, budgets, wanted, proof, "fp32")


def _allocation(
    at: Space,
    variants: dict[str, str],
    predicted: dict[str, Any],
    budgets: Sequence[Budget],
    wanted: Mapping[str, int],
    proof: dict[str, Any],
    base: str,
) -> Allocation:
    header = at.table.header
    network = at.table.network
    return Allocation(
        variants=variants,
        predicted={**predicted, "macs": network.macs},
        dense={"latency_ns": at.dense["latency"], "size_bytes": round(at.dense["size"])},
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


def front(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    over: str = "latency",
    points: int = 20,
    budgets: Sequence[str | Budget] = (),
    *,
    model: LatencyModel | None = None,
) -> Front:
    """Allocations that no other beats, over a sweep of one budget; `budgets` on other columns hold throughout."""
    at = space(table, sensitivity, model)
    fixed = limits(parse_budgets([str(b) for b in budgets]), at.dense) if budgets else {}
    found = sweep(at.with_budgets(fixed), over, points)
    sigma = {s.choice: at.predict(s.choice).sigma_ns for _, s in found if s is not None}
    header = table.header
    return as_front(
        found,
        at.problem,
        over,
        sigma,
        {
            "network": table.network.name,
            "backend": header.backend,
            "device": header.device.get("chip"),
            "options": header.options,
            "dense": at.dense,
        },
    )

"""Table + sensitivities + budgets -> Allocation or Front. No torch, no runtime: this runs on a laptop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.allocate.activations import with_memory
from hwsearch.allocate.front import Front, as_front, sweep
from hwsearch.allocate.milp import minimise, solve
from hwsearch.allocate.problem import Cost, Problem, Solution, Tie
from hwsearch.allocation import Allocation
from hwsearch.budget import TAILS, Budget, parse_budgets
from hwsearch.consumption import energy_table, fit_energy
from hwsearch.design import AXES, check_axes
from hwsearch.errors import IncompatibleTables, Infeasible, InvalidInput
from hwsearch.latency import LatencyModel, Prediction, fit
from hwsearch.memory import peak_bytes
from hwsearch.sums import dense_ns
from hwsearch.table import LatencyTable
from hwsearch.variants import Variant, legal, uniform, weight_bytes

if TYPE_CHECKING:
    from hwsearch.scoring import SensitivityTable

KAPPA = 1.0
"""How many standard errors of the prediction a latency budget keeps in reserve."""


@dataclass(frozen=True)
class Space:
    """What may be chosen and what it costs: a problem without its budgets.

    The variables are the units, then the channel groups that have more than one width to choose from, then what `memory`
    needs where that is bounded or swept. A unit's choices are its variants at each of the widths of its groups; ties hold
    them to what the groups chose.
    cells: for each unit what its choices stand for. tails: of each budgeted tail latency its ratio to the median. energy: the
    model of energies, where they are bounded.
    """

    table: LatencyTable
    sensitivity: SensitivityTable
    model: LatencyModel
    problem: Problem
    cells: tuple[tuple[Cell, ...], ...]
    tails: Mapping[str, float] = field(default_factory=dict)
    energy: LatencyModel | None = None

    @property
    def dense(self) -> dict[str, float]:
        """Costs of the dense fp32 network, in ns, bytes, MACs and nJ."""
        return {
            "latency": dense_ns(self.table)[0],
            **{column: ratio * dense_ns(self.table)[0] for column, ratio in self.tails.items()},
            "size": float(self.table.header.dense_file_bytes),
            "memory": float(peak_bytes(self.table.network, uniform(self.table.network, "fp32"), base="fp32")),
            "macs": float(self.table.network.macs),
            **({"energy": energy_table(self.table).dense_ns} if self.energy else {}),
        }

    def variants(self, choice: Sequence[int]) -> dict[str, Variant]:
        """The variant of each unit."""
        chosen = zip(self.table.network.units, self.cells, choice, strict=False)
        return {unit.name: cells[c].variant for unit, cells, c in chosen}

    def widths(self, choice: Sequence[int]) -> dict[str, int]:
        """The width of every channel group."""
        names = zip(self.problem.variables, self.problem.choices, choice, strict=True)
        channels = self.table.network.channels
        chosen = {v: int(choices[c]) for v, choices, c in list(names)[len(self.cells) :] if v in channels}
        return {**channels, **chosen}

    def memory(self, choice: Sequence[int]) -> int:
        """Peak activation memory, in bytes: computed, never measured."""
        return peak_bytes(
            self.table.network, self.variants(choice), self.widths(choice),
            base=str(self.table.header.options["base"]), quantize_outputs=self.sensitivity.quantize_outputs,
        )  # fmt: skip

    def predict(self, choice: Sequence[int]) -> Prediction:
        return self.model.predict(self.variants(choice), self.widths(choice))

    def predict_energy(self, choice: Sequence[int]) -> Prediction | None:
        """In nJ; None where energies are not bounded."""
        return self.energy.predict(self.variants(choice), self.widths(choice)) if self.energy else None

    def with_budgets(self, budgets: Mapping[str, int]) -> Problem:
        return replace(self.problem, budgets=dict(budgets))


@dataclass(frozen=True)
class Cell:
    """One choice of a unit: its variant, and the widths of its groups."""

    variant: Variant
    widths: tuple[int, ...]


def space(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    model: LatencyModel | None = None,
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    budgets: Sequence[Budget] = (),
    over: str = "",
) -> Space:
    """Join a table and sensitivities. Raises IncompatibleTables where they are of different networks.

    axes: `width`, `precision` or both. keep: patterns of names of units whose channels all stay. budgets: those that the
    space will be searched under, for the tail latencies and the memory among them; over: the column that will be swept.
    """
    sensitivity.require(table.network)
    check_axes(axes)
    model = model or fit(table)
    energy = fit_energy(table) if any(b.column == "energy" for b in budgets) else None
    models = [model, energy] if energy else [model]
    network = table.network
    grid = (
        _grid(table, sensitivity, keep) if "width" in axes else {g: [n] for g, n in network.channels.items()}
    )
    offered = table.offered()
    base = f"dense.{table.header.options['base']}"
    cells: list[tuple[Cell, ...]] = []
    for unit in network.units:
        variants = [Variant.parse(v) for v in offered[unit.name] if "precision" in axes or v == base]
        found = [
            Cell(v, widths)
            for widths in product(*(grid[g] for g in unit.groups))
            for v in legal(network.unit_at(unit.name, dict(zip(unit.groups, widths, strict=True))), variants)
            if all(m.knows(unit.name, v, dict(zip(unit.groups, widths, strict=True))) for m in models)
        ]
        if not found:
            raise IncompatibleTables(f"the table offers no variant of unit {unit.name}; profile again")
        cells.append(tuple(found))
    groups = [g for g, steps in grid.items() if len(steps) > 1]
    tails = {b.column: table.tail(TAILS[b.column]) for b in budgets if b.column in TAILS}
    wants_memory = "memory" in (over, *(b.column for b in budgets))
    problem = Problem(
        variables=(*(u.name for u in network.units), *groups),
        choices=(
            *(tuple(str(c.variant) for c in own) for own in cells),
            *(tuple(map(str, grid[g])) for g in groups),
        ),
        loss=(
            *(np.array([sensitivity[u.name, str(c.variant)] for c in own])
              for u, own in zip(network.units, cells, strict=True)),
            *(np.array([sensitivity.of_width(g, w) for w in grid[g]]) for g in groups),
        ),
        costs=_costs(table, models, cells, grid, groups, tails),
        budgets={},
        ties=_ties(table, cells, grid, groups),
    )  # fmt: skip
    if wants_memory:
        base = str(table.header.options["base"])
        at = _at(table, cells)
        problem = with_memory(problem, network, at, base, quantize_outputs=sensitivity.quantize_outputs)
    return Space(table, sensitivity, model, problem, tuple(cells), tails, energy)


def _at(table: LatencyTable, cells: Sequence[Sequence[Cell]]) -> list[list[tuple[Variant, dict[str, int]]]]:
    """What the choices of each unit stand for, with the widths by group."""
    return [
        [(c.variant, dict(zip(u.groups, c.widths, strict=True))) for c in own]
        for u, own in zip(table.network.units, cells, strict=True)
    ]


def _grid(table: LatencyTable, sensitivity: SensitivityTable, keep: Sequence[str]) -> dict[str, list[int]]:
    """Widths that were measured, of the groups that may be made narrower and whose loss is known."""
    network = table.network
    names = [u.name for u in network.units] + list(network.channels)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInput(f"no layer is named like {pattern!r}; layers are {', '.join(names[:12])}, ...")
    pinned = {
        g
        for u in network.units
        for g in u.groups
        if any(fnmatchcase(name, pattern) for pattern in keep for name in (u.name, g))
    }
    return {
        g: [n] if g in pinned or g not in sensitivity.width_loss else steps
        for (g, steps), n in zip(table.grid().items(), network.channels.values(), strict=True)
    }


def _costs(
    table: LatencyTable,
    models: Sequence[LatencyModel],
    cells: Sequence[Sequence[Cell]],
    grid: Mapping[str, Sequence[int]],
    groups: Sequence[str],
    tails: Mapping[str, float],
) -> dict[str, Cost]:
    """Latency, size and MACs in integers; exact in size and MACs at every width.

    models: of latency and, where it is bounded, of energy. tails: ratios of further latencies.
    """
    network = table.network
    units = network.units
    at = _at(table, cells)
    none = [np.zeros(len(grid[g]), np.int64) for g in groups]
    position = {u.name: i for i, u in enumerate(units)}

    def boundaries_of(model: LatencyModel) -> list[tuple[int, int, Any]]:
        boundaries: list[tuple[int, int, Any]] = []
        for src, dst in dict.fromkeys((e.src, e.dst) for e in network.edges):
            i, j = position[src], position[dst]
            shares = [network.share(src, w) for _, w in at[i]]
            terms = {share: model.edge_ns(src, dst, share) for share in set(shares)}
            matrix = np.array(
                [
                    [terms[s][a.quantized, b.quantized] for b, _ in at[j]]
                    for s, (a, _) in zip(shares, at[i], strict=True)
                ]
            )
            boundaries.append((i, j, matrix) if i < j else (j, i, matrix.T))
        return boundaries

    of = [
        (
            [np.array([m.unit_ns(u.name, v, w) for v, w in own]) for u, own in zip(units, at, strict=True)],
            boundaries_of(m),
        )
        for m in models
    ]

    def latency(ratio: float, number: int = 0) -> Cost:
        times, boundaries = of[number]
        pairwise: dict[tuple[int, int], Any] = {}
        for i, j, matrix in boundaries:
            pairwise[i, j] = pairwise.get((i, j), 0) + _whole(matrix * ratio)
        own = (_whole(t * ratio) for t in times)
        return Cost(fixed=round(models[number].rest_ns * ratio), unary=(*own, *none), pairwise=pairwise)

    return {
        "latency": latency(1.0),
        **{column: latency(ratio) for column, ratio in tails.items()},
        **({"energy": latency(1.0, 1)} if len(models) > 1 else {}),
        "size": Cost(
            fixed=network.fixed_bytes + table.header.graph_bytes,
            unary=(
                *(np.array([weight_bytes(network.unit_at(u.name, w), v) for v, w in own], np.int64)
                  for u, own in zip(units, at, strict=True)),
                *(np.array([-g.fixed_bytes * (g.channels - w) for w in grid[g.name]], np.int64)
                  for name in groups for g in network.groups if g.name == name),
            ),
        ),
        "macs": Cost(
            fixed=0,
            unary=(
                *(np.array([network.unit_at(u.name, w).macs for _, w in own], np.int64)
                  for u, own in zip(units, at, strict=True)),
                *none,
            ),
        ),
    }  # fmt: skip


def _whole(values: Any) -> Any:
    return np.rint(values).astype(np.int64)


def _ties(
    table: LatencyTable,
    cells: Sequence[Sequence[Cell]],
    grid: Mapping[str, Sequence[int]],
    groups: Sequence[str],
) -> tuple[Tie, ...]:
    number = {g: len(cells) + i for i, g in enumerate(groups)}
    return tuple(
        Tie(i, number[g], np.array([list(grid[g]).index(c.widths[place]) for c in own], np.int64))
        for i, (unit, own) in enumerate(zip(table.network.units, cells, strict=True))
        for place, g in enumerate(unit.groups)
        if g in number
    )


def limits(budgets: Sequence[Budget], dense: Mapping[str, float]) -> dict[str, int]:
    """Budgets as integer ns and bytes, relative ones against the dense fp32 network."""
    return {b.column: b.resolve(dense[b.column]) for b in budgets}


def search(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    budgets: Sequence[str | Budget],
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    kappa: float = KAPPA,
    model: LatencyModel | None = None,
    tighten: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation of least loss whose predicted costs meet every budget, solved exactly.

    Latency counts as T + kappa * sigma. Where the dense fp32 network meets every budget, it is the answer.
    axes: what may be chosen, `width`, `precision` or both. keep: patterns of names (`classifier*`) of units whose
    channels all stay. tighten: integer limits that replace the budgets' own (the closed loop's).
    Raises Infeasible naming the least that can be met; InvalidInput on malformed budgets.
    """
    parsed = parse_budgets([str(b) for b in budgets])
    at = space(table, sensitivity, model, axes=axes, keep=keep, budgets=parsed)
    wanted = limits(parsed, at.dense)
    dense_meets = all(math.floor(at.dense[column]) <= limit for column, limit in wanted.items())
    if dense_meets and not tighten:
        return _dense_allocation(at, parsed, wanted)
    bounds = {**wanted, **(tighten or {})}
    solution = _solve_with_reserve(at, bounds, kappa)
    return as_allocation(at, solution, parsed, wanted)


def _solve_with_reserve(at: Space, bounds: Mapping[str, int], kappa: float) -> Solution:
    """Shrink the limits on latency, its tails and energy until T + kappa * sigma of the answer is within them too.

    Where only the reserve makes it infeasible, the answer that is nearest to having one is returned: whether it
    meets the budget is for the measurement to say.
    """
    best = solve(at.with_budgets(bounds))
    ratios = {c: r for c, r in {"latency": 1.0, "energy": 1.0, **at.tails}.items() if c in bounds}
    if not ratios or kappa == 0:
        return best
    shrunk = {c: bounds[c] for c in ratios}
    for _ in range(8):
        found = {
            c: at.predict_energy(best.choice) if c == "energy" else at.predict(best.choice) for c in ratios
        }
        most = {c: p.time_ns + kappa * p.sigma_ns for c, p in found.items() if p is not None}
        over = {c: r * most[c] - bounds[c] for c, r in ratios.items() if r * most[c] > bounds[c]}
        if not over:
            return best
        for c, excess in over.items():
            reserve = ratios[c] * (most[c] - found[c].time_ns)  # type: ignore[union-attr]
            shrunk[c] = min(shrunk[c] - max(1, round(excess / 2)), round(bounds[c] - reserve))
        try:
            best = solve(at.with_budgets({**bounds, **shrunk}))
        except Infeasible:
            return _fastest(at, bounds, "energy" if set(ratios) == {"energy"} else "latency")
    return best


def _fastest(at: Space, bounds: Mapping[str, int], column: str) -> Solution:
    """The least loss at the least latency (or energy) that the other budgets allow."""
    least = minimise(at.with_budgets(bounds), column).costs[column]
    return solve(at.with_budgets({**bounds, column: least}))


def as_allocation(
    at: Space, solution: Solution, budgets: Sequence[Budget], wanted: Mapping[str, int]
) -> Allocation:
    """A solution with its predicted costs, proof and provenance."""
    variants, widths = at.variants(solution.choice), at.widths(solution.choice)
    prediction, energy = at.predict(solution.choice), at.predict_energy(solution.choice)
    return _allocation(
        at,
        {u: str(v) for u, v in variants.items()},
        widths,
        {
            "latency_ns": prediction.time_ns,
            "sigma_ns": prediction.sigma_ns,
            "size_bytes": solution.costs["size"],
            "memory_bytes": at.memory(solution.choice),
            "macs": solution.costs["macs"],
            "loss": solution.loss,
            **{f"{column}_ns": ratio * prediction.time_ns for column, ratio in at.tails.items()},
            **({"energy_nj": energy.time_ns, "energy_sigma_nj": energy.sigma_ns} if energy else {}),
        },
        budgets,
        wanted,
        {"status": solution.status, "gap": solution.gap, "bound": solution.bound},
        str(at.table.header.options["base"]),
    )


def _dense_allocation(at: Space, budgets: Sequence[Budget], wanted: Mapping[str, int]) -> Allocation:
    predicted = {
        "latency_ns": at.dense["latency"],
        "sigma_ns": dense_ns(at.table)[1],
        "size_bytes": round(at.dense["size"]),
        "memory_bytes": round(at.dense["memory"]),
        "macs": at.table.network.macs,
        "loss": 0.0,
        **{f"{column}_ns": at.dense[column] for column in at.tails},
        **({"energy_nj": at.dense["energy"]} if at.energy else {}),
    }
    variants = {u: str(v) for u, v in uniform(at.table.network, "fp32").items()}
    proof = {"status": "optimal", "gap": 0.0, "bound": 0.0}
    return _allocation(at, variants, at.table.network.channels, predicted, budgets, wanted, proof, "fp32")


def _allocation(
    at: Space,
    variants: dict[str, str],
    widths: Mapping[str, int],
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
        widths=dict(widths),
        order=_order(at, widths),
        predicted=predicted,
        dense={
            "latency_ns": at.dense["latency"],
            "size_bytes": round(at.dense["size"]),
            "memory_bytes": round(at.dense["memory"]),
            **({"energy_nj": at.dense["energy"]} if at.energy else {}),
            **({"estimated": 1} if dense_ns(at.table)[2] else {}),
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


def _order(at: Space, widths: Mapping[str, int]) -> dict[str, str]:
    if all(w == at.table.network.channels[g] for g, w in widths.items()):
        return {}
    return {g: " ".join(map(str, at.sensitivity.order[g])) for g in widths}


def front(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    over: str = "latency",
    points: int = 20,
    budgets: Sequence[str | Budget] = (),
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    model: LatencyModel | None = None,
) -> Front:
    """Allocations that no other beats, over a sweep of one budget; `budgets` on other columns hold throughout."""
    parsed = parse_budgets([str(b) for b in budgets]) if budgets else ()
    at = space(table, sensitivity, model, axes=axes, keep=keep, budgets=parsed, over=over)
    fixed = limits(parsed, at.dense)
    found = sweep(at.with_budgets(fixed), over, points)
    sigma = {s.choice: at.predict(s.choice).sigma_ns for _, s in found if s is not None}
    memory = {s.choice: at.memory(s.choice) for _, s in found if s is not None}
    header = table.header
    chosen = {
        s.choice: (tuple(map(str, at.variants(s.choice).values())), tuple(at.widths(s.choice).values()))
        for _, s in found
        if s is not None
    }
    return as_front(
        found,
        tuple(u.name for u in table.network.units),
        tuple(table.network.channels),
        chosen,
        over,
        sigma,
        memory,
        {
            "network": table.network.name,
            "backend": header.backend,
            "device": header.device.get("chip"),
            "options": header.options,
            "dense": at.dense,
        },
    )

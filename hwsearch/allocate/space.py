"""What may be chosen and what it costs: a latency table and sensitivities joined to a problem without budgets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from hwsearch.allocate.activations import with_memory
from hwsearch.allocate.budget import COMPUTED, TAILS
from hwsearch.allocate.costs import Costs
from hwsearch.allocate.problem import Cost, Problem, Tie
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.latency.energy_model import energy_table, fit_energy
from hwsearch.latency.layer_sum import dense_ns
from hwsearch.latency.model import LatencyModel, Prediction, fit
from hwsearch.latency.staircase import measured_widths
from hwsearch.network.choices import AXES, check_axes
from hwsearch.network.memory import peak_bytes
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, legal, uniform, weight_bytes
from hwsearch.table.table import LatencyTable

if TYPE_CHECKING:
    from hwsearch.loss.table import SensitivityTable


class Offer(TypedDict, total=False):
    """What may be chosen, as `make_space` takes it."""

    axes: Sequence[str]
    keep: Sequence[str]
    forbid: Sequence[str]
    only: Sequence[str]


@dataclass(frozen=True)
class Rule:
    """What units named like `units` may become: nothing named like `variants` where that is forbidden, else only that.

    text: as it was written. variants: patterns of variants (`2:4.*`) or of their precisions (`int8`).
    """

    text: str
    units: str
    variants: tuple[str, ...]
    forbids: bool

    def names(self, unit: str) -> bool:
        """Whether it is about a unit."""
        return fnmatchcase(unit, self.units)

    def allows(self, unit: str, variant: Variant) -> bool:
        """Whether a unit may become a variant."""
        return not self.names(unit) or any(_named(variant, p) for p in self.variants) != self.forbids


def _named(variant: Variant, pattern: str) -> bool:
    return fnmatchcase(str(variant), pattern) or fnmatchcase(variant.precision, pattern)


@dataclass(frozen=True)
class Space:
    """What may be chosen and what it costs: a problem without its budgets.

    The variables are the units, then the channel groups that have more than one width to choose from, then what `memory`
    needs where that is bounded or swept. A unit's choices are its variants at each of the widths of its groups; ties hold
    them to what the groups chose.
    cells: for each unit what its choices stand for. tails: of each budgeted tail latency its ratio to the median. energy: the
    model of energies, where they are asked for. model: None where nothing was measured. rules: what units may become.
    """

    table: LatencyTable
    sensitivity: SensitivityTable
    model: LatencyModel | None
    problem: Problem
    cells: tuple[tuple[UnitChoice, ...], ...]
    tails: Mapping[str, float] = field(default_factory=dict)
    energy: LatencyModel | None = None
    rules: tuple[Rule, ...] = ()

    @property
    def allows_dense(self) -> bool:
        """Whether every unit may be dense fp32."""
        return all(rule.allows(u.name, DENSE) for rule in self.rules for u in self.table.network.units)

    @property
    def dense(self) -> Costs:
        """Costs of the dense fp32 network; tails and energy where they are bounded."""
        network = self.table.network
        latency = dense_ns(self.table)[0] if self.table.builds else None
        return Costs(
            latency=latency,
            **{column: ratio * latency for column, ratio in self.tails.items() if latency is not None},
            size=float(self.table.header.dense_file_bytes),
            memory=float(peak_bytes(network, uniform(network, "fp32"), base="fp32")),
            macs=float(network.macs),
            energy=energy_table(self.table).dense_ns if self.energy else None,
        )

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

    def choices_of(self, variants: Mapping[str, str], widths: Mapping[str, int]) -> tuple[int, ...]:
        """For each unit the choice that stands for its variant and widths; -1 where that is not among them."""
        units = self.table.network.units
        wanted = [UnitChoice(Variant.parse(variants[u.name]), tuple(widths[g] for g in u.groups)) for u in units]
        return tuple(own.index(c) if c in own else -1 for own, c in zip(self.cells, wanted, strict=True))

    def memory(self, choice: Sequence[int]) -> int:
        """Peak activation memory, in bytes: computed, never measured."""
        return peak_bytes(
            self.table.network, self.variants(choice), self.widths(choice),
            base=str(self.table.header.options["base"]), quantize_outputs=self.sensitivity.quantize_outputs,
        )  # fmt: skip

    def predict(self, choice: Sequence[int]) -> Prediction | None:
        """In ns; None where a unit was not measured as it is chosen, which no budget on a measured cost allows."""
        variants, widths = self.variants(choice), self.widths(choice)
        if self.model is None or not all(self.model.knows(u, v, widths) for u, v in variants.items()):
            return None
        return self.model.predict(variants, widths)

    def predict_energy(self, choice: Sequence[int]) -> Prediction | None:
        """In nJ; None where energies are not bounded."""
        return self.energy.predict(self.variants(choice), self.widths(choice)) if self.energy else None

    def with_budgets(self, budgets: Mapping[str, float]) -> Problem:
        return replace(self.problem, budgets=dict(budgets))


DENSE = Variant("fp32")


@dataclass(frozen=True)
class UnitChoice:
    """One choice of a unit: its variant, and the widths of its groups."""

    variant: Variant
    widths: tuple[int, ...]


def make_space(
    table: LatencyTable,
    sensitivity: SensitivityTable,
    model: LatencyModel | None = None,
    *,
    axes: Sequence[str] = AXES,
    keep: Sequence[str] = (),
    forbid: Sequence[str] = (),
    only: Sequence[str] = (),
    columns: Collection[str] = (),
    timed: bool = True,
) -> Space:
    """Join a table and sensitivities. Raises IncompatibleTables where they are of different networks, or bits of int8 weights.

    axes: `width`, `precision` or both. keep: patterns of names of units whose channels all stay; `head=dense.fp32`: and that
    become only that. forbid, only: what units may not become, or only (`features.*:int8,2:4.*`). columns: the costs that will be
    bounded, minimised or swept. timed: False offers what was not measured as well, and leaves latency out of the problem.
    """
    sensitivity.require(table.network, table.header.int8)
    check_axes(axes)
    if model is None and (timed or len(table.builds) > 1):
        model = fit(table)
    energy = fit_energy(table) if "energy" in columns else None
    models = [m for m in (model, energy) if m is not None] if timed else []
    network, base = table.network, str(table.header.options["base"])
    offered = table.offered() if table.builds else _scored(sensitivity, f"dense.{base}")
    rules = _rules(keep, forbid, only, offered)
    grid = {g: [n] for g, n in network.channels.items()}
    if "width" in axes:
        computed = any(column in COMPUTED for column in columns)
        steps = sensitivity.width_loss if not timed else measured_widths(table) if computed else table.grid()
        whole = [text.partition("=")[0] for text in keep]
        grid = _grid(network, steps, sensitivity, whole, partly=computed)
    if "precision" not in axes:
        offered = {unit: tuple(v for v in own if v == f"dense.{base}") for unit, own in offered.items()}
    cells = _cells(network, offered, sensitivity, grid, models, rules)
    groups = [g for g, steps in grid.items() if len(steps) > 1]
    tails, correction = {column: table.tail(TAILS[column]) for column in columns if column in TAILS}, sensitivity.correction
    problem = Problem(
        variables=(*(u.name for u in network.units), *groups),
        choices=(
            *(tuple(str(c.variant) for c in own) for own in cells),
            *(tuple(map(str, grid[g])) for g in groups),
        ),
        loss=(
            *(np.array([correction.of_unit(u.name, sensitivity[u.name, str(c.variant)]) for c in own])
              for u, own in zip(network.units, cells, strict=True)),
            *(np.array([correction.of_group(g, sensitivity.of_width(g, w)) for w in grid[g]]) for g in groups),
        ),
        costs=_costs(table, models, cells, grid, groups, tails),
        budgets={},
        ties=_ties(table, cells, grid, groups),
        correction=correction,
    )  # fmt: skip
    if "memory" in columns:
        choices = _choices(table, cells)
        problem = with_memory(problem, network, choices, base, quantize_outputs=sensitivity.quantize_outputs)
    return Space(table, sensitivity, model, problem, tuple(cells), tails, energy, rules)


def _rules(
    keep: Sequence[str], forbid: Sequence[str], only: Sequence[str], offered: Mapping[str, Sequence[str]]
) -> tuple[Rule, ...]:
    """What was written of what units may become. Raises InvalidInput on what names no unit, or nothing that these are offered."""
    rules = []
    pinned = [text for text in keep if "=" in text]
    for word, texts, between in (("keep", pinned, "="), ("only", only, ":"), ("forbid", forbid, ":")):
        for text in texts:
            units, _, variants = (part.strip() for part in text.partition(between))
            if not (units and variants):
                example = f"'features.*{between}dense.fp32'"
                raise InvalidInput(f"{word} {text!r} is malformed; expected UNITS{between}VARIANTS, for instance {example}")
            rule = Rule(text, units, tuple(v.strip() for v in variants.split(",")), word == "forbid")
            named = [unit for unit in offered if rule.names(unit)]
            if not named:
                raise InvalidInput(_nothing_named(units, list(offered)))
            known = dict.fromkeys(v for unit in named for v in offered[unit])
            for pattern in rule.variants:
                if not any(_named(Variant.parse(v), pattern) for v in known):
                    raise InvalidInput(
                        f"{word} {text!r}: {units} is offered nothing named like {pattern!r}; it is offered {', '.join(known)}"
                    )
            rules.append(rule)
    return tuple(rules)


def _nothing_named(pattern: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 12 else ""
    return f"no layer is named like {pattern!r}; layers are {', '.join(names[:12])}{more}"


def _cells(
    network: Network,
    offered: Mapping[str, Sequence[str]],
    sensitivity: SensitivityTable,
    grid: Mapping[str, Sequence[int]],
    models: Sequence[LatencyModel],
    rules: Sequence[Rule],
) -> list[tuple[UnitChoice, ...]]:
    """For each unit its variants at each of the widths of its groups, as far as they are legal, known and allowed."""
    cells = []
    for unit in network.units:
        refused = sensitivity.refused.get(unit.name, {})
        variants = [Variant.parse(v) for v in offered[unit.name] if v not in refused]
        found = [
            UnitChoice(v, widths)
            for widths in product(*(grid[g] for g in unit.groups))
            for v in legal(network.unit_at(unit.name, dict(zip(unit.groups, widths, strict=True))), variants)
            if all(m.knows(unit.name, v, dict(zip(unit.groups, widths, strict=True))) for m in models)
        ]
        if not found:
            raise IncompatibleTables(f"the table offers no variant of unit {unit.name}; profile again")
        allowed = tuple(c for c in found if all(rule.allows(unit.name, c.variant) for rule in rules))
        if not allowed:
            texts = ", ".join(repr(rule.text) for rule in rules if rule.names(unit.name))
            names = ", ".join(dict.fromkeys(str(c.variant) for c in found))
            raise InvalidInput(f"nothing is left for unit {unit.name} to become: {texts} rule out all of {names}; allow one")
        cells.append(allowed)
    return cells


def _choices(table: LatencyTable, cells: Sequence[Sequence[UnitChoice]]) -> list[list[tuple[Variant, dict[str, int]]]]:
    """What the choices of each unit stand for, with the widths by group."""
    return [
        [(c.variant, dict(zip(u.groups, c.widths, strict=True))) for c in own]
        for u, own in zip(table.network.units, cells, strict=True)
    ]


def _scored(sensitivity: SensitivityTable, base: str) -> dict[str, tuple[str, ...]]:
    """The variants of each unit that have a loss, in no other float type than the base."""
    return {
        unit: tuple(v for v in own if v == base or not Variant.parse(v).plain) for unit, own in sensitivity.loss.items()
    }


def _grid(
    network: Network,
    offered: Mapping[str, Iterable[int]],
    sensitivity: SensitivityTable,
    keep: Sequence[str],
    *,
    partly: bool,
) -> dict[str, list[int]]:
    """Widths that are offered, of the groups that may be made narrower and whose loss is known.

    partly: of a group whose loss is known at some of them, those.
    """
    names = [u.name for u in network.units] + list(network.channels)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidInput(_nothing_named(pattern, names))
    pinned = {
        g
        for u in network.units
        for g in u.groups
        if any(fnmatchcase(name, pattern) for pattern in keep for name in (u.name, g))
    }
    grid = {}
    for group, n in network.channels.items():
        refused, scored = sensitivity.refused.get(group, {}), sensitivity.width_loss.get(group)
        if group in pinned or scored is None:
            grid[group] = [n]
            continue
        steps = sorted({n, *offered.get(group, ())}, reverse=True)
        grid[group] = [w for w in steps if f"width{w}" not in refused and (not partly or w == n or w in scored)]
    return grid


def _costs(
    table: LatencyTable,
    models: Sequence[LatencyModel],
    cells: Sequence[Sequence[UnitChoice]],
    grid: Mapping[str, Sequence[int]],
    groups: Sequence[str],
    tails: Mapping[str, float],
) -> dict[str, Cost]:
    """Latency, size and MACs in integers; exact in size and MACs at every width.

    models: of latency and, where it is bounded, of energy; none leaves them out. tails: ratios of further latencies.
    """
    network, units = table.network, table.network.units
    choices = _choices(table, cells)
    none = [np.zeros(len(grid[g]), np.int64) for g in groups]
    times = [_times(network, model, choices) for model in models]

    def latency(ratio: float, number: int = 0) -> Cost:
        unary, pairwise = times[number]
        return Cost(
            fixed=round(models[number].rest_ns * ratio),
            unary=(*(_whole(t * ratio) for t in unary), *none),
            pairwise={pair: _whole(matrix * ratio) for pair, matrix in pairwise.items()},
        )

    graph = table.header.unit_bytes
    return {
        **({"latency": latency(1.0)} if models else {}),
        **{column: latency(ratio) for column, ratio in tails.items()},
        **({"energy": latency(1.0, 1)} if len(models) > 1 else {}),
        "size": Cost(
            fixed=network.fixed_bytes + table.header.graph_bytes,
            unary=(
                *(np.array([weight_bytes(network.unit_at(u.name, w), v) + graph.get(u.name, {}).get(str(v), 0)
                            for v, w in own], np.int64)
                  for u, own in zip(units, choices, strict=True)),
                *(np.array([-g.fixed_bytes * (g.channels - w) for w in grid[g.name]], np.int64)
                  for name in groups for g in network.groups if g.name == name),
            ),
        ),
        "macs": Cost(
            fixed=0,
            unary=(
                *(np.array([network.unit_at(u.name, w).macs for _, w in own], np.int64)
                  for u, own in zip(units, choices, strict=True)),
                *none,
            ),
        ),
    }  # fmt: skip


def _times(
    network: Network, model: LatencyModel, choices: Sequence[Sequence[tuple[Variant, dict[str, int]]]]
) -> tuple[list[Any], dict[tuple[int, int], Any]]:
    """(times of each unit's choices, times of the boundaries between the choices of two units), in ns."""
    position = {u.name: i for i, u in enumerate(network.units)}
    unary = [
        np.array([model.unit_ns(u.name, v, w) for v, w in own])
        for u, own in zip(network.units, choices, strict=True)
    ]
    quantized = [np.array([v.quantized for v, _ in own], np.intp) for own in choices]
    pairwise: dict[tuple[int, int], Any] = {}
    for src, dst in dict.fromkeys((e.src, e.dst) for e in network.edges):
        i, j = position[src], position[dst]
        shares, which = np.unique([network.share(src, w) for _, w in choices[i]], return_inverse=True)
        terms = [model.edge_ns(src, dst, float(share)) for share in shares]
        table = np.array([[[own[a, b] for b in (False, True)] for a in (False, True)] for own in terms])
        matrix = table[which[:, None], quantized[i][:, None], quantized[j]]
        pair, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
        pairwise[pair] = pairwise.get(pair, 0) + matrix
    return unary, pairwise


def _whole(values: Any) -> Any:
    return np.rint(values).astype(np.int64)


def _ties(
    table: LatencyTable,
    cells: Sequence[Sequence[UnitChoice]],
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

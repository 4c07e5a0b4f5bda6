"""SensitivityTable: the loss that each (unit, variant) and each (channel group, width) causes, on calibration data.

The loss is the KL divergence from the dense network's outputs (design.md), with every unit but one dense fp32, or every
group but one whole. Weights that read a narrower group, or are rounded to int8, are refitted as those of a deployed network are.

Schema history:
  1  one row a (unit, variant) with its loss; header under the Parquet key `hwsearch`.
  2  rows of (group, width) beside them, and the order in which slots go.
  3  losses on calibration batches that no weight was refitted on; which losses of widths are estimated.
  4  losses of int8 are of refitted weights, as they are deployed, and of so many bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, Variant, legal
from hwsearch.table.parquet import read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from hwsearch.compress.bank import WeightBank
    from hwsearch.compress.simulate import Simulator
    from hwsearch.graph.batching import BatchAxis
    from hwsearch.lowering.lowering import Lowering
    from hwsearch.progress import Progress

SCHEMA = 4
KIND = "sensitivity_table"
NOT_FINITE = "its simulation returns NaN or infinity on calibration data"
VALIDATION_ALLOCATIONS = 12
MOST_WIDTHS = 150
"""Of more (group, width) the costliest by their Fisher estimate are not measured."""


@dataclass(frozen=True)
class SensitivityTable:
    """loss: unit -> variant it can become -> mean loss per sample (>= 0; dense.fp32 is 0 and always present).

    width_loss: group -> slots kept -> the same (0 for the whole width, which is always present). order: group -> its
    slots, the most important first; a width keeps as many from the front. estimated: the (group, width) whose loss was not
    measured, but follows the Fisher estimate from the group's narrowest measured width on.
    refused: unit -> variant -> why it has no loss and is not offered; group -> `width16`, of a width, likewise.
    quantize_outputs: whether int8 and fp8 were simulated with quantized outputs, as the backend deploys it. int8_bits: of the
    int8 weights, as the backend deploys them; unsigned: likewise whether int8 activations that were never negative are unsigned.
    rank_correlation: Kendall tau between predicted (summed) and simulated loss of random whole allocations.
    """

    network: Network
    loss: dict[str, dict[str, float]]
    samples: int
    divergence: str
    quantize_outputs: bool
    rank_correlation: float | None = None
    created: str = ""
    validation: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    width_loss: dict[str, dict[int, float]] = field(default_factory=dict)
    order: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    estimated: frozenset[tuple[str, int]] = frozenset()
    int8_bits: int = INT8_BITS
    unsigned: bool = False
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    def __getitem__(self, key: tuple[str, str]) -> float:
        unit, variant = key
        try:
            return self.loss[unit][variant]
        except KeyError as error:
            raise InvalidInput(
                f"the sensitivity table has no loss of {variant} for unit {unit}; run `hwsearch sensitivity` again"
            ) from error

    def of_width(self, group: str, width: int) -> float:
        """Loss of one group at one width. Raises InvalidInput where it was not measured."""
        try:
            return self.width_loss[group][width]
        except KeyError as error:
            raise InvalidInput(
                f"the sensitivity table has no loss of {group} at {width} channels; run `hwsearch sensitivity --table` "
                "with the latency table"
            ) from error

    def total(self, variants: Mapping[str, Variant], widths: Mapping[str, int] | None = None) -> float:
        """Predicted loss of an allocation: the sum over units and groups."""
        narrower = {g: w for g, w in (widths or {}).items() if w < self.network.channels[g]}
        units = sum(self[unit, str(variant)] for unit, variant in variants.items())
        return units + sum(self.of_width(g, w) for g, w in narrower.items())

    def offers(self, variants: Mapping[str, Variant], widths: Mapping[str, int]) -> bool:
        """Whether nothing in an allocation is refused."""
        chosen = [*((u, str(v)) for u, v in variants.items()), *((g, f"width{w}") for g, w in widths.items())]
        return not any(what in self.refused.get(of, ()) for of, what in chosen)

    def require(self, network: Network, int8_bits: int | None = None, unsigned: bool | None = None) -> None:
        """Raises IncompatibleTables unless it is of this network, weights included, and of int8 of this kind."""
        for what, own, other in (
            ("network", self.network.fingerprint, network.fingerprint),
            ("weights", self.network.weights_digest, network.weights_digest),
            ("bits of int8 weights", self.int8_bits, int8_bits or self.int8_bits),
            ("int8 activations (unsigned)", self.unsigned, self.unsigned if unsigned is None else unsigned),
        ):
            if own != other:
                raise IncompatibleTables(
                    f"the sensitivities are of other {what}: table={own}, current={other}; run `hwsearch sensitivity` again"
                )

    def to_frame(self) -> pd.DataFrame:
        """Columns unit (or group), variant (or `width` and the slots kept), loss."""
        import pandas as pd

        return pd.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        units = [{"unit": u, "variant": v, "loss": x} for u, row in self.loss.items() for v, x in row.items()]
        groups = [
            {"unit": g, "variant": f"width{w}", "loss": x}
            for g, row in self.width_loss.items()
            for w, x in row.items()
        ]
        return units + groups

    def save(self, path: str | Path) -> None:
        import pyarrow as pa

        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "network": self.network.to_json(),
            "samples": self.samples,
            "divergence": self.divergence,
            "quantize_outputs": self.quantize_outputs,
            "int8_bits": self.int8_bits,
            "unsigned": self.unsigned,
            "rank_correlation": self.rank_correlation,
            "created": self.created,
            "validation": [list(pair) for pair in self.validation],
            "order": {g: list(slots) for g, slots in self.order.items()},
            "estimated": sorted(map(list, self.estimated)),
            **({"refused": self.refused} if self.refused else {}),
        }
        rows = self._rows()
        schema = pa.schema([("unit", pa.string()), ("variant", pa.string()), ("loss", pa.float64())])
        write_parquet(pa.Table.from_pylist(rows, schema=schema), header, path)

    @staticmethod
    def load(path: str | Path) -> SensitivityTable:
        """Raises InvalidInput (absent, truncated, foreign, damaged) or IncompatibleTables (another schema)."""
        table, header = read_parquet(path, KIND, SCHEMA)
        try:
            loss: dict[str, dict[str, float]] = {}
            widths: dict[str, dict[int, float]] = {}
            for line in table.to_pylist():
                if line["variant"].startswith("width"):
                    widths.setdefault(line["unit"], {})[int(line["variant"][5:])] = float(line["loss"])
                else:
                    loss.setdefault(line["unit"], {})[line["variant"]] = float(line["loss"])
            loaded = SensitivityTable(
                network=Network.from_json(header["network"]),
                loss=loss,
                samples=int(header["samples"]),
                divergence=header["divergence"],
                quantize_outputs=bool(header["quantize_outputs"]),
                int8_bits=int(header.get("int8_bits", INT8_BITS)),
                unsigned=bool(header.get("unsigned", False)),
                rank_correlation=header["rank_correlation"],
                created=header["created"],
                validation=tuple((float(a), float(b)) for a, b in header["validation"]),
                width_loss=widths,
                order={g: tuple(int(i) for i in slots) for g, slots in header["order"].items()},
                estimated=frozenset((str(g), int(w)) for g, w in header["estimated"]),
                refused={u: dict(own) for u, own in header.get("refused", {}).items()},
            )
            channels = loaded.network.channels
            if any(sorted(slots) != list(range(channels[g])) for g, slots in loaded.order.items()):
                raise ValueError("the order of slots is not one of the network's channels")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is damaged: {error!r}; make it again") from error
        losses = [x for row in loss.values() for x in row.values()]
        if not np.isfinite([*losses, *(x for own in widths.values() for x in own.values())]).all():
            raise InvalidInput(f"{path} is damaged: a loss is not finite; make it again")
        return loaded


def divergence(
    outputs: Any, dense: Any, kind: str, axes: Sequence[BatchAxis] | None = None
) -> tuple[float, int]:
    """(sum over samples, samples) of the divergence of flat outputs from the dense ones.

    `kl`: of softmax(dense) against softmax(outputs) over the class dimension (1, or the last of three).
    `mse`: squared error relative to the dense output's mean square. `auto`: kl where there are two classes or more.
    axes: where the batch is in each output tensor; None for dimension 0. An output that has none is compared as a whole, by its
    squared error. Several outputs are averaged.
    """
    import torch
    from torch.utils import _pytree as pytree

    from hwsearch.graph.batching import BatchAxis

    pairs = [
        (y, y0)
        for y, y0 in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(dense), strict=True)
        if isinstance(y0, torch.Tensor)
    ]
    if axes is None:
        axes = [BatchAxis(0 if y0.dim() else None) for _, y0 in pairs]
    means, samples = [], 1
    for (y, y0), where in zip(pairs, axes, strict=True):
        if where.axis is not None:
            samples = where.samples(y0)
        if not y0.is_floating_point():
            continue
        y, y0 = y.double(), y0.double()
        axis = _class_axis(y0, where)
        if axis is not None and (kind == "kl" or (kind == "auto" and y0.shape[axis] >= 2)):
            log_p, log_q = torch.log_softmax(y0, axis), torch.log_softmax(y, axis)
            means.append(float((log_p.exp() * (log_p - log_q)).sum(axis).mean()))
        else:
            means.append(float((y - y0).square().mean()) / (float(y0.square().mean()) or 1.0))
    if not means:
        raise InvalidInput("the model returns no floating-point tensor to compare with the dense network's")
    return samples * float(np.mean(means)), samples


def _class_axis(y: torch.Tensor, where: BatchAxis) -> int | None:
    """The dimension of classes: 1, or the last of three; another one where the batch is there. None where there is none."""
    if where.axis is None:
        return None
    likely = [2 if y.dim() == 3 else 1, y.dim() - 1, *range(y.dim())]
    return next((axis for axis in likely if axis < y.dim() and axis != where.axis), None)


def measure_sensitivity(
    lowering: Lowering,
    out: str | Path | None = None,
    *,
    variants: Sequence[Variant],
    quantize_outputs: bool = False,
    kind: str = "auto",
    samples: int = 256,
    seed: int = 0,
    grid: Mapping[str, Sequence[int]] | None = None,
    bank: WeightBank | None = None,
    progress: Progress | None = None,
) -> SensitivityTable:
    """Score every (unit, variant it can become) and (channel group, width) of `grid`, in torch, on at most `samples` samples.

    The samples are of the calibration batches that no weight was refitted on. Of more than 150 widths those with the
    greatest loss by a Fisher estimate (one backward pass for all) are estimated from it, not measured.
    bank: refitted weights, and the order in which slots go; needed with a grid, and for int8 weights to be refitted. One pass a
    batch; finished batches are kept beside `out`, so that a killed run resumes at the next one.
    """
    from hwsearch.compress.importance import removal_losses
    from hwsearch.progress import Progress as Shown

    progress = progress or Shown.silent()
    network, axes = lowering.network, lowering.batch_axes
    variants = [v for v in variants if v != Variant("fp32")]
    jobs = [(unit.name, variant) for unit in network.units for variant in legal(unit, variants)]
    narrower = {g: [w for w in steps if w < network.channels[g]] for g, steps in (grid or {}).items()}
    every = [(g, w) for g, steps in narrower.items() for w in steps] if bank is not None else []
    estimates: dict[tuple[str, int], float] = {}
    if bank is not None and len(every) > MOST_WIDTHS:
        progress.start(None, "estimating which widths matter")
        estimates = removal_losses(lowering.fitting, bank.order, every, seed)
        progress.stop()
    cuts = _worth_measuring(every, estimates)
    whole = _random_allocations(network, variants, narrower if bank is not None else {}, seed)
    batches = _limited(lowering.scoring, samples)
    settings = [
        kind,
        quantize_outputs,
        lowering.int8_bits,
        lowering.unsigned,
        [str(v) for v in variants],
        samples,
        cuts,
        bank.key if bank is not None else "",
    ]
    keep = _Partial(out, network, *settings)
    if bank is not None and len(keep.sums) < len(batches):
        if cuts:
            bank.build({g: [w for own, w in cuts if own == g] for g in narrower}, progress=progress)
        if any(v.precision == "int8" for v in variants):
            bank.build({}, ["int8"], progress=progress)
    progress.start(len(batches), f"sensitivity of {network.name or 'the network'}")
    try:
        for index, (traced, args, kwargs) in enumerate(batches):
            if str(index) not in keep.sums:
                simulate = lowering.simulator(traced, args, kwargs, quantize_outputs=quantize_outputs)

                def lost(
                    units: Mapping[str, Variant], widths: Mapping[str, int], simulate: Simulator = simulate
                ) -> tuple[float, int]:
                    replaced = bank.masked_weights(widths, units) if bank is not None else {}
                    mask = bank.mask(widths) if bank is not None and widths else None
                    return divergence(simulate(units, replaced, mask), simulate.dense, kind, axes)

                found = [lost({unit: v}, {}) for unit, v in jobs] + [lost({}, {g: w}) for g, w in cuts]
                totals = [lost(a, w) for a, w in whole]
                keep.add(index, [x for x, _ in found], [x for x, _ in totals], (found or [(0.0, 1)])[0][1])
            progress.step(f"batch {index + 1} of {len(batches)}")
    finally:
        progress.stop()
    count = keep.count()
    mean = keep.total("units") / count
    loss, width_loss, refused = _told(network, jobs, cuts, every, mean, estimates)
    table = SensitivityTable(
        network=network,
        loss=loss,
        samples=int(count),
        divergence=kind,
        quantize_outputs=quantize_outputs,
        int8_bits=lowering.int8_bits,
        unsigned=lowering.unsigned,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        width_loss=width_loss,
        order={g: tuple(map(int, bank.order[g])) for g in network.channels}
        if bank is not None and every
        else {},
        estimated=frozenset(c for c in every if c not in set(cuts) and c[1] in width_loss[c[0]]),
        refused=refused,
    )
    known = [i for i, (a, w) in enumerate(whole) if table.offers(a, w)]
    simulated = (keep.total("whole") / count)[known]
    predicted = np.array([table.total(*whole[i]) for i in known])
    from scipy.stats import kendalltau

    tau = float(kendalltau(predicted, simulated).statistic) if len(known) > 2 else float("nan")
    table = replace(
        table,
        rank_correlation=tau if np.isfinite(tau) else None,
        validation=tuple((float(p), float(s)) for p, s in zip(predicted, simulated, strict=True)),
    )
    if out is not None:
        table.save(out)
    keep.remove()
    return table


def _told(
    network: Network,
    jobs: Sequence[tuple[str, Variant]],
    cuts: Sequence[tuple[str, int]],
    every: Sequence[tuple[str, int]],
    mean: np.ndarray[Any, np.dtype[np.float64]],
    estimates: Mapping[tuple[str, int], float],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[int, float]], dict[str, dict[str, str]]]:
    """(losses of variants, losses of widths, what is refused) from the mean losses of jobs and cuts.

    The widths of `every` that were not measured follow the estimates from the narrowest measured one on.
    """
    losses = np.maximum(mean, 0.0).tolist()
    loss: dict[str, dict[str, float]] = {u.name: {"dense.fp32": 0.0} for u in network.units}
    refused: dict[str, dict[str, str]] = {}
    for (unit, variant), value in zip(jobs, losses, strict=False):
        if np.isfinite(value):
            loss[unit][str(variant)] = value
        else:
            refused.setdefault(unit, {})[str(variant)] = NOT_FINITE
    width_loss: dict[str, dict[int, float]] = {g: {network.channels[g]: 0.0} for g, _ in cuts}
    for (group, width), value in zip(cuts, losses[len(jobs) :], strict=True):
        if np.isfinite(value):
            width_loss[group][width] = value
        else:
            refused.setdefault(group, {})[f"width{width}"] = NOT_FINITE
    estimated = [c for c in every if c not in set(cuts)]
    for group, width in sorted(estimated, key=lambda c: -c[1]):
        own = width_loss[group]
        if any(v.startswith("width") for v in refused.get(group, ())):
            refused[group][f"width{width}"] = f"a wider one is refused: {NOT_FINITE}"
            continue
        last = min(own)  # the narrowest so far, measured or estimated
        share = estimates[group, width] / max(estimates.get((group, last), 0.0), 1e-30)
        own[width] = own[last] * max(share, 1.0)
    return loss, width_loss, refused


def _worth_measuring(
    cuts: Sequence[tuple[str, int]], estimates: Mapping[tuple[str, int], float]
) -> list[tuple[str, int]]:
    """The widths with the least estimated loss, at most 150; of every group the two widest in any case."""
    if not estimates:
        return list(cuts)
    widest = {g: sorted((w for own, w in cuts if own == g), reverse=True)[:2] for g, _ in cuts}
    kept = {(g, w) for g, widths in widest.items() for w in widths}
    for cut in sorted(cuts, key=lambda c: estimates[c]):
        if len(kept) >= MOST_WIDTHS:
            break
        kept.add(cut)
    # what lies between two measured widths is measured as well: estimates go on from the narrowest
    least = {g: min(w for own, w in kept if own == g) for g in widest}
    return [(g, w) for g, w in cuts if w >= least[g]]


def _random_allocations(
    network: Network, variants: Sequence[Variant], widths: Mapping[str, Sequence[int]], seed: int
) -> list[tuple[dict[str, Variant], dict[str, int]]]:
    """Whole allocations over fp32 and the coarser steps (float types only where there are none), and over widths."""
    rng = np.random.default_rng(seed)
    steps_of = {u.name: legal(u, [v for v in variants if not v.plain] or variants[:1]) for u in network.units}
    count = VALIDATION_ALLOCATIONS if variants or widths else 0

    def drawn(unit: str, share: float) -> Variant:
        own = steps_of[unit]
        if rng.random() >= share or not own:
            return Variant("fp32")
        return own[int(rng.integers(len(own)))] if len(own) > 1 else own[0]

    return [
        (
            {u.name: drawn(u.name, share) for u in network.units},
            {
                g: int(rng.choice(list(steps)))
                for g, steps in widths.items()
                if steps and rng.random() < share
            },
        )
        for share in np.linspace(0.15, 1.0, count)
    ]


def _limited(batches: Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]], samples: int) -> list[Any]:
    """As many batches as hold `samples` samples, at least one."""
    from torch.utils import _pytree as pytree

    kept: list[Any] = []
    count = 0
    for traced, args, kwargs in batches:
        if kept and count >= samples:
            break
        kept.append((traced, args, kwargs))
        count += next(
            (t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if hasattr(t, "shape") and t.dim()), 1
        )
    return kept


class _Partial:
    """Sums of finished batches, in a JSON file beside the table until it is whole."""

    def __init__(self, out: str | Path | None, network: Network, *settings: Any) -> None:
        self.path = Path(f"{out}.partial") if out is not None else None
        self.key = [network.fingerprint, network.weights_digest, *map(str, settings)]
        self.sums: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            try:
                data = json.loads(self.path.read_text())
            except ValueError:
                data = {}
            if isinstance(data, dict) and data.get("key") == self.key:
                self.sums = data["sums"]

    def add(self, index: int, units: list[float], whole: list[float], count: int) -> None:
        self.sums[str(index)] = {"units": units, "whole": whole, "count": count}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(".writing")
            temporary.write_text(json.dumps({"key": self.key, "sums": self.sums}))
            os.replace(temporary, self.path)

    def count(self) -> float:
        return float(sum(entry["count"] for entry in self.sums.values()))

    def total(self, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Sum over batches."""
        total: np.ndarray[Any, np.dtype[np.float64]] = np.sum(
            [entry[what] for entry in self.sums.values()], axis=0, dtype=np.float64
        )
        return total

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

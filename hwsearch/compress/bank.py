"""Refitted weights on disk, one per (unit, width, precision), from which any allocation is put together in about a second.

A unit's entry depends on which of its input channels are left and on its precision, not on its output channels: each row of
a weight is refitted on its own. So widths of neighbours combine freely: columns from the entry of the actual input width,
rows cut to the actual output width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch.utils import _pytree as pytree

from hwsearch.compress.gram import (
    ROWS,
    Batch,
    Gptq,
    Gram,
    Grams,
    as_columns,
    feature_columns,
    from_columns,
    refit,
    refittable,
    shifts_bias,
)
from hwsearch.compress.importance import Order
from hwsearch.compress.quantize import quantize_weight
from hwsearch.compress.widths import Kept, Weights, in_slots
from hwsearch.files import changed, write_bytes
from hwsearch.graph.export import weights_digest
from hwsearch.graph.narrow import Mask, cut
from hwsearch.graph.trace import Traced
from hwsearch.network.variants import INT8_BITS, Variant, int8_levels
from hwsearch.progress import Progress

COMBINATIONS = 64
"""Units that read several groups (concatenations) are prefilled for at most so many combinations of widths."""
METHOD = 3
"""Of finding the order and of refitting, counted up whenever it computes something else."""
ORDER = "order of slots"
_WEIGHT, _BIAS = "|weight", "|bias"

Entry = dict[str, torch.Tensor]
"""`weight`, and `bias` where the unit has one."""
Key = tuple[str, str]
"""(unit, name) of an entry."""
Job = tuple[str, Mapping[str, int], str]
"""(unit, widths, precision) that an entry is asked for by."""


@dataclass(frozen=True)
class Regression:
    """An entry that least squares make.

    name: of the entry. widths: of the groups that the unit reads and that are not whole. gram, ridge: what it is regressed on.
    """

    unit: str
    name: str
    widths: Mapping[str, int]
    int8: bool
    gram: Gram
    ridge: float


Elsewhere = Callable[[Sequence[Regression]], Iterator[tuple[Regression, Entry]]]
"""Makes entries in other processes: each with what was asked for, in any order."""


class WeightBank:
    """Weights of a traced network for any widths of its channel groups.

    folder: where entries are kept for the next process, in a folder of their own for each `made_of`, which is in the header of
    every file as well; None keeps them in memory alone. order: from `order_slots`; width w keeps the first w slots. int8_bits: of
    int8 weights. Entries are made when they are first asked for, or all at once by `build`, which skips those that exist.
    """

    def __init__(
        self,
        folder: str | Path | None,
        traced: Traced,
        batches: Sequence[Batch],
        order: Order,
        *,
        rows: int = ROWS,
        grams: Grams | None = None,
        int8_bits: int = INT8_BITS,
    ) -> None:
        self.traced, self.batches, self.order, self.rows = traced, list(batches), dict(order), rows
        self.int8_bits = int8_bits
        self._grams = grams
        self._memory: dict[Key, Entry] = {}
        self.folder = Path(folder) / self.key if folder is not None else None
        self._axes = {
            u.name: in_slots(traced, u.name) for u in traced.network.units if u.weight_shape and not u.stored
        }
        self._reads = {
            unit: tuple(
                g
                for g, slots in traced.channels.groups.items()
                if axis is not None and np.isin(axis.slots, slots).any()
            )
            for unit, axis in self._axes.items()
        }

    @cached_property
    def made_of(self) -> dict[str, str]:
        """Everything that entries depend on, by name."""
        network = self.traced.network
        order = hashlib.sha256()
        for group, positions in sorted(self.order.items()):
            order.update(group.encode() + np.asarray(positions, "<i8").tobytes())
        leaves = (x for _, args, kwargs in self.batches for x in pytree.tree_leaves((args, sorted(kwargs.items()))))
        data = weights_digest(("", x) for x in leaves if isinstance(x, torch.Tensor))
        return {
            "network": network.fingerprint,
            "weights": network.weights_digest,
            "calibration data": data,
            ORDER: order.hexdigest()[:16],
            "rows": str(self.rows),
            "bits of int8 weights": str(self.int8_bits),
            "method of refitting": str(METHOD),
        }

    @cached_property
    def key(self) -> str:
        """Hash of `made_of`."""
        return hashlib.sha256(json.dumps(self.made_of).encode()).hexdigest()[:16]

    @property
    def outdated(self) -> str:
        """Of a folder that holds entries of this network but none to be used: what has changed since; else empty."""
        if self.folder is None or self.folder.exists() or not self.folder.parent.is_dir():
            return ""
        now = {k: v for k, v in self.made_of.items() if k != ORDER}  # follows from the others, or is another choice of axes
        firsts = (next(own.rglob("*.safetensors"), None) for own in sorted(self.folder.parent.iterdir()) if own.is_dir())
        found = [_made_of(file) for file in firsts if file is not None]
        same = [m for m in found if not m or m["network"] == now["network"]]
        told = [changed({k: v for k, v in m.items() if k != ORDER}, now) for m in same]
        return min(told, key=len, default="")

    @property
    def grams(self) -> Grams:
        """Gram matrices of all units that can be refitted, from one pass over the batches at their first use."""
        if self._grams is None:
            self._grams = Grams(self.batches, [u.name for u in self.traced.network.units], rows=self.rows)
        return self._grams

    def kept(self, widths: Mapping[str, int]) -> Kept:
        """Positions of the slots that stay at these widths, ascending; groups left out stay whole."""
        return {g: tuple(sorted(self.order[g][:w].tolist())) for g, w in widths.items()}

    def mask(self, widths: Mapping[str, int]) -> Mask:
        """For each slot number whether it stays."""
        return self.traced.channels.mask(self.kept(widths))

    def weight(
        self, unit: str, widths: Mapping[str, int], precision: str = "fp32"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight with the columns that are left and all rows, bias with all rows).

        widths: of the groups that the unit reads; others are ignored. Half precisions have the entry of fp32;
        int8 weights lie on their int8 grid, which `quantize_weight` finds again.
        """
        key, own = self.entry(unit, widths, precision)
        entry = self._found(key, own)
        if entry is None:
            entry = self._keep(key, self._refitted(key, own, precision == "int8"))
        return entry["weight"], entry.get("bias")

    def entry(self, unit: str, widths: Mapping[str, int], precision: str = "fp32") -> tuple[Key, dict[str, int]]:
        """(key of the entry that `weight` gives, widths of the groups that the unit reads and that are not whole)."""
        own = {
            g: widths[g] for g in self._reads[unit] if widths.get(g, len(self.order[g])) < len(self.order[g])
        }
        name = (
            "-".join(f"{w}" for w in (own.get(g, len(self.order[g])) for g in self._reads[unit])) or "whole"
        )
        return (unit, name + (".int8" if precision == "int8" else "")), own

    def held(self, key: Key) -> Entry:
        """An entry that was made."""
        return self._memory[key]

    def hold(self, entries: Mapping[Key, Entry]) -> None:
        """Have these entries and no others, which another bank made."""
        self._memory = dict(entries)

    def fill(
        self, jobs: Iterable[Job], elsewhere: Elsewhere | None = None, done: Callable[[str], None] = lambda unit: None
    ) -> None:
        """Make the entries that do not exist yet. elsewhere: makes those that least squares make. done: is told each one's unit."""
        left: dict[Key, Regression] = {}
        for unit, widths, precision in jobs:
            key, own = self.entry(unit, widths, precision)
            todo = None
            if elsewhere is not None and self._found(key, own) is None:
                todo = self._regression(key, own, precision == "int8")
            if todo is None:
                self.weight(unit, widths, precision)
                done(unit)
            else:
                left[key] = todo
        if elsewhere is not None and left:
            for todo, made in elsewhere(list(left.values())):
                self._keep((todo.unit, todo.name), made)
                done(todo.unit)

    def allocation(
        self, variants: Mapping[str, Variant], widths: Mapping[str, int], make: Callable[[], Weights]
    ) -> Weights:
        """Weights of a whole allocation: those that an earlier process left in the folder, else made, and left there."""
        if self.folder is None:
            return make()
        chosen = repr([sorted((u, str(v)) for u, v in variants.items()), sorted(widths.items())])
        path = self.folder / "allocations" / f"{hashlib.sha256(chosen.encode()).hexdigest()[:16]}.safetensors"
        narrow = self.traced.network.narrow(widths)
        shapes = {u.name + _WEIGHT: u.weight_shape for u in narrow.units}
        if (kept := self._loaded(path, chosen, shapes)) is not None:
            units = {key.removesuffix(_WEIGHT) for key in kept if key.endswith(_WEIGHT)}
            return {unit: (kept[unit + _WEIGHT], kept.get(unit + _BIAS)) for unit in units}
        made = make()
        tensors = {unit + _WEIGHT: weight for unit, (weight, _) in made.items()}
        tensors |= {unit + _BIAS: bias for unit, (_, bias) in made.items() if bias is not None}
        self._save(path, chosen, tensors)
        return made

    def _save(self, path: Path, what: str, tensors: Mapping[str, torch.Tensor]) -> None:
        header = {"made_of": json.dumps(self.made_of), "what": what}
        own = {key: t.detach().contiguous().clone() for key, t in tensors.items()}
        write_bytes(path, save_tensors(own, header))

    def _loaded(
        self, path: Path, what: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor] | None:
        """The tensors of a file; None where it is not there, damaged, or not what it should be: it is made again then."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
            found = load_file(path)
        except (SafetensorError, OSError):
            return None
        right = (
            header == {"made_of": json.dumps(self.made_of), "what": what}
            and all(tuple(t.shape) == shapes[key] for key, t in found.items() if key in shapes)
            and all(bool(torch.isfinite(t).all()) for t in found.values())
        )
        return found if right else None

    def _path(self, unit: str, name: str) -> Path:
        assert self.folder is not None
        number = next(i for i, u in enumerate(self.traced.network.units) if u.name == unit)
        return (
            self.folder
            / f"{number:03d}.{re.sub(r'[^A-Za-z0-9._-]', '_', unit)[-80:]}"
            / f"{name}.safetensors"
        )

    def _load(self, unit: str, name: str, widths: Mapping[str, int]) -> dict[str, torch.Tensor] | None:
        if self.folder is None:
            return None
        own, axis = self.traced.network[unit], self._axes[unit]
        shape = list(own.weight_shape)
        if axis is not None:
            shape[own.in_axis] = len(axis.kept(self.mask(widths)))
        found = self._loaded(self._path(unit, name), f"{unit} {name}", {"weight": tuple(shape)})
        return found if found and "weight" in found else None

    def _found(self, key: Key, widths: Mapping[str, int]) -> Entry | None:
        """An entry that was made, by this process or an earlier one."""
        if key not in self._memory and (kept := self._load(*key, widths)) is not None:
            self._memory[key] = kept
        return self._memory.get(key)

    def _keep(self, key: Key, made: Entry) -> Entry:
        if self.folder is not None:
            self._save(self._path(*key), " ".join(key), made)
        self._memory[key] = made
        return made

    def _regression(self, key: Key, widths: Mapping[str, int], int8: bool) -> Regression | None:
        """How least squares make an entry; None where nothing is lost, or nothing can be regressed."""
        unit, name = key
        if not widths and not int8:
            return None
        if not refittable(self.traced.network[unit]) or unit not in self.grams or not self.grams[unit].finite:
            return None
        return Regression(unit, name, widths, int8, self.grams[unit], self.grams.ridges[unit])

    def _refitted(self, key: Key, widths: Mapping[str, int], int8: bool) -> Entry:
        todo = self._regression(key, widths, int8)
        return self.regressed(todo) if todo is not None else self._unrefitted(key[0], widths, int8)

    def _inputs(self, unit: str, mask: Mask) -> NDArray[np.int64]:
        """Inputs of a unit that are left."""
        own, axis = self.traced.network[unit], self._axes[unit]
        return axis.kept(mask) if axis is not None else np.arange(own.weight_shape[own.in_axis])

    def _unrefitted(self, unit: str, widths: Mapping[str, int], int8: bool) -> Entry:
        """An entry of the inputs that are left, rounded to nearest in int8."""
        own, weight, bias = self.traced.network[unit], self.traced.weight(unit), self.traced.bias(unit)
        assert weight is not None
        left = weight.index_select(own.in_axis, torch.from_numpy(self._inputs(unit, self.mask(widths))))
        if int8:
            left = torch.from_numpy(quantize_weight(left, own.out_axis, int8_levels(self.int8_bits)).dequantized())
        return ({} if bias is None else {"bias": bias.clone()}) | {"weight": left.contiguous()}

    def regressed(self, todo: Regression) -> Entry:
        """The entry."""
        unit, int8, levels = todo.unit, todo.int8, int8_levels(self.int8_bits)
        own, weight, bias = self.traced.network[unit], self.traced.weight(unit), self.traced.bias(unit)
        assert weight is not None
        matrix, shifts = as_columns(own, weight), shifts_bias(self.traced, unit)
        columns = feature_columns(own, self._inputs(unit, self.mask(todo.widths)))
        # one scale of a transposed convolution spans several rows of the matrix: it is rounded to nearest
        quantizer = Gptq(levels) if int8 and "transpose" not in own.op else None
        new, shift = refit(todo.gram, matrix, columns, bias=shifts, ridge=todo.ridge, quantizer=quantizer)
        found = {} if bias is None else {"bias": bias.clone()}
        found["weight"] = from_columns(own, new).float().contiguous()
        if int8 and quantizer is None:
            rounded = quantize_weight(found["weight"], own.out_axis, levels)
            found["weight"] = torch.from_numpy(rounded.dequantized())
        if bias is not None and shifts:
            found["bias"] = (bias.double() + shift).float()
        return found

    # ---- whole networks

    def assemble(self, widths: Mapping[str, int], variants: Mapping[str, Variant] | None = None) -> Weights:
        """(weight, bias) of the units that have a weight and either read a narrower group or are int8, for `narrow`.

        Shapes are those of the narrow network: rows cut to the actual output width, columns refitted for the actual input
        width. Weights of int8 units lie on their int8 grid, on which `quantize_weight` leaves them.
        """
        variants, mask = variants or {}, self.mask(widths)
        return {
            unit: self._cut(unit, *self.weight(unit, widths, precision), mask)
            for unit, precision in self.concerned(widths, variants)
        }

    def masked_weights(
        self, widths: Mapping[str, int], variants: Mapping[str, Variant] | None = None
    ) -> Weights:
        """The same in the shapes of the dense network, zeros in removed columns, for `Simulator`."""
        variants, mask, found = variants or {}, self.mask(widths), {}
        for unit, precision in self.concerned(widths, variants):
            weight, bias = self.weight(unit, widths, precision)
            own = self.traced.network[unit]
            whole, kept = torch.zeros(own.weight_shape), torch.from_numpy(self._inputs(unit, mask))
            found[unit] = whole.index_copy_(own.in_axis, kept, weight), bias
        return found

    def concerned(
        self, widths: Mapping[str, int], variants: Mapping[str, Variant]
    ) -> Iterable[tuple[str, str]]:
        """(unit, precision) of the entries that an allocation is made of."""
        narrower = {g for g, w in widths.items() if w < len(self.order[g])}
        for unit, reads in self._reads.items():
            precision = variants[unit].precision if unit in variants else "fp32"
            if precision == "int8" or narrower.intersection(reads):
                yield unit, precision

    def _cut(
        self, unit: str, weight: torch.Tensor, bias: torch.Tensor | None, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        path, bias_path = self.traced.paths[unit]
        tensors = self.traced.channels.tensors
        axis = self.traced.network[unit].in_axis
        weight = cut(weight, [a for a in tensors.get(path or "", []) if a.axis != axis], mask)
        return weight, None if bias is None else cut(bias, tensors.get(bias_path or "", []), mask)

    def build(
        self,
        grid: Mapping[str, Sequence[int]],
        precisions: Sequence[str] = ("fp32",),
        progress: Progress | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Make every entry for these widths of the groups (dense always included) that does not exist yet; see `fill`."""
        progress = progress or Progress.silent()
        jobs = [
            (unit, dict(zip(reads, widths, strict=True)), precision)
            for unit, reads in self._reads.items()
            for widths in itertools.islice(
                itertools.product(*(sorted({len(self.order[g]), *grid.get(g, ())}) for g in reads)),
                COMBINATIONS,
            )
            for precision in ("fp32", "int8")
            if precision in precisions or (precision == "fp32" and set(precisions) - {"int8"})
        ]
        progress.start(len(jobs), "refitting weights")
        try:
            self.fill(jobs, elsewhere, progress.step)
        finally:
            progress.stop()


def _made_of(path: Path) -> dict[str, str]:
    """What a file says that it was made of; empty where it says nothing."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("made_of", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return dict(found)

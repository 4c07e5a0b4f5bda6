"""The network that a scheme is applied to: its layers' own weights, and which channels are left.

Weights are those of the user's module, before BatchNorm is folded. Nothing of the module changes until `write`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray

from hwsearch.allocate.allocation import Allocation
from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.graph.channels import Axis
from hwsearch.graph.narrow import cut, summed_gates
from hwsearch.graph.trace import trace
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import as_module
from hwsearch.network.network import Network, Unit
from hwsearch.network.variants import WEIGHT_BITS, Variant, network_bytes, uniform, weight_bytes
from hwsearch.schemes.footprint import Footprint, packed_bits
from hwsearch.task import Inputs, Task, without_wrappers

FLOAT = Variant("fp32")
NO_PARAMETER = "its weight is no parameter of the module but computed (a parametrization, a transpose): make it a parameter first"


@dataclass(frozen=True)
class Format:
    """How the weight of a layer is stored: so many bits a value, and the scales of a variant."""

    bits: int
    variant: Variant

    def scale_bytes(self, unit: Unit) -> int:
        """Bytes beside the values and the bias."""
        values = (unit.weight_count * WEIGHT_BITS[self.variant.precision] + 7) // 8
        return weight_bytes(unit, self.variant) - unit.other_bytes - values


class Subject:
    """A network while steps compress it.

    task: None where it is a module on its own. formats: unit -> how its weight is stored, fp32 where it is not there. allocation:
    the answer of a search that it was compressed by. touched: layers whose weights were put, since it was made or copied.
    """

    def __init__(self, model: torch.nn.Module, inputs: Inputs, task: Task | None = None) -> None:
        self.model, self.task = model, task
        self.traced = trace(model, inputs, task.name if task is not None else "")
        self.dense: Network = self.traced.network
        self.mask: NDArray[np.bool_] = self.traced.channels.mask({})
        self.formats: dict[str, Format] = {}
        self.left_out: dict[str, str] = {}
        self.allocation: Allocation | None = None
        self.changed = False
        self.touched: dict[str, None] = {}
        own, self.homes, self._weights = _parameters(model), dict[str, str](), dict[str, torch.Tensor]()
        for unit in self.traced.network.units:
            path = self.traced.paths[unit.name][0] if unit.weight_shape and not unit.stored else None
            if path is None:
                continue
            if path in own and tuple(own[path].shape) == unit.weight_shape:
                self.homes[unit.name] = path
                self._weights.setdefault(path, own[path].detach().clone())
            else:
                self.left_out[unit.name] = NO_PARAMETER

    def copy(self) -> Subject:
        """Another that steps may change."""
        new = copy.copy(self)
        new._weights, new.formats, new.left_out, new.touched = dict(self._weights), dict(self.formats), dict(self.left_out), {}
        return new

    @property
    def widths(self) -> dict[str, int]:
        """Channels that are left of each group."""
        return {g: int(self.mask[slots].sum()) for g, slots in self.traced.channels.groups.items()}

    @property
    def network(self) -> Network:
        """With the channels that are left."""
        return self.traced.network.narrow(self.widths)

    def layers(self, skip: Sequence[str] = ()) -> Iterator[tuple[Unit, torch.Tensor]]:
        """Each layer with a weight of its own, with the channels that are left, and that weight.

        skip: patterns of names of layers to leave out. Raises InvalidInput on one that no layer has.
        """
        self._check(skip)
        network = self.network
        for name, path in self.homes.items():
            if not matches(name, skip):
                yield network[name], cut(self._weights[path], self._axes(path), self.mask)

    def whole(self, unit: str) -> torch.Tensor:
        """A layer's weight in the shape of the dense network, zeros for channels that are gone."""
        return self._weights[self.homes[unit]]

    def put(self, unit: str, weight: torch.Tensor) -> None:
        """Set a layer's weight, in the shape that `layers` gives."""
        path = self.homes[unit]
        whole = torch.zeros_like(self._weights[path])
        indices = [np.arange(size) for size in whole.shape]
        for axis in self._axes(path):
            indices[axis.axis] = axis.kept(self.mask)
        whole[tuple(torch.from_numpy(i) for i in np.ix_(*indices))] = weight.to(whole.dtype)
        self._weights[path], self.changed = whole, True
        self.touched[unit] = None

    def groups(self, skip: Sequence[str] = ()) -> Iterator[str]:
        """Channel groups whose layers' weights are all parameters.

        skip: patterns of names of groups, and of layers that produce them. Raises InvalidInput on one that nothing has.
        """
        self._check(skip)
        channels = self.traced.channels
        for group in channels.groups:
            producers = channels.producers[group]
            foreign = [u for u in (*producers, *channels.consumers[group]) if u not in self.homes]
            if matches(group, skip) or any(matches(u, skip) for u in producers):
                continue
            if foreign:
                self.left_out[group] = f"of its layer {foreign[0]}: {NO_PARAMETER}"
                continue
            yield group

    def remove(self, mask: NDArray[np.bool_]) -> None:
        """Take away the channels whose slots a mask leaves out."""
        self.mask, self.changed = self.mask & mask, True
        for path, weight in self._weights.items():
            self._weights[path] = self._without(path, weight)

    def write(self, model: torch.nn.Module) -> None:
        """Set the weights of a module, zeros for all that channels that are gone have there."""
        own, numbers = _parameters(model), self.traced.channels.numbers
        with torch.no_grad():
            for path, weight in self._weights.items():
                own[path].copy_(weight)
            for path in self.traced.channels.tensors:
                if path in own and path not in self._weights and path not in numbers:
                    own[path].copy_(self._without(path, own[path].detach()))

    def check_zeros(self) -> None:
        """Raises InvalidInput where zeros in the module are not the same as channels that are gone."""
        channels = self.traced.channels
        summed = [n for n in self.traced.graph.graph.nodes if summed_gates(n, channels, self.mask) is not None]
        if summed:
            raise InvalidInput(
                f"{summed[0].name} sums over channels that go, so that zeros in the module are not the network without them; "
                "apply the scheme to a Task, whose new module is narrower"
            )

    def as_task(self) -> Task:
        """The task with a new module: the user's with new weights, or where channels went a narrower one with BatchNorm folded."""
        assert self.task is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree specs, copied
            model = copy.deepcopy(self.model)
        self.write(model)
        task = replace(self.task, model=model, spec="")
        if self.mask.all():
            return task
        lowering = Lowering(task)
        if lowering.traced.network.channels != self.traced.network.channels:
            raise UntraceableModel("with its weights compressed the network has other channel groups; prune fewer channels")
        kept = {g: np.flatnonzero(self.mask[slots]).tolist() for g, slots in self.traced.channels.groups.items()}
        return replace(task, model=as_module(lowering.narrow(kept)))

    def footprint(self) -> Footprint:
        """What is left."""
        network, nonzero, values, packed = self.network, {}, 0.0, 0.0
        other = network.fixed_bytes
        for unit in network.units:
            form = self.formats.get(unit.name, Format(WEIGHT_BITS[FLOAT.precision], FLOAT))
            if unit.name not in self.homes:
                other += weight_bytes(unit, form.variant)
                continue
            nonzero[unit.name] = count = int(self.whole(unit.name).count_nonzero())
            values += count * form.bits / 8
            packed += packed_bits(unit.weight_count, count, form.bits) / 8 + form.scale_bytes(unit)
            other += unit.other_bytes
        counts = {u.name: u.weight_count for u in self.dense.units if u.name in nonzero}
        return Footprint(
            weights=sum(counts.values()),
            nonzero=sum(nonzero.values()),
            dense_bytes=network_bytes(self.dense, uniform(self.dense, FLOAT.precision)),
            nonzero_bytes=round(values) + other,
            packed_bytes=round(packed) + other,
            densities={unit: nonzero[unit] / count for unit, count in counts.items()},
            widths=(self.allocation.widths if self.allocation is not None else {}) | self.widths,
            left_out=self.left_out,
        )

    def _axes(self, path: str) -> list[Axis]:
        return self.traced.channels.tensors.get(path, [])

    def _without(self, path: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor with zeros for the channels that are gone."""
        for axis in self._axes(path):
            gone = np.flatnonzero(~self.mask[axis.slots])
            value = value.index_fill(axis.axis, torch.from_numpy(gone), 0.0) if len(gone) else value
        return value

    def _check(self, skip: Sequence[str]) -> None:
        names = [*self.homes, *self.traced.channels.groups]
        for pattern in skip:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InvalidInput(f"nothing is called {pattern!r}, which is to be skipped; layers are {', '.join(self.homes)}")


def matches(name: str, skip: Sequence[str]) -> bool:
    """Whether a name is one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in skip)


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    with without_wrappers(model):
        return dict(model.named_parameters(remove_duplicate=False))

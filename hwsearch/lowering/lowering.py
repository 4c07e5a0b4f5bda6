"""A task made ready to become ONNX in any allocation: traced, exported once with markers, and calibrated."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch.utils import _pytree as pytree

from hwsearch.compress.formats import StoredWeights
from hwsearch.compress.gram import kept_apart
from hwsearch.compress.quantize import Key, Range, activation_ranges
from hwsearch.compress.simulate import Simulator
from hwsearch.compress.widths import Kept, Tensors, Weights, narrow
from hwsearch.errors import HwsearchError, InvalidInput, UnsupportedVariant
from hwsearch.graph.batching import BatchAxis, find_axes
from hwsearch.graph.calls import as_call, copied, evaluating, flat_inputs
from hwsearch.graph.equivalence import check_equivalence, check_trace
from hwsearch.graph.export import weights_digest
from hwsearch.graph.trace import Traced, trace
from hwsearch.lowering.assemble import assemble
from hwsearch.lowering.marked import export
from hwsearch.lowering.onnx_widths import NotFollowed, OnnxWidths
from hwsearch.network.network import Network
from hwsearch.network.variants import INT8_BITS, Int8, Variant, ineligible
from hwsearch.task import Inputs, Task

ACTIVATION_BYTES = 2e9
"""What the activations of one calibration batch may take; larger batches are cut."""
NOT_FINITE = "it reads or returns NaN or infinity on calibration data, which no quantized type holds"
COMPARED = 4
"""Calibration batches on which the graph is compared with the module."""
PIECES = 8
"""Calibration data is cut into at least so many batches, where it has as many samples, for some to be kept apart."""


class Lowering:
    """A task made ready to become ONNX in any allocation: traced, exported and calibrated once.

    batch: batch size of the deployed network; that of the example inputs where it is None. residual: the residual width
    of transformers is a channel group as well. int8_bits: of int8 weights, 8 or (for devices that sum products of 8 bits
    inexactly) 7. unsigned: int8 activations that were never negative on calibration data are uint8.
    """

    def __init__(
        self,
        task: Task,
        batch: int | None = None,
        method: str = "mse",
        *,
        residual: bool = False,
        int8_bits: int = INT8_BITS,
        unsigned: bool = False,
    ) -> None:
        self.task, self.method, self.residual = task, method, residual
        self.int8_bits, self.unsigned = int8_bits, unsigned
        self.inputs = with_batch(task.example_inputs, batch)
        self.traced = trace(task.model, self.inputs, task.name, residual=residual)
        check_calibration(task)
        check_equivalence(task.model, self.traced, self._compared())
        self.whole: Lowering | None = None
        self.kept: Kept = {}
        self.replaced: Weights | None = None
        self.tensors: Tensors = {}
        self.calibrate = True
        self._traces = {_shapes(as_call(self.inputs)): self.traced}

    @property
    def int8(self) -> Int8:
        """How int8 is lowered."""
        return Int8(self.int8_bits, self.unsigned)

    def _compared(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """The example, and a few calibration batches of as many samples."""
        batches = self.task.calibration
        chosen = {round(i) for i in np.linspace(0, len(batches) - 1, COMPARED)}
        own = {f"calibration batch {i}": self.deployed(batches[i]) for i in sorted(chosen)}
        return {what: as_call(inputs) for what, inputs in {"example_inputs": self.inputs, **own}.items()}

    def deployed(self, inputs: Inputs) -> Inputs:
        """A calibration batch as the deployed network takes it: cut or repeated where its shapes are not the example's."""
        own, example = (
            [t.shape for t in pytree.tree_leaves(_sorted(as_call(i))) if isinstance(t, torch.Tensor)]
            for i in (inputs, self.inputs)
        )
        return inputs if own == example else with_batch(inputs, self.batch)

    @cached_property
    def network(self) -> Network:
        """What was traced, with the reason at each unit whose activations cannot be quantized on calibration data."""
        if self.whole is not None:
            reasons = {u.name: u.float_only for u in self.whole.network.units}
        else:
            reasons = {unit: NOT_FINITE for (unit, _, _), seen in self.ranges.items() if not seen.finite}
        network = self.traced.network
        if not any(reasons.values()):
            return network
        return replace(
            network, units=tuple(replace(u, float_only=reasons.get(u.name, "")) for u in network.units)
        )

    @cached_property
    def marked(self) -> onnx.ModelProto:
        """The network with markers."""
        if self.whole is None:
            return export(self.traced)
        follow = self.whole.follow
        if follow is None or not follow.paths.issuperset(self.tensors):
            return export(self.traced)
        return follow.narrow(self.traced, self.whole.traced.channels.mask(self.kept))

    @cached_property
    def follow(self) -> OnnxWidths | None:
        """How to make the exported network narrower; None where it has to be exported anew for each width."""
        try:
            found = OnnxWidths(self.marked, self.traced)
            half = {g: range(0, n, 2) for g, n in self.traced.network.channels.items()}
            narrow = self.narrow(half)
            model = found.narrow(narrow.traced, self.traced.channels.mask(half))
            plain = {u.name: Variant("fp32") for u in self.traced.network.units}
            onnx.shape_inference.infer_shapes(assemble(model, plain, {}, {}), strict_mode=True)
        except (NotFollowed, onnx.shape_inference.InferenceError):
            return None
        return found

    def narrow(
        self,
        kept: Kept,
        weights: Weights | None = None,
        *,
        calibrate: bool = False,
        tensors: Tensors | None = None,
        ranges: Mapping[Key, Range] | None = None,
    ) -> Lowering:
        """The same task with only the kept slots of its channel groups.

        weights: of units, instead of the whole ones cut. calibrate: take the ranges of activations from the narrow
        network; else those of the whole one stand in for them. tensors: of any place in the graph, put there after `weights`.
        ranges: of activations, where they are known.
        """
        new = copy.copy(self)
        for name in ("marked", "follow", "ranges", "weights", "calibration", "network"):
            new.__dict__.pop(name, None)
        new.whole, new.kept, new.replaced, new.calibrate = self, kept, weights, calibrate
        new.tensors, new._traces = tensors or {}, {}
        new.traced = narrow(self.traced, kept, weights, tensors)
        if ranges is not None:
            new.ranges = dict(ranges)
        return new

    @cached_property
    def calibration(self) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        """Each calibration batch with a trace for its shape; large ones, and too few of them, are cut."""
        if self.whole is not None:
            whole = {id(t): t for t, _, _ in self.whole.calibration}
            own = {key: narrow(t, self.kept, self.replaced, self.tensors) for key, t in whole.items()}
            return [(own[id(t)], args, kwargs) for t, args, kwargs in self.whole.calibration]
        each = sum(4 * u.calls * math.prod(u.output_shape) for u in self.traced.network.units) / self.batch
        most = max(1, int(ACTIVATION_BYTES / (3 * each)))
        samples = sum(_samples(inputs) for inputs in self.task.calibration)
        # a model that takes several samples at once need not take one
        enough = max(samples // PIECES, 1 if self.batch == 1 else 2)
        if enough < most and len(self.task.calibration) < PIECES:
            try:
                return self._batches(enough)
            except HwsearchError:
                pass  # a model that takes batches of one size only: they stay as they are
        return self._batches(most)

    def _batches(self, largest: int) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        pieces = in_pieces(self.task.calibration, largest)
        return [(self.traced_for(inputs, "calibration data"), *as_call(inputs)) for inputs in pieces]

    def traced_for(self, inputs: Inputs, what: str) -> Traced:
        """The network traced for inputs of other shapes than the example's; what: names them in messages."""
        call = as_call(inputs)
        key = _shapes(call)
        if key in self._traces:
            return self._traces[key]
        if self.whole is not None:
            found = narrow(self.whole.traced_for(inputs, what), self.kept, self.replaced, self.tensors)
        else:
            found = trace(self.task.model, inputs, self.task.name, residual=self.residual, what=what)
            check_trace(self.task.model, found, call, what)
            same = list(found.sites) == list(self.traced.sites)
            if not same or found.network.channels != self.traced.network.channels:
                raise InvalidInput(
                    f"the model runs other layers on {what} than on example_inputs; make both take the same path"
                )
        return self._traces.setdefault(key, found)

    @cached_property
    def calibration_digest(self) -> str:
        """16 hex digits that change with any number of the calibration data."""
        leaves = (x for inputs in self.task.calibration for x in pytree.tree_leaves(_sorted(as_call(inputs))))
        return weights_digest(("", x) for x in leaves if isinstance(x, torch.Tensor))

    @property
    def fitting(self) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        """The calibration batches that weights are refitted on: all but those kept apart for scoring."""
        return self.calibration[: kept_apart(len(self.calibration))]

    @property
    def scoring(self) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        """The last quarter of the calibration batches, which losses are measured on; a single batch serves for both."""
        return self.calibration[kept_apart(len(self.calibration)) :] or self.calibration

    @property
    def comparable(self) -> list[tuple[Traced, tuple[Any, ...], dict[str, Any]]]:
        """As `scoring`, in batches of the deployed size where an output has no axis that follows the batch."""
        if all(where.axis is not None for where in self.batch_axes):
            return self.scoring
        found = []
        for _, args, kwargs in self.scoring:
            count = _samples(cast(Inputs, (args, kwargs)))
            for start in range(0, max(count - count % self.batch, 1), self.batch):
                own = pytree.tree_map(lambda x, s=start: _rows(x, s, s + self.batch), (args, kwargs))
                args_, kwargs_ = cast(Any, with_batch(own, self.batch))
                found.append((self.traced, args_, kwargs_))
        return found

    @cached_property
    def ranges(self) -> dict[Key, Range]:
        if self.whole is not None and not self.calibrate:
            return self.whole.ranges
        return activation_ranges(self.calibration, self.method, unsigned=self.unsigned)

    @cached_property
    def weights(self) -> StoredWeights:
        """(unit, variant) -> its weight as it is stored."""
        return StoredWeights(self.traced, self.int8_bits)

    def simulator(
        self,
        traced: Traced,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        quantize_outputs: bool,
        quantized: bool = True,
    ) -> Simulator:
        """What this network's allocations compute for one batch. quantized: whether any of them quantizes activations."""
        return Simulator(
            traced,
            args,
            kwargs,
            self.weights,
            self.ranges if quantized else {},
            quantize_outputs=quantize_outputs,
            int8_bits=self.int8_bits,
        )

    @property
    def batch(self) -> int:
        """Batch size of the deployed network."""
        shapes = self.traced.network.input_shapes
        return shapes[0][0] if shapes and shapes[0] else 1

    @cached_property
    def batch_axes(self) -> tuple[BatchAxis, ...]:
        """Where the batch is in each output tensor of the model, found by calling it with twice as many samples."""
        if self.whole is not None:
            return self.whole.batch_axes
        size, given = self.batch, self.task.calibration
        first, second = self.deployed(given[0]), self.deployed(given[-1])
        if _samples(given[0]) >= 2 * size:
            second = cast(Inputs, pytree.tree_map(lambda x: _rows(x, size, 2 * size), given[0]))

        def run(inputs: Inputs) -> Any:
            args, kwargs = as_call(cast(Inputs, copied(inputs)))
            with evaluating(self.task.model) as model, torch.no_grad():
                return model(*args, **kwargs)

        return find_axes(run, first, second, pytree.tree_map(_beside, first, second))

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """The example inputs in the order of the ONNX inputs."""
        values = flat_inputs(self.traced.graph, self.traced.args, self.traced.kwargs)
        return [v.detach().cpu().numpy() for v in values if isinstance(v, torch.Tensor)]

    def assemble(
        self, marked: onnx.ModelProto, variants: Mapping[str, Variant], **options: Any
    ) -> onnx.ModelProto:
        """`assemble` with this task's weights and ranges, which are computed at their first use.

        Raises UnsupportedVariant where a unit cannot become its variant.
        """
        for unit, variant in variants.items():
            if why := ineligible(self.network[unit], variant):
                raise UnsupportedVariant(f"unit {unit} cannot become {variant}: {why}")
        quantized = any(v.quantized for v in variants.values())
        ranges = self.ranges if quantized else {}
        return assemble(marked, variants, self.weights, ranges, int8_bits=self.int8_bits, **options)

    def onnx(
        self,
        variants: Mapping[str, Variant],
        *,
        quantize_outputs: bool = False,
        unsigned_concat: bool = False,
        avoid_fusions: bool = False,
        metadata: Mapping[str, str] | None = None,
        shared: bool = True,
    ) -> onnx.ModelProto:
        """The deployable network in one allocation; the options are those of `assemble`."""
        return self.assemble(
            self.marked,
            variants,
            quantize_outputs=quantize_outputs,
            unsigned_concat=unsigned_concat,
            avoid_fusions=avoid_fusions,
            metadata=metadata,
            shared=shared,
        )


def _shapes(call: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """Of all tensors in arguments, as a key."""
    leaves = pytree.tree_leaves((call[0], sorted(call[1].items())))
    return str([tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)])


def in_pieces(batches: Iterable[Inputs], largest: int) -> Iterator[Inputs]:
    """The same samples in equal parts of each batch, none above `largest`; what cannot be shared out is dropped."""
    for inputs in batches:
        count = _samples(inputs)
        if count <= largest:
            yield inputs
            continue
        least = -(-count // largest)
        parts = next((n for n in range(least, 2 * least) if count % n == 0), least)
        size = count // parts
        for start in range(0, count - size + 1, size):

            def piece(leaf: Any, start: int = start, size: int = size) -> Any:
                return _rows(leaf, start, start + size)

            yield cast(Inputs, pytree.tree_map(piece, inputs))


def _rows(leaf: Any, start: int, end: int) -> Any:
    return leaf[start:end] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf


def _beside(a: Any, b: Any) -> Any:
    """Two batches as one."""
    return torch.cat([a, b]) if isinstance(a, torch.Tensor) and a.dim() else a


def _samples(inputs: Inputs) -> int:
    """The batch size; 0 where the tensors do not agree on one."""
    sizes = {t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.dim()}
    return sizes.pop() if len(sizes) == 1 else 0


def with_batch(inputs: Inputs, batch: int | None) -> Inputs:
    """The same inputs repeated or cut along dimension 0 to a batch size."""
    if batch is None:
        return inputs
    if batch < 1:
        raise InvalidInput(f"batch must be at least 1, got {batch}")

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        return leaf.repeat(-(-batch // leaf.shape[0]), *([1] * (leaf.dim() - 1)))[:batch].contiguous()

    return cast(Inputs, pytree.tree_map(resize, inputs))


def _sorted(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    return call[0], dict(sorted(call[1].items()))


def check_calibration(task: Task) -> None:
    """Raises InvalidInput where a calibration batch is not of the form of example_inputs."""
    if not task.calibration:
        raise InvalidInput(
            "the task has no calibration batches; give at least one, of the form of example_inputs"
        )
    want, spec = pytree.tree_flatten(_sorted(as_call(task.example_inputs)))
    for index, inputs in enumerate(task.calibration):
        have, own = pytree.tree_flatten(_sorted(as_call(inputs)))
        if own != spec:
            raise InvalidInput(
                f"calibration batch {index} has another structure than example_inputs: {own} against {spec}"
            )
        for a, b in zip(have, want, strict=True):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                continue
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise InvalidInput(
                    f"calibration batch {index} has a tensor of shape {tuple(a.shape)}, {a.dtype}; example_inputs has "
                    f"{tuple(b.shape)}, {b.dtype}: every dimension but the first, and the type, must agree"
                )
            if a.is_floating_point() and not bool(torch.isfinite(a).all()):
                raise InvalidInput(f"calibration batch {index} holds NaN or infinity")

"""Run a traced network with units in their variants, in torch: what an allocation computes before it is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from hwsearch.compress.biases import fitted, on_steps, steps
from hwsearch.compress.formats import StoredWeight, quantized_activation, rounded, rounded_weight, stored
from hwsearch.compress.quantize import Key, Ranges, int8_scale
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.canonical import aten
from hwsearch.graph.narrow import Mask, summed_gates
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site
from hwsearch.network.variants import INT8_BITS, Variant, stored_once

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""(weight, bias) of a unit; no bias leaves its own."""
Replaced = Mapping[str, Pair]
"""What to run units with instead of their own, in the dense shapes."""


class Rounding:
    """How the units of a traced network compute in their variants, in torch.

    Half precisions are simulated by rounding a unit's inputs, weights and output, tf32 by rounding what it multiplies; the others
    by the same masks and Q/DQ that are deployed. weights: see `StoredWeights`; needed of units whose weights are not replaced,
    and of `int8_bits`, as replaced ones are rounded to.
    """

    def __init__(
        self,
        traced: Traced,
        weights: Mapping[tuple[str, Variant], StoredWeight],
        ranges: Ranges,
        *,
        quantize_outputs: bool = False,
        int8_bits: int = INT8_BITS,
    ) -> None:
        self.traced, self.weights, self.ranges = traced, weights, ranges
        self.quantize_outputs, self.int8_bits = quantize_outputs, int8_bits
        self.site: dict[str, tuple[str, int, Site]] = {
            site.node: (unit, index, site)
            for unit, calls in traced.sites.items()
            for index, site in enumerate(calls)
        }
        self.stored = {node: unit for unit, held in traced.stored.items() for node in held}

    def unit(self, node: fx.Node, variant: Variant, replaced: Pair | None, interpreter: fx.Interpreter) -> Any:
        """What a unit's call returns for the arguments that an interpreter holds."""
        unit, call, site = self.site[node.name]
        args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
        new: list[Any] = list(args)
        for port, position in enumerate(site.activations):
            new[position] = self.activation(args[position], (unit, call, f"in{port}"), variant)
        bias = replaced[1] if replaced is not None else None
        if site.weight is not None:
            new[site.weight], bias = self.weight(args[site.weight], unit, call, variant, replaced)
        if bias is not None:
            put_bias(node, new, kwargs, bias)
        result = self.product(node, site, new, kwargs)
        if variant.precision in ("bf16", "fp16"):
            return rounded(result, variant.precision)
        if variant.precision in ("int8", "fp8") and self.quantize_outputs:
            return self.activation(result, (unit, call, "out"), variant)
        return result

    def product(self, node: fx.Node, site: Site, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """What a call returns for what its variant multiplies."""
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def activation(self, x: torch.Tensor, key: Key, variant: Variant) -> torch.Tensor:
        """What a unit reads of an activation, or what is read of its output (port `out`)."""
        if not variant.quantized:
            return rounded(x, variant.precision)
        return quantized_activation(x, variant.precision, self.ranges[key], key[2], self.int8_bits)

    def weight(self, stored: torch.Tensor, unit: str, call: int, variant: Variant, replaced: Pair | None) -> Pair:
        """(weight, bias) that a call multiplies with and adds; no bias leaves the unit's own. stored: the weight that is there."""
        bias = replaced[1] if replaced is not None else None
        if variant.plain:
            return rounded(stored if replaced is None else replaced[0], variant.precision), bias
        weight = self._stored(unit, variant, replaced)
        if variant.precision == "int8":
            weight, bias = self._with_bias(weight, unit, call, bias)
        return rounded_weight(stored, weight), bias

    def constant(self, stored: torch.Tensor, unit: str, variant: Variant, replaced: Pair | None) -> torch.Tensor:
        """A stored tensor as others than layers read it; a tied weight stays whole for them where they cannot."""
        if self.traced.network[unit].tied and not stored_once(variant):
            return stored
        if variant.plain:
            return rounded(stored, variant.precision)
        weight = self._stored(unit, variant, replaced)
        if variant.precision == "int8":  # tied: with the scales that the layer's bias asks for
            weight, _ = self._with_bias(weight, unit, 0, None if replaced is None else replaced[1])
        return rounded_weight(stored, weight)

    def stored_weight(self, unit: str, call: int, variant: Variant) -> StoredWeight:
        """A unit's own weight as a variant that is not plain stores it, with the scales that its bias asks for."""
        weight = self._stored(unit, variant, None)
        return self._with_bias(weight, unit, call, None)[0] if variant.precision == "int8" else weight

    def _stored(self, unit: str, variant: Variant, replaced: Pair | None) -> StoredWeight:
        if replaced is None:
            return self.weights[unit, variant]
        return stored(replaced[0], self.traced.network[unit], variant, self.int8_bits)

    def _with_bias(
        self, weight: StoredWeight, unit: str, call: int, bias: torch.Tensor | None
    ) -> tuple[StoredWeight, torch.Tensor | None]:
        """An int8 weight and its bias (the unit's own unless given) as they are stored: on one grid."""
        bias = self.traced.bias(unit) if bias is None else bias
        assert weight.scales is not None
        if bias is None or tuple(bias.shape) != weight.scales.shape:
            return weight, bias
        activation = float(np.float32(int8_scale(self.ranges[unit, call, "in0"], "in0")))
        values = bias.detach().float().numpy()
        weight = fitted(weight, values, activation)
        return weight, torch.from_numpy(on_steps(values, steps(weight, activation))).to(bias.dtype)


class Simulator(Rounding):
    """The outputs of a network whose units are in given variants, for one batch.

    The dense run is kept, so that changing one unit recomputes only what comes after it. The options are those of `Rounding`.
    """

    def __init__(
        self,
        traced: Traced,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: Mapping[tuple[str, Variant], StoredWeight],
        ranges: Ranges,
        *,
        quantize_outputs: bool = False,
        int8_bits: int = INT8_BITS,
    ) -> None:
        super().__init__(traced, weights, ranges, quantize_outputs=quantize_outputs, int8_bits=int8_bits)
        self.order = list(traced.graph.graph.nodes)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            _Recorder(traced.graph, self.values).run(
                *flat_inputs(traced.graph, tuple(args), dict(kwargs)), enable_io_processing=False
            )
        self.dense = self.values[self.order[-1]]

    def __call__(
        self, variants: Mapping[str, Variant], weights: Replaced | None = None, mask: Mask | None = None
    ) -> Any:
        """Flat outputs with the named units in their variants and every other unit dense fp32.

        weights: those of units to replace, whatever their variant; zeros stand for what a narrower network does not have.
        mask: the slots that a narrower network has, for operators that sum over channels.
        """
        weights = weights or {}
        changed: dict[fx.Node, Any] = {}
        interpreter = fx.Interpreter(self.traced.graph)
        with torch.no_grad():
            for node in self.order:
                site = self.site.get(node.name)
                unit = site[0] if site is not None else self.stored.get(node.name, "")
                variant, replaced = variants.get(unit, Variant("fp32")), weights.get(unit)
                own = bool(unit) and (variant != Variant("fp32") or unit in weights)
                if own and site is None:
                    tensor = self.values[node] if replaced is None else replaced[0]
                    changed[node] = self.constant(tensor, unit, variant, replaced)
                    continue
                gates = None if mask is None else summed_gates(node, self.traced.channels, mask)
                if not own and gates is None and not any(i in changed for i in node.all_input_nodes):
                    continue
                interpreter.env = _Overlay(changed, self.values)
                if own:
                    changed[node] = self.unit(node, variant, replaced, interpreter)
                elif gates is not None:
                    args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
                    changed[node] = node.target(args[0] * gates, *args[1:], **kwargs)
                else:
                    changed[node] = interpreter.run_node(node)
        return changed.get(self.order[-1], self.dense)


def put_bias(node: fx.Node, args: list[Any], kwargs: dict[str, Any], bias: torch.Tensor) -> None:
    """Set what a unit's call adds."""
    if node.target is aten.addmm.default:
        args[0] = bias
    elif len(args) > 2:
        args[2] = bias
    else:
        kwargs["bias"] = bias


class _Overlay(dict[fx.Node, Any]):
    """Changed values over the dense ones, without a copy of either."""

    def __init__(self, changed: dict[fx.Node, Any], dense: dict[fx.Node, Any]) -> None:
        super().__init__()
        self.changed, self.dense = changed, dense

    def __getitem__(self, node: fx.Node) -> Any:
        return self.changed[node] if node in self.changed else self.dense[node]

    def __contains__(self, node: object) -> bool:
        return node in self.changed or node in self.dense


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value
        return value

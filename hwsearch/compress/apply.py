"""Run a traced network with units in their variants, in torch: what an allocation computes before it is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hwsearch.compress.quantize import Key, QuantizedWeight, fake_quantize
from hwsearch.trace import Site, Traced, flat_inputs
from hwsearch.variants import Variant

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Simulator:
    """The outputs of a network whose units are in given variants, for one batch.

    The dense run is kept, so that changing one unit recomputes only what comes after it. Half precisions are
    simulated by rounding a unit's inputs, weights and output; int8 by the same Q/DQ that is deployed.
    """

    def __init__(
        self,
        traced: Traced,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        weights: Mapping[str, QuantizedWeight],
        ranges: Mapping[Key, float],
        *,
        quantize_outputs: bool = False,
    ) -> None:
        self.traced, self.weights, self.ranges = traced, weights, ranges
        self.quantize_outputs = quantize_outputs
        self.site: dict[str, tuple[str, int, Site]] = {
            site.node: (unit, index, site)
            for unit, calls in traced.sites.items()
            for index, site in enumerate(calls)
        }
        self.order = list(traced.graph.graph.nodes)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            _Recorder(traced.graph, self.values).run(
                *flat_inputs(traced.graph, tuple(args), dict(kwargs)), enable_io_processing=False
            )
        self.dense = self.values[self.order[-1]]

    def __call__(self, variants: Mapping[str, Variant]) -> Any:
        """Flat outputs with the named units in their variants and every other unit dense fp32."""
        changed: dict[fx.Node, Any] = {}
        interpreter = fx.Interpreter(self.traced.graph)
        with torch.no_grad():
            for node in self.order:
                site = self.site.get(node.name)
                own = site is not None and site[0] in variants and variants[site[0]].precision != "fp32"
                if not own and not any(i in changed for i in node.all_input_nodes):
                    continue
                interpreter.env = _Overlay(changed, self.values)
                if own and site is not None:
                    changed[node] = self._unit(node, site, variants[site[0]], interpreter)
                else:
                    changed[node] = interpreter.run_node(node)
        return changed.get(self.order[-1], self.dense)

    def _unit(
        self, node: fx.Node, at: tuple[str, int, Site], variant: Variant, interpreter: fx.Interpreter
    ) -> Any:
        unit, call, site = at
        args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
        new: list[Any] = list(args)
        half = _HALF.get(variant.precision)
        for port, position in enumerate(site.activations):
            if half is not None:
                new[position] = args[position].to(half).to(args[position].dtype)
            else:
                new[position] = fake_quantize(args[position], self.ranges[unit, call, f"in{port}"])
        if site.weight is not None:
            if half is not None:
                new[site.weight] = args[site.weight].to(half).to(args[site.weight].dtype)
            else:
                new[site.weight] = torch.from_numpy(self.weights[unit].dequantized())
        result = node.target(*new, **kwargs)  # type: ignore[operator]
        if half is not None:
            return result.to(half).to(result.dtype)
        return fake_quantize(result, self.ranges[unit, call, "out"]) if self.quantize_outputs else result


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

"""The allocated network in torch, computing what is deployed, with gradients that pass its rounding (straight-through).

Int8 weights keep the grid that the refitted ones are on: a scale for each output channel that training does not change, so that the
network begins as what is deployed today, and what is deployed afterwards is on the same grid. Learned scales begin there with
the gradient of LSQ (Esser et al. 2020). Ranges of activations stay those of the start (Jacob et al. 2018, with ranges frozen).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hwsearch.compress.formats import StoredWeight, rounded, rounded_weight, stored
from hwsearch.compress.patterns import nm_mask
from hwsearch.compress.quantize import LEVELS, UNSIGNED_LEVELS, Key, int8_scale
from hwsearch.compress.simulate import Pair, Rounding, put_bias
from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.canonical import NORMS, Norm, is_get_attr, tensor_attr
from hwsearch.graph.channels import same
from hwsearch.graph.narrow import cut
from hwsearch.graph.trace import Traced
from hwsearch.graph.units import Site, bias_argument
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, int8_levels, stored_once
from hwsearch.recovery.gradients import Layer, Pruning

FLOAT = Variant("fp32")
CPU = torch.device("cpu")
SCALES = "|scales"
"""After the name of a unit, the place of the logarithms of what its scales are multiplied by."""
GAMMA, MEAN, VARIANCE = "|gamma", "|mean", "|variance"
"""After the name of a unit, the places of its BatchNorm's scale and running statistics."""
HELD_STEPS = 2.0**20
"""A channel whose bias is so many steps of its product or more keeps its scale, which the bias asks for (`compress.biases`)."""


class Student:
    """A network in one allocation with weights that can be trained.

    Args:
        lowering: The network at the allocation's widths, with the weights that training starts from.
        variants: Unit -> variant.
        quantize_outputs: As the backend wants it (`Backend.quantize_outputs`).
        pruning: Of gradients, in training; None for dense ones.
        learned: Whether the scales of int8 weights of layers are trained.
        device: That it is trained on.
        unfolded: Whether layers whose BatchNorm was folded in are trained with it, on the statistics of each batch.

    Attributes:
        tensors: Where the graph holds it -> what is trained, in the shapes of the narrow network; a tied tensor is there once.
            Where scales are learned, the logarithms of what they are multiplied by, too; and where BatchNorm is unfolded, its
            scales and running statistics, weights then being those before it, and biases its shifts.
        rounds: Whether units multiply with rounded weights; off, only activations are rounded.
    """

    def __init__(
        self,
        lowering: Lowering,
        variants: Mapping[str, Variant],
        *,
        quantize_outputs: bool = False,
        pruning: Pruning | None = None,
        learned: bool = False,
        device: torch.device = CPU,
        unfolded: bool = False,
    ) -> None:
        self.lowering, self.variants, self.quantize_outputs = lowering, dict(variants), quantize_outputs
        self.pruning, self.device = pruning, device
        self.ranges = lowering.ranges if any(v.quantized for v in variants.values()) else {}
        self.home = homes(lowering)
        self.tensors = {
            path: tensor_attr(lowering.traced.graph, path).detach().clone().to(device).requires_grad_()
            for path in dict.fromkeys(self.home.values())
        }
        self.rounds = True
        self.grids = {u: g for u, v in self.variants.items() if (g := self._grid(u, v)) is not None}
        self.held = {u: self._held(u, g) for u, g in self.grids.items() if learned and _layer(lowering, u)}
        self.tensors |= {u + SCALES: torch.zeros_like(self.grids[u]).requires_grad_() for u in self.held}
        self._runs: dict[int, _Run] = {}
        self.norms: dict[str, Norm] = {}
        self._folded = False
        if unfolded:
            self._unfold()

    def _grid(self, unit: str, variant: Variant) -> torch.Tensor | None:
        """The scales of an int8 weight as it is deployed, to multiply it with; None for what has no grid of its own."""
        if variant.precision not in ("int8", "w8") or not self.lowering.traced.network[unit].weight_shape:
            return None
        low = self.lowering
        rounding = Rounding(low.traced, low.weights, self.ranges, int8_bits=low.int8_bits)
        weight: StoredWeight = rounding.stored_weight(unit, 0, variant)
        assert weight.scales is not None
        scales = weight.broadcast_scales()
        whole = np.repeat(scales, weight.block, weight.axis) if weight.block else scales
        return torch.from_numpy(whole).to(self.device)

    def _unfold(self) -> None:
        """Undo the folding of BatchNorm, so that folding it again gives the weights and biases of now."""
        whole = self.lowering if self.lowering.whole is None else self.lowering.whole
        norms, mask = _norms(self.lowering), whole.traced.channels.mask(self.lowering.kept)
        for unit, (path, bias) in self.lowering.traced.paths.items():
            if path is None or bias is None or path not in norms or path not in self.home or bias not in self.home:
                continue
            norm: Norm = norms[path]
            axes = whole.traced.channels.tensors.get(bias, [])
            gamma, mean, variance = (cut(t, axes, mask).clone().to(self.device) for t in norm[:3])
            self.tensors |= {unit + GAMMA: gamma.requires_grad_(), unit + MEAN: mean, unit + VARIANCE: variance}
            self.norms[unit] = norm
            factor = self._factor(unit)
            with torch.no_grad():
                self.tensors[self.home[path]].div_(self._by_channel(unit, torch.where(factor == 0, 1.0, factor)))
                self.tensors[self.home[bias]].add_(mean * factor)
        if not self.norms:
            raise InvalidInput("the network has no BatchNorm that was folded into a layer; train it with batchnorm folded")

    def _factor(self, unit: str) -> torch.Tensor:
        """What folding multiplies the output channels of a weight with; without a gradient."""
        gamma, variance = (self.tensors[unit + what].detach() for what in (GAMMA, VARIANCE))
        return gamma / (variance + self.norms[unit].eps).sqrt()

    def _by_channel(self, unit: str, values: torch.Tensor) -> torch.Tensor:
        """In a shape that multiplies a weight along its output channels."""
        own = self.lowering.traced.network[unit]
        return values.reshape([-1 if d == own.out_axis else 1 for d in range(len(own.weight_shape))])

    def folded(self, unit: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, bias) of a layer with its BatchNorm, on running statistics, folded in."""
        weight, bias = (self.tensors[self.home[p]] for p in self.lowering.traced.paths[unit] if p is not None)
        if self._folded:
            return weight, bias
        factor = self._factor(unit)
        return weight * self._by_channel(unit, factor), bias - self.tensors[unit + MEAN] * factor

    def normalised(self, unit: str, y: torch.Tensor) -> torch.Tensor:
        """What a layer and its BatchNorm put out in training. y: what the layer puts out with its folded weight and no bias."""
        norm, bias = self.norms[unit], self.lowering.traced.paths[unit][1]
        if y.numel() == y.shape[1]:
            raise InvalidInput(f"{unit} has one value for each channel, which BatchNorm cannot train on; give larger batches")
        gamma, mean, variance = (self.tensors[unit + what] for what in (GAMMA, MEAN, VARIANCE))
        factor = self._factor(unit)
        own = y / torch.where(factor == 0, 1.0, factor).reshape([-1 if d == 1 else 1 for d in range(y.dim())])
        return F.batch_norm(own, mean, variance, gamma, self.tensors[self.home[str(bias)]], True, norm.momentum, norm.eps)

    def _held(self, unit: str, grid: torch.Tensor) -> torch.Tensor:
        """Which channels keep their scale."""
        path = self.lowering.traced.paths[unit][1]
        bias = None if path is None else self.tensor(path)
        if bias is None or self.variants[unit].precision != "int8" or bias.numel() != grid.numel():
            return torch.zeros_like(grid, dtype=torch.bool)
        step = grid.flatten() * float(np.float32(int8_scale(self.ranges[unit, 0, "in0"], "in0")))
        return (bias.detach().abs() >= HELD_STEPS * step).reshape(grid.shape)

    def scales(self, unit: str) -> torch.Tensor:
        """Of a unit that has a grid, to multiply its weight with; with a gradient where they are learned."""
        if unit not in self.held:
            return self.grids[unit]
        return self.grids[unit] * torch.where(self.held[unit], 0.0, self.tensors[unit + SCALES]).exp()

    def __call__(self, traced: Traced, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns. traced: of the narrow network, for inputs of these shapes, on the device."""
        if id(traced) not in self._runs:
            self._runs[id(traced)] = _Run(_Through(traced, self))
        return self._runs[id(traced)].outputs(args, kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Called as the model is, for `Task.evaluate`: the network as it is deployed."""
        traced = self.lowering.traced_for(_call(args, kwargs), "what evaluate gives")
        args, kwargs = moved((args, kwargs), self.device)
        with torch.no_grad(), self.deployed():
            return moved(self(traced, args, kwargs), CPU)

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """The network as it is deployed: weights are rounded."""
        before, self.rounds = self.rounds, True
        try:
            yield
        finally:
            self.rounds = before

    def tensor(self, path: str) -> torch.Tensor | None:
        """What is trained at a place of the graph; None for what is not."""
        home = self.home.get(path)
        return None if home is None else self.tensors[home]

    def weight_of(self, unit: str) -> torch.Tensor | None:
        """The unit's weight, where it is trained."""
        path = self.lowering.traced.paths[unit][0]
        return None if path is None else self.tensor(path)

    def rounded_weight(self, unit: str, weight: torch.Tensor, variant: Variant | None = None) -> torch.Tensor:
        """What a unit multiplies with where it stands for `weight`: on its grid, in its pattern. variant: instead of its own."""
        variant = self.variants.get(unit, FLOAT) if variant is None else variant
        if variant.plain:
            return rounded(weight, variant.precision)
        if unit in self.grids:
            with torch.no_grad():
                return self._on_grid(unit, weight, variant)
        held = stored(weight, self.lowering.traced.network[unit], variant, self.lowering.int8_bits)
        return rounded_weight(weight, held)

    def _on_grid(self, unit: str, weight: torch.Tensor, variant: Variant) -> torch.Tensor:
        """An int8 weight, with the gradient of LSQ: of the weight where it is not clipped, and of the scales."""
        own, grid, kept = weight, self.scales(unit), variant.kept
        if kept is not None:
            own = straight(own, lambda w: w * nm_mask(w, self.lowering.traced.network[unit].in_axis, *kept))
        levels = int8_levels(self.lowering.int8_bits if variant.precision == "int8" else 8)
        return straight((own / grid).clamp(-levels, levels), torch.round) * grid

    def learned_weight(self, unit: str, weight: torch.Tensor) -> torch.Tensor:
        """What a unit multiplies with, with gradients: straight through its rounding, and of its scales where these are learned."""
        if unit in self.held:
            return self._on_grid(unit, weight, self.variants[unit])
        return straight(weight, lambda w: self.rounded_weight(unit, w))

    def rounded_bias(self, unit: str, call: int, bias: torch.Tensor) -> torch.Tensor:
        """A bias of an int8 product, on the product's own steps (see `compress.biases`)."""
        grid = self.scales(unit).detach() if unit in self.grids else None
        if grid is None or self.variants[unit].precision != "int8" or grid.numel() != bias.numel() or bias.dim() != 1:
            return bias
        step = grid.flatten() * float(np.float32(int8_scale(self.ranges[unit, call, "in0"], "in0")))
        whole = torch.where(step > 0, step, 1.0)
        return torch.where(step > 0, (bias / whole).round() * step, bias)

    def answer(self) -> dict[str, torch.Tensor]:
        """What is deployed of what is trained: weights on their grids and in their patterns, biases on their steps."""
        found = {path: t.detach().clone() for path, t in self.tensors.items()}
        for unit in self.norms:
            places = (self.home[p] for p in self.lowering.traced.paths[unit] if p is not None)
            found |= {home: t.detach().clone() for home, t in zip(places, self.folded(unit), strict=True)}
        for unit, variant in self.variants.items():
            path, bias_path = self.lowering.traced.paths[unit]
            if variant.plain or path not in self.home or not _layer(self.lowering, unit):
                continue
            home = self.home[path]
            found[home] = self.rounded_weight(unit, found[home]).contiguous()
            if bias_path in self.home:
                own = self.home[bias_path]
                found[own] = self.rounded_bias(unit, 0, found[own])
        return found

    def everywhere(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same at every place of the graph that holds them: tied ones at several."""
        return {path: tensors[home] for path, home in self.home.items()}

    def put(self, tensors: Mapping[str, torch.Tensor], *, folded: bool = False) -> None:
        """Set what is trained. folded: to an answer, in which every BatchNorm is folded."""
        self._folded = folded
        with torch.no_grad():
            for path, value in tensors.items():
                self.tensors[path].copy_(value)


def homes(lowering: Lowering) -> dict[str, str]:
    """Every place of the graph that holds something to train -> the place that it goes by: the first of those that are tied.

    Trained are the weights and biases of layers (BatchNorm folded in) and the module's other parameters; not its buffers.
    """
    whole = lowering
    while whole.whole is not None:
        whole = whole.whole
    traced = whole.traced
    of_layers = {p for unit in traced.sites for p in traced.paths[unit] if p is not None}
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for node in traced.graph.graph.nodes:
        path = str(node.target)
        if not is_get_attr(node) or path in traced.channels.numbers:
            continue
        value = tensor_attr(traced.graph, path)
        if value.is_floating_point() and (path in of_layers or isinstance(value, torch.nn.Parameter)):
            found[path] = first.setdefault(same(value), path)
    return found


def has_norms(lowering: Lowering) -> bool:
    """Whether BatchNorm was folded into a layer, so that it can be unfolded."""
    return any(path in _norms(lowering) for path, _ in lowering.traced.paths.values())


def _norms(lowering: Lowering) -> Mapping[str | None, Norm]:
    """Where a weight is that BatchNorm was folded into -> that."""
    whole = lowering if lowering.whole is None else lowering.whole
    found: Mapping[str | None, Norm] = whole.traced.graph.meta.get(NORMS, {})
    return found


def _layer(lowering: Lowering, unit: str) -> bool:
    return unit in lowering.traced.sites


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Arguments as a task gives inputs. A model is called by position or by name."""
    return dict(kwargs) if kwargs and not args else args


class _StraightThrough(torch.autograd.Function):
    """`change(x)`, with the gradient of x itself wherever it is within reach (Bengio, Léonard and Courville 2013)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], low: float, high: float) -> torch.Tensor:
        ctx.inside = None
        if low > -np.inf or high < np.inf:
            ctx.inside = (x >= low) & (x <= high)
        return change(x.detach()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return (gradient if ctx.inside is None else gradient * ctx.inside), None, None, None


def straight(
    x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], low: float = -np.inf, high: float = np.inf
) -> torch.Tensor:
    """`change(x)` with the gradient of x between `low` and `high`, and none beyond, where it is clipped."""
    found: torch.Tensor = _StraightThrough.apply(x, change, low, high)  # type: ignore[no-untyped-call]
    return found


class _Through(Rounding):
    """The rounding of one traced graph, with gradients."""

    def __init__(self, traced: Traced, student: Student) -> None:
        super().__init__(
            traced, {}, student.ranges, quantize_outputs=student.quantize_outputs, int8_bits=student.lowering.int8_bits
        )
        self.student = student

    def activation(self, x: torch.Tensor, key: Key, variant: Variant) -> torch.Tensor:
        if variant.precision == "fp32" or variant.weight_only:
            return x
        low, high = self._reach(key, variant)

        def change(value: torch.Tensor) -> torch.Tensor:
            return Rounding.activation(self, value, key, variant)

        return straight(x, change, low, high)

    def _reach(self, key: Key, variant: Variant) -> tuple[float, float]:
        if not variant.quantized:
            return -np.inf, np.inf
        of = self.ranges[key]
        if variant.precision != "int8":
            return -of.top, of.top
        step = int8_scale(of, key[2], self.int8_bits)
        return (0.0 if of.unsigned else -(LEVELS + 1.5) * step), ((UNSIGNED_LEVELS if of.unsigned else LEVELS) + 0.5) * step

    def weight(self, stored: torch.Tensor, unit: str, call: int, variant: Variant, replaced: Pair | None) -> Pair:
        bias_path = self.traced.paths[unit][1]
        bias = None if bias_path is None else self.student.tensor(bias_path)
        if unit in self.student.norms:
            stored, bias = self.student.folded(unit)
            if torch.is_grad_enabled():  # in training BatchNorm comes after the product, and its shift is the bias
                return (self.student.learned_weight(unit, stored) if self.student.rounds else stored), torch.zeros_like(bias)
        if not self.student.rounds:
            return stored, bias
        if bias is not None and variant.precision == "int8":
            bias = straight(bias, lambda b: self.student.rounded_bias(unit, call, b))
        return self.student.learned_weight(unit, stored), bias

    def product(self, node: fx.Node, site: Site, args: list[Any], kwargs: dict[str, Any]) -> Any:
        unit, result = self.site[node.name][0], self._product(node, site, args, kwargs)
        return self.student.normalised(unit, result) if unit in self.student.norms and torch.is_grad_enabled() else result

    def _product(self, node: fx.Node, site: Site, args: list[Any], kwargs: dict[str, Any]) -> Any:
        pruning, unit = self.student.pruning, self.site[node.name][0]
        if pruning is None or site.weight is None or not torch.is_grad_enabled():
            return super().product(node, site, args, kwargs)
        (activation,), own = site.activations, self.traced.network[unit]
        bias = bias_argument(node, args, kwargs)

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            new, named = list(args), dict(kwargs)
            new[activation], new[site.weight] = x, weight  # type: ignore[index]
            if bias is not None:
                put_bias(node, new, named, bias)
            found: torch.Tensor = node.target(*new, **named)  # type: ignore[operator]
            return found

        layer = Layer(call, int(dict(own.attributes).get("groups", "1")), own.out_axis)
        return pruning.product(layer, args[activation], args[site.weight], bias, self._whole(unit))

    def _whole(self, unit: str) -> torch.Tensor | None:
        """A weight as its unit rounds it, without the pattern that the unit gives it; None where there is no such pattern."""
        variant = self.student.variants.get(unit, FLOAT)
        master = self.student.folded(unit)[0] if unit in self.student.norms else self.student.weight_of(unit)
        if variant.kept is None or master is None or not self.student.rounds:
            return None
        return self.student.rounded_weight(unit, master.detach(), Variant(variant.precision))

    def constant(self, stored: torch.Tensor, unit: str, variant: Variant, replaced: Pair | None) -> torch.Tensor:
        whole = self.traced.network[unit].tied and not stored_once(variant)
        if whole or not self.student.rounds:
            return stored
        return self.student.learned_weight(unit, stored)


def moved(values: Any, device: torch.device) -> Any:
    """The same with its tensors on a device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, values)


class OnDevice(fx.Interpreter):
    """Runs a traced network on a device, whatever device it was traced on."""

    def __init__(self, traced: Traced, device: torch.device) -> None:
        super().__init__(traced.graph)
        self.traced, self.device = traced, device
        self._held: dict[str, Any] = {}

    def outputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns."""
        flat = self.run(*flat_inputs(self.traced.graph, tuple(args), dict(kwargs)), enable_io_processing=False)
        self.env = {}
        leaves, spec = pytree.tree_flatten(self.traced.outputs)
        found = iter(pytree.tree_leaves(flat))
        return pytree.tree_unflatten([next(found) if isinstance(y, torch.Tensor) else y for y in leaves], spec)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self._held:
            self._held[target] = moved(super().get_attr(target, args, kwargs), self.device)
        return self._held[target]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def here(value: Any) -> Any:
            return self.device if isinstance(value, torch.device) else value

        return super().call_function(target, tuple(map(here, args)), {name: here(value) for name, value in kwargs.items()})


class _Run(OnDevice):
    """Runs a graph on what is trained, units in their variants."""

    def __init__(self, rounding: _Through) -> None:
        super().__init__(rounding.traced, rounding.student.device)
        self.rounding, self.student = rounding, rounding.student

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self.student.tensor(str(target))
        return super().get_attr(target, args, kwargs) if own is None else own

    def run_node(self, n: fx.Node) -> Any:
        site = self.rounding.site.get(n.name)
        unit = site[0] if site is not None else self.rounding.stored.get(n.name, "")
        variant = self.student.variants.get(unit, FLOAT)
        plain = variant == FLOAT and self.student.pruning is None and unit not in self.student.norms
        if not unit or plain or (variant == FLOAT and site is None):
            return super().run_node(n)
        if site is not None:
            return self.rounding.unit(n, variant, None, self)
        return self.rounding.constant(super().run_node(n), unit, variant, None)

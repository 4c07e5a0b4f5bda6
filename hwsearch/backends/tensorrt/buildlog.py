"""What a TensorRT builder's own log says of an engine: which layers were fused and in which types, and which ran sparse.

The list of layers is what tensorrt_rtx 1.7 logs with detailed profiling verbosity ("Layers:"). The lines on sparsity are
those of TensorRT 8 ("Layers eligible for sparse math") and of later ones ("Found 2 layer(s) eligible to use sparse
tactics"), as users' logs show them (NVIDIA/TensorRT, issues 1403, 2169, 4056); TensorRT-RTX logs none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hwsearch.backends.nodenames import unit_of

PRECISION_OF = {
    "Float": "fp32",
    "Half": "fp16",
    "BFloat16": "bf16",
    "Int8": "int8",
    "FP8": "fp8",
    "Int4": "int4",
    "FP4E2M1": "nvfp4",
}
"""TensorRT's words for types, and hwsearch's."""

PRODUCT = re.compile(r"\|(Conv|ConvTranspose|Gemm|MatMul|Einsum)(\.\d+)?$")
"""Names of our ONNX nodes that are a unit's product."""
_FOUR_BITS = ("int4", "nvfp4")
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>| \{.*?\})\], "
    r"(?:Constants: \[(?P<constants>| \{.*?\})\], )?Outputs: \[(?P<outputs>| \{.*?\})\](?P<rest>.*)$"
)
_OPERAND = re.compile(r"Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_SOURCE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)")
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (\d+) layer\(s\) eligible to use sparse tactics|Layers eligible for sparse math)(.*)",
    re.S,
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:Chose (\d+) (?:layer|kernel)\(s\) using sparse tactics"
    r"|TRT inference plan picked sparse implementation for layers)(.*)",
    re.S,
)


@dataclass(frozen=True)
class Operand:
    """A tensor that a layer reads or writes; `precision` is TensorRT's own word where hwsearch has none."""

    precision: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FusedLayer:
    """One layer of an engine. `sources` are the names of the ONNX nodes that it was made from, `kind` the builder's word."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    sources: tuple[str, ...]

    @property
    def units(self) -> tuple[str, ...]:
        """Units whose own work is in it, in the order of its sources."""
        found = [unit_of(source) for source in self.sources]
        return tuple(dict.fromkeys(unit for unit, own in found if own))

    @property
    def products(self) -> tuple[str, ...]:
        """Units whose product (convolution or matrix product) is in it."""
        return tuple(
            dict.fromkeys(unit_of(s)[0] for s in self.sources if PRODUCT.search(s) and unit_of(s)[1])
        )

    @property
    def precision(self) -> str:
        """What it computes in: the type of its weights, else of what it reads first.

        Of what it reads a cast may be part of the layer; its weights stand in the type that is multiplied.
        """
        weights = [o for o in self.constants if len(o.shape) > 1 and math.prod(o.shape) > 1]
        # four bits come with scales in fp8, whose padded tensor may be the larger one
        largest = sorted(weights, key=lambda o: (o.precision not in _FOUR_BITS, -math.prod(o.shape)))
        return next((o.precision for o in (*largest, *self.inputs, *self.constants)), "")


@dataclass(frozen=True)
class Sparsity:
    """How many layers a builder could run sparse (2:4), how many it did, and which, where the log names them.

    Eligible is not picked: the builder times both and keeps the faster.
    """

    eligible: int
    picked: int
    eligible_layers: tuple[str, ...] = ()
    picked_layers: tuple[str, ...] = ()


def fused_layers(log: Iterable[str]) -> tuple[FusedLayer, ...]:
    """The layers of the engine in a builder's log; empty where the log lists none."""
    found = []
    for line in log:
        _, heading, listing = line.partition("Layers:\n")
        if heading:
            found = [_layer(match) for text in listing.splitlines() if (match := _LAYER.match(text))]
    return tuple(found)


def _layer(match: re.Match[str]) -> FusedLayer:
    inputs, constants, outputs = (_operands(match[g] or "") for g in ("inputs", "constants", "outputs"))
    sources = tuple(_SOURCE.findall(match["rest"]))
    return FusedLayer(match["name"], match["kind"], inputs, constants, outputs, sources)


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(
            PRECISION_OF.get(m["type"], m["type"]), tuple(int(n) for n in re.findall(r"-?\d+", m["shape"]))
        )
        for part in text.split("{ Name: ")
        if (m := _OPERAND.search(part))
    )


def executed(layers: Iterable[FusedLayer]) -> dict[str, str]:
    """For each unit whose product some layer computes, the precision of that layer.

    Where several layers share a product (a convolution and what rescales its result), the first that is no generated
    elementwise kernel has the last word.
    """
    found: dict[str, tuple[bool, str]] = {}
    for layer in layers:
        plain = layer.kind == "kgen"
        for unit in layer.products:
            if unit not in found or (found[unit][0] and not plain):
                found[unit] = plain, layer.precision
    return {unit: precision for unit, (_, precision) in found.items()}


def sparsity(log: Iterable[str]) -> Sparsity | None:
    """What the log says of sparse layers; None where it does not mention them (TensorRT-RTX, or no flag)."""
    eligible = picked = None
    for line in log:
        if match := _ELIGIBLE.search(line):
            eligible = _named(match)
        elif match := _PICKED.search(line):
            picked = _named(match)
    if eligible is None:
        return None
    chosen = picked or (0, ())
    return Sparsity(eligible[0], chosen[0], eligible[1], chosen[1])


def _named(match: re.Match[str]) -> tuple[int, tuple[str, ...]]:
    names = tuple(n.strip() for n in match[2].lstrip(": \n").split(",") if n.strip())
    return int(match[1]) if match[1] is not None else len(names), names

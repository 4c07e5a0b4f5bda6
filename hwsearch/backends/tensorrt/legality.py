"""Which precisions and patterns an NVIDIA GPU executes, by its compute capability, and why not the others.

What a unit can become on any device is `hwsearch.network.variants.ineligible`'s to say. Sources: TensorRT's and TensorRT-RTX's
support matrices ("GPU Architecture and Precision Support"), TensorRT's chapter on structured sparsity (2:4, from Ampere on). What
NVIDIA's builder itself says is read from a build (`hwsearch.deployment.targets`); where the two differ, that is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hwsearch.errors import InvalidInput

RTX = "tensorrt-rtx"
BASES = ("fp16", "bf16", "fp32", "tf32")
"""Base precisions of a network, the one to prefer first."""


@dataclass(frozen=True)
class Target:
    """A GPU architecture: `sm86`, its compute capability, NVIDIA's name for it and a device."""

    name: str
    capability: tuple[int, int]
    architecture: str
    example: str

    @property
    def number(self) -> str:
        return f"{self.capability[0]}.{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.example})"


TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("sm75", (7, 5), "Turing", "T4"),
        Target("sm80", (8, 0), "Ampere", "A100"),
        Target("sm86", (8, 6), "Ampere", "RTX 3090"),
        Target("sm87", (8, 7), "Ampere", "Jetson Orin"),
        Target("sm89", (8, 9), "Ada Lovelace", "RTX 4090"),
        Target("sm90", (9, 0), "Hopper", "H100"),
        Target("sm100", (10, 0), "Blackwell", "B200"),
        Target("sm120", (12, 0), "Blackwell", "RTX 5090"),
        Target("sm121", (12, 1), "Blackwell", "GB10"),
    )
}

SINCE = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "int8": (7, 5),
    "bf16": (8, 0),
    "tf32": (8, 0),
    "int4": (8, 0),
    "fp8": (8, 9),
    "nvfp4": (10, 0),
}
"""The least compute capability that TensorRT offers a precision on."""
_SINCE_NAMES = {(7, 5): "Turing", (8, 0): "Ampere", (8, 9): "Ada Lovelace", (10, 0): "Blackwell"}
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""GPUs that TensorRT for RTX compiles for: its `ComputeCapability`, of version 1.7. Others load none of its engines."""
_PRODUCTS = ("linear", "matmul")
_SPARSE_SINCE = (8, 0)


def target(name: str) -> Target:
    """Raises InvalidInput where there is no such target."""
    found = TARGETS.get(name.strip().lower().replace("sm_", "sm"))
    if found is None:
        raise InvalidInput(f"unknown target {name!r}; expected one of {', '.join(TARGETS)}")
    return found


def why_not(
    precision: str, gpu: Target, *, base: str, op: str = "linear", pattern: str = "dense", runtime: str = RTX
) -> str:  # fmt: skip
    """Why a unit may not have a variant in a network of some base on a GPU; empty where it may. op: the unit's."""
    if runtime == RTX and gpu.name not in RTX_TARGETS:
        known = ", ".join(TARGETS[name].number for name in RTX_TARGETS)
        return f"TensorRT for RTX has no compute capability {gpu.number}, only {known}"
    for kind in (base, precision):
        if kind not in SINCE:
            return f"{kind} is no precision of TensorRT's that is known here"
        if gpu.capability < SINCE[kind]:
            since = SINCE[kind]
            name = f" ({_SINCE_NAMES[since]})" if since in _SINCE_NAMES else ""
            what = f"base {kind}" if kind == base and kind != precision else kind
            return f"{what} needs compute capability {since[0]}.{since[1]}{name}, {gpu.name} has {gpu.number}"
    if pattern != "dense" and gpu.capability < _SPARSE_SINCE:
        return f"{pattern} needs compute capability 8.0 (Ampere), {gpu.name} has {gpu.number}"
    return _why_not_rtx(precision, gpu, base, op) if runtime == RTX else ""


def _why_not_rtx(precision: str, gpu: Target, base: str, op: str) -> str:
    """TensorRT-RTX compiles no matrix product of fp32 for Turing, nor one that returns it (its matrix has a footnote there)."""
    floats = precision if precision in BASES else base
    if gpu.name == "sm75" and op in _PRODUCTS and floats in ("fp32", "tf32"):
        return "TensorRT-RTX compiles no fp32 matrix product for Turing"
    return ""

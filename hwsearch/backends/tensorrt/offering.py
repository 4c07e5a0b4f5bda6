"""What a GPU executes, by its compute capability.

Source: TensorRT's support matrix ("Hardware and Precision"). What is offered here is only what may be asked for: the precision
that each unit executed in is read back from every engine.
"""

from __future__ import annotations

Capability = tuple[int, int]

OLDEST: Capability = (7, 5)
"""Turing: TensorRT 10.x and 11.x run on nothing older that this project could name."""


def bases(capability: Capability) -> tuple[str, ...]:
    """Base precisions, the one to prefer first: fp16, bf16 from Ampere on, fp32."""
    return ("fp16", "bf16", "fp32") if capability >= (8, 0) else ("fp16", "fp32")


def precisions(capability: Capability, base: str) -> tuple[str, ...]:
    """Precisions that variants may ask for under a base, the base first: int8 from Turing on."""
    return (base, "int8") if capability >= OLDEST else (base,)

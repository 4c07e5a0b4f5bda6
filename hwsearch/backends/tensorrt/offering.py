"""What a backend offers on the GPU that it runs on: what `legality` allows there, in the order in which to prefer it.

Whether a unit then *executed* as asked is read back from every engine.
"""

from __future__ import annotations

from hwsearch.backends.tensorrt.legality import BASES, Target, why_not
from hwsearch.variants import PRECISIONS, Variant

_QUANTIZED = ("int8", "fp8", "int4", "nvfp4")


def bases(capability: tuple[int, int], runtime: str) -> tuple[str, ...]:
    """Base precisions, the one to prefer first."""
    at = _here(capability)
    return tuple(b for b in BASES if b in PRECISIONS and not why_not(b, at, base=b, runtime=runtime))


def variants(capability: tuple[int, int], runtime: str, base: str) -> tuple[Variant, ...]:
    """What units may ask for under a base, the base first."""
    at = _here(capability)
    allowed = [p for p in _QUANTIZED if not why_not(p, at, base=base, runtime=runtime)]
    return Variant(base), *map(Variant, allowed)


def _here(capability: tuple[int, int]) -> Target:
    return Target("sm{}{}".format(*capability), capability, "", "this GPU")

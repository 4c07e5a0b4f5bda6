"""What a backend offers on the GPU that it runs on: what `legality` allows there, in the order in which to prefer it.

Which units can become it is `hwsearch.network.variants.legal`'s to say; whether one then *executed* as asked is read back from
every engine.
"""

from __future__ import annotations

from hwsearch.backends.tensorrt.legality import BASES, RTX, Target, why_not
from hwsearch.network.variants import SPARSE_PRECISIONS, Variant

_QUANTIZED = ("int8", "fp8", "int4", "nvfp4")
_SPARSE = "2:4"


def bases(capability: tuple[int, int], runtime: str) -> tuple[str, ...]:
    """Base precisions, the one to prefer first."""
    gpu = _here(capability)
    return tuple(b for b in BASES if not why_not(b, gpu, base=b, runtime=runtime))


def why_none(capability: tuple[int, int], runtime: str) -> str:
    """Why there is no base precision at all."""
    gpu = _here(capability)
    return why_not(BASES[0], gpu, base=BASES[0], runtime=runtime)


def variants(capability: tuple[int, int], runtime: str, base: str) -> tuple[Variant, ...]:
    """What units may ask for under a base: the base, dense quantized ones, and 2:4 in what sparse tensor cores take.

    TensorRT for RTX uses no zeros (its `SPARSE_WEIGHTS` has no effect), so that it offers no 2:4.
    """
    gpu = _here(capability)
    patterned = () if runtime == RTX else (p for p in (base, *_QUANTIZED) if p in SPARSE_PRECISIONS)
    asked = [*map(Variant, _QUANTIZED), *(Variant(p, _SPARSE) for p in patterned)]
    return Variant(base), *(
        v for v in asked if not why_not(v.precision, gpu, base=base, pattern=v.pattern, runtime=runtime)
    )


def _here(capability: tuple[int, int]) -> Target:
    return Target("sm{}{}".format(*capability), capability, "", "this GPU")

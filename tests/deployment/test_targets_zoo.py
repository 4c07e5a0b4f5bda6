"""The two large networks of the zoo, where they have been fetched, in NVIDIA's builder; `test_targets.py` has the rest."""

from __future__ import annotations

import random
from functools import cache

import pytest

from hwsearch.backends.tensorrt.builder import serialise
from hwsearch.backends.typed import strongly_typed
from hwsearch.deployment.targets import objections, request_of, runtime, units_offered, verdicts
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant
from hwsearch.zoo import load

pytest.importorskip("tensorrt_rtx")

LARGE = ("minilm", "efficientnet_lite0")

pytestmark = pytest.mark.slow
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
LACKING = {
    "sm75": {"dense.bf16", "dense.fp8", "dense.int4", "dense.nvfp4"},
    "sm80": {"dense.fp8", "2:4.fp8", "dense.nvfp4"},
    "sm86": {"dense.fp8", "2:4.fp8", "dense.nvfp4"},
    "sm89": {"dense.nvfp4"},
    "sm120": set[str](),
}
"""What each target has no type for."""


@cache
def lowered(name: str) -> Lowering:
    try:
        return Lowering(load(name), method="minmax")  # the quickest ranges: only types matter here
    except InvalidInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LARGE)
def test_every_variant(name: str, target: str) -> None:
    found = list(verdicts(runtime("tensorrt-rtx"), lowered(name), [target], "fp16"))
    assert all(v.explained for v in found)
    assert all(v.layers for v in found if v.legal)
    refused = {v.variant for v in found if not v.legal}
    assert refused >= LACKING[target] if target == "sm75" else refused == LACKING[target]


def some(low: Lowering, base: str, seed: int) -> dict[str, Variant]:
    """Each unit in a random variant of those that some GPU executes."""
    choices, rng = units_offered(low.network, base), random.Random(seed)
    return {
        u.name: rng.choice([v for v, units in choices.items() if u in units] or [Variant(base)])
        for u in low.network.units
    }


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
@pytest.mark.parametrize("name", LARGE)
def test_mixed_allocations(name: str, seed: int) -> None:
    low, trt = lowered(name), runtime("tensorrt-rtx")
    base = ("fp16", "bf16", "fp32")[seed % 3]
    for old in ("nvfp4", "fp8", "bf16"):  # as a GPU without them would have it, so that more targets build it
        variants = some(low, base, seed)
        if old != "nvfp4":
            kept = {"fp8": ("nvfp4", "fp8"), "bf16": ("nvfp4", "fp8", "bf16", "int4", "fp32", "tf32")}[old]
            variants = {u: v if v.precision not in kept else Variant("fp16") for u, v in variants.items()}
        typed = strongly_typed(low.onnx(variants), base).SerializeToString()
        built = set()
        for target in TARGETS:
            documented = objections(low.network, variants, base, target)
            refused = ""
            try:
                serialise(trt, request_of(typed, base, target, variants))
                built.add(target)
            except BackendUnavailable as error:
                refused = str(error)
            assert bool(refused) == bool(documented), (
                f"{target}: {refused or 'built'}; documented: {documented}"
            )
        assert "sm120" in built
        assert len(built) >= {"nvfp4": 1, "fp8": 4, "bf16": 4}[old]

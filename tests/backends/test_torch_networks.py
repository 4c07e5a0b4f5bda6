"""Whole networks as backend `torch` runs them, on the CPU, against ONNX Runtime on the same ONNX.

Plain networks agree up to rounding of fp32. In quantized ones such a rounding may put a number on the other side of a tie, and that
is a step of int8 or fp8 from there on; so those are compared as a whole (root mean square), and far below what quantizing costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from architectures import BLOCKS, convolutional, transformer
from networks import NETWORKS

import hwsearch as hs
from hwsearch.backends.torch.offering import Kernels
from hwsearch.backends.torch.products import RULES
from hwsearch.backends.torch.program import OnnxProgram
from hwsearch.backends.typed import strongly_typed
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, legal, uniform
from hwsearch.testing.contract import TOLERANCE, expected, mixed, small_network, wherever
from tests.backends.fake_cuda import Products
from tests.backends.torch_programs import FLOATS, ON_CPU, Arrays, by_onnxruntime, error, program, run

EXACT, ROUNDED, DEEP = 5e-6, 2e-2, 7e-2
"""Largest error of a plain network; root mean square error of a quantized one, and of one of dozens of layers. All are relative."""
ZOO = ("fashion_resnet", "efficientnet_lite0", "minilm")
QUICK = (
    "convnext",
    "gpt_block",
    "lstm",
    "gru",
    "mobilenet_v3",
    "padding_modes",
    "transformer_masked",
    "unet",
    "wide_reshapes",
)


def lowering(model: Any, inputs: Any, name: str) -> Lowering:
    return Lowering(hs.Task(model.eval(), inputs, [inputs], lambda predict: 0.0, name))


def asked(low: Lowering, seed: int = 0) -> dict[str, Variant]:
    """For each unit a variant of those that a GPU may offer."""
    rng = np.random.default_rng(seed)
    options = [Variant("fp32"), Variant("int8"), Variant("fp8"), Variant("int8", "2:4")]
    chosen = {}
    for unit in low.network.units:
        can = legal(unit, options)
        chosen[unit.name] = can[int(rng.integers(len(can)))]
    return chosen


def off(got: Arrays, want: Arrays) -> float:
    """Root mean square error relative to the root mean square, of all outputs of numbers."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    pairs = [
        (a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in zip(got, want, strict=True)
    ]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return float(np.sqrt(np.square(a - b).sum() / np.square(b).sum()))


def check(
    low: Lowering, variants: dict[str, Variant], there: Kernels = FLOATS, rounded: float = ROUNDED
) -> OnnxProgram:
    model = strongly_typed(low.onnx(variants), "fp32")
    made, arrays = program(model, there), low.arrays()
    got, want = run(made, arrays), by_onnxruntime(model, arrays)
    if all(v == Variant("fp32") for v in variants.values()):
        assert error(got, want) <= EXACT
    else:
        assert off(got, want) <= rounded
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NETWORKS]
)
def test_networks(name: str) -> None:
    low = lowering(*NETWORKS[name](), name)
    for there in (FLOATS, ON_CPU):
        for variants in (uniform(low.network, "fp32"), uniform(low.network, "int8"), asked(low)):
            check(low, variants, there)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 6))])
def test_random_stacks_of_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [str(k) for k in rng.choice(sorted(BLOCKS), 3)]
    model, x = convolutional(kinds, [8, 16, 8, 16], ["pool", "flatten", "image", "two"][seed % 4], seed)
    low = lowering(model, x, "-".join(kinds))
    for variants in (uniform(low.network, "fp32"), asked(low, seed)):
        check(low, variants, ON_CPU)


@pytest.mark.parametrize("seed", range(3))
def test_random_transformers(seed: int) -> None:
    kind, mlp, stem, norm = [("fused", "gelu", "tokens", "layer"), ("norm rope", "swiglu", "image", "rms"),
                             ("repeat bias", "gelu", "masked", "layer")][seed]  # fmt: skip
    model, inputs = transformer(4, 2 if "repeat" in kind else 4, kind, 16, mlp, stem, norm, seed)
    low = lowering(model, inputs, kind)
    for variants in (uniform(low.network, "fp32"), uniform(low.network, "int8"), asked(low, seed)):
        check(low, variants, ON_CPU)


@pytest.mark.parametrize("base", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("network", ["residual", "attention", "two_inputs"])
def test_bases(network: str, base: str, products: Products) -> None:
    """Every variant that a GPU is offered, in every base, against the simulation in torch; kernels keep CUDA's rules."""
    low, there = small_network(network), Kernels(int8=True, fp8=True, sparse=True)
    variants = [Variant(base), Variant("int8"), Variant("fp8"), Variant("int8", "2:4")]
    variants += [Variant(base, "2:4")] if base in ("fp16", "bf16") else []
    for variant in variants:
        for chosen in (wherever(low, base, variant), mixed(low, base, variant)):
            made = program(strongly_typed(low.onnx(chosen), base), there, base)
            got = run(made, low.arrays())
            backend = type("Backend", (), {"quantize_outputs": False})()
            want = expected(low, chosen, backend)
            assert error(got, want) <= max(TOLERANCE[base], TOLERANCE[variant.precision]), (
                str(variant),
                base,
            )
            assert {s.precision for s in made.steps if s.op in ("Conv", "MatMul", "Gemm")} <= {base, *RULES}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "fashion_resnet" else ()) for n in ZOO]
)
def test_zoo(name: str) -> None:
    from zoo.test_zoo import fetched

    low = _of_zoo(fetched(name))
    check(low, uniform(low.network, "fp32"))
    made = check(low, uniform(low.network, "int8"), ON_CPU, DEEP)
    executed = {s.name: s.precision for s in made.steps if s.op in ("Conv", "MatMul", "Gemm")}
    assert ("int8" in executed.values()) == (name != "fashion_resnet")
    check(low, asked(low), ON_CPU, DEEP)


def _of_zoo(task: hs.Task) -> Lowering:
    """One calibration batch is enough here: what is compared computes with the same ranges."""
    return Lowering(hs.Task(task.model, task.example_inputs, task.calibration[:1], task.evaluate, task.name))

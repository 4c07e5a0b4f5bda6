"""A device that sums int8 products in 16 bits is found out, and with weights of 7 bits it computes what was simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import leaves
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import hwsearch as hs
from hwsearch.allocate.search import search
from hwsearch.backends.base import Array, Backend, BuildOptions, qdq_form
from hwsearch.backends.exactness import OFF, int8_bits, probe, sum_error
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.compress.formats import stored
from hwsearch.compress.quantize import Range, int8_scale
from hwsearch.deployment.deploy import of_allocation
from hwsearch.engine.setup import Setup
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.loss.divergence import divergence
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.network import Unit
from hwsearch.network.variants import Variant, int8_levels, uniform
from hwsearch.testing import BackendContract, SimulatedBackend
from hwsearch.zoo import fashion_resnet

BACKENDS = [ONNXRuntimeBackend(), OpenVINOBackend()]
BITS = [8, 7]


class PairsIn16Bits:
    """A backend of somebody else, which says nothing of its sums: those of two products beyond 16 bits are wrong.

    most: the largest weight of which they are right.
    """

    quantize_outputs = False
    name = "pairs"

    def __init__(self, most: int) -> None:
        self.most, self.builds = most, 0

    def versions(self) -> Mapping[str, str]:
        return {"pairs": f"{self.most}"}

    def bases(self) -> tuple[str, ...]:
        return ("fp32",)

    def variants(self, base: str) -> tuple[Variant, ...]:
        return Variant(base), Variant("int8")

    def build(self, onnx_bytes: bytes, options: BuildOptions) -> Any:
        self.builds += 1
        model = onnx.load_model_from_string(onnx_bytes)
        model.opset_import[0].version = 19  # onnx.reference knows DequantizeLinear from there on
        weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("/int8")]
        saturates = max(int(np.abs(w.astype(int)).max()) for w in weights) > self.most

        def engine(*arrays: Array) -> list[Any]:
            feed = dict(zip([v.name for v in model.graph.input], arrays, strict=True))
            found = ReferenceEvaluator(model).run(None, feed)
            return [y * 0.5 if saturates else y for y in found]

        return engine


@pytest.mark.parametrize(("most", "bits"), [(127, 8), (64, 7), (63, 7)])
def test_a_backend_that_says_nothing_is_probed_once(most: int, bits: int) -> None:
    backend = PairsIn16Bits(most)
    assert isinstance(backend, Backend)
    assert int8_bits(backend, BuildOptions()) == bits
    builds = backend.builds
    assert int8_bits(PairsIn16Bits(most), BuildOptions()) == bits
    assert backend.builds == builds == (1 if bits == 8 else 2)
    assert int8_bits(backend, BuildOptions(2)) == bits  # another thread setting is another probe
    assert backend.builds > builds


def test_what_a_backend_says_is_believed_and_the_contract_checks_it() -> None:
    backend = PairsIn16Bits(63)
    check = BackendContract().test_int8_products_are_summed_exactly
    check(backend)
    backend.int8_bits = 8  # type: ignore[attr-defined]
    assert int8_bits(backend, BuildOptions()) == 8
    with pytest.raises(AssertionError, match="8-bit weights are off"):
        check(backend)
    check(PairsIn16Bits(127))


def test_a_device_without_exact_sums_fails_the_contract() -> None:
    with pytest.raises(AssertionError, match="7-bit weights are off"):
        BackendContract().test_int8_products_are_summed_exactly(PairsIn16Bits(40))


@pytest.mark.parametrize("quantize_outputs", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_probe_computes_what_is_expected_of_it(bits: int, quantize_outputs: bool) -> None:
    model, arrays = probe(int8_levels(bits), quantize_outputs)
    onnx.checker.check_model(model, full_check=True)
    backend = PairsIn16Bits(127)
    backend.quantize_outputs = quantize_outputs
    assert sum_error(backend, BuildOptions(), bits) <= 1e-6
    assert len(arrays) == len(model.graph.input) == 4
    assert len(model.graph.output) == 3


def test_a_backend_without_int8_is_not_probed() -> None:
    class Plain(PairsIn16Bits):
        def variants(self, base: str) -> tuple[Variant, ...]:
            return (Variant(base),)

    backend = Plain(63)
    assert int8_bits(backend, BuildOptions()) == 8
    assert not backend.builds


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: str(b.name))
@pytest.mark.parametrize("threads", [1, 2])
def test_the_runtimes_of_this_machine_sum_exactly_with_the_bits_found(backend: Any, threads: int) -> None:
    options = BuildOptions(threads)
    assert sum_error(backend, options, int8_bits(backend, options)) <= OFF


@pytest.mark.parametrize("bits", [0, 6, 9])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(InvalidInput, match="8 bits, or 7"):
        int8_levels(bits)


# ---- rounding of both kinds


@given(seed=st.integers(0, 99), bits=st.sampled_from(BITS), zero=st.booleans())
@settings(max_examples=30, deadline=None)
def test_no_weight_is_beyond_its_bits(seed: int, bits: int, zero: bool) -> None:
    unit = Unit("u", "linear", ((1, 24),), (1, 8), weight_shape=(8, 24))
    weight = torch.randn(unit.weight_shape, generator=torch.Generator().manual_seed(seed))
    weight[0] *= 0 if zero else 1e-9
    own = stored(weight, unit, Variant("int8"), bits)
    assert np.abs(own.values.astype(int)).max() == int8_levels(bits)
    step = own.scales.reshape([-1] + [1] * (weight.dim() - 1))  # type: ignore[union-attr]
    assert (np.abs(own.dequantized() - weight.numpy()) <= 0.5001 * step).all()
    again = stored(torch.from_numpy(own.dequantized()), unit, Variant("int8"), bits)
    np.testing.assert_allclose(again.dequantized(), own.dequantized(), rtol=1e-5, atol=0)


def test_the_second_of_two_activations_has_the_bits_of_a_weight() -> None:
    of = Range(limit=2.0, top=3.0)
    assert int8_scale(of, "in0", 7) == int8_scale(of, "in0", 8) == int8_scale(of, "in1", 8) == 2.0 / 127
    assert int8_scale(of, "in1", 7) == 3.0 / 63


# ---- engines of this machine


class Net(nn.Module):
    """Convolutions (one depthwise, one transposed), matrix products with a weight, and both products of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.point(F.relu(self.depth(F.relu(self.stem(x))))))
        x = F.relu(self.up(x)).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head((q @ k.mT * 0.05).softmax(-1) @ v)


def network(seed: int, bits: int = 8, positive: bool = True) -> Lowering:
    """Weights of one sign and inputs near the top of their range: sums of products are as large as they come."""
    torch.manual_seed(seed)
    model = Net(16 + 8 * (seed % 3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if positive and p.dim() > 1:
                p.abs_()
    batches = [3 + torch.randn(1, 3, 4, 4) for _ in range(3)]
    return Lowering(hs.Task(model, batches[0], batches, lambda _: 0.0, "net"), int8_bits=bits)


def relative(have: list[Array], want: list[Any]) -> float:
    off = sum(
        float(np.square(a.astype(np.float64) - b.numpy()).sum()) for a, b in zip(have, want, strict=True)
    )
    return float(np.sqrt(off / sum(float(b.double().square().sum()) for b in want)))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: str(b.name))
@given(seed=st.integers(0, 999), positive=st.booleans(), share=st.sampled_from([0.5, 1.0]))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_an_engine_computes_what_is_simulated(backend: Any, seed: int, positive: bool, share: float) -> None:
    made = network(seed, int8_bits(backend, BuildOptions()), positive)
    rng = np.random.default_rng(seed)
    variants = {u.name: Variant("int8" if rng.random() < share else "fp32") for u in made.network.units}
    model = made.onnx(variants, **qdq_form(backend))
    have = backend.build(model.SerializeToString(), BuildOptions())(*made.arrays())
    traced = made.traced
    simulate = made.simulator(traced, traced.args, traced.kwargs, quantize_outputs=backend.quantize_outputs)
    assert relative(have, leaves(simulate(variants))) < 0.02


@cache
def fashion(bits: int) -> Lowering:
    return Lowering(hs.load("zoo:fashion_resnet"), 250, int8_bits=bits, unsigned=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: str(b.name))
@pytest.mark.parametrize(
    ("images", "points"), [(500, 0.004), pytest.param(5000, 0.001, marks=pytest.mark.slow)]
)
def test_fashion_resnet_scores_as_simulated(backend: Any, images: int, points: float) -> None:
    """All int8: accuracy within a tenth of a point of the simulation's (of few images: two of them), divergence 1.5 times."""
    setup = Setup(fashion(int8_bits(backend, BuildOptions())), backend, BuildOptions())
    variants = uniform(setup.network, "int8")
    engine, _ = setup.build(variants)
    low, kind = setup.lowering, "kl"
    hits, lost = np.zeros(2), np.zeros(2)
    with np.load(fashion_resnet.DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        seen = fashion_resnet.normalise(data["evaluation_images"][:images])
        labels = data["evaluation_labels"][:images].astype(int)
    for x, y in zip(seen.split(250), labels.reshape(-1, 250), strict=True):
        simulate = low.simulator(low.traced, (x,), {}, quantize_outputs=backend.quantize_outputs)
        answers = [torch.from_numpy(engine(x.numpy())[0]), leaves(simulate(variants))[0]]
        hits += [(a.argmax(1).numpy() == y).sum() for a in answers]
        lost += [divergence([a], leaves(simulate.dense), kind)[0] for a in answers]
    score, loss = hits / images, lost / images
    assert abs(score[0] - score[1]) <= points + 1e-9, score
    assert loss[0] <= 1.5 * loss[1], loss
    assert score[1] > 0.92


# ---- what is of one kind is not taken for the other


def tables(tmp_path: Any, bits: int) -> Any:
    from profiling import narrow_law, narrow_setup, run_widths

    setup = narrow_setup(SimulatedBackend(narrow_law(), int8_bits=bits))
    setup = replace(setup, lowering=Lowering(setup.lowering.task, int8_bits=bits))
    return setup, run_widths(setup, tmp_path / f"{bits}.parquet")


@pytest.mark.slow
def test_a_table_says_its_bits_and_fits_only_sensitivities_of_the_same(
    tmp_path: Any, own_locks: None
) -> None:
    of = {bits: tables(tmp_path, bits) for bits in BITS}
    for bits, (setup, table) in of.items():
        assert hs.LatencyTable.load(tmp_path / f"{bits}.parquet").header.int8_bits == bits
        assert ("int8_bits 7" in str(table.header.section)) == (bits == 7)
        path = tmp_path / f"{bits}.sens"
        own = sensitivity_for(setup, path, grid=table.grid(), weights=tmp_path / "weights")
        assert SensitivityTable.load(path).int8_bits == own.int8_bits == bits
        found = search(table, own, ["latency=80%"])
        assert found.options.get("int8_bits", 8) == bits
        other = of[15 - bits]
        with pytest.raises(
            IncompatibleTables, match=f"bits of int8 weights: table={bits}, current={15 - bits}"
        ):
            search(other[1], own, ["latency=80%"])
        with pytest.raises(IncompatibleTables, match="bits of int8 weights"):
            sensitivity_for(other[0], path, grid=table.grid())
        with pytest.raises(IncompatibleTables, match="int8_bits"):
            table.require(options=other[0].described)
    left = list((tmp_path / "weights").iterdir())
    assert len([p for p in left if p.is_dir()]) == 2  # each has a bank of its own
    assert all(p.is_dir() or p.match("order.*.json") for p in left)


@pytest.mark.slow
def test_an_allocation_of_8_bits_is_refused_where_sums_are_not_exact(tmp_path: Any, own_locks: None) -> None:
    setup, table = tables(tmp_path, 8)
    found = search(table, sensitivity_for(setup, None, grid=table.grid()), ["latency=60%"])
    assert "dense.int8" in found.variants.values()
    exact = SimulatedBackend(setup.backend.law)  # type: ignore[attr-defined]
    assert of_allocation(setup.lowering.task, found, exact).lowering.int8_bits == 8
    inexact = SimulatedBackend(setup.backend.law, int8_bits=7)  # type: ignore[attr-defined]
    with pytest.raises(IncompatibleTables, match=r"8 bits.*simulated.*takes 7 bits.*search here"):
        of_allocation(setup.lowering.task, found, inexact)
    setup, table = tables(tmp_path, 7)
    found = search(table, sensitivity_for(setup, None, grid=table.grid()), ["latency=60%"])
    assert of_allocation(setup.lowering.task, found, exact).lowering.int8_bits == 7  # right on both


@pytest.mark.parametrize("bits", BITS)
def test_refitted_weights_lie_on_the_grid_of_their_bits(bits: int) -> None:
    import tiny

    made = Lowering(tiny.task("cnn"), int8_bits=bits)
    bank = weight_bank(made)
    widths = {g: n // 2 for g, n in made.network.channels.items()}
    for unit, (weight, _) in bank.assemble(widths, uniform(made.network, "int8")).items():
        of = made.network[unit]
        own = stored(weight, replace(of, weight_shape=tuple(weight.shape)), Variant("int8"), bits)
        np.testing.assert_allclose(own.dequantized(), weight.numpy(), rtol=1e-4, atol=1e-7)

"""Every variant of three small networks as ONNX: what it computes, what it stores and which opset it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from oracles import follows
from torch.utils import _pytree as pytree

from hwsearch.backends.nodenames import unit_of
from hwsearch.compress.simulate import Simulator
from hwsearch.errors import UnsupportedVariant
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, legal, weight_bytes
from hwsearch.testing.contract import TOLERANCE, mixed, small_network, wherever
from hwsearch.testing.reference import dynamic_quantize

NETWORKS = ("residual", "attention", "two_inputs")
VARIANTS = {
    name: Variant.parse(name)
    for name in "dense.tf32 dense.fp8 dense.int4 dense.nvfp4 2:4.fp16 2:4.bf16 2:4.int8 2:4.fp8 1:4.fp16".split()
}
OPSETS = {"dense.fp8": 19, "2:4.fp8": 19, "dense.int4": 21, "dense.nvfp4": 23}


def outputs(model: onnx.ModelProto, arrays: list[Any]) -> list[Any]:
    newer = onnx.ModelProto()
    newer.CopyFrom(model)
    for opset in newer.opset_import:  # onnx.reference knows DequantizeLinear from 19 on
        opset.version = max(opset.version, 19) if not opset.domain else opset.version
    session = ReferenceEvaluator(newer, new_ops=[dynamic_quantize()])
    return list(session.run(None, dict(zip([v.name for v in model.graph.input], arrays, strict=True))))


def simulated(made: Lowering, variants: dict[str, Variant]) -> list[Any]:
    simulate = Simulator(made.traced, made.traced.args, made.traced.kwargs, made.weights, made.ranges)
    return [t.numpy() for t in pytree.tree_leaves(simulate(variants)) if isinstance(t, torch.Tensor)]


def rms(have: Any, want: Any) -> float:
    return float(
        np.sqrt(np.square(have.astype(np.float64) - want).sum() / np.square(want.astype(np.float64)).sum())
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_onnx_computes_what_the_simulation_does(network: str, name: str) -> None:
    made, variant = small_network(network), VARIANTS[name]
    asked = wherever(made, "fp32", variant)
    if set(asked.values()) == {Variant("fp32")}:
        assert network == "residual", f"{name} is offered to no unit of {network}"
        return
    for allocation in (asked, mixed(made, "fp32", variant)):
        model = made.onnx(allocation)
        onnx.checker.check_model(model, full_check=name != "dense.nvfp4")
        dense = simulated(made, {})
        for have, want, plain in zip(
            outputs(model, made.arrays()), simulated(made, allocation), dense, strict=True
        ):
            # half precisions round outputs in torch; here only weights are stored in them
            least = 2e-2 if variant.precision in ("fp16", "bf16", "tf32") else 1e-5
            assert rms(have, want) <= max(least, 0.3 * rms(want, plain)), allocation
            assert np.abs(have - want).max() <= TOLERANCE[variant.precision] * np.abs(want).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_opsets_rise_only_as_far_as_needed(name: str) -> None:
    made = small_network("attention")
    model = made.onnx(mixed(made, "fp32", VARIANTS[name]))
    opsets = {o.domain: o.version for o in model.opset_import}
    assert opsets[""] == OPSETS.get(name, 18)
    assert ("trt" in opsets) == (name == "dense.nvfp4")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", [*VARIANTS, "dense.int8", "dense.fp16"])
def test_the_file_holds_the_bytes_that_are_counted(network: str, name: str) -> None:
    made, variant = small_network(network), Variant.parse(name)
    for unit in made.network.units:
        if not unit.weight_shape or not legal(unit, [variant]):
            continue
        allocation = {u.name: variant if u is unit else Variant("fp32") for u in made.network.units}
        model = made.onnx(allocation)
        plain = {t.name: t for t in made.onnx(dict.fromkeys(allocation, Variant("fp32"))).graph.initializer}
        activations = {
            i
            for n in model.graph.node
            if n.op_type in ("QuantizeLinear", "TRT_FP4DynamicQuantize")
            for i in n.input
        }
        new = [
            t for t in model.graph.initializer
            if t.name not in plain and not t.name.endswith("/zero") and t.name not in activations
        ]  # fmt: skip
        gone = [t for n, t in plain.items() if n not in {t.name for t in model.graph.initializer}]
        if variant.precision == "tf32":
            assert not new
            continue
        counted = weight_bytes(unit, variant) - weight_bytes(unit, Variant("fp32"))
        assert sum(map(held, new)) - sum(map(held, gone)) == counted, unit.name


def held(tensor: onnx.TensorProto) -> int:
    return len(tensor.raw_data) or numpy_helper.to_array(tensor).nbytes


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.kept])
def test_patterns_are_in_the_stored_weights(name: str) -> None:
    made, variant = small_network("residual"), VARIANTS[name]
    model = made.onnx(wherever(made, "fp32", variant))
    stored = {t.name: t for t in model.graph.initializer}
    seen = set()
    for node in model.graph.node:
        if node.op_type in ("Cast", "DequantizeLinear") and node.name.endswith(".weight"):
            unit = made.network[unit_of(node.name)[0]]
            values = torch.from_numpy(numpy_helper.to_array(stored[node.input[0]]).astype(np.float32))
            if values.shape != unit.weight_shape:
                values = values.T
            assert variant.kept is not None
            assert follows(values, unit.in_axis, *variant.kept)
            assert float((values != 0).float().mean()) > 0.9 * variant.kept[0] / variant.kept[1]
            seen.add(unit.name)
    assert seen == {"conv1", "conv2", "head"}


def test_an_allocation_that_a_unit_cannot_become_is_refused() -> None:
    made = small_network("attention")
    product = next(u for u in made.network.units if not u.weight_shape)
    for name, why in (("dense.nvfp4", "no weight"), ("2:4.fp16", "no weight")):
        asked = {u.name: Variant.parse(name) if u is product else Variant("fp32") for u in made.network.units}
        with pytest.raises(UnsupportedVariant, match=f"{product.name} cannot become {name}: .*{why}"):
            made.onnx(asked)


def test_narrow_networks_become_every_variant_too() -> None:
    """Masks and blocks are of what is left; ranges are those of the whole network."""
    import tiny

    made = tiny.lowering("cnn")
    widths = {g: n * 2 // 3 // 4 * 4 for g, n in made.network.channels.items()}
    narrow = made.narrow({g: range(w) for g, w in widths.items()})
    for name in ("2:4.fp16", "2:4.int8", "dense.fp8"):
        allocation = wherever(narrow, "fp32", Variant.parse(name))
        assert len(set(allocation.values())) > 1 or name == "dense.fp8"
        for have, want in zip(
            outputs(narrow.onnx(allocation), narrow.arrays()), simulated(narrow, allocation), strict=True
        ):
            assert rms(have, want) <= 0.05


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["dense.fp8", "dense.int4", "2:4.int8", "2:4.fp16", "2:4.fp8"])
def test_onnx_runtime_computes_the_same(network: str, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    made, variant = small_network(network), VARIANTS.get(name, Variant.parse(name))
    model = made.onnx(wherever(made, "fp32", variant))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # as written: fused integer kernels round otherwise, which is the contract's matter
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = dict(zip([v.name for v in model.graph.input], made.arrays(), strict=True))
    for have, want in zip(session.run(None, feed), outputs(model, made.arrays()), strict=True):
        assert rms(have, want) <= 1e-2


def test_four_bits_are_packed_with_the_first_in_the_lower_half() -> None:
    made = small_network("two_inputs")
    for precision, kind in (("int4", TensorProto.INT4), ("nvfp4", TensorProto.FLOAT4E2M1)):
        variant = Variant(precision)
        model = made.onnx({u.name: (*legal(u, [variant]), Variant("fp32"))[0] for u in made.network.units})
        stored = [t for t in model.graph.initializer if t.data_type == kind]
        assert len(stored) == sum(bool(legal(u, [variant])) for u in made.network.units)
        for unit in made.network.units:
            if legal(unit, [variant]):
                own = made.weights[unit.name, variant].values
                assert any(
                    np.array_equal(numpy_helper.to_array(t).astype(np.float32), w)
                    for t in stored
                    for w in (own, own.T)
                )

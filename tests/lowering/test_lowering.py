from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exact import bits
from networks import NETWORKS, leaves
from torch import nn

from hwsearch.backends.base import BuildOptions, qdq_form
from hwsearch.backends.faults import faults
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.engine.outputs import Expected
from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.graph.calls import as_call
from hwsearch.lowering.lowering import Lowering, check_calibration, with_batch
from hwsearch.lowering.marked import isolate, unit_of
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, legal, uniform
from hwsearch.task import Task

BACKENDS = {"onnxruntime": ONNXRuntimeBackend(), "openvino": OpenVINOBackend()}
QUICK = set(
    "mlp_batchnorm residual unet mobilenet_v3 gpt_block shared_linear nested_names dict_in_dict_out unit_is_output "
    "in_place one_dimensional constant_inputs".split()
)
# OpenVINO 2026.4 computes some int8 linear layers without a (nonzero) bias wrongly on one thread where one follows
# another, and BatchNorm over the second axis of a linear layer's output; ONNX Runtime computes the same files right. What is
# wrong differs between CPUs; that it is has to be seen.
OPENVINO_WRONG = set(
    "einsum_weight tied_transposed functional sliced_weight mlp_3d_batchnorm hf_distilbert hf_bert_eager".split()
)


def lowering(model: nn.Module, inputs: Any) -> Lowering:
    task = Task(model, inputs, [inputs, inputs], lambda predict: 0.0, "test")
    return Lowering(task, int8_bits=bits())


def error(have: Any, want: Any) -> float:
    """Largest relative root mean squared error of the outputs."""
    assert len(have) == len(want)
    worst = 0.0
    for a, b in zip(have, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        worst = max(worst, float(np.sqrt(((a - b) ** 2).mean()) / max(np.sqrt((b**2).mean()), 1e-3)))
    return worst


def check_names(model: onnx.ModelProto, network: Network, variants: dict[str, Variant]) -> None:
    """Every layer has nodes of its own, and so has a stored tensor that is made floating; no node has another owner."""
    own = {u.name for u in network.units if not u.stored or variants[u.name] != Variant("fp32")}
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    owners = [unit_of(name) for name in names]
    assert {unit for unit, inside in owners if inside} == own
    assert {unit for unit, _ in owners} <= {*own, ""}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NETWORKS]
)
def test_every_allocation_computes_what_torch_computes(name: str) -> None:
    model, inputs = NETWORKS[name]()
    made = lowering(model, inputs)
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        dense = [t.numpy() for t in leaves(model.eval()(*args, **kwargs))]
    rng = np.random.default_rng(0)
    drawn = {u.name: Variant(str(rng.choice(["fp32", "bf16", "int8"]))) for u in made.network.units}
    mixed = {u: v if legal(made.network[u], [v]) else Variant("fp32") for u, v in drawn.items()}
    for variants, quantize_outputs in [
        (uniform(made.network, "fp32"), False),
        (uniform(made.network, "bf16"), False),
        (uniform(made.network, "int8"), False),
        (uniform(made.network, "int8"), True),
        (mixed, bool(rng.integers(2))),
    ]:
        exact = all(v.precision == "fp32" for v in variants.values())
        simulate = made.simulator(made.traced, args, made.traced.kwargs, quantize_outputs=quantize_outputs)
        want = dense if exact else [t.numpy() for t in leaves(simulate(variants))]
        for backend in BACKENDS.values():
            own = qdq_form(backend)
            form = {**own, "quantize_outputs": quantize_outputs}
            model_proto = made.onnx(variants, **form, metadata={"key": "value"})
            onnx.checker.check_model(model_proto, full_check=True)
            check_names(model_proto, made.network, variants)
            assert form != own or not faults(model_proto, backend.name)
            engine = backend.build(model_proto.SerializeToString(), BuildOptions())
            off = error(engine(*made.arrays()), want)
            if backend.name == "openvino" and name in OPENVINO_WRONG and not exact and off >= 0.1:
                assert Expected(made, quantize_outputs).deviation(engine, variants, "fp32").wrong
            else:
                assert off < (1e-4 if exact else 0.1), (backend.name, quantize_outputs)


def test_the_calls_of_a_tied_unit_store_its_weight_once() -> None:
    made = lowering(*NETWORKS["shared_linear"]())
    for precision, width in (("fp32", 4), ("bf16", 2), ("int8", 1)):
        stored = made.onnx(uniform(made.network, precision)).graph.initializer
        sizes = [len(t.raw_data) for t in stored]
        assert sizes.count(8 * 8 * width) == 1


@pytest.mark.parametrize(
    "name", ["grouped", "one_dimensional", "unet", "gpt_block", "three_dimensional", "shared_linear"]
)
def test_an_isolated_unit_runs(name: str) -> None:
    made = lowering(*NETWORKS[name]())
    for unit in made.network.units:
        single = isolate(made.marked, unit)
        for precision in ("fp32", "int8"):
            model = made.assemble(single, {unit.name: Variant(precision)})
            onnx.checker.check_model(model, full_check=True)
            engine = BACKENDS["onnxruntime"].build(model.SerializeToString(), BuildOptions())
            (out,) = engine(*[np.ones(s.shape, s.dtype) for s in engine.inputs])
            assert out.shape == unit.output_shape


@pytest.mark.slow
def test_assembling_150_layers_is_quick() -> None:
    made = lowering(nn.Sequential(*[nn.Linear(4, 4) for _ in range(150)]), torch.randn(2, 4))
    variants = uniform(made.network, "int8")
    made.onnx(variants)  # weights, ranges and the export are made once
    start = time.process_time()
    made.onnx(variants, quantize_outputs=True)
    assert time.process_time() - start < 1.0


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x @ x.mT).abs()


class Products(nn.Module):
    """The exporter makes prims.prod of cumprod; the product before it has an ONNX form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.prod(1, keepdim=True) * x.cumprod(1)


@pytest.mark.parametrize(("module", "operator"), [(Odd, "linalg_eig"), (Products, "cumprod")])
def test_an_operator_without_onnx_form_is_named_with_its_module(module: type[nn.Module], operator: str) -> None:
    made = lowering(nn.Sequential(nn.Linear(4, 4), module()), torch.randn(2, 4, 4))
    with pytest.raises(UntraceableModel, match=rf"module 1 uses operator aten\.{operator}"):
        _ = made.marked


def test_batch_of_the_deployed_network() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(with_batch(x, 5), torch.cat([x, x[:2]]))  # type: ignore[arg-type]
    assert with_batch({"x": x}, 2)["x"].shape == (2, 4)  # type: ignore[call-overload, index]
    with pytest.raises(InvalidInput, match="at least 1"):
        with_batch(x, 0)


@pytest.mark.parametrize(
    ("sizes", "fitted", "scored"),
    [([64, 32], [8] * 9, [8] * 3), ([100], [10] * 8, [10] * 2), ([3], [1, 1], [1]), ([1], [1], [1])],
)
def test_a_quarter_of_the_calibration_data_is_kept_apart(
    sizes: list[int], fitted: list[int], scored: list[int]
) -> None:
    batches = [torch.randn(n, 4) for n in sizes]
    low = Lowering(Task(nn.Linear(4, 2), torch.randn(1, 4), batches, lambda p: 0.0))
    assert [len(args[0]) for _, args, _ in low.fitting] == fitted
    assert [len(args[0]) for _, args, _ in low.scoring] == scored
    if len(low.calibration) > 1:
        assert torch.equal(
            torch.cat([args[0] for _, args, _ in (*low.fitting, *low.scoring)]), torch.cat(batches)
        )


def test_a_model_of_one_batch_size_keeps_its_batches() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.view(6, 2, 2).flatten(1))

    low = Lowering(Task(Fixed(), torch.randn(6, 4), [torch.randn(6, 4) for _ in range(3)], lambda p: 0.0))
    assert [len(args[0]) for _, args, _ in low.fitting] == [6, 6]
    assert [len(args[0]) for _, args, _ in low.scoring] == [6]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "no calibration"),
        ([torch.randn(2, 5)], "shape"),
        ([torch.randn(2, 4).double()], "float64"),
        ([torch.full((2, 4), float("nan"))], "NaN"),
        ([(torch.randn(2, 4), torch.randn(2, 4))], "structure"),
    ],
)
def test_bad_calibration(calibration: list[Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_calibration(Task(nn.Linear(4, 2), torch.randn(2, 4), calibration, lambda p: 0.0))


def test_calibration_takes_other_batch_sizes_and_orders_of_names() -> None:
    model, inputs = NETWORKS["kwargs_out_of_order"]()
    other = {"x": torch.randn(7, 6), "y": torch.randn(7, 5)}
    made = Lowering(Task(model, inputs, [inputs, other], lambda predict: 0.0))
    assert len(made.ranges) == 4

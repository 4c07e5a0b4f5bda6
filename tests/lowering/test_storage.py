"""What takes bytes: stored tensors as units, in int8 where that is asked for, and the size that is predicted of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

from hwsearch.api import run
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.faults import SIGNED_CONCAT, faults
from hwsearch.compress.simulate import Simulator
from hwsearch.engine.record import graph_bytes
from hwsearch.engine.setup import Setup
from hwsearch.errors import Infeasible
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted
from hwsearch.network.network import Network
from hwsearch.network.variants import (
    STORAGE,
    Variant,
    ineligible,
    legal,
    network_bytes,
    uniform,
    weight_bytes,
)
from hwsearch.task import Task
from hwsearch.testing import LatencyLaw, SimulatedBackend
from hwsearch.testing.contract import Attention, small_network, wherever

INT8, FP8, HALF = Variant("int8"), Variant("fp8"), Variant("fp16")


class Recurrent(nn.Module):
    """Two layers of an LSTM in both directions, a GRU, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 20)
        self.lstm = nn.LSTM(20, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(48, 28, batch_first=True)
        self.up = nn.ConvTranspose1d(28, 16, 4, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.gru(self.lstm(self.table(ids))[0])
        return self.head(F.relu(self.up(x.transpose(1, 2))).mean(2))


class Tied(nn.Module):
    """A table that is also the last layer's weight: of a Gemm (rows as they are) or of a MatMul (transposed in the file)."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.table = nn.Embedding(70, 24)
        self.inner = nn.Linear(24, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.inner(self.table(ids)))
        return F.linear(x if self.deep else x.mean(1), self.table.weight)


class TiedFirst(nn.Module):
    """A tied layer with a bias, before or after its rows are looked up; one row of zeros, one of next to nothing."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Embedding(70, 24)
        self.bias = nn.Parameter(torch.zeros(70))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.first:
            x = x + self.table((x[..., 0] * 0).to(torch.int64) + torch.arange(2))
        said = F.linear(x, self.table.weight, self.bias)
        return said, self.table(torch.arange(9) % 3) if self.first else x


class Joined(nn.Module):
    """A stored tensor between a Concat and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.place = nn.Parameter(torch.randn(1, 16, 10, 10))
        self.out = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([F.silu(self.left(x)), 3 * F.silu(self.right(x))], 1) + self.place)


class Constants(nn.Module):
    """Constants of several dimensions, one that holds infinity, integers, a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 2, 12, 32))
        self.stack = nn.Parameter(torch.randn(2, 32, 32))
        self.register_buffer("mask", torch.full((12, 32), float("-inf")).triu(20))
        self.register_buffer("order", torch.arange(12).flip(0).repeat(200))
        self.head = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x[:, self.order[:12]][:, None] + self.place) @ self.stack
        return self.head(torch.softmax(x + self.mask, -1).mean((1, 2)))


def lowered(model: nn.Module, inputs: Callable[[], torch.Tensor]) -> Lowering:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return Lowering(Task(model.eval(), inputs(), [inputs(), inputs()], lambda predict: 0.0, "stored"))


def ids(most: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, most, (2, 9))


MAKERS: Mapping[str, Callable[[], Lowering]] = {
    "recurrent": lambda: lowered(Recurrent(), ids(90)),
    "tied": lambda: lowered(Tied(deep=False), ids(70)),
    "tied, transposed": lambda: lowered(Tied(deep=True), ids(70)),
    "constants": lambda: lowered(Constants(), lambda: torch.randn(2, 12, 32)),
    "stored": lambda: small_network("stored"),
    "residual": lambda: small_network("residual"),
    "attention": lambda: lowered(Attention(), lambda: torch.randn(1, 128, 128)),
}


@cache
def made(name: str) -> Lowering:
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def low(request: pytest.FixtureRequest) -> Lowering:
    return made(request.param)


def numbers(model: onnx.ModelProto, low: Lowering) -> int:
    """Bytes of the tensors of a file that stand for stored ones: neither shapes, zero points, nor states of zeros."""
    total, paths = 0, {str(n.target) for n in low.traced.graph.graph.nodes if n.op == "get_attr"}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        numeric = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8)
        if numeric and values.ndim and (tensor.name in paths or np.asarray(values, np.float32).any()):
            total += values.nbytes
    return total


def stored_integers(low: Lowering) -> int:
    """Bytes of integers that the network stores itself."""
    return sum(n for _, n, why in low.network.fixed if "int64" in why)


@pytest.mark.parametrize("precision", ["fp32", "w8"])
def test_a_file_holds_the_bytes_that_are_foretold(low: Lowering, precision: str) -> None:
    """Tied weights once, whatever stands transposed in the file."""
    variants = wherever(low, "fp32", Variant(precision))
    told = network_bytes(low.network, variants) - stored_integers(low)
    assert numbers(low.onnx(variants), low) == told


def test_the_dense_size_is_that_of_the_modules_own_tensors() -> None:
    for model, inputs in ((Recurrent(), ids(90)), (Tied(True), ids(70)), (Tied(False), ids(70))):
        low = lowered(model, inputs)
        own = sum(p.numel() * 4 for p in model.parameters())
        assert network_bytes(low.network, uniform(low.network, "fp32")) == own


@pytest.mark.parametrize("quantize_outputs", [False, True])
def test_sizes_of_files_of_mixed_allocations(low: Lowering, quantize_outputs: bool) -> None:
    """What the table predicts of any file is never below it, and little above."""
    backend = SimulatedBackend(LatencyLaw({}), quantize_outputs=quantize_outputs)
    setup = Setup(low, backend, BuildOptions(), storage=True)
    always, own = graph_bytes(setup, "fp32")
    rng = np.random.default_rng(0)
    for _ in range(6):
        variants = {}
        for unit in low.network.units:
            can = legal(unit, setup.variants())
            variants[unit.name] = can[int(rng.integers(len(can)))]
        told = low.network.fixed_bytes + always
        told += sum(
            weight_bytes(u, variants[u.name]) + own[u.name][str(variants[u.name])] for u in low.network.units
        )
        size = low.onnx(variants, quantize_outputs=quantize_outputs).ByteSize()
        shared = 700 * sum(
            v == INT8 for v in variants.values()
        )  # a Q/DQ that several units read counts for each
        assert size <= told <= size * 1.005 + 100 + shared


@pytest.mark.parametrize("precision", ["w8", "int8", "fp32"])
def test_a_file_computes_what_is_simulated(low: Lowering, precision: str) -> None:
    if any(u.op == "recurrent" and "reverse" in u.name for u in low.network.units):
        pytest.skip("onnx.reference has no LSTM in both directions: the runtimes' own tests have it")
    variants = wherever(low, "fp32", Variant(precision))
    model = low.onnx(variants)
    onnx.checker.check_model(model, full_check=True)
    version = next(o for o in model.opset_import if not o.domain)
    version.version = max(version.version, 19)
    have = ReferenceEvaluator(model).run(
        None, dict(zip([i.name for i in model.graph.input], low.arrays(), strict=True))
    )
    simulator = Simulator(low.traced, low.traced.args, low.traced.kwargs, low.weights, low.ranges)
    want = torch.utils._pytree.tree_leaves(simulator(variants))
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(
            a, b.numpy(), atol=2e-5 * float(b.abs().max()) if precision != "int8" else 0.05
        )


def test_every_row_of_a_stored_tensor_keeps_its_own_scale() -> None:
    """A row of tiny numbers beside a large one is not rounded to zero, whatever the number of dimensions."""
    low = MAKERS["constants"]()
    path = low.traced.paths["place"][0]
    value = low.traced.weight("place")
    assert path == "place"
    assert value is not None
    value[0, 1, 3] *= 1e-4
    own = low.weights["place", STORAGE]
    assert own.values.dtype == np.int8
    assert own.broadcast_scales().shape == (1, 2, 12, 1)
    off = np.abs(own.dequantized() - value.numpy()).max(-1)
    assert (off <= np.abs(value.numpy()).max(-1) / 127).all()


def test_kinds_and_what_stays(low: Lowering) -> None:
    network = low.network
    for unit in network.units:
        assert not unit.stored or ineligible(unit, INT8)
        assert ineligible(unit, STORAGE) == "" or not unit.weight_shape


def test_constants_name_what_stays_whole() -> None:
    network = made("constants").network
    assert {u.name: u.op for u in network.units if u.stored} == {"place": "constant", "stack": "constant"}
    told = {path: why for path, _, why in network.fixed}
    assert told == {"mask": "it holds NaN or infinity", "order": "it is of int64"}
    assert network.fixed_bytes == sum(n for _, n, _ in network.fixed)
    assert Network.from_json(network.to_json()).fixed == network.fixed


def test_kinds_of_recurrent_networks() -> None:
    network = made("recurrent").network
    kinds = {u.name: u.op for u in network.units}
    assert kinds["table"] == "embedding"
    assert sum(op == "recurrent" for op in kinds.values()) == 10
    assert kinds["up"] == "conv_transpose1d"
    order = [u.name for u in network.units]
    assert (
        order.index("table")
        < order.index("lstm.weight_ih_l0")
        < order.index("gru.weight_ih_l0")
        < order.index("up")
    )


def test_a_tied_weight_serves_its_other_readers_where_they_can_read_it() -> None:
    low = made("tied")
    (unit,) = (u for u in low.network.units if u.tied)
    whole = 4 * unit.weight_count
    assert weight_bytes(unit, Variant("fp32")) == whole
    assert (
        weight_bytes(unit, INT8) == weight_bytes(unit, STORAGE) == unit.weight_count + 4 * unit.out_channels
    )
    assert weight_bytes(unit, FP8) == weight_bytes(unit, INT8) + whole
    assert weight_bytes(unit, HALF) == whole // 2 + whole
    for variant in (INT8, STORAGE, FP8, HALF):
        variants = {u: variant if u == unit.name else Variant("fp32") for u in uniform(low.network, "fp32")}
        model = low.onnx(variants)
        copies = [t for t in model.graph.initializer if np.prod(t.dims) == unit.weight_count]
        assert len(copies) == (1 if variant in (INT8, STORAGE) else 2)


@pytest.mark.parametrize("first", [False, True])
def test_the_bias_of_a_tied_layer_suits_the_rows_that_are_looked_up(first: bool) -> None:
    """Of rows of zeros and of next to nothing the bias is no number that overflows, and both readers have one scale."""
    model = TiedFirst(first)
    low = lowered(model, lambda: torch.randn(3, 2, 24))
    with torch.no_grad():
        model.table.weight[0], model.table.weight[1], model.bias[:2] = 0.0, 1e-9 * torch.randn(24), 5.0
    low = Lowering(low.task)
    (unit,) = (u for u in low.network.units if u.tied)
    variants = {unit.name: INT8}
    file = low.onnx(variants)
    held = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    (product,) = (n for n in file.graph.node if n.op_type in ("Gemm", "MatMul"))
    makers = {o: n for n in file.graph.node for o in n.output}
    activation, weight = (makers[name] for name in product.input[:2])
    step = held[activation.input[1]] * held[weight.input[1]]
    (bias,) = (
        v for v in held.values() if v.dtype == np.float32 and v.shape[-1:] == (70,) and 5 in np.round(v)
    )
    assert np.abs(bias / step).max() <= 2.0**24
    np.testing.assert_allclose(bias[:2], 5.0, rtol=1e-5)
    version = next(o for o in file.opset_import if not o.domain)
    version.version = max(version.version, 19)
    simulate = low.simulator(low.traced, low.traced.args, low.traced.kwargs, quantize_outputs=False)
    have = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: low.arrays()[0]})
    for a, b in zip(have, torch.utils._pytree.tree_leaves(simulate(variants)), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5 * float(b.abs().max()))


def test_a_stored_tensor_behind_a_concat_hides_it_from_no_one() -> None:
    low = lowered(Joined(), lambda: torch.randn(2, 3, 12, 12))
    for place in ("fp32", "w8"):
        variants = {**uniform(low.network, "int8"), "place": Variant(place)}
        assert low.network["place"].stored
        assert faults(low.onnx(variants), "openvino") == [SIGNED_CONCAT]
        assert faults(low.onnx(variants, unsigned_concat=True), "openvino") == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_that_are_only_stored_are_no_fault(low: Lowering, runtime: str) -> None:
    assert faults(low.onnx(wherever(low, "fp32", STORAGE)), runtime) == []


def test_refitting_leaves_what_is_only_stored_and_what_is_tied(low: Lowering) -> None:
    assert refitted(low, wherever(low, "fp32", STORAGE)) is low
    new = refitted(low, wherever(low, "fp32", INT8))
    assert new is not low
    for unit in low.network.units:
        if unit.stored or unit.tied:
            assert torch.equal(new.traced.weight(unit.name), low.traced.weight(unit.name))


def test_rows_are_looked_up_before_they_become_floating() -> None:
    """Nothing floating of the size of the table is made in an inference."""
    for name in ("recurrent", "tied", "tied, transposed"):
        low = made(name)
        table = next(u for u in low.network.units if u.op == "embedding" or u.tied)
        model = onnx.shape_inference.infer_shapes(
            low.onnx({**uniform(low.network, "fp32"), table.name: STORAGE})
        )
        kinds = {v.name: v.type.tensor_type for v in model.graph.value_info}
        gathers = [n for n in model.graph.node if n.op_type == "Gather" and "stored" in n.name]
        assert kinds[gathers[0].output[0]].elem_type == TensorProto.INT8
        if not table.tied:
            sizes = [
                int(np.prod([d.dim_value for d in k.shape.dim])) for k in kinds.values() if k.elem_type == 1
            ]
            assert table.weight_count not in sizes


def simulated(low: Lowering) -> SimulatedBackend:
    return SimulatedBackend(LatencyLaw.random(low.network, 0))


def test_a_budget_on_size_is_met_by_what_is_stored_in_int8(tmp_path: Path) -> None:
    """Even of a network of which next to nothing is a layer; the file has the bytes that were predicted."""
    low = made("stored")
    report = run(
        low.task, ["size=37%"], tmp_path, backend=simulated(low), axes=["precision"], time_limit_s=5.0
    )
    assert report.met
    size = report.size_bytes
    assert size["deployed"] == (tmp_path / "model.onnx").stat().st_size
    assert size["deployed"] <= size["predicted"] <= 1.02 * size["deployed"] + 1024
    assert "dense.w8" in report.variants.values()


def test_a_size_that_cannot_be_met_says_what_keeps_it_up(tmp_path: Path) -> None:
    low = made("stored")
    with pytest.raises(Infeasible, match=r"weights of LSTM and GRU \d+% \(.*transposed convolutions \d+%"):
        run(
            low.task,
            ["size=10%"],
            tmp_path / "a",
            backend=simulated(low),
            axes=["precision"],
            time_limit_s=5.0,
        )
    backend = simulated(low)
    backend.weight_storage = False
    with pytest.raises(
        Infeasible, match=r"\d+% stays floating .*: simulated has no weights that are stored in int8"
    ):
        run(low.task, ["size=30%"], tmp_path / "b", backend=backend, axes=["precision"], time_limit_s=5.0)

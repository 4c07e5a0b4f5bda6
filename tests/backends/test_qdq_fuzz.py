"""What runtimes compute of graphs with Q/DQ, against ONNX's reference evaluator: the forms that lowering makes are right."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from hwsearch import backends
from hwsearch.backends import faults
from hwsearch.backends.base import BuildOptions, qdq_form
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, uniform
from hwsearch.task import Task

RUNTIMES = ("openvino", "onnxruntime")
LEVELS = 63
"""Of 7 bits: no CPU saturates, so that nothing but the graph can be wrong."""


def _bench(name: str) -> ModuleType:
    folder = Path(__file__).parents[2] / "scripts" / "bench"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


fuzz = _bench("qdq_fuzz")
judging = sys.modules["judging"]


class Joined(nn.Module):
    """Three branches of other ranges, put together by `join`, and layers that read what it makes."""

    def __init__(self, join: Callable[[list[torch.Tensor]], torch.Tensor], *readers: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(4, 8, 3, padding=1) for _ in range(3))
        self.join, self.readers = join, nn.ModuleList(readers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined = self.join([F.silu(branch(x)) * (1 + i) for i, branch in enumerate(self.branches)])
        return tuple(reader(joined) for reader in self.readers)


class OverChannels(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


CAT = {
    "channels": lambda v: torch.cat(v, 1),
    "rows": lambda v: torch.cat([*v, v[0][:, :4], v[1][:, 4:]][:3], 2).repeat(1, 3, 1, 1),
    "relu": lambda v: torch.cat(v, 1).relu(),
    "clamp": lambda v: torch.cat(v, 1).clamp(-0.5, 0.5),
    "cascade": lambda v: torch.cat([torch.cat(v[:2], 1), v[2]], 1),
    "max_pool": lambda v: F.max_pool2d(torch.cat(v, 1), 2),
    "transpose": lambda v: torch.cat(v, 1).transpose(2, 3),
    "pad": lambda v: F.pad(torch.cat(v, 1), (1, 1, 1, 1)),
    "roll": lambda v: torch.cat(v, 1).roll(1, 1),
    "split": lambda v: torch.cat([torch.cat(v, 1).split(12, 1)[i] for i in (1, 0)], 1),
}
READERS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "conv": lambda: (nn.Conv2d(24, 8, 1),),
    "depthwise": lambda: (nn.Conv2d(24, 24, 3, padding=1, groups=24),),
    "conv_transpose": lambda: (nn.ConvTranspose2d(24, 8, 2, stride=2),),
    "linear": lambda: (OverChannels(24, 8),),
    "two_convs": lambda: (nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(24, 8, 1)),
    "conv_and_linear": lambda: (nn.Conv2d(24, 8, 3, padding=1), OverChannels(24, 8)),
    "conv_and_output": lambda: (nn.Conv2d(24, 8, 3, padding=1), nn.Identity()),
}
PAIRS = [(cat, "conv") for cat in CAT] + [("channels", reader) for reader in READERS if reader != "conv"]


def _joined(cat: str, reader: str) -> Lowering:
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 8, 8)
    model = Joined(CAT[cat], *READERS[reader]()).eval()
    return Lowering(Task(model, inputs, [inputs], lambda predict: 0.0, cat), method="minmax")


@pytest.mark.parametrize(("cat", "reader"), PAIRS)
def test_what_reads_a_concat_keeps_its_scale(cat: str, reader: str) -> None:
    """Of OpenVINO's file in both runtimes, and of ONNX Runtime's in that."""
    made = _joined(cat, reader)
    for form, runtimes in (("openvino", RUNTIMES), ("onnxruntime", ("onnxruntime",))):
        model = made.onnx(uniform(made.network, "int8"), **qdq_form(backends.get(form)))
        model = judging.with_levels(model, LEVELS)
        feed = dict(zip((v.name for v in model.graph.input), made.arrays(), strict=True))
        meaning = judging.Meaning(model, feed)
        for runtime in runtimes:
            assert not faults.faults(model, runtime)
            engine = backends.get(runtime).build(model.SerializeToString(), BuildOptions(1, "fp32"))
            off = meaning.off(engine(*feed.values()))
            assert not off.wrong, f"{form}'s file in {runtime}: {off}"


def test_only_convolutions_behind_a_concat_read_unsigned_numbers() -> None:
    made = _joined("channels", "conv_and_linear")
    model = made.onnx(uniform(made.network, "int8"), **qdq_form(backends.get("openvino")))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            zero = stored[makers[node.input[0]].input[2]]
            found[node.name.split("|")[0]] = str(zero.dtype), int(zero)
    assert found == {
        **{f"branches.{i}": ("int8", 0) for i in range(3)},
        "readers.0": ("uint8", 128),
        "readers.1": ("int8", 0),
    }


class SecondSoftmax(nn.Module):
    """A product whose second operand comes from a Softmax, of what `before` makes of a product, changed by `after`."""

    def __init__(
        self,
        heads: int,
        before: Callable[[torch.Tensor], torch.Tensor],
        after: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.heads, self.before, self.after = heads, before, after
        self.layer = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.layer(x).chunk(3, -1)
        if self.heads > 1:
            q, k, v = (t.reshape(1, -1, self.heads, 16 // self.heads).transpose(1, 2) for t in (q, k, v))
        weights = self.after(self.before(q @ k.transpose(-1, -2)).softmax(-1))
        return v.transpose(-1, -2) @ weights, weights


AROUND: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "plain": (lambda t: t, lambda t: t),
    "scaled": (lambda t: t * 0.1, lambda t: t),
    "masked": (lambda t: t * 0.1 + torch.arange(32.0) * 0.01, lambda t: t),
    "after": (lambda t: t * 0.1, lambda t: (t - 0.02).relu()),
    "turned": (lambda t: t * 0.1, lambda t: t.transpose(-1, -2)),
}


@pytest.mark.parametrize("chosen", [("layer", "matmul", "matmul_1"), ("matmul_1",)])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("heads", [1, 4])
def test_a_product_that_reads_a_softmax_second_is_right(
    heads: int, around: str, chosen: tuple[str, ...]
) -> None:
    """OpenVINO takes it for attention on CPUs with AVX-512."""
    torch.manual_seed(0)
    model, inputs = SecondSoftmax(heads, *AROUND[around]).eval(), torch.randn(1, 32, 16)
    made = Lowering(Task(model, inputs, [inputs], lambda predict: 0.0, around), method="minmax")
    variants = {u.name: Variant("int8" if u.name in chosen else "fp32") for u in made.network.units}
    form = qdq_form(backends.get("openvino"))
    onnx_file = judging.with_levels(made.onnx(variants, **form), LEVELS)
    assert not faults.faults(onnx_file, "openvino")
    unturned = made.onnx(variants, **{**form, "avoid_fusions": False})
    assert (faults.SECOND_SOFTMAX in faults.faults(unturned, "openvino")) == (around != "turned")
    feed = dict(zip((v.name for v in onnx_file.graph.input), made.arrays(), strict=True))
    for runtime in RUNTIMES:
        engine = backends.get(runtime).build(onnx_file.SerializeToString(), BuildOptions(1, "fp32"))
        off = judging.Meaning(onnx_file, feed).off(engine(*feed.values()))
        assert not off.wrong, f"{runtime}: {off}"


def test_both_forms_are_the_same_numbers() -> None:
    made = _joined("channels", "conv")
    variants = uniform(made.network, "int8")
    feed = {"x": made.arrays()[0] * 3}  # beyond the range as well
    signed, unsigned = (
        judging.evaluate(made.onnx(variants, unsigned_concat=u), feed)[0] for u in (False, True)
    )
    assert np.array_equal(signed, unsigned)


@pytest.mark.parametrize("kind", ["networks", "graphs"])
def test_no_graph_is_wrong_unseen(kind: str) -> None:
    for counts in fuzz.fuzz(
        kind, RUNTIMES, 20 if kind == "networks" else 40, first=1000, levels=LEVELS
    ).values():
        assert not counts.unseen, str(counts)
        assert not counts.not_built, str(counts)
        assert not counts.disputed, str(counts)
        assert counts.right >= 20, str(counts)
        assert kind == "graphs" or not counts.refused, str(counts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["networks", "graphs"])
def test_none_of_five_hundred_graphs_is_wrong_unseen(kind: str) -> None:
    for counts in fuzz.fuzz(kind, RUNTIMES, 500, levels=LEVELS).values():
        assert not counts.unseen, str(counts)
        assert not counts.not_built, str(counts)
        assert kind == "graphs" or not counts.refused, str(counts)


def _quantized_concat(*, pool: bool = False, weight_only: bool = False) -> onnx.ModelProto:
    """Two branches, put together, quantized to int8 and read by a layer."""
    stored = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "w": np.ones((8, 8) if weight_only else (4, 8, 1, 1), np.int8),
        "ws": np.full(8 if weight_only else 4, 0.01, np.float32),
        "wz": np.zeros(8 if weight_only else 4, np.int8),
    }
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["cat"], axis=1),
        helper.make_node("QuantizeLinear", ["cat", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        *([helper.make_node("AveragePool", ["dq"], ["mean"], kernel_shape=[2, 2])] if pool else []),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=1 if weight_only else 0),
    ]
    data = "cat" if weight_only else "mean" if pool else "dq"
    nodes.append(helper.make_node("MatMul" if weight_only else "Conv", [data, "weight"], ["y"]))
    for i, node in enumerate(nodes):
        node.name = f"n{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in "ab"]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", ends, [result], [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_patterns_that_a_runtime_computes_wrongly_are_known() -> None:
    assert faults.faults(_quantized_concat(), "openvino") == [faults.SIGNED_CONCAT]
    assert faults.faults(_quantized_concat(pool=True), "openvino") == [
        faults.SIGNED_CONCAT,
        faults.ROUNDED_MEAN,
    ]
    assert not faults.faults(_quantized_concat(pool=True), "onnxruntime")
    assert faults.faults(_quantized_concat(weight_only=True), "onnxruntime") == [faults.DYNAMIC]
    assert not faults.faults(_quantized_concat(), "tensorrt")


def test_an_engine_of_such_a_graph_is_not_built() -> None:
    made = _joined("channels", "conv")

    class Signed:
        """OpenVINO, but its Q/DQ is signed everywhere."""

        name, quantize_outputs = "openvino", False
        build = backends.get("openvino").build

    setup = Setup(made, Signed(), BuildOptions(1, "fp32"))  # type: ignore[arg-type]
    setup.build(
        {u.name: Variant("int8" if u.name.startswith("branches") else "fp32") for u in made.network.units}
    )
    with pytest.raises(BackendUnavailable, match="computes this network wrongly: int8 Q/DQ beside a Concat"):
        setup.build(uniform(made.network, "int8"))

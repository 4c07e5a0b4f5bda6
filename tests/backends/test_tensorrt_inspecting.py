"""The engine inspector's record joined with the profiler's times, in documented shapes: see `documented` in each sample."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hwsearch.backends.base import NodeTime
from hwsearch.backends.tensorrt.inspector import joined, layers_of
from hwsearch.engine.attribution import attribute, executed_precisions
from hwsearch.errors import BackendUnavailable
from hwsearch.network.network import Network, Unit
from hwsearch.table.build import NodeRow

SAMPLES = Path(__file__).parents[1] / "fixtures" / "tensorrt"
SHAPE = (1, 8, 4, 4)


def sample(name: str) -> tuple[list[NodeTime], dict[str, Any]]:
    data = json.loads((SAMPLES / f"inspector_{name}.json").read_text())
    return joined(layers_of(json.dumps(data["information"])), data["times_ms"], runs=2), data


def attributed(name: str, *units: str) -> tuple[tuple[NodeRow, ...], dict[str, str]]:
    network = Network(tuple(Unit(u, "conv2d", (SHAPE,), SHAPE) for u in units))
    rows = attribute(sample(name)[0], network, {})
    return rows, dict(zip(units, executed_precisions(rows, network), strict=True))


@pytest.mark.parametrize("name", ["10", "11", "names_only"])
def test_every_reported_layer_becomes_one_node_with_its_mean_time(name: str) -> None:
    nodes, data = sample(name)
    assert data["documented"], "a sample says where its form is documented"
    assert {n.name: n.time_ns for n in nodes} == pytest.approx(
        {k: v * 1e6 / 2 for k, v in data["times_ms"].items()}
    )


def test_tensorrt_10() -> None:
    rows, executed = attributed("10", "stem", "conv1", "conv2", "head")
    assert [(row.kind, row.units) for row in rows] == [
        ("edge", ("stem",)),
        ("unit", ("stem",)),
        ("unit", ("conv1",)),
        ("edge", ("conv2",)),  # a layout change lies on the way into who reads it
        ("unit", ("conv2",)),
        ("rest", ("conv2",)),
        ("unit", ("head",)),
        ("edge", ("head",)),
    ]
    # conv1 writes fp16 and conv2 adds an int8 tensor: what they are computed in is in the kernel's name
    assert executed == {"stem": "int8", "conv1": "int8", "conv2": "fp16", "head": "fp16"}
    assert rows[3].op == rows[7].op == "Reformat"


def test_tensorrt_11() -> None:
    rows, executed = attributed(
        "11", "encoder.qkv", "encoder.scores", "encoder.mixed", "encoder.out", "encoder.conv"
    )
    assert [(row.kind, row.units) for row in rows] == [
        ("rest", ()),
        ("rest", ()),
        ("edge", ("encoder.qkv",)),
        ("unit", ("encoder.qkv",)),
        ("unit", ("encoder.scores", "encoder.mixed")),  # one fused kernel keeps its one time
        ("unit", ("encoder.out",)),
        ("unit", ("encoder.conv",)),
    ]
    assert executed == {
        "encoder.qkv": "int8", "encoder.scores": "bf16", "encoder.mixed": "bf16", "encoder.out": "bf16", "encoder.conv": "tf32",
    }  # fmt: skip


def test_names_only() -> None:
    rows, executed = attributed("names_only", "stem", "conv1", "conv2", "head")
    assert [(row.kind, row.units) for row in rows] == [
        ("edge", ("stem",)),
        ("unit", ("stem",)),
        ("unit", ("conv1", "conv2")),
        ("edge", ("conv2",)),
        ("rest", ("conv2",)),
        ("unit", ("head",)),
    ]
    assert set(executed.values()) == {""}, "names do not tell precisions, and none is made up"


def recorded() -> list[dict[str, Any]]:
    """What tensorrt_rtx 1.7 logged of the contract's residual network (fp16, conv1 and head in int8), as the inspector's JSON."""
    log = json.loads((SAMPLES.parent / "rtx_1_7_residual_mixed_fp16_sm86.json").read_text())
    listing = next(line for line in log if "Layers:" in line).partition("Layers:\n")[2]
    layers = []
    for text in listing.splitlines():
        if not text.startswith("Name: "):
            continue
        parts = re.split(r", (?=(?:LayerType|Inputs|Constants|Outputs|TacticName|StreamId|Metadata): )", text)
        layer: dict[str, Any] = dict(part.split(": ", 1) for part in parts)
        for key in ("Inputs", "Constants", "Outputs"):
            found = re.findall(
                r"\{ Name: (.*?), Dimensions.*?Datatype: (\w+), Format: (.*?) \}", layer.get(key, "")
            )
            layer[key] = [{"Name": n, "Datatype": d, "Format": f} for n, d, f in found]
        layers.append(layer)
    return layers


def test_recorded_by_tensorrt_rtx() -> None:
    record = recorded()
    layers = layers_of(json.dumps({"Layers": record}))
    assert [layer.op for layer in layers].count("correlation") == 3
    # generated kernels take longest here: what they compute in is still not what the products are computed in
    times = {layer.name: 9.0 if layer.op == "kgen" else 1.0 for layer in layers}
    names = ("stem", "conv1", "conv2", "head")
    network = Network(tuple(Unit(n, "conv2d", (SHAPE,), SHAPE) for n in names))
    rows = attribute(joined(layers, times, runs=1), network, {})
    assert executed_precisions(rows, network) == ("fp16", "int8", "fp16", "int8")
    assert {row.units for row in rows if row.kind == "edge"} == {("conv1",), ("head",)}, "two quantizations"
    assert {unit for row in rows if row.kind == "unit" for unit in row.units} == set(names)


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        ({"TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw"}, "int8"),
        ({"TacticName": "sm80_xmma_gemm_f32f32_f32f32_f32_tn"}, "fp32"),
        ({"TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n"}, "fp16"),
        ({"TacticName": "sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n"}, "fp8"),
        ({"TacticName": "unknown_kernel", "Inputs": [{"Name": "x", "Datatype": "FP8"}]}, "fp8"),
        ({"Inputs": [{"Name": "x", "Format/Datatype": "Half"}, {"Name": "w", "Format/Datatype": "Int4"}]}, "int4"),
        ({"Inputs": [{"Name": "x", "DataType": "FP4"}]}, "nvfp4"),
        ({"Inputs": [{"Name": "x", "Datatype": "Half"}], "Constants": [{"Name": "w", "Datatype": "Int4"}]}, "int4"),
        ({"Weights": {"Type": "Int8"}, "Inputs": [{"Name": "x", "Format/Datatype": "Half"}]}, "int8"),
        ({"Inputs": [{"Name": "i", "DataType": "Int64"}, {"Name": "x", "DataType": "Half"}]}, "fp16"),
        ({"Inputs": [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}]}, ""),
        ({}, ""),
    ],
)  # fmt: skip
def test_executed_precision(entry: dict[str, Any], precision: str) -> None:
    record = {"Layers": [{"Name": "a|0|Conv", "LayerType": "CaskConvolution", **entry}]}
    assert layers_of(json.dumps(record))[0].precision == precision


def test_layout_changes_in_a_row_lie_on_the_way_into_the_same_unit() -> None:
    def move(name: str, source: str, target: str) -> dict[str, Any]:
        return {"Name": f"Reformatting CopyNode for Input Tensor 0 to {name}", "LayerType": "Reformat",
                "Inputs": [{"Name": source}], "Outputs": [{"Name": target}], "Origin": "REFORMAT"}  # fmt: skip

    record = {
        "Layers": [
            move("{ForeignNode[b|0|MatMul...c|0|MatMul]}", "x", "y"),
            move("z", "y", "z"),
            {"Name": "b_0_MatMul_myl3", "LayerType": "gemm", "Inputs": [{"Name": "z"}], "Metadata": "[ONNX Layer: b|0|MatMul]"},
            move("loop", "p", "q"),
            move("loop again", "q", "p"),
        ]
    }  # fmt: skip
    sources = [layer.sources for layer in layers_of(json.dumps(record))]
    assert sources == [("b|0|MatMul",), ("b|0|MatMul",), ("b|0|MatMul",), (), ()]


def test_layers_that_only_the_profiler_knows_are_kept() -> None:
    (node,) = joined([], {"a|0|Conv + ~a|0|Relu": 1.0}, runs=1)
    assert node.sources == ("a|0|Conv", "~a|0|Relu")
    assert node.time_ns == 1e6


def test_no_layer_times_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="reported no layer"):
        joined(layers_of('{"Layers": ["a"]}'), {}, runs=1)


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "{}", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [3]}']
)
def test_other_records_are_refused(text: str) -> None:
    with pytest.raises(BackendUnavailable, match="not of a known form"):
        layers_of(text)

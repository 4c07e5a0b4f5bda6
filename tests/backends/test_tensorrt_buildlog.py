"""Builder logs: one recorded from tensorrt_rtx 1.7.1, and lines as TensorRT's users show them (none from a GPU of ours)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hwsearch.backends.tensorrt.buildlog import Operand, Sparsity, executed, fused_layers, sparsity

FIXTURES = Path(__file__).parents[1] / "fixtures"


def recorded() -> list[str]:
    """Of `contract.small_network("residual")`, every other unit in int8, base fp16, built for sm86 without a GPU."""
    lines: list[str] = json.loads((FIXTURES / "rtx_1_7_residual_mixed_fp16_sm86.json").read_text())
    return lines


def test_layers_of_a_recorded_log() -> None:
    layers = fused_layers(recorded())
    assert [layer.kind for layer in layers].count("correlation") == 3
    conv1 = next(layer for layer in layers if layer.kind == "correlation" and "conv1" in layer.products)
    assert conv1.sources == (
        "conv1|0|Conv",
        "conv1|0|DequantizeLinear.in0",
        "conv1|0|DequantizeLinear.weight",
    )
    assert conv1.units == conv1.products == ("conv1",)
    assert conv1.inputs == (Operand("int8", (1, 32, 32, 32)),)
    assert Operand("int8", (32, 32, 3, 3)) in conv1.constants
    assert conv1.outputs[0].shape == (1, 32, 32, 32)
    assert all(layer.outputs for layer in layers)
    fused = next(layer for layer in layers if "~conv2|0|Add" in layer.sources)
    assert {"conv2|0|Conv", "~conv2|0|Relu"} <= set(fused.sources)
    assert fused.products == ("conv2",)


def test_executed_precisions_of_a_recorded_log() -> None:
    assert executed(fused_layers(recorded())) == {
        "stem": "fp16",
        "conv1": "int8",
        "conv2": "fp16",
        "head": "int8",
    }


def layer(name: str, kind: str, inputs: str, constants: str, *sources: str) -> str:
    def tensors(text: str) -> str:
        parts = [part.split() for part in text.split(",") if part.strip()]
        rows = [
            f"{{ Name: t{i}, Dimensions: [{d.replace('x', ',')}], Datatype: {t}, Format: Row }}"
            for i, (d, t) in enumerate(parts)
        ]
        return f"[ {', '.join(rows)}]" if rows else "[]"

    made = "\x1f".join(f"[ONNX Layer: {s}]" for s in sources)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {tensors(inputs)}, Constants: {tensors(constants)}, "
        f"Outputs: {tensors('1x4 Half')}, TacticName: t, StreamId: 0, Metadata: {made}"
    )


@pytest.mark.parametrize(
    ("inputs", "constants", "precision"),
    [
        ("1x8 Half", "8x8 Int4,1 Float", "int4"),  # weight only
        ("1x8 Half", "8x8 Float,1x8 Float", "fp32"),  # a cast of the input is part of the layer
        ("4x8x8 Int8,4x8x8 Int8", "1 Float", "int8"),  # a product of two activations
        ("1x8 FP8", "8x8 FP8,1 Float", "fp8"),
        ("1x8 Half,8x8 Half", "1x8 Half", "fp16"),  # int8 weights that an earlier layer has dequantized
        ("1x8 FP4E2M1", "8x8 FP4E2M1,127x4 FP8,1 Float", "nvfp4"),  # its scales are padded, and larger
        ("1x8 Odd", "", "Odd"),
    ],
)
def test_precision_of_a_layer(inputs: str, constants: str, precision: str) -> None:
    (one,) = fused_layers(["[VERBOSE] Layers:\n" + layer("a", "gemm", inputs, constants, "u|0|MatMul")])
    assert one.precision == precision
    assert executed([one]) == {"u": precision}


def test_a_kernel_of_elementwise_work_has_not_the_last_word() -> None:
    listing = [
        layer("a", "kgen", "1x8 Half", "", "u|0|Cast.in0", "u|0|Gemm"),
        layer("b", "gemm", "1x8 Int8", "8x8 Int8", "u|0|Gemm", "u|0|DequantizeLinear.weight"),
        layer("c", "kgen", "1x8 Half", "", "u|0|Gemm", "~u|0|Relu", "~v|0|MatMul"),
        layer("d", "kgen", "1x8 Float", "", "w|1|MatMul.2"),
    ]
    layers = fused_layers(["[INFO] other", "[VERBOSE] Layers:\n" + "\n".join([*listing, "", "I/O Tensors:"])])
    assert len(layers) == 4
    assert executed(layers) == {"u": "int8", "w": "fp32"}


def test_a_log_without_layers() -> None:
    assert fused_layers(["[ERROR] no"]) == ()
    assert fused_layers([]) == ()
    assert sparsity(recorded()) is None  # TensorRT-RTX says nothing of sparsity


OLD = """(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620, Conv_622 + Relu_623
(Sparsity) TRT inference plan picked sparse implementation for layers: Conv_619 + Relu_620"""
OLD_NONE = """(Sparsity) Layers eligible for sparse math: Conv_0
(Sparsity) TRT inference plan picked sparse implementation for layers:"""
NEW = """(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a|0|Conv + ~a|0|Relu, b|0|Gemm
(Sparsity) Chose 1 layer(s) using sparse tactics: a|0|Conv + ~a|0|Relu"""
NEW_COUNTS = """(Sparsity) Found 39 layer(s) eligible to use sparse tactics
(Sparsity) Chose 0 layer(s) using sparse tactics"""
KERNELS = """(Sparsity) Found 3 layer(s) eligible to use sparse tactics
(Sparsity) Chose 2 kernel(s) using sparse tactics"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            OLD,
            Sparsity(
                3, 1, ("MatMul_401", "Conv_619 + Relu_620", "Conv_622 + Relu_623"), ("Conv_619 + Relu_620",)
            ),
        ),
        (OLD_NONE, Sparsity(1, 0, ("Conv_0",), ())),
        (NEW, Sparsity(2, 1, ("a|0|Conv + ~a|0|Relu", "b|0|Gemm"), ("a|0|Conv + ~a|0|Relu",))),
        (NEW_COUNTS, Sparsity(39, 0)),
        (KERNELS, Sparsity(3, 2)),
        (OLD.splitlines()[0], Sparsity(3, 0, ("MatMul_401", "Conv_619 + Relu_620", "Conv_622 + Relu_623"))),
    ],
)
def test_sparse_layers_in_the_words_of_tensorrt_8_to_10(text: str, found: Sparsity) -> None:
    """The lines are of NVIDIA/TensorRT's issues 1403 and 4056 and of other public logs, shortened; not from a GPU here."""
    assert sparsity([f"[INFO] {line}" for line in text.splitlines()]) == found

"""What NVIDIA's own parser and builder say of assembled networks, for GPUs that need not be here.

`tensorrt_rtx` builds for a compute capability without a GPU. It proves a graph legal there, and nothing about time.
"""

from __future__ import annotations

from typing import Any

import pytest

from hwsearch.lowering.marked import isolate
from hwsearch.network.variants import Variant, legal
from hwsearch.testing.contract import mixed, small_network, wherever

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install tensorrt-rtx-cu12)"
)

NETWORKS = ("residual", "attention", "two_inputs")
TARGETS = ("SM80", "SM86", "SM89", "SM120")
ALL = "dense.fp32 dense.tf32 dense.fp16 dense.bf16 dense.int8 2:4.fp16 2:4.bf16 2:4.int8".split()
BUILT = dict.fromkeys(ALL, TARGETS) | {
    "dense.fp8": ("SM89", "SM120"),
    "2:4.fp8": ("SM89", "SM120"),
    "dense.int4": ("SM80", "SM86", "SM89", "SM120"),
    "dense.nvfp4": ("SM120",),
}
"""Where each variant is built, all arithmetic around it in fp32: the rest is refused for a type that the target lacks."""
ON_TURING = {"dense.fp32", "dense.tf32", "dense.fp16", "dense.int8", "2:4.fp16", "2:4.int8"}
"""What SM75 has types for. TensorRT-RTX has no matrix product in fp32 there, so that only convolutions are built as they are
assembled, int8 among them; networks made strongly typed in fp16 are another test's matter."""
LACKING = {"fp8": "fp8_e4m3", "int4": "int4", "nvfp4": "fp4_e2m1", "bf16": "b16"}


class Log(trt.ILogger):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def refused(data: bytes, target: str) -> str:
    """NVIDIA's reason not to build a network; empty where it was built."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data):
        return "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or "not parsed"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    engine = builder.build_serialized_network(network, config)
    return "" if engine is not None else "; ".join(log.errors) or "not built"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", BUILT)
def test_networks_are_built_where_the_target_has_the_type(network: str, name: str) -> None:
    made, variant = small_network(network), Variant.parse(name)
    whole = wherever(made, "fp32", variant)
    if variant not in whole.values():
        assert network == "residual", f"{name} is offered to no unit of {network}"
        return
    for allocation in (whole, mixed(made, "fp32", variant)):
        data = made.onnx(allocation).SerializeToString()
        for target in TARGETS:
            reason = refused(data, target)
            if target in BUILT[name] or variant not in allocation.values():
                assert reason == "", f"{name} of {network} for {target}: {reason}"
            else:
                assert LACKING[variant.precision] in reason, (
                    f"{name} of {network} for {target}: {reason or 'was built'}"
                )


@pytest.mark.parametrize("network", ["residual", "attention"])
@pytest.mark.parametrize("name", BUILT)
def test_turing(network: str, name: str) -> None:
    """Layer by layer: as they are assembled, whole networks hold a matrix product that TensorRT-RTX lacks on SM75."""
    made, variant = small_network(network), Variant.parse(name)
    marked = made.marked
    units = [u for u in made.network.units if legal(u, [variant])]
    assert units or network == "residual", f"{name} is offered to no unit of {network}"
    for unit in units:
        model = made.assemble(isolate(marked, unit), {unit.name: variant})
        reason = refused(model.SerializeToString(), "SM75")
        if name not in ON_TURING:
            # an attention product in bf16 holds no bf16 weight; the fp32 around it is what is refused
            lacking = LACKING[variant.precision] if unit.weight_shape or variant.quantized else "FP32 GEMM"
            assert lacking in reason, f"{name} of {unit.name}: {reason or 'was built'}"
        elif unit.op.startswith("conv"):
            assert reason == "", f"{name} of {unit.name}: {reason}"
        else:
            assert "FP32 GEMM is not supported" in reason, f"{name} of {unit.name}: {reason or 'was built'}"

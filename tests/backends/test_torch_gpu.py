"""Backend `torch` on a GPU: `pytest -m gpu tests/backends/test_torch_gpu.py`.

An earlier form ran on an H100 (27 November 2026): 11 of 14 passed, three asked fp8 for more than Hopper's sums hold. What came
after that (one-kernel quantization, convolutions with their ReLU, attention, the tolerance of fp8) has not run as tests yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.cuda import NotCaptured
from hwsearch.backends.torch import TorchBackend
from hwsearch.backends.torch.engine import TorchEngine
from hwsearch.device.timing import Protocol, paired
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import Variant, uniform
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import TOLERANCE, assert_close, expected, readback, small_network, wherever

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> TorchBackend:
    backend = TorchBackend()
    try:
        backend.versions()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return backend


class TestTorch(BackendContract):
    @pytest.fixture
    def backend(self, gpu: TorchBackend) -> TorchBackend:
        return gpu


def built(backend: TorchBackend, network: str = "residual", base: str | None = None) -> TorchEngine:
    base = base or backend.bases()[0]
    lowering = small_network(network)
    model: Any = lowering.onnx(uniform(lowering.network, base))
    engine = backend.build(model.SerializeToString(), BuildOptions(1, base))
    engine.prepare(*lowering.arrays())
    return engine


@pytest.mark.parametrize("network", ["residual", "attention", "two_inputs"])
def test_a_graph_computes_what_plain_launches_compute(gpu: TorchBackend, network: str) -> None:
    engine = built(gpu, network)
    by_graph = engine(*small_network(network).arrays())
    plain = [engine._cuda.holding(value).read() for value in engine._launch()]
    for a, b in zip(plain, by_graph, strict=True):
        assert np.allclose(a, b, atol=1e-3)


def test_a_capture_that_failed_spoils_nothing(gpu: TorchBackend) -> None:
    """Neither one that torch refuses, nor one that CUDA gives up."""
    import torch

    cuda = gpu.cuda
    buffer = cuda.buffer((8,), "float32")

    def good() -> Any:
        with cuda.work("it fails"):
            return buffer.tensor.add_(1.0)

    def copies() -> Any:
        with cuda.work("it fails"):
            return buffer.tensor.cpu()

    def waits() -> Any:
        with cuda.work("it fails"):
            torch.cuda.current_stream().synchronize()

    before = torch.cuda.current_stream()
    for bad in (copies, waits):
        with pytest.raises(NotCaptured):
            cuda.capture(bad)
        assert torch.cuda.current_stream() == before
        cuda.capture(good).launch()
        cuda.synchronize()


def test_activations_are_quantized_by_one_kernel_as_by_four(gpu: TorchBackend) -> None:
    import torch

    from hwsearch.backends.torch.quantizing import quantize

    assert gpu.kernels.quantizes, "Triton's kernel does not work here"
    cuda = gpu.cuda
    with cuda.work("it fails"):
        x = torch.randn(33, 70, device=cuda.device).half()
        scale = torch.tensor(0.02, device=cuda.device, dtype=torch.float16)
        for given in (x, x.t(), x[:, ::2]):
            want = (given.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
            assert torch.equal(quantize(given, scale, torch.int8), want)


def test_nothing_that_should_be_one_call_is_declined(gpu: TorchBackend) -> None:
    engine = built(gpu, "residual")
    assert not engine.declined
    assert [n.op for n in engine.nodes(1) if n.op in ("Relu", "Add")] == []
    engine = built(gpu, "attention")
    assert not engine.declined
    assert {"Attention", "Gelu"} <= {n.op for n in engine.nodes(1)}


@pytest.mark.parametrize("base", ["fp16", "bf16", "fp32", "tf32"])
def test_linear_layers_execute_as_asked(gpu: TorchBackend, base: str) -> None:
    """Every kernel that is offered runs, in a graph, and its library takes what torch's rules allow."""
    if base not in gpu.bases():
        pytest.skip(f"{base} is not offered on this GPU")
    setup = Setup(small_network("attention"), gpu, BuildOptions(1, base))
    for variant in gpu.variants(base)[1:]:
        variants = wherever(setup.lowering, base, variant)
        engine, model = setup.build(variants)
        assert isinstance(engine, TorchEngine)
        assert not engine.declined
        tolerance = max(TOLERANCE[base], TOLERANCE[variant.precision])
        assert_close(
            engine(*setup.lowering.arrays()), expected(setup.lowering, variants, gpu), tolerance, str(variant)
        )
        _, executed = readback(engine, setup, model)
        told = dict(zip((u.name for u in setup.network.units), executed, strict=True))
        assert {told[u] for u in ("qkv", "out", "up", "down")} == {variant.executed}


@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_any_number_of_rows_is_multiplied(gpu: TorchBackend, rows: int) -> None:
    """cuBLAS refuses few rows of int8, which are made up with zeros."""
    from tests.backends.test_torch_products import Case
    from tests.backends.torch_programs import FLOATS, error, program, run

    for precision in [p for p in ("int8", "fp8") if Variant(p) in gpu.variants("fp32")]:
        case = Case("Gemm", rows, precision=precision)
        engine = gpu.build(case.model.SerializeToString(), BuildOptions(1, "fp32"))
        assert {n.precision for n in engine.nodes(1) if n.op == "Gemm"} == {precision}
        # Hopper adds products of fp8 with about 14 bits: off by 1.1e-4 to 1.8e-4 on an H100
        allowed = {"int8": 1e-4, "fp8": 2e-3}[precision]
        assert error(engine(case.x), run(program(case.model, FLOATS), [case.x])) <= allowed


def test_tf32_is_not_fp32(gpu: TorchBackend) -> None:
    """The flags reach the kernels: tf32 rounds operands to 10 bits, and fp32 does not."""
    if "tf32" not in gpu.bases():
        pytest.skip("tf32 is not offered on this GPU")
    arrays = small_network("attention").arrays()
    exact, rounded = (built(gpu, "attention", base)(*arrays)[0] for base in ("fp32", "tf32"))
    assert 1e-6 < np.abs(exact - rounded).max() / np.abs(exact).max() < TOLERANCE["tf32"]


def test_times_of_calls_come_to_about_the_time_of_a_run(gpu: TorchBackend) -> None:
    """Small networks are mostly launches, which calls do not count, so the band is wide."""
    engine = built(gpu, "attention")
    timing = paired(engine.run, {"same": engine.run}, Protocol(limit_s=1.0))["same"]
    assert 0.1 < sum(n.time_ns for n in engine.nodes(50)) / timing.median_ns < 2.0


def test_a_hundred_engines_leave_no_memory_behind(gpu: TorchBackend) -> None:
    import torch

    built(gpu)
    free = torch.cuda.mem_get_info()[0]
    for _ in range(100):
        built(gpu).nodes(1)
    assert free - torch.cuda.mem_get_info()[0] < 64 << 20

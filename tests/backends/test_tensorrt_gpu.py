"""The whole contract on TensorRT and a GPU. Nobody has run it yet: `pytest -m gpu tests/backends/test_tensorrt_gpu.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.tensorrt import TensorRTBackend
from hwsearch.backends.tensorrt.engine import TensorRTEngine
from hwsearch.device.timing import Protocol, paired
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import uniform
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import small_network

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tensorrt() -> TensorRTBackend:
    backend = TensorRTBackend()
    try:
        backend.versions()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return backend


class TestTensorRT(BackendContract):
    @pytest.fixture
    def backend(self, tensorrt: TensorRTBackend) -> TensorRTBackend:
        return tensorrt


def built(
    backend: TensorRTBackend, network: str = "residual", precision: str | None = None
) -> TensorRTEngine:
    base = backend.bases()[0]
    lowering = small_network(network)
    model: Any = lowering.onnx(uniform(lowering.network, precision or base), quantize_outputs=False)
    engine = backend.build(model.SerializeToString(), BuildOptions(1, base))
    engine.prepare(*lowering.arrays())
    return engine


def test_a_graph_computes_what_plain_launches_compute(tensorrt: TensorRTBackend) -> None:
    engine = built(tensorrt)
    inputs = small_network("residual").arrays()
    by_graph = engine(*inputs)
    engine._enqueue(engine._context)
    engine._cuda.synchronize()
    for spec, b in zip(engine.outputs, by_graph, strict=True):
        assert np.allclose(engine._buffers[spec.name].read(), b, atol=1e-3)


def test_layer_times_come_to_about_the_time_of_a_run(tensorrt: TensorRTBackend) -> None:
    """Small networks are mostly launches, which layers do not count, so the band is wide."""
    engine = built(tensorrt, "attention")
    timing = paired(engine.run, {"same": engine.run}, Protocol(limit_s=1.0))["same"]
    assert 0.1 < sum(n.time_ns for n in engine.nodes(50)) / timing.median_ns < 3.0


def test_layers_name_onnx_nodes(tensorrt: TensorRTBackend) -> None:
    nodes = built(tensorrt, precision="int8").nodes(5)
    assert any("|" in source for node in nodes for source in node.sources)
    assert {"int8"} <= {node.precision for node in nodes}


def test_the_timing_cache_is_kept(tensorrt: TensorRTBackend) -> None:
    built(tensorrt)
    assert tensorrt.timing_cache().stat().st_size > 0


def test_a_hundred_engines_leave_no_memory_behind(tensorrt: TensorRTBackend) -> None:
    import torch

    built(tensorrt)
    free = torch.cuda.mem_get_info()[0]
    for _ in range(100):
        built(tensorrt).nodes(1)
    assert free - torch.cuda.mem_get_info()[0] < 64 << 20

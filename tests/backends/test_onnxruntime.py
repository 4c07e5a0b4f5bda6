from __future__ import annotations

import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.engine.outputs import Expected
from hwsearch.network.variants import Variant, legal, uniform
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import small_network

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

import onnxruntime

from hwsearch.backends.onnxruntime import ONNXRuntimeBackend


class TestONNXRuntime(BackendContract):
    @pytest.fixture
    def backend(self) -> ONNXRuntimeBackend:
        return ONNXRuntimeBackend()


@pytest.mark.parametrize("quantize_outputs", [False, True])
def test_int8_beside_int4_weights_of_a_later_opset(quantize_outputs: bool) -> None:
    """In a plain session: ONNX Runtime would move Q/DQ past a Reshape itself, and refuse what it makes (issue 25526)."""
    low = small_network("attention")
    int4 = [u.name for u in low.network.units if legal(u, [Variant("int4")])]
    assert int4
    for unit in int4:
        variants = uniform(low.network, "int8") | {unit: Variant("int4")}
        model = low.onnx(variants, quantize_outputs=quantize_outputs)
        assert max(o.version for o in model.opset_import if not o.domain) >= 21
        onnxruntime.InferenceSession(model.SerializeToString())
        engine = ONNXRuntimeBackend().build(model.SerializeToString(), BuildOptions(1, "fp32"))
        assert Expected(low, quantize_outputs=quantize_outputs).deviation(engine, variants, "fp32").error < 0.05
        executed = [n.op for n in engine.nodes(3) if n.precision == "int8" and "MatMul" in n.op]
        assert len(executed) >= len(int4) - 1, "int8 layers no longer run in int8"

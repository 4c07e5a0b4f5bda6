from __future__ import annotations

import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.outputs import Expected
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import small_network
from hwsearch.variants import Variant, legal, uniform

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

from hwsearch.backends.onnxruntime import ONNXRuntimeBackend


class TestONNXRuntime(BackendContract):
    @pytest.fixture
    def backend(self) -> ONNXRuntimeBackend:
        return ONNXRuntimeBackend()


def test_int8_beside_int4_weights_of_a_later_opset() -> None:
    """ONNX Runtime makes a graph of these that it refuses itself, unless one of its optimizations is left out."""
    low = small_network("attention")
    int4 = [u.name for u in low.network.units if legal(u, [Variant("int4")])]
    assert int4
    variants = uniform(low.network, "int8") | {int4[0]: Variant("int4")}
    model = low.onnx(variants, quantize_outputs=True)
    assert max(o.version for o in model.opset_import if not o.domain) >= 21
    engine = ONNXRuntimeBackend().build(model.SerializeToString(), BuildOptions(1, "fp32"))
    assert Expected(low, quantize_outputs=True).error(engine, variants) < 0.05

from __future__ import annotations

import pytest

from hwsearch.testing import BackendContract

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

from hwsearch.backends.onnxruntime import ONNXRuntimeBackend


class TestONNXRuntime(BackendContract):
    @pytest.fixture
    def backend(self) -> ONNXRuntimeBackend:
        return ONNXRuntimeBackend()

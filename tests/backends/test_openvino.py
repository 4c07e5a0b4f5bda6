from __future__ import annotations

import pytest

from hwsearch.testing import BackendContract

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from hwsearch.backends.openvino import OpenVINOBackend


class TestOpenVINO(BackendContract):
    @pytest.fixture
    def backend(self) -> OpenVINOBackend:
        return OpenVINOBackend()

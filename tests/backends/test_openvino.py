from __future__ import annotations

from pathlib import Path

import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.network.variants import uniform
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import small_network

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from hwsearch.backends.openvino import OpenVINOBackend


class TestOpenVINO(BackendContract):
    @pytest.fixture
    def backend(self) -> OpenVINOBackend:
        return OpenVINOBackend()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_inference_is_not_handed_over_to_another_thread(threads: int) -> None:
    """To wake one costs tens of microseconds, on a virtual machine another time from minute to minute."""
    low = small_network("residual")
    model = low.onnx(uniform(low.network, "fp32"))
    engine = OpenVINOBackend().build(model.SerializeToString(), BuildOptions(threads, "fp32"))
    waits = []
    for _ in range(50):
        before = waited()
        engine.run()
        waits.append(waited() - before)
    assert sorted(waits)[25] == 0


def waited() -> int:
    """How often this thread waited to be woken so far (proc(5))."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsearch.backends.base import BuildOptions
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import uniform
from hwsearch.testing import BackendContract
from hwsearch.testing.contract import small_network

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from hwsearch.backends.openvino import OpenVINOBackend, OpenVINOEngine


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


class Core:
    """OpenVINO's, which fails to compile as long as `fails` says so of the properties it is given."""

    def __init__(self, core: Any, fails: Callable[[dict[str, Any]], str]) -> None:
        self.core, self.fails, self.tried = core, fails, list[dict[str, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
        self.tried.append(properties)
        if why := self.fails(properties):
            raise RuntimeError(why)
        return self.core.compile_model(model, device, properties)


def built(fails: Callable[[dict[str, Any]], str]) -> tuple[OpenVINOEngine, Core]:
    low, backend = small_network("residual"), OpenVINOBackend()
    core = Core(backend.core, fails)
    return OpenVINOEngine(core, low.onnx(uniform(low.network, "fp32")).SerializeToString(), BuildOptions(1, "fp32")), core


def test_a_network_that_needs_too_many_registers_is_compiled_without_snippets_which_is_told() -> None:
    """Seen on a CPU with AVX-512 and bf16, of one thread: a mixture of four experts."""
    why = "Can't allocate registers for a snippet: not enough registers"
    engine, core = built(lambda properties: "" if "SNIPPETS_MODE" in properties else why)
    assert engine.properties == {"SNIPPETS_MODE": "DISABLE"}
    assert len(core.tried) == 2
    assert engine.nodes(2)
    assert len(core.tried) == 3, "what is known is not found out again"
    plain, _ = built(lambda properties: "")
    assert not plain.properties
    x = np.ones(plain.inputs[0].shape, np.float32)
    assert np.allclose(engine(x)[0], plain(x)[0], atol=1e-5)


@pytest.mark.parametrize("why", ["Can't allocate registers for a snippet", "no such operator"])
def test_what_does_not_compile_either_way_is_an_error(why: str) -> None:
    with pytest.raises(BackendUnavailable, match=why):
        built(lambda properties: why)


def waited() -> int:
    """How often this thread waited to be woken so far (proc(5))."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))


def test_a_base_that_does_not_compile_is_not_offered() -> None:
    """Capabilities are of the CPU; ONEDNN_MAX_CPU_ISA may leave less of it."""
    backend = OpenVINOBackend()
    real = backend.core
    backend._core = Core(real, lambda properties: "not initialized" if properties["INFERENCE_PRECISION_HINT"] != "f32" else "")
    assert backend.bases() == ("fp32",)
    assert backend.bases() == ("fp32",), "and is tried once"
    assert len(backend._core.tried) == len({"BF16", "FP16"} & set(real.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))

"""A runtime that is a little wrong with one layer in int8 is refused for it, by name, in profile, verify and the contract alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from deployment.test_deploy import allocation
from profiling import narrow_law, narrow_setup, run_widths

from hwsearch.api import verify
from hwsearch.backends.base import Array, BuildOptions
from hwsearch.testing import BackendContract, LatencyLaw, SimulatedBackend, SimulatedEngine
from hwsearch.testing.contract import small_network

pytestmark = pytest.mark.usefixtures("own_locks")


class _Off(SimulatedEngine):
    """A tenth too large wherever `conv1` is quantized: a share that no fixed bound of 30 % would see."""

    def __call__(self, *arrays: Array) -> list[Array]:
        factor = 1.1 if self.executed["conv1"] == "int8" else 1.0
        return [y * factor for y in super().__call__(*arrays)]


class Off(SimulatedBackend):
    def build(self, onnx: bytes, options: BuildOptions) -> SimulatedEngine:
        super().build(onnx, options)
        return _Off(self, onnx, options)


def test_profile_refuses_the_layer(tmp_path: Path) -> None:
    table = run_widths(narrow_setup(Off(narrow_law())), tmp_path / "t.parquet", axes=["precision"])
    assert "wrong outputs" in table.header.unsupported["conv1"]["dense.int8"]
    assert "is rounding" in table.header.unsupported["conv1"]["dense.int8"]
    assert set(table.header.unsupported) == {"conv1"}
    assert all(b.wrong == (b.variants[1] == "dense.int8") for b in table.builds)


def test_verify_names_the_layer() -> None:
    law = LatencyLaw.random(tiny.lowering("cnn").network)
    chosen = allocation("cnn", 0.5, "int8", backend="simulated")
    report = verify(tiny.task("cnn"), chosen, backend=Off(law))
    assert report.wrong_outputs
    assert not report.met
    assert set(report.wrong_units) == {"conv1"}
    assert "conv1: the engine returns wrong outputs" in str(report)


def test_the_contract_and_with_it_doctor_names_the_layer() -> None:
    class Contract(BackendContract):
        def backend_for(self, backend: Any, lowering: Any) -> Any:
            return backend

    network = small_network("residual").network
    backend = Off(LatencyLaw.random(network))
    with pytest.raises(AssertionError, match=r"outputs are off.*; conv1: the engine returns wrong outputs"):
        Contract().test_residual_network(backend)

"""A runtime that computes wrong numbers is found out, blamed on the units that bring it about, and never offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from exact import bits
from torch import nn

from hwsearch.errors import BackendUnavailable
from hwsearch.lower import Lowering
from hwsearch.outputs import WRONG, Expected
from hwsearch.regime import Regime, wrong_variants
from hwsearch.task import Task
from hwsearch.variants import Variant, uniform


@pytest.fixture(scope="module")
def lowering() -> Lowering:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    task = Task(model, torch.randn(1, 16), [torch.randn(8, 16)], lambda predict: 0.0, "mlp")
    return Lowering(task, int8_bits=bits())


class _Engine:
    """Runs the ONNX Runtime engine, and multiplies its outputs by a factor."""

    def __init__(self, engine: Any, factor: float) -> None:
        self.engine, self.factor = engine, factor

    def __call__(self, *arrays: Any) -> list[Any]:
        return [y * self.factor for y in self.engine(*arrays)]


class _Broken:
    """ONNX Runtime, but wrong whenever unit `2` is int8 (or always)."""

    quantize_outputs = True
    name = "broken"

    def __init__(self, always: bool = False) -> None:
        from hwsearch.backends.onnxruntime import ONNXRuntimeBackend

        self.real, self.always = ONNXRuntimeBackend(), always


class _BrokenRegime(Regime):
    def build(self, variants: Mapping[str, Variant], base: str | None = None) -> tuple[Any, Any]:
        backend: Any = self.backend
        model = self.onnx(variants)
        engine = backend.real.build(model.SerializeToString(), self.options)
        wrong = backend.always or variants["2"].quantized
        return _Engine(engine, 1e6 if wrong else 1.0), model


def _regime(lowering: Lowering, always: bool = False) -> Regime:
    from hwsearch.backends.base import BuildOptions

    return _BrokenRegime(lowering, _Broken(always), BuildOptions(1, "fp32"))  # type: ignore[arg-type]


def test_right_engines_are_right(lowering: Lowering) -> None:
    from hwsearch.backends.base import BuildOptions
    from hwsearch.backends.onnxruntime import ONNXRuntimeBackend

    backend = ONNXRuntimeBackend()
    expected = Expected(lowering, backend.quantize_outputs)
    for precision in ("fp32", "int8"):
        variants = uniform(lowering.network, precision)
        data = lowering.onnx(variants, quantize_outputs=True).SerializeToString()
        assert expected.error(backend.build(data, BuildOptions()), variants) < WRONG / 3


def test_a_wrong_engine_is_blamed_on_its_unit(lowering: Lowering) -> None:
    at = _regime(lowering)
    variants = uniform(lowering.network, "int8")
    engine, _ = at.build(variants)
    assert at.expected.error(engine, variants) > WRONG
    found = wrong_variants(at, variants, "fp32")
    assert list(found) == ["2"]
    assert "wrong outputs" in found["2"]


def test_nan_counts_as_wrong(lowering: Lowering) -> None:
    at = _regime(lowering)
    variants = uniform(lowering.network, "fp32")
    engine, _ = at.build(variants)
    assert at.expected.error(_Engine(engine, np.nan), variants) == np.inf  # type: ignore[arg-type]


def test_a_runtime_wrong_without_quantization_is_an_error(lowering: Lowering) -> None:
    with pytest.raises(BackendUnavailable, match="another backend"):
        wrong_variants(_regime(lowering, always=True), uniform(lowering.network, "fp32"), "fp32")

"""A runtime that computes wrong numbers is found out, blamed on the units that bring it about, and never offered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from exact import bits
from networks import leaves
from torch import nn

from hwsearch.engine.outputs import MULTIPLE, ROUNDING, Deviation, Expected
from hwsearch.engine.record import wrong_variants
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import Variant, uniform
from hwsearch.task import Task


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


class _BrokenRegime(Setup):
    def build(self, variants: Mapping[str, Variant], base: str | None = None) -> tuple[Any, Any]:
        backend: Any = self.backend
        model = self.onnx(variants)
        engine = backend.real.build(model.SerializeToString(), self.options)
        wrong = backend.always or variants["2"].quantized
        return _Engine(engine, 1e6 if wrong else 1.0), model


def _setup(lowering: Lowering, always: bool = False) -> Setup:
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
        found = expected.deviation(backend.build(data, BuildOptions()), variants, "fp32")
        assert not found.wrong
        assert found.error < 0.5 * found.allowed
        assert (
            found.allowed == ROUNDING["fp32"] if precision == "fp32" else found.allowed > 2 * ROUNDING["fp32"]
        )


def test_a_wrong_engine_is_blamed_on_its_unit(lowering: Lowering) -> None:
    setup = _setup(lowering)
    variants = uniform(lowering.network, "int8")
    engine, _ = setup.build(variants)
    assert setup.expected.deviation(engine, variants, "fp32").wrong
    found = wrong_variants(setup, variants, "fp32")
    assert list(found) == ["2"]
    assert "wrong outputs" in found["2"]


def test_nan_counts_as_wrong(lowering: Lowering) -> None:
    setup = _setup(lowering)
    variants = uniform(lowering.network, "fp32")
    engine, _ = setup.build(variants)
    found = setup.expected.deviation(_Engine(engine, np.nan), variants, "fp32")  # type: ignore[arg-type]
    assert found.error == np.inf
    assert found.wrong
    assert Deviation(np.nan, 1.0).wrong


def test_a_runtime_wrong_without_quantization_is_an_error(lowering: Lowering) -> None:
    with pytest.raises(BackendUnavailable, match="another backend"):
        wrong_variants(_setup(lowering, always=True), uniform(lowering.network, "fp32"), "fp32")


class _Told:
    """Returns what it is told to: the outputs of one call after the other, again from the first."""

    def __init__(self, *calls: list[Any]) -> None:
        self.calls = itertools.cycle(calls)

    def __call__(self, *arrays: Any) -> list[Any]:
        return next(self.calls)


class _Pixels(nn.Module):
    """Coordinates in pixels beside scores below one."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1000 * self.boxes(x), 0.1 * self.scores(x)


@pytest.mark.parametrize("times", [0.5, 3.0])
def test_the_measure_is_what_quantization_itself_changes(lowering: Lowering, times: float) -> None:
    """An engine that is off by less than a small multiple of it is right, by more wrong; a fixed share knows neither."""
    expected = Expected(lowering, quantize_outputs=False)
    for precision in ("int8", "fp8"):
        variants = uniform(lowering.network, precision)
        changed = [(s(variants)[0] - s.dense[0]).numpy() for s in expected._ready()]
        told = [[s(variants)[0].numpy() + times * c] for s, c in zip(expected._ready(), changed, strict=True)]
        found = expected.deviation(_Told(*told), variants, "fp32")  # type: ignore[arg-type]
        assert found.wrong == (times > MULTIPLE)
        assert found.error < 0.3


def test_each_output_is_judged_by_itself() -> None:
    torch.manual_seed(0)
    task = Task(_Pixels().eval(), torch.randn(1, 16), [torch.randn(8, 16)], lambda predict: 0.0, "pixels")
    expected = Expected(Lowering(task), quantize_outputs=False)
    variants = uniform(expected.lowering.network, "int8")
    exact = [[y.numpy() for y in s(variants)] for s in expected._ready()]
    for factors, wrong in (((1.0, 1.0), False), ((1.0, 1.2), True), ((1.2, 1.0), True)):
        told = [[y * f for y, f in zip(row, factors, strict=True)] for row in exact]
        found = expected.deviation(_Told(*told), variants, "fp32")  # type: ignore[arg-type]
        assert found.wrong == wrong, factors


def test_nan_is_right_only_where_the_network_gives_it(lowering: Lowering) -> None:
    expected = Expected(lowering, quantize_outputs=False)
    variants = uniform(lowering.network, "fp32")
    told = []
    for simulator in expected._ready():
        with torch.no_grad():
            leaves(simulator.dense)[0][:, 1] = torch.nan
        told.append([leaves(simulator.dense)[0].numpy()])
    assert not expected.deviation(_Told(*told), variants, "fp32").wrong  # type: ignore[arg-type]
    for change in (np.nan_to_num, lambda y: np.roll(y, 1), lambda y: y * np.nan, lambda y: y * np.inf):
        wrong = [[change(y) for y in row] for row in told]
        assert expected.deviation(_Told(*wrong), variants, "fp32").wrong  # type: ignore[arg-type]

"""Infinity and NaN are legal within a network: units that see them stay float, and all else is searched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact import bits
from torch import nn

import hwsearch as hs
from hwsearch import backends
from hwsearch.backends.base import BuildOptions
from hwsearch.compress.quantize import Range
from hwsearch.loss.measure import measure_sensitivity
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.choices import candidate_widths
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, ineligible, legal
from hwsearch.testing import LatencyLaw, SimulatedBackend

INT8, FP32 = Variant("int8"), Variant("fp32")


class Infinite(nn.Module):
    """`gate` reads infinities, the product reads them transformed by itself; the outputs are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.gate = nn.Linear(64, 64)
        with torch.no_grad():
            self.gate.weight.copy_(torch.eye(64))  # inf * 0 is NaN: what it returns is infinite or NaN
            self.gate.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        seen = torch.nan_to_num(self.gate(1.0 / h), 0.0, 0.0, 0.0)  # infinite where h is 0
        y: torch.Tensor = self.c(torch.relu(self.b(h)) + torch.tanh(seen))
        return y


class Divided(nn.Module):
    """0 / 0 as soon as `small` is rounded to int8 with the outlier beside it, of which only a hundredth is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.small, self.c = nn.Linear(8, 256), nn.Linear(8, 8, bias=False), nn.Linear(256, 64)
        with torch.no_grad():
            self.small.weight.copy_(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([1e4 + x[:, :1], x[:, 1:]], 1)
        y = self.small(h)[:, 1:]
        y = y / y.abs().sum(1, keepdim=True)
        out: torch.Tensor = self.c(torch.relu(self.a(x)) + torch.nn.functional.pad(y, (1, 248)))
        return out


def _task(model: nn.Module) -> hs.Task:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.eval()(x).argmax(1)

    def evaluate(predict: hs.task.Predict) -> float:
        return float((predict(x).argmax(1) == wanted).float().mean())

    return hs.Task(model, x[:1], list(x.split(16)), evaluate, "net")


@pytest.fixture(scope="module")
def infinite() -> Lowering:
    torch.manual_seed(0)
    return Lowering(_task(Infinite()), int8_bits=bits())


def test_a_unit_that_reads_infinity_stays_float_with_the_reason(infinite: Lowering) -> None:
    reasons = {u.name: u.float_only for u in infinite.network.units}
    assert "NaN or infinity" in reasons["gate"]
    assert {name for name, why in reasons.items() if why} == {"gate"}
    gate = infinite.network["gate"]
    assert ineligible(gate, INT8) == ineligible(gate, Variant("fp8")) == reasons["gate"]
    plain = FP32, Variant("bf16"), Variant("int4")  # of int4 only the weights are quantized
    assert legal(gate, [*plain, INT8, Variant("nvfp4")]) == plain
    narrow = infinite.narrow({g: range(n // 2) for g, n in infinite.network.channels.items()})
    assert narrow.network["gate"].float_only == reasons["gate"]


def test_the_reason_is_stored_with_the_network(infinite: Lowering) -> None:
    data = infinite.network.to_json()
    assert Network.from_json(data)["gate"].float_only == infinite.network["gate"].float_only
    assert [u["name"] for u in data["units"] if "float_only" in u] == [
        "gate"
    ]  # others as older versions wrote
    assert infinite.network.fingerprint == infinite.traced.network.fingerprint


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_all_else_is_quantized_and_right_in_both_runtimes(infinite: Lowering, backend: str) -> None:
    runtime = backends.get(backend)
    variants = {u.name: (*legal(u, [INT8]), FP32)[0] for u in infinite.network.units}
    assert sum(v == INT8 for v in variants.values()) == 3
    model = infinite.onnx(variants, quantize_outputs=False)
    engine = runtime.build(model.SerializeToString(), BuildOptions(1, "fp32"))
    x = infinite.task.calibration[0]
    with torch.no_grad():
        want = infinite.task.model(x)
    have = np.concatenate([engine(x[i : i + 1].numpy())[0] for i in range(len(x))])
    assert np.isfinite(have).all()
    assert np.abs(have - want.numpy()).max() < 0.15 * float(want.abs().max())


def test_widths_are_scored_and_weights_refitted_around_it(infinite: Lowering) -> None:
    bank = weight_bank(infinite)
    assert "gate" not in bank.grams
    assert "b" in bank.grams
    grid = {g: candidate_widths(n)[:3] for g, n in infinite.network.channels.items()}
    table = measure_sensitivity(infinite, variants=(FP32, INT8), grid=grid, bank=bank)
    for group, steps in grid.items():
        for width in steps:
            known = width in table.width_loss.get(group, {infinite.network.channels[group]: 0.0})
            assert known != (f"width{width}" in table.refused.get(group, {}))
    widths = {g: min(table.width_loss[g]) for g in grid if g in table.width_loss}
    narrow = refitted(infinite, {u.name: INT8 if u.name == "b" else FP32 for u in infinite.network.units}, widths, bank)
    with torch.no_grad():
        assert bool(torch.isfinite(narrow.traced.graph(infinite.task.example_inputs)).all())


def test_a_unit_whose_simulation_is_nan_is_refused_and_all_else_scored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lowering = Lowering(_task(Divided()))
    table = measure_sensitivity(lowering, tmp_path / "sens.parquet", variants=(FP32, INT8))
    assert list(table.refused) == ["small"]
    assert "simulation returns NaN" in table.refused["small"]["dense.int8"]
    assert set(table.loss["small"]) == {"dense.fp32"}
    assert set(table.loss["a"]) == set(table.loss["c"]) == {"dense.fp32", "dense.int8"}
    assert all(np.isfinite(pair).all() for pair in table.validation)
    again = SensitivityTable.load(tmp_path / "sens.parquet")
    assert again.refused == table.refused
    assert again.loss == table.loss


@pytest.mark.parametrize(("model", "unit"), [(Infinite, "gate"), (Divided, "small")])
def test_a_whole_run_names_the_unit_and_never_quantizes_it(
    model: type[nn.Module], unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    task = _task(model())
    runtime = SimulatedBackend(LatencyLaw.random(Lowering(task).network), noise=0.003)
    axes = ["precision", "storage"]  # widths would be exported anew for each build
    report = hs.run(task, ["size=75%"], tmp_path, backend=runtime, axes=axes)
    assert report.met
    assert report.variants[unit] in ("dense.fp32", "dense.w8")  # what is only stored in int8 is computed in float
    assert {"dense.int8", "dense.w8"} & set(report.variants.values())
    assert list(report.float_only) == [unit]
    assert f"float    {unit}: " in str(report)
    assert report.score["deployed"] > 0.8
    assert hs.run(task, ["size=80%"], tmp_path, backend=runtime, axes=axes).met  # the same tables again


def test_what_vanishes_has_the_range_of_zeros(infinite: Lowering) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e-38)
        model[0].bias.zero_()
    lowering = Lowering(_task(model))
    assert lowering.ranges["1", 0, "in0"] == Range(1.0, 1.0)
    table = measure_sensitivity(lowering, variants=(FP32, INT8))
    assert not table.refused

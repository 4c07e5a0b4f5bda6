"""Whatever is quantized is refitted, at whole widths too; losses are of what is deployed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from deployment.test_deploy import allocation
from networks import leaves
from torch import nn

from hwsearch.compress import bank
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.formats import stored
from hwsearch.compress.quantize import quantize_weight
from hwsearch.compress.sequential import refit_sequential
from hwsearch.deployment.deploy import Refits, as_deployed, deploy, parse_variants
from hwsearch.deployment.session import Session, uniform_candidates
from hwsearch.engine.setup import Setup, set_up
from hwsearch.graph.trace import trace
from hwsearch.loss.divergence import divergence
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.lowering import refitted as refitting
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.variants import Variant, uniform
from hwsearch.testing import LatencyLaw, SimulatedBackend

NAMES = ("cnn", "transformer")


@cache
def made(name: str, bits: int = 8) -> Lowering:
    return Lowering(tiny.task(name), int8_bits=bits)


def set_up_simulated(name: str) -> Setup:
    low = made(name)
    return set_up(low.task, SimulatedBackend(LatencyLaw.random(low.network)))


def loss(low: Lowering, variants: dict[str, Variant], whole: Lowering) -> float:
    """Divergence from the dense network's outputs on the samples that nothing was fitted on."""
    total = 0.0
    for (own, args, kwargs), (dense, _, _) in zip(low.scoring, whole.scoring, strict=True):
        with torch.no_grad():
            want = dense.graph(*args, **kwargs)
        found = low.simulator(own, args, kwargs, quantize_outputs=False)(variants)
        total += divergence(found, want, "auto")[0]
    return total


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("name", NAMES)
def test_refitting_lowers_the_loss_of_a_network_of_whole_widths(name: str, bits: int) -> None:
    low = made(name, bits)
    variants = uniform(low.network, "int8")
    own = refitted(low, variants)
    assert own.network.channels == low.network.channels
    assert loss(own, variants, low) < (0.8 if name == "cnn" else 0.95) * loss(low, variants, low)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_weights_lie_on_the_grid_of_their_variant(precision: str) -> None:
    low = made("cnn", 7)
    own = refitted(low, uniform(low.network, precision))
    assert own.replaced
    for unit, (weight, _) in own.replaced.items():
        again = stored(weight, low.network[unit], Variant(precision), 7)
        torch.testing.assert_close(torch.from_numpy(again.dequantized()), weight, rtol=1e-4, atol=1e-6)


def test_what_is_not_quantized_and_reads_nothing_that_is_stays() -> None:
    low = made("cnn")
    units = list(low.network.by_name)
    variants = {u: Variant("int8" if u == "conv3" else "fp32") for u in units}
    own = refitted(low, variants)
    assert own.replaced is not None
    assert set(own.replaced) == {"conv3", "head"}
    assert refitted(low, uniform(low.network, "fp32")) is low


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "transformer")) for n in NAMES])
def test_the_file_holds_refitted_weights_and_the_same_each_time(
    name: str, tmp_path: Path, own_locks: None
) -> None:
    low, chosen = made(name), replace(allocation(name, 1.0, "int8"), backend="simulated")
    backend = SimulatedBackend(LatencyLaw.random(low.network))
    first, again = (deploy(low.task, chosen, tmp_path / n, backend=backend) for n in ("a.onnx", "b.onnx"))
    assert first.path.read_bytes() == again.path.read_bytes()
    variants, own = parse_variants(chosen), first.setup.lowering
    nearest = made(name, own.int8_bits)
    assert loss(own, variants, nearest) < loss(nearest, variants, nearest)
    engine = backend.build(first.path.read_bytes(), first.setup.options)
    (want,) = leaves(
        own.simulator(own.traced, own.traced.args, own.traced.kwargs, quantize_outputs=False)(variants)
    )
    torch.testing.assert_close(torch.from_numpy(engine(*own.arrays())[0]), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("axes", ["precision", "both"])
def test_the_loss_of_a_unit_is_that_of_its_refitted_weight(axes: str) -> None:
    setup = set_up_simulated("cnn")
    low = setup.lowering
    grid = {g: [n, n // 2] for g, n in low.network.channels.items()} if axes == "both" else {}
    table = sensitivity_for(setup, None, grid=grid)
    bank = weight_bank(low, None, table.order or {g: range(n) for g, n in low.network.channels.items()})
    assert bool(table.order) == bool(grid)
    for unit in ("conv1", "head"):
        chosen = {unit: Variant("int8")}
        total = samples = 0.0
        for traced, args, kwargs in low.scoring:
            simulate = low.simulator(traced, args, kwargs, quantize_outputs=False)
            value, count = divergence(
                simulate(chosen, bank.masked_weights({}, chosen)), simulate.dense, "auto"
            )
            total, samples = total + value, samples + count
        assert table[unit, "dense.int8"] == pytest.approx(total / samples, rel=1e-3, abs=1e-9)


def test_uniform_allocations_are_refitted_where_they_are_scored(own_locks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up_simulated("cnn")
    session = Session(setup)
    _, measured = session.measure_all(None, uniform_candidates(setup, {}))
    assert not any(m.setup.lowering.replaced for m in measured.values())
    coarse = session.refitted(measured["dense.int8"])
    assert coarse.setup.lowering.replaced
    assert session.refitted(measured["dense.fp32"]) is measured["dense.fp32"]
    variants = uniform(setup.network, "int8")
    assert loss(coarse.setup.lowering, variants, setup.lowering) < loss(setup.lowering, variants, setup.lowering)
    scored = list[bool]()
    monkeypatch.setattr(Session, "_score", lambda self, m, what: float(scored.append(bool(m.setup.lowering.replaced)) or 1.0))
    for name in ("dense.int8", "dense.int8", "dense.fp32"):
        session.score(measured[name], name)
    assert scored == [True, False], "once each, with the weights that an allocation would have"


def test_an_allocation_of_floats_is_left_alone() -> None:
    setup = set_up_simulated("cnn")
    assert as_deployed(setup, allocation("cnn", 1.0, "fp32")) is setup


class Infinite(nn.Module):
    """`second` reads infinity, which is legal: what it gives there is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        odd = self.second(torch.where(x > 1e30, x, torch.inf))
        return self.last(torch.where(torch.isfinite(odd), odd, x))


def test_a_unit_that_reads_infinity_keeps_its_weight() -> None:
    torch.manual_seed(0)
    model, x = Infinite().eval(), torch.randn(32, 8)
    batches = [(trace(model, y), (y,), {}) for y in x.split(8)]
    variants = uniform(batches[0][0].network, "int8")
    found = refit_sequential(batches, {}, {}, variants)
    assert "second" not in found
    assert {"first", "last"} <= set(found)
    order = {g: np.arange(n) for g, n in batches[0][0].network.channels.items()}
    own = WeightBank(None, batches[0][0], batches, order)
    weight, _ = own.weight("second", {}, "int8")
    nearest = quantize_weight(model.second.weight, 0).dequantized()
    torch.testing.assert_close(weight, torch.from_numpy(nearest))
    assert all(bool(torch.isfinite(own.weight(u, {}, "int8")[0]).all()) for u in variants)


def test_a_refitted_allocation_is_read_from_the_folder_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deploy` and `verify` after `run` refit nothing; another allocation is refitted, a damaged file made again."""
    low = made("cnn")
    widths = {g: max(n // 2, 1) for g, n in low.network.channels.items()}
    variants = uniform(low.network, "int8")
    first = refitted(low, variants, widths, weight_bank(low, tmp_path))
    calls: list[Any] = []
    real = refitting.refit_sequential
    monkeypatch.setattr(refitting, "refit_sequential", lambda *a, **k: calls.append(a) or real(*a, **k))
    order = weight_bank(low, None).order

    def again(widths: dict[str, int]) -> Lowering:
        return refitted(low, variants, widths, weight_bank(low, tmp_path, order))

    second = again(widths)
    assert not calls
    assert second.onnx(variants).SerializeToString() == first.onnx(variants).SerializeToString()
    again({g: n for g, n in widths.items() if g == "stem"})
    assert len(calls) == 1
    for file in tmp_path.glob("*/allocations/*.safetensors"):
        file.write_bytes(b"damaged")
    again(widths)
    assert len(calls) == 2


def test_answers_take_their_weights_from_the_bank_of_the_sensitivities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted up again where it has the search's order of channels; else another bank is made. The same weights."""
    setup, chosen = set_up_simulated("cnn"), allocation("cnn", 0.5, "int8")
    order = {g: list(slots) for g, slots in chosen.slots.items()}
    known = weight_bank(setup.lowering, tmp_path / "known", order)
    _ = known.grams
    counted: list[Any] = []
    real = bank.Grams
    monkeypatch.setattr(bank, "Grams", lambda *a, **k: counted.append(a) or real(*a, **k))
    first = Refits(known, order).deployed(setup, chosen)
    assert not counted
    second = Refits(tmp_path / "other", order).deployed(setup, chosen)
    assert len(counted) == 1
    assert first.onnx(parse_variants(chosen)).SerializeToString() == second.onnx(parse_variants(chosen)).SerializeToString()
    assert list(tmp_path.glob("known/*/allocations/*.safetensors")), "deploy finds them there"
    turned = weight_bank(setup.lowering, tmp_path / "turned", {g: slots[::-1] for g, slots in order.items()})
    third = Refits(turned, order).deployed(setup, chosen)
    assert third.onnx(parse_variants(chosen)).SerializeToString() == second.onnx(parse_variants(chosen)).SerializeToString()

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwsearch.compress import bank as bank_module
from hwsearch.compress.bank import WeightBank
from hwsearch.compress.gram import Batch
from hwsearch.compress.importance import order_slots
from hwsearch.compress.quantize import activation_ranges, quantize_weight
from hwsearch.compress.simulate import Simulator
from hwsearch.compress.widths import narrow
from hwsearch.graph.trace import trace
from hwsearch.network.variants import Variant
from tests.architectures import BLOCKS
from tests.compress.test_compensate import small
from tests.networks import NETWORKS


def of(own: list[Batch], folder: Path | None = None) -> WeightBank:
    return WeightBank(folder, own[0][0], own, order_slots(own))


def half(own: list[Batch]) -> dict[str, int]:
    return {g: max(n // 2, 1) for g, n in own[0][0].network.channels.items()}


@pytest.mark.parametrize(
    "name", ["residual", "densenet", "inception", "transformer_encoder", "grouped", "unet", "gpt_block"]
)
def test_narrow_and_simulated_are_the_same_network(name: str) -> None:
    model, inputs = NETWORKS[name]()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    traced = trace(model.eval(), inputs)
    own: list[Batch] = [(traced, args, {})]
    bank, widths = of(own), half(own)
    assert widths
    slim = narrow(traced, bank.kept(widths), bank.assemble(widths))
    with torch.no_grad():
        have = slim.graph(*args)
    want = Simulator(traced, args, {}, {}, {})({}, bank.masked_weights(widths))[0]
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


def test_a_mean_over_channels_is_simulated_without_those_removed() -> None:
    torch.manual_seed(0)
    model, _ = BLOCKS["response_norm"](3, 8, random.Random(0))
    x = torch.randn(4, 3, 6, 6)
    traced = trace(model.eval(), x)
    own: list[Batch] = [(traced, (x,), {})]
    bank, widths = of(own), {"up": 3}
    slim = narrow(traced, bank.kept(widths), bank.assemble(widths))
    simulate = Simulator(traced, (x,), {}, {}, {})
    with torch.no_grad():
        have = slim.graph(x)
    want = simulate({}, bank.masked_weights(widths), bank.mask(widths))[0]
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(have, simulate({}, bank.masked_weights(widths))[0], rtol=1e-3, atol=1e-4)


def test_compensation_helps() -> None:
    own = small()
    traced = own[0][0]
    bank = of(own)
    simulate = Simulator(traced, own[0][1], {}, {}, {})
    for group, width in half(own).items():
        slim = narrow(traced, bank.kept({group: width}))
        with torch.no_grad():
            none = float((slim.graph(*own[0][1]) - simulate.dense[0]).square().mean())
        ours = float(
            (simulate({}, bank.masked_weights({group: width}))[0] - simulate.dense[0]).square().mean()
        )
        assert ours < 0.5 * none


def test_widths_are_nested_and_whole_ones_are_dense() -> None:
    own = small()
    bank, channels = of(own), own[0][0].network.channels
    for group, count in channels.items():
        kept = [set(bank.kept({group: w})[group]) for w in range(1, count + 1)]
        assert all(a < b for a, b in itertools.pairwise(kept))
    assert bank.assemble(channels) == {}


def test_int8_entries_lie_on_their_grid() -> None:
    own = small()
    traced = own[0][0]
    bank, widths = of(own), half(own)
    variants = {u.name: Variant("int8") for u in traced.network.units}
    weights, whole = bank.assemble(widths, variants), bank.masked_weights(widths, variants)
    assert set(weights) == set(whole) == set(variants)
    slim = narrow(traced, bank.kept(widths), weights)
    for unit, (weight, _) in weights.items():
        made = quantize_weight(weight, slim.network[unit].out_axis)
        np.testing.assert_allclose(made.dequantized(), weight.numpy(), rtol=1e-4, atol=1e-6)
    simulate = Simulator(traced, own[0][1], {}, {}, activation_ranges(own))
    error = simulate(variants, whole)[0] - simulate({}, bank.masked_weights(widths))[0]
    assert float(error.abs().mean()) < 0.1 * float(simulate.dense[0].abs().mean())


def test_a_bank_on_disk_is_the_same_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = small()
    widths, first = half(own), of(own, tmp_path)
    first.build({g: [w] for g, w in widths.items()}, ("fp32", "int8"))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert files
    lost, changed = files[0], {p: p.stat().st_mtime_ns for p in files[1:]}
    lost.unlink()
    again = of(own, tmp_path)
    again.build({g: [w] for g, w in widths.items()}, ("fp32", "int8"))
    assert lost.exists()
    assert changed == {p: p.stat().st_mtime_ns for p in files[1:]}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("refitted again")

    monkeypatch.setattr(bank_module, "refit", fail)
    monkeypatch.setattr(bank_module, "Grams", fail)
    start = time.perf_counter()
    last = of(own, tmp_path)
    for variants in ({}, {u.name: Variant("int8") for u in own[0][0].network.units}):
        for unit, (weight, bias) in last.assemble(widths, variants).items():
            torch.testing.assert_close(weight, first.assemble(widths, variants)[unit][0], rtol=0, atol=0)
            assert bias is not None
    assert time.perf_counter() - start < 1


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    own = small()
    widths = half(own)
    want = of(own, tmp_path).assemble(widths)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    have = of(own, tmp_path).assemble(widths)
    for unit, (weight, _) in want.items():
        torch.testing.assert_close(have[unit][0], weight)


def test_other_weights_orders_and_data_have_other_folders(tmp_path: Path) -> None:
    own = small()
    first = of(own, tmp_path)
    other = {g: o[::-1].copy() for g, o in first.order.items()}
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(4, 4)
    elsewhere: list[Batch] = [(trace(model, x), (x,), {})]
    keys = {
        first.key,
        WeightBank(tmp_path, own[0][0], own, other).key,
        WeightBank(tmp_path, own[0][0], own[:1], first.order).key,
        of(elsewhere).key,
    }
    assert len(keys) == 4
    assert of(small()).key == first.key

"""Deployed files on the real runtimes: really narrower, and the same network as the module."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from exact import bits
from networks import leaves
from torch.nn import functional as F

from hwsearch.allocate.allocation import Allocation
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.deployment.deploy import Deployed, deploy, parse_variants
from hwsearch.errors import IncompatibleTables
from hwsearch.graph.calls import as_call
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.variants import network_bytes

BACKENDS = {"onnxruntime": ONNXRuntimeBackend(), "openvino": OpenVINOBackend()}
NAMES = ("cnn", "transformer")


@cache
def order(name: str) -> dict[str, str]:
    found = weight_bank(tiny.lowering(name)).order
    return {g: " ".join(map(str, slots)) for g, slots in found.items()}


def allocation(name: str, share: float = 0.5, precision: str = "fp32", **changes: Any) -> Allocation:
    """Every group at a share of its width, every unit but the first in one precision."""
    network = tiny.lowering(name).network
    widths = {g: max(1, round(share * n)) for g, n in network.channels.items()}
    units = list(network.by_name)
    variants = {u: f"dense.{precision if i else 'fp32'}" for i, u in enumerate(units)}
    fields: dict[str, Any] = {
        "variants": variants, "widths": widths, "order": order(name) if share < 1 else {},
        "predicted": {"latency_ns": 1e6, "sigma_ns": 1e4, "size_bytes": 10**6, "macs": network.narrow(widths).macs, "loss": 0.1},
        "dense": {"latency_ns": 2e6, "size_bytes": 2 * 10**6},
        "budgets": [{"text": "macs=90%", "column": "macs", "limit": int(0.9 * network.macs)}],
        "solver": {"status": "optimal", "gap": 0.0}, "network": network.fingerprint,
        "weights_digest": network.weights_digest, "device": {}, "backend": "onnxruntime",
        "options": {"threads": 1, "base": "fp32", "batch": 1, "int8_bits": bits()},
    }  # fmt: skip
    return Allocation(**{**fields, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@cache
def _deployed(name: str, precision: str, folder: Path) -> Deployed:
    path = folder / f"{name}.{precision}.onnx"
    return deploy(tiny.task(name), allocation(name, precision=precision), path, weights=folder)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_computes_what_the_module_does(
    name: str, precision: str, backend: str, weights: Path
) -> None:
    done = _deployed(name, precision, weights)
    lowering = done.setup.lowering
    data = done.path.read_bytes()
    assert len(data) == done.size_bytes
    engine = BACKENDS[backend].build(data, BuildOptions(1, "fp32"))
    (have,) = engine(*lowering.arrays())
    (x,), _ = as_call(lowering.inputs)
    with torch.no_grad():
        want = done.module(x)
    if precision == "int8":
        quantize_outputs = done.setup.backend.quantize_outputs
        simulate = lowering.simulator(lowering.traced, (x,), {}, quantize_outputs=quantize_outputs)
        (want,) = leaves(simulate(parse_variants(done.allocation)))
    error = np.abs(have - want.numpy()).max() / float(want.abs().max())
    assert error < (1e-4 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_really_smaller(name: str, weights: Path, tmp_path: Path) -> None:
    done = _deployed(name, "fp32", weights)
    whole = deploy(tiny.task(name), allocation(name, 1.0), tmp_path / "whole.onnx")
    network, variants = tiny.lowering(name).network, parse_variants(done.allocation)
    saved = network_bytes(network, variants) - network_bytes(network.narrow(done.allocation.widths), variants)
    assert whole.size_bytes - done.size_bytes >= saved - 1000  # sizes that operators now state
    sizes = [sum(int(np.prod(t.dims)) for t in onnx.load(d.path).graph.initializer) for d in (whole, done)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_module_trains_and_takes_any_batch(name: str, weights: Path) -> None:
    done = _deployed(name, "fp32", weights)
    module = done.module
    assert isinstance(module, torch.nn.Module)
    x = tiny.inputs(name, 7)
    y = torch.arange(7) % tiny.CLASSES
    parameters = dict(module.named_parameters())
    network = tiny.lowering(name).network.narrow(done.allocation.widths)
    shapes = {tuple(p.shape) for p in parameters.values()}
    assert {u.weight_shape for u in network.units if u.weight_shape} <= shapes
    before = {k: v.clone() for k, v in tiny.task(name).model.state_dict().items()}
    fresh = deploy(tiny.task(name), done.allocation, weights / "fresh.onnx", weights=weights).module
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(fresh(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = tiny.task(name).model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the user's model was trained along"
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, parameters[n]) for n, p in fresh.named_parameters())
    with torch.no_grad():
        each = torch.cat([module(x[i : i + 1]) for i in range(7)])
        assert torch.allclose(module(x), each, atol=1e-5)


def test_refitted_weights_are_closer_than_those_just_cut(weights: Path) -> None:
    of = tiny.lowering("cnn")
    done = _deployed("cnn", "fp32", weights)
    kept = {g: sorted(slots[: done.allocation.widths[g]]) for g, slots in done.allocation.slots.items()}
    cut = of.narrow(kept)
    _, (x,), _ = of.calibration[1]
    with torch.no_grad():
        dense = of.task.model(x)
        off = [
            float((setup.calibration[1][0].graph(x) - dense).square().mean()) for setup in (done.setup.lowering, cut)
        ]
    assert off[0] < 0.5 * off[1]


def test_weights_are_kept_and_used_again(weights: Path, tmp_path: Path) -> None:
    done = _deployed("cnn", "fp32", weights)
    files = {p: p.stat().st_mtime_ns for p in weights.rglob("*.safetensors")}
    assert files
    again = deploy(tiny.task("cnn"), done.allocation, tmp_path / "again.onnx", weights=weights)
    assert {p: p.stat().st_mtime_ns for p in weights.rglob("*.safetensors")} == files
    assert again.path.read_bytes() == done.path.read_bytes()
    anew = deploy(tiny.task("cnn"), done.allocation, tmp_path / "anew.onnx")
    assert anew.size_bytes == done.size_bytes


def test_an_allocation_of_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(IncompatibleTables, match="other network"):
        deploy(tiny.task("cnn"), allocation("transformer"), out)
    with pytest.raises(IncompatibleTables, match="other weights"):
        deploy(tiny.task("cnn"), allocation("cnn", weights_digest="0"), out)
    other = {g: text for g, text in order("cnn").items() if g != "stem"}
    with pytest.raises(IncompatibleTables, match="channel groups"):
        deploy(tiny.task("cnn"), allocation("cnn", order=other), out)
    assert not out.exists()

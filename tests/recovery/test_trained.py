"""The file of trained weights: what is deployed from it, and what breaks an allocation is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovering
import torch
from exact import bits
from networks import leaves
from safetensors.torch import load_file, save_file

import hwsearch as hs
from hwsearch.allocate.allocation import Allocation
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.deployment.deploy import of_allocation, parse_variants, with_weights
from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.lowering.refitted import weight_bank
from hwsearch.network.variants import Variant, legal

pytestmark = pytest.mark.usefixtures("own_locks")


def allocation(share: float = 0.25, precision: str = "int8", pattern: str = "dense") -> Allocation:
    low = recovering.lowering()
    network, wanted = low.network, Variant(precision, pattern)
    widths = {g: max(1, round(share * n)) for g, n in network.channels.items()}
    order = weight_bank(low).order if share < 1 else {}
    return Allocation(
        variants={u.name: str(wanted if legal(u, [wanted]) else Variant("fp32")) for u in network.units}, widths=widths,
        order={g: " ".join(map(str, slots)) for g, slots in order.items()},
        predicted={"latency_ns": 1e6, "sigma_ns": 1e4, "size_bytes": 10**6, "macs": network.macs, "loss": 0.1},
        dense={"latency_ns": 2e6, "size_bytes": 2 * 10**6}, budgets=[{"text": "macs=90%", "column": "macs", "limit": network.macs}],
        solver={"status": "optimal", "gap": 0.0}, network=network.fingerprint, weights_digest=network.weights_digest, device={},
        backend="onnxruntime", options={"threads": 1, "base": "fp32", "batch": 1, "int8_bits": bits()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "trained.safetensors"
    done = hs.recover(recovering.task(), allocation(), out, epochs=4, rate=2e-3)
    assert done.better
    assert done.score.keys() == {"dense", "refitted", "recovered"}
    return out


def test_the_deployed_file_has_exactly_the_trained_weights(file: Path, tmp_path: Path) -> None:
    task, chosen = recovering.task(), allocation()
    deployed = hs.deploy(task, chosen, tmp_path / "m.onnx", weights=file)
    low, tensors = deployed.setup.lowering, load_file(file)
    for unit in low.network.units:
        path = low.traced.paths[unit.name][0]
        assert path is not None
        values = low.weights[unit.name, Variant("int8")].dequantized()
        assert np.allclose(values, tensors[path].numpy(), rtol=0, atol=1e-6 * float(tensors[path].abs().max()))
    engine = ONNXRuntimeBackend().build(deployed.path.read_bytes(), BuildOptions(1, "fp32"))
    x, _ = recovering.images(1, seed=5)
    (want,) = leaves(low.simulator(low.traced, (x,), {}, quantize_outputs=True)(parse_variants(chosen)))
    assert np.allclose(engine(x.numpy())[0], want.numpy(), atol=1e-3 * float(want.abs().max()))
    refitted = hs.deploy(task, chosen, tmp_path / "r.onnx")
    assert refitted.path.read_bytes() != deployed.path.read_bytes()
    assert abs(refitted.size_bytes - deployed.size_bytes) < 200


def test_the_state_of_a_module_trained_in_a_loop_of_ones_own_comes_back(tmp_path: Path) -> None:
    task, chosen = recovering.with_data(), allocation()
    module = hs.deploy(task, chosen, tmp_path / "m.onnx").module
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    assert task.train is not None
    for x, y in list(task.train(0))[:3]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    deployed = hs.deploy(task, chosen, tmp_path / "n.onnx", weights=tmp_path / "own.safetensors")
    x, _ = recovering.images(8, seed=5)
    with torch.no_grad():
        assert torch.allclose(deployed.module(x), module(x), atol=1e-6)


def _changed(file: Path, out: Path, change: Any) -> Path:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, out)
    return out


def _narrower(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv1.weight"] = tensors["conv1.weight"][:-1].clone()


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["conv2.bias"]


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.running_mean"] = torch.zeros(4)


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_narrower, r"conv1\.weight in .* has shape \(5, 4, 3, 3\), and the allocation leaves \(6, 4, 3, 3\)"),
        (_without, r"lacks conv2\.bias"),
        (_unknown, r"holds norm\.running_mean, which the network has no tensor of.*BatchNorm is folded"),
        (_not_a_number, r"head\.weight in .* holds NaN"),
    ],
)
def test_weights_that_break_the_allocation_are_refused_by_name(change: Any, message: str, file: Path, tmp_path: Path) -> None:
    broken = _changed(file, tmp_path / "broken.safetensors", change)
    with pytest.raises(IncompatibleTables, match=message):
        with_weights(of_allocation(recovering.task(), allocation()), allocation(), broken)


def test_weights_outside_of_a_pattern_are_refused(tmp_path: Path) -> None:
    chosen, task = allocation(1.0, "fp16", "2:4"), recovering.task()
    setup = of_allocation(task, chosen)
    own = with_weights(setup, chosen, None).lowering
    student = {p: t for p, t in own.traced.graph.state_dict().items() if t.is_floating_point()}
    held = {str(n.target) for n in own.traced.graph.graph.nodes if n.op == "get_attr"}
    good = {p: t.clone() for p, t in student.items() if p in held}
    save_file(good, tmp_path / "good.safetensors")
    with_weights(setup, chosen, tmp_path / "good.safetensors")
    good["conv2.weight"][0, :, 0, 0] = 1.0
    save_file(good, tmp_path / "bad.safetensors")
    with pytest.raises(IncompatibleTables, match=r"conv2\.weight in .* violates the pattern of its unit: conv2 is 2:4\.fp16"):
        with_weights(setup, chosen, tmp_path / "bad.safetensors")


def test_weights_of_another_allocation_are_refused(file: Path) -> None:
    other = allocation(0.5)
    with pytest.raises(IncompatibleTables, match="trained for something else: other allocation"):
        with_weights(of_allocation(recovering.task(), other), other, file)


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    setup = of_allocation(recovering.task(), allocation())
    with pytest.raises(InvalidInput, match="does not exist"):
        with_weights(setup, allocation(), tmp_path / "absent.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "t.safetensors").write_bytes(b"\x08\x00nonsense")
    with pytest.raises(InvalidInput, match="no file of trained weights, or damaged"):
        with_weights(setup, allocation(), tmp_path / "t.safetensors")

"""Units: the layers of the model, each parameter counted once, under names that runtimes can list."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import nn

from hwsearch.graph.calls import as_call
from hwsearch.graph.trace import trace


def counted(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Multiply-accumulates of each module, by hooks."""
    macs: dict[str, int] = {}

    def hook(name: str) -> Any:
        def count(module: Any, args: Any, out: torch.Tensor) -> None:
            if isinstance(module, nn.Linear):
                own = out.numel() * module.in_features
            elif isinstance(module, nn.ConvTranspose2d):
                own = args[0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
            else:
                own = out.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
            macs[name] = macs.get(name, 0) + own

        return count

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.register_forward_hook(hook(name))
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return macs


@pytest.mark.parametrize(
    "name", ["mlp", "one_dimensional", "grouped", "residual", "inception", "unet", "transposed_grouped", "mobilenet_v3",
             "shared_linear", "pyramid", "three_dimensional", "convnext", "squeeze_excite"],
)  # fmt: skip
def test_units_are_the_layers_with_their_macs(name: str) -> None:
    model, inputs = NETWORKS[name]()
    network = trace(model, inputs).network
    assert {u.name: u.macs for u in network.units} == counted(model, inputs)
    assert [u.calls for u in network.units if u.name == "shared"] in ([], [2])


@pytest.mark.parametrize(
    "name",
    ["mlp", "grouped", "residual", "inception", "mobilenet_v3", "unet", "shared_linear", "vit", "norms"],
)
def test_every_parameter_is_counted_once(name: str) -> None:
    model, inputs = NETWORKS[name]()
    network = trace(model, inputs).network
    weights = sum(4 * u.weight_count for u in network.units)
    total = network.fixed_bytes + weights + sum(u.other_bytes for u in network.units)
    parameters = sum(4 * p.numel() for p in model.parameters())
    assert weights <= total
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        assert total == parameters


def test_a_weight_that_an_embedding_reads_too_is_stored_once() -> None:
    model, inputs = NETWORKS["gpt_block"]()
    network = trace(model, inputs).network
    assert network["head"].weight_shape == (20, 16)
    assert network["head"].tied
    assert [u.name for u in network.units if u.op == "embedding"] == []


def test_names_hold_no_separator_and_are_unique() -> None:
    names = [u.name for u in trace(*NETWORKS["nested_names"]()).network.units]
    assert not any(set(name) & set("|,~ ") for name in names)
    assert len(set(names)) == len(names) == 8

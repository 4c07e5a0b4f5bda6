from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, leaves
from torch import nn

from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.trace import as_call, flat_inputs, trace

OFFLINE = [n for n in NETWORKS if not n.startswith("hf_")]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_graph_computes_the_model_and_leaves_it_as_it_was(name: str) -> None:
    model, inputs = NETWORKS[name]()
    model.train()
    next(model.modules()).training = False
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    traced = trace(model, inputs)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        want, have = leaves(model.eval()(*args, **kwargs)), leaves(traced.graph(*args, **traced.kwargs))
    assert len(want) == len(have)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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


def test_a_weight_that_an_embedding_reads_too_is_stored_for_both() -> None:
    model, inputs = NETWORKS["gpt_block"]()
    network = trace(model, inputs).network
    assert network["head"].weight_shape == (20, 16)
    assert network.fixed_bytes >= 4 * 20 * 16


def test_names_hold_no_separator_and_are_unique() -> None:
    names = [u.name for u in trace(*NETWORKS["nested_names"]()).network.units]
    assert not any(set(name) & set("|,~ ") for name in names)
    assert len(set(names)) == len(names) == 8


def test_inputs_by_position_or_by_name() -> None:
    model, inputs = NETWORKS["kwargs_out_of_order"]()
    traced = trace(model, inputs)
    x, y = inputs["x"], inputs["y"]
    for args, kwargs in [((), inputs), ((x, y), {}), ((x,), {"y": y})]:
        flat = flat_inputs(traced.graph, args, kwargs)
        assert flat[0] is x
        assert flat[1] is y
    for args, kwargs in [((x,), {}), ((x, y, x), {}), ((x, y), {"z": x})]:
        with pytest.raises(InvalidInput, match="traced with"):
            flat_inputs(traced.graph, args, kwargs)


def test_no_layers() -> None:
    with pytest.raises(UntraceableModel, match="no layer"):
        trace(nn.ReLU(), torch.randn(2, 4))


def test_buffers_that_the_model_writes_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.fc(x)

    model = Counts()
    traced = trace(model, torch.randn(2, 4))
    assert float(model.calls) == 0
    traced.graph(torch.randn(2, 4))
    assert float(model.calls) == 0


OPS = ("conv", "relu", "add", "cat", "pool")


@st.composite
def graphs(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...]]]:
    """Nodes (operator, indices of earlier nodes); node 0 is the input."""
    steps: list[tuple[str, tuple[int, ...]]] = [("input", ()), ("conv", (0,))]
    for _ in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(OPS))
        count = 2 if op in ("add", "cat") else 1
        steps.append((op, tuple(draw(st.integers(0, len(steps) - 1)) for _ in range(count))))
    return steps


class Drawn(nn.Module):
    def __init__(self, steps: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.steps = steps
        width: list[int] = []
        for index, (op, reads) in enumerate(steps):
            if op == "conv":
                self.add_module(f"c{index}", nn.Conv2d(width[reads[0]], 2, 1))
            width.append(
                {"input": 2, "conv": 2, "cat": sum(width[r] for r in reads)}.get(
                    op, width[reads[0]] if reads else 2
                )
            )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for index, (op, reads) in enumerate(self.steps[1:], 1):
            a = [values[r] for r in reads]
            values.append(
                self.get_submodule(f"c{index}")(a[0]) if op == "conv"
                else a[0].relu() if op == "relu"
                else a[0] + a[1].mean(1, keepdim=True) if op == "add"
                else torch.cat(a, 1) if op == "cat"
                else torch.nn.functional.max_pool2d(a[0], 3, 1, 1)
            )  # fmt: skip
        return values[1:]


@settings(max_examples=15, deadline=None)
@given(graphs())
def test_edges_are_the_paths_without_a_unit_between(steps: list[tuple[str, tuple[int, ...]]]) -> None:
    network = trace(Drawn(steps), torch.randn(1, 2, 4, 4)).network
    edges = {(e.src, e.dst) for e in network.edges}
    reach: list[set[str]] = []
    paths: set[tuple[str, str]] = set()
    meet: set[tuple[str, str]] = set()  # units whose outputs come together in an add
    for index, (op, reads) in enumerate(steps):
        sources = set().union(*(reach[r] for r in reads)) if reads else set()
        if op == "conv":
            paths |= {(s, f"c{index}") for s in sources}
            sources = {f"c{index}"}
        if op == "add":
            meet |= set(itertools.permutations(sources, 2))
        reach.append(sources)
    assert edges <= paths | meet
    after = {u: {v for s, v in edges if s == u} for u in network.by_name}
    for src, dst in paths:
        found, todo = {src}, [src]
        while todo:
            new = after[todo.pop()] - found
            found |= new
            todo += new
        assert dst in found
    if not any(op == "add" for op, _ in steps):
        assert edges == paths

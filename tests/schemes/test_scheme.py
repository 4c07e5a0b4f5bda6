"""Free parameters, Compose, tasks: values go where they belong, and what is wrong is said before anything changes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import profiling
import pytest
import tiny
import torch
from oracles import follows
from torch import nn

import hwsearch as hs
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.errors import InvalidInput
from hwsearch.loss.sensitivity import sensitivity_for
from hwsearch.loss.table import SensitivityTable
from hwsearch.lowering.lowering import Lowering
from hwsearch.network.variants import uniform
from hwsearch.schemes import (
    NM,
    Allocate,
    Balanced,
    BlockPrune,
    Compose,
    FilterPrune,
    Free,
    NeuronPrune,
    Prune,
    Quantize,
    StructurePrune,
)
from hwsearch.table.table import LatencyTable

BITS = Free("bits", 2, 8, whole=True)


def test_free_parameters_are_named_and_shared_by_name() -> None:
    scheme = Compose(FilterPrune(Free("filters")), Prune(), Balanced(block=4), Quantize(BITS))
    assert [f.name for f in scheme.parameters] == ["filters", "density", "bits"]
    bound = scheme.bind(density=0.25, bits=4)
    assert bound == Compose(FilterPrune(Free("filters")), Prune(0.25), Balanced(0.25, 4), Quantize(4))
    assert [f.name for f in bound.parameters] == ["filters"]
    assert scheme.parameters == Compose(FilterPrune(Free("filters")), Prune(), Balanced(), Quantize(BITS)).parameters
    assert Compose(Compose(Prune()), Quantize()).bind(density=1) == Compose(Compose(Prune(1)), Quantize())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(1.5), "density is 1.5; expected a number from 0 to 1"),
        (lambda: Prune(True), "density is True; expected a number"),
        (lambda: Prune(float("nan")), "density is nan"),
        (lambda: Prune("half"), "density is 'half'"),
        (lambda: Prune(Free("density", 0, 2)), "density may be numbers from 0 to 1"),
        (lambda: BlockPrune(0.5, (0, 4)), r"block is \(0, 4\); expected two whole numbers above 0"),
        (lambda: NM(4, 4), "n is 4; expected a whole number from 1 to 3"),
        (lambda: NM(1, 1), "m is 1; expected a whole number of at least 2"),
        (lambda: Balanced(0.5, 1), "block is 1; expected a whole number of at least 2"),
        (lambda: StructurePrune(0.5, align=0), "align is 0; expected a whole number of at least 1"),
        (lambda: Quantize("int9"), "dtype is 'int9'; expected bf16, fp16, int2 to int8, or a number of bits"),
        (lambda: Quantize(Free("bits", 2, 8)), "dtype may be whole numbers from 2 to 8"),
        (lambda: Free("my density"), "expected a Python name"),
        (lambda: Free("d", 1, 1), "d may be from 1 to 1; expected a number and a larger one"),
        (lambda: Compose(), "at least one scheme; write e.g. Compose"),
        (lambda: Compose(Prune(), 3), "Compose takes schemes, got int"),
        (lambda: Compose(Prune(), Prune(Free("density", 0, 0.5))), "give one range, or two names"),
        (lambda: Allocate("t.parquet", "s.parquet"), "Allocate bounds nothing; give a share of one of latency, size"),
        (lambda: Allocate("t.parquet", "s.parquet", latency=0.0), "latency is 0; expected a share above 0"),
        (lambda: Allocate("t.parquet", "s.parquet", latency=1.2), "latency is 1.2; expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_wrong_numbers_are_refused_when_they_are_given() -> None:
    scheme, task = Compose(Prune(), Quantize(BITS)), tiny.task("cnn")
    with pytest.raises(InvalidInput, match=r"no number is given for bits; free are density \(0 to 1\), bits \(2 to 8\)"):
        scheme(task, density=0.5)
    with pytest.raises(InvalidInput, match=r"no free parameter 'ratio'; free are density"):
        scheme(task, ratio=0.5)
    with pytest.raises(InvalidInput, match="no free parameter 'density'; all of its numbers are given"):
        Prune(0.5)(task, density=0.5)
    with pytest.raises(InvalidInput, match=r"bits is 4.5; expected a whole number from 2 to 8"):
        scheme(task, density=0.5, bits=4.5)
    with pytest.raises(InvalidInput, match="applied to a Task, got CNN; `in_place` takes a module"):
        scheme(task.model, density=0.5, bits=4)  # type: ignore[arg-type]


def test_where_a_later_step_fails_the_module_stays_as_it_was() -> None:
    model = tiny.CNN().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InvalidInput, match="no layer for NM"):
        Compose(Prune(0.1), NM(1, 64)).in_place(model, tiny.inputs("cnn", 1))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_task_stays_and_its_copy_deploys_with_the_zeros() -> None:
    task = tiny.task("cnn")
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    small = Compose(Prune(), Quantize("int8"))(task, density=0.2)
    assert small.values == {"density": 0.2}
    assert all(torch.equal(t, before[n]) for n, t in task.model.state_dict().items())
    assert type(small.task.model) is type(task.model)
    module = tiny.CNN().eval()
    module.load_state_dict(before)
    left = Compose(Prune(0.2), Quantize("int8")).in_place(module, task.example_inputs)
    assert left == small.footprint
    assert all(torch.equal(t, small.task.model.state_dict()[n]) for n, t in module.state_dict().items())

    lowering = Lowering(small.task)
    held = [lowering.traced.weight(u.name) for u in lowering.network.units]
    assert sum(int(w.count_nonzero()) for w in held if w is not None) == left.nonzero
    data = lowering.onnx(uniform(lowering.network, "fp32")).SerializeToString()
    engine = ONNXRuntimeBackend().build(data, BuildOptions(1, "fp32"))
    x = tiny.inputs("cnn", 1)
    with torch.no_grad():
        assert np.allclose(engine(x.numpy())[0], small.task.model(x).numpy(), atol=1e-4)


def test_a_pattern_after_filters_holds_in_the_narrow_network_that_is_deployed() -> None:
    """Of the channels that are left, not of those that were."""
    small = Compose(FilterPrune(0.6, align=4), NM(2, 4), Quantize("int8"))(tiny.task("cnn"))
    low = Lowering(small.task)
    for unit in low.network.units:
        weight = low.traced.weight(unit.name)
        assert weight is not None
        if unit.name == "stem":  # three input channels
            assert unit.name in small.footprint.left_out
        else:
            assert follows(weight, 1, 2, 4), unit.name
            assert weight.count_nonzero() == weight.numel() // 2
        assert small.footprint.densities[unit.name] * weight_count(unit.name) == pytest.approx(int(weight.count_nonzero()))
    assert small.footprint.widths == low.network.channels


def weight_count(unit: str) -> int:
    return tiny.lowering("cnn").network[unit].weight_count


def test_order_matters_and_is_that_of_the_call() -> None:
    task, x = tiny.task("cnn"), tiny.inputs("cnn", 1)
    first, then = Balanced(0.5, 4), Prune(0.25)
    models = []
    for steps in ([first, then], [then, first]):
        one, by_one = tiny.CNN().eval(), tiny.CNN().eval()
        for model in (one, by_one):
            model.load_state_dict(task.model.state_dict())
        Compose(*steps).in_place(one, x)
        for step in steps:
            step.in_place(by_one, x)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), by_one.parameters(), strict=True))
        models.append(one)
    assert not torch.equal(models[0].conv1.weight, models[1].conv1.weight)


def test_computed_weights_stay_and_are_named() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    left = Prune(0.5).in_place(model, torch.randn(1, 8))
    assert left.nonzero == 16
    assert [name for name, why in left.left_out.items() if "no parameter of the module but computed" in why]
    with pytest.raises(InvalidInput, match="no channel group for NeuronPrune"):
        NeuronPrune(0.5).in_place(model, torch.randn(1, 8))


@cache
def tables() -> tuple[LatencyTable, SensitivityTable]:
    setup = profiling.narrow_setup()
    table = profiling.run_widths(setup, None, builds=14)
    return table, sensitivity_for(setup, None, grid=table.grid())


def test_one_number_and_the_search_decides_every_layer() -> None:
    task, (table, losses) = tiny.task("cnn"), tables()
    scheme = Allocate(table, losses, latency=Free("share"))
    found = scheme(task, share=0.5)
    assert found.allocation is not None
    assert found.allocation.variants == hs.search(table, losses, ["latency=50%"]).variants
    assert found.allocation.predicted["latency_ns"] <= 0.5 * found.allocation.dense["latency_ns"]
    assert found.footprint.nonzero_bytes < found.footprint.dense_bytes
    assert found.footprint.widths == found.allocation.widths
    whole = scheme(task, share=1.0)
    x = tiny.inputs("cnn", 3)
    with torch.no_grad():
        torch.testing.assert_close(whole.task.model(x), task.model(x), rtol=1e-4, atol=1e-5)
    assert whole.footprint.nonzero_bytes == whole.footprint.dense_bytes
    pruned = Compose(scheme, Prune())(task, share=0.5, density=0.5)
    count = sum(u.weight_count for u in Lowering(found.task).network.units)
    assert pruned.footprint.nonzero == count // 2
    assert found.footprint.nonzero <= count  # some are rounded to zero
    assert pruned.footprint.weights == found.footprint.weights


def test_allocate_comes_first_and_takes_a_task() -> None:
    table, losses = tables()
    with pytest.raises(InvalidInput, match="let it come first"):
        Compose(Prune(0.5), Allocate(table, losses, latency=0.5))(tiny.task("cnn"))
    with pytest.raises(InvalidInput, match="apply the scheme to a Task"):
        Allocate(table, losses, latency=0.5).in_place(tiny.CNN().eval(), tiny.inputs("cnn", 1))

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tiny
from exact import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from simulation import chain, grouped

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.nodenames import unit_of
from hwsearch.backends.openvino import OpenVINOBackend
from hwsearch.errors import InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.parts import cut
from hwsearch.network.network import Edge, Network, Unit
from hwsearch.network.sandwich import MOST, contexts, filling, largest, neighbours, plan
from hwsearch.network.variants import Variant
from hwsearch.task import Task


@st.composite
def networks(draw: st.DrawFn) -> Network:
    count = draw(st.integers(1, 14))
    units = [
        Unit(f"u{i}", "linear", ((1, 8),), (1, draw(st.sampled_from([8, 16]))), macs=draw(st.integers(1, 9)))
        for i in range(count)
    ]
    edges = {(i - 1, i): "" for i in range(1, count)}
    for _ in range(draw(st.integers(0, 5)) if count > 1 else 0):
        i, j = sorted(draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True)))
        edges[i, j] = draw(st.sampled_from(["", "pool"]))
    return Network(
        tuple(units),
        tuple(Edge(f"u{i}", f"u{j}", 32, (via,) if via else ()) for (i, j), via in edges.items()),
    )


@given(networks())
@settings(max_examples=60, deadline=None)
def test_every_context_is_the_filling_of_a_sandwich(network: Network) -> None:
    found, beside = plan(network), neighbours(network)
    assert {contexts(network)[u] for s in found for u in s.filling} == set(contexts(network).values())
    for sandwich in found:
        assert sandwich.filling == filling(network, sandwich.units)
        assert all(beside[u] <= set(sandwich.units) for u in sandwich.filling)
        alone = max(len(beside[u]) + 1 for u in sandwich.filling)
        assert len(sandwich.units) <= max(MOST, alone)
        assert len(sandwich.units) < len(network.units) or alone == len(network.units)
    assert plan(network) == found
    assert largest(network, found) in found


def test_fewer_sandwiches_than_units() -> None:
    network = chain(32, kinds=32)
    assert len(plan(network)) <= 16
    assert len(plan(chain(32, kinds=4))) <= 4


def test_what_follows_a_unit_is_a_part_of_its_context() -> None:
    network = grouped()
    passed = Network(network.units, tuple(Edge(e.src, e.dst, 1, ("pool",)) for e in network.edges))
    assert contexts(network)["conv0"][0] == contexts(passed)["conv0"][0]
    assert contexts(network)["conv0"] != contexts(passed)["conv0"]


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_part_computes_what_the_network_does_there(name: str, precision: str) -> None:
    """Fed with what the whole network has at the cut, a part returns what the whole one has at its end."""
    made, backend = Lowering(tiny.task(name), int8_bits=bits()), OpenVINOBackend()
    for sandwich in plan(made.network):
        marked = cut(made.marked, sandwich.units, sandwich.filling)
        variants = {u: Variant(precision) for u in sandwich.units}
        model = made.assemble(marked, variants)
        onnx.checker.check_model(model, full_check=True)
        plain = made.assemble(made.marked, {u.name: Variant("fp32") for u in made.network.units})
        wanted = [v.name for v in model.graph.input] + [v.name for v in model.graph.output]
        seen = _tensors(made, plain, marked, wanted)
        given = [seen[v.name] for v in model.graph.input]
        engine = backend.build(model.SerializeToString(), BuildOptions())
        for spec, have in zip(model.graph.output, engine(*given), strict=True):
            error = np.abs(have - seen[spec.name]).max() / np.abs(seen[spec.name]).max()
            assert error < (1e-4 if precision == "fp32" else 0.2), (sandwich, spec.name)
        assert len(engine.inputs) < 4


def _tensors(made, plain, marked, names):  # type: ignore[no-untyped-def]
    """Tensors of the network in fp32 by name, markers followed to what they mark."""
    stands = {n.output[0]: n.input[0] for n in made.marked.graph.node if n.op_type == "Mark"}

    def real(name: str) -> str:
        return real(stands[name]) if name in stands else name

    arrays = dict(zip([v.name for v in plain.graph.input], made.arrays(), strict=True))
    outputs = {v.name for v in plain.graph.output}
    made_by = {o for n in plain.graph.node for o in n.output}
    asked = {n: next(x for x in (n, real(n)) if x in made_by | set(arrays)) for n in names}
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    known = {v.name: v for v in made.marked.graph.value_info}
    for name in sorted(set(asked.values()) - outputs - set(arrays)):
        value = onnx.ValueInfoProto()
        value.CopyFrom(known[name])
        model.graph.output.append(value)
    from onnx.reference import ReferenceEvaluator

    order = [v.name for v in model.graph.output]
    found = dict(zip(order, ReferenceEvaluator(model).run(None, arrays), strict=True)) | arrays
    return {n: found[x] for n, x in asked.items()}


@pytest.mark.parametrize("name", ["unet", "gpt_block", "nested_names", "shared_linear"])
def test_parts_of_other_networks_run(name: str) -> None:
    model, inputs = NETWORKS[name]()
    made = Lowering(Task(model, inputs, [inputs, inputs], lambda predict: 0.0, name))
    for sandwich in plan(made.network):
        marked = cut(made.marked, sandwich.units, sandwich.filling)
        for precision in ("fp32", "int8"):
            part = made.assemble(marked, {u: Variant(precision) for u in sandwich.units})
            onnx.checker.check_model(part, full_check=True)
            engine = OpenVINOBackend().build(part.SerializeToString(), BuildOptions())
            assert engine(*[np.zeros(s.shape, s.dtype) for s in engine.inputs])
            assert {unit_of(n.name)[0] for n in part.graph.node if unit_of(n.name)[1]} == set(sandwich.units)


def test_what_cannot_be_cut_says_so() -> None:
    made = tiny.lowering("cnn")
    vague = onnx.ModelProto()
    vague.CopyFrom(made.marked)
    del vague.graph.value_info[:]
    with pytest.raises(InvalidInput, match="--mode context"):
        cut(vague, ("conv2", "conv3", "head"), ("conv3", "head"))

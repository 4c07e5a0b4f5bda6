from __future__ import annotations

import numpy as np
import pytest

from hwsearch.backends.base import Backend, BuildOptions
from hwsearch.engine.attribution import attribute, executed_precisions
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import tensor_names
from hwsearch.network.variants import Variant, uniform
from hwsearch.testing import BackendContract, LatencyLaw, SimulatedBackend
from hwsearch.testing.contract import mixed, small_network, wherever

NETWORKS = ("residual", "attention", "two_inputs")


MORE = ("2:4.int8", "2:4.fp8", "dense.fp8", "dense.int4", "dense.nvfp4")


def simulated(lowering: Lowering, **options: object) -> SimulatedBackend:
    precisions = ("fp32", "bf16", "int8", "fp8", "int4", "nvfp4", "2:4.int8", "2:4.fp8")
    law = LatencyLaw.random(lowering.network, precisions=precisions)
    return SimulatedBackend(law, bases=("fp32",), **options)  # type: ignore[arg-type]


class TestSimulated(BackendContract):
    @pytest.fixture
    def backend(self) -> SimulatedBackend:
        return simulated(small_network("residual"), more=MORE)

    def backend_for(self, backend: Backend, lowering: Lowering) -> Backend:
        return simulated(lowering, more=MORE)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_takes_what_the_law_says_of_the_allocation(name: str) -> None:
    lowering = small_network(name)
    backend = simulated(lowering)
    setup = Setup(lowering, backend, BuildOptions(1, "fp32"))
    for variants in (uniform(setup.network, "fp32"), uniform(setup.network, "int8"), mixed(lowering, "fp32")):
        engine, model = setup.build(variants)
        start = backend.clock()
        engine.run()
        law = backend.law.time_ns({unit: v.precision for unit, v in variants.items()})
        assert backend.clock() - start == pytest.approx(law, abs=1)
        nodes = engine.nodes()
        assert sum(n.time_ns for n in nodes) == pytest.approx(law)
        rows = attribute(nodes, setup.network, tensor_names(model))
        assert executed_precisions(rows, setup.network) == tuple(v.precision for v in variants.values())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", MORE)
def test_what_is_executed_is_read_from_types_and_zeros(name: str, variant: str) -> None:
    lowering = small_network(name)
    setup = Setup(lowering, simulated(lowering, more=MORE), BuildOptions(1, "fp32"))
    for variants in (
        wherever(lowering, "fp32", Variant.parse(variant)),
        mixed(lowering, "fp32", Variant.parse(variant)),
    ):
        engine, model = setup.build(variants)
        rows = attribute(engine.nodes(), setup.network, tensor_names(model))
        assert executed_precisions(rows, setup.network) == tuple(v.executed for v in variants.values())


def test_half_of_the_boundaries_are_nodes_of_their_own_and_lead_to_the_consumer() -> None:
    lowering = small_network("residual")
    setup = Setup(lowering, simulated(lowering), BuildOptions())
    variants = mixed(lowering, "fp32")
    int8 = {unit for unit, v in variants.items() if v.quantized}
    engine, model = setup.build(variants)
    rows = attribute(engine.nodes(), setup.network, tensor_names(model))
    converted = [row.units for row in rows if row.kind == "edge"]
    crossed = [(e.src in int8) != (e.dst in int8) for e in setup.network.edges]
    assert converted == [(e.dst,) for i, e in enumerate(setup.network.edges) if i % 2 == 0 and crossed[i]]
    assert 0 < len(converted) < sum(crossed)


def test_a_refused_unit_executes_in_the_base_and_says_so() -> None:
    lowering = small_network("residual")
    setup = Setup(lowering, simulated(lowering, refused=("conv1",)), BuildOptions())
    engine, model = setup.build(uniform(setup.network, "int8"))
    executed = executed_precisions(attribute(engine.nodes(), setup.network, tensor_names(model)), setup.network)
    assert dict(zip(setup.network.by_name, executed, strict=True)) == {
        u.name: "fp32" if u.name == "conv1" else "int8" for u in setup.network.units
    }


def test_noise_is_seeded_and_drift_is_slow() -> None:
    lowering = small_network("residual")

    def times(**options: object) -> np.ndarray:
        setup = Setup(lowering, backend := simulated(lowering, **options), BuildOptions())
        engine, _ = setup.build(uniform(setup.network, "fp32"))
        marks = [backend.clock()]
        for _ in range(400):
            engine.run()
            marks.append(backend.clock())
        return np.diff(marks)

    exact = times()[0]
    noisy = times(noise=0.02)
    assert np.array_equal(noisy, times(noise=0.02))
    assert not np.array_equal(noisy, times(noise=0.02, seed=1))
    assert np.median(noisy) == pytest.approx(exact, rel=0.005)
    assert np.std(noisy) / exact == pytest.approx(0.02, rel=0.2)
    drifting = times(drift=lambda s: 1.0 + 10.0 * s)
    assert np.all(np.diff(drifting) >= -1)
    assert drifting[-1] > 1.2 * drifting[0]
    assert times(build_noise=0.1)[0] != exact


def test_failing_builds_fail_by_number() -> None:
    lowering = small_network("residual")
    setup = Setup(lowering, simulated(lowering, failing=(1,)), BuildOptions())
    setup.build(uniform(setup.network, "fp32"))
    with pytest.raises(BackendUnavailable, match="build 1"):
        setup.build(uniform(setup.network, "fp32"))
    setup.build(uniform(setup.network, "fp32"))

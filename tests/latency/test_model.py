from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulation import (
    OFFERED,
    alone_table,
    chain,
    grouped,
    random_variants,
    simulated_build,
    simulated_table,
)

from hwsearch.errors import InvalidInput
from hwsearch.latency.model import LatencyModel, Prediction, fit, layer_sum, noise_floor, validate
from hwsearch.latency.regression import Equations
from hwsearch.network.choices import candidate_widths
from hwsearch.network.network import Network
from hwsearch.network.variants import Variant, uniform
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK = chain(16)
LAW = LatencyLaw.random(NETWORK, 1)


def _law_ns(variants: dict[str, Variant]) -> float:
    return LAW.time_ns({unit: v.precision for unit, v in variants.items()})


def _errors(model: LatencyModel, count: int = 60, seed: int = 99) -> np.ndarray:
    rng = np.random.default_rng(seed)
    allocations = [random_variants(NETWORK, rng) for _ in range(count)]
    return np.array([abs(model.predict(a).time_ns / _law_ns(a) - 1.0) for a in allocations])


def test_a_law_without_noise_is_recovered() -> None:
    model = fit(simulated_table(NETWORK, LAW))
    assert np.median(_errors(model)) < 0.005
    assert np.max(_errors(model)) < 0.03


def test_held_out_error_and_ranking_under_noise() -> None:
    errors, taus = [], []
    for seed in range(5):
        table = simulated_table(NETWORK, LAW, heldout=12, noise=0.02, node_noise=0.05, seed=seed)
        model = fit(table)
        errors.append(float(np.median(_errors(model))))
        taus.append(validate(model, [b for b in table.builds if b.role == "heldout"]).kendall_tau)
    assert max(errors) < 0.02
    assert np.median(taus) > 0.75


def test_beats_the_sum_of_times_alone_which_misses_boundaries() -> None:
    model = fit(simulated_table(NETWORK, LAW, noise=0.02, node_noise=0.05))
    baseline = layer_sum(alone_table(NETWORK, LAW))
    assert np.median(_errors(model)) < 0.2 * np.median(_errors(baseline))


def test_a_table_of_single_layers_gives_the_sum() -> None:
    table = alone_table(NETWORK, LAW)
    model = fit(table)
    variants = uniform(NETWORK, "int8")
    assert model.predict(variants).time_ns == pytest.approx(sum(LAW.units[u]["int8"] for u in variants))
    with pytest.raises(InvalidInput, match="--mode alone"):
        layer_sum(simulated_table(NETWORK, LAW, design=0))


def test_sigma_is_about_right() -> None:
    inside = []
    for seed in range(5):
        law = LatencyLaw.random(NETWORK, seed)
        table = simulated_table(NETWORK, law, heldout=60, noise=0.02, node_noise=0.05, seed=seed)
        inside.append(validate(fit(table), [b for b in table.builds if b.role == "heldout"]).inside_sigma)
    assert 0.55 <= np.mean(inside) <= 0.85


def test_what_was_not_measured_is_an_error_and_never_free() -> None:
    table = simulated_table(NETWORK, LAW)
    never = NETWORK.units[0].signature
    same = {u.name for u in NETWORK.units if u.signature == never}
    kept = [
        b for b in table.builds
        if all(v == "dense.fp32" for u, v in zip(NETWORK.units, b.variants, strict=True) if u.name in same)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    kept += [
        simulated_build(
            NETWORK, LAW, {**random_variants(NETWORK, rng), **dict.fromkeys(same, Variant("fp32"))}
        )
        for _ in range(8)
    ]
    model = fit(LatencyTable(table.header, tuple(kept)))
    asked = {**uniform(NETWORK, "fp32"), NETWORK.units[0].name: Variant("int8")}
    assert model.predict(uniform(NETWORK, "fp32")).time_ns > 0
    with pytest.raises(InvalidInput, match=r"no measurement of dense\.int8"):
        model.predict(asked)
    with pytest.raises(InvalidInput, match=r"no measurement of dense\.bf16"):
        model.predict(uniform(NETWORK, "bf16"))
    with pytest.raises((InvalidInput, KeyError)):
        model.unit_ns(NETWORK.units[0].name, Variant("int8"))


def test_identical_units_share_one_time() -> None:
    model = fit(simulated_table(NETWORK, LAW, noise=0.02, node_noise=0.05))
    for a in NETWORK.units:
        for b in NETWORK.units:
            for variant in OFFERED:
                if a.signature == b.signature:
                    assert model.unit_ns(a.name, variant) == model.unit_ns(b.name, variant)


def test_times_of_units_are_near_the_law_and_never_negative() -> None:
    law = replace(LAW, units={**LAW.units, "layer0.conv": {"fp32": 100.0, "int8": 10.0}})
    network = Network(NETWORK.units, NETWORK.edges)
    model = fit(simulated_table(network, law, noise=0.05, node_noise=0.2))
    assert model.rest_ns >= 0
    for unit in network.units:
        for variant in OFFERED:
            assert model.unit_ns(unit.name, variant) >= 0
    exact = fit(simulated_table(NETWORK, LAW))
    found = [exact.unit_ns(u.name, Variant("fp32")) / LAW.units[u.name]["fp32"] for u in NETWORK.units]
    assert np.median(np.abs(np.array(found) - 1.0)) < 0.05


def test_terms_add_up_to_the_prediction() -> None:
    model = fit(simulated_table(NETWORK, LAW, noise=0.02, node_noise=0.05))
    rng = np.random.default_rng(3)
    for _ in range(5):
        variants = random_variants(NETWORK, rng)
        total = model.rest_ns + sum(model.unit_ns(u, v) for u, v in variants.items())
        for src, dst in dict.fromkeys((e.src, e.dst) for e in NETWORK.edges):
            total += model.edge_ns(src, dst)[variants[src].quantized, variants[dst].quantized]
        assert total == pytest.approx(model.predict(variants).time_ns, rel=1e-9)


def test_builds_that_did_not_run_as_asked_are_left_out() -> None:
    table = simulated_table(NETWORK, LAW)
    lying = replace(table.builds[2], ratio=100.0, executed=("fp32",) * len(NETWORK.units))
    model = fit(LatencyTable(table.header, (*table.builds, lying)))
    assert np.median(_errors(model)) < 0.01


def test_held_out_builds_are_not_fitted() -> None:
    table = simulated_table(NETWORK, LAW, noise=0.02, heldout=3)
    without = LatencyTable(table.header, tuple(b for b in table.builds if b.role != "heldout"))
    variants = uniform(NETWORK, "int8")
    assert fit(table).predict(variants).time_ns == fit(without).predict(variants).time_ns


@pytest.mark.parametrize("drift", [-0.12, 0.0, 0.08])
def test_a_drift_over_the_profile_is_told_from_the_terms(drift: float) -> None:
    """The last builds of a design are not mistaken for slower layers; those deployed later are no part of it."""
    table = simulated_table(NETWORK, LAW, design=30, noise=0.005, node_noise=0.02)
    last = len(table.builds) - 1
    builds = tuple(
        replace(b, ratio=b.ratio * (1 + drift * (i / last - 0.5))) for i, b in enumerate(table.builds)
    )
    model = fit(LatencyTable(table.header, builds))
    assert model.drift == pytest.approx(drift, abs=0.02)
    assert np.median(_errors(model)) < 0.012
    later = tuple(replace(b, role="deployed") for b in table.builds[3:9])
    again = fit(LatencyTable(table.header, builds + later))
    assert again.drift == pytest.approx(drift, abs=0.02)


def test_noisy_builds_do_not_pull_the_times_down() -> None:
    """An error that is a share of the measured time gives weight to what was measured too fast."""
    table = simulated_table(NETWORK, LAW, design=40, noise=0.01, node_noise=0.15)
    rng = np.random.default_rng(4)
    noisy = tuple(replace(b, low=b.ratio * 0.7, high=b.ratio * 1.3,
                          nodes=tuple(replace(n, time_ns=n.time_ns * float(np.exp(0.2 * rng.standard_normal())))
                                      for n in b.nodes))
                  for b in table.builds)  # fmt: skip
    model = fit(LatencyTable(table.header, noisy))
    rng = np.random.default_rng(8)
    drawn = [random_variants(NETWORK, rng) for _ in range(60)]
    assert np.mean([model.predict(a).time_ns / _law_ns(a) - 1.0 for a in drawn]) > -0.02


def test_too_few_builds() -> None:
    table = simulated_table(NETWORK, LAW, design=0)
    with pytest.raises(InvalidInput, match="1 usable builds, a fit needs at least 2"):
        fit(LatencyTable(table.header, table.builds[:1]))


def test_validation_reports_the_noise_floor() -> None:
    table = simulated_table(NETWORK, LAW, heldout=5)
    assert noise_floor(table) == pytest.approx(0.0, abs=1e-9)
    twice = replace(table.builds[-1], ratio=table.builds[-1].ratio * 1.02)
    assert noise_floor(LatencyTable(table.header, (*table.builds[2:], twice))) == pytest.approx(
        0.02, rel=0.01
    )
    assert noise_floor(LatencyTable(table.header, table.builds[1:])) is None
    found = validate(fit(table), [b for b in table.builds if b.role == "heldout"])
    assert found.builds == 5
    assert found.median_error <= found.p90_error
    assert found.noise == pytest.approx(0.0, abs=1e-9)
    assert found.inside_sigma <= found.inside_two_sigma


def test_leaving_a_build_out_is_fitting_without_it() -> None:
    table = simulated_table(NETWORK, LAW, noise=0.02, node_noise=0.05)
    builds = list(table.builds)
    equations = Equations(table, builds)
    prior = equations.weak_prior()
    guess, variance = equations.left_out(equations.posterior(prior))
    for k in range(len(builds)):
        others, total = equations.of_build != k, equations.totals.toarray()[k]
        a, b, weight = equations.a.toarray()[others], equations.b[others], prior.deviation**-2.0
        covariance = np.linalg.inv(a.T @ a + np.diag(weight))
        assert guess[k] == pytest.approx(total @ covariance @ (a.T @ b + weight * prior.mean), rel=1e-6)
        assert variance[k] == pytest.approx(total @ covariance @ total, rel=1e-5)


def test_builds_of_a_disturbed_machine_count_for_less() -> None:
    """Three builds in ten were measured while something else ran, which made them look slower than they are."""
    table = simulated_table(NETWORK, LAW, design=30, heldout=30, noise=0.005, node_noise=0.02)
    hit = [b.role == "design" and i % 3 == 0 for i, b in enumerate(table.builds)]

    def errors(slower: float) -> float:
        builds = tuple(
            replace(b, ratio=1.15 * b.ratio, low=1.15 * b.low, high=1.15 * b.high, reference_ns=np.rint(slower * b.reference_ns))
            if h
            else b
            for b, h in zip(table.builds, hit, strict=True)
        )  # fmt: skip
        seen = LatencyTable(table.header, builds)
        return validate(fit(seen), [b for b in builds if b.role == "heldout"]).median_error

    assert errors(1.6) < 0.5 * errors(1.0)


def test_the_rest_is_what_no_node_accounts_for() -> None:
    """Counted among the layers it made each slower where the others are few."""
    network = grouped()
    law = replace(LatencyLaw.random(network, 3), dispatch_ns=40_000.0)
    grid = {g: candidate_widths(n) for g, n in network.channels.items()}
    table = simulated_table(network, law, grid=grid, heldout=20, noise=0.003, node_noise=0.02)
    model = fit(table)
    assert model.rest_ns == pytest.approx(law.rest_ns + law.dispatch_ns, rel=0.1)
    quality = validate(model, [b for b in table.builds if b.role == "heldout"])
    assert quality.p90_error < 0.02


def slowed(table: LatencyTable, by: float, per_node: bool) -> LatencyTable:
    """Every third build of the design measured on a machine slower by that share of the reference's time: for every node by the
    same time, or by the same share."""
    builds = []
    for i, b in enumerate(table.builds):
        if b.role == "design" and i % 3 == 0:
            ratio = (b.ratio + by * table.nodes(b)) / (1 + by) if per_node else b.ratio
            own = by * float(np.median(b.reference_ns)) / table.reference_nodes
            nodes = (n.time_ns + own if per_node else (1 + by) * n.time_ns for n in b.nodes)
            b = replace(
                b, ratio=ratio, low=b.low * ratio / b.ratio, high=b.high * ratio / b.ratio,
                reference_ns=np.rint((1 + by) * b.reference_ns).astype(np.int64),
                nodes=tuple(replace(n, time_ns=t) for n, t in zip(b.nodes, nodes, strict=True)),
            )  # fmt: skip
        builds.append(b)
    return LatencyTable(table.header, tuple(builds))


@pytest.mark.parametrize("per_node", [True, False])
def test_how_much_of_a_slowdown_is_the_same_time_for_every_node(per_node: bool) -> None:
    quiet = simulated_table(NETWORK, LAW, design=36, heldout=30, noise=0.003, node_noise=0.02)
    table = slowed(quiet, 0.25, per_node)
    model = fit(table)
    assert model.per_node == pytest.approx(float(per_node), abs=0.35)
    # predictions are for the quiet machine, and say what was measured on the slow one
    unseen = [b for b in table.builds if b.role == "heldout"]
    assert validate(model, unseen).median_error < 0.01
    errors = [abs(model.predict_build(b).time_ns / table.time_ns(b) - 1) for b in table.builds]
    assert np.median(errors) < 0.01
    assert np.percentile(errors, 90) < 0.03
    # and so is what is measured on the slow one
    hit = [i for i, b in enumerate(table.builds) if table.slowdown(b) > 0.2]
    assert hit
    for i in hit:
        b = table.builds[i]
        converted = model.on_quiet_machine(b.ratio, table.nodes(b), table.slowdown(b)).time_ns
        assert converted == pytest.approx(quiet.time_ns(quiet.builds[i]), rel=0.05)
    assert model.per_node > 0.0
    assert model.on_quiet_machine(0.02, 3.0, 5.0).time_ns == pytest.approx(0.01 * table.header.reference_ns), "none is below 0"


def test_small_moods_of_the_machine_tell_nothing() -> None:
    model = fit(slowed(simulated_table(NETWORK, LAW, design=36, noise=0.003, node_noise=0.02), 0.04, True))
    assert model.per_node == 0.0
    assert model.on_quiet_machine(0.5, 1.0, 0.04) == Prediction(0.5 * model.table.header.reference_ns, 0.0)

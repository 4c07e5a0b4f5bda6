"""What one network's table tells of another's layers on the same device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from simulation import alone_table, chain, header, random_variants, simulated_table

from hwsearch.backends.base import BuildOptions
from hwsearch.device.timing import Protocol
from hwsearch.engine.setup import Setup
from hwsearch.errors import IncompatibleTables
from hwsearch.latency.model import LatencyModel, fit
from hwsearch.network.variants import Variant, uniform
from hwsearch.profiler.profile import Effort, profile
from hwsearch.profiler.transfer import evidence, signatures
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of

FIRST, SECOND = chain(18), chain(10)
LAW = LatencyLaw.random(FIRST, 1)
BY_SIGNATURE = {u.signature: LAW.units[u.name] for u in FIRST.units}
SLOWER = 1.2
"""The second session ran slower as a whole."""
SECOND_LAW = LatencyLaw(
    units={u.name: {p: SLOWER * t for p, t in BY_SIGNATURE[u.signature].items()} for u in SECOND.units},
    edges=SECOND.edges,
    boundaries={pair: (SLOWER * a, SLOWER * b) for pair, (a, b) in LAW.boundaries.items()},
    rest_ns=SLOWER * LAW.rest_ns,
    whole=sizes_of(SECOND),
)


def first() -> LatencyTable:
    return simulated_table(FIRST, LAW, design=24, noise=0.01, node_noise=0.03)


def second(design: int, *, prior: bool, seed: int = 0) -> LatencyTable:
    table = simulated_table(SECOND, SECOND_LAW, design=design, noise=0.01, node_noise=0.03, seed=seed)
    builds = table.builds[: 3 + design]
    return LatencyTable(table.header, builds).with_header(
        prior=tuple(evidence(first(), table, signatures(SECOND))) if prior else ()
    )


def error(model: LatencyModel) -> float:
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(40):
        variants = random_variants(SECOND, rng)
        want = SECOND_LAW.time_ns({u: v.precision for u, v in variants.items()})
        errors.append(abs(model.predict(variants).time_ns / want - 1.0))
    return float(np.median(errors))


def test_a_second_network_needs_fewer_builds() -> None:
    """Three builds with what the first network's table tells are worth more than eight without."""
    few = np.mean([error(fit(second(3, prior=True, seed=s))) for s in range(4)])
    many = np.mean([error(fit(second(8, prior=False, seed=s))) for s in range(4)])
    alone = np.mean([error(fit(second(3, prior=False, seed=s))) for s in range(4)])
    assert few < 0.03
    assert few < alone
    assert few < 1.2 * many


def test_what_was_never_built_here_is_known_from_there() -> None:
    table = second(0, prior=True)
    plain = LatencyTable(
        table.header, table.builds[:2]
    )  # the reference and the dense network: nothing in int8
    model = fit(plain)
    int8 = uniform(SECOND, "int8")
    want = SECOND_LAW.time_ns(dict.fromkeys(SECOND_LAW.units, "int8"))
    found = model.predict(int8)
    assert found.time_ns == pytest.approx(want, rel=0.15)
    assert abs(found.time_ns - want) < 3 * found.sigma_ns
    assert model.knows(SECOND.units[0].name, Variant("int8"), {})


def test_evidence_is_kept_in_the_file(tmp_path: Path) -> None:
    table = second(3, prior=True)
    assert {e.feature[0] for e in table.header.prior} == {"unit", "pool", "pool bytes"}
    assert {e.feature[1] for e in table.header.prior if e.feature[0] == "unit"} <= signatures(SECOND)
    assert all(e.table == f"chain ({FIRST.fingerprint})" for e in table.header.prior)
    table.save(tmp_path / "t.parquet")
    loaded = LatencyTable.load(tmp_path / "t.parquet")
    assert loaded.header.prior == table.header.prior
    assert error(fit(loaded)) == error(fit(table))


def test_what_is_refused_there_is_no_evidence_here() -> None:
    refused = {FIRST.units[0].name: {"dense.int8": "executed in fp32"}}
    found = evidence(first().with_header(unsupported=refused), second(0, prior=False), signatures(SECOND))
    assert ("unit", FIRST.units[0].signature, "dense.int8") not in {e.feature for e in found}
    assert ("unit", FIRST.units[0].signature, "dense.fp32") in {e.feature for e in found}


def test_only_tables_of_this_device_and_regime() -> None:
    table = second(0, prior=False)
    for changes, message in (
        ({"device": {"id": "ff", "chip": "Other"}}, "another device"),
        ({"backend": "openvino"}, "another backend"),
        ({"versions": {"simulated": "2"}}, "another runtime"),
        ({"options": {"threads": 2, "base": "fp32", "batch": 1}}, "another threads"),
        ({"options": {"threads": 1, "base": "fp32", "batch": 1, "load": 1}}, "another load"),
    ):
        with pytest.raises(IncompatibleTables, match=message):
            evidence(first().with_header(**changes), table, signatures(SECOND))
    other_batch = {"options": {"threads": 1, "base": "fp32", "batch": 8}}
    assert evidence(first().with_header(**other_batch), table, signatures(SECOND))
    with pytest.raises(IncompatibleTables, match="layer by layer"):
        evidence(alone_table(FIRST, LAW), table, signatures(SECOND))
    assert header(FIRST, LAW).prior == ()


@pytest.mark.usefixtures("own_locks")
@pytest.mark.parametrize("axes", [["precision"], pytest.param(["width", "precision"], marks=pytest.mark.slow)])
def test_a_profile_with_a_prior_takes_fewer_builds(axes: list[str]) -> None:
    """Of the same layers: the cold profile's own table is its prior."""
    law = LatencyLaw.random(tiny.lowering("cnn").network, 2)

    def run(prior: list[LatencyTable]) -> LatencyTable:
        setup = Setup(tiny.lowering("cnn"), SimulatedBackend(law, noise=0.003), BuildOptions())
        return profile(setup, None, Effort(protocol=Protocol(limit_s=1e-3, min_rounds=3)), axes=axes, prior=prior)

    cold = run([])
    warm = run([cold])
    made = [sum(not b.kept_out for b in t.builds) for t in (cold, warm)]
    assert made[1] < made[0] if "width" in axes else made[1] <= made[0]
    off = []
    for table in (cold, warm):
        rng, errors = np.random.default_rng(0), []
        for _ in range(20):
            variants = {u.name: Variant(("fp32", "int8")[rng.integers(2)]) for u in table.network.units}
            want = law.time_ns({u: v.precision for u, v in variants.items()})
            errors.append(abs(fit(table).predict(variants).time_ns / want - 1.0))
        off.append(float(np.median(errors)))
    assert off[1] < max(1.3 * off[0], 0.02) + 0.02  # of one law either may be off by luck

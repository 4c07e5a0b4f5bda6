"""Errors on left-out builds: whether sigma predicts them, and what they go with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulation import alone_table, chain, simulated_table

import hwsearch as hs
from hwsearch.errors import InvalidInput
from hwsearch.latency.diagnosis import CAUSES, diagnose
from hwsearch.latency.model import fit, validate
from hwsearch.table.table import LatencyTable
from hwsearch.testing import LatencyLaw

NETWORK = chain(16)
LAW = LatencyLaw.random(NETWORK, 1)


def test_every_build_is_predicted_without_itself() -> None:
    table = simulated_table(NETWORK, LAW, heldout=5, noise=0.02, node_noise=0.05)
    found = diagnose(fit(table))
    assert 15 < len(found.points) <= 20 + 5
    assert sum(p.heldout for p in found.points) == 5
    assert found.quality.median_error < 0.03
    assert set(found.correlations) <= set(CAUSES)
    json.dumps(found.to_json())
    # one build gone wrong is far off its prediction: it did not take part in it
    odd = next(i for i, b in enumerate(table.builds) if b.role == "design")
    wrong = replace(table.builds[odd], ratio=2 * table.builds[odd].ratio)
    builds = [wrong if i == odd else b for i, b in enumerate(table.builds)]
    worst = min(diagnose(fit(LatencyTable(table.header, tuple(builds)))).points, key=lambda p: p.error)
    assert worst.error < -0.3
    assert worst.measured_ns == pytest.approx(table.time_ns(wrong))


def test_a_drift_that_went_into_the_times_is_pointed_at() -> None:
    table = simulated_table(NETWORK, LAW, noise=0.003, node_noise=0.02, design=40)
    clean = diagnose(fit(table))
    assert "order of measuring" not in clean.suspects
    drifting = tuple(replace(b, ratio=b.ratio * (1 + 0.004 * i)) for i, b in enumerate(table.builds))
    found = diagnose(fit(LatencyTable(table.header, drifting)))
    assert "order of measuring" in found.suspects
    assert "errors depend on it" in str(found)


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_sigma_is_calibrated(noise: float) -> None:
    """Over laws, of builds that neither the fit nor its calibration saw: about 68 % inside one sigma, 95 % inside two."""
    one, two = [], []
    for seed in range(6):
        law = LatencyLaw.random(NETWORK, seed)
        table = simulated_table(NETWORK, law, design=24, heldout=80, noise=noise, node_noise=0.05, seed=seed)
        unseen = table.builds[-60:]
        quality = validate(fit(LatencyTable(table.header, table.builds[:-60])), unseen)
        one.append(quality.inside_sigma)
        two.append(quality.inside_two_sigma)
    assert 0.58 <= np.mean(one) <= 0.78
    assert 0.87 <= np.mean(two) <= 0.98


def test_a_picture(tmp_path: Path) -> None:
    table = simulated_table(NETWORK, LAW, heldout=5, noise=0.02, node_noise=0.05)
    figure = hs.plot_diagnosis(table, tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 10_000
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels[:2] == ["measured latency (ms)", "error within so many σ"]
    assert "boundaries" in labels


def test_builds_of_a_disturbed_machine_are_told_apart(tmp_path: Path) -> None:
    table = simulated_table(NETWORK, LAW, heldout=5, noise=0.02, node_noise=0.05)
    odd = [i for i, b in enumerate(table.builds) if b.role in ("design", "heldout")][-8:]
    builds = tuple(
        replace(b, reference_ns=1.5 * b.reference_ns) if i in odd else b for i, b in enumerate(table.builds)
    )
    slow = LatencyTable(table.header, builds)
    assert [slow.disturbed(b) for b in slow.builds] == [i in odd for i in range(len(builds))]
    found = diagnose(fit(slow))
    assert sum(p.disturbed for p in found.points) == len(odd)
    assert min(p.together_ns / p.measured_ns for p in found.points if p.disturbed) > 0.08
    figure = hs.plot_diagnosis(slow, tmp_path / "d.png")
    (legend,) = [a.get_legend() for a in figure.axes[:1]]
    assert legend is not None
    assert sum("on a disturbed machine" in text.get_text() for text in legend.get_texts()) == 2


def test_too_little_to_diagnose() -> None:
    with pytest.raises(InvalidInput, match="too few builds"):
        diagnose(fit(alone_table(NETWORK, LAW)))

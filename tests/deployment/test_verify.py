from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from deployment.test_deploy import allocation

import hwsearch as hs
from hwsearch.api import verify
from hwsearch.device import fingerprint as devices
from hwsearch.errors import DeviceBusy
from hwsearch.testing import LatencyLaw, SimulatedBackend, sizes_of


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.usefixtures("own_locks")
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_verify_measures_what_is_deployed(share: float, weights: Path, tmp_path: Path) -> None:
    law = LatencyLaw.random(tiny.lowering("cnn").network)
    backend = SimulatedBackend(law)
    chosen = allocation("cnn", share, "int8", backend="simulated")
    report = verify(tiny.task("cnn"), chosen, backend=backend, weights=weights, out=tmp_path / "r.json")
    network = tiny.lowering("cnn").network
    assert report.met is (share < 1)
    assert report.macs == {
        "dense": network.macs, "budget": int(0.9 * network.macs), "deployed": network.narrow(chosen.widths).macs,
    }  # fmt: skip
    assert report.widths == {g: [chosen.widths[g], n] for g, n in network.channels.items()}
    assert not report.wrong_outputs
    assert not report.not_as_asked
    path = hs.deploy(tiny.task("cnn"), chosen, tmp_path / "m.onnx", backend=backend, weights=weights).path
    assert report.size_bytes["deployed"] == path.stat().st_size
    assert ("channel groups narrower" in str(report)) is (share < 1)
    dense = law.time_ns(dict.fromkeys(law.units, "fp32"))
    precisions = {u: v.rpartition(".")[2] for u, v in chosen.variants.items()}
    exact = law.time_ns(precisions, sizes_of(network, chosen.widths))
    assert report.latency_ms["measured"] / report.latency_ms["dense"] == pytest.approx(
        exact / dense, rel=0.01
    )


def test_nothing_is_verified_beside_a_profile(weights: Path, tmp_path: Path, busy: Any) -> None:
    """Their times would be of a machine that somebody else keeps busy."""
    backend = SimulatedBackend(LatencyLaw.random(tiny.lowering("cnn").network))
    chosen = allocation("cnn", 1.0, "int8", backend="simulated")
    with busy(devices.fingerprint().id), pytest.raises(DeviceBusy, match=f"pid {os.getpid()}"):
        verify(tiny.task("cnn"), chosen, backend=backend, weights=weights, out=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()

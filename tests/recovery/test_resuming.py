"""A training that was killed or interrupted goes on to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recovering
import torch
from recovering import recover
from safetensors.torch import load_file

from hwsearch.progress import Progress
from hwsearch.recovery import training
from hwsearch.recovery.recovery import Options, Recovery
from hwsearch.recovery.trained import Trained

KILLED = """
import os, signal, sys
import torch
import recovering
from hwsearch.recovery import training
from hwsearch.recovery.recovery import Options, Recovery
torch.set_num_threads(1)
training.CHECKPOINT_S = 0.0
method, out, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = training.Training.save
def save(self):
    done(self)
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
training.Training.save = save
first, kept, variants = recovering.start(data=True)
Recovery(recovering.lowering(True), first, kept, variants, Options(epochs=2, rate=2e-3, method=method), out=out).run()
"""


def _in_a_process(method: str, out: Path, last: int) -> int:
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", ""), str(tests.parent)])
    own = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", KILLED, method, str(out), str(last)], env=own, check=False).returncode


def test_a_killed_training_goes_on_to_the_same_weights_bit_by_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert _in_a_process("ste", whole, -1) == 0
    assert _in_a_process("ste", parts, 11) == -signal.SIGKILL
    assert not parts.exists()
    assert [p.name for p in tmp_path.glob("parts*")] == ["parts.safetensors.begun"]
    assert _in_a_process("ste", parts, -1) == 0
    _same(whole, parts)
    assert not list(tmp_path.glob("*.begun"))


@pytest.mark.parametrize(
    "options",
    [{"method": "mask"}, {"method": "lc"}, {"method": "shrink", "scales": "learned"},
     {"method": "halfspace", "gradients": "1:2:mvue"}, {"gradients": "stochastic:0.9"},
     {"gradients": "1:2:mvue", "scales": "learned"}, {"gradients": "1:2:random"}, {"batchnorm": "unfolded"}],
)  # fmt: skip
def test_every_method_goes_on_where_it_was_interrupted(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    own: dict[str, Any] = {**options, "epochs": 2, "scored": False}
    recover(out=whole, **own)
    done, count = training.Training._one, [0]

    def stop(self: Any, batch: Any) -> None:
        count[0] += 1
        if count[0] in (3, 13):
            raise KeyboardInterrupt
        done(self, batch)

    monkeypatch.setattr(training.Training, "_one", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recover(out=parts, **own)
    recover(out=parts, **own)
    _same(whole, parts)
    assert {p.name for p in tmp_path.iterdir()} == {"whole.safetensors", "parts.safetensors"}


def _same(whole: Path, parts: Path) -> None:
    """Two trainings that left the same weights in the same way."""
    one, two = load_file(whole), load_file(parts)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    curves = [Trained.load(p).report["curve"] for p in (whole, parts)]
    assert [(p["step"], p["loss"], p["held_out"]) for p in curves[0]] == [(p["step"], p["loss"], p["held_out"]) for p in curves[1]]
    assert len(curves[0]) > 3
    told = [Trained.load(p).report["gradients"] for p in (whole, parts)]
    assert all(told[0].get(k) == told[1].get(k) for k in ("rule", "zeros", "zeros_dense"))


def test_a_training_of_something_else_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)

    def stop(self: Any, value: float) -> None:
        if self.step == 5:
            raise KeyboardInterrupt

    out = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_check", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(out=out)
    assert (tmp_path / "t.safetensors.begun").is_file()
    first, kept, variants = recovering.start()
    options = Options(epochs=4, rate=recovering.RATE, seed=5)
    done = Recovery(recovering.lowering(), first, kept, variants, options, out=out, progress=Progress()).run()
    assert "not gone on with: it is of other seed (0, now 5)" in capsys.readouterr().err
    fresh = recover(seed=5)
    assert all(torch.equal(done.trained.tensors[k], fresh.trained.tensors[k]) for k in fresh.trained.tensors)

"""Several processes make the steps that one makes; and nothing of a training stays on another device than its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recovering
import torch
from accelerate import Accelerator
from recovering import recover
from safetensors.torch import load_file
from torch.nn import functional as F

from hwsearch.errors import InvalidInput
from hwsearch.loss.divergence import mean_divergence
from hwsearch.lowering.lowering import Lowering
from hwsearch.recovery.objective import Objective
from hwsearch.recovery.processes import LAUNCHED, TOGETHER, Processes, launched
from hwsearch.recovery.student import OnDevice, Student

TOGETHER_AND_ALONE = """
import sys
from pathlib import Path
import torch
import recovering
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import refitted, weight_bank
from hwsearch.network.variants import uniform
from hwsearch.recovery.coupling import Coupling
from hwsearch.recovery.processes import launched
from hwsearch.recovery.recovery import Options, Recovery
from safetensors.torch import save_file
torch.set_num_threads(1)
own, divergence, folder = launched(), sys.argv[1], Path(sys.argv[2])
whole = Lowering(recovering.task(divergence=divergence) if divergence == "mse" else recovering.with_data())
variants = uniform(whole.network, "int8")
bank, widths = weight_bank(whole), {g: max(1, n // 4) for g, n in whole.network.channels.items()}
first, kept = refitted(whole, variants, widths, bank), bank.kept(widths)
followed = Coupling.gradients
def gradients(self, samples):
    path = folder / "first.safetensors"
    if own.main and not path.exists():
        save_file({p: t.grad.clone() for p, t in self.student.tensors.items() if t.grad is not None}, path)
    followed(self, samples)
Coupling.gradients = gradients
options = Options(epochs=4 if divergence == "mse" else 2, rate=2e-3, scored=False)
Recovery(whole, first, kept, variants, options, out=folder / "t.safetensors").run()
print("process", own.index, "of", own.count)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"method": "shrink", "gradients": "1:2:mvue"}])
def test_one_process_trains_to_the_same_numbers_with_and_without_accelerate(options: dict[str, Any]) -> None:
    alone, own = (
        recover(data=True, epochs=1, scored=False, processes=processes, **options)
        for processes in (Processes(device=torch.device("cpu")), Processes(Accelerator(cpu=True)))
    )
    assert all(torch.equal(alone.trained.tensors[k], own.trained.tensors[k]) for k in alone.trained.tensors)
    curves = [[(p.step, p.loss, p.held_out) for p in one.course.points] for one in (alone, own)]
    assert curves[0] == curves[1]
    assert len(set(curves[0])) > 5


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["auto", "mse"])
def test_two_processes_make_the_steps_of_one(divergence: str, tmp_path: Path) -> None:
    """With `mse`, a batch's divergence is relative to the dense network's outputs over all of it."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    own = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    script = tmp_path / "train.py"
    script.write_text(TOGETHER_AND_ALONE)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, words in ((alone, []), (together, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])):
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, *words, str(script), divergence, str(folder)], env=own, check=True, capture_output=True, text=True
        )
        said = {line for line in done.stdout.splitlines() if line.startswith("process")}
        assert said == ({f"process {i} of 2" for i in (0, 1)} if words else {"process 0 of 1"})
        assert sorted(p.name for p in folder.iterdir()) == ["first.safetensors", "t.safetensors"]
    first, same = (load_file(folder / "first.safetensors") for folder in (alone, together))
    assert first.keys() == same.keys()
    for path, gradient in first.items():
        assert torch.allclose(gradient, same[path], rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), path
    curves = [json.loads(_told(folder / "t.safetensors"))["curve"] for folder in (alone, together)]
    assert [p["step"] for p in curves[0]] == [p["step"] for p in curves[1]]
    for one, two in zip(*curves, strict=True):
        assert two["held_out"] == pytest.approx(one["held_out"], rel=0.05)
    assert min(p["held_out"] for p in curves[1]) < 0.9 * curves[1][0]["held_out"]


def _told(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str(file.metadata()["told"])


def of_three(index: int) -> Processes:
    return Processes(SimpleNamespace(device=torch.device("cpu"), num_processes=3, process_index=index))


def test_every_sample_is_one_process_s() -> None:
    x, y = torch.arange(20).reshape(10, 2), torch.arange(10)
    parts = [of_three(i).share((x, {"y": y}), 10, "") for i in range(3)]
    assert torch.equal(torch.cat([own for own, _ in parts]), x)
    assert torch.equal(torch.cat([own["y"] for _, own in parts]), y)
    assert [len(own) for own, _ in parts] == [3, 3, 4]
    assert Processes().share([1, "a"], 10, "") == [1, "a"]


@pytest.mark.parametrize(
    ("values", "samples", "message"),
    [([1, 2, 3], 3, r"the target: int in a batch of 3 samples"), (torch.zeros(7), 8, r"a tensor of shape \(7,\) in a batch of 8"),
     (torch.zeros(2), 2, "cannot be shared among 3 processes"), (torch.tensor(1.0), 8, r"shape \(\)")],
)  # fmt: skip
def test_what_cannot_be_shared_is_said(values: Any, samples: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        of_three(1).share(values, samples, "the target")


def test_parts_of_a_batch_make_its_loss_and_its_gradient() -> None:
    low, _, variants = recovering.start("fp32", data=True)
    whole = Objective(low)
    batch = next(whole.batches(0))
    student = Student(low, variants)
    whole.loss(student, batch).backward()
    want = {p: t.grad.clone() for p, t in student.tensors.items()}
    student = Student(low, variants)
    for index in range(3):
        part = Objective(low, processes=of_three(index))
        part._squares = lambda dense: None  # type: ignore[method-assign, assignment]  # not of classes: none here
        own = next(part.batches(0))
        assert own.samples == 64
        (part.loss(student, own) * own.share).backward()
    for path, tensor in student.tensors.items():
        assert torch.allclose(tensor.grad, want[path], rtol=1e-4, atol=1e-5 * float(want[path].abs().max())), path


def test_processes_are_those_that_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    monkeypatch.delenv(TOGETHER, raising=False)
    assert (launched().count, launched().main) == (1, True)
    assert launched()._accelerator is None
    with monkeypatch.context() as patch:
        patch.setenv(LAUNCHED, "no")
        assert isinstance(launched()._accelerator, Accelerator)
    monkeypatch.setenv(TOGETHER, "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InvalidInput, match=r"pip install 'hwsearch\[accelerate\]'"):
        launched()


@pytest.mark.parametrize(("precision", "method"), [("int8", "ste"), ("bf16", "ste"), ("int8", "halfspace")])
def test_nothing_of_a_step_stays_on_another_device(precision: str, method: str) -> None:
    """On torch's device without data, which refuses to compute with tensors of the CPU as a GPU does."""
    from hwsearch.recovery.coupling import coupling

    meta = torch.device("meta")
    first, kept, variants = recovering.start(precision, data=True)
    low: Lowering = recovering.lowering(True) if method == "halfspace" else first
    student = Student(low, variants, device=meta, learned=method == "ste")
    x, y = (t.to(meta) for t in next(iter(recovering.train(0))))
    traced, dense = low.traced_for(x.new_zeros(x.shape, device="cpu"), ""), None
    with torch.no_grad():
        dense = OnDevice(recovering.lowering(True).traced_for(x.new_zeros(x.shape, device="cpu"), ""), meta).outputs((x,), {})
    outputs = student(traced, (x,), {})
    assert outputs.device == dense.device == meta
    (mean_divergence(outputs, dense, "kl")[0] + F.cross_entropy(outputs, y)).backward()
    assert all(t.grad is not None and t.grad.device == meta for t in student.tensors.values())
    how = coupling(method, student, kept if method == "halfspace" else None)
    if method == "ste":
        how.gradients(64)
    torch.optim.Adam(student.tensors.values()).step()
    assert all(t.device == meta for t in (*how.answer().values(), *(mask for _, mask in getattr(how, "removed", ()))))

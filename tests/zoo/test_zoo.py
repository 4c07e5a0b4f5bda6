"""The zoo: each task is what a Task must be, and says what to do where it cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hwsearch import zoo
from hwsearch.errors import InvalidInput
from hwsearch.task import Task

FETCHED = ("minilm", "efficientnet_lite0")


def fetched(name: str) -> Task:
    """The task, or a skipped test where this machine has not fetched it."""
    if name == "minilm":
        pytest.importorskip("transformers", reason="zoo:minilm needs hwsearch[zoo]")
    try:
        return zoo.load(name)
    except InvalidInput as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def fashion() -> Task:
    return zoo.load("fashion_resnet")


def test_importing_the_zoo_imports_no_torch() -> None:
    code = "import sys, hwsearch.zoo; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(InvalidInput, match="no task 'resnet50' in the zoo") as error:
        zoo.load("resnet50")
    assert all(name in str(error.value) for name in zoo.NAMES)


@pytest.mark.parametrize("name", FETCHED)
def test_a_task_not_fetched_names_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path))
    with pytest.raises(InvalidInput, match=f"scripts/fetch_zoo {name}"):
        zoo.load(name)


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "zoo" / "minilm"
    folder.mkdir(parents=True)
    for file in ("config.json", "encoder.safetensors", "head.safetensors", "texts.npz"):
        (folder / file).touch()
    monkeypatch.setenv("HWSEARCH_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InvalidInput, match=r"pip install 'hwsearch\[zoo\]'"):
        zoo.load("minilm")


def test_fashion_resnet_has_the_documented_shapes(fashion: Task) -> None:
    assert isinstance(fashion.example_inputs, torch.Tensor)
    assert fashion.example_inputs.shape == (1, 1, 28, 28)
    assert [tuple(batch.shape) for batch in fashion.calibration] == [(128, 1, 28, 28)] * 8  # type: ignore[union-attr]
    assert not fashion.model.training
    assert all(p.dtype == torch.float32 for p in fashion.model.parameters())
    assert 1e6 < sum(p.numel() for p in fashion.model.parameters()) < 2e6
    with torch.no_grad():
        assert fashion.model(fashion.example_inputs).shape == (1, 10)


def test_fashion_resnet_scores_at_least_93_percent(fashion: Task) -> None:
    assert 0.93 <= fashion.evaluate(fashion.model) <= 1


def test_a_constant_answer_scores_a_tenth(fashion: Task) -> None:
    assert fashion.evaluate(lambda x: torch.eye(10)[torch.zeros(len(x)).long()]) == pytest.approx(
        0.1, abs=0.02
    )


def test_fashion_calibration_and_evaluation_share_no_image() -> None:
    from hwsearch.zoo.fashion_resnet import DATA

    with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        calibration = {image.tobytes() for image in data["calibration_images"]}
        evaluation = {image.tobytes() for image in data["evaluation_images"]}
        assert len(calibration) >= 1000
        assert len(data["evaluation_labels"]) >= 4000
        assert set(data["evaluation_labels"].tolist()) == set(range(10))
    assert not calibration & evaluation


def test_minilm_takes_keywords_and_gives_logits() -> None:
    task = fetched("minilm")
    assert isinstance(task.example_inputs, dict)
    assert list(task.example_inputs) == ["input_ids", "attention_mask"]
    assert all(t.dtype == torch.int64 and t.shape == (1, 64) for t in task.example_inputs.values())
    batches = [batch for batch in task.calibration if isinstance(batch, dict)]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 64)] * 8
    with torch.no_grad():
        assert task.model(**task.example_inputs).shape == (1, 8)


@pytest.mark.slow
def test_minilm_exports_with_static_shapes_and_scores_as_published() -> None:
    task = fetched("minilm")
    assert isinstance(task.example_inputs, dict)
    program = torch.export.export(task.model, (), dict(task.example_inputs))
    with torch.no_grad():
        got = program.module()(**task.example_inputs)
        assert torch.allclose(got, task.model(**task.example_inputs), atol=1e-5)
    assert task.evaluate(task.model) > 0.95


@pytest.mark.slow
def test_efficientnet_lite0_knows_most_photographs() -> None:
    task = fetched("efficientnet_lite0")
    assert isinstance(task.example_inputs, torch.Tensor)
    assert task.example_inputs.shape == (1, 3, 224, 224)
    assert [tuple(batch.shape) for batch in task.calibration] == [(16, 3, 224, 224)] * 8  # type: ignore[union-attr]
    assert sum(p.numel() for p in task.model.parameters()) == 4_652_008
    assert task.evaluate(task.model) > 0.8


def test_fashion_resnet_is_validated_on_test_images_that_it_is_not_scored_on() -> None:
    from hwsearch.zoo import fashion_resnet as zoo

    task = fetched("fashion_resnet")
    if task.validate is None:
        pytest.skip("run `scripts/fetch_zoo fashion_resnet` once")
    seen: list[torch.Tensor] = []

    def predict(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()

    assert 0.05 < task.validate(predict) < 0.15, "one class of ten"
    assert sum(map(len, seen)) == task.validated == 5_000
    with np.load(zoo.DATA / "fashion_mnist.npz", allow_pickle=False) as data:
        shipped = {image.tobytes() for image in zoo.normalise(data["evaluation_images"]).numpy()}
    assert sum(image.tobytes() in shipped for batch in seen for image in batch.numpy()) < 5, "but for images that come twice"


@pytest.mark.parametrize("name", ["fashion_resnet", "minilm"])
def test_training_data_are_fresh_each_epoch_and_none_of_the_calibration(name: str) -> None:
    task = fetched(name)
    if task.train is None:
        pytest.skip(f"run `scripts/fetch_zoo {name}` once")
    assert task.loss is not None
    (first, labels), (again, _), (other, _) = (next(iter(task.train(epoch))) for epoch in (0, 0, 1))
    one, same, new = (x["input_ids"] if isinstance(x, dict) else x for x in (first, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, new)
    with torch.no_grad():
        outputs = task.model(**first) if isinstance(first, dict) else task.model(first)
        assert 0.0 < float(task.loss(outputs, labels)) < 1.0  # a trained network knows them
    if name == "fashion_resnet":
        from hwsearch.zoo.fashion_resnet import DATA, _training_set

        with np.load(DATA / "fashion_mnist.npz", allow_pickle=False) as data:
            calibration = {image.tobytes() for image in data["calibration_images"]}
        images, own = _training_set()
        assert not calibration & {image.tobytes() for image in images.numpy()}
        assert len(images) == len(own) > 58_000

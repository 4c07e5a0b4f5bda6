from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest

from hwsearch.errors import InvalidInput
from hwsearch.loading import load
from hwsearch.task import Task

GOOD = """
import torch
from hwsearch import Task
def make(**changes):
    x = torch.randn(2, 4)
    fields = {"model": torch.nn.Linear(4, 2), "example_inputs": x, "calibration": [x], "evaluate": lambda p: 1.0}
    return Task(**fields | changes)
def good(): return make()
def raises(): raise RuntimeError("no data here")
def leaves(): raise SystemExit("bye")
def number(): return 3
def no_model(): return make(model=3)
def no_score(): return make(evaluate=1.0)
def half(): return make(train=lambda epoch: [])
def other_half(): return make(loss=lambda outputs, target: outputs.sum())
def no_function(): return make(train=[], loss=[])
def no_inputs(): return make(example_inputs=3)
def no_batches(): return make(calibration=torch.randn(2, 4))
def other_loss(): return make(divergence="l1")
def no_name(): return make(name=None)
not_a_function = 3
def sibling():
    import sibling_of_task
    return make(name=sibling_of_task.NAME)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "sibling_of_task.py").write_text("NAME = 'sibling'")
    (tmp_path / "broken.py").write_text("def make(:")
    (tmp_path / "needs.py").write_text("import not_installed_anywhere")
    (tmp_path / "numpy.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "sibling_of_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("spec", ["mine.py:good", "mine:good", "./mine.py:good", "{folder}/mine.py:good"])
def test_a_task_from_a_file_or_a_module(folder: Path, spec: str) -> None:
    assert isinstance(load(spec.format(folder=folder)), Task)


def test_a_task_may_import_its_siblings_when_it_is_called(folder: Path) -> None:
    assert load("mine.py:sibling").name == "sibling"


def test_a_file_named_like_a_library_does_not_replace_it(folder: Path) -> None:
    load("numpy.py:good")
    assert sys.modules["numpy"] is numpy


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "not understood"),
        (":good", "not understood"),
        ("mine.py:", "not understood"),
        ("absent.py:good", "does not exist"),
        ("absent.module:good", "no module 'absent.module'"),
        ("mine.py:absent", "no function 'absent'"),
        ("mine.py:not_a_function", "no function"),
        ("mine.py:raises", "RuntimeError: no data here"),
        ("mine.py:leaves", "SystemExit: bye"),
        ("mine.py:number", "returned int"),
        ("mine.py:no_model", "model is int"),
        ("mine.py:no_score", "evaluate is not callable"),
        ("mine.py:half", "has train but no loss"),
        ("mine.py:other_half", "has loss but no train"),
        ("mine.py:no_function", "train is not callable"),
        ("mine.py:no_inputs", "example_inputs is int"),
        ("mine.py:no_batches", "calibration is Tensor"),
        ("mine.py:other_loss", "divergence is 'l1'"),
        ("mine.py:no_name", "name is NoneType"),
        ("broken.py:make", "SyntaxError"),
        ("needs.py:make", "'not_installed_anywhere', which is not installed"),
        ("needs:make", "'not_installed_anywhere', which is not installed"),
        ("zoo:nothing", "no task 'nothing'"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load(spec)

"""A task at another input shape: images interpolated, tokens cut or repeated, all else refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hwsearch as hs
from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import as_call
from hwsearch.lowering.lowering import Lowering
from hwsearch.profiler.reshape import example_shapes, reshaped, to_shape


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head((self.token(ids) * mask.unsqueeze(-1)).mean(1))


def text(example: Any, calibration: Sequence[Any]) -> hs.Task:
    return hs.Task(TwoInputs().eval(), example, calibration, lambda predict: 0.0, "text")


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "ids": torch.randint(0, 11, (batch, length)),
        "mask": torch.ones(batch, length, dtype=torch.int64),
    }


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_images_are_interpolated(height: int, width: int, to_height: int, to_width: int) -> None:
    x = torch.rand(2, 3, height, width) + 1.0
    y = to_shape(x, (1, 3, to_height, to_width))
    assert y.shape == (2, 3, to_height, to_width)
    assert float(y.min()) >= float(x.min()) - 1e-5
    assert float(y.max()) <= float(x.max()) + 1e-5
    flat = torch.full((1, 3, height, width), 0.25)
    assert torch.allclose(to_shape(flat, (1, 3, to_height, to_width)), torch.tensor(0.25))


@given(st.integers(1, 9), st.integers(1, 20))
def test_tokens_are_cut_or_repeated(length: int, wanted: int) -> None:
    x = torch.arange(2 * length).reshape(2, length)
    y = to_shape(x, (1, wanted))
    assert y.shape == (2, wanted)
    assert all(torch.equal(y[:, i], x[:, i % length]) for i in range(wanted))
    assert to_shape(x.bool(), (1, wanted)).dtype == torch.bool


@pytest.mark.parametrize(
    ("x", "sizes"),
    [
        (torch.zeros(1, 3, 8, 8), (1, 4, 8, 8)),  # other channels
        (torch.zeros(1, 8, 8, 3), (1, 12, 12, 3)),  # NHWC
        (torch.zeros(1, 3, 8, 8), (1, 3, 8)),
        (torch.zeros(1, 16), (1, 32)),  # features
        (torch.zeros(1, 4, 16), (1, 8, 16)),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (1, 3, 12, 12)),
        (torch.zeros(1, 5, dtype=torch.complex64), (1, 6)),
        (torch.zeros(1, 0, dtype=torch.int64), (1, 6)),
    ],
)
def test_what_no_rule_covers_wants_a_task_of_its_own(x: torch.Tensor, sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"write a task|is empty"):
        to_shape(x, sizes)


def test_what_has_the_shape_stays_as_it_is() -> None:
    x = torch.zeros(4, 5)
    assert to_shape(x, (1, 5)) is x
    task = tiny.task("cnn")
    assert reshaped(task, "1x3x8x8") is task


def test_a_task_of_images_at_another_size_and_batch() -> None:
    task = reshaped(tiny.task("cnn"), "2x3x12x10")
    assert example_shapes(task) == ((2, 3, 12, 10),)
    assert [tuple(b.shape) for b in task.calibration] == [(64, 3, 12, 10), (32, 3, 12, 10)]  # type: ignore[union-attr]
    found, old = Lowering(task).network, tiny.lowering("cnn").network
    assert found.input_shapes == ((2, 3, 12, 10),)
    assert found.model == old.model
    assert found.fingerprint != old.fingerprint
    with pytest.raises(InvalidInput, match="can not be scored"):
        task.evaluate(task.model)


def test_inputs_by_name_in_any_order() -> None:
    example, batch = tokens(1, 6), tokens(8, 6)
    swapped = {"mask": batch["mask"], "ids": batch["ids"]}
    task = reshaped(text(example, [batch, swapped]), ["mask=1x4", "ids=1x4"])
    for inputs in task.calibration:
        _, named = as_call(inputs)
        assert torch.equal(named["ids"], batch["ids"][:, :4])
        assert torch.equal(named["mask"], batch["mask"][:, :4])
    by_place = text(tuple(example.values()), [tuple(batch.values())])
    assert example_shapes(reshaped(by_place, ["2x9", "2x9"])) == ((2, 9), (2, 9))
    assert example_shapes(reshaped(by_place, ["ids=1x9", "mask=1x9"])) == ((1, 9), (1, 9))
    assert Lowering(reshaped(by_place, ["1x9", "1x9"])).network.input_shapes == ((1, 9), (1, 9))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (["1x4"], "2 input tensors .*got 1 shapes"),
        (["1x4", "2x4"], "several batch sizes"),
        (["ids=2x6"], "several batch sizes"),
        (["token=1x4"], "no input 'token'; it has ids, mask"),
        (["ids=1x4", "1x4"], "name each"),
    ],
)
def test_shapes_that_do_not_fit_the_inputs(shapes: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        reshaped(text(tokens(1, 6), [tokens(8, 6)]), shapes)


def test_calibration_of_another_form() -> None:
    task = text(tokens(1, 6), [{"ids": tokens(8, 6)["ids"]}])
    with pytest.raises(InvalidInput, match="calibration batch has inputs ids, example_inputs ids, mask"):
        reshaped(task, ["1x4", "1x4"])
    with pytest.raises(InvalidInput, match="can not be brought"):
        reshaped(replace(tiny.task("cnn"), calibration=[torch.zeros(4, 5)]), "1x3x12x12")

"""A task at another input shape than its example's, made by rule: for timing, and for ranges of activations.

Images are interpolated, token ids and masks cut or repeated. What a score or a loss would mean on such inputs is not
known, so that sensitivities, `deploy` and `verify` want a task whose own `example_inputs` have the shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import as_call
from hwsearch.table.section import Shape, Shapes, parse_shapes, written
from hwsearch.task import Inputs, Predict, Task


def reshaped(task: Task, shapes: Shapes) -> Task:
    """The task with inputs of these shapes (batch first); the task itself where it has them.

    shapes: one for each input tensor in order, or `NAME=1x64` for some. Calibration batches keep their sizes.
    Raises InvalidInput where an input can not be brought to its shape by rule.
    """
    wanted = _by_place(task, parse_shapes(shapes))
    if all(tuple(t.shape) == s for t, s in zip(_tensors(task.example_inputs), wanted, strict=True)):
        return task
    sizes = {s[0] for s in wanted if s}
    if len(sizes) > 1:
        raise InvalidInput(
            f"the input shapes {' and '.join(map(written, wanted))} have several batch sizes; the first dimension of each "
            "input is the batch, name every input's shape"
        )
    batch = sizes.pop()
    example = _changed(
        _each(task, task.example_inputs, wanted), lambda x: _repeated(x, 0, batch) if x.dim() else x
    )
    calibration = [_each(task, inputs, wanted) for inputs in task.calibration]
    return replace(task, example_inputs=example, calibration=calibration, evaluate=_no_score)


def example_shapes(task: Task) -> tuple[Shape, ...]:
    """Shapes of the example's tensors, in the order of `Network.input_shapes`."""
    return tuple(tuple(t.shape) for t in _tensors(task.example_inputs))


def to_shape(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """A tensor with all dimensions but the first as in `sizes`.

    Images in floating point (4 dimensions, the channels kept) are interpolated bilinearly; integers and booleans of 2
    dimensions are cut, or repeated from their beginning. Raises InvalidInput on anything else.
    """
    if tuple(x.shape[1:]) == tuple(sizes[1:]):
        return x
    if x.dim() == len(sizes) == 4 and x.is_floating_point() and x.shape[1] == sizes[1]:
        resized = F.interpolate(
            x.float(), size=tuple(sizes[2:]), mode="bilinear", align_corners=False, antialias=True
        )
        return resized.to(x.dtype)
    if x.dim() == len(sizes) == 2 and not x.is_floating_point() and not x.is_complex():
        return _repeated(x, 1, sizes[1])
    raise InvalidInput(
        f"an input of shape {written(tuple(x.shape))} and type {str(x.dtype).removeprefix('torch.')} can not be brought to "
        f"{written(sizes)} by rule (only the height and width of NCHW images in floating point, and the length of token ids "
        "and masks can); write a task whose example_inputs and calibration have that shape"
    )


def _repeated(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if x.shape[axis] == 0:
        raise InvalidInput(f"an input of shape {written(tuple(x.shape))} is empty")
    index = torch.arange(size, device=x.device) % x.shape[axis]
    return x.index_select(axis, index)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(as_call(inputs)) if isinstance(t, torch.Tensor)]


def _changed(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    return cast(Inputs, pytree.tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, inputs))


def _each(task: Task, inputs: Inputs, wanted: Sequence[Shape]) -> Inputs:
    """Inputs with every tensor brought to its shape, but for the batch. Raises InvalidInput on another form."""
    like = task.example_inputs
    if isinstance(inputs, Mapping):  # in the example's order
        names = list(like) if isinstance(like, Mapping) else []
        if set(names) != set(inputs):
            raise InvalidInput(
                f"a calibration batch has inputs {', '.join(inputs)}, example_inputs {', '.join(names)}"
            )
        inputs = {name: inputs[name] for name in names}
    if len(_tensors(inputs)) != len(wanted):
        raise InvalidInput(
            f"a calibration batch has {len(_tensors(inputs))} tensors, example_inputs {len(wanted)}"
        )
    left = iter(wanted)
    return _changed(inputs, lambda x: to_shape(x, next(left)))


def _by_place(task: Task, given: Sequence[tuple[str | None, Shape]]) -> list[Shape]:
    """The shape of every input tensor, in order."""
    tensors = _tensors(task.example_inputs)
    have = ", ".join(written(tuple(t.shape)) for t in tensors)
    if all(name is None for name, _ in given):
        if len(given) != len(tensors):
            raise InvalidInput(
                f"the model takes {len(tensors)} input tensors ({have}), got {len(given)} shapes; give one for each, in order, "
                "or NAME=SHAPE"
            )
        wanted = [sizes for _, sizes in given]
    else:
        places = _places(task)
        wanted = [tuple(t.shape) for t in tensors]
        for name, sizes in given:
            if name not in places:
                raise InvalidInput(
                    f"the model has no input {name!r}; it has {', '.join(places)} ({have})"
                    if name
                    else "give the shapes of all inputs in order, or name each of them as NAME=SHAPE"
                )
            wanted[places[name]] = sizes
    return wanted


def _places(task: Task) -> dict[str, int]:
    """Names of the inputs that are tensors themselves -> their places among all tensors."""
    args, kwargs = as_call(task.example_inputs)
    parameters = list(inspect.signature(task.model.forward).parameters)
    named: list[tuple[str, Any]] = [*zip(parameters, args, strict=False), *kwargs.items()]
    places, place = {}, 0
    for name, value in named:
        if isinstance(value, torch.Tensor):
            places[name] = place
        place += sum(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(value))
    return places


def _no_score(predict: Predict) -> float:
    raise InvalidInput(
        "this task was brought to another input shape for timing, and can not be scored; write a task whose example_inputs "
        "and evaluate have that shape"
    )

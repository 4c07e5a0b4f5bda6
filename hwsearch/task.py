"""What the user brings: a trained module, inputs, calibration data and a score; and the module inside a wrapper."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

from hwsearch.errors import InvalidInput

if TYPE_CHECKING:
    import torch

Inputs = Union["torch.Tensor", Sequence[Any], Mapping[str, Any]]
Predict = Callable[..., Any]
Train = Callable[[int], Iterable[tuple[Inputs, Any]]]
"""Called with the number of an epoch, from 0: its batches as (inputs, target), shuffled anew; the same for the same number."""


@dataclass(frozen=True)
class Task:
    """A trained network with all that is needed to compress and score it.

    Args:
        model: the trained `nn.Module`; it is put in eval mode and never changed. Wrappers are taken off: `torch.compile`,
            DataParallel, averaged weights.
        example_inputs: one input: a tensor, a tuple (positional) or a dict (keyword arguments) of tensors.
            Dimension 0 of every tensor is the batch; its size here is the batch that is profiled and deployed.
        calibration: batches of the same form (any batch size, every other dimension as in `example_inputs`). Weights are refitted
            on the first three quarters, losses measured on the last: samples that resemble each other should stand together.
        evaluate: called as `evaluate(predict)`, where `predict` has the model's signature and is the module
            or a compiled engine; returns the score, higher is better.
        name: shown in reports and stored in tables.
        divergence: how outputs are compared with the dense network's: `kl` (logits), `mse`, or `auto` (kl if there are classes).
        spec: what `load` was given; empty for a task that was made otherwise.
        train: for `recover`: `train(epoch)` returns the batches of an epoch (from 0) as pairs of inputs, of the form of
            `example_inputs`, and a target; shuffled anew each epoch, and the same for the same number. None: recovery
            trains on calibration data alone, towards the outputs of the dense network.
        loss: with `train`: `loss(outputs, target)`, a scalar tensor, lower is better; outputs are as the model returns them.
        validate: as `evaluate`, on other data: what a run with a floor scores its samples by, so that `evaluate` chooses nothing.
            None: they are scored by agreement with the dense network on calibration data.
        scored: how many samples `evaluate` scores, where its score is a share of them; None: the noise of the score is not known.
        validated: how many `validate` scores.

    Raises:
        InvalidInput: the model is a wrapper without one module inside (a ScriptModule), or only one of `train` and `loss` is given,
            or a number of samples is below 1.
    """

    model: torch.nn.Module
    example_inputs: Inputs = field(repr=False)
    calibration: Sequence[Inputs] = field(repr=False)
    evaluate: Callable[[Predict], float]
    name: str = "task"
    divergence: str = "auto"
    spec: str = ""
    train: Train | None = field(default=None, repr=False)
    loss: Callable[[Any, Any], torch.Tensor] | None = field(default=None, repr=False)
    validate: Callable[[Predict], float] | None = field(default=None, repr=False)
    scored: int | None = None
    validated: int | None = None

    def __post_init__(self) -> None:
        if (self.train is None) != (self.loss is None):
            has, lacks = ("train", "loss") if self.loss is None else ("loss", "train")
            raise InvalidInput(
                f"the task {self.name!r} has {has} but no {lacks}: `train(epoch)` gives batches of (inputs, target) and "
                "`loss(outputs, target)` says what they are for; give both, or neither to recover on calibration data alone"
            )
        for name, count in (("scored", self.scored), ("validated", self.validated)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise InvalidInput(f"the task {self.name!r} has {name}={count!r}; expected a number of samples, or None")
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(self.model, torch.nn.Module):
            object.__setattr__(self, "model", unwrapped(self.model))


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The trained module inside of all its wrappers; the module itself where it has none.

    A module whose class has no `forward` (a keeper of averaged weights, for instance) stands for the only module in it.
    Raises InvalidInput on a ScriptModule, whose Python module is gone, and on a module without `forward` that holds several.
    """
    import torch

    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise InvalidInput(
                f"the model is a {type(model).__name__} (torch.jit), which holds no module that can be traced; "
                "give the nn.Module that it was scripted or traced from"
            )
        inner = _inside(model)
        if inner is None and not _callable(model):
            inner = _only_child(model)
        if inner is None:
            return model
        model = inner


@contextmanager
def without_wrappers(model: torch.nn.Module) -> Iterator[None]:
    """Wrappers of modules inside a model, and compiled calls, are off; afterwards they are as they were."""
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            inner, found = child, None if child is None else _inside(child)
            while found is not None:
                inner, found = found, _inside(found)
            if child is not None and inner is not None and inner is not child:
                replaced.append((parent, name, child))
                parent._modules[name] = inner
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
        for parent, name, child in replaced:
            parent._modules[name] = child


def _inside(model: torch.nn.Module) -> torch.nn.Module | None:
    """What a wrapper of torch's own calls with its own arguments; None where the module is no such wrapper."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    if (compiled := model._modules.get("_orig_mod")) is not None:  # an OptimizedModule
        return compiled
    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    return model._modules["module"] if isinstance(model, (*parallel, AveragedModel)) else None


def _callable(model: torch.nn.Module) -> bool:
    import torch

    return type(model).forward is not torch.nn.Module.forward or "forward" in vars(model)


def _only_child(model: torch.nn.Module) -> torch.nn.Module:
    children = dict(model.named_children())
    if len(children) != 1:
        held = f"it holds {', '.join(children)}" if children else "it holds no module"
        raise InvalidInput(
            f"the model is a {type(model).__name__}, whose class has no forward; {held}: "
            "give the module that is to be deployed"
        )
    return next(iter(children.values()))

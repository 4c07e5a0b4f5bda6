"""The module inside a wrapper: of `torch.compile`, of data parallelism, of averaged weights (EMA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hwsearch.errors import InvalidInput

if TYPE_CHECKING:
    import torch


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

"""How a model is called: the inputs of a Task as arguments, the mode it is called in, and the flat inputs of its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx._pytree import tree_flatten_spec

from hwsearch.errors import InvalidInput
from hwsearch.exporting import first_line
from hwsearch.task import Inputs


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in any of the forms that a Task takes, as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode; afterwards its submodules' modes and its buffers are what they were."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before) and not (
                torch.isnan(before).any() and buffer.is_floating_point()
            ):
                buffer.detach().copy_(before)


def flat_inputs(graph: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The placeholders' values, in order, for a call with the model's signature.

    Arguments may be positional or by name, whichever way the example was. Raises InvalidInput on any others.
    """
    codegen: Any = graph.graph._codegen
    spec = codegen.pytree_info.in_spec
    positional, named = spec.children()
    count, names = positional.num_children, list(named.context or ())
    if len(args) != count or set(kwargs) != set(names):
        signature = list(graph.meta.get("signature", ()))
        given = {**dict(zip(signature, args, strict=False)), **kwargs}
        wanted = [*signature[:count], *names]
        extra = [k for k, v in given.items() if k not in wanted and v is not None]
        missing = [k for k in wanted if k not in given]
        if extra or missing or len(args) > len(signature):
            raise InvalidInput(
                f"the model was traced with inputs {', '.join(wanted)}; got {len(args)} by position"
                + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            )
        args, kwargs = tuple(given[k] for k in signature[:count]), {k: given[k] for k in names}
    try:
        return list(tree_flatten_spec((tuple(args), {k: kwargs[k] for k in names}), spec))
    except Exception as error:
        raise InvalidInput(
            f"the inputs have another structure than example_inputs: {first_line(error)}"
        ) from error

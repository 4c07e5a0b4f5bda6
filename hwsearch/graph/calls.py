"""How a model is called: the inputs of a Task as arguments, the mode it is called in, and the flat inputs of its graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx._pytree import tree_flatten_spec
from torch.utils import _pytree as pytree

from hwsearch.errors import InvalidInput
from hwsearch.graph.export import first_line
from hwsearch.graph.state import State
from hwsearch.task import Inputs, without_wrappers


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in any of the forms that a Task takes, as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


def copied(inputs: Any) -> Any:
    """The same arguments in tensors of their own: a model may write into what it is given."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode, without the wrappers inside of it; afterwards all that it holds is as it was.

    That is its submodules and their modes, its buffers, and whatever attributes its calls set.
    """
    with without_wrappers(model):
        state = State(model)
        model.eval()
        try:
            yield model
        finally:
            state.restore()


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

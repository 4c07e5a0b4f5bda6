"""An engine in the place of the model: called as the model is, and scored by the task's `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hwsearch.backends.base import Engine
from hwsearch.backends.process import run_each
from hwsearch.errors import InvalidInput
from hwsearch.graph.batching import put_together
from hwsearch.graph.calls import flat_inputs
from hwsearch.lowering.lowering import Lowering
from hwsearch.task import Task


def predictor(lowering: Lowering, engine: Engine) -> Callable[..., Any]:
    """A callable with the model's signature that runs the engine, in pieces of the engine's batch.

    Returns what the model returns: the same structure, on the CPU, in the model's dtypes. Outputs are put together along the axis
    that follows the batch; see `put_together` for those that have none.
    """
    count = len(engine.inputs)

    def run(pieces: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        for values in pieces:
            if len(values) != count:
                raise InvalidInput(f"the model takes {count} tensors, evaluate gave {len(values)}")
        calls = [[v.detach().cpu().numpy() for v in values] for values in pieces]
        return [[torch.from_numpy(r) for r in found] for found in run_each(engine, calls)]

    return _in_pieces(lowering, run)


def _in_pieces(
    lowering: Lowering, run: Callable[[Sequence[Sequence[torch.Tensor]]], list[list[torch.Tensor]]]
) -> Callable[..., Any]:
    batch = lowering.batch
    leaves, out_spec = pytree.tree_flatten(lowering.traced.outputs)

    def predict(*args: Any, **kwargs: Any) -> Any:
        values = [v for v in flat_inputs(lowering.traced.graph, args, kwargs) if isinstance(v, torch.Tensor)]
        total = next((len(v) for v in values if v.dim()), 1)
        counts = [min(batch, total - start) for start in range(0, total, batch)]
        pieces = []
        for number, count in enumerate(counts):
            part = [v[number * batch : number * batch + count] if v.dim() else v for v in values]
            if count < batch:
                part = [
                    torch.cat([v, v[-1:].expand(batch - count, *v.shape[1:])]) if v.dim() else v for v in part
                ]
            pieces.append(part)
        results = run(pieces)
        merged = iter(put_together(list(zip(*results, strict=True)), lowering.batch_axes, counts, batch))
        filled = [next(merged).to(leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, out_spec)

    return predict


def score(task: Task, predict: Callable[..., Any], what: str, by: str = "evaluate") -> float:
    """evaluate(predict), or validate(predict), as `by` names it, checked. Raises InvalidInput where it gives no finite number."""
    try:
        with torch.no_grad():
            value = float(getattr(task, by)(predict))
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{by} failed on {what}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise InvalidInput(
            f"{by} returned {value} for {what}; expected a finite number, higher is better"
        )
    return value

"""An engine in the place of the model: called as the model is, and scored by the task's `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from hwsearch.backends.base import Engine
from hwsearch.calling import flat_inputs
from hwsearch.errors import InvalidInput
from hwsearch.lower import Lowering
from hwsearch.task import Task


def predictor(at: Lowering, engine: Engine) -> Callable[..., Any]:
    """A callable with the model's signature that runs the engine, in pieces of the engine's batch.

    Returns what the model returns: the same structure, on the CPU, in the model's dtypes.
    """
    batch = at.batch
    leaves, out_spec = pytree.tree_flatten(at.traced.outputs)
    graph = at.traced.graph
    flat_names = [spec.name for spec in engine.inputs]

    def predict(*args: Any, **kwargs: Any) -> Any:
        values = [v for v in flat_inputs(graph, args, kwargs) if isinstance(v, torch.Tensor)]
        if len(values) != len(flat_names):
            raise InvalidInput(f"the model takes {len(flat_names)} tensors, evaluate gave {len(values)}")
        arrays = [v.detach().cpu().numpy() for v in values]
        count = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
        pieces: list[list[Any]] = []
        for start in range(0, count, batch):
            part = [a[start : start + batch] for a in arrays]
            short = batch - part[0].shape[0]
            if short:
                part = [np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) for a in part]
            results = engine(*part)
            pieces.append([r[: batch - short] if short else r for r in results])
        merged = iter([torch.from_numpy(np.concatenate(column)) for column in zip(*pieces, strict=True)])
        filled = [next(merged).to(leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, out_spec)

    return predict


def score(task: Task, predict: Callable[..., Any], what: str) -> float:
    """evaluate(predict), checked. Raises InvalidInput where it fails or does not return a finite number."""
    try:
        with torch.no_grad():
            value = float(task.evaluate(predict))
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"evaluate failed on {what}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise InvalidInput(
            f"evaluate returned {value} for {what}; expected a finite number, higher is better"
        )
    return value

"""Does the traced graph compute what the module does? Compared on calibration data, before anything is built on the graph.

What has no such graph is refused with its name: networks that draw random numbers, and networks that keep state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hwsearch.errors import InvalidInput, UntraceableModel
from hwsearch.graph.calls import copied, evaluating, flat_inputs
from hwsearch.graph.canonical import place, refuse_state
from hwsearch.graph.export import first_line
from hwsearch.graph.nonfinite import Recorder, check_finite
from hwsearch.graph.state import State
from hwsearch.graph.trace import Traced

Call = tuple[tuple[Any, ...], dict[str, Any]]

SAME = 1e-3
"""Relative root mean square error below which two outputs differ by rounding alone; of integers, a hundred times that share."""


def check_equivalence(model: torch.nn.Module, traced: Traced, inputs: Mapping[str, Call]) -> None:
    """Compare the graph with the module, and the module with itself called again, on each of the inputs.

    inputs: calls by what messages name them. Raises UntraceableModel on a network that draws random numbers (naming the first
    operator that does), on one whose outputs depend on earlier calls (naming what they change), and on one that computes
    something else than its graph (naming the first node that differs); InvalidInput where the module fails on a call or returns
    NaN or infinity.
    """
    calls = list(inputs.values())
    fresh = [_fresh(model, call, what) for what, call in inputs.items()]
    for outputs, (what, (args, kwargs)) in zip(fresh, inputs.items(), strict=True):
        check_finite(outputs, traced.graph, flat_inputs(traced.graph, args, kwargs), what)
    if _differ(fresh, _in_a_row(model, calls, range(1, len(calls) + 1))):
        # the random numbers of before: what still differs is due to the calls before
        if _differ(fresh, _in_a_row(model, calls, [0] * len(calls))):
            refuse_state(_changed(model, calls) or ["something outside of the module"])
        raise UntraceableModel(
            f"this network draws random numbers: its outputs on the same input differ from call to call. {_drawn(traced, calls)}. "
            "Make what is drawn an input of forward, or return what it is drawn from"
        )
    for outputs, (what, call) in zip(fresh, inputs.items(), strict=True):
        _compare(model, traced, call, outputs, what)


def check_trace(model: torch.nn.Module, traced: Traced, call: Call, what: str) -> None:
    """Compare the graph with the module on one call. Raises as `check_equivalence`, but for randomness and state."""
    _compare(model, traced, call, _fresh(model, call, what), what)


def _compare(model: torch.nn.Module, traced: Traced, call: Call, outputs: Any, what: str) -> None:
    """Raises UntraceableModel where the graph's outputs on a call are not these, naming the first node that differs."""
    args, kwargs = call
    inputs = flat_inputs(traced.graph, args, kwargs)
    run = fx.Interpreter(traced.graph)
    run.extra_traceback = False
    try:
        with torch.no_grad():
            own = run.run(*inputs, enable_io_processing=False)
    except Exception as error:
        raise UntraceableModel(f"the traced graph fails on {what}: {first_line(error)}") from error
    difference = _error(own, outputs)
    if difference is None:
        return
    with evaluating(model), torch.no_grad(), _seeded(0):
        node = _first_difference(model, traced, call)
    where = f"the first node that differs is {place(node)}" if node is not None else "no single node differs"
    raise UntraceableModel(
        f"the traced graph computes something else than the module on {what}: {difference}; {where}. Make that the same whether "
        "or not the model is exported (no branches on torch.compiler.is_exporting, no values kept as Python numbers)"
    )


def _fresh(model: torch.nn.Module, call: Call, what: str) -> Any:
    args, kwargs = copied(call)
    with evaluating(model), torch.no_grad(), _seeded(0):
        try:
            return model(*args, **kwargs)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InvalidInput(f"the model fails on {what}: {why}") from error


def _in_a_row(model: torch.nn.Module, calls: Sequence[Call], seeds: Sequence[int]) -> list[Any]:
    """Outputs of calls after one another, with whatever each leaves in the module."""
    found = []
    with evaluating(model), torch.no_grad():
        for call, seed in zip(calls, seeds, strict=True):
            args, kwargs = copied(call)
            with _seeded(seed):
                found.append(model(*args, **kwargs))
    return found


def _changed(model: torch.nn.Module, calls: Sequence[Call]) -> list[str]:
    """Paths of the buffers and attributes that calls change."""
    with evaluating(model), torch.no_grad():
        before = State(model)
        for args, kwargs in copied(list(calls)):
            with _seeded(0):
                model(*args, **kwargs)
        return before.changed()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python from a seed; their generators are put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _drawn(traced: Traced, calls: Sequence[Call]) -> str:
    """Where a graph draws random numbers: its first node that differs between two runs."""
    for args, kwargs in calls:
        runs = []
        for seed in (0, 1):
            runs.append(Recorder(traced.graph))
            with torch.no_grad(), _seeded(seed):
                runs[-1].run(*flat_inputs(traced.graph, args, kwargs), enable_io_processing=False)
        for node in traced.graph.graph.nodes:
            if _error(runs[0].values[node], runs[1].values[node]) is not None:
                return f"They are drawn by {place(node)}"
    return "They are not drawn by torch's operators (Python's or NumPy's generator), and the traced graph holds them as constants"


def _differ(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return any(_error(a, b) is not None for a, b in zip(some, others, strict=True))


def _error(have: Any, want: Any) -> str | None:
    """In what two outputs differ by more than rounding; None if in nothing."""
    ours, theirs = _tensors(have), _tensors(want)
    if len(ours) != len(theirs):
        return f"it returns {len(theirs)} tensors, the graph {len(ours)}"
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"output {index} is of {tuple(b.shape)} {b.dtype}, the graph's of {tuple(a.shape)} {a.dtype}"
            )
        off = _distance(a, b)
        if off > (SAME if b.is_floating_point() or b.is_complex() else 100 * SAME):
            return f"output {index} differs by {off:.2g} of its size"
    return None


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative root mean square difference; of integers and booleans the share of values that differ."""
    if not b.numel():
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return float((a != b).double().mean())
    a, b = a.detach(), b.detach()
    if b.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    a, b = a.double().masked_fill(same, 0.0), b.double()
    off = float((a - b.masked_fill(same, 0.0)).norm())
    size = float(b[torch.isfinite(b)].norm())
    return off / (size + 1e-6 * b.numel() ** 0.5) if np.isfinite(off) else float("inf")


class _Eager(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps a copy of every tensor that operators compute, by shape and type."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[tuple[Any, ...], list[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.found.setdefault((tensor.shape, tensor.dtype), []).append(tensor.detach().clone())
        return result


def _first_difference(model: torch.nn.Module, traced: Traced, call: Call) -> fx.Node | None:
    """The first node of the graph whose value the module does not compute, though it computes what the node reads.

    A node whose users all match is right as well: a computation may be written in other steps than the module's.
    """
    args, kwargs = copied(call)
    with _Eager() as eager:
        model(*args, **kwargs)
    recorder = Recorder(traced.graph)
    recorder.run(*flat_inputs(traced.graph, *call), enable_io_processing=False)

    def computed(value: Any) -> bool:
        return all(
            any(_distance(t, own) <= SAME for own in eager.found.get((t.shape, t.dtype), ()))
            for t in _tensors(value)
        )

    right: set[fx.Node] = set()
    for node in reversed(list(traced.graph.graph.nodes)):
        given = node.op in ("placeholder", "get_attr")
        if node.op != "output" and (
            given or computed(recorder.values[node]) or (node.users and all(u in right for u in node.users))
        ):
            right.add(node)
    wrong = (n for n in traced.graph.graph.nodes if n not in right and n.op != "output")
    return next((n for n in wrong if all(i in right for i in n.all_input_nodes)), None)

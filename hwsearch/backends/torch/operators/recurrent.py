"""GRU and LSTM layers, as torch's (and cuDNN's) own. Source: the ONNX operator schemas; torch.nn.GRU and LSTM.

torch counts a GRU's gates reset, update, new, and ONNX update, reset, new; an LSTM's are input, forget, cell, output in torch and
input, output, forget, cell in ONNX. Of the equations only those are run that torch has: no peepholes, no clipping, no other
activations, and a GRU's reset after its product with the hidden state.
"""

from __future__ import annotations

from typing import Any

import torch

from hwsearch.backends.torch.calls import Call, Run, op

Tensor = torch.Tensor

_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}
"""For each gate of torch's order its place in ONNX's."""


@op("GRU", "LSTM")
def recurrent(call: Call) -> Run:
    node, kind = call.node, call.node.op
    both = call.attr("direction", "forward") == "bidirectional"
    if call.attr("direction", "forward") == "reverse":
        raise call.refuse("torch has no layer that runs backwards only")
    strange = [n for n in ("activations", "clip", "layout", "input_forget") if call.attr(n)]
    strange += ["peepholes"] if call.has(7) else []
    strange += (
        ["linear_before_reset = 0"] if kind == "GRU" and not call.attr("linear_before_reset", 0) else []
    )
    if strange:
        raise call.refuse(f"torch has no {kind} with {', '.join(strange)}")
    if call.has(4):
        length = call.const(4)
        if bool((length != call.shape()[0]).any()):
            raise call.refuse("sequences of several lengths are not supported")
    weights = _weights(call, 2 if both else 1)
    hidden, directions = int(call.attr("hidden_size")), 2 if both else 1
    steps, batch, _ = call.shape()
    states = [call.maybe(i) for i in ((5, 6) if kind == "LSTM" else (5,))]
    zeros = torch.zeros(directions, batch, hidden, dtype=call.dtype())
    given = [call.has(i) and state is None for i, state in zip((5, 6), states, strict=False)]
    first = [None if g else call.keep(zeros if s is None else s) for g, s in zip(given, states, strict=True)]
    run: Any = torch.lstm if kind == "LSTM" else torch.gru

    def layer(x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        initial = iter(more)
        start = [next(initial) if s is None else s for s in first]
        state = start if kind == "LSTM" else start[0]
        y, *last = run(x, state, weights, True, 1, 0.0, False, both, False)
        return (y.reshape(steps, batch, directions, hidden).transpose(1, 2), *last)

    wanted = [i for i, name in enumerate(node.outputs) if name]
    return lambda *x: tuple(layer(*x)[: wanted[-1] + 1])


def _weights(call: Call, directions: int) -> list[Tensor]:
    """For each direction torch's four: of the input, of the hidden state, and their biases."""
    order = _GATES[call.node.op]
    of_input, of_hidden = call.const(1), call.const(2)
    gates = len(order)
    bias = (
        call.const(3) if call.has(3) else torch.zeros(directions, 2 * of_input.shape[1], dtype=of_input.dtype)
    )

    def sorted_gates(rows: Tensor) -> Tensor:
        parts = rows.chunk(gates)
        return call.keep(torch.cat([parts[i] for i in order]))

    found = []
    for d in range(directions):
        added = bias[d].chunk(2)
        found += [sorted_gates(of_input[d]), sorted_gates(of_hidden[d]), *map(sorted_gates, added)]
    return found

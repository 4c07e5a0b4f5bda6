"""A serialised ONNX network as it is given to a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwsearch.errors import BackendUnavailable

if TYPE_CHECKING:
    from onnx import ModelProto


def parsed(onnx: bytes, runtime: str) -> tuple[ModelProto, list[str], list[str]]:
    """The model, with the names of its inputs and outputs. Raises BackendUnavailable on what is no ONNX."""
    from onnx import load_model_from_string

    try:
        model = load_model_from_string(onnx)
    except Exception as error:
        raise BackendUnavailable(f"{runtime} cannot be given this network, it is no ONNX: {error}") from error
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in stored]
    outputs = [value.name for value in graph.output]
    if not inputs or not outputs:
        raise BackendUnavailable(
            f"{runtime} cannot be given this network, its ONNX has no inputs or no outputs"
        )
    return model, inputs, outputs

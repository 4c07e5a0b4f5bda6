"""Programs of ONNX networks on the CPU, and what ONNX Runtime computes for the same networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from hwsearch.backends.torch.compiler import compiled
from hwsearch.backends.torch.graph import read
from hwsearch.backends.torch.offering import Kernels
from hwsearch.backends.torch.program import OnnxProgram

CPU = torch.device("cpu")
FLOATS = Kernels()
ON_CPU = Kernels(int8=True, fp8=True)
"""What torch has on the CPU as well; the product of 2:4 weights it has not."""

Arrays = list[np.ndarray[Any, Any]]


def program(model: onnx.ModelProto, there: Kernels = FLOATS, base: str = "fp32") -> OnnxProgram:
    return compiled(read(model), CPU, there, base)


def run(made: OnnxProgram, arrays: Arrays) -> Arrays:
    inputs = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    return [
        value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy() for value in made(inputs)
    ]


def by_onnxruntime(model: onnx.ModelProto, arrays: Arrays, *, optimized: bool = False) -> Arrays:
    """Not optimized: every node by itself, Q/DQ in float as ONNX says."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


def error(got: Arrays, want: Arrays) -> float:
    """The largest error of an output, relative to its largest magnitude."""
    assert len(got) == len(want)
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        if a.size:
            a, b = np.nan_to_num(a.astype(np.float64)), np.nan_to_num(b.astype(np.float64))
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst

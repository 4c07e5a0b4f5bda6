"""What NVIDIA's own ONNX operators compute, for `onnx.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hwsearch.compress.formats import nvfp4_blocks
from hwsearch.lowering.assemble import TRT_DOMAIN


def dynamic_quantize() -> Any:
    """`trt::TRT_FP4DynamicQuantize` on the last axis, as TensorRT documents its DynamicQuantize layer."""
    import ml_dtypes
    from onnx.reference.op_run import OpRun

    class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801
        op_domain = TRT_DOMAIN

        def _run(
            self, x: Any, overall: Any, axis: Any = None, block_size: Any = None, scale_type: Any = None
        ) -> Any:
            values, scales = nvfp4_blocks(torch.from_numpy(np.array(x, np.float32)), float(overall.item()))
            return (
                values.flatten(-2).numpy().astype(ml_dtypes.float4_e2m1fn),
                scales.squeeze(-1).numpy().astype(ml_dtypes.float8_e4m3fn),
            )

    return TRT_FP4DynamicQuantize

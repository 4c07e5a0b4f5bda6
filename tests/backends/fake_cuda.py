"""An imitation of a GPU for backend `torch`: what `Cuda` offers, on host memory, and kernels with the rules that CUDA's have.

Numbers are right, as torch computes them on the CPU; times mean nothing. A captured graph is run anew at each launch and writes the
tensors of its capture. The products refuse what torch's own checks refuse on CUDA; the one of 2:4 weights, which the CPU has not,
multiplies what was compressed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import numpy as np
import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from hwsearch.backends.cuda import Gpu, NotCaptured
from hwsearch.errors import BackendUnavailable

INT_MM, SCALED_MM = torch._int_mm, torch._scaled_mm


class FakeCuda:
    """faults: what goes wrong, see its uses. log: what was done, in order. live: buffers and graphs not yet freed."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.gpu = Gpu("Simulated GPU", capability, "550.54.15", "12.4")
        self.device = torch.device("cpu")
        self.faults: set[str] = set()
        self.log: list[str] = []
        self.live: Counter[str] = Counter()
        self.on_stream = self.held = 0

    @contextlib.contextmanager
    def work(self, what: str) -> Iterator[None]:
        self.on_stream += 1
        try:
            yield
        except RuntimeError as error:
            raise BackendUnavailable(f"{what}: {error}") from error
        finally:
            self.on_stream -= 1

    def buffer(self, shape: tuple[int, ...], dtype: str, *, channels_last: bool = False) -> FakeBuffer:
        if "memory" in self.faults:
            raise BackendUnavailable("no device memory for inputs and outputs: CUDA out of memory")
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        made = FakeBuffer(
            self, tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor
        )
        counted(made, self.live, "buffer")
        return made

    def holding(self, tensor: torch.Tensor) -> FakeBuffer:
        return FakeBuffer(self, tensor)

    def synchronize(self) -> None:
        self.log.append("synchronize")
        if "kernel" in self.faults:
            raise BackendUnavailable("the GPU failed: CUDA error: an illegal memory access was encountered")

    def capture(self, launch: Callable[[], Any]) -> FakeGraph:
        self.log.append("capture")
        if "capture" in self.faults:
            raise NotCaptured("operation not permitted when stream is capturing")
        result = launch()
        return FakeGraph(self, (lambda: result) if "empty graph" in self.faults else launch, result)

    def mark(self) -> FakeMark:
        assert self.on_stream or self.log[-1:] != ["capture"]
        self.log.append("mark")
        return FakeMark()

    def hold(self, ns: float) -> None:
        self.log.append("hold")
        self.held += 1


class FakeMark:
    def __init__(self) -> None:
        self.at = perf_counter_ns()

    def until(self, other: FakeMark) -> float:
        return float(other.at - self.at)


class FakeBuffer:
    def __init__(self, cuda: FakeCuda, tensor: torch.Tensor) -> None:
        self.cuda, self.tensor = cuda, tensor

    def write(self, array: Any) -> None:
        self.tensor.copy_(torch.from_numpy(array))

    def read(self) -> Any:
        return np.array(self.tensor.numpy())

    def clear(self) -> None:
        self.tensor.zero_()


class FakeGraph:
    def __init__(self, cuda: FakeCuda, launch: Callable[[], Any], result: Any) -> None:
        self.cuda, self._launch, self.result = cuda, launch, result
        counted(self, cuda.live, "graph")

    def launch(self, count: int = 1) -> None:
        for _ in range(count):
            self.cuda.log.append("graph")
            for kept, new in zip(self.result, self._launch(), strict=True):
                if kept is not new:
                    kept.copy_(new)


def counted(thing: Any, live: Counter[str], kind: str) -> None:
    """Count an object until it is freed."""
    live[kind] += 1
    weakref.finalize(thing, live.subtract, {kind: 1})


class Products:
    """torch's products of quantized and of 2:4 matrices, with the rules that they have on CUDA; `called` counts them."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()
        self.dense: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def int_mm(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Rules of `_int_mm_out_cuda` (aten/src/ATen/native/cuda/Blas.cpp)."""
        self.called["int8"] += 1
        if a.shape[0] <= 16:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {a.shape[0]}")
        if a.shape[1] % 8 or b.shape[1] % 8:
            raise RuntimeError("self.size(1) and mat2.size(1) need to be multiples of 8")
        assert a.is_contiguous()
        assert b.t().is_contiguous(), "cuBLAS has its fast int8 kernels for weights that lie [out, in]"
        return INT_MM(a, b)

    def scaled_mm(self, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        """Rules of `_scaled_mm_out_cuda` (aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
        self.called["fp8"] += 1
        if a.stride(1) != 1 or b.stride(0) != 1:
            raise RuntimeError("only multiplication of row-major and column-major matrices is supported")
        if a.shape[1] % 16 or b.shape[0] % 16 or b.shape[1] % 16:
            raise RuntimeError("mat2 shape must be divisible by 16")
        scales = options["scale_a"], options["scale_b"]
        if any(scale.dtype != torch.float32 for scale in scales):
            raise RuntimeError("scales must be float (fp32) tensors")
        if scales[0].shape == (a.shape[0], 1) and scales[1].shape == (1, b.shape[1]):
            if options["out_dtype"] != torch.bfloat16:
                raise RuntimeError("Only bf16 high precision output types are supported for row-wise scaling")
            bias = options.get("bias")
            if bias is not None and bias.dtype != torch.bfloat16:
                raise RuntimeError("Bias must be BFloat16 to use row-wise scaling")
            product = (a.float() @ b.float()) * scales[0] * scales[1]
            return (product if bias is None else product + bias.float()).to(torch.bfloat16)
        if any(scale.numel() != 1 for scale in scales):
            raise RuntimeError("for tensorwise scaling, both scales must be of one number")
        return SCALED_MM(a, b, **options)

    def conv_relu(self, x: Any, w: Any, b: Any, strides: Any, pads: Any, dilations: Any, groups: int) -> torch.Tensor:
        """`cudnn_convolution_relu`: images, in memory as the weight's channels are."""
        self.called["conv relu"] += 1
        assert x.dim() == 4
        return torch.relu(torch.nn.functional.conv2d(x, w, b, strides, pads, dilations, groups))

    def conv_add_relu(
        self, x: Any, w: Any, z: Any, alpha: float, b: Any, strides: Any, pads: Any, dilations: Any, groups: int
    ) -> torch.Tensor:  # fmt: skip
        """`cudnn_convolution_add_relu`; z has the shape of the result."""
        self.called["conv add relu"] += 1
        y = torch.nn.functional.conv2d(x, w, b, strides, pads, dilations, groups)
        if y.shape != z.shape:
            raise RuntimeError("z must have the shape of the output")
        return torch.relu(y + alpha * z)

    def compress(self, weight: torch.Tensor) -> torch.Tensor:
        """Rules of `SparseSemiStructuredTensorCUSPARSELT.from_dense` in the torch that is installed."""
        rule = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
        rows, columns = weight.shape
        if rows % rule.sparse_min_rows or columns % rule.sparse_min_cols:
            raise RuntimeError(f"Both dimensions must be multiples of {rule}")
        assert weight.is_contiguous()
        assert int((weight.float() != 0).reshape(rows, -1, 4).sum(-1).max()) <= 2, "more than 2 of 4 weights"
        packed = torch.zeros(
            weight.numel() * (10 if weight.dtype == torch.int8 else 9) // 16, dtype=weight.dtype
        )
        self.dense[packed.data_ptr()] = packed, weight.clone()
        return packed

    def sparse_mm(
        self, packed: torch.Tensor, b: torch.Tensor, bias: Any = None, *, out_dtype: Any = None, transpose_result: bool = False
    ) -> torch.Tensor:  # fmt: skip
        """Rules of `_cslt_sparse_mm` (aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp) and of what calls it in torch.sparse."""
        weight = self.dense[packed.data_ptr()][1]
        rule = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
        kind = "int8" if weight.dtype == torch.int8 else "half"
        self.called[f"2:4 {kind}"] += 1
        if b.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
            raise RuntimeError("A, B and bias must have the same data type")
        if b.shape[0] % rule.dense_min_rows or b.shape[1] % rule.dense_min_cols:
            raise RuntimeError(f"the dense matrix must have dimensions in multiples of {rule}")
        if kind == "int8":
            assert out_dtype == torch.int32
            assert b.t().is_contiguous(), "int8 kernels read the dense matrix transposed"
            result = (weight.double() @ b.double()).to(torch.int32)
        else:
            assert out_dtype is None
            result = (weight.float() @ b.float()).to(weight.dtype)
            result = result if bias is None else result + bias[:, None]
        return result.t().contiguous() if transpose_result else result


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    made = Products()
    monkeypatch.setattr(torch, "_int_mm", made.int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", made.scaled_mm)
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.sparse_mm)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", made.conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", made.conv_add_relu)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return made

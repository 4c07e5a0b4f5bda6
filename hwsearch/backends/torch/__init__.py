"""torch on an NVIDIA GPU: the network's ONNX as torch calls under one CUDA graph, quantized where torch has kernels for it.

It makes tables of a GPU without TensorRT; its rows say `torch`. Each call is a kernel (or several) of torch's own. What is
one call together is said in `fusing`, `products` and `_Compiler._convolution`; which layers run in int8, fp8 and 2:4 in `products`:
matrix products with a constant weight, and convolutions of 1x1. All other quantized layers compute in float what Q/DQ says, and are
recorded as executed so. What ran on an H100 is in docs/gpu_trial.md. Elsewhere the calls run on the CPU and are compared with ONNX
Runtime; CUDA itself, and the kernels that only a GPU has, are imitated (tests/backends/test_torch*.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.cuda import Cuda, driver
from hwsearch.backends.parsing import parsed
from hwsearch.backends.torch import offering
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.network.variants import Variant

if TYPE_CHECKING:
    from hwsearch.backends.torch.engine import TorchEngine
    from hwsearch.backends.torch.offering import Kernels


class TorchBackend:
    """cuda: how the GPU is reached, torch's own way unless told."""

    name = "torch"
    quantize_outputs = False
    int8_bits = 8  # GPUs sum products of int8 in 32 bits
    gpu = True

    def __init__(self, cuda: Cuda | None = None) -> None:
        self._cuda = cuda

    @property
    def cuda(self) -> Cuda:
        """Raises BackendUnavailable without a driver, before torch is imported, and where torch was built without CUDA."""
        if self._cuda is None:
            try:
                driver()
                self._cuda = Cuda()
            except BackendUnavailable as error:
                raise BackendUnavailable(f"torch cannot run on a GPU here: {error}") from error
        return self._cuda

    @property
    def kernels(self) -> Kernels:
        """What this GPU and this torch multiply beside floats."""
        cuda = self.cuda
        from torch.backends import cudnn, cusparselt

        from hwsearch.backends.torch.quantizing import TYPES, unavailable

        with cuda.work("Triton's kernel"):
            quantizes = tuple(name for name, to in TYPES.items() if not unavailable(cuda.device, to))
        return offering.kernels(
            cuda.gpu.capability,
            cusparselt=cusparselt.is_available(),
            cudnn=bool(cudnn.is_available()),  # type: ignore[no-untyped-call]
            quantizes=quantizes,
        )

    def versions(self) -> Mapping[str, str]:
        """Of torch, the CUDA that it was built with, its cuDNN and the driver, with the GPU: times hold for that GPU only."""
        gpu = self.cuda.gpu
        import torch

        there = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        quantizes = self.kernels.quantizes
        found = {
            "torch": torch.__version__,
            "one kernel quantizes to": " and ".join(quantizes),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if there else None,  # type: ignore[no-untyped-call]
            "driver": gpu.driver,
            "gpu": f"{gpu.name} ({gpu.sm})",
        }
        return {key: str(value) for key, value in found.items() if value}

    def bases(self) -> tuple[str, ...]:
        return offering.bases(self.cuda.gpu.capability)

    def variants(self, base: str) -> tuple[Variant, ...]:
        return offering.variants(self.kernels, base)

    def build(self, onnx: bytes, options: BuildOptions) -> TorchEngine:
        if options.base not in self.bases():
            raise BackendUnavailable(
                f"torch does not execute {options.base} on this GPU; it offers {', '.join(self.bases())}"
            )
        if options.threads != 1:
            raise InvalidInput(f"backend torch runs on the GPU; leave --threads at 1, got {options.threads}")
        from hwsearch.backends.torch.arithmetic import arithmetic
        from hwsearch.backends.torch.compiler import compiled
        from hwsearch.backends.torch.engine import TorchEngine
        from hwsearch.backends.torch.graph import read
        from hwsearch.backends.typed import strongly_typed

        model, _, _ = parsed(onnx, "torch")
        network = read(strongly_typed(model, options.base))
        with self.cuda.work("the network does not fit on the GPU"), arithmetic(options.base):
            program = compiled(network, self.cuda.device, self.kernels, options.base)
        return TorchEngine(self.cuda, program, network, options.base)

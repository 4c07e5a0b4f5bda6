"""NVIDIA TensorRT 10.x and 11.x on a GPU: strongly typed networks, precisions by casts and Q/DQ, times by its own profiler.

One code path serves `tensorrt` and `tensorrt_rtx`; where they differ, an attribute is there or is not. Nothing of this has run
on a GPU yet: without one, builds are proven with NVIDIA's own builder, calls against the bindings of `tensorrt_rtx` and
`tensorrt_lean`, and running on an imitation (tests/backends). tests/backends/test_tensorrt_gpu.py is for the first GPU.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from hwsearch import files
from hwsearch.backends.base import BuildOptions
from hwsearch.backends.cuda import Cuda, driver
from hwsearch.backends.parsing import parsed
from hwsearch.backends.tensorrt import offering
from hwsearch.backends.tensorrt.engine import TensorRTEngine
from hwsearch.device.fingerprint import cache_dir
from hwsearch.errors import BackendUnavailable, InvalidInput
from hwsearch.network.variants import Variant

_COMPARED_RUNS = 25
"""Inferences by which builds of one network are compared."""


class TensorRTBackend:
    """trt: the module to use, `tensorrt` unless told. cuda: how the GPU is reached, torch unless told.

    package: the name of the module, imported when it is needed, where none is given.
    builds: how often each network is built; the fastest stays, and its engine keeps the times of all. Tactics are chosen by
    timing them, so that no two builds need be alike.
    """

    quantize_outputs = False
    int8_bits = 8  # GPUs sum products of int8 in 32 bits
    gpu = True

    def __init__(
        self, trt: Any = None, cuda: Cuda | None = None, *, package: str = "tensorrt", builds: int = 1
    ) -> None:
        if builds < 1:
            raise InvalidInput(f"a network must be built at least once, got builds={builds}")
        self._trt, self._cuda = trt, cuda
        self._builds = builds
        self._package = package if trt is None else trt.__name__
        self.name = self._package.replace("_", "-")  # the kernels of tensorrt_rtx are not TensorRT's

    @property
    def trt(self) -> Any:
        """The module. Raises BackendUnavailable, as `cuda` does, with all that is missing here."""
        self._require()
        return self._trt

    @property
    def cuda(self) -> Cuda:
        self._require()
        assert self._cuda is not None
        return self._cuda

    def _require(self) -> None:
        missing: list[str] = []
        if self._trt is None:
            try:
                self._trt = import_module(self._package)
            except (ImportError, OSError) as error:  # its libraries may be missing, or be of another CUDA
                missing.append(
                    f"the package {self._package} cannot be imported ({error}), install it with: "
                    f"pip install 'hwsearch[{self.name}]'"
                )
        if self._cuda is None:
            try:
                driver()
                if not missing:
                    self._cuda = Cuda()
            except BackendUnavailable as error:
                missing.append(str(error))
        if missing:
            raise BackendUnavailable(f"{self.name} cannot run here: {'; and '.join(missing)}")

    def versions(self) -> Mapping[str, str]:
        """Of TensorRT, the driver and CUDA, with the GPU: times hold for that GPU only."""
        gpu = self.cuda.gpu
        found = {self.trt.__name__: str(self.trt.__version__), "driver": gpu.driver, "cuda": gpu.cuda}
        return {key: value for key, value in found.items() if value} | {"gpu": f"{gpu.name} ({gpu.sm})"}

    def bases(self) -> tuple[str, ...]:
        """Raises BackendUnavailable, with the reason, where it offers none on this GPU."""
        capability = self.cuda.gpu.capability
        found = offering.bases(capability, self.name)
        if not found:
            why = offering.why_none(capability, self.name)
            raise BackendUnavailable(
                f"{self.name} cannot run on {self.cuda.gpu.name}: {why}; use another backend"
            )
        return found

    def variants(self, base: str) -> tuple[Variant, ...]:
        return offering.variants(self.cuda.gpu.capability, self.name, base)

    def build(self, onnx: bytes, options: BuildOptions) -> TensorRTEngine:
        if options.base not in self.bases():
            raise BackendUnavailable(
                f"{self.name} does not execute {options.base} on this GPU; it offers {', '.join(self.bases())}"
            )
        if options.threads != 1:
            raise InvalidInput(f"{self.name} runs on the GPU; leave --threads at 1, got {options.threads}")
        from hwsearch.backends.tensorrt.builder import BuildRequest, serialise
        from hwsearch.backends.tensorrt.buildlog import sparsity
        from hwsearch.backends.typed import strongly_typed

        model, inputs, outputs = parsed(onnx, "TensorRT")
        typed = strongly_typed(model, options.base).SerializeToString()
        cache = self.timing_cache()
        found = cache.read_bytes() if cache.exists() else None
        sparse = any(
            v.kept for v in self.variants(options.base)
        )  # tried for weights that are 2:4, and for no others
        engines = []
        for index in range(self._builds):
            # only the first build looks into the cache: the others are to choose their tactics anew
            request = BuildRequest(
                typed, base=options.base, sparse=sparse, timing_cache=None if index else found
            )
            built = serialise(self.trt, request)
            if not index and built.timing_cache is not None and built.timing_cache != found:
                files.write_bytes(cache, built.timing_cache)
            told = sparsity(built.log)
            picked = told.picked_layers if told is not None else ()
            engines.append(TensorRTEngine(self.trt, self.cuda, built.plan, inputs, outputs, picked))
        return engines[0] if len(engines) == 1 else _fastest(engines)

    def timing_cache(self) -> Path:
        """The file of the tactics' times, shared by all builds of one GPU, driver and TensorRT."""
        key = "-".join(f"{name}-{version}" for name, version in self.versions().items())
        return cache_dir() / "tensorrt" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key).strip('-')}.timing"


def rtx() -> TensorRTBackend:
    """TensorRT for RTX: a small package with kernels of its own, which it finishes compiling on the GPU."""
    return TensorRTBackend(package="tensorrt_rtx")


def _fastest(engines: list[TensorRTEngine]) -> TensorRTEngine:
    """The engine of the least median time on the GPU, all run in turn."""
    times: list[list[int]] = [[] for _ in engines]
    for _ in range(_COMPARED_RUNS):
        for candidate, taken in zip(engines, times, strict=True):
            taken.append(candidate.run.replays(1))
    medians = tuple(statistics.median(taken) for taken in times)
    best = engines[medians.index(min(medians))]
    best.build_times_ns = medians
    return best

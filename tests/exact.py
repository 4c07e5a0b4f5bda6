"""How many bits int8 weights have on this machine, for its runtimes to sum their products exactly."""

from __future__ import annotations

from functools import cache

from hwsearch.backends.base import BuildOptions
from hwsearch.backends.exactness import int8_bits
from hwsearch.backends.onnxruntime import ONNXRuntimeBackend
from hwsearch.backends.openvino import OpenVINOBackend


@cache
def bits() -> int:
    """Of both CPU runtimes."""
    return min(int8_bits(b, BuildOptions()) for b in (OpenVINOBackend(), ONNXRuntimeBackend()))

"""A backend whose engines do what their ONNX bytes say: for tests of engines in processes of their own, which import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping

import numpy as np

from hwsearch.backends.base import Array, BuildOptions, NodeTime, TensorSpec, check_arrays
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import Variant


class FrailBackend:
    name = "frail"
    quantize_outputs = False
    own_process = True

    def versions(self) -> Mapping[str, str]:
        return {"frail": "1"}

    def bases(self) -> tuple[str, ...]:
        return ("fp32",)

    def variants(self, base: str) -> tuple[Variant, ...]:
        return (Variant(base),)

    def build(self, onnx: bytes, options: BuildOptions) -> FrailEngine:
        if onnx == b"refused":
            raise BackendUnavailable("frail does not like it")
        if onnx == b"wrong":
            raise ZeroDivisionError("of the runtime's own")
        if onnx == b"killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return FrailEngine(onnx.decode())


class FrailEngine:
    inputs = (TensorSpec("x", (2, 3), "float32"),)
    outputs = (TensorSpec("y", (2, 3), "float32"),)
    size_bytes = 7
    properties = {"FRAIL": "1"}  # noqa: RUF012

    def __init__(self, what: str) -> None:
        self.what, self.runs = what, 0

    def __call__(self, *arrays: Array) -> list[Array]:
        if self.what == "pid":
            return [np.array([os.getpid(), self.runs])]
        if self.what == "environment":
            return [np.array([os.environ.get("GLIBC_TUNABLES", ""), *sys.path])]
        return [2.0 * a for a in check_arrays(arrays, self.inputs)]

    def prepare(self, *arrays: Array) -> None:
        check_arrays(arrays, self.inputs)

    def run(self) -> None:
        print("a runtime that writes to standard output")
        self.runs += 1
        if self.what == "crashes":
            os.abort()
        if self.what == "sleeps":
            time.sleep(600.0)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        return [NodeTime("n", "Op", ("x",), "fp32", float(runs))]

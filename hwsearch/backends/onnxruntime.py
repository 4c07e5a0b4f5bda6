"""ONNX Runtime on CPUs: fp32, and int8 where the Q/DQ around a layer is fused into an integer kernel.

Source: ONNX Runtime's documentation of Q/DQ, of graph optimizations and of its profiling tool.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hwsearch.backends.base import Array, BuildOptions, NodeTime, TensorSpec, check_arrays, example_arrays
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import Variant

_INT8_KERNELS = (
    "QLinear",
    "QGemm",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantize",
    "QAttention",
    "QOrdered",
)
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_TYPE_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


class ONNXRuntimeBackend:
    name = "onnxruntime"
    quantize_outputs = True
    own_process = True
    weight_storage = True
    unsigned_activations = True

    def _runtime(self) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailable(
                f"ONNX Runtime cannot be imported ({error}); install it with: pip install 'hwsearch[cpu]'"
            ) from error
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendUnavailable(
                f"this ONNX Runtime has no CPU execution provider; it has {onnxruntime.get_available_providers()}"
            )
        return onnxruntime

    def versions(self) -> Mapping[str, str]:
        self._runtime()
        return {
            "onnxruntime": version("onnxruntime"),
            "calls": "a process and huge pages for each engine, workers awake during a run",
        }

    def bases(self) -> tuple[str, ...]:
        self._runtime()
        return ("fp32",)

    def variants(self, base: str) -> tuple[Variant, ...]:
        return Variant(base), Variant("int8")

    def build(self, onnx: bytes, options: BuildOptions) -> ONNXRuntimeEngine:
        if options.base not in self.bases():
            raise BackendUnavailable(f"ONNX Runtime does not execute {options.base} on CPUs; it offers fp32")
        return ONNXRuntimeEngine(self._runtime(), onnx, options)


class ONNXRuntimeEngine:
    def __init__(self, runtime: Any, onnx: bytes, options: BuildOptions) -> None:
        self._runtime, self._onnx, self._options = runtime, onnx, options
        self._session = self._open(None)
        self.inputs = [_spec(value) for value in self._session.get_inputs()]
        self.outputs = [_spec(value) for value in self._session.get_outputs()]
        self.prepare(*example_arrays(self.inputs))

    def _open(self, trace: Path | None) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._options.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Workers wait awake for their next node, as by default, but not on after a run: they would slow whatever is timed in turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        try:
            return self._runtime.InferenceSession(self._onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendUnavailable(
                f"ONNX Runtime failed to build the network: {str(error)[:300]}"
            ) from error

    @property
    def size_bytes(self) -> int:
        return len(self._onnx)

    def __call__(self, *arrays: Array) -> list[Array]:
        checked = check_arrays(arrays, self.inputs)
        feed = {spec.name: array for spec, array in zip(self.inputs, checked, strict=True)}
        return list(self._session.run(None, feed))

    def prepare(self, *arrays: Array) -> None:
        self._prepared = check_arrays(arrays, self.inputs)
        self._binding = self._bind(self._session)

    def _bind(self, session: Any) -> Any:
        binding = session.io_binding()
        for spec, array in zip(self.inputs, self._prepared, strict=True):
            binding.bind_cpu_input(spec.name, array)
        for spec in self.outputs:
            binding.bind_output(spec.name, "cpu")
        return binding

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(Path(folder) / "trace")
            binding = self._bind(session)
            for _ in range(runs + 3):
                session.run_with_iobinding(binding)
            path = session.end_profiling()
            events = json.loads(Path(path).read_text())
            os.unlink(path)
        return _node_times(events, skip=3)


def _node_times(events: list[dict[str, Any]], skip: int) -> list[NodeTime]:
    """Median kernel times from a profiling trace, without each node's first `skip` runs."""
    durations: dict[str, list[float]] = {}
    arguments: dict[str, dict[str, Any]] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            key = f"{name.removesuffix('_kernel_time')}\0{event['args'].get('node_index', '')}"
            durations.setdefault(key, []).append(float(event["dur"]) * 1e3)
            arguments[key] = event["args"]
    nodes = []
    for key, times in durations.items():
        name, args = key.split("\0")[0], arguments[key]
        kept = times[skip:] or times
        nodes.append(
            NodeTime(name, args.get("op_name", ""), (name,), _precision(args), statistics.median(kept))
        )
    return nodes


def _precision(args: Mapping[str, Any]) -> str:
    op = str(args.get("op_name", ""))
    if op.startswith(_INT8_KERNELS):
        return "int8"
    types = [next(iter(entry)) for entry in args.get("input_type_shape", []) if entry]
    return _TYPE_NAMES.get(types[0], types[0]) if types else "fp32"


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(value.name, tuple(value.shape), _DTYPES.get(value.type, value.type))

"""OpenVINO on CPUs: base precision by INFERENCE_PRECISION_HINT, int8 by Q/DQ, times by PERF_COUNT.

Inferences are synchronous, `infer()`, in the calling thread. `start_async()` and `wait()` hand over between three threads,
each of which has to be woken: 8 to 97 us an inference on one virtual machine (`scripts/bench/calls.py`).
Sources: OpenVINO's documentation of the CPU device and of the runtime (execution graph) model; its pull request 29777.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from hwsearch.backends.base import Array, BuildOptions, NodeTime, TensorSpec, check_arrays, example_arrays
from hwsearch.errors import BackendUnavailable
from hwsearch.network.variants import Variant

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_WARM_UP = 5
_ROUNDING_NS = 3e3
"""By how much a part of the runs may be off because counters are whole microseconds."""
_WITHOUT_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
"""Parts of a network that OpenVINO fuses itself run node by node: where its code for one needs more registers than there are."""
_CAPABILITIES = {"bf16": "BF16", "fp16": "FP16", "fp32": "FP32"}


class OpenVINOBackend:
    name = "openvino"
    quantize_outputs = False
    own_process = True
    weight_storage = True
    unsigned_activations = True
    unsigned_concat = True
    avoid_fusions = True

    def __init__(self) -> None:
        self._core: Any = None
        self._bases: tuple[str, ...] | None = None

    @property
    def core(self) -> Any:
        if self._core is None:
            try:
                import openvino
            except ImportError as error:
                raise BackendUnavailable(
                    f"OpenVINO cannot be imported ({error}); install it with: pip install 'hwsearch[cpu]'"
                ) from error
            try:
                core = openvino.Core()
                if "CPU" not in core.available_devices:
                    raise RuntimeError(f"no CPU device; available: {core.available_devices}")
            except Exception as error:
                raise BackendUnavailable(f"OpenVINO is installed but does not start: {error}") from error
            self._core = core
        return self._core

    def versions(self) -> Mapping[str, str]:
        _ = self.core
        return {
            "openvino": version("openvino"),
            "calls": "synchronous, a process and huge pages for each engine",
        }

    def bases(self) -> tuple[str, ...]:
        if self._bases is None:
            capable = set(self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
            offered = [base for base, name in _CAPABILITIES.items() if name in capable]
            self._bases = tuple(base for base in offered if base == "fp32" or _compiles(self.core, base))
        return self._bases

    def variants(self, base: str) -> tuple[Variant, ...]:
        int8 = "INT8" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (Variant(base), Variant("int8")) if int8 else (Variant(base),)

    def build(self, onnx: bytes, options: BuildOptions) -> OpenVINOEngine:
        if options.base not in self.bases():
            raise BackendUnavailable(
                f"OpenVINO does not execute {options.base} on this CPU; it offers {', '.join(self.bases())}"
            )
        return OpenVINOEngine(self.core, onnx, options)


def _compiles(core: Any, base: str) -> bool:
    """Whether a convolution compiles: capabilities are of the CPU, whatever ONEDNN_MAX_CPU_ISA leaves of it."""
    import openvino
    from openvino import opset13 as operators

    given = operators.parameter([1, 16, 8, 8], np.float32)
    weight = operators.constant(np.ones((16, 16, 3, 3), np.float32))
    model = openvino.Model([operators.convolution(given, weight, [1, 1], [1, 1], [1, 1], [1, 1])], [given])
    try:
        core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[base], "INFERENCE_NUM_THREADS": 1})
    except RuntimeError:
        return False
    return True


class OpenVINOEngine:
    def __init__(self, core: Any, onnx: bytes, options: BuildOptions) -> None:
        self._core, self._onnx, self._options = core, onnx, options
        self.properties: dict[str, str] = {}
        self._compiled = self._compile(counters=False)
        self._request = self._compiled.create_infer_request()
        self.inputs = [_spec(port) for port in self._compiled.inputs]
        self.outputs = [_spec(port) for port in self._compiled.outputs]
        self.prepare(*example_arrays(self.inputs))

    def _compile(self, *, counters: bool) -> Any:
        config = {
            "INFERENCE_PRECISION_HINT": _HINTS[self._options.base],
            "INFERENCE_NUM_THREADS": self._options.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "PERF_COUNT": counters,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            **self.properties,
        }
        try:
            return self._core.compile_model(self._core.read_model(self._onnx), "CPU", config)
        except Exception as error:
            if "snippet" in str(error) and not self.properties:
                self.properties = dict(_WITHOUT_SNIPPETS)
                return self._compile(counters=counters)
            raise BackendUnavailable(f"OpenVINO failed to compile the network: {_reason(error)}") from error

    @property
    def size_bytes(self) -> int:
        exported = self._compiled.export_model()
        return len(exported.getvalue() if hasattr(exported, "getvalue") else exported)

    def __call__(self, *arrays: Array) -> list[Array]:
        self.prepare(*arrays)
        self.run()
        return [self._request.get_output_tensor(i).data.copy() for i in range(len(self.outputs))]

    def prepare(self, *arrays: Array) -> None:
        import openvino

        self._prepared = check_arrays(arrays, self.inputs)
        for index, array in enumerate(self._prepared):
            self._request.set_input_tensor(index, openvino.Tensor(array))

    def run(self) -> None:
        self._request.infer(share_outputs=True)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        import openvino

        compiled = self._compile(counters=True)
        request = compiled.create_infer_request()
        for index, array in enumerate(self._prepared):
            request.set_input_tensor(index, openvino.Tensor(array))
        profile = _node_means(request, runs)
        nodes = []
        for op in compiled.get_runtime_model().get_ordered_ops():
            info = op.get_rt_info()
            name = op.get_friendly_name()
            if name not in profile:
                continue
            sources = info["originalLayersNames"].value if "originalLayersNames" in info else ""
            precision = info["runtimePrecision"].value
            nodes.append(
                NodeTime(
                    name=name,
                    op=info["layerType"].value,
                    sources=tuple(s for s in sources.split(",") if s),
                    precision=_PRECISIONS.get(precision, precision),
                    time_ns=profile[name],
                )
            )
        return nodes


def _node_means(request: Any, runs: int) -> dict[str, float]:
    """Mean nanoseconds of each executed node over so many inferences, without the first ones.

    The counters are means since the network was compiled, in whole microseconds, and the first inferences prepare primitives,
    which takes many times as long: so sums are taken apart. Of three parts of the runs the middle one counts where a node was
    interrupted in another.
    """
    counts = [_WARM_UP + round(part * max(runs, 3) / 3) for part in range(4)]
    sums: list[dict[str, float]] = []
    done = 0
    for count in counts:
        for _ in range(count - done):
            request.infer()
        done = count
        sums.append({name: mean * count for name, mean in _means(request).items()})
    found = {}
    for name, total in sums[-1].items():
        marks = [own.get(name, 0.0) for own in sums]
        mean = (total - marks[0]) / (counts[-1] - counts[0])
        parts = [(marks[i + 1] - marks[i]) / (counts[i + 1] - counts[i]) for i in range(3)]
        middle = sorted(parts)[1]
        found[name] = max(mean if mean <= 1.1 * middle + _ROUNDING_NS else middle, 0.0)
    return found


def _means(request: Any) -> dict[str, float]:
    """Mean nanoseconds of each executed node since its network was compiled."""
    found: dict[str, float] = {}
    for info in request.get_profiling_info():
        if "EXECUTED" in str(info.status) and "NOT_RUN" not in str(info.status):
            taken = info.real_time.total_seconds() * 1e9
            found[info.node_name] = found.get(info.node_name, 0.0) + taken
    return found


def _spec(port: Any) -> TensorSpec:
    import numpy as np

    return TensorSpec(
        port.get_any_name(), tuple(port.get_shape()), np.dtype(port.get_element_type().to_dtype()).name
    )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

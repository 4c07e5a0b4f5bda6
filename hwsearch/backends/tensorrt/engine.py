"""A TensorRT plan, deserialised and run on one GPU.

Sources: TensorRT's documentation of its Python runtime (`set_tensor_address`, `execute_async_v3`), of performance measurement
("CUDA Graphs", "Built-In TensorRT Profiling": a separate pass, as events between layers slow an inference down).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hwsearch.backends.base import Array, NodeTime, TensorSpec, check_arrays
from hwsearch.backends.cuda import Buffer, Cuda, Graph, GraphRun, NotCaptured
from hwsearch.backends.tensorrt.inspector import joined, layers_of, with_picked
from hwsearch.backends.tensorrt.log import log_of, reasons, started
from hwsearch.errors import BackendUnavailable

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
"""numpy's name of each TensorRT type that an input or output may have; numpy has no bf16."""
_WARM_UP = 3
"""Inferences with the profiler on that do not count: the first loads kernels."""


class TensorRTEngine:
    """Inputs and outputs stay in device memory of fixed addresses, so that one CUDA graph serves all inferences.

    run: launches one inference and waits until the GPU is done with it. Host transfers are excluded: inputs are on the device
    since `prepare`, outputs stay there.
    build_times_ns: where the plan is the fastest of several builds, the median time of each of them.
    """

    def __init__(
        self, trt: Any, cuda: Cuda, plan: bytes, inputs: Sequence[str], outputs: Sequence[str],
        picked: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """inputs, outputs: names, in the order of the ONNX graph. picked: layers that the builder's log says run sparse.

        Raises BackendUnavailable with TensorRT's own reason, also where an inference cannot be captured as a graph: launched
        layer by layer it would be timed as something else than the engines that it is compared with.
        """
        self._trt, self._cuda, self._log = trt, cuda, log_of(trt)
        self.size_bytes, self._picked = len(plan), tuple(picked)
        self.build_times_ns: tuple[float, ...] = ()
        runtime = started(trt, trt.Runtime, self._log)
        self._engine = self._made(
            lambda: runtime.deserialize_cuda_engine(plan), "TensorRT cannot load the plan on this GPU"
        )
        self.inputs, self.outputs = self._specs(inputs, outputs)
        self._buffers = {s.name: cuda.buffer(s.shape, s.dtype) for s in (*self.inputs, *self.outputs)}
        self._context = self._new_context()
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        self._graph = self._captured()
        self.run = GraphRun(cuda, self._graph)

    def _specs(
        self, inputs: Sequence[str], outputs: Sequence[str]
    ) -> tuple[list[TensorSpec], list[TensorSpec]]:
        engine, modes = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for mode, wanted in ((modes.INPUT, inputs), (modes.OUTPUT, outputs)):
            found = {name for name in names if engine.get_tensor_mode(name) == mode}
            if found != set(wanted):
                raise BackendUnavailable(
                    f"TensorRT's engine has the {mode.name.lower()}s {', '.join(sorted(found))}, the ONNX graph has "
                    f"{', '.join(wanted)}; inputs that nothing reads must be removed from the model"
                )
        return [self._spec(name) for name in inputs], [self._spec(name) for name in outputs]

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(n) for n in self._engine.get_tensor_shape(name))
        dtype = str(self._engine.get_tensor_dtype(name).name)
        if min(shape, default=0) < 0:
            raise BackendUnavailable(
                f"{name} has the dynamic shape {shape}; engines are built for fixed shapes"
            )
        if dtype not in _DTYPES:
            raise BackendUnavailable(f"{name} is of TensorRT's type {dtype}, which arrays cannot hold")
        return TensorSpec(name, shape, _DTYPES[dtype])

    def _new_context(self) -> Any:
        """An execution context on the engine's buffers."""
        context = self._made(
            self._engine.create_execution_context,
            "TensorRT makes no execution context (device memory may have run out)",
        )
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise BackendUnavailable(f"TensorRT does not take the address of {name}: {self._reasons()}")
        return context

    def _captured(self) -> Graph:
        """A graph of one inference, after a plain one, which prepares it."""
        self._enqueue(self._context)
        self._cuda.synchronize()
        why = "TensorRT's engine cannot be captured as a CUDA graph"
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT for RTX
        if capturable is not None and not capturable(self._cuda.stream):
            raise BackendUnavailable(f"{why}: TensorRT says so")
        context = self._context
        try:
            graph = self._cuda.capture(lambda: self._enqueue(context))
        except NotCaptured as error:
            raise BackendUnavailable(f"{why}: {error}") from error
        if not self._same_outputs(graph):
            raise BackendUnavailable(f"{why}: the graph does not compute the outputs")
        return graph

    def _same_outputs(self, graph: Graph) -> bool:
        """Whether a graph writes the outputs: an empty one would be timed as a very fast engine."""
        outputs: list[Buffer] = [self._buffers[s.name] for s in self.outputs]
        plain = [buffer.read() for buffer in outputs]
        for buffer in outputs:
            buffer.clear()
        graph.launch()
        self._cuda.synchronize()
        return all(buffer.read().any() == before.any() for buffer, before in zip(outputs, plain, strict=True))

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._cuda.stream):
            raise BackendUnavailable(f"TensorRT does not run the engine: {self._reasons()}")

    def _made(self, make: Callable[[], Any], what: str) -> Any:
        """What a call makes. Raises BackendUnavailable on None and on errors of the bindings."""
        try:
            made = make()
        except (TypeError, RuntimeError) as error:
            raise BackendUnavailable(f"{what} ({error}): {self._reasons()}") from error
        if made is None:
            raise BackendUnavailable(f"{what}: {self._reasons()}")
        return made

    def _reasons(self) -> str:
        return reasons(self._log.lines) or "it gave no reason"

    def __call__(self, *arrays: Array) -> list[Array]:
        self.prepare(*arrays)
        self.run()
        return [self._buffers[s.name].read() for s in self.outputs]

    def prepare(self, *arrays: Array) -> None:
        """Copy the inputs to the device, where `run` reads them."""
        for spec, array in zip(self.inputs, check_arrays(arrays, self.inputs), strict=True):
            self._buffers[spec.name].write(array)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        """Executed layers with their mean times over `runs` inferences, by TensorRT's profiler, in a context of its own."""
        profiler = _profiler(self._trt)
        context = self._new_context()
        context.profiler = profiler
        context.enqueue_emits_profile = False  # else each inference waits for its layers' events
        for run in range(_WARM_UP + runs):
            if run == _WARM_UP:
                profiler.times_ms.clear()
            self._enqueue(context)
            self._cuda.synchronize()
            if not context.report_to_profiler():
                raise BackendUnavailable(f"TensorRT reports no layer times: {self._reasons()}")
        inspector = self._made(self._engine.create_engine_inspector, "TensorRT makes no engine inspector")
        inspector.execution_context = context
        information = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return joined(with_picked(layers_of(information), self._picked), profiler.times_ms, runs)


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Milliseconds of each layer, added up over inferences."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times_ms: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times_ms[layer_name] = self.times_ms.get(layer_name, 0.0) + ms

    return Profiler()

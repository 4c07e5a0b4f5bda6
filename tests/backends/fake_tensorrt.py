"""An imitation of the `tensorrt` module and of a GPU, for the order of calls, failures and clean-up.

A plan is the ONNX network itself, and ONNX Runtime computes it: numbers are right, times mean nothing. What is launched runs
when the stream is synchronised, not before. The rules that a call may break are NVIDIA's documented ones, and broken ones fail
as documented: by None, by False, or by an exception.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections import Counter
from collections.abc import Callable
from enum import Enum, IntEnum
from functools import partial
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from hwsearch.backends.cuda import Gpu, NotCaptured
from hwsearch.backends.nodenames import unit_of
from hwsearch.testing.simulated import asked_precisions

DEFAULT_STREAM, SIDE_STREAM = 0, 77
_MAGIC = b"fake plan\0"
_TYPES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.INT8: "INT8", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL", TensorProto.BFLOAT16: "BF16", TensorProto.INT4: "INT4",
    TensorProto.FLOAT8E4M3FN: "FP8",
}  # fmt: skip
_WORDS = {
    "FLOAT": "Float",
    "HALF": "Half",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "BOOL": "Bool",
    "INT4": "Int4",
    "FP8": "FP8",
}


class FakeCuda:
    """What `hwsearch.backends.cuda.Cuda` offers, on host memory. faults: what goes wrong, see its uses."""

    def __init__(self, capability: tuple[int, int] = (7, 5)) -> None:
        self.gpu = Gpu("Simulated GPU", capability, "550.54.15", "12.4")
        self.stream = SIDE_STREAM
        self.memory: weakref.WeakValueDictionary[int, FakeBuffer] = weakref.WeakValueDictionary()
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.faults: set[str] = set()
        self.live: Counter[str] = Counter()
        self.graph_launches = self.synchronised = 0
        self._addresses = itertools.count(4096, 4096)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> FakeBuffer:
        made = FakeBuffer(self, next(self._addresses), np.zeros(shape, dtype))
        self.memory[made.address] = made
        return made

    def synchronize(self) -> None:
        self.synchronised += 1
        work, self.queue = self.queue, []
        for step in work:
            step()

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def hold(self, ns: float) -> None:
        """Nothing runs before `synchronize` anyway."""

    def mark(self) -> FakeMark:
        made = FakeMark()
        self.put(made.come)
        return made

    def capture(self, launch: Callable[[], None]) -> FakeGraph:
        if "capture" in self.faults:
            raise NotCaptured("operation not permitted when stream is capturing")
        assert not self.queue, "a capture began while work was waiting"
        self.recording = []
        try:
            launch()
        finally:
            recorded, self.recording = self.recording, None
        return FakeGraph(self, [] if "empty graph" in self.faults else recorded)


class FakeMark:
    """A moment on the stream, in nanoseconds of this machine's clock."""

    def come(self) -> None:
        self.at = perf_counter_ns()

    def until(self, other: FakeMark) -> float:
        return float(other.at - self.at)


class FakeBuffer:
    def __init__(self, cuda: FakeCuda, address: int, array: Any) -> None:
        self.cuda, self.address, self.array = cuda, address, array
        counted(self, cuda.live, "buffer")

    def write(self, array: Any) -> None:
        assert array.dtype == self.array.dtype
        assert array.shape == self.array.shape
        self.array[...] = array

    def read(self) -> Any:
        return self.array.copy()

    def clear(self) -> None:
        self.array[...] = 0


class FakeGraph:
    def __init__(self, cuda: FakeCuda, work: list[Callable[[], None]]) -> None:
        self.cuda, self.work = cuda, work
        counted(self, cuda.live, "graph")

    def launch(self, count: int = 1) -> None:
        self.cuda.graph_launches += count
        self.cuda.queue.extend(self.work * count)


def counted(thing: Any, live: Counter[str], kind: str) -> None:
    """Count an object until it is freed."""
    live[kind] += 1
    weakref.finalize(thing, live.subtract, {kind: 1})


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Creation(IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


def FakeTensorRT(cuda: FakeCuda, *, version: str = "10.9.0.34", name: str = "tensorrt") -> Any:  # noqa: N802
    """The module: its classes, with `calls` (in order), `live` (objects not yet freed) and `faults` (call -> what it returns,
    or an exception that it raises). `picks` says for which units with 2:4 weights a sparse kernel is the faster one."""
    trt = SimpleModule()
    trt.__name__, trt.__version__ = name, version
    trt.cuda, trt.calls, trt.live, trt.faults = cuda, [], Counter(), {}
    trt.network_errors, trt.saw = [], SimpleNamespace(flags=set(), limits={}, caches=[], targets=[])
    trt.picks = lambda unit: True
    trt.detailed, trt.split_types, trt.cache_bytes = True, version.startswith("11"), b"timings"
    for enum, members in {
        "DataType": "FLOAT HALF BF16 INT8 UINT8 INT32 INT64 BOOL FP8 FP4 INT4",
        "TensorIOMode": "NONE INPUT OUTPUT",
        "LayerInformationFormat": "ONELINE JSON",
        "ProfilingVerbosity": "LAYER_NAMES_ONLY NONE DETAILED",
        "BuilderFlag": "SPARSE_WEIGHTS TF32 EDITABLE_TIMING_CACHE DISABLE_TIMING_CACHE DIRECT_IO",
        "MemoryPoolType": "WORKSPACE TACTIC_SHARED_MEMORY",
        "ComputeCapability": "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121",
        "HardwareCompatibilityLevel": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
    }.items():
        setattr(trt, enum, Enum(enum, {m: i for i, m in enumerate(members.split())}))

    trt.NetworkDefinitionCreationFlag = _Creation

    class Base:
        """What pybind11 requires: that a subclass calls this constructor."""

        def __init__(self) -> None:
            self.constructed = True

    class ILogger(Base):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity
        Severity = Severity

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    class Logger(ILogger):
        def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
            super().__init__()
            self.min_severity = min_severity

        def log(self, severity: Severity, msg: str) -> None:
            pass

    class IProfiler(Base):
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            raise NotImplementedError

    def called(call: str, otherwise: Callable[[], Any]) -> Any:
        """What a call returns: what `faults` says, else what it computes."""
        trt.calls.append(call)
        if call in trt.faults:
            outcome = trt.faults[call]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return otherwise()

    class Owned:
        """Counted while it lives; `log` reaches the logger that it was made with."""

        def __init__(self, owner: Any) -> None:
            self.owner = owner  # kept alive by what it made, as in the real bindings
            logger = owner if isinstance(owner, ILogger) else owner.logger
            if not getattr(logger, "constructed", False):
                raise TypeError("ILogger.__init__() must be called when overriding __init__")
            self.logger = logger
            counted(self, trt.live, type(self).__name__)

        def error(self, message: str) -> None:
            self.logger.log(Severity.ERROR, message)

    class Runtime(Owned):
        def __new__(cls, logger: Any) -> Any:
            return called("Runtime", lambda: object.__new__(cls))

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if not bytes(plan).startswith(_MAGIC):
                self.error("Error Code 1: Serialization (magic tag does not match)")
                return None
            return called("deserialize_cuda_engine", lambda: ICudaEngine(self, bytes(plan)[len(_MAGIC) :]))

    class ICudaEngine(Owned):
        def __init__(self, owner: Any, data: bytes) -> None:
            super().__init__(owner)
            model = onnx.load_model_from_string(data)
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 4, 1
            # Q/DQ in float, as ONNX says: this CPU may sum products of 8 bits inexactly, and a GPU does not
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            self.ins = [v.name for v in self.session.get_inputs()]
            self.outs = [v.name for v in self.session.get_outputs()]
            values = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
            self.values = values
            self.records = _records(model, detailed=trt.detailed, split=trt.split_types)
            # TensorRT promises no order: outputs first, each kind backwards
            self.names = [*reversed(self.outs), *reversed(self.ins)]

        @property
        def num_io_tensors(self) -> int:
            return len(self.names)

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name in self.ins else trt.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(d.dim_value if d.dim_value else -1 for d in self.values[name].shape.dim)

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[_TYPES[self.values[name].elem_type]]

        def create_execution_context(self) -> Any:
            return called("create_execution_context", lambda: IExecutionContext(self))

        def create_engine_inspector(self) -> Any:
            return called("create_engine_inspector", lambda: EngineInspector(self))

    class IExecutionContext(Owned):
        def __init__(self, engine: Any) -> None:
            super().__init__(engine)
            self.engine, self.addresses = engine, {}
            self._profiler: Any = None
            self.enqueue_emits_profile = True
            self.nvtx_verbosity = trt.ProfilingVerbosity.DETAILED
            self.plain_runs, self.unreported = 0, 0
            if name == "tensorrt_rtx":
                self.is_stream_capturable = lambda stream: called("is_stream_capturable", lambda: True)

        @property
        def profiler(self) -> Any:
            return self._profiler

        @profiler.setter
        def profiler(self, value: Any) -> None:
            if not getattr(value, "constructed", False):
                raise TypeError("IProfiler.__init__() must be called when overriding __init__")
            trt.calls.append("profiler")
            self._profiler = value

        def set_tensor_address(self, tensor: str, address: int) -> bool:
            def take() -> bool:
                if address not in cuda.memory or tensor not in self.engine.names:
                    self.error(f"invalid address of {tensor}")
                    return False
                self.addresses[tensor] = address
                return True

            return bool(called("set_tensor_address", take))

        def execute_async_v3(self, stream_handle: int) -> bool:
            return bool(called("execute_async_v3", lambda: self._execute(stream_handle)))

        def _execute(self, stream_handle: int) -> bool:
            missing = [n for n in self.engine.names if n not in self.addresses]
            if missing:
                self.error(f"Neither address or allocator is set for tensor {missing[0]}")
                return False
            assert stream_handle == SIDE_STREAM, "the default stream makes TensorRT synchronise"
            if cuda.recording is not None and not self.plain_runs:
                self.error("operation not permitted when stream is capturing")
                return False
            if cuda.recording is None:
                self.plain_runs += 1
            buffers = {n: cuda.memory[a] for n, a in self.addresses.items()}
            cuda.put(partial(_compute, self.engine, buffers, weakref.ref(self)))
            if self._profiler is not None and self.enqueue_emits_profile:
                cuda.synchronize()
                self._report()
            return True

        def report_to_profiler(self) -> bool:
            return bool(called("report_to_profiler", self._report_once))

        def _report_once(self) -> bool:
            if self._profiler is None or self.enqueue_emits_profile or not self.unreported:
                self.error("no profiling data of the last inference")
                return False
            self._report()
            return True

        def _report(self) -> None:
            share = self.unreported / 1e6 / len(self.engine.records)
            for record in self.engine.records:
                self._profiler.report_layer_time(record if isinstance(record, str) else record["Name"], share)
            self.unreported = 0

    class EngineInspector(Owned):
        execution_context: Any = None

        def get_engine_information(self, form: Any) -> str:
            if form is not trt.LayerInformationFormat.JSON:
                return "\n".join(str(r) for r in self.owner.records)
            return called("get_engine_information", lambda: json.dumps({"Layers": self.owner.records}))

    class Builder(Owned):
        def __new__(cls, logger: Any) -> Any:
            return called("Builder", lambda: object.__new__(cls))

        def create_network(self, flags: int = 0) -> Any:
            trt.saw.network_flags = flags
            return called("create_network", lambda: INetworkDefinition(self))

        def create_builder_config(self) -> Any:
            return called("create_builder_config", lambda: IBuilderConfig(self))

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            def build() -> bytes | None:
                if network.data is None:
                    self.error("Network must have at least one output")
                    return None
                trt.detailed = config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
                if "SPARSE_WEIGHTS" in trt.saw.flags:
                    for line in _sparsity(network.data, trt.picks):
                        self.logger.log(Severity.INFO, line)
                self.logger.log(Severity.VERBOSE, "Engine generation completed")
                return _MAGIC + network.data

            return called("build_serialized_network", build)

    class INetworkDefinition(Owned):
        data: bytes | None = None
        num_outputs = num_inputs = num_layers = 1
        name = ""

    class ITimingCache(Owned):
        def __init__(self, owner: Any, data: bytes) -> None:
            super().__init__(owner)
            self.data = data

        def serialize(self) -> bytes:
            return self.data or trt.cache_bytes

    class IBuilderConfig(Owned):
        num_compute_capabilities = 0

        def __init__(self, owner: Any) -> None:
            super().__init__(owner)
            self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
            self.builder_optimization_level, self.avg_timing_iterations, self.max_aux_streams = 3, 1, -1
            self.max_num_tactics, self.cache = -1, None

        def set_flag(self, flag: Any) -> None:
            trt.saw.flags.add(flag.name)

        def clear_flag(self, flag: Any) -> None:
            trt.saw.flags.discard(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            trt.saw.limits[pool.name] = size

        def create_timing_cache(self, data: bytes) -> Any:
            return called("create_timing_cache", lambda: ITimingCache(self.owner, bytes(data)))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            def take() -> bool:
                self.cache = cache
                trt.saw.caches.append((cache.data, ignore_mismatch))
                return True

            return bool(called("set_timing_cache", take))

        def get_timing_cache(self) -> Any:
            return called("get_timing_cache", lambda: self.cache)

        def set_compute_capability(self, capability: Any, index: int) -> bool:
            trt.saw.targets.append(capability.name)
            return bool(called("set_compute_capability", lambda: True))

    class ParserError:
        def __init__(self, message: str) -> None:
            self.message = message

        def desc(self) -> str:
            return self.message

        def node_name(self) -> str:
            return "conv1|0|Conv"

        def node_operator(self) -> str:
            return "Conv"

        def code(self) -> Any:
            return SimpleNamespace(name="UNSUPPORTED_NODE")

        def node(self) -> int:
            return 0

        def __str__(self) -> str:
            return self.message

    class OnnxParser(Owned):
        def __init__(self, network: Any, logger: Any) -> None:
            super().__init__(network)
            self.network, self.errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self.errors)

        def get_error(self, index: int) -> Any:
            return self.errors[index]

        def clear_errors(self) -> None:
            self.errors.clear()

        def set_flag(self, flag: Any) -> None:
            pass

        def parse(self, data: bytes) -> bool:
            def read() -> bool:
                self.errors = [ParserError(m) for m in trt.network_errors]
                try:
                    onnx.load_model_from_string(bytes(data))
                except Exception:
                    self.errors.append(ParserError("Failed to parse the ONNX model"))
                if self.errors:
                    return False
                self.network.data = bytes(data)
                return True

            return bool(called("parse", read))

    for made in (ILogger, Logger, IProfiler, Runtime, ICudaEngine, IExecutionContext, EngineInspector, Builder, INetworkDefinition,
                 IBuilderConfig, ITimingCache, OnnxParser, ParserError):  # fmt: skip
        setattr(trt, made.__name__, made)
    return trt


class SimpleModule(SimpleNamespace):
    """Attributes, and as hashable as a module."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


def _compute(engine: Any, buffers: dict[str, FakeBuffer], context: Any) -> None:
    start = perf_counter_ns()
    feed = {name: buffers[name].array for name in engine.ins}
    for name, value in zip(engine.outs, engine.session.run(engine.outs, feed), strict=True):
        buffers[name].array[...] = value
    alive = context()
    if alive is not None:
        alive.unreported = perf_counter_ns() - start


def _records(model: Any, *, detailed: bool, split: bool) -> list[Any]:
    """The inspector's layers: a dequantization is fused with what reads it, everything else is a layer of its own."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    stored = {t.name for t in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    records: list[Any] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            continue
        fused = [makers[i] for i in node.input if i in makers and makers[i].op_type == "DequantizeLinear"]
        reads = [makers[i].input[0] if makers.get(i) in fused else i for i in node.input]
        layers = [*fused, node]
        name = " + ".join(n.name for n in layers)
        if not detailed:
            records.append(name)
            continue
        moves = node.op_type in ("QuantizeLinear", "Cast", "Transpose", "Reshape")
        records.append({
            "Name": name,
            "LayerType": "Reformat" if moves else {"Conv": "CaskConvolution", "MatMul": "gemm"}.get(node.op_type, "kgen"),
            "Inputs": [_tensor(r, types, split) for r in reads if r not in stored],
            "Constants": [_tensor(r, types, split) for n in fused for r in n.input[:1] if r in stored],
            "Outputs": [_tensor(o, types, split) for o in node.output],
            "Origin": "QDQ" if moves else "",
            "Metadata": "\x1f".join(f"[ONNX Layer: {n.name}]" for n in layers),
        })  # fmt: skip
    return records


def _sparsity(data: bytes, picks: Callable[[str], bool]) -> list[str]:
    """The builder's lines on layers whose weights are 2:4, in the words of TensorRT 10."""
    model = onnx.load_model_from_string(data)
    units = {u for u, p in asked_precisions(model, "fp32", [(2, 4)]).items() if p.startswith("2:4.")}
    eligible = {
        r["Name"]: unit_of(r["Name"].split(" + ")[-1])[0]
        for r in _records(model, detailed=True, split=False)
        if r["LayerType"] != "Reformat" and unit_of(r["Name"].split(" + ")[-1]) in [(u, True) for u in units]
    }
    picked = [name for name, unit in eligible.items() if picks(unit)]
    return [
        f"(Sparsity) Found {len(eligible)} layer(s) eligible to use sparse tactics: {', '.join(eligible)}",
        f"(Sparsity) Chose {len(picked)} layer(s) using sparse tactics: {', '.join(picked)}",
    ]


def _tensor(name: str, types: dict[str, int], split: bool) -> dict[str, str]:
    word = _WORDS.get(_TYPES.get(types.get(name, 0), ""), "Float")
    if split:
        return {"Name": name, "DataType": word, "Format": f"Row major linear {word} format"}
    return {"Name": name, "Format/Datatype": word}

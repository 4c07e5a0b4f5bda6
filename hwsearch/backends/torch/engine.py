"""A `OnnxProgram` on one GPU: captured as a CUDA graph, timed call by call in a pass apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from hwsearch.backends.base import Array, NodeTime, TensorSpec, check_arrays
from hwsearch.backends.cuda import Cuda, Graph, GraphRun, Mark, NotCaptured
from hwsearch.backends.torch.arithmetic import arithmetic
from hwsearch.backends.torch.graph import Graph as Network
from hwsearch.backends.torch.program import OnnxProgram
from hwsearch.errors import BackendUnavailable

_WARM_UP = 3
"""Plain inferences before the capture and before times count: libraries prepare themselves, and algorithms are chosen."""
_AT_ONCE = 100
"""Calls that are put on the stream while it is held: it takes about a thousand launches before it makes the CPU wait."""
_ARRAYS = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")
"""Types of outputs that numpy has as well."""


class TorchEngine:
    """Inputs stay in device memory of fixed addresses, outputs in memory of the graph's, so that one graph serves all inferences.

    run: launches one inference and waits until the GPU is done with it. Host transfers are excluded: inputs are on the device
    since `prepare`, outputs stay there. size_bytes: of the constants on the device. declined: see `OnnxProgram`.
    """

    def __init__(self, cuda: Cuda, program: OnnxProgram, network: Network, base: str) -> None:
        """base: the precision that the program was compiled for.

        Raises BackendUnavailable with CUDA's own reason, also where the network cannot be captured as a graph: launched call by
        call it would be timed as something else than the engines that it is compared with.
        """
        self._cuda, self._program = cuda, program
        self.size_bytes, self.declined = program.size_bytes, program.declined
        self.inputs = [TensorSpec(n, shape, _name(dtype)) for n, shape, dtype in network.inputs]
        self._buffers = [
            cuda.buffer(s.shape, s.dtype, channels_last=program.channels_last and len(s.shape) == 4)
            for s in self.inputs
        ]
        # a function of its own: a graph that held the engine would keep its memory until the garbage is collected
        self._launch = partial(_launched, cuda, program, [b.tensor for b in self._buffers], base)
        for _ in range(_WARM_UP):
            self._results = self._launch()
        cuda.synchronize()
        self.outputs = [_output(n, value) for n, value in zip(network.outputs, self._results, strict=True)]
        self._graph = self._captured()
        self._results = self._graph.result
        self.run = GraphRun(cuda, self._graph)

    def _captured(self) -> Graph:
        """A graph of one inference."""
        try:
            graph = self._cuda.capture(self._launch)
        except NotCaptured as error:
            raise BackendUnavailable(f"torch cannot capture this network as a CUDA graph: {error}") from error
        if not self._same_outputs(graph):
            raise BackendUnavailable(
                "torch cannot capture this network as a CUDA graph: the graph does not compute the outputs"
            )
        return graph

    def _same_outputs(self, graph: Graph) -> bool:
        """Whether a graph writes the outputs: an empty one would be timed as a very fast engine."""
        constants = [t for t in self._program.places if t is not None]
        given = {t.untyped_storage().data_ptr() for t in (*constants, *(b.tensor for b in self._buffers))}
        plain = [self._cuda.holding(value).read() for value in self._results]
        made = [self._cuda.holding(value) for value in graph.result]
        for buffer in made:
            if buffer.tensor.untyped_storage().data_ptr() not in given:
                buffer.clear()
        graph.launch()
        self._cuda.synchronize()
        return all(buffer.read().any() == before.any() for buffer, before in zip(made, plain, strict=True))

    def __call__(self, *arrays: Array) -> list[Array]:
        self.prepare(*arrays)
        self.run()
        return [self._cuda.holding(value).read() for value in self._results]

    def prepare(self, *arrays: Array) -> None:
        """Copy the inputs to the device, where `run` reads them."""
        checked = check_arrays(arrays, self.inputs)
        for buffer, array in zip(self._buffers, checked, strict=True):
            buffer.write(array)

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        """Calls that launch something, with their mean times over `runs` inferences, launched plainly in a pass apart.

        Times tell what share of an inference a call has: of kernels of a few microseconds they are up to twice those of the
        graph. They are between events on the stream. Launched as they come, a call's time would be that of this process preparing
        the next; so the stream is held until a stretch of calls is waiting on it, and the GPU goes through them without gaps, as
        through a graph. What two events with nothing between them are apart is taken off each.
        """
        begun = time.perf_counter_ns()
        for _ in range(_WARM_UP):
            self._launch()
        launching = (time.perf_counter_ns() - begun) / _WARM_UP
        self._cuda.synchronize()
        share = min(1.0, _AT_ONCE / max(len(self._program.steps), 1))
        watch = _Stopwatch(self._cuda, self._program, hold_ns=3.0 * launching * share)
        for _ in range(runs):
            self._launch(watch.before)
            watch.end()
            self._cuda.synchronize()
        times = watch.times_ns()
        return [
            NodeTime(step.name, step.op, step.sources, step.precision, times[index] / runs)
            for index, step in enumerate(self._program.steps)
            if not step.views
        ]


def _launched(
    cuda: Cuda, program: OnnxProgram, inputs: list[torch.Tensor], base: str, before: Callable[[int], None] | None = None
) -> list[torch.Tensor]:  # fmt: skip
    """Outputs of one inference, launched call by call; they are there once the stream has come so far."""
    with cuda.work("the GPU does not run the network"), arithmetic(base):
        return program(inputs, before)


class _Stopwatch:
    """Marks the stream before each call that launches something; `end` comes after an inference."""

    def __init__(self, cuda: Cuda, program: OnnxProgram, hold_ns: float) -> None:
        self._cuda, self._hold_ns = cuda, hold_ns
        self._timed = [not step.views for step in program.steps]
        self._stretches: list[tuple[list[int], list[Mark]]] = []
        self._steps: list[int] = []
        self._marks: list[Mark] = []

    def before(self, index: int) -> None:
        if not self._timed[index]:
            return
        if len(self._steps) == _AT_ONCE:
            self.end()
        if not self._steps:
            self._cuda.hold(self._hold_ns)
        self._steps.append(index)
        self._marks.append(self._cuda.mark())

    def end(self) -> None:
        """Closes a stretch: one mark ends its last call, and another tells what marks themselves take."""
        if self._steps:
            self._stretches.append((self._steps, [*self._marks, self._cuda.mark(), self._cuda.mark()]))
            self._steps, self._marks = [], []

    def times_ns(self) -> list[float]:
        """For each step its time, added up over the inferences; 0 where it launches nothing. All must have run."""
        added = [0.0] * len(self._timed)
        empty = [marks[-2].until(marks[-1]) for _, marks in self._stretches]
        taken_off = statistics.median(empty) if empty else 0.0
        for steps, marks in self._stretches:
            for place, index in enumerate(steps):
                added[index] += max(marks[place].until(marks[place + 1]) - taken_off, 0.0)
        return added


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _output(name: str, value: torch.Tensor) -> TensorSpec:
    kind = _name(value.dtype)
    if kind not in _ARRAYS:
        raise BackendUnavailable(f"output {name} is of torch's type {kind}, which arrays cannot hold")
    return TensorSpec(name, tuple(value.shape), kind)

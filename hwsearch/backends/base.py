"""The contract between hwsearch and a runtime. Backends see ONNX and arrays, nothing of search or of the user's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hwsearch.network.variants import Variant

Array = NDArray[Any]


@dataclass(frozen=True)
class BuildOptions:
    """How a network is compiled: part of what a latency table is keyed by.

    Args:
        threads: inference threads.
        base: the precision of everything that Q/DQ does not change.
    """

    threads: int = 1
    base: str = "fp32"

    def to_json(self) -> dict[str, Any]:
        """As plain data.

        Returns:
            What JSON can hold.
        """
        return asdict(self)


@dataclass(frozen=True)
class NodeTime:
    """One executed node of a compiled network.

    Args:
        name: the runtime's own name.
        op: the runtime's own operator.
        sources: names of the ONNX nodes or tensors it was made from, by the runtime's record.
        precision: what it executed in, as `Variant.executed` writes it: `fp16`, `int8`, `2:4.fp16` where the kernel
            skipped zeros, `int4` where only its weights are; or the runtime's own word.
        time_ns: mean time of one inference, on the runtime's own counters.
    """

    name: str
    op: str
    sources: tuple[str, ...]
    precision: str
    time_ns: float


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a compiled network.

    Args:
        name: as in the ONNX graph.
        shape: static, the batch included.
        dtype: name of the numpy dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class Engine(Protocol):
    """A compiled network.

    An engine may have `properties` as well, name -> value: what the runtime had to be told beside the options to compile it.
    """

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """In the order of the ONNX graph."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """In the order of the ONNX graph."""

    @property
    def size_bytes(self) -> int:
        """Size of the runtime's own serialised form."""

    def __call__(self, *arrays: Array) -> list[Array]:
        """Run one inference.

        Args:
            *arrays: inputs of exactly the shapes of `inputs`, in that order.

        Returns:
            Outputs in the order of `outputs`; a later call leaves them as they are.

        Raises:
            InvalidInput: another count or other shapes.
        """

    def prepare(self, *arrays: Array) -> None:
        """Set the inputs that `run` uses.

        Args:
            *arrays: as for a call.

        Raises:
            InvalidInput: another count or other shapes.
        """

    def run(self) -> None:
        """One inference on the prepared inputs, with nothing else in the way: this is what is timed."""

    def nodes(self, runs: int = 20) -> list[NodeTime]:
        """Executed nodes with their mean times, in a pass apart from timing.

        Args:
            runs: inferences to take the mean over.

        Returns:
            The nodes in the order of execution where the runtime tells it.
        """


@runtime_checkable
class Backend(Protocol):
    """A runtime that compiles ONNX.

    A backend may have these attributes as well:

    - `own_process = True`: its engines are each compiled and run in a process of their own, see `process`.
    - `weight_storage = True`: it computes right with weights that a file stores in int8 and makes floating by Cast and Mul.
    - `unsigned_activations = True`: int8 activations that were never negative on calibration data are uint8 with zero point 0. It
      gives them one more bit, and CPUs whose products take unsigned inputs need not convert them.
    - `unsigned_concat = True`: Q/DQ between a Concat and a convolution has to be uint8, see `assemble`.
    - `avoid_fusions = True`: a graph must not hold what OpenVINO fuses wrongly (an int8 product whose second operand comes from a
      Softmax, some float convolutions), see `assemble`.
    - `int8_bits = 8`, where int8 products are summed exactly on every device that it runs on (7: with weights of 7 bits only);
      without it a small network is built and run to find out, see `exactness`.
    """

    name: str
    quantize_outputs: bool
    """Whether int8 layers must have their outputs quantized as well to be executed in int8."""

    def versions(self) -> Mapping[str, str]:
        """Versions of the runtime's packages, and how it is called where times depend on that: tables of others are refused.

        Returns:
            Package -> version.

        Raises:
            BackendUnavailable: it is not installed or dead.
        """

    def bases(self) -> tuple[str, ...]:
        """Base precisions that this device executes.

        Returns:
            Their names, the one to prefer first.
        """

    def variants(self, base: str) -> tuple[Variant, ...]:
        """What units may ask for under a base; `legal` says which of it one unit can become.

        Args:
            base: the base precision.

        Returns:
            The variants, `dense.BASE` first.
        """

    def build(self, onnx: bytes, options: BuildOptions) -> Engine:
        """Compile a network.

        Args:
            onnx: a serialised ONNX model.
            options: how to compile it.

        Returns:
            The compiled network.

        Raises:
            BackendUnavailable: it cannot be built, with the runtime's own reason.
        """


def qdq_form(backend: Backend) -> dict[str, bool]:
    """How a backend wants Q/DQ.

    Args:
        backend: any backend.

    Returns:
        The options of `assemble`.
    """
    return {
        "quantize_outputs": backend.quantize_outputs,
        "unsigned_concat": getattr(backend, "unsigned_concat", False),
        "avoid_fusions": getattr(backend, "avoid_fusions", False),
    }


def check_arrays(arrays: Sequence[Array], specs: Sequence[TensorSpec]) -> list[Array]:
    """Make arrays fit an engine.

    Args:
        arrays: inputs in the order of `specs`.
        specs: what the engine takes.

    Returns:
        Contiguous arrays of the specs' dtypes.

    Raises:
        InvalidInput: another count or shape.
    """
    from hwsearch.errors import InvalidInput

    if len(arrays) != len(specs):
        raise InvalidInput(
            f"the engine takes {len(specs)} inputs ({', '.join(s.name for s in specs)}), got {len(arrays)}"
        )
    for array, spec in zip(arrays, specs, strict=True):
        if tuple(array.shape) != spec.shape:
            raise InvalidInput(
                f"input {spec.name} has shape {tuple(array.shape)}; the engine was built for {spec.shape}"
            )
    return [np.ascontiguousarray(a, dtype=s.dtype) for a, s in zip(arrays, specs, strict=True)]


def example_arrays(specs: Sequence[TensorSpec]) -> list[Array]:
    """What an engine runs on before `prepare` is called.

    Args:
        specs: what the engine takes.

    Returns:
        Zeros of the right shapes and dtypes.
    """
    return [np.zeros(s.shape, dtype=s.dtype) for s in specs]

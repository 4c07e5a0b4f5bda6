"""What every backend must keep. A backend's test inherits it:

class TestMine(BackendContract):
    @pytest.fixture
    def backend(self):
        return MyBackend()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hwsearch.backends.base import Array, Backend, BuildOptions, Engine
from hwsearch.backends.exactness import OFF, int8_bits, sum_error
from hwsearch.device.stopwatch import times
from hwsearch.engine.attribution import attribute, executed_precisions
from hwsearch.engine.record import wrong_variants
from hwsearch.engine.setup import Setup
from hwsearch.errors import BackendUnavailable, HwsearchError, InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.marked import tensor_names
from hwsearch.network.variants import INT8_BITS, PRECISIONS, STORAGE, Variant, everywhere, uniform
from hwsearch.table.build import NodeRow
from hwsearch.task import Task

TOLERANCE = {
    "fp32": 1e-4,
    "tf32": 4e-3,
    "bf16": 4e-2,
    "fp16": 1e-2,
    "int8": 6e-2,
    "w8": 1e-4,
    "fp8": 2e-1,
    "int4": 4e-2,
    "nvfp4": 4e-1,
}
"""Largest error of a number, relative to the largest magnitude of its output, by the coarsest precision in the network.

For comparisons number by number, where there is no engine that `hwsearch.engine.outputs` could judge.

A value that a rounding error puts on the other side of a tie is a whole step of the format off: a sixteenth of itself in fp8,
up to a third in E2M1.
"""


_COARSE = [p for p in PRECISIONS if not Variant(p).plain]


DISPATCH_NS = 1e5
"""What a run may take beside its nodes, however small they are."""


class Residual(torch.nn.Module):
    """conv+relu, a residual add, a pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(torch.nn.Module):
    """One transformer block: both products of attention are units without a weight."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class TwoInputs(torch.nn.Module):
    """Keyword arguments in, a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(64, 128), torch.nn.Linear(96, 128)
        self.head = torch.nn.Linear(128, 16)

    def forward(self, *, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = F.relu(self.left(image)) + F.relu(self.right(text))
        return self.head(both), both.mean(-1)


class Stored(torch.nn.Module):
    """Weights that no product of a layer reads: an embedding tied to the last layer, a constant, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(160, 32)
        self.place = torch.nn.Parameter(0.1 * torch.randn(1, 16, 32))
        self.recurrent = torch.nn.LSTM(32, 24, batch_first=True)
        self.up = torch.nn.ConvTranspose1d(24, 32, 4, 2, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.recurrent(self.table(ids) + self.place)
        return F.linear(F.relu(self.up(x.transpose(1, 2))).transpose(1, 2), self.table.weight)


def small_network(name: str, int8_bits: int = INT8_BITS, *, unsigned: bool = False) -> Lowering:
    """`residual`, `attention`, `two_inputs` or `stored`, with random weights, traced and calibrated.

    int8_bits: of int8 weights. unsigned: see `Lowering`.
    """
    return _made(name, int8_bits, unsigned)


@cache
def _made(name: str, int8_bits: int, unsigned: bool) -> Lowering:
    torch.manual_seed(0)
    makers: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], Any]]] = {
        "residual": (Residual, lambda: torch.randn(1, 3, 32, 32)),
        "attention": (Attention, lambda: torch.randn(1, 128, 128)),
        "two_inputs": (TwoInputs, lambda: {"image": torch.randn(64, 64), "text": torch.randn(64, 96)}),
        "stored": (Stored, lambda: torch.randint(0, 160, (2, 16))),
    }
    model, inputs = makers[name]
    example = inputs()
    task = Task(model().eval(), example, [example, inputs()], lambda predict: 0.0, name)
    return Lowering(task, int8_bits=int8_bits, unsigned=unsigned)


def small_setup(name: str, backend: Backend, base: str | None = None) -> Setup:
    """One of these networks for a backend, in the int8 that it takes on this device."""
    options = BuildOptions(1, base or backend.bases()[0])
    unsigned = bool(getattr(backend, "unsigned_activations", False))
    return Setup(small_network(name, int8_bits(backend, options), unsigned=unsigned), backend, options)


def mixed(lowering: Lowering, base: str, variant: Variant = Variant("int8")) -> dict[str, Variant]:  # noqa: B008
    """Every other unit in a variant, where it can become that."""
    whole = wherever(lowering, base, variant)
    return {u: v if i % 2 else Variant(base) for i, (u, v) in enumerate(whole.items())}


def wherever(lowering: Lowering, base: str, variant: Variant) -> dict[str, Variant]:
    """Every unit that can become a variant in it, the others in the base precision."""
    return everywhere(lowering.network, variant, base)


def expected(lowering: Lowering, variants: Mapping[str, Variant], backend: Backend) -> list[Array]:
    """What torch computes for the example inputs, with masks, half precisions and Q/DQ simulated."""
    quantized = any(v.quantized for v in variants.values())
    simulator = lowering.simulator(
        lowering.traced,
        lowering.traced.args,
        lowering.traced.kwargs,
        quantize_outputs=backend.quantize_outputs,
        quantized=quantized,
    )
    flat = simulator(variants)
    return [value.detach().numpy() for value in (flat if isinstance(flat, tuple | list) else [flat])]


def assert_close(got: list[Array], want: list[Array], tolerance: float, what: str) -> None:
    """Every output within `tolerance` of its largest magnitude."""
    assert len(got) == len(want), f"{what}: {len(got)} outputs, the model has {len(want)}"
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, f"{what}: output {index} has shape {a.shape}, the model's has {b.shape}"
        error = float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())
        assert error <= tolerance, (
            f"{what}: output {index} is off by {error:.2e} of its size, at most {tolerance:.0e} is right"
        )


def readback(engine: Engine, setup: Setup, model: Any) -> tuple[tuple[NodeRow, ...], tuple[str, ...]]:
    """(attributed nodes, executed precision of each unit)."""
    rows = attribute(engine.nodes(2), setup.network, tensor_names(model))
    return rows, executed_precisions(rows, setup.network)


def checks(contract: BackendContract | None = None) -> dict[str, Callable[[Backend], None]]:
    """The checks of a contract by name, to be called with a backend: pytest is not needed for them.

    Each raises AssertionError, or what the backend raised, where it does not hold. Raises HwsearchError under `python -O`,
    which leaves assertions out: every check would hold.
    """
    if not __debug__:
        raise HwsearchError(
            "the contract's checks are assertions, and python -O leaves those out; run without -O"
        )
    own = contract or BackendContract()
    methods = [name for name in dir(type(own)) if name.startswith("test_")]
    order = list(vars(BackendContract))
    methods.sort(key=lambda name: order.index(name) if name in order else len(order))
    return {name.removeprefix("test_").replace("_", " "): getattr(own, name) for name in methods}


class BackendContract:
    """Inherit it and give a `backend` fixture; pytest then runs every check below on that backend.

    `checks` gives the same to whoever has no pytest. A simulated device without laws for the small networks here may
    override `backend_for`.
    """

    def backend_for(self, backend: Backend, lowering: Lowering) -> Backend:
        """The backend to build a network on.

        Args:
            backend: that of the fixture.
            lowering: the network.

        Returns:
            The same backend, unless a subclass has one for this network.
        """
        return backend

    def _setup(self, backend: Backend, network: str, base: str | None = None) -> Setup:
        return small_setup(network, self.backend_for(backend, small_network(network)), base)

    # ---- what it says of itself

    def test_versions_are_named(self, backend: Backend) -> None:
        """Tables of two versions of a runtime can be told apart."""
        assert backend.versions(), (
            "versions() is empty; tables could not tell two versions of the runtime apart"
        )
        assert all(k and v for k, v in backend.versions().items())

    def test_keeps_the_protocol(self, backend: Backend) -> None:
        """Backend and engine have all that the protocols ask for."""
        assert isinstance(backend, Backend)
        assert isinstance(
            self._setup(backend, "residual").build(uniform(small_network("residual").network, "fp32"))[0], Engine
        )

    def test_variants_begin_with_the_base(self, backend: Backend) -> None:
        """Each base comes first among its variants, none is there twice."""
        assert backend.bases(), "bases() is empty"
        for base in backend.bases():
            assert backend.variants(base)[0] == Variant(base)
            assert len(set(backend.variants(base))) == len(backend.variants(base))

    # ---- numbers, executed precisions, node times

    def test_int8_products_are_summed_exactly(self, backend: Backend) -> None:
        """With weights of as many bits as the backend is given: those of 8 saturate on CPUs without a dot product."""
        for base in backend.bases():
            if Variant("int8") not in backend.variants(base):
                continue
            options = BuildOptions(1, base)
            bits = int8_bits(backend, options)
            error = sum_error(backend, options, bits)
            assert error <= OFF, (
                f"base {base}: sums of {bits}-bit weights are off by {error:.2e}, at their largest"
            )

    def test_residual_network(self, backend: Backend) -> None:
        """A residual CNN computes right in every variant, and its nodes name its units."""
        self._check_network(backend, "residual")

    def test_attention_network(self, backend: Backend) -> None:
        """So does a transformer block."""
        self._check_network(backend, "attention")

    def test_network_of_two_inputs(self, backend: Backend) -> None:
        """So does a network of two inputs and two outputs."""
        self._check_network(backend, "two_inputs")

    def test_weights_stored_in_int8(self, backend: Backend) -> None:
        """Of a backend with `weight_storage`: what is stored in int8 alone computes as its fp32 values do."""
        if not getattr(backend, "weight_storage", False):
            return
        for name, base in [(n, b) for n in ("stored", "residual", "attention") for b in backend.bases()]:
            setup = self._setup(backend, name, base)
            variants = wherever(setup.lowering, base, STORAGE)
            engine, _ = setup.build(variants)
            tolerance = max(TOLERANCE[base], TOLERANCE["w8"])
            wanted = expected(setup.lowering, variants, setup.backend)
            assert_close(engine(*setup.lowering.arrays()), wanted, tolerance, f"{name}, base {base}, {STORAGE}")

    def _check_network(self, backend: Backend, name: str) -> None:
        for base in backend.bases():
            setup = self._setup(backend, name, base)
            allocations = {base: uniform(setup.network, base)}
            for variant in setup.backend.variants(base)[1:]:
                allocations[str(variant)] = wherever(setup.lowering, base, variant)
                allocations[f"every other {variant}"] = mixed(setup.lowering, base, variant)
            for label, variants in allocations.items():
                self._check_engine(setup, variants, f"{name}, base {base}, {label}")

    def _check_engine(self, setup: Setup, variants: Mapping[str, Variant], what: str) -> None:
        engine, model = setup.build(variants)
        self._check_outputs(setup, engine, variants, what)
        assert engine.size_bytes > 0, f"{what}: size_bytes is {engine.size_bytes}"
        rows, executed = readback(engine, setup, model)
        assert rows, f"{what}: nodes() is empty"
        for row in rows:
            assert np.isfinite(row.time_ns), f"{what}: node {row.name} took {row.time_ns} ns"
            assert row.time_ns >= 0, f"{what}: node {row.name} took {row.time_ns} ns"
        assert any(executed), f"{what}: no node names a unit of the network"
        for unit, precision in zip(setup.network.units, executed, strict=True):
            asked = variants[unit.name].executed
            claims = [r.precision for r in rows if r.kind == "unit" and unit.name in r.units]
            assert not precision or precision in claims, (
                f"{what}: {unit.name} reads {precision}, its nodes {claims}"
            )
            # A runtime may fuse a unit into one that was asked in int8; apart from that nothing coarse is made up.
            fused = [u for r in rows if r.kind == "unit" and unit.name in r.units for u in r.units]
            # 2:4 weights may be multiplied as if they were dense.
            of = [variants[name] for name in fused if not variants[name].plain]
            coarse = {v.executed for v in of} | {v.precision for v in of}
            made_up = precision in _COARSE and precision not in coarse
            assert not made_up, f"{what}: {unit.name} was asked in {asked} and reads {precision}"
        self._check_sum(setup, engine, what)

    def _check_outputs(self, setup: Setup, engine: Engine, variants: Mapping[str, Variant], what: str) -> None:
        """By the measure of every profile (`hwsearch.engine.outputs`), and in its words: a layer that is off is named."""
        wanted = expected(setup.lowering, variants, setup.backend)
        found = engine(*setup.lowering.arrays())
        assert [a.shape for a in found] == [b.shape for b in wanted], (
            f"{what}: outputs have shapes {[a.shape for a in found]}, the model's {[b.shape for b in wanted]}"
        )
        deviation = setup.expected.deviation(engine, variants, setup.options.base)
        if not deviation.wrong:
            return
        try:
            layers = wrong_variants(setup, variants, setup.options.base)
        except BackendUnavailable:
            layers = {"every layer": "with none quantized as well"}
        raise AssertionError(
            f"{what}: outputs are off ({deviation}); {'; '.join(f'{u}: {why}' for u, why in layers.items())}"
        )

    def _check_sum(self, setup: Setup, engine: Engine, what: str) -> None:
        """Of runs the median, as a busy machine interrupts some of them; a very slow kernel is run less often.

        A runtime may count its first inference, which prepares kernels, among the others: each try has twice as many. What a
        run takes beside its nodes is not theirs: of the smallest network, on a fast device, that is nearly all.
        """

        def time_ns(runs: int) -> float:
            return max(float(np.median(times(engine.run, runs, setup.clock))), 1.0)

        engine.prepare(*setup.lowering.arrays())
        runs = int(np.clip(50e6 / time_ns(1), 2, 20))
        shares = []
        for more in (1, 2, 4, 8):
            nodes_ns = sum(node.time_ns for node in engine.nodes(runs * more))
            run_ns = time_ns(runs * more)
            shares.append(nodes_ns / run_ns)
            if 0.2 <= shares[-1] <= 5.0 or 0 < nodes_ns < run_ns <= nodes_ns + DISPATCH_NS:
                return
        raise AssertionError(f"{what}: node times sum to {shares} of the time of a run")

    # ---- inputs and errors

    def test_other_shapes_and_counts_are_refused(self, backend: Backend) -> None:
        """Inputs of another shape or number raise InvalidInput."""
        setup = self._setup(backend, "two_inputs")
        engine, _ = setup.build(uniform(setup.network, setup.options.base))
        first, second = setup.lowering.arrays()
        for wrong in ((first,), (first, second, second), (first[:1], second), (second, first)):
            _raises(InvalidInput, engine, *wrong)
            _raises(InvalidInput, engine.prepare, *wrong)
        assert [s.shape for s in engine.inputs] == [first.shape, second.shape]
        assert len(engine.outputs) == 2

    def test_garbage_is_refused(self, backend: Backend) -> None:
        """What is no ONNX raises BackendUnavailable."""
        for data in (b"", b"this is no ONNX", bytes(range(256)) * 8):
            _raises(BackendUnavailable, backend.build, data, BuildOptions(1, backend.bases()[0]))

    def test_unknown_base_is_refused(self, backend: Backend) -> None:
        """A base precision that is not offered raises BackendUnavailable."""
        setup = self._setup(backend, "residual")
        data = setup.onnx(uniform(setup.network, "fp32")).SerializeToString()
        _raises(BackendUnavailable, setup.backend.build, data, BuildOptions(1, "fp3"))

    # ---- engines in use

    def test_runs_repeat(self, backend: Backend) -> None:
        """The same inputs give the same outputs after runs."""
        setup = self._setup(backend, "residual")
        engine, _ = setup.build(uniform(setup.network, setup.options.base))
        inputs = setup.lowering.arrays()
        before = engine(*inputs)
        engine.prepare(*inputs)
        for _ in range(3):
            engine.run()
        assert_close(engine(*inputs), before, 1e-6, "after three runs")

    def test_outputs_stay(self, backend: Backend) -> None:
        """A later call leaves the outputs of an earlier one as they are."""
        setup = self._setup(backend, "two_inputs")
        engine, _ = setup.build(uniform(setup.network, setup.options.base))
        inputs = setup.lowering.arrays()
        outputs = engine(*inputs)
        kept = [value.copy() for value in outputs]
        others = engine(*(-a for a in inputs))
        for value, copy, other in zip(outputs, kept, others, strict=True):
            assert np.array_equal(value, copy), "a later call overwrote the outputs of an earlier one"
            assert not np.array_equal(other, copy), "other inputs gave the same outputs"

    def test_inputs_stay(self, backend: Backend) -> None:
        """An engine does not write on its inputs."""
        setup = self._setup(backend, "residual")
        engine, _ = setup.build(uniform(setup.network, setup.options.base))
        inputs = setup.lowering.arrays()
        kept = [a.copy() for a in inputs]
        engine(*inputs)
        assert all(np.array_equal(a, b) for a, b in zip(inputs, kept, strict=True)), (
            "the engine wrote on its inputs"
        )

    def test_two_engines_at_once(self, backend: Backend) -> None:
        """Two engines of one process do not disturb each other."""
        setup = self._setup(backend, "residual")
        lowest = setup.backend.variants(setup.options.base)[-1]
        one, _ = setup.build(uniform(setup.network, setup.options.base))
        inputs = setup.lowering.arrays()
        alone = one(*inputs)
        two, _ = setup.build(wherever(setup.lowering, setup.options.base, lowest))
        other = two(*inputs)
        for _ in range(2):
            assert_close(one(*inputs), alone, 1e-6, "the first of two engines")
            assert_close(two(*inputs), other, 1e-6, "the second of two engines")


def _raises(kind: type[HwsearchError], action: Callable[..., object], *args: object) -> None:
    message = None
    try:
        action(*args)
    except kind as error:
        message = str(error)
    assert message is not None, f"expected {kind.__name__}"
    assert message, f"{kind.__name__} without a message"

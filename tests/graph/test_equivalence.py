"""A graph that does not compute what the module does is refused by name before anything is built on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwsearch.errors import HwsearchError, InvalidInput, UntraceableModel
from hwsearch.graph.trace import trace
from hwsearch.lowering.lowering import Lowering
from hwsearch.task import Task


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("cache", torch.zeros(1, 8))
        self.register_buffer("scratch", torch.zeros(2, 4))
        self.previous: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []
        self.step = 0

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.a(x))


class Drawn(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.hidden(x) + torch.randn(8))
        return y


class Dropped(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(F.dropout(self.hidden(x), 0.5, training=True))
        return y


class DrawnByNumPy(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.hidden(x)) * float(np.random.rand())  # noqa: NPY002
        return y


class Buffer(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.mul_(0.5).add_(self.hidden(x).mean(0, keepdim=True))
        y: torch.Tensor = self.b(self.cache + self.hidden(x))
        return y


class Replaced(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = 0.5 * self.cache + self.hidden(x).mean(0, keepdim=True)
        y: torch.Tensor = self.b(self.cache + self.hidden(x))
        return y


class Attribute(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.hidden(x))
        before, self.previous = self.previous, y
        return y if before is None else y + before


class Listed(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.hidden(x))
        y: torch.Tensor = self.b(torch.stack(self.seen).mean(0))
        return y


class Counted(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        y: torch.Tensor = self.b(self.hidden(x)) * self.step
        return y


class Exporting(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.hidden(x)
        if torch.compiler.is_exporting():
            h = h * 0.5
        y: torch.Tensor = self.b(h)
        return y


class Statistic(_Net):
    """Counts its calls: no output depends on it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache += 1
        y: torch.Tensor = self.b(self.hidden(x))
        return y


class Scratch(_Net):
    """Writes a buffer before it reads it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scratch[:] = 2 * x
        y: torch.Tensor = self.b(self.hidden(self.scratch))
        return y


class IntoInput(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        y: torch.Tensor = self.b(self.hidden(x))
        return y


class Rounding(_Net):
    """Sums in another order than the graph's folded BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.1, 3)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(F.relu(self.norm(self.a(x))))
        return y


def _lowering(cls: type[_Net]) -> tuple[_Net, Lowering]:
    torch.manual_seed(0)
    model = cls()
    return model, Lowering(
        Task(model, torch.randn(2, 4), [torch.randn(2, 4) for _ in range(3)], lambda p: 0.0)
    )


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Drawn, r"draws random numbers: .* drawn by randn in the model itself, at test_equivalence\.py:\d+: `y: .*randn"),
        (Dropped, r"draws random numbers: .* drawn by dropout"),
        (DrawnByNumPy, r"draws random numbers: .* not drawn by torch's operators"),
        (Buffer, r"keeps state: its outputs depend on cache,.* an input and an output"),
        (Replaced, r"keeps state: its outputs depend on cache,"),
        (Attribute, r"keeps state: its outputs depend on previous,"),
        (Listed, r"keeps state: its outputs depend on seen,"),
        (Counted, r"keeps state: its outputs depend on step,"),
        (Exporting, r"something else than the module on example_inputs: .* mul in .*, at test_eq\w+\.py:\d+: `h = h \* 0\.5`"),
    ],
)  # fmt: skip
def test_what_no_graph_computes_is_refused_by_name(cls: type[_Net], says: str) -> None:
    with pytest.raises(UntraceableModel, match=says) as error:
        _lowering(cls)
    assert "While executing" not in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("cls", [Statistic, Scratch, IntoInput, Rounding])
def test_what_a_graph_does_compute_is_not_refused(cls: type[_Net]) -> None:
    model, lowering = _lowering(cls)
    x = torch.randn(2, 4)
    with torch.no_grad():
        want = model.eval()(x.clone())
    assert torch.allclose(lowering.traced.graph(x), want, atol=1e-5)


def test_inputs_are_not_written_into_and_random_generators_go_on_as_before() -> None:
    torch.manual_seed(0)
    model, x = IntoInput(), torch.ones(2, 4)
    calibration = [torch.ones(2, 4) for _ in range(3)]
    state = torch.random.get_rng_state()
    numpy = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    lowering = Lowering(Task(model, x, calibration, lambda p: 0.0))
    lowering.ranges  # noqa: B018
    assert all(torch.equal(t, torch.ones(2, 4)) for t in [x, *calibration])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy)  # type: ignore[index]  # noqa: NPY002


class Logarithm(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.log(self.a(x)))
        return y


def test_nan_names_operator_module_and_line() -> None:
    where = r"They come from log in .*, at test_equivalence\.py:\d+: `y: .*torch\.log"
    with pytest.raises(InvalidInput, match=f"on example_inputs; .*{where}"):
        trace(Logarithm(), torch.randn(16, 4))
    model = nn.Sequential(nn.Linear(4, 4), Logarithm())
    with pytest.raises(InvalidInput, match="come from log in 1, at"):
        trace(model, torch.randn(16, 4))


class Root(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(F.relu(self.a(x.sqrt())))
        return y


def test_nan_on_calibration_data_alone_names_batch_and_line() -> None:
    model = Root()
    good, bad = torch.rand(2, 4), -torch.rand(2, 4)
    with pytest.raises(InvalidInput, match=r"NaN or infinity on calibration batch 1; .* sqrt in"):
        Lowering(Task(model, good, [good, bad], lambda p: 0.0))
    # in a batch that is not compared with the module it is found with the ranges
    many = [good] * 20
    many[3] = torch.cat([good, bad])
    lowering = Lowering(Task(model, good, many, lambda p: 0.0))
    with pytest.raises(HwsearchError, match=r"NaN or infinity on .*calibration data; .* sqrt in"):
        lowering.ranges  # noqa: B018

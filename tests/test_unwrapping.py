"""A module in a wrapper is the module; a wrapper without one is an error that says what to give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import evaluating
from hwsearch.graph.trace import trace
from hwsearch.lowering.lowering import Lowering
from hwsearch.task import Task, unwrapped


def _plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class _Keeper(nn.Module):
    """Keeps averaged weights, as timm's ModelEma does: it is never called."""

    def __init__(self, model: nn.Module, *others: nn.Module) -> None:
        super().__init__()
        self.module = model
        for i, other in enumerate(others):
            self.add_module(f"other{i}", other)


class _Backbone(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.backbone(x))
        return y


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda m: torch.compile(m),  # type: ignore[dict-item, return-value]
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "kept": _Keeper,
}


def _task(model: nn.Module) -> Task:
    return Task(model, torch.randn(2, 4), [torch.randn(4, 4) for _ in range(2)], lambda predict: 0.0)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_task_holds_the_module_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = _plain(), wrap(_plain())
    want, have = Lowering(_task(plain)).network, Lowering(_task(wrapped)).network
    assert have.fingerprint == want.fingerprint
    assert [u.name for u in have.units] == ["0", "2"]
    assert list(have.channels) == ["0"]


def test_several_wrappers_come_off() -> None:
    plain = _plain()
    both: nn.Module = torch.compile(nn.DataParallel(plain))  # type: ignore[assignment]
    assert unwrapped(both) is plain


@pytest.mark.parametrize("name", ["compiled", "parallel"])
def test_wrappers_within_a_model_are_off_while_it_is_traced(name: str) -> None:
    inside = WRAPPERS[name](_plain())
    model = _Backbone(inside)
    assert [u.name for u in trace(model, torch.randn(2, 4)).network.units] == [
        "backbone.0",
        "backbone.2",
        "head",
    ]
    assert model.backbone is inside


def test_a_module_that_compiled_itself_is_called_as_it_was_before() -> None:
    model = _plain()
    model.compile()
    call = model._compiled_call_impl
    with evaluating(model):
        assert model._compiled_call_impl is None
    assert model._compiled_call_impl is call
    assert [u.name for u in trace(model, torch.randn(2, 4)).network.units] == ["0", "2"]


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 4))])
def test_a_script_module_is_one_error(make: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(InvalidInput, match=r"torch\.jit.*give the nn\.Module") as error:
        _task(make(_plain().eval()))
    assert error.value.exit_code == 2


def test_a_keeper_of_several_modules_is_one_error() -> None:
    with pytest.raises(InvalidInput, match="no forward; it holds module, other0: give the module"):
        _task(_Keeper(_plain(), _plain()))

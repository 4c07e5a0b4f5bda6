"""What every scheme is: a frozen value with numbers left free, applied to a task or to a module in place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from hwsearch.allocate.allocation import Allocation
from hwsearch.errors import InvalidInput
from hwsearch.lowering.lowering import Lowering
from hwsearch.lowering.refitted import as_module
from hwsearch.schemes.footprint import Footprint
from hwsearch.schemes.subject import Subject
from hwsearch.schemes.trainable import Trainable
from hwsearch.task import Inputs, Task


@dataclass(frozen=True)
class Free:
    """A free parameter of a scheme: a number that is given when the scheme is applied.

    Steps of a `Compose` whose parameters have one name share one number.

    Args:
        name: by which it is given: `scheme(task, density=0.1)`.
        low: the least that it may be.
        high: the most that it may be.
        whole: whether it is a whole number.

    Raises:
        InvalidInput: the name is no Python name, or the range is empty.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InvalidInput(f"a free parameter is called {self.name!r}; expected a Python name, as it is given by that")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InvalidInput(f"{self.name} may be from {self.low} to {self.high}; expected a number and a larger one")


Number = float | Free
"""A number, or one that is given later."""
DENSITY = Free("density")
_EXAMPLE = "write e.g. Compose(Prune(), Quantize('int8'))"


def checked(name: str, value: float, low: float, high: float, *, whole: bool = False) -> float:
    """A number, an `int` where it must be whole. Raises InvalidInput where it is none, out of range or not whole."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not right or (whole and value != int(value)):
        raise InvalidInput(f"{name} is {value!r}; expected a {'whole ' * whole}number from {low:g} to {high:g}")
    return int(value) if whole else value


@dataclass(frozen=True)
class Compressed:
    """What a scheme made of a task.

    Args:
        task: the same task with a compressed module, for every command and function that takes a task.
        footprint: the bytes that are left.
        values: what the free parameters were.
        allocation: the answer of the search, of a scheme with `Allocate`; it is of the task before.
        of: the task before.
        scheme: what was applied, without free numbers.
    """

    task: Task
    footprint: Footprint
    values: Mapping[str, float] = field(default_factory=dict)
    allocation: Allocation | None = field(default=None, repr=False)
    of: Task | None = field(default=None, repr=False)
    scheme: Scheme | None = field(default=None, repr=False)

    def trainable(self) -> Trainable:
        """For training.

        Returns:
            The channels that stay, and what the other steps make of weights.

        Raises:
            InvalidInput: channels go after weights did, or a search chose the network, whose allocation is trained then.
        """
        assert self.of is not None
        assert self.scheme is not None
        if self.allocation is not None:
            raise InvalidInput("the network is the answer of a search; train its allocation by `hs.recover`")
        return Trainable(Subject(self.of.model, self.of.example_inputs, self.of), self.scheme._steps())

    def trained(self, lowering: Lowering) -> Compressed:
        """The same with other weights.

        Args:
            lowering: of the dense network at the channels that stay, with the weights that training left.

        Returns:
            The task with a plain module, BatchNorm folded, and what is left in bytes.
        """
        assert self.of is not None
        footprint = self.trainable().left(lowering).footprint()
        return replace(self, task=replace(self.of, model=as_module(lowering), spec=""), footprint=footprint)


@dataclass(frozen=True)
class Scheme(ABC):
    """How to compress a network: one step, or several (`Compose`)."""

    @property
    def parameters(self) -> tuple[Free, ...]:
        """The free parameters, each once.

        Returns:
            In the order of the steps.

        Raises:
            InvalidInput: two of one name have two ranges.
        """
        found: dict[str, Free] = {}
        for free in self._free():
            if found.setdefault(free.name, free) != free:
                raise InvalidInput(f"the free parameter {free.name} is {found[free.name]} and {free}; give one range, or two names")
        return tuple(found.values())

    def bind(self, **values: float) -> Scheme:
        """The scheme with numbers in the place of free parameters.

        Args:
            **values: a number for each free parameter, or for some, by name.

        Returns:
            A scheme in which only the others are free.

        Raises:
            InvalidInput: a name is not that of a free parameter, or a number is out of range.
        """
        known = {free.name: free for free in self.parameters}
        for name in values:
            if name not in known:
                raise InvalidInput(f"the scheme has no free parameter {name!r}; {_named(known)}")
        return self._bound({n: checked(n, v, known[n].low, known[n].high, whole=known[n].whole) for n, v in values.items()})

    def __call__(self, task: Task, /, **values: float) -> Compressed:
        """Compress a task. The task and its module stay as they are.

        Args:
            task: the task.
            **values: a number for each free parameter, by name.

        Returns:
            A task with a compressed module, and what is left of it. Where channels go the module is narrower, with BatchNorm
            folded; else it is a copy of the task's own with other weights.

        Raises:
            InvalidInput: a number is missing or out of range, or there is nothing in the network that a step is for.
            UntraceableModel: the module cannot be traced.
        """
        if not isinstance(task, Task):
            raise InvalidInput(f"a scheme is applied to a Task, got {type(task).__name__}; `in_place` takes a module")
        bound = self._bound_all(values)
        subject = bound._apply(Subject(task.model, task.example_inputs, task))
        return Compressed(subject.as_task(), subject.footprint(), values, subject.allocation, task, bound)

    def in_place(self, module: torch.nn.Module, example_inputs: Inputs, /, **values: float) -> Footprint:
        """Compress a module in place: it keeps its layers and shapes, with zeros for what goes.

        Args:
            module: the module; where an error is raised, it stays as it was.
            example_inputs: one input, as in a Task.
            **values: a number for each free parameter, by name.

        Returns:
            What is left, counted without the channels that are gone.

        Raises:
            InvalidInput: as for a task; or zeros are not the network without its channels, as something sums over them.
            UntraceableModel: the module cannot be traced.
        """
        subject = self._bound_all(values)._apply(Subject(module, example_inputs))
        subject.check_zeros()
        subject.write(module)
        return subject.footprint()

    @abstractmethod
    def _apply(self, subject: Subject) -> Subject:
        """The network, or another in its place, after the step. No parameter is free."""

    def _steps(self) -> list[Any]:
        """Those that it is composed of."""
        return [self]

    def _bound_all(self, values: Mapping[str, float]) -> Scheme:
        bound = self.bind(**values)
        if missing := bound.parameters:
            known = {free.name: free for free in self.parameters}
            raise InvalidInput(f"no number is given for {', '.join(f.name for f in missing)}; {_named(known)}")
        return bound

    def _free(self) -> list[Free]:
        return [v for f in fields(self) if isinstance(v := getattr(self, f.name), Free)]

    def _bound(self, values: Mapping[str, float]) -> Scheme:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: values[v.name] for k, v in own.items() if isinstance(v, Free) and v.name in values})


@dataclass(frozen=True)
class Step(Scheme):
    """A scheme that does one thing to the layers of a network.

    Args:
        skip: patterns of names of layers (`classifier*`) that stay as they are.
    """

    narrows: ClassVar[bool] = False
    """Whether it takes channels away, and leaves weights as they are."""
    rounds: ClassVar[bool] = False
    """Whether it changes weights that are not zero."""
    skip: str | tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", self.skipped)

    @property
    def skipped(self) -> tuple[str, ...]:
        """The patterns of `skip`.

        Returns:
            Also where there is one.
        """
        return (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)


@dataclass(frozen=True, init=False)
class Compose(Scheme):
    """Several schemes, one after another: each works on what the ones before left.

    Args:
        *schemes: in the order in which they are applied.

    Raises:
        InvalidInput: there is none, one is no scheme, or free parameters of one name have two ranges.
    """

    schemes: tuple[Scheme, ...]

    def __init__(self, *schemes: Scheme) -> None:
        for scheme in schemes:
            if not isinstance(scheme, Scheme):
                raise InvalidInput(f"Compose takes schemes, got {type(scheme).__name__}; {_EXAMPLE}")
        if not schemes:
            raise InvalidInput(f"Compose takes at least one scheme; {_EXAMPLE}")
        object.__setattr__(self, "schemes", schemes)
        _ = self.parameters  # raises on two ranges

    def _apply(self, subject: Subject) -> Subject:
        for scheme in self.schemes:
            subject = scheme._apply(subject)
        return subject

    def _steps(self) -> list[Any]:
        return [step for scheme in self.schemes for step in scheme._steps()]

    def _free(self) -> list[Free]:
        return [free for scheme in self.schemes for free in scheme._free()]

    def _bound(self, values: Mapping[str, float]) -> Scheme:
        return Compose(*(scheme._bound(values) for scheme in self.schemes))


def _named(known: Mapping[str, Free]) -> str:
    if not known:
        return "all of its numbers are given"
    return "free are " + ", ".join(f"{f.name} ({f.low:g} to {f.high:g})" for f in known.values())


def within(what: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Raises InvalidInput where a number of a step is neither free nor within a range."""
    if not isinstance(value, Free):
        checked(what, value, low, high, whole=whole)
    elif value.low < low or value.high > high or (whole and not value.whole):
        kind = "whole numbers" if whole else "numbers"
        raise InvalidInput(f"{what} may be {kind} from {low:g} to {high:g}, and {value} may be others")


def given(value: Number) -> float:
    """A number that is no longer free."""
    assert not isinstance(value, Free)
    return value

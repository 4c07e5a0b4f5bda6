"""Every error that hwsearch raises on purpose.

::

    HwsearchError                 exit code 1
    ├── InvalidInput              2  a task, file, budget or option is not what it must be
    ├── UntraceableModel          1  torch.export or the tracer cannot follow the module
    ├── BackendUnavailable        1  a runtime is missing, dead, or failed to build
    ├── UnsupportedVariant        1  a backend does not execute a variant as asked
    ├── IncompatibleTables        1  files of two devices, networks, setups or schemas were mixed
    ├── DeviceBusy                1  another profile runs on this device
    ├── Infeasible                3  no allocation meets the budget; names the least that can be met
    └── BudgetMissed              3  allocations were found but none met the budget as measured

Each message says what was wrong, what was expected, and what to do next.
"""

from __future__ import annotations


class HwsearchError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1


class InvalidInput(HwsearchError):
    """A task, a file, a budget or an option is not what it must be."""

    exit_code = 2


class UntraceableModel(HwsearchError):
    """The module cannot be traced; the message names the submodule and the operator."""


class BackendUnavailable(HwsearchError):
    """A runtime is not installed, does not answer, or failed to build a network."""


class UnsupportedVariant(HwsearchError):
    """A backend does not execute a variant as asked."""


class IncompatibleTables(HwsearchError):
    """Tables of two devices, networks, setups or schemas were mixed."""


class DeviceBusy(HwsearchError):
    """Another profile is running on this device."""


class Infeasible(HwsearchError):
    """No allocation meets the budget.

    Args:
        message: what was wrong, and the least that can be met.
        least: each budgeted cost -> the least that can be met, in ns, bytes, nJ or MACs; empty where it is not known.
    """

    exit_code = 3

    def __init__(self, message: str, least: dict[str, float] | None = None) -> None:
        super().__init__(message)
        self.least = least or {}


class BudgetMissed(HwsearchError):
    """The closed loop ended outside the budget.

    Args:
        message: what was asked for and what was measured.
        nearest: the report of the nearest allocation measured; None where there is none.
    """

    exit_code = 3

    def __init__(self, message: str, nearest: object = None) -> None:
        super().__init__(message)
        self.nearest = nearest

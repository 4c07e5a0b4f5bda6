"""What is said to be infeasible is: against exhaustive search over all that is offered, on a simulated device."""

from __future__ import annotations

import pytest
from offered import trial

NETWORKS = 5

pytestmark = pytest.mark.usefixtures("own_locks")


@pytest.mark.parametrize("seed", range(15))
def test_infeasible_is_not_said_of_what_exists(seed: int) -> None:
    """At random budgets and time limits; where a table was cut short, or the budget is within its error, that is said."""
    tried = trial(seed, NETWORKS)
    assert not tried.false, f"{tried.budgets} exist: {tried.refused}"
    assert tried.exists or tried.refused or tried.budgets[0].startswith("latency"), "sizes are exact"

from __future__ import annotations

import pytest
from networks import NETWORKS

from hwsearch.errors import InvalidInput
from hwsearch.graph.calls import flat_inputs
from hwsearch.graph.trace import trace


def test_inputs_by_position_or_by_name() -> None:
    model, inputs = NETWORKS["kwargs_out_of_order"]()
    traced = trace(model, inputs)
    x, y = inputs["x"], inputs["y"]
    for args, kwargs in [((), inputs), ((x, y), {}), ((x,), {"y": y})]:
        flat = flat_inputs(traced.graph, args, kwargs)
        assert flat[0] is x
        assert flat[1] is y
    for args, kwargs in [((x,), {}), ((x, y, x), {}), ((x, y), {"z": x})]:
        with pytest.raises(InvalidInput, match="traced with"):
            flat_inputs(traced.graph, args, kwargs)

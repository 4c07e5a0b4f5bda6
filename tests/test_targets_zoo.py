"""The two large networks of the zoo, where they have been fetched, in NVIDIA's builder; `test_targets.py` has the rest."""

from __future__ import annotations

import pytest

from hwsearch.errors import InvalidInput
from hwsearch.lower import Lowering
from hwsearch.targets import runtime, verdicts
from hwsearch.zoo import load

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("name", ["minilm", "efficientnet_lite0"])
def test_a_large_network(name: str) -> None:
    try:
        low = Lowering(load(name), method="minmax")  # the quickest ranges: only types matter here
    except InvalidInput as error:
        pytest.skip(str(error))
    found = list(verdicts(runtime("tensorrt-rtx"), low, ["sm75", "sm89"], "fp16"))
    assert all(v.explained for v in found)
    assert all(v.layers for v in found if v.legal)
    assert {v.variant for v in found if not v.legal and v.target == "sm89"} == {"dense.nvfp4"}
    assert {"dense.bf16", "dense.fp8"} <= {v.variant for v in found if not v.legal and v.target == "sm75"}

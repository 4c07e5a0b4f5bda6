"""Every operator has a channel rule or a reason why not, and what has a rule computes the masked network when narrow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph.test_channels import check
from lowering.test_onnx_widths import check as check_onnx
from lowering.test_onnx_widths import made, random_kept
from torch_operators import FOLLOWED, MIXED, ONE_BY_ONE, between

from hwsearch.errors import UntraceableModel
from hwsearch.graph.aliases import REWRITTEN, SPELLED, is_composite
from hwsearch.graph.canonical import ATTENTION, CONVOLUTIONS, MATMULS, aten
from hwsearch.graph.channels import moving
from hwsearch.graph.channels.reasons import reason_of
from hwsearch.graph.channels.rules import rule_of
from hwsearch.graph.trace import trace

UNITS = {
    op.overloadpacket for op in (*CONVOLUTIONS, *MATMULS, ATTENTION, aten.linear.default, aten.addmm.default)
}


def name_of(op: torch._ops.OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


def operators() -> Iterator[torch._ops.OpOverload]:
    """All of torch's own operators that compute a tensor from a tensor and write into none."""
    for full in sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")):
        name, _, overload = full.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, name, None), overload or "default", None)
        if op is None or op._schema.is_mutable:
            continue
        if any("Tensor" in str(a.type) for a in op._schema.arguments) and any(
            "Tensor" in str(r.type) for r in op._schema.returns
        ):
            yield op


def fate(op: torch._ops.OpOverload) -> tuple[str, str]:
    """(what becomes of an operator at the trace, the reason if it has no rule)"""
    if op.overloadpacket in UNITS:
        return "units", ""
    if rule_of(op) is not moving.unknown:
        return "with a rule", ""
    if name_of(op) in (*REWRITTEN, *SPELLED) or is_composite(op):
        return "spelled out", ""
    if torch.Tag.view_copy in op.tags:
        return "spelled out", ""
    reason = reason_of(op)
    return ("with a reason", reason) if reason else ("with neither", "")


def group_between(network: Any) -> bool:
    return any("a" in g.producers and "b" in g.consumers for g in network.groups)


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed_through(name: str) -> None:
    """The narrow network computes the masked one, in torch."""
    model, x = between(FOLLOWED[name])
    traced = trace(model, x)
    assert group_between(traced.network), traced.network.blocked
    assert not traced.network.blocked
    for seed in range(2):
        check(traced, x, random.Random(seed))


NO_ONNX = {
    **dict.fromkeys(("digamma", "special.digamma", "special.psi"), "digamma"),
    **dict.fromkeys(("lgamma", "special.gammaln"), "lgamma"),
    "special.i0": "i0",
    **{name: name for name in ("kthvalue", "median", "cumprod", "cummax")},
}
"""What no runtime has and nothing here spells out, with the operator that an error names."""


@pytest.mark.parametrize(
    "name",
    [
        # a second or two each: every fifth of those that stand for themselves, all of them among the slow tests
        pytest.param(n, marks=pytest.mark.slow if n in ONE_BY_ONE or i % 5 else ())
        for i, n in enumerate(FOLLOWED)
    ],
)
def test_channels_are_followed_through_in_onnx(name: str) -> None:
    """ONNX Runtime computes what torch does, at any width; where an operator has no ONNX form at all, that is said."""
    of = made(*between(FOLLOWED[name]))
    if name in NO_ONNX:
        where = rf"^module \(the model itself\) uses operator aten\.{NO_ONNX[name]}\.\w+, which has no ONNX form"
        with pytest.raises(UntraceableModel, match=where):
            of.marked  # noqa: B018
    else:
        check_onnx(of, random_kept(of, 0))


@pytest.mark.parametrize("name", ["squeeze of nothing", "squeeze of some"])
def test_an_axis_of_channels_of_which_one_is_left_is_not_squeezed(name: str) -> None:
    of = made(*between(FOLLOWED[name]))
    check_onnx(of, {group: [0] for group in of.network.channels})


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_channels_keeps_them_whole(name: str) -> None:
    network = trace(*between(MIXED[name])).network
    assert not group_between(network)
    assert (
        network.blocked or name == "layer_norm"
    )  # the width that a norm reads is an axis of its own: residual
    assert not any("not followed through operator" in why and why.count(": ") < 2 for why in network.blocked)


def test_every_operator_has_a_rule_or_a_reason() -> None:
    neither = sorted({name_of(op) for op in operators() if fate(op)[0] == "with neither"})
    assert not neither, f"{len(neither)}: {' '.join(neither)}"

"""The channel rule of each operator outside of units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hwsearch.graph.canonical import MATMULS
from hwsearch.graph.channels import mixing, moving, selecting
from hwsearch.graph.channels.labels import Labels
from hwsearch.graph.channels.weights import product

Rule = Callable[[Labels, fx.Node], Any]
"""(the labels so far, a node) -> the label of its result, a list where it has several"""

ELEMENTWISE = (
    "hardswish square floor_divide selu relu6 softsign tanhshrink log_sigmoid log_sigmoid_forward where masked_fill rsub "
    "zeros_like ones_like full_like empty_like _prelu_kernel _add_relu"
)
"""Beside all that torch itself tags as such (`torch.Tag.pointwise`)."""
KEPT = "to _to_copy alias detach clone contiguous lift lift_fresh lift_fresh_copy _neg_view _conj _lazy_clone"
MOVED = (
    "reshape view _unsafe_view _reshape_alias permute transpose t split split_with_sizes chunk unbind unsqueeze squeeze flatten "
    "unflatten flip pixel_shuffle pixel_unshuffle unsafe_split unsafe_split_with_sizes unsafe_chunk select"
)
REPEATED = "expand repeat repeat_interleave"
FILLED: Mapping[str, int] = {
    **dict.fromkeys(("zeros", "ones", "full", "empty"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 1),
}
"""Tensors of one value, with the position of their sizes among the arguments."""
REDUCED = (
    "mean sum amax amin std var prod logsumexp linalg_vector_norm linalg__powsum norm any all argmax argmin std_mean var_mean "
    "aminmax _aminmax count_nonzero median nanmedian mode kthvalue"
)
SCANNED = (
    "softmax log_softmax _softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp _logcumsumexp cummax cummin sort topk "
    "renorm"
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), moving.elementwise),
    **dict.fromkeys(KEPT.split(), moving.kept),
    **dict.fromkeys(MOVED.split(), moving.moved),
    **dict.fromkeys(REDUCED.split(), mixing.reduced),
    **dict.fromkeys(SCANNED.split(), mixing.scanned),
    **dict.fromkeys(mixing.SPATIAL, mixing.spatial),
    **dict.fromkeys(FILLED, moving.filled),
    **dict.fromkeys(("batch_norm", "instance_norm", "prelu"), mixing.per_channel),
    **dict.fromkeys(("layer_norm", "rms_norm"), mixing.layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), moving.padded),
    **dict.fromkeys(REPEATED.split(), moving.repeated),
    **dict.fromkeys(("max", "min"), mixing.largest),
    **dict.fromkeys(("cat", "stack"), moving.concatenated),
    **dict.fromkeys(("tril", "triu"), moving.triangular),
    **dict.fromkeys(("diagonal", "diag_embed"), moving.diagonal),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), mixing.unpooled),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), mixing.sampled),
    **dict.fromkeys(selecting.BY_NUMBER, selecting.indexed),
    **dict.fromkeys(selecting.AT_POSITIONS, selecting.at_positions),
    **dict.fromkeys(("bucketize", "isin"), moving.looked_up),
    "slice": selecting.sliced,
    "roll": selecting.rolled,
    "unfold": moving.unfolded,
    "im2col": mixing.patches,
    "col2im": mixing.unpatched,
    "channel_shuffle": moving.shuffled,
    "embedding": moving.embedding,
    "group_norm": mixing.group_norm,
    "glu": moving.glu,
}


def operator_label(run: Labels, n: fx.Node) -> Any:
    """The label of an operator's result: a list where it has several."""
    if n.target in MATMULS:
        return product(run, n)
    return rule_of(n.target)(run, n)


def rule_of(target: Any) -> Rule:
    """The channel rule of an operator; `unknown` where it has none."""
    if getattr(target, "namespace", "") != "aten":
        return moving.unknown
    name = target.overloadpacket.__name__
    if name in RULES:
        return RULES[name]
    return moving.elementwise if torch.Tag.pointwise in target.tags else moving.unknown

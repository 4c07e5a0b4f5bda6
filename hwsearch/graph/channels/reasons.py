"""Why channels are not followed through operators that have no rule, in words for whoever reads a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

TAGS: Mapping[torch.Tag, str] = {
    torch.Tag.nondeterministic_seeded: "it draws random numbers",
    torch.Tag.dynamic_output_shape: "the shape of its result depends on values",
    torch.Tag.data_dependent_output: "its result is a number that the network computes",
}

NAMES: Mapping[str, str] = {
    r"lstm|gru|rnn_tanh|rnn_relu|_cudnn_rnn|miopen_rnn|mkldnn_rnn_layer|_lstm_mps|quantized_(lstm|gru)|_thnn_fused_\w+_cell"
    r"|_cudnn_rnn_flatten_weight|_pack_padded_sequence":
        "a recurrent layer feeds its features back into all of them",
    r".*backward.*|.*_jvp|.*_grad|_make_dual|_fw_primal":
        "it belongs to derivatives, and an exported network computes none",
    r"_foreach_.*|_fused_.*|_amp_.*": "it belongs to an optimizer, or to training in mixed precision",
    r".*sparse.*|_to_dense|_cslt_.*|_?(indices|values|c?c?r?(row|col)_indices)|_coalesced?|_spsolve|_spdiags|hspmm|_convert_indices_.*|smm":
        "sparse tensors have no ONNX form",
    r".*nested.*|.*jagged.*|to_padded_tensor": "nested tensors have no ONNX form",
    r".*quantize.*|q_per_channel_.*|int_repr|_make_per_.*|.*int(4|8)pack.*|_dyn_quant_.*|_int_mm|_(scaled|mixed_dtypes|grouped)_.*mm.*"
    r"|_mixed_dtypes_linear|_empty_per_channel_.*|empty_quantized|_scaled_grouped_.*":
        "the network is quantized already, and precisions are to be chosen here: take its float form",
    r"(_?cudnn|miopen|mkldnn|_?mps|_nnpack|_triton|_mkldnn)_.*|to_mkldnn|.*_overrideable|_slow_conv.*|slow_conv.*|_conv_depthwise2d"
    r"|conv_depthwise3d|.*_for_mps": "it is what one device's backend makes of another operator: export on the CPU",
    r"_scaled_dot_product_.*|_(flash|efficient)_attention_.*|_native_multi_head_attention|_transform_bias_rescale_qkv"
    r"|_transformer_encoder_layer_fwd": "attention in the fused form of one backend: call scaled_dot_product_attention",
    r"_?linalg_.*|_?cholesky.*|geqrf|ormqr|lu_unpack|triangular_solve|_compute_linear_combination|_cholesky_solve_helper":
        "a whole matrix is decomposed or solved for",
    r"_fft_.*": "a Fourier transform gives complex numbers, which no runtime here takes",
    r"view_as_complex|view_as_real|complex|polar": "complex numbers, which no runtime here takes",
    r"binary_cross_entropy.*|.*_loss.*": "a loss is for training: leave it out of the network that is searched",
    r"histc|bincount|histogram|_histogramdd_.*|segment_reduce|_unique2?|unique_.*|nonzero_static":
        "it counts or sums over all elements at once",
    r"put|take|index_put|_index_put_impl|_unsafe_index_put|_unsafe_masked_.*|masked_scatter|masked_select|searchsorted":
        "elements are taken or written by positions that the network computes",
    r"as_strided.*|diagonal_scatter|_reshape_copy|set|resize.*|_resize_output|new_empty_strided|slice_inverse|_copy_from.*|put":
        "it addresses memory, not channels",
    r"_cdist_forward|_pdist_forward|_euclidean_dist": "it compares all rows with all others, over their features",
    r"slice_scatter|select_scatter": "every other position is written by its number",
    r"roll|native_(layer|group|batch)_norm|_native_batch_norm_.*|_batch_norm_.*|batch_norm_.*|native_norm|embedding_renorm|convolution"
    r"|_convolution": "its statistics, or a form of its own, are used beside its result",
    r"affine_grid_generator": "all of its input makes the coordinates",
    r"_?embedding_bag.*": "rows are looked up and summed, as many as the input says",
    r"block_diag|_chunk_cat|_stack": "blocks are put together that need not be of one size",
    r"_trilinear|conv_tbc|addbmm|_addmm_activation|_masked_softmax|_weight_norm_interface|addmm":
        "a product in a form of its own: write it with matmul or a convolution",
    r"linspace|logspace": "it draws a line between two numbers that the network computes",
    r"_test_.*|_foobar|_functional_.*|_philox_.*|hash_tensor|_is_(all|any)_true|_new_zeros_with_same_.*|_pin_memory|_masked_scale"
    r"|fractional_max_pool.d|_grid_sampler_2d_cpu_fallback|_standard_gamma|poisson|native_dropout":
        "it is for training, tests or torch's own use",
}  # fmt: skip
"""Patterns of whole names of torch's own operators; the first that fits tells."""

_PATTERNS = [(re.compile(pattern), why) for pattern, why in NAMES.items()]


def reason_of(target: Any) -> str:
    """The reason why an operator has no rule; empty for one that is not known here, for instance a custom one."""
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    if target.namespace != "aten":
        return f"it is no operator of torch itself but one of {target.namespace}"
    name = target._schema.name.removeprefix("aten::")
    fitting = next((why for pattern, why in _PATTERNS if pattern.fullmatch(name)), "")
    return fitting or next((why for tag, why in TAGS.items() if tag in target.tags), "")

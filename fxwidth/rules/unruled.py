"""Ops of some builds, devices or formats of torch that have no rule on purpose, and why: what they touch is pinned.

Models that call the functions of `torch.nn.functional` are recorded as the plain ops, whichever kernel runs them. Here
is what a model meets that calls a kernel by its own name. By name, since not every release of torch has them all.
"""

from __future__ import annotations

from torch._ops import OpOverload

from fxwidth.axes.pins import ACROSS_PROCESSES, FUSED, KERNEL_OF_A_DEVICE, NO_RULE, PACKED
from fxwidth.rules.op_names import rule_name

_BY_REASON = {
    KERNEL_OF_A_DEVICE: """
        _conv_depthwise2d _cudnn_attention_forward _cudnn_ctc_loss _cudnn_init_dropout_state _cudnn_rnn
        _cudnn_rnn_flatten_weight _lstm_mps _mkldnn_reshape _mkldnn_transpose _mps_convolution
        _mps_convolution_transpose _nnpack_spatial_convolution _scaled_dot_product_attention_math_for_mps
        _slow_conv2d_forward _use_cudnn_ctc_loss _use_miopen_ctc_loss conv_depthwise3d convolution_overrideable
        cudnn_affine_grid_generator cudnn_convolution cudnn_convolution_transpose cudnn_grid_sampler linear
        miopen_convolution miopen_convolution_transpose miopen_ctc_loss miopen_depthwise_convolution miopen_rnn
        mkldnn_adaptive_avg_pool2d mkldnn_convolution mkldnn_linear mkldnn_max_pool2d mkldnn_max_pool3d mkldnn_rnn_layer
        slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
        """,
    FUSED: """
        _addmm_activation cudnn_convolution_add_relu cudnn_convolution_relu miopen_convolution_add_relu
        miopen_convolution_relu
        """,
    PACKED: """
        _cslt_sparse_mm _cslt_sparse_mm_search _int_mm _mixed_dtypes_linear _scaled_grouped_mm _scaled_grouped_mm_v2
        _scaled_mm _scaled_mm_v2 _sparse_mm_reduce_impl _sparse_semi_structured_addmm
        _sparse_semi_structured_linear _sparse_semi_structured_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu
        _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm hspmm mkldnn_reorder_conv2d_weight
        mkldnn_reorder_conv3d_weight quantized_batch_norm sparse_sampled_addmm sspaddmm to_mkldnn
        """,
    ACROSS_PROCESSES: """
        batch_norm_elemt batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats
        batch_norm_update_stats
        """,
    NO_RULE: "_compute_linear_combination _foreach_mm conv_tbc",
}
UNRULED = {name: reason for reason, names in _BY_REASON.items() for name in names.split()}


def why_unruled(func: OpOverload) -> str:
    """Return why an op without a rule has none, as the reason of a pin."""
    return UNRULED.get(rule_name(func), NO_RULE)

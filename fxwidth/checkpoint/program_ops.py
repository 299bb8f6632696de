"""Which ops a program may call that nobody vouches for: those that check what they are given before they use it.

An op of ATen is written for callers that have checked its arguments. Given others, many a kernel reads or writes beside
its tensors. What is let through has a rule of its own or is named here, and is not among those that were seen to do so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from fxwidth.rules.registry import rule_for
from fxwidth.serialization.exported_archives import MODEL, UnsafeArchiveError, nodes_of

_LIBRARIES = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(\w+?)(?:\.(\w+))?")
# What a graph keeps whole that has no rule: it is made of ops that check what they are given, or checks it itself.
_CHECKING = frozenset(
    """
    __and__ __or__ absolute adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adjoint
    alpha_dropout arccos arccosh arcsin arcsinh arctan arctan2 arctanh argsort argwhere atleast_1d atleast_2d atleast_3d
    avg_pool1d batch_norm bilinear bincount binary_cross_entropy binary_cross_entropy_with_logits broadcast_tensors
    broadcast_to bucketize cartesian_prod cdist chain_matmul chunk column_stack combinations concat concatenate conj
    contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convert_element_type corrcoef
    cosine_embedding_loss cosine_similarity cov cross cross_entropy_loss cumulative_trapezoid det diag diagflat diff
    divide dropout dsplit dstack einsum expand_as fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
    feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft
    fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
    fft_rfftn fill_diagonal fix flatten fliplr flipud frobenius_norm ger gradient greater greater_equal grid_sampler
    group_norm gru gru_cell hinge_embedding_loss hsplit hstack huber_loss imag inner instance_norm inverse
    is_floating_point is_nonzero isclose isreal item kl_div kron kthvalue l1_loss layer_norm less less_equal
    linalg_cholesky linalg_cond linalg_det linalg_diagonal linalg_eigh linalg_eigvals linalg_eigvalsh linalg_inv
    linalg_ldl_factor linalg_lu_factor linalg_matmul linalg_matrix_norm linalg_matrix_power linalg_matrix_rank
    linalg_multi_dot linalg_norm linalg_slogdet linalg_solve linalg_solve_ex linalg_svd linalg_svdvals linalg_vecdot
    linear log_sigmoid log_softmax logdet mH mT margin_ranking_loss matmul matrix_H matrix_exp matrix_power max_pool1d
    max_pool1d_with_indices max_pool2d max_pool3d max_unpool2d meshgrid moveaxis movedim mse_loss msort
    multi_margin_loss multilabel_margin_loss multinomial multiply nanmean nanquantile narrow negative nll_loss
    nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd norm_except_dim not_equal nuclear_norm numpy_T one_hot
    outer pad pairwise_distance pdist pinverse poisson_nll_loss prelu quantile ravel real renorm repeat_interleave
    reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell lstm_cell
    row_stack scaled_dot_product_attention searchsorted slogdet smooth_l1_loss soft_margin_loss softmax special_digamma
    special_erf special_erfc special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc
    special_gammaln special_i0 special_log1p special_log_softmax special_logit special_logsumexp special_multigammaln
    special_ndtr special_polygamma special_psi special_round special_sinc special_softmax special_xlogy stft subtract
    sum_to_size svd swapaxes swapdims take take_along_dim tensor_split tensordot tile to trapezoid trapz
    triplet_margin_loss true_divide type_as unflatten unsafe_chunk vander view_as vsplit vstack
    _assert_async _assert_scalar _assert_tensor_metadata _cast_Float _convolution_mode _functional_assert_async
    _functional_assert_scalar _local_scalar_dense _pad_circular _pad_enum _to_cpu numel size stride storage_offset
    sym_constrain_range sym_constrain_range_for_size sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride
    """.split()  # noqa: SIM905
)
# Each of them has been seen to read or write beside its tensors, or is the kernel of one that checks before it.
_UNCHECKED = frozenset(
    """
    _reshape_alias _embedding_bag _embedding_bag_forward_only _weight_norm_interface _fused_moving_avg_obs_fq_helper
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
    _batch_norm_with_update _batch_norm_with_update_functional _batch_norm_no_update cudnn_batch_norm miopen_batch_norm
    _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _grouped_mm _thnn_fused_gru_cell _thnn_fused_lstm_cell _sparse_addmm
    _fused_rms_norm _pack_padded_sequence _trilinear rrelu_with_noise roi_align roi_pool
    """.split()  # noqa: SIM905
)
# With these arguments a kernel takes lengths and places as they are.
_TRUSTING = {"segment_reduce": frozenset({"offsets", "unsafe"})}
# Beyond them, sums and products of sizes do not fit into the numbers that kernels have for them.
_LARGEST, _SCALES = 2**31, (1e-4, 1e4)


def refuse_unchecked(entries: Mapping[str, bytes]) -> None:
    """Check that all ops of a program check what they are given.

    Args:
        entries: those of its archive, in which `refuse_code` has found no code.

    Raises:
        UnsafeArchiveError: one does not, or nobody knows.
    """
    for node in nodes_of(json.loads(entries[MODEL])):
        found = _LIBRARIES.fullmatch(node["target"])
        if found is None:
            continue
        name = found[2]
        if not _is_checking(*found.groups()):
            raise UnsafeArchiveError(
                f"it calls {node['target']!r}, which is not known to check what it is given, and so may reach memory "
                "that is not the program's"
            )
        for argument in node["inputs"]:
            if not _is_plausible(name.rstrip("_"), argument["name"], argument["arg"]):
                raise UnsafeArchiveError(
                    f"it calls {node['target']!r} with {argument['name']} = {argument['arg']}, which may reach memory "
                    "that is not the program's"
                )


def _is_checking(library: str, name: str, overload: str | None) -> bool:
    op = getattr(getattr(getattr(torch.ops, library), name, None), overload or "default", None)
    # In place or not, an op has one kernel.
    plain = name if name.startswith("__") else name.removesuffix("_")
    if not isinstance(op, OpOverload) or plain in _UNCHECKED:
        return False
    return plain in _CHECKING or rule_for(op) is not None


def _is_plausible(op: str, name: str, value: Mapping[str, Any]) -> bool:
    if name in _TRUSTING.get(op, ()) and value not in ({"as_none": True}, {"as_bool": False}):
        return False
    sizes = [size.get("as_int", 0) for size in value.get("as_sym_ints") or ()] + list(value.get("as_ints") or ())
    if not all(isinstance(size, int) and abs(size) < _LARGEST for size in sizes):
        return False
    if "upsample" not in op:
        return True
    scales = [*value.get("as_floats", ()), *([value["as_float"]] if "as_float" in value else ())]
    return all(isinstance(scale, (int, float)) and _SCALES[0] <= scale <= _SCALES[1] for scale in scales)

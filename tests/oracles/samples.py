"""One or more sample calls of every op that has a rule, with the freedom that its operands must be left.

A row gives an op, the number of independent factors among operands and results, the number of operand dims that stay
fixed, and the arguments as a function of named sizes. Every row is used twice: with sizes that all differ, and with all
sizes equal, where only identity can tell dims apart.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision  # noqa: F401 - its ops have rules
from torch.torch_version import TorchVersion

from tests.oracles.sample_calls import (
    Arguments,
    Sample,
    counts,
    index,
    marks,
    mask,
    pivots,
    regular,
    scales,
    sparse,
    t,
    z,
    zeros,
)

ROWS: list[Sample] = []


def row(
    op: str,
    free: int,
    pinned: int,
    arguments: Arguments,
    /,
    by_value: bool = True,
    cautious: bool = False,
    names_channels: bool = False,
    **keywords: Any,
) -> None:
    """Add a row."""
    ROWS.append(Sample(op, free, pinned, arguments, keywords, by_value, cautious, names_channels))


# -- contractions: a dim shared by both operands, one for each alone --
row("mm", 3, 0, lambda s: [t(s.a, s.b), t(s.b, s.c)])
row("addmm", 3, 0, lambda s: [t(s.c), t(s.a, s.b), t(s.b, s.c)])
row("addmm", 3, 0, lambda s: [t(s.a, 1), t(s.a, s.b), t(s.b, s.c)])
row("bmm", 4, 0, lambda s: [t(s.n, s.a, s.b), t(s.n, s.b, s.c)])
row("baddbmm", 4, 0, lambda s: [t(s.n, s.a, s.c), t(s.n, s.a, s.b), t(s.n, s.b, s.c)])
row("addbmm", 4, 0, lambda s: [t(s.a, s.c), t(s.n, s.a, s.b), t(s.n, s.b, s.c)])
row("addmv", 2, 0, lambda s: [t(s.a), t(s.a, s.b), t(s.b)])
row("mv", 2, 0, lambda s: [t(s.a, s.b), t(s.b)])
row("dot", 1, 0, lambda s: [t(s.a), t(s.a)])
row("vdot", 1, 0, lambda s: [t(s.a), t(s.a)])


def _grouped_mm(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    ends = offs.tolist()
    parts = [rows[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weights, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weights.shape[2])])


# ATen's kernel takes no float64 and only widths of whole 16 bytes; the op of this library takes all, by the same rule.
_fallback = torch.library.custom_op(
    "transformers::grouped_mm_fallback",
    _grouped_mm,
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor offs) -> Tensor",
)
_fallback.register_fake(lambda rows, weights, offs: rows.new_empty(rows.shape[0], weights.shape[2]))
row("transformers::grouped_mm_fallback", 2, 3, lambda s: [t(s.a, s.b), t(s.n, s.b, s.c), index(2, s.n)], cautious=True)


def _conv(s: Any, rank: int, shape: tuple[int, int], out: int, groups: int = 1, transposed: bool = False) -> list[Any]:
    signal = t(s.n, shape[0] if transposed else shape[1] * groups, *[s.h, s.w, s.e][:rank])
    weight = t(*shape, *[3] * rank)
    steps = [[1] * rank, [2] * rank, [2] * rank]
    return [signal, weight, t(out), *steps, transposed, [0] * rank, groups]


row("convolution", 3, 4, lambda s: _conv(s, 2, (s.c, s.d), s.c))
row("convolution", 3, 2, lambda s: _conv(s, 1, (s.c, s.d), s.c))
row("convolution", 3, 6, lambda s: _conv(s, 3, (s.c, s.d), s.c))
row("convolution", 4, 4, lambda s: _conv(s, 2, (3 * s.a, s.b), 3 * s.a, groups=3))
row("convolution", 2, 4, lambda s: _conv(s, 2, (s.d, 1), s.d, groups=s.d))
row("convolution", 3, 4, lambda s: _conv(s, 2, (2 * s.d, 1), 2 * s.d, groups=s.d))
row("convolution", 3, 4, lambda s: _conv(s, 2, (s.c, s.d), s.d, transposed=True))
row("convolution", 4, 4, lambda s: _conv(s, 2, (3 * s.a, s.b), 3 * s.b, groups=3, transposed=True))
row("convolution", 4, 2, lambda s: _conv(s, 1, (3 * s.a, s.b), 3 * s.b, groups=3, transposed=True))
row("convolution", 2, 4, lambda s: _conv(s, 2, (s.d, 1), s.d, groups=s.d, transposed=True))
row(
    "convolution",
    5,
    0,
    lambda s: [t(s.n, s.c, s.h, s.w), t(s.d, s.c, 1, 1), None, [1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1],
)
row(
    "convolution",
    4,
    2,
    lambda s: [t(s.n, s.c, s.h, s.w), t(s.d, s.c, 1, 3), None, [1] * 2, [0] * 2, [1] * 2, False, [0] * 2, 1],
)
row("_convolution", 4, 4, lambda s: [*_conv(s, 2, (3 * s.a, s.b), 3 * s.a, groups=3), False, False, True, True])

# -- copies of channels: both sides are free, and the numbers follow both --
_COPIED = "fxwidth::copied_channels"
row(_COPIED, 4, 0, lambda s: [t(s.n, s.c, s.h), [*range(s.c), *range(s.c - 1)], 1], names_channels=True)
row(_COPIED, 3, 0, lambda s: [t(s.c, s.n), [1, 0, -1, 2, 1, 1, -1, 0], 0], names_channels=True)
row(_COPIED, 4, 0, lambda s: [t(s.n, 2 * s.c, s.d), [*range(s.d), -1, 0, 0, 1], -1], names_channels=True)

# -- normalisation --
_NORM = lambda s: [t(s.n, s.c, s.h, s.w), t(s.c), t(s.c)]  # noqa: E731 - a table's shorthand
row("native_batch_norm", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), False, 0.1, 1e-5])
row("native_batch_norm", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), True, 0.1, 1e-5], cautious=True)
row("native_batch_norm", 2, 0, lambda s: [t(s.n, s.c), None, None, t(s.c), t(s.c), False, 0.1, 1e-5])
row("_native_batch_norm_legit", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), True, 0.1, 1e-5], cautious=True)
row("_native_batch_norm_legit.no_stats", 4, 0, lambda s: [*_NORM(s), True, 0.1, 1e-5])
row("_native_batch_norm_legit_no_training", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), 0.1, 1e-5])
row("_batch_norm_with_update", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), 0.1, 1e-5], cautious=True)
row("_batch_norm_no_update", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), 0.1, 1e-5])
for _name in ("_native_batch_norm_legit_functional", "_batch_norm_with_update_functional"):
    _own = [True] if "legit" in _name else []
    row(_name, 4, 0, lambda s, o=_own: [*_NORM(s), t(s.c), t(s.c), *o, 0.1, 1e-5], cautious=True)
row("miopen_batch_norm", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), False, 0.1, 1e-5], by_value=False)
row("cudnn_batch_norm", 4, 0, lambda s: [*_NORM(s), t(s.c), t(s.c), False, 0.1, 1e-5], by_value=False)
row("native_layer_norm", 3, 0, lambda s: [t(s.n, s.a, s.c), [s.c], t(s.c), t(s.c), 1e-5])
row("native_layer_norm", 3, 0, lambda s: [t(s.n, s.a, s.c), [s.a, s.c], t(s.a, s.c), None, 1e-5])
row("_fused_rms_norm", 3, 0, lambda s: [t(s.n, s.a, s.c), [s.c], t(s.c), 1e-5])
row("fxwidth::rms_norm", 3, 0, lambda s: [t(s.n, s.a, s.c), [s.c], t(s.c), 1e-5])
row("_weight_norm_interface", 3, 0, lambda s: [t(s.a, s.b, s.c), t(s.a, 1, 1), 0])
row("_weight_norm_interface", 2, 0, lambda s: [t(s.a, s.b), t(1, s.b), 1])
row("fxwidth::weight_norm", 3, 0, lambda s: [t(s.a, s.b, s.c), t(s.a, 1, 1), 0])
row("fxwidth::weight_norm", 3, 0, lambda s: [t(s.a, s.b, s.c), t(1, s.b, 1), 1])
row("fxwidth::weight_norm", 2, 0, lambda s: [t(s.a, s.b), t(), -1])
row("native_group_norm", 4, 0, lambda s: [t(s.n, 2 * s.c, s.h), t(2 * s.c), t(2 * s.c), s.n, 2 * s.c, s.h, 2, 1e-5])
row("native_group_norm", 4, 0, lambda s: [t(s.n, 2 * s.c, s.h), None, None, s.n, 2 * s.c, s.h, 2, 1e-5])
row("native_group_norm", 2, 0, lambda s: [t(s.n, s.c), t(s.c), t(s.c), s.n, s.c, 1, s.c, 1e-5])

# -- reductions: what is reduced over is free too, though it mixes --
for _name in ("sum", "nansum", "mean", "amax", "amin", "logsumexp", "linalg_vector_norm", "norm"):
    _overload = {"sum": ".dim_IntList", "mean": ".dim", "norm": ".ScalarOpt_dim"}.get(_name, "")
    _order = [2] if _name in ("linalg_vector_norm", "norm") else []
    row(_name + _overload, 3, 0, lambda s, o=_order: [t(s.a, s.b, s.c), *o, [1]])
    row(_name + _overload, 3, 0, lambda s, o=_order: [t(s.a, s.b, s.c), *o, [0, -1], True])
for _name in ("any", "all"):
    row(_name + ".dim", 3, 0, lambda s: [mask(s.a, s.b, s.c), 1])
    row(_name + ".dims", 3, 0, lambda s: [mask(s.a, s.b, s.c), [0, 2]])
    row(_name, 2, 0, lambda s: [mask(s.a, s.b)])
    row(f"_is_{_name}_true", 2, 0, lambda s: [mask(s.a, s.b)])
for _name in ("var", "std", "var_mean", "std_mean"):
    row(_name + ".correction", 3, 0, lambda s: [t(s.a, s.b, s.c), [1]], correction=0)
    row(_name + ".correction", 3, 0, lambda s: [t(s.a, s.b, s.c), [0, 2]], correction=0, keepdim=True)
row("sum", 2, 0, lambda s: [t(s.a, s.b)])
row("mean", 2, 0, lambda s: [t(s.a, s.b)])
row("prod", 2, 0, lambda s: [t(s.a, s.b)])
row("prod.dim_int", 2, 0, lambda s: [t(s.a, s.b), 1])
row("argmax", 2, 1, lambda s: [t(s.a, s.b, s.c), 1])
row("argmin", 2, 1, lambda s: [t(s.a, s.b, s.c), -1, True])
for _name in ("max", "min"):
    row(_name, 2, 0, lambda s: [t(s.a, s.b)])
    # Positions are returned too, which nothing reads here: see the networks for both cases.
    row(_name + ".dim", 3, 0, lambda s: [t(s.a, s.b, s.c), 1], by_value=False)
    row(_name + ".other", 2, 0, lambda s: [t(s.a, s.b), t(s.b)])
for _name in ("_softmax", "_log_softmax"):
    row(_name, 3, 0, lambda s: [t(s.a, s.b, s.c), -1, False])
row("_safe_softmax", 3, 0, lambda s: [t(s.a, s.b, s.c), -1])
row("softmax.int", 3, 0, lambda s: [t(s.a, s.b, s.c), 1])
row("log_softmax.int", 3, 0, lambda s: [t(s.a, s.b, s.c), 0])
for _name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort"):
    row(_name, 2, 1, lambda s: [t(s.a, s.b, s.c), 1])
row("aminmax", 3, 0, lambda s: [t(s.a, s.b, s.c)], dim=1)
row("aminmax", 2, 0, lambda s: [t(s.a, s.b)])
row("histc", 2, 0, lambda s: [t(s.a, s.b), 7, -2.0, 2.0])
row("topk", 2, 1, lambda s: [t(s.a, s.b, s.c), 2, 1])

# -- positions: their dims stay fixed --
_SPACES = {1: lambda s: (8,), 2: lambda s: (8, 6), 3: lambda s: (8, 6, 4)}
for _rank, _space in _SPACES.items():
    _x = lambda s, f=_space: t(s.n, s.c, *f(s))  # noqa: E731 - a table's shorthand
    _d = f"{_rank}d"
    for _name in ("max_pool" + _d, "max_pool" + _d + "_with_indices", "avg_pool" + _d):
        if _name != "max_pool1d_with_indices":
            row(_name, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [2] * r, [2] * r])
    row("adaptive_avg_pool" + _d, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [2] * r])
    row("adaptive_max_pool" + _d, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [2] * r])
    if _rank > 1:
        row("_adaptive_avg_pool" + _d, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [2] * r])
    row("reflection_pad" + _d, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [1] * (2 * r)])
    row("replication_pad" + _d, 2, _rank, lambda s, x=_x, r=_rank: [x(s), [1] * (2 * r)])
    _double = lambda s, f=_space: [2 * size for size in f(s)]  # noqa: E731 - a table's shorthand
    row("upsample_nearest" + _d, 2, _rank, lambda s, x=_x, z=_double: [x(s), z(s)])
    row("_upsample_nearest_exact" + _d, 2, _rank, lambda s, x=_x, z=_double: [x(s), z(s)])
    if _rank != 2:
        _name = {1: "upsample_linear1d", 3: "upsample_trilinear3d"}[_rank]
        row(_name, 2, _rank, lambda s, x=_x, z=_double: [x(s), z(s), False])
_x2 = lambda s: t(s.n, s.c, 8, 6)  # noqa: E731 - a table's shorthand
for _name in ("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa"):
    row(_name, 2, 2, lambda s: [_x2(s), [16, 12], False])
row("max_pool1d_with_indices", 2, 1, lambda s: [t(s.n, s.c, 8), [2], [2]])
for _name in ("grid_sampler_2d", "grid_sampler"):
    row(_name, 2, 5, lambda s: [_x2(s), t(s.n, 4, 3, 2), 0, 0, False], cautious=True)
row("grid_sampler_3d", 2, 7, lambda s: [t(s.n, s.c, 4, 3, 5), t(s.n, 4, 3, 6, 3), 0, 0, False], cautious=True)
row("affine_grid_generator", 1, 2, lambda s: [t(s.a, 2, 3), [s.a, 7, 4, 5], False])
row("affine_grid_generator", 1, 2, lambda s: [t(s.a, 3, 4), [s.a, 2, 4, 5, 3], True])
row("pixel_shuffle", 2, 2, lambda s: [t(s.n, 4 * s.c, s.h, s.w), 2])
row("pixel_unshuffle", 2, 2, lambda s: [t(s.n, s.c, 4, 6), 2])
row("im2col", 2, 2, lambda s: [t(s.n, s.c, s.h, s.w), [3, 2], [1, 1], [0, 0], [1, 1]])
row("col2im", 2, 1, lambda s: [t(s.n, 6 * s.c, 24), [6, 5], [3, 2], [1, 1], [1, 0], [1, 1]])
row("unfold", 1, 1, lambda s: [t(s.a, s.h), 1, 3, 1])

# -- Fourier transforms, and complex numbers --
row("_fft_r2c", 2, 1, lambda s: [t(s.a, s.b, s.c), [1], 0, True])
row("_fft_r2c", 1, 2, lambda s: [t(s.a, s.b, s.c), [0, 2], 1, True])
row("_fft_r2c", 2, 1, lambda s: [t(s.a, s.b, s.c), [1], 0, False])
row("_fft_c2c", 2, 1, lambda s: [z(s.a, s.b, s.c), [1], 2, True])
row("_fft_c2c", 1, 2, lambda s: [z(s.a, s.b, s.c), [0, 2], 0, False])
row("_fft_c2r", 2, 1, lambda s: [z(s.a, s.b, s.c), [1], 2, 2 * s.b - 1])
row("_fft_c2r", 1, 2, lambda s: [z(s.c, s.a, s.b), [0, 2], 2, 2 * s.b - 2])
row("view_as_real", 2, 0, lambda s: [z(s.a, s.b)])
row("view_as_complex", 2, 1, lambda s: [t(s.a, s.b, 2)])
for _name in ("complex", "polar"):
    row(_name, 2, 0, lambda s: [t(s.a, s.b), t(s.a, s.b)])
for _name in ("_conj", "_conj_physical", "_neg_view", "abs", "angle", "exp"):
    row(_name, 2, 0, lambda s: [z(s.a, s.b)])
row("mul.Tensor", 2, 0, lambda s: [z(s.a, s.b), t(s.b)])
row("bmm", 4, 0, lambda s: [z(s.n, s.a, s.b), z(s.n, s.b, s.c)])

# -- products of three, of sparse tensors and at places between positions; distances --
row("_trilinear", 4, 0, lambda s: [t(s.n, s.a), t(s.b, s.a, s.c), t(s.n, s.c), [1, 3], [0], [1, 2], [2, 3], 1])
row("_trilinear", 4, 0, lambda s: [t(s.n, s.a), t(s.a, s.b), t(s.n, s.c), [2, 3], [0, 3], [1, 2], [1], 1])
row("_cdist_forward", 4, 0, lambda s: [t(s.n, s.a, s.b), t(s.n, s.c, s.b), 2.0, None])
row("_cdist_forward", 4, 0, lambda s: [t(s.n, s.a, s.b), t(1, s.c, s.b), 1.0, 2])
row("_sparse_addmm", 1, 4, lambda s: [t(s.a, s.c), sparse(s.a, s.b), t(s.b, s.c)], cautious=True)
row("mm", 1, 3, lambda s: [sparse(s.a, s.b), t(s.b, s.c)], cautious=True)
_DEFORMED = lambda s: [t(s.n, s.c, s.h, s.w), t(s.d, s.c, 3, 3), t(s.n, 18, s.h, s.w)]  # noqa: E731 - as above
row("torchvision::deform_conv2d", 3, 10, lambda s: [*_DEFORMED(s), t(s.n, 9, s.h, s.w), t(s.d), *[1] * 8, True])
row("torchvision::deform_conv2d", 3, 7, lambda s: [*_DEFORMED(s), t(s.n, 1), t(s.d), *[1] * 8, False])

# -- fake quantization --
_FAKE, _BITS = "fake_quantize_per", [-128, 127]
row(_FAKE + "_tensor_affine_cachemask", 2, 0, lambda s: [t(s.a, s.b), 0.01, 3, *_BITS])
_BY_TENSOR = lambda s: [t(s.a, s.b), scales(1), zeros(1), counts(1)]  # noqa: E731 - as above
row(f"_{_FAKE}_tensor_affine_cachemask_tensor_qparams", 2, 0, lambda s: [*_BY_TENSOR(s), *_BITS])
row("_fake_quantize_learnable_per_tensor_affine", 2, 0, lambda s: [t(s.a, s.b), scales(1), scales(1), *_BITS])
row(_FAKE + "_channel_affine_cachemask", 2, 0, lambda s: [t(s.a, s.b), scales(s.b), zeros(s.b), 1, *_BITS])
_LEARNT = lambda s: [t(s.a, s.b), scales(s.a), scales(s.a), 0]  # noqa: E731 - as above
row("_fake_quantize_learnable_per_channel_affine", 2, 0, lambda s: [*_LEARNT(s), *_BITS])
for _each in (True, False):
    _observed = lambda s, e=_each: [  # noqa: E731 - as above
        *(scales(s.a, s.b, s.c), counts(1), counts(1), *[scales(s.a if e else 1)] * 3, zeros(s.a if e else 1), 0.01)
    ]
    row("_fused_moving_avg_obs_fq_helper", 3, 0, lambda s, o=_observed, e=_each: [*o(s), *_BITS, 0, e])

# -- linear algebra: matrices of fixed size, and batches of any --
_SQUARE, _TALL = lambda s: regular(s.a, s.b, 3), lambda s: t(s.a, s.b, 4, 3)
for _name in ("linalg_inv_ex", "_linalg_det", "_linalg_slogdet", "linalg_matrix_exp", "linalg_lu_factor_ex"):
    row(_name, 2, 2, lambda s: [_SQUARE(s)])
for _name in ("linalg_cholesky_ex", "cholesky_inverse", "_linalg_eigh", "linalg_ldl_factor_ex"):
    row(_name, 2, 2, lambda s: [_SQUARE(s)])
for _name in ("linalg_eig", "_linalg_eigvals", "linalg_lu"):
    row(_name, 2, 2, lambda s: [_SQUARE(s)])
for _name in ("linalg_qr", "_linalg_svd", "linalg_pinv"):
    row(_name + (".atol_rtol_tensor" if "pinv" in _name else ""), 2, 2, lambda s: [_TALL(s)])
row("_linalg_svd", 2, 2, lambda s: [_TALL(s), False, False])
row("_linalg_solve_ex", 3, 3, lambda s: [_SQUARE(s), t(s.a, s.b, 3, s.c)])
row("_linalg_solve_ex", 3, 3, lambda s: [_SQUARE(s), t(s.a, s.b, s.c, 3)], left=False)
row("_linalg_solve_ex", 2, 3, lambda s: [_SQUARE(s), t(s.a, s.b, 3)])
row("_linalg_solve_ex", 2, 3, lambda s: [_SQUARE(s), t(3)])
row("linalg_solve_triangular", 3, 3, lambda s: [_SQUARE(s), t(1, s.b, 3, s.c)], upper=True)
for _name in ("cholesky_solve", "triangular_solve"):
    row(_name, 3, 3, lambda s: [t(s.a, s.b, 3, s.c), _SQUARE(s)])
row("linalg_householder_product", 2, 3, lambda s: [_TALL(s), t(s.a, s.b, 3)])
# Its kernel does not check which rows are exchanged.
row("lu_unpack", 2, 3, lambda s: [_SQUARE(s), pivots(s.a, s.b, 3)], by_value=False)
row("diag_embed", 2, 0, lambda s: [t(s.a, s.b)])
row("diag_embed", 2, 0, lambda s: [t(s.a, s.b), 0, 0, -1])
row("diag_embed", 1, 1, lambda s: [t(s.a, s.b), -2, 2, 1])
for _name in ("diagonal", "diagonal_copy"):
    row(_name, 2, 0, lambda s: [t(s.b, s.a, s.b), 0, 0, -1])
    row(_name, 1, 2, lambda s: [t(s.a, s.b, s.b), 1, 2, 1])

# -- attention kernels --
_QKV = lambda s: [t(s.n, s.a, s.b, s.d), t(s.n, s.a, s.c, s.d), t(s.n, s.a, s.c, s.d)]  # noqa: E731 - as above
_FLASH = "_scaled_dot_product_flash_attention"
_WHOLE = {"scale": 0.3, "enable_gqa": False}
row("fxwidth::attention", 6, 0, lambda s: [*_QKV(s)[:2], t(s.n, s.a, s.c, s.e), None, 0.0, False], **_WHOLE)
row("fxwidth::attention", 6, 0, lambda s: [*_QKV(s), t(s.a, s.b, s.c), 0.0, False], **_WHOLE)
row("fxwidth::attention", 6, 0, lambda s: [*_QKV(s), mask(s.n, 1, 1, s.c), 0.0, False], **_WHOLE)
row("fxwidth::attention", 4, 3, lambda s: [*_QKV(s), None, 0.0, True], **_WHOLE)
row("fxwidth::attention", 4, 0, lambda s: [t(s.a, s.d), t(s.b, s.d), t(s.b, s.e), None, 0.0, False], **_WHOLE)
row(
    "fxwidth::attention",
    6,
    0,
    lambda s: [t(s.n, s.a, s.b, s.d), t(s.c, s.d), t(s.a, s.c, s.d), None, 0.0, False],
    **_WHOLE,
)
row(
    "fxwidth::attention",
    7,
    0,
    lambda s: [t(s.n, 2 * s.a, s.b, s.d), t(s.n, s.a, s.c, s.d), t(s.n, s.a, s.c, s.e), None, 0.0, False],
    scale=0.3,
    enable_gqa=True,
)
row(
    "fxwidth::attention",
    6,
    0,
    lambda s: [t(s.n, 6 * s.a, s.b, s.d), t(s.n, 3 * s.a, s.c, s.d), t(s.n, 2 * s.a, s.c, s.e), None, 0.0, False],
    scale=0.3,
    enable_gqa=True,
)
row(_FLASH + "_for_cpu", 5, 0, _QKV, scale=0.3)
row(_FLASH + "_for_cpu", 4, 3, _QKV)
row(_FLASH, 5, 0, _QKV, by_value=False, scale=0.3)
row("_scaled_dot_product_efficient_attention", 6, 0, lambda s: [*_QKV(s), None, False], by_value=False, scale=0.3)
row("_scaled_dot_product_cudnn_attention", 6, 0, lambda s: [*_QKV(s), None, False], by_value=False, scale=0.3)

# -- recurrent cells; torch up to 2.14 does not tell what some of them give, and analysis cannot begin --
_LSTM_CELL, _GRU_CELL = "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"
TOLD_BY_LATER_TORCH = {_GRU_CELL} if torch.__version__ < TorchVersion("2.15") else set()
row(
    _LSTM_CELL,
    2,
    0,
    lambda s: [t(s.n, 4 * s.a), t(s.n, 4 * s.a), t(s.n, s.a), t(4 * s.a), t(4 * s.a)],
    by_value=False,
)
if not TOLD_BY_LATER_TORCH:
    row(_LSTM_CELL, 2, 0, lambda s: [t(s.n, 4 * s.a), t(s.n, 4 * s.a), t(s.n, s.a)], by_value=False)
    row(
        _GRU_CELL,
        2,
        0,
        lambda s: [t(s.n, 3 * s.a), t(s.n, 3 * s.a), t(s.n, s.a), t(3 * s.a), t(3 * s.a)],
        by_value=False,
    )

# -- sequences of several lengths, as the columns of a rectangle and packed row by row --
row("_pack_padded_sequence", 1, 3, lambda s: [t(s.a, s.b, s.c), counts(s.a, *[2] * (s.b - 1)), False])
row("_pack_padded_sequence", 2, 3, lambda s: [t(s.b, s.a, s.c, s.d), counts(s.a, *[2] * (s.b - 1)), True])
row(
    "fxwidth::pad_packed_sequence",
    1,
    2,
    lambda s: [t(s.a + s.b - 1, s.c), counts(s.b, *[1] * (s.a - 1)), True, 0.5, s.a],
)

# -- views and movements --
for _name in ("view", "_unsafe_view", "reshape", "_reshape_copy", "view_copy"):
    row(_name, 3, 0, lambda s: [t(s.a, s.b * s.c), [s.a, s.b, s.c]])
    row(_name, 3, 0, lambda s: [t(s.a, s.b, s.c), [s.a, -1]])
row("view", 4, 0, lambda s: [t(s.a * s.b, s.c, s.d), [s.a, 1, s.b, s.c * s.d]])
row("view", 3, 0, lambda s: [t(s.a * 6, s.b), [s.a * 2, 3 * s.b]])
row("view.dtype", 2, 0, lambda s: [t(s.a, s.b), torch.int64])
row("_reshape_alias", 3, 0, lambda s: [t(s.a, s.b * s.c), [s.a, s.b, s.c], [s.b * s.c, s.c, 1]])
row("permute", 3, 0, lambda s: [t(s.a, s.b, s.c), [2, 0, 1]])
row("permute", 3, 0, lambda s: [t(s.a, s.b, s.c), [-1, 0, -2]])
row("t", 2, 0, lambda s: [t(s.a, s.b)])
row("numpy_T", 2, 0, lambda s: [t(s.a, s.b)])
row("mT", 3, 0, lambda s: [t(s.a, s.b, s.c)])
row("transpose.int", 3, 0, lambda s: [t(s.a, s.b, s.c), 0, -1])
row("expand", 3, 0, lambda s: [t(s.a, 1), [s.c, s.a, s.b]])
row("expand", 2, 0, lambda s: [t(s.a), [s.b, -1]])
row("repeat", 4, 0, lambda s: [t(s.a, s.b), [3, 2]])
row("repeat", 3, 0, lambda s: [t(s.a, 1), [4, 1, 3]])
row("unsqueeze", 2, 0, lambda s: [t(s.a, s.b), -2])
row("squeeze", 2, 0, lambda s: [t(s.a, 1, s.b, 1)])
row("squeeze.dim", 2, 0, lambda s: [t(s.a, 1, s.b), 1])
row("squeeze.dims", 2, 0, lambda s: [t(s.a, 1, s.b), [0, 1]])
row("select.int", 3, 0, lambda s: [t(s.a, s.h), 1, 3])
row("select.int", 2, 0, lambda s: [t(s.a, s.h), 1, -1])
for _name in ("slice.Tensor", "slice_copy.Tensor"):
    row(_name, 4, 0, lambda s: [t(s.a, s.h), 1, 2, -2])
row("slice.Tensor", 2, 0, lambda s: [t(s.a, s.h)])
row("slice.Tensor", 2, 0, lambda s: [t(s.a, 2 * s.b), 1, 1, 2**63 - 1, 2])
row("slice.Tensor", 1, 1, lambda s: [t(s.a, 2 * s.b + 1), 1, 0, 2**63 - 1, 2])
for _name in ("split.Tensor", "unsafe_split.Tensor"):
    row(_name, 4, 0, lambda s: [t(s.a, 8), 3, -1])
for _name in ("split_with_sizes", "unsafe_split_with_sizes", "split_with_sizes_copy"):
    row(_name, 4, 0, lambda s: [t(s.a, s.b + s.c + s.d), [s.b, s.c, s.d], 1])
row("chunk", 4, 0, lambda s: [t(s.a, 8), 3, 1])
row("unbind.int", 1, 1, lambda s: [t(s.a, s.b), 1])
row("cat", 3, 0, lambda s: [[t(s.a, s.b), t(s.a, s.c)], 1])
row("cat", 4, 0, lambda s: [[t(s.b, s.a), t(0), t(s.c, s.a), t(s.d, s.a)]])
row("concat", 3, 0, lambda s: [[t(s.a, s.b), t(s.a, s.c)], -1])
row("stack", 2, 0, lambda s: [[t(s.a, s.b), t(s.a, s.b)], -1])
row("constant_pad_nd", 4, 0, lambda s: [t(s.a, s.b), [2, 3]])
row("constant_pad_nd", 5, 0, lambda s: [t(s.a, s.h), [-2, -3, 2, 0]])
row("slice_scatter", 4, 0, lambda s: [t(s.a, s.h), t(s.a, s.h - 4), 1, 2, -2])
# To a larger size it adds entries of no value.
row("resize", 2, 0, lambda s: [t(s.a, s.b), [s.a, s.b]], by_value=False)
row("as_strided", 2, 0, lambda s: [t(s.a, s.b), [s.a, s.b], [s.b, 1]])
row("as_strided", 2, 0, lambda s: [t(s.a, 1, s.b), [s.a, 1, s.b], [s.b, 99, 1], 0])
row("as_strided", 0, 2, lambda s: [t(s.b, s.b), [s.b, s.b], [1, s.b]])
row("as_strided", 0, 2, lambda s: [t(s.a, s.b), [s.a - 1, s.b], [s.b, 1], s.b])
row("as_strided", 0, 2, lambda s: [t(s.a, s.b), [s.a, s.b], [0, 1]])
row("flip", 1, 1, lambda s: [t(s.a, s.b), [-1]])
row("roll", 1, 1, lambda s: [t(s.a, s.b), [1], [1]])
row("roll", 0, 2, lambda s: [t(s.a, s.b), [1]])
for _name in ("tril", "triu"):
    row(_name, 1, 2, lambda s: [t(s.a, s.b, s.c)])
row("glu", 2, 0, lambda s: [t(s.a, 2 * s.b), -1])
row("channel_shuffle", 2, 0, lambda s: [t(s.a, 2 * s.b, 1, 1), 2])
row("native_channel_shuffle", 4, 0, lambda s: [t(s.a, 2 * s.b, s.h, s.w), 2])

# -- look-ups and factories --
for _name in ("index.Tensor", "_unsafe_index.Tensor"):
    row(_name, 3, 1, lambda s: [t(s.a, s.b, s.c), [None, index(s.b, s.d)]])
    row(_name, 3, 2, lambda s: [t(s.a, s.b, s.c), [None, index(s.b, s.d, 1), index(s.c, s.e)]])
    row(_name, 2, 2, lambda s: [t(s.a, s.b, s.c), [index(s.a, s.d), None, index(s.c, s.d)]])
row("index.Tensor", 2, 2, lambda s: [t(s.a, s.b, s.c), [None, mask(s.b)]])
row("index.Tensor", 1, 4, lambda s: [t(s.a, s.b, s.c), [mask(s.a, s.b)]])
row("index_put", 2, 3, lambda s: [t(s.a, s.b, s.c), [None, index(s.b, s.d)], t(s.a, s.d, s.c)])
row("index_put", 1, 5, lambda s: [t(s.a, s.b, s.c), [index(s.a, s.d), None, index(s.c, s.d)], t(s.d, s.b), True])
row("_unsafe_index_put", 1, 3, lambda s: [t(s.a, s.b), [index(s.a, s.d)], t(s.d, 1), True])
row("index_put", 2, 0, lambda s: [t(s.a, s.b), [mask(s.a)], t(1, s.b)])
row("index_put", 3, 0, lambda s: [t(s.a, s.b, s.c), [None, mask(s.b)], t(s.a, 1, s.c), True])
row("index_put", 3, 0, lambda s: [t(s.a, s.b, s.c), [mask(s.a, s.b)], t()])
row("index_put", 1, 3, lambda s: [t(s.b, s.c), [marks(*[1] * s.a, *[0] * (s.b - s.a))], t(s.a, s.c)])
row("index_put", 0, 3, lambda s: [t(s.b, s.c), [mask(s.b), index(s.c, 1)], t(1)], cautious=True)
for _name in ("index_add", "index_copy"):
    row(_name, 2, 3, lambda s: [t(s.a, s.b, s.c), 1, index(s.b, s.d), t(s.a, s.d, s.c)])
row("index_add", 0, 3, lambda s: [t(s.a), 0, index(s.a, s.d), t(s.d)], alpha=0.5)
for _reduce in ("amax", "prod", "mean"):
    row("index_reduce", 1, 3, lambda s, r=_reduce: [t(s.a, s.b), 0, index(s.a, s.d), t(s.d, s.b), r])
row("index_fill.int_Scalar", 2, 2, lambda s: [t(s.a, s.b, s.c), -2, index(s.b, 2), 0.5])
row("index_fill.int_Tensor", 1, 2, lambda s: [t(s.a, s.b), 1, index(s.b, 2), t()])
_SCATTERED = lambda s: [t(s.a, s.b, s.c), 1, index(s.b, s.a, s.d, s.c)]  # noqa: E731 - a table's shorthand
for _name in ("scatter.value", "scatter.value_reduce"):
    row(_name, 2, 2, lambda s: [*_SCATTERED(s), 0.5], **({"reduce": "multiply"} if "reduce" in _name else {}))
row("scatter.reduce", 2, 3, lambda s: [*_SCATTERED(s), t(s.a, s.d, s.c)], reduce="add")
row("scatter.src", 1, 3, lambda s: [t(s.b, s.c), 0, index(s.b, s.d, s.c), t(s.d, s.c)])
row("scatter_add", 2, 3, lambda s: [*_SCATTERED(s), t(s.a, s.d, s.c)])
row("scatter_add", 0, 6, lambda s: [t(s.b, s.c), 0, index(s.b, s.d, s.c - 1), t(s.e, s.c)], cautious=True)
for _reduce in ("sum", "amax", "mean", "prod"):
    row("scatter_reduce.two", 2, 3, lambda s, r=_reduce: [*_SCATTERED(s), t(s.a, s.d, s.c), r])
row("segment_reduce", 2, 2, lambda s: [t(7, s.c, s.d), "sum"], lengths=counts(3, 4))
row("segment_reduce", 1, 2, lambda s: [t(7, s.c), "mean"], offsets=counts(0, 2, 7), initial=0.5)
row("masked_scatter", 1, 3, lambda s: [t(s.a, s.b), mask(s.a, 1), t(s.a, s.b)])
row("masked_scatter", 0, 6, lambda s: [t(s.a, s.b), mask(s.a, s.b), t(s.a, s.b)])
row("nonzero", 0, 2, lambda s: [mask(s.a, s.b)])
row("masked_select", 0, 4, lambda s: [t(s.a, s.b), mask(s.a, s.b)])
row("_unique2", 0, 1, lambda s: [index(3, s.e)], cautious=True)
row("unique_dim", 0, 2, lambda s: [index(2, s.a, s.b), 1], cautious=True)
row("unique_consecutive", 0, 1, lambda s: [index(2, s.e)], cautious=True)
row("torchvision::nms", 0, 3, lambda s: [t(s.a, 4), t(s.a), 0.5], cautious=True)
row("torchvision::roi_align", 2, 4, lambda s: [t(s.n, s.a, s.h, s.w), t(s.b, 5), 8.0, 2, 2, 2, True], cautious=True)
row("torchvision::roi_pool", 2, 4, lambda s: [t(s.n, s.a, s.h, s.w), t(s.b, 5), 8.0, 2, 2], cautious=True)
row("index_select", 2, 1, lambda s: [t(s.a, s.b), 1, index(s.b, s.c)])
row("embedding", 3, 1, lambda s: [t(s.a, s.b), index(s.a, s.c, s.d)])
_BAGS = lambda s: [t(s.a, s.b), index(s.a, 8)]  # noqa: E731 - a table's shorthand
for _name in ("_embedding_bag", "_embedding_bag_forward_only"):
    for _mode in (0, 1, 2):
        row(_name, 1, 3, lambda s, m=_mode: [*_BAGS(s), counts(0, 2, 3), False, m])
row("_embedding_bag", 1, 4, lambda s: [*_BAGS(s), counts(0, 2, 3), False, 0, False, t(8), False, 1])
row("_embedding_bag", 1, 3, lambda s: [*_BAGS(s), counts(0, 2, 3, 8), False, 0, False, None, True])
row("gather", 2, 1, lambda s: [t(s.a, s.b), 1, index(s.b, s.a, s.c)])
row("gather", 1, 3, lambda s: [t(s.c, s.b), 1, index(s.b, s.c - 1, s.a)])
for _name in ("zeros", "ones"):
    row(_name, 2, 0, lambda s: [[s.a, s.b]])
row("full", 2, 0, lambda s: [[s.a, s.b], 2.0])
for _name in ("empty.memory_format", "rand", "randn"):
    row(_name, 2, 0, lambda s: [[s.a, s.b]], by_value=False)
for _name in ("new_zeros", "new_ones"):
    row(_name, 4, 0, lambda s: [t(s.c, s.d), [s.a, s.b]])
row("new_empty", 4, 0, lambda s: [t(s.c, s.d), [s.a, s.b]], by_value=False)
row("new_full", 4, 0, lambda s: [t(s.c, s.d), [s.a, s.b], 2.0])
row("arange", 0, 0, lambda s: [s.a])
row("arange.start_step", 0, 0, lambda s: [0, s.h, 2])
row("eye", 0, 0, lambda s: [s.a])
row("linspace", 0, 0, lambda s: [0.0, 1.0, s.a])
row("randperm", 0, 0, lambda s: [s.a], by_value=False)
row("scalar_tensor", 0, 0, lambda s: [1.5])
row("empty_strided", 0, 0, lambda s: [[s.a, s.b], [s.b, 1]], by_value=False)
for _name in ("tril_indices", "triu_indices"):
    row(_name, 0, 0, lambda s: [s.a, s.b])

# -- pointwise: broadcasting aligns from the last dim --
_UNARY = (
    "abs relu sigmoid tanh exp log sqrt rsqrt neg sin cos erf floor round sign square reciprocal isfinite"
    " gelu silu mish elu celu softplus leaky_relu hardtanh hardswish hardsigmoid relu6 selu"
    " logical_not isnan nan_to_num clone detach alias lift_fresh lift_fresh_copy zero zeros_like ones_like _to_copy"
    " log_sigmoid_forward softshrink logit"
)
for _name in _UNARY.split():
    row(_name, 2, 0, lambda s: [t(s.a, s.b)])
for _name in ("add", "sub", "mul", "div", "atan2", "maximum", "minimum", "fmod", "remainder", "copysign", "logaddexp"):
    _op = _name if _name in ("atan2", "maximum", "minimum", "logaddexp") else _name + ".Tensor"
    row(_op, 3, 0, lambda s: [t(s.a, s.b, s.c), t(s.b, s.c)])
    row(_op, 3, 0, lambda s: [t(s.a, 1, s.c), t(s.b, 1)])
for _name in ("eq", "ne", "gt", "ge", "lt", "le", "pow"):
    row(_name + (".Tensor_Tensor" if _name == "pow" else ".Tensor"), 2, 0, lambda s: [t(s.a, s.b), t(s.a, s.b)])
for _name in ("add", "mul", "sub", "div", "eq", "gt", "remainder", "rsub"):
    row(_name + ".Scalar", 2, 0, lambda s: [t(s.a, s.b), 0.5])
row("pow.Tensor_Scalar", 2, 0, lambda s: [t(s.a, s.b), 3.0])
row("clamp", 2, 0, lambda s: [t(s.a, s.b), 0.2, 0.6])
row("clamp.Tensor", 2, 0, lambda s: [t(s.a, s.b), t(s.b), t(s.a, 1)])
row("threshold", 2, 0, lambda s: [t(s.a, s.b), 0.3, 0.0])
row("lerp.Tensor", 2, 0, lambda s: [t(s.a, s.b), t(s.b), t(s.a, 1)])
row("addcmul", 2, 0, lambda s: [t(s.a, s.b), t(s.b), t(s.a, 1)])
row("addcdiv", 2, 0, lambda s: [t(s.a, s.b), t(s.b), t(s.a, 1)])
row("bitwise_not", 2, 0, lambda s: [mask(s.a, s.b)])
row("bitwise_and.Tensor", 2, 0, lambda s: [mask(s.a, s.b), mask(s.b)])
row("logical_or", 2, 0, lambda s: [mask(s.a, s.b), mask(s.a, 1)])
row("masked_fill.Scalar", 2, 0, lambda s: [t(s.a, s.b), mask(s.b), 7.0])
row("where.self", 3, 0, lambda s: [mask(s.a, 1), t(s.b), t(s.c, 1, 1)])
row("where.ScalarOther", 2, 0, lambda s: [mask(s.a, s.b), t(s.b), 1.0])
row("_prelu_kernel", 3, 0, lambda s: [t(s.a, s.b, s.c), t(1, s.b, 1)])
row("add_.Tensor", 2, 0, lambda s: [t(s.a, s.b), t(s.b)])
row("mul_.Tensor", 2, 0, lambda s: [t(s.a, s.b), t(s.a, 1)])
row("relu_", 2, 0, lambda s: [t(s.a, s.b)])
row("copy_", 2, 0, lambda s: [t(s.a, s.b), t(s.b)])
row("copy", 2, 0, lambda s: [t(s.a, s.b), t(s.b)])
row("fill.Scalar", 2, 0, lambda s: [t(s.a, s.b), 1.0])
row("full_like", 2, 0, lambda s: [t(s.a, s.b), 2.0])
row("contiguous", 2, 0, lambda s: [t(s.a, s.b)])
row("prelu", 3, 0, lambda s: [t(s.a, s.b, s.c), t(s.b)])
row("prelu", 3, 0, lambda s: [t(s.a, s.b, s.c), t(1)])
for _name in ("rand_like", "randn_like", "empty_like", "bernoulli", "uniform", "uniform_", "normal_"):
    row(_name, 2, 0, lambda s: [t(s.a, s.b)], by_value=False)
row("normal.Tensor_float", 2, 0, lambda s: [t(s.a, s.b), 1.0], by_value=False)
row("native_dropout", 2, 0, lambda s: [t(s.a, s.b), 0.5, True], by_value=False)
row("rrelu_with_noise", 2, 0, lambda s: [t(s.a, s.b), t(s.a, s.b), 0.1, 0.3, False])
row("_assert_tensor_metadata", 2, 0, lambda s: [t(s.a, s.b)])

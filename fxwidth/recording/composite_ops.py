# ruff: noqa: A002, ARG001  (the arguments are named as in torch.rms_norm; a fake kernel needs only the shapes)
"""Ops that analysis keeps whole although ATen takes them apart, because their parts no longer say what they are.

And the reverse: recurrent layers, which some backends run as one op, are taken apart into their gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import _disable_current_modes

from fxwidth.recording.channel_copies import copied_channels, copies_as_one_op
from fxwidth.runtime.module_state import is_plain_layer
from fxwidth.runtime.trace_guards import UntraceableError
from fxwidth.runtime.unseen_effects import See, look_at_call


@torch.library.custom_op("fxwidth::rms_norm", mutates_args=())
def _rms_norm_op(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    return torch.rms_norm(input, list(normalized_shape), weight, eps)


@_rms_norm_op.register_fake
def _(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    # Half precision is worked on, and normalised, in single precision.
    work = torch.float32 if torch.finfo(input.dtype).bits < 32 else input.dtype
    precise = torch.finfo(work).eps if eps is None else eps
    result: Tensor = torch.ops.fxwidth.rms_norm.default(input, list(normalized_shape), weight, precise)
    return result


@torch.library.custom_op("fxwidth::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    return FUSED_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    # Kernels lay out their results in different ways, and an exported graph has views of the one that it was made with.
    return FUSED_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


FUSED_ATTENTION: Callable[..., Tensor] = functional.scaled_dot_product_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return scaled dot-product attention as one op, its scale written out: the default is computed from a width."""
    if dropout_p > 0.0:
        # A graph with dropout baked into it draws random numbers in every mode: they are on the tape as such.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return FUSED_ATTENTION(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    result: Tensor = torch.ops.fxwidth.attention.default(
        query, key, value, attn_mask, 0.0, is_causal, scale=factor, enable_gqa=enable_gqa
    )
    return result


MULTI_HEAD_ATTENTION = functional.multi_head_attention_forward


def _attention_inside(*args: Any, **kwargs: Any) -> Any:
    # A mode does not see what a function it was told of calls in its turn.
    with patch.object(functional, "scaled_dot_product_attention", attention):
        return MULTI_HEAD_ATTENTION(*args, **kwargs)


@torch.library.custom_op("fxwidth::weight_norm", mutates_args=())
def _weight_norm_op(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return _WEIGHT_NORM(v, g, dim)


@_weight_norm_op.register_fake
def _(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_WEIGHT_NORM: Callable[..., Tensor] = torch._weight_norm


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    result: Tensor = torch.ops.fxwidth.weight_norm.default(v, g, dim)
    return result


@torch.library.custom_op("fxwidth::pad_packed_sequence", mutates_args=())
def _pad_packed_op(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    padded, lengths = _PAD_PACKED(data, batch_sizes, batch_first, padding_value, total_length)
    return padded, lengths


@_pad_packed_op.register_fake
def _(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    raise DynamicOutputShapeException(torch.ops.fxwidth.pad_packed_sequence.default)


_PAD_PACKED: Callable[..., tuple[Tensor, Tensor]] = torch._VF._pad_packed_sequence


def _pad_packed(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    padded, lengths = torch.ops.fxwidth.pad_packed_sequence.default(
        data, batch_sizes, batch_first, padding_value, total_length
    )
    return padded, lengths


def _real_counts(batch_sizes: Tensor) -> Tensor:
    """Return how many of packed sequences go on at each step: the ops' code reads them from memory."""
    counts = [size.item() for size in batch_sizes.unbind()]
    with _disable_current_modes():
        return torch.tensor(counts, device="cpu")


def _gate_by_gate(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a recurrent layer that is not run as one op by oneDNN or cuDNN: its gates are matrix products."""

    def run(*args: Any, **kwargs: Any) -> Any:
        # The public switches warn, or set more than this.
        before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        if isinstance(args[1], Tensor) and not args[1].is_floating_point():
            args = (args[0], _real_counts(args[1]), *args[2:])
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_mkldnn_enabled(before[0])
            torch._C._set_cudnn_enabled(before[1])

    return run


_BATCH_NORM: Callable[..., Tensor] = torch.batch_norm


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalise over the batch by one op, on every device: torch's function makes a tensor for cuDNN besides."""
    if input.numel() == 0:
        return _BATCH_NORM(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    result: Tensor = torch.ops.aten.native_batch_norm.default(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )[0]
    return result


class WholeOps(TorchFunctionMode):
    """Calls the whole op where a model calls the Python function.

    Args:
        see: takes what calls do of which no op tells, as for `watching_effects`; None where that is not asked.
    """

    def __init__(self, see: See | None = None) -> None:
        super().__init__()
        self._see = see

    def __exit__(self, *error: Any) -> None:
        """End it, unless it has been ended: after an interruption a context around it may be left late."""
        if _get_current_function_mode() is self:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one Python-level function."""
        kwargs = kwargs or {}
        if self._see is not None:
            look_at_call(self._see, func, kwargs)
        return _WHOLE.get(func, func)(*args, **kwargs)


def _refuse_data(*_: Any) -> None:
    """Refuse what no op tells of: another tensor put into one by an assignment."""
    raise UntraceableError("the model sets .data of a tensor, which no op tells of")


_WHOLE: dict[Any, Callable[..., Any]] = {
    Tensor.data.__set__: _refuse_data,  # type: ignore[attr-defined]
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    torch.ops.aten.rms_norm.default: _rms_norm,
    FUSED_ATTENTION: attention,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    MULTI_HEAD_ATTENTION: _attention_inside,
    _WEIGHT_NORM: _weight_norm,
    copied_channels: copies_as_one_op,
    _PAD_PACKED: _pad_packed,
    **{layer: _gate_by_gate(layer) for layer in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **{
        layer: _gate_by_gate(layer)
        for packet in (torch.ops.aten.lstm, torch.ops.aten.gru, torch.ops.aten.rnn_tanh, torch.ops.aten.rnn_relu)
        for layer in (packet.input, packet.data)
    },
}

# What a rewritten graph calls in the place of a whole op, so that it does not need fxwidth to run.
PLAIN_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.fxwidth.rms_norm.default: torch.rms_norm,
    torch.ops.fxwidth.attention.default: FUSED_ATTENTION,
    torch.ops.fxwidth.weight_norm.default: _WEIGHT_NORM,
    torch.ops.fxwidth.copied_channels.default: copied_channels,
    torch.ops.fxwidth.pad_packed_sequence.default: _PAD_PACKED,
}


def calls_no_whole_op(target: Any, kind: str) -> bool:
    """Tell whether a node is sure to call none of these functions, so that its calls need no watching.

    Args:
        target: a module, or the target of a node that calls something else.
        kind: the node's op.
    """
    if kind == "call_module":
        return is_plain_layer(target) and not isinstance(target, nn.MultiheadAttention | nn.RMSNorm)
    # What is written in C++ calls nothing that is written in Python.
    return kind == "call_function" and isinstance(target, BuiltinFunctionType | OpOverload) and target not in _WHOLE

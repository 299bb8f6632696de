# ruff: noqa: A002, ARG001  (the arguments are named as in torch.rms_norm; a fake kernel needs only the first)
"""Ops that analysis keeps whole although ATen takes them apart, because their parts no longer say what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("fxwidth::rms_norm", mutates_args=())
def _rms_norm_op(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    return torch.rms_norm(input, list(normalized_shape), weight, eps)


@_rms_norm_op.register_fake
def _(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(input)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    precise = torch.finfo(input.dtype).eps if eps is None else eps
    result: Tensor = torch.ops.fxwidth.rms_norm.default(input, list(normalized_shape), weight, precise)
    return result


class WholeOps(TorchFunctionMode):
    """Calls the whole op where a model calls the Python function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one Python-level function."""
        return _WHOLE.get(func, func)(*args, **(kwargs or {}))


_WHOLE: dict[Any, Callable[..., Any]] = {functional.rms_norm: _rms_norm, torch.rms_norm: _rms_norm}

# What a rewritten graph calls in the place of a whole op, so that it does not need fxwidth to run.
PLAIN_FUNCTIONS: dict[Any, Callable[..., Any]] = {torch.ops.fxwidth.rms_norm.default: torch.rms_norm}

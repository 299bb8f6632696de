"""Ops whose operands may lie in memory otherwise than when they were recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload

_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})
# Some versions of torch have these for contiguous operands alone, as which the operands had been recorded.
_CONTIGUOUS = {torch.ops.aten.native_group_norm.default: "input"}


def for_any_layout(
    func: OpOverload, arguments: Mapping[str, Any], contiguous: Callable[[Any], Any]
) -> tuple[OpOverload, dict[str, Any]]:
    """Return an op that does the same as one does, and its arguments, whatever the strides of its operands are.

    Args:
        func: an ATen op.
        arguments: its arguments by name.
        contiguous: makes of an operand what is contiguous.
    """
    if func in _VIEWS:
        return torch.ops.aten.reshape.default, {"self": arguments["self"], "shape": arguments["size"]}
    name = _CONTIGUOUS.get(func)
    return func, dict(arguments) if name is None else {**arguments, name: contiguous(arguments[name])}

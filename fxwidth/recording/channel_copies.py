"""Copies of channels by a table of numbers, which no op of torch says of in a way that a resize can follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

NOTHING = -1
"""What stands in a table for a channel that reads nothing, and is zero."""


def copied_channels(x: Tensor, table: Sequence[int], dim: int) -> Tensor:
    """Return copies of channels: along `dim`, entry j of the result is entry table[j] of x, or zero where that is -1.

    Graphs call it; analysis sees it as one op whose operand and result have widths of their own.

    Shapes: (..., channels, ...) -> (..., len(table), ...).
    """
    if has_torch_function_unary(x):
        # A tracer keeps the call, and analysis puts the whole op in its place.
        copies: Tensor = handle_torch_function(copied_channels, (x,), x, table, dim)
        return copies
    read = torch.tensor([0 if source == NOTHING else source for source in table], dtype=torch.int64, device=x.device)
    copies = x.index_select(dim, read)
    missing = [place for place, source in enumerate(table) if source == NOTHING]
    if not missing:
        return copies
    return copies.index_fill(dim, torch.tensor(missing, dtype=torch.int64, device=x.device), 0)


@torch.library.custom_op("fxwidth::copied_channels", mutates_args=())
def _copied_channels_op(self: Tensor, table: Sequence[int], dim: int) -> Tensor:
    return copied_channels(self, table, dim)


@_copied_channels_op.register_fake
def _(self: Tensor, table: Sequence[int], dim: int) -> Tensor:
    shape = list(self.shape)
    shape[dim] = len(table)
    return self.new_empty(shape)


def copies_as_one_op(x: Tensor, table: Sequence[int], dim: int) -> Tensor:
    """Do what `copied_channels` does, by one op."""
    copies: Tensor = torch.ops.fxwidth.copied_channels.default(x, list(table), dim)
    return copies

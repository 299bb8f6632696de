"""The rows of a parameter that belong to the channels of a group."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxwidth.axes.index_maps import Indices


def row_index(positions: Indices, tensor: Tensor, dim: int) -> Tensor | None:
    """Return where channels lie in a dim of a tensor, [channels, positions each]; None for all of it in order."""
    if positions.size == tensor.shape[dim] == len(positions) and (positions[:, 0] == np.arange(len(positions))).all():
        return None
    return torch.from_numpy(positions).to(tensor.device)


def channel_rows(tensor: Tensor, dim: int, index: Tensor | None) -> Tensor:
    """Return the entries of each channel, [channels, positions each, everything else]; gradients flow through."""
    rows = tensor.movedim(dim, 0).flatten(1)
    # Nearly always it is all of them, which needs no copy.
    return rows[:, None] if index is None else rows.index_select(0, index.view(-1)).view(*index.shape, -1)
